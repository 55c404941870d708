// SPDX-License-Identifier: Apache-2.0
//! The container runtimes of this host, asked one after the other. One may be down, restart, or be installed later:
//! its socket is looked for each time that something is asked. Where a socket was and is no more, the runtime is down:
//! it removes the socket when it stops, and an old one when it starts. Until one that starts has its books read, it
//! answers with an error.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use clap::Args;
use cri::Client;
use tokio::time::timeout;

use super::{
    Workload,
    cgroup::ContainerId,
    docker::{Docker, DockerError},
};

/// How long a runtime may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// Where runtimes have their sockets. Kubernetes' way comes first: what it knows of a container is more.
const CRI_SOCKETS: [&str; 6] = [
    "/run/containerd/containerd.sock",
    "/run/crio/crio.sock",
    "/run/k3s/containerd/containerd.sock",
    "/run/k0s/containerd.sock",
    "/var/snap/microk8s/common/run/containerd.sock",
    "/run/cri-dockerd.sock",
];
const DOCKER_SOCKETS: [&str; 2] = ["/run/docker.sock", "/run/podman/podman.sock"];

#[derive(Args, Clone, Debug)]
pub struct WorkloadSettings {
    /// YAML file that names containers and gives them labels, by cgroup; asked before the container runtime.
    #[arg(long, env = "ROUTER_LABELS", value_name = "FILE")]
    pub labels: Option<PathBuf>,

    /// Unix socket of the container runtime that knows the labels: one that speaks CRI (containerd, CRI-O) or Docker's
    /// API (Docker, Podman). auto: all that are at their usual places; none: labels come from ROUTER_LABELS only.
    #[arg(long, env = "ROUTER_RUNTIME", default_value = "auto", value_name = "SOCKET|auto|none")]
    pub runtime: RuntimeSetting,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeSetting {
    Auto,
    None,
    Socket(PathBuf),
}

impl FromStr for RuntimeSetting {
    type Err = String;

    fn from_str(text: &str) -> Result<RuntimeSetting, String> {
        match text {
            "auto" => Ok(RuntimeSetting::Auto),
            "none" => Ok(RuntimeSetting::None),
            path if path.starts_with('/') => Ok(RuntimeSetting::Socket(path.into())),
            _ => {
                Err("expected auto, none, or a socket's path such as /run/containerd/containerd.sock".into())
            }
        }
    }
}

/// What the runtimes know of a container.
pub enum Answer {
    Is(Workload),
    /// All have answered, and none knows it.
    Nowhere,
    /// One that may know it did not answer.
    Unreachable,
}

#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{}", _0.message())]
    Cri(cri::Error),
    #[error("{0}")]
    Docker(#[from] DockerError),
    #[error("no answer within {ANSWER:?}")]
    Late,
}

pub struct Runtimes {
    list: Vec<Runtime>,
}

struct Runtime {
    socket: PathBuf,
    api: Api,
    /// Somebody says that there is one, or there was.
    is_expected: AtomicBool,
    /// Said once, and that it answers again.
    is_down: AtomicBool,
}

enum Api {
    Cri(Client),
    Docker(Docker),
    /// Whichever answers.
    Either(Client, Docker),
}

impl Runtimes {
    /// Must be called in a tokio runtime. An error: the path is not UTF-8.
    pub fn new(setting: &RuntimeSetting) -> Result<Runtimes, RuntimeError> {
        let client = |path: &Path| Client::new(path, ANSWER).map_err(RuntimeError::Cri);
        let runtime = |path: &Path, api, is_given| Runtime {
            socket: path.to_owned(),
            api,
            is_expected: AtomicBool::new(is_given || path.exists()),
            is_down: AtomicBool::new(false),
        };
        let mut list = Vec::new();
        match setting {
            RuntimeSetting::Auto => {
                for path in CRI_SOCKETS.map(Path::new) {
                    list.push(runtime(path, Api::Cri(client(path)?), false));
                }
                for path in DOCKER_SOCKETS.map(Path::new) {
                    list.push(runtime(path, Api::Docker(Docker::new(path)), false));
                }
            }
            RuntimeSetting::None => {}
            RuntimeSetting::Socket(path) => {
                list.push(runtime(path, Api::Either(client(path)?, Docker::new(path)), true));
            }
        }
        Ok(Runtimes { list })
    }

