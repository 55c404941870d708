// SPDX-License-Identifier: Apache-2.0
//! What the Kubernetes API server knows: the rules, in the ConfigMap `ebpf-router-rules`, which host each pod is on, and how
//! this host's are labelled.
//!
//! Both are watched on a thread of their own, so that a list of ten thousand pods delays no move. While the server is
//! away, what it has told stays; the router starts without it, too.

mod config_map;
mod pods;
mod reach;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use clap::{Args, ValueEnum};
use kube::{
    Client, Config,
    config::{AuthInfo, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tokio::sync::{mpsc, oneshot};

pub use config_map::CONFIG_MAP;
pub use pods::Pods;
pub use reach::Reach;

use crate::rules::Reading;

const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Of the rules, where neither a setting nor a service account says otherwise.
const NAMESPACE: &str = "kube-system";
const CONNECT: Duration = Duration::from_secs(5);

/// Whether and how the Kubernetes API server is asked.
#[derive(Args, Clone, Debug)]
pub struct ClusterSettings {
    /// Ask the Kubernetes API server for rules and for pods' hosts and labels. auto: if there is a service account or a kubeconfig.
    #[arg(
        long,
        env = "ROUTER_KUBERNETES",
        value_name = "auto|on|off",
        hide_possible_values = true,
        default_value = "auto"
    )]
    pub kubernetes: Mode,

    /// How to reach the API server; without it, by the service account of this pod.
    #[arg(long, env = "KUBECONFIG", value_name = "FILE", default_value = "", hide_default_value = true)]
    pub kubeconfig: String,

    /// Namespace of the ConfigMap ebpf-router-rules; without it, the router's own, or kube-system.
    #[arg(
        long,
        env = "ROUTER_NAMESPACE",
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    pub rules_namespace: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Auto,
    On,
    Off,
}

/// To the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way<'a> {
    File(&'a Path),
    ServiceAccount,
}

#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    #[error("KUBECONFIG={path}: {reason}; give the path of a kubeconfig that `kubectl --kubeconfig` takes", path = path.display())]
    Kubeconfig { path: PathBuf, reason: String },
    #[error(
        "KUBECONFIG={path}: its user authenticates by the program {program}, and the router starts none; give a kubeconfig \
         with a token, a token file or a client certificate", path = path.display()
    )]
    Program { path: PathBuf, program: String },
    #[error("the service account cannot be used: {0}; give --kubeconfig, or --kubernetes off")]
    ServiceAccount(InClusterError),
    #[error(
        "ROUTER_KUBERNETES=on, but there is no API server to ask: run in a pod with a service account, or give --kubeconfig"
    )]
    Nothing,
    #[error("{server}: cannot be talked to: {source}")]
    Client { server: String, source: kube::Error },
    #[error("no thread for the API server: {0}")]
    Thread(std::io::Error),
}

/// How to reach the API server.
#[derive(Clone)]
pub struct Access {
    config: Config,
    /// Of the rules.
    pub namespace: String,
}

impl Access {
    /// `None`: there is no Kubernetes.
    pub async fn find(settings: &ClusterSettings) -> Result<Option<Access>, ClusterError> {
        let in_cluster =
            std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() && Path::new(SERVICE_ACCOUNT).exists();
        let (mut config, own) = match settings.way(in_cluster) {
            Some(Way::File(path)) => (from_file(path).await?, NAMESPACE.to_owned()),
            Some(Way::ServiceAccount) => {
                let config = Config::incluster().map_err(ClusterError::ServiceAccount)?;
                let own = config.default_namespace.clone();
                (config, own)
            }
            None if settings.kubernetes == Mode::On => return Err(ClusterError::Nothing),
            None => return Ok(None),
        };
        config.connect_timeout = Some(CONNECT);
        let given = Some(&settings.rules_namespace).filter(|given| !given.is_empty());
        let namespace = given.cloned().unwrap_or(own);
        Ok(Some(Access { config, namespace }))
    }

    pub fn server(&self) -> String {
        self.config.cluster_url.to_string()
    }

    /// Does the API server answer?
    pub async fn probe(&self) -> Result<(), String> {
        let client = self.client().map_err(|error| error.to_string())?;
        match tokio::time::timeout(CONNECT, client.apiserver_version()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(reach::in_one_line(&error)),
            Err(_) => Err(format!("no answer in {} s", CONNECT.as_secs())),
        }
    }

