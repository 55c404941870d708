// SPDX-License-Identifier: Apache-2.0
//! The router's HTTP server: metrics, and a page that shows the flows. It only reads, and only answers GET and HEAD.
//!
//! It runs on a thread of its own and asks the coordinator as the commands do: whoever looks never holds a move up. The
//! flows are asked for once in two seconds, however many look at them.

mod page;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdTcpListener},
    sync::Arc,
    time::{Duration, Instant},
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ACCEPT, ALLOW, CONTENT_TYPE, HOST, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpListener,
    sync::{Mutex, Semaphore, mpsc},
    time::timeout,
};

use crate::{
    control::asked,
    coordinator::{FlowView, Status, Wish},
    live::Sampler,
    metrics,
    settings::See,
};

/// How long the page's figures are good for.
const FRESH: Duration = Duration::from_secs(2);
/// Connections at a time, of each address; more wait.
const MAX_CONNECTIONS: usize = 32;
/// For a request's head, and for an answer.
const HEAD: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(10);
/// How long a connection may live.
const LIFE: Duration = Duration::from_secs(300);

/// Nothing but our own files, and nothing of anybody else around them.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

#[derive(Debug, thiserror::Error)]
pub enum WebError {
    #[error("{name}={address}: cannot be listened on: {source}; give another address and port of this host")]
    Listen { name: &'static str, address: SocketAddr, source: io::Error },
    #[error("the web server's thread cannot be started: {0}")]
    Thread(io::Error),
}

/// What one address serves.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Offer {
    metrics: bool,
    page: bool,
}

/// Listen where the settings say, if anywhere.
pub fn start(settings: &See, host: IpAddr, wishes: mpsc::Sender<Wish>) -> Result<(), WebError> {
    let mut doors = Vec::new();
    for (name, address, offer) in offers(settings) {
        let listen = |address| {
            let listener = StdTcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = listen(address).map_err(|source| WebError::Listen { name, address, source })?;
        if offer.metrics {
            log::info!("metrics at http://{address}/metrics");
        }
        if offer.page {
            log::info!("the web page is at http://{address}/");
            if !address.ip().is_loopback() {
                log::warn!(
                    "ROUTER_WEB={address}: whoever reaches this address sees all connections; nobody is asked who they are"
                );
            }
        }
        doors.push((listener, offer));
    }
    if doors.is_empty() {
        return Ok(());
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(WebError::Thread)?;
    let site = Arc::new(Site { host, wishes, shown: Mutex::default() });
    let serve_all = move || {
        runtime.block_on(async {
            let mut serving = tokio::task::JoinSet::new();
            for (listener, offer) in doors {
                serving.spawn(serve(listener, offer, Arc::clone(&site)));
            }
            while serving.join_next().await.is_some() {}
        });
    };
    std::thread::Builder::new().name("web".into()).spawn(serve_all).map(drop).map_err(WebError::Thread)
}

/// One address may do both.
fn offers(settings: &See) -> Vec<(&'static str, SocketAddr, Offer)> {
    match (settings.metrics, settings.web) {
        (Some(metrics), Some(web)) if metrics == web => {
            vec![("ROUTER_WEB", web, Offer { metrics: true, page: true })]
        }
        (metrics, web) => {
            let metrics =
                metrics.map(|address| ("ROUTER_METRICS", address, Offer { metrics: true, page: false }));
            let web = web.map(|address| ("ROUTER_WEB", address, Offer { metrics: false, page: true }));
            metrics.into_iter().chain(web).collect()
        }
    }
}

struct Site {
    /// HOST_IF's address.
    host: IpAddr,
    wishes: mpsc::Sender<Wish>,
    shown: Mutex<Shown>,
}

/// What the page was told last.
#[derive(Default)]
struct Shown {
    sampler: Sampler,
    json: Bytes,
    made: Option<Instant>,
}

async fn serve(listener: StdTcpListener, offer: Offer, site: Arc<Site>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return log::error!("the web server cannot listen: {error}"),
    };
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // It is never closed.
    while let Ok(place) = Arc::clone(&room).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                log::debug!("a web connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let site = Arc::clone(&site);
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let site = Arc::clone(&site);
                async move { Ok::<_, Infallible>(site.answer(&request, offer).await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(16 << 10)
                .serve_connection(TokioIo::new(stream), answer);
            // Whatever a client does wrong is its own matter.
            let _ = timeout(LIFE, connection).await;
            drop(place);
        });
    }
}

type Answer = Response<Full<Bytes>>;

impl Site {
    async fn answer(&self, request: &Request<Incoming>, offer: Offer) -> Answer {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            let mut refusal =
                text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD: this page only shows\n");
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            return refusal;
        }
        let path = request.uri().path();
        if offer.metrics && path == "/metrics" {
            let wants_open_metrics = request.headers().get_all(ACCEPT).iter().any(|accept| {
                accept.to_str().is_ok_and(|text| text.contains("application/openmetrics-text"))
            });
            return self.metrics(wants_open_metrics).await;
        }
        if !offer.page {
            return text(StatusCode::NOT_FOUND, "not found: metrics are at /metrics\n");
        }
        // A name that somebody else's server has given our address: their page would read ours.
        let host = request.headers().get(HOST).and_then(|host| host.to_str().ok());
        if !host.is_some_and(is_address) {
            let words =
                "the Host header must be an address or localhost: open this page by the host's address\n";
            return text(StatusCode::FORBIDDEN, words);
        }
        match path {
            "/" => file("text/html; charset=utf-8", include_str!("web/page.html")),
            "/page.css" => file("text/css; charset=utf-8", include_str!("web/page.css")),
            "/page.js" => file("text/javascript; charset=utf-8", include_str!("web/page.js")),
            "/flows.json" => self.flows().await,
            _ => text(StatusCode::NOT_FOUND, "not found\n"),
        }
    }

    async fn metrics(&self, open: bool) -> Answer {
        let Ok(Ok(figures)) = timeout(ANSWER, asked(&self.wishes, Wish::Figures)).await else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the router is stopping or does not answer\n");
        };
        let body = metrics::open_metrics(&figures, logging::lost_lines());
        if open {
            respond(StatusCode::OK, metrics::OPEN_METRICS, body.into())
        } else {
            respond(StatusCode::OK, metrics::PROMETHEUS, metrics::prometheus(&body).into())
        }
    }

    async fn flows(&self) -> Answer {
        let mut shown = self.shown.lock().await;
        if shown.made.is_none_or(|made| made.elapsed() >= FRESH) {
            let Ok(Ok((status, flows))) = timeout(ANSWER, self.ask()).await else {
                return text(StatusCode::SERVICE_UNAVAILABLE, "the router is stopping or does not answer\n");
            };
            let now = Instant::now();
            let lives = shown.sampler.look(now, flows);
            match serde_json::to_vec(&page::shown(self.host, &status, lives)) {
                Ok(json) => shown.json = json.into(),
                Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
            }
            shown.made = Some(now);
        }
        respond(StatusCode::OK, "application/json", shown.json.clone())
    }

    async fn ask(&self) -> io::Result<(Status, Vec<FlowView>)> {
        let flows = asked(&self.wishes, Wish::Flows).await?;
        Ok((asked(&self.wishes, Wish::Status).await?, flows))
    }
}

