// SPDX-License-Identifier: Apache-2.0
//! Docker's API: HTTP on a unix socket. Podman speaks it too, and its own beside it, which knows of pods.
//!
//! Docker has no pods, so a container is a pod of its own: its labels are the pod's too. In a Podman pod they are not.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
};

use http_body_util::{BodyExt, Empty, Limited};
use hyper::{Request, StatusCode, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, de::DeserializeOwned};
use tokio::{net::UnixStream, task::JoinSet};

use super::{Workload, cgroup::ContainerId, kept};

/// The longest answer that is read, bytes. What it says of one container is some 10 kB.
const MAX_ANSWER: usize = 4 << 20;
/// The oldest version of Podman's own API that present ones speak.
const LIBPOD: &str = "/v4.0.0/libpod";
/// Podman says so in every answer.
const IS_PODMAN: &str = "libpod-api-version";

#[derive(Debug, thiserror::Error)]
pub enum DockerError {
    #[error("{0}")]
    Connect(#[from] io::Error),
    #[error("{0}")]
    Http(#[from] hyper::Error),
    #[error("{0}")]
    Request(#[from] hyper::http::Error),
    #[error("its answer cannot be read: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("it answers {path} with status {status}, 200 or 404 expected")]
    Status { path: String, status: StatusCode },
    #[error("its answer is not understood: {0}")]
    Malformed(#[from] serde_json::Error),
}

#[derive(Clone, Debug)]
pub struct Docker {
    socket: PathBuf,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    name: String,
    config: Config,
    /// Podman: of its pod, empty if it is in none.
    #[serde(default)]
    pod: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Config {
    labels: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pod {
    name: String,
    labels: Option<BTreeMap<String, String>>,
}

struct Answer {
    is_podman: bool,
    body: Bytes,
}

impl Docker {
    pub fn new(socket: &Path) -> Docker {
        Docker { socket: socket.to_owned() }
    }

    /// Does one answer there?
    pub async fn is_there(&self) -> Result<bool, DockerError> {
        Ok(self.get("/_ping").await?.is_some())
    }

    pub async fn find(&self, id: &ContainerId) -> Result<Option<Workload>, DockerError> {
        let id = id.as_str();
        let Some(answer) = self.get(&format!("/containers/{id}/json")).await? else { return Ok(None) };
        if !answer.is_podman {
            return Ok(Some(workload(serde_json::from_slice(&answer.body)?, None)));
        }
        let path = format!("{LIBPOD}/containers/{id}/json");
        let Some(container) = self.get_json::<Container>(&path).await? else { return Ok(None) };
        let pod = match container.pod.as_str() {
            "" => None,
            pod => self.get_json::<Pod>(&format!("{LIBPOD}/pods/{pod}/json")).await?,
        };
        Ok(Some(workload(container, pod)))
    }

    async fn get_json<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, DockerError> {
        let answer = self.get(path).await?;
        Ok(answer.map(|answer| serde_json::from_slice(&answer.body)).transpose()?)
    }

    /// `None`: there is no such thing.
    async fn get(&self, path: &str) -> Result<Option<Answer>, DockerError> {
        let stream = TokioIo::new(UnixStream::connect(&self.socket).await?);
        let (mut sender, connection) = http1::handshake(stream).await?;
        // It ends with this question, also where that is given up; what goes wrong in it is told to the sender.
        let mut background = JoinSet::new();
        background.spawn(connection);
        let request = Request::get(path).header(HOST, "localhost").body(Empty::<Bytes>::new())?;
        let answer = sender.send_request(request).await?;
        let (status, is_podman) = (answer.status(), answer.headers().contains_key(IS_PODMAN));
        match status {
            StatusCode::OK => {
                let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
                Ok(Some(Answer { is_podman, body: body.map_err(DockerError::Body)?.to_bytes() }))
            }
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(DockerError::Status { path: path.to_owned(), status }),
        }
    }
}

fn workload(container: Container, pod: Option<Pod>) -> Workload {
    let name = container.name.trim_start_matches('/');
    let container_labels = kept(container.config.labels.unwrap_or_default());
    let (name, pod_labels) = match pod {
        Some(pod) => (format!("{}/{name}", pod.name), kept(pod.labels.unwrap_or_default())),
        None => (name.to_owned(), container_labels.clone()),
    };
    Workload { name, pod_labels, container_labels, unknown: Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(container: &str, pod: Option<&str>, name: &str, pod_app: Option<&str>) {
        let pod = pod.map(|pod| serde_json::from_str(pod).unwrap());
        let found = workload(serde_json::from_str(container).unwrap(), pod);
        assert_eq!((found.name.as_str(), found.pod_labels.get("app").map(String::as_str)), (name, pod_app));
    }

    #[test]
    fn a_container_of_docker_is_a_pod_of_its_own() {
        check(r#"{ "Name": "/web", "Config": { "Labels": { "app": "shop" } } }"#, None, "web", Some("shop"));
    }

    #[test]
    fn in_a_pod_of_podman_the_pods_labels_are_the_pods() {
        let container = r#"{ "Name": "web", "Pod": "1", "Config": { "Labels": { "app": "shop" } } }"#;
        check(container, Some(r#"{ "Name": "p", "Labels": null }"#), "p/web", None);
        check(container, Some(r#"{ "Name": "p", "Labels": { "app": "pod" } }"#), "p/web", Some("pod"));
    }

    #[test]
    fn labels_may_be_missing() {
        check(r#"{ "Name": "/web", "Config": { "Labels": null } }"#, None, "web", None);
    }
}