    fn client(&self) -> Result<Client, ClusterError> {
        Client::try_from(self.config.clone())
            .map_err(|source| ClusterError::Client { server: self.server(), source })
    }
}

impl ClusterSettings {
    fn way(&self, in_cluster: bool) -> Option<Way<'_>> {
        match self.kubernetes {
            Mode::Off => None,
            Mode::Auto | Mode::On if !self.kubeconfig.is_empty() => {
                Some(Way::File(Path::new(&self.kubeconfig)))
            }
            Mode::Auto | Mode::On => in_cluster.then_some(Way::ServiceAccount),
        }
    }
}

async fn from_file(path: &Path) -> Result<Config, ClusterError> {
    // Below its first line, what is wrong with the text is followed by the text, which may hold a token.
    let wrong = |error: KubeconfigError| {
        let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
        ClusterError::Kubeconfig { path: path.to_owned(), reason }
    };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(wrong)?;
    match program(&config.auth_info) {
        Some(program) => Err(ClusterError::Program { path: path.to_owned(), program }),
        None => Ok(config),
    }
}

/// What would be started for credentials. The filter of system calls kills whoever starts a program.
fn program(user: &AuthInfo) -> Option<String> {
    let plugin = user.exec.as_ref().map(|exec| exec.command.clone().unwrap_or_default());
    plugin.or_else(|| user.auth_provider.as_ref()?.config.get("cmd-path").cloned())
}

/// The watches, which run as long as the process.
#[derive(Clone)]
pub struct Cluster {
    pub pods: Pods,
    pub reach: Arc<Reach>,
}

impl Cluster {
    /// Returns when the thread runs, not when the server has answered. `own`: the addresses of this host.
    pub async fn start(
        access: Access,
        own: Vec<IpAddr>,
        readings: mpsc::Sender<Reading>,
    ) -> Result<Cluster, ClusterError> {
        let reach = Arc::new(Reach::new(access.server()));
        let cluster = Cluster { pods: Pods::of_host(own), reach };
        let watched = cluster.clone();
        let (ready, started) = oneshot::channel();
        let run = move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(ready.send(Err(ClusterError::Thread(error)))),
            };
            runtime.block_on(async {
                match access.client() {
                    Ok(client) => {
                        let _ = ready.send(Ok(()));
                        watched.watch(client, &access.namespace, &readings).await;
                    }
                    Err(error) => drop(ready.send(Err(error))),
                }
            });
        };
        std::thread::Builder::new().name("cluster".into()).spawn(run).map_err(ClusterError::Thread)?;
        started.await.unwrap_or(Err(ClusterError::Nothing))?;
        Ok(cluster)
    }

    async fn watch(&self, client: Client, namespace: &str, readings: &mpsc::Sender<Reading>) {
        tokio::join!(
            pods::watch(client.clone(), &self.pods, &self.reach),
            config_map::watch(client.clone(), namespace, readings, &self.reach),
            self.reach.keep(&client),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(kubernetes: Mode, kubeconfig: &str, in_cluster: bool, expected: Option<Way<'_>>) {
        let settings =
            ClusterSettings { kubernetes, kubeconfig: kubeconfig.into(), rules_namespace: String::new() };
        assert_eq!(settings.way(in_cluster), expected);
    }

    #[test]
    fn the_api_server_is_asked_where_there_is_a_way_to_it() {
        let file = Way::File(Path::new("/etc/kubeconfig"));
        check(Mode::Auto, "", false, None);
        check(Mode::Auto, "", true, Some(Way::ServiceAccount));
        check(Mode::Auto, "/etc/kubeconfig", true, Some(file));
        check(Mode::On, "/etc/kubeconfig", false, Some(file));
        check(Mode::Off, "/etc/kubeconfig", true, None);
    }

    #[test]
    fn a_program_that_would_be_started_for_credentials_is_noticed() {
        for (user, expected) in [
            ("{ exec: { command: aws } }", Some("aws")),
            (
                "{ auth-provider: { name: gcp, config: { cmd-path: /usr/bin/gcloud } } }",
                Some("/usr/bin/gcloud"),
            ),
            ("{ tokenFile: /var/run/token }", None),
        ] {
            let user = serde_yaml::from_str(user).unwrap();
            assert_eq!(program(&user).as_deref(), expected);
        }
    }
}
