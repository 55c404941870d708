// SPDX-License-Identifier: Apache-2.0
//! A Kubernetes API server with its etcd, on a host of the lab: real. By itself it has no nodes, and what a kubelet would
//! say of pods is said by the test; a [`Cluster`](crate::Cluster) has all that is missing.
//!
//! `test/kubernetes.sh` builds the server once.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{DEADLINE, Finished, Host, Place, Pod, Process, RouterOptions, wait_for};

pub(crate) const PORT: u16 = 6443;
/// Of Services; pods find it at the first.
pub(crate) const CLUSTER_IPS: &str = "10.96.0.0/16";
const ADMIN: &str = "admin";
/// May do what the router's role allows, and no more.
const ROUTER: &str = "router";
pub(crate) const CONTROLLERS: &str = "system:kube-controller-manager";
pub(crate) const SCHEDULER: &str = "system:kube-scheduler";
pub(crate) const PROXY: &str = "system:kube-proxy";

/// Users, and the groups that they are in. A user's name is also the user's token.
const USERS: [(&str, &str); 7] = [
    (ADMIN, "system:masters"),
    (ROUTER, ""),
    (CONTROLLERS, ""),
    (SCHEDULER, ""),
    (PROXY, ""),
    ("system:node:h1", "system:nodes"),
    ("system:node:h2", "system:nodes"),
];

/// What a router needs.
const ROLES: &str = "
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: ebpf-router}
rules:
- {apiGroups: [''], resources: [pods], verbs: [list, watch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: ebpf-router, namespace: kube-system}
rules:
- {apiGroups: [''], resources: [configmaps], resourceNames: [ebpf-router-rules], verbs: [list, watch]}
- {apiGroups: [''], resources: [events], verbs: [create]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: ebpf-router}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ebpf-router}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: router}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: ebpf-router, namespace: kube-system}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: ebpf-router}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: router}]
";

pub struct ApiServer {
    place: Place,
    directory: PathBuf,
    url: String,
    address: String,
    /// Does somebody make service accounts?
    controlled: bool,
    starts: u32,
    /// Before etcd: it is dropped first.
    server: Option<Process>,
    _etcd: Process,
}

impl ApiServer {
    /// On this host, ready, with a role for routers.
    pub fn start(host: &Host) -> Result<ApiServer> {
        let server = ApiServer::start_as(host, false)?;
        server.apply("roles", ROLES)?;
        Ok(server)
    }

    /// On this host, ready, for controllers and nodes to come.
    pub(crate) fn start_controlled(host: &Host) -> Result<ApiServer> {
        ApiServer::start_as(host, true)
    }

    fn start_as(host: &Host, controlled: bool) -> Result<ApiServer> {
        let directory = host.place().directory.join("api-server");
        std::fs::create_dir_all(&directory)?;
        let place = host.place().clone();
        let mut etcd = Command::new("etcd");
        etcd.arg("--data-dir").arg(directory.join("etcd")).args(["--log-level", "error"]);
        let mut server = ApiServer {
            _etcd: place.serve("etcd", &mut etcd, 2379)?,
            place,
            directory,
            url: format!("https://{}:{PORT}", host.address),
            address: host.address.to_string(),
            controlled,
            starts: 0,
            server: None,
        };
        server.write_secrets()?;
        server.start_again()?;
        Ok(server)
    }

    pub fn stop(&mut self) -> Result<()> {
        let server = self.server.take().context("no API server is running")?;
        server.signal(Signal::SIGKILL)?;
        server.wait(DEADLINE).map(drop)
    }

    /// With all that it knew.
    pub fn start_again(&mut self) -> Result<()> {
        let file = |name: &str| self.directory.join(name);
        let mut command = Command::new(kubernetes_program("kube-apiserver")?);
        command
            .args(["--bind-address", &self.address, "--advertise-address", &self.address])
            .args(["--secure-port", &PORT.to_string(), "--etcd-servers", "http://127.0.0.1:2379"])
            .args(["--authorization-mode", "Node,RBAC", "--service-cluster-ip-range", CLUSTER_IPS])
            .args(["--kubelet-preferred-address-types", "InternalIP"])
            .args(["--service-account-issuer", "https://kubernetes.default.svc"])
            .arg("--service-account-key-file")
            .arg(self.account_key())
            .arg("--service-account-signing-key-file")
            .arg(self.account_key())
            .arg("--token-auth-file")
            .arg(file("tokens.csv"))
            .arg("--cert-dir")
            .arg(file("certificates"));
        if !self.controlled {
            command.args(["--disable-admission-plugins", "ServiceAccount"]);
        }
        self.starts += 1;
        self.server = Some(self.place.spawn(&format!("api-server-{}", self.starts), &mut command)?);
        wait_for("the API server to be ready", DEADLINE * 4, || {
            self.server.as_mut().map(Process::fail_if_ended).transpose()?;
            let ready = self.kubectl(&["get", "--raw", "/readyz"]).is_ok();
            Ok((ready && self.kubectl(&["get", "namespace", "kube-system"]).is_ok()).then_some(()))
        })
        .with_context(|| self.server.as_ref().map(Process::stderr).unwrap_or_default())
    }