    /// For the log: one that was given, and is not here.
    pub fn tell_of_missing(&self) {
        for runtime in self.expected().filter(|runtime| !runtime.socket.exists()) {
            log::warn!(
                "{}: no container runtime is there (--runtime, ROUTER_RUNTIME); rules that name labels match nothing until \
                 there is one",
                runtime.socket.display()
            );
        }
    }

    pub fn are_none(&self) -> bool {
        self.list.is_empty()
    }

    /// The first of these containers that a runtime knows.
    pub async fn find(&self, containers: &[ContainerId]) -> Answer {
        for container in containers {
            let mut all_answered = true;
            for runtime in self.expected() {
                match runtime.find(container).await {
                    Ok(Some(workload)) => return Answer::Is(workload),
                    Ok(None) => {}
                    Err(_) => all_answered = false,
                }
            }
            if !all_answered {
                return Answer::Unreachable;
            }
        }
        Answer::Nowhere
    }

    /// Each runtime that is expected here: its socket, and its name or why it does not answer.
    pub async fn probe(&self) -> Vec<(&Path, Result<String, RuntimeError>)> {
        let mut found = Vec::new();
        for runtime in self.expected() {
            found.push((runtime.socket.as_path(), runtime.in_time(runtime.name()).await));
        }
        found
    }

    fn expected(&self) -> impl Iterator<Item = &Runtime> {
        self.list.iter().filter(|runtime| runtime.is_expected())
    }
}

impl Runtime {
    fn is_expected(&self) -> bool {
        let is_here = self.socket.exists();
        self.is_expected.fetch_or(is_here, Ordering::Relaxed) || is_here
    }

    async fn find(&self, container: &ContainerId) -> Result<Option<Workload>, RuntimeError> {
        let answer = self.in_time(self.ask(container)).await;
        let socket = self.socket.display();
        match (&answer, self.is_down.swap(answer.is_err(), Ordering::Relaxed)) {
            (Err(error), false) => log::warn!(
                "{socket}: the container runtime does not answer: {error}; labels of containers that are not known yet \
                 are asked for again until it does"
            ),
            (Ok(_), true) => log::info!("{socket}: the container runtime answers again"),
            (Err(_), true) | (Ok(_), false) => {}
        }
        answer
    }

    async fn in_time<T>(
        &self,
        answer: impl Future<Output = Result<T, RuntimeError>>,
    ) -> Result<T, RuntimeError> {
        timeout(ANSWER, answer).await.unwrap_or(Err(RuntimeError::Late))
    }

    async fn ask(&self, container: &ContainerId) -> Result<Option<Workload>, RuntimeError> {
        match &self.api {
            Api::Cri(client) => super::cri::find(client, container).await.map_err(RuntimeError::Cri),
            Api::Docker(docker) => Ok(docker.find(container).await?),
            Api::Either(client, docker) => match super::cri::find(client, container).await {
                Ok(found) => Ok(found),
                // Where neither answers, what the first has said is as good.
                Err(error) => docker.find(container).await.map_err(|_| RuntimeError::Cri(error)),
            },
        }
    }

    async fn name(&self) -> Result<String, RuntimeError> {
        let docker_name = |is_there| if is_there { "Docker's API" } else { "no Docker's API" }.to_owned();
        match &self.api {
            Api::Cri(client) => super::cri::version(client).await.map_err(RuntimeError::Cri),
            Api::Docker(docker) => Ok(docker_name(docker.is_there().await?)),
            Api::Either(client, docker) => match super::cri::version(client).await {
                Ok(name) => Ok(name),
                Err(error) => docker.is_there().await.map(docker_name).map_err(|_| RuntimeError::Cri(error)),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RuntimeSetting;

    #[test]
    fn a_runtime_is_given_by_its_sockets_path() {
        assert_eq!("none".parse(), Ok(RuntimeSetting::None));
        assert_eq!("/run/x.sock".parse(), Ok(RuntimeSetting::Socket("/run/x.sock".into())));
        assert!("containerd".parse::<RuntimeSetting>().unwrap_err().contains("/run/containerd"));
    }
}