/// Is this Host header an address, or localhost, with or without a port?
fn is_address(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

fn file(kind: &'static str, content: &'static str) -> Answer {
    respond(StatusCode::OK, kind, Bytes::from_static(content.as_bytes()))
}

fn text(status: StatusCode, words: &str) -> Answer {
    respond(status, "text/plain; charset=utf-8", words.to_owned().into())
}

fn respond(status: StatusCode, kind: &'static str, body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    for (name, value) in [
        (CONTENT_TYPE.as_str(), kind),
        ("content-security-policy", POLICY),
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-resource-policy", "same-origin"),
        ("cache-control", "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_shown_by_address_and_by_no_other_name() {
        for good in ["127.0.0.1", "127.0.0.1:9465", "[::1]:9465", "[::1]", "localhost:9465", "LOCALHOST"] {
            assert!(is_address(good), "{good}");
        }
        for bad in
            ["evil.example", "evil.example:9465", "127.0.0.1.evil.example", "", "[::1", "localhost.example"]
        {
            assert!(!is_address(bad), "{bad}");
        }
    }

    #[test]
    fn one_address_serves_both_if_it_is_given_twice() {
        let address: SocketAddr = "127.0.0.1:9464".parse().unwrap();
        let other: SocketAddr = "127.0.0.1:9465".parse().unwrap();
        let number = |metrics, web| offers(&See { metrics, web }).len();
        assert_eq!(number(Some(address), Some(address)), 1);
        assert_eq!(number(Some(address), Some(other)), 2);
        assert_eq!(number(None, None), 0);
    }
}