    /// For [`Host::start_router`]: rules by watch from the ConfigMap alone.
    pub fn router_options(&self) -> RouterOptions {
        RouterOptions::with_rules(Path::new("/does/not/exist"))
            .with("KUBECONFIG", &self.kubeconfig(ROUTER).to_string_lossy())
    }

    /// Runs kubectl as an administrator, and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.place.run(self.for_administrator(Command::new("kubectl").args(arguments)))
    }

    /// Runs a program that finds the server as kubectl does, as an administrator.
    pub fn run(&self, command: &mut Command, limit: Duration) -> Result<Finished> {
        let name = Path::new(command.get_program()).file_name().context("a command without a name")?;
        let name = name.to_string_lossy().into_owned();
        self.place.spawn(&name, self.for_administrator(command))?.wait(limit)
    }

    pub(crate) fn for_administrator<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("KUBECONFIG", self.kubeconfig(ADMIN)).env("HOME", &self.directory)
    }

    /// `kubectl apply` of this manifest.
    pub fn apply(&self, name: &str, manifest: &str) -> Result<()> {
        let path = self.directory.join(format!("{name}.yaml"));
        std::fs::write(&path, manifest)?;
        self.kubectl(&["apply", "-f", &path.to_string_lossy()]).map(drop)
    }

    /// The ConfigMap `ebpf-router-rules` with one rule in it.
    pub fn apply_rule(&self, name: &str, text: &str) -> Result<()> {
        let manifest = json!({
            "apiVersion": "v1", "kind": "ConfigMap",
            "metadata": { "name": "ebpf-router-rules", "namespace": "kube-system" },
            "data": { name: text },
        });
        self.apply("rules", &manifest.to_string())
    }

    /// What a list of this kind in this namespace holds.
    pub fn list(&self, namespace: &str, kind: &str) -> Result<Vec<Value>> {
        let text = self.kubectl(&["get", kind, "--namespace", namespace, "--output", "json"])?;
        let value: Value = serde_json::from_str(&text).with_context(|| format!("kubectl printed {text}"))?;
        Ok(value["items"].as_array().cloned().unwrap_or_default())
    }

    /// Tells of a pod as its kubelet would: it runs on this host.
    pub fn put_pod(&self, pod: &Pod, host: &Host) -> Result<()> {
        let name = &pod.name;
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "namespace": "default" },
            "spec": { "nodeName": host.name, "containers": [{ "name": name, "image": "none" }] },
        });
        self.apply(name, &manifest.to_string())?;
        let text = self.kubectl(&["get", "pod", name, "--output", "json"])?;
        let mut known: Value = serde_json::from_str(&text)?;
        known["status"] = json!({
            "phase": "Running", "hostIP": host.address, "podIP": pod.v4,
            "podIPs": [{ "ip": pod.v4 }, { "ip": pod.v6 }],
        });
        let path = self.directory.join(format!("{name}-status.json"));
        std::fs::write(&path, known.to_string())?;
        let raw = format!("/api/v1/namespaces/default/pods/{name}/status");
        self.kubectl(&["replace", "--raw", &raw, "--filename", &path.to_string_lossy()]).map(drop)
    }

    pub(crate) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.directory.join(format!("{}.kubeconfig", user.replace(':', "-")))
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn account_key(&self) -> PathBuf {
        self.directory.join("account.key")
    }

    /// With its authority's.
    pub(crate) fn certificate(&self) -> PathBuf {
        self.directory.join("certificates/apiserver.crt")
    }

    fn write_secrets(&self) -> Result<()> {
        let mut openssl = Command::new("openssl");
        openssl.args(["genrsa", "-out"]).arg(self.account_key()).arg("2048");
        self.place.run(&mut openssl)?;
        let mut tokens = String::new();
        for (user, groups) in USERS {
            tokens += &format!("{user},{user},{user},\"{groups}\"\n");
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "lab",
                "clusters": [{ "name": "lab", "cluster": {
                    "server": self.url, "certificate-authority": self.certificate(),
                } }],
                "users": [{ "name": user, "user": { "token": user } }],
                "contexts": [{ "name": "lab", "context": { "cluster": "lab", "user": user } }],
            });
            std::fs::write(self.kubeconfig(user), config.to_string())?;
        }
        std::fs::write(self.directory.join("tokens.csv"), tokens)?;
        Ok(())
    }
}

/// A program that `test/kubernetes.sh` builds.
pub(crate) fn kubernetes_program(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("KUBERNETES_PROGRAMS") {
        Some(directory) => PathBuf::from(directory),
        None => {
            PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache/ebpf-router")
        }
    };
    let path = directory.join(name);
    ensure!(path.exists(), "{} does not exist: `test/kubernetes.sh` builds it", path.display());
    Ok(path)
}
