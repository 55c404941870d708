// SPDX-License-Identifier: Apache-2.0
//! Requests over HTTP: nginx and wrk.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE,
    programs::{NGINX_PORT, directory, nginx},
};
use nix::sys::signal::Signal;

use super::{ALL_PODS, Key, Part, Quantity, Run, Setting, figure::Target};

pub static KEY: Key = Key {
    name: "rate",
    title: "requests per second, over new and over kept connections",
    rules: ALL_PODS,
    rounds: 7,
    most_rounds: 21,
    parts,
    live: None,
};

static NEW: Quantity =
    Quantity::more("requests with a new connection each", "1/s").target(Target::OfOverlay(0.97));
static KEPT: Quantity = Quantity::more("requests over kept connections", "1/s");
static KEPT_P99: Quantity = Quantity::less("99th percentile, kept connections", "ms");

/// What nginx does with a connection after a request.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Connections {
    New,
    Kept,
}

fn parts(setting: &Setting) -> Result<Vec<Part>> {
    let root = root(setting)?;
    let again = root.clone();
    let new = Part::new("new connections", move |run| {
        let Wrk { requests_per_s, .. } = once(run, &root, Connections::New)?;
        Ok(vec![NEW.of("nginx, wrk", requests_per_s)])
    });
    let kept = Part::new("kept connections", move |run| {
        let Wrk { requests_per_s, p99_ms } = once(run, &again, Connections::Kept)?;
        Ok(vec![KEPT.of("nginx, wrk", requests_per_s), KEPT_P99.of("nginx, wrk", p99_ms)])
    });
    Ok(vec![new, kept])
}

/// A directory with a small page.
pub fn root(setting: &Setting) -> Result<PathBuf> {
    let root = directory(&setting.lab, "root")?;
    std::fs::write(root.join("index.html"), "x".repeat(600))?;
    Ok(root)
}

pub struct Wrk {
    pub requests_per_s: f64,
    pub p99_ms: f64,
}

/// 32 connections at a time.
pub fn once(run: &Run<'_>, root: &Path, connections: Connections) -> Result<Wrk> {
    let further = if connections == Connections::New { "; keepalive_timeout 0" } else { "" };
    let server = run.serve(&nginx(run.server, run.address, root, further)?, NGINX_PORT)?;
    let before = opened(run)?;
    let url = format!("http://{}:{NGINX_PORT}/index.html", run.address);
    let wrk = parse(&run.client(&format!("wrk --latency -t 1 -c 32 -d {} {url}", run.seconds))?)?;
    let (opened, requests) = (opened(run)? - before, wrk.requests_per_s * f64::from(run.seconds));
    let as_wanted = match connections {
        Connections::New => opened > 0.9 * requests,
        Connections::Kept => opened < 1000.0,
    };
    ensure!(as_wanted, "{opened} connections were made for {requests} requests");
    // Killed, it would leave its workers behind, and them serving the next round.
    server.signal(Signal::SIGTERM)?;
    server.wait(DEADLINE)?.expect_success()?;
    Ok(wrk)
}

/// Connections that were made so far in the client's network.
fn opened(run: &Run<'_>) -> Result<f64> {
    let counters = run.client.run(Command::new("cat").arg("/proc/net/snmp"))?;
    let mut tcp = counters.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = tcp.next().zip(tcp.next()).context("no TCP in /proc/net/snmp")?;
    let mut both = names.split(' ').zip(values.split(' '));
    Ok(both.find(|(name, _)| *name == "ActiveOpens").context("no ActiveOpens")?.1.parse()?)
}

fn parse(output: &str) -> Result<Wrk> {
    for wrong in ["Non-2xx", "Socket errors"] {
        ensure!(!output.contains(wrong), "{output}");
    }
    let after = |words: &str| {
        let text =
            output.split_once(words).map(|(_, rest)| rest.split_whitespace().next().unwrap_or_default());
        text.with_context(|| format!("no \"{words}\" in what wrk printed:\n{output}"))
    };
    let p99 = after(" 99%")?;
    let unit = [("us", 0.001), ("ms", 1.0), ("s", 1000.0)];
    let p99_ms =
        unit.into_iter().find_map(|(unit, ms)| Some(p99.strip_suffix(unit)?.parse::<f64>().ok()? * ms));
    Ok(Wrk {
        requests_per_s: after("Requests/sec:")?.parse()?,
        p99_ms: p99_ms.with_context(|| format!("99%: {p99}"))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "  Latency Distribution\n     50%  512.00us\n     90%  900.00us\n     99%    1.20ms\n\
                          \x20 105312 requests in 4.00s, 85.61MB read\nRequests/sec:  26326.77\n";

    #[test]
    fn figures_are_found_in_what_wrk_prints() {
        let got = parse(OUTPUT).unwrap();
        assert_eq!((got.requests_per_s, got.p99_ms), (26326.77, 1.2));
        assert_eq!(parse(&OUTPUT.replace("1.20ms", "850.00us")).unwrap().p99_ms, 0.85);
    }

    #[test]
    fn failed_requests_are_an_error() {
        let output = format!("  Socket errors: connect 0, read 3, write 0, timeout 0\n{OUTPUT}");
        assert!(parse(&output).is_err());
    }
}
