// SPDX-License-Identifier: Apache-2.0
//! A Kubernetes cluster of two nodes, which are the lab's hosts: kubelet, kube-proxy and containerd on both; API server,
//! controllers, scheduler and a DNS server on h1. All real, and built or installed from Debian, but for one thing: the names
//! of Services are read from the API server by a script and served by dnsmasq.
//!
//! Each host has its own /run, /etc, /var/lib, /var/log, /sys/fs/bpf and cgroups, in its mount namespace, so that manifests
//! mean on it what they mean on a machine. Everything ends with the lab.

mod node;

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};

use crate::{
    ApiServer, DEADLINE, Lab, Process,
    api_server::{CONTROLLERS, SCHEDULER, kubernetes_program},
    containerd::Containerd,
    wait_for,
};

use node::{Node, dns_address};

/// For what takes many steps of many programs.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// A Kubernetes cluster, running. Drop it before its lab.
pub struct Cluster<'lab> {
    lab: &'lab Lab,
    /// Nodes first: they are dropped before those that they ask.
    nodes: Vec<Node<'lab>>,
    programs: Vec<Process>,
    server: ApiServer,
}

impl<'lab> Cluster<'lab> {
    /// With both nodes ready.
    pub fn start(lab: &'lab Lab) -> Result<Cluster<'lab>> {
        for host in lab.hosts() {
            node::furnish(host)?;
        }
        let server = ApiServer::start_controlled(&lab.h1)?;
        let mut cluster = Cluster { lab, nodes: Vec::new(), programs: Vec::new(), server };
        cluster.start_controllers()?;
        cluster.start_names()?;
        for host in lab.hosts() {
            let node = Node::start(host, &cluster.server)?;
            cluster.nodes.push(node);
        }
        wait_for("both nodes to be known", PATIENCE, || {
            cluster.expect_running()?;
            let names = cluster.kubectl(&["get", "nodes", "--output", "name"])?;
            Ok((names.lines().count() == 2).then_some(()))
        })?;
        cluster.wait("condition=Ready", &["node", "--all"])?;
        // Pods are refused until there is an account for them.
        wait_for("the service account for pods", DEADLINE * 2, || {
            Ok(cluster.kubectl(&["get", "serviceaccount", "default"]).ok())
        })?;
        Ok(cluster)
    }

    pub fn server(&self) -> &ApiServer {
        &self.server
    }

    /// The runtimes of h1 and h2.
    pub fn containerds(&self) -> impl Iterator<Item = &Containerd<'lab>> {
        self.nodes.iter().map(|node| &node.containerd)
    }

    /// Makes an image known on both nodes.
    pub fn import(&self, image: &Path) -> Result<()> {
        self.containerds().try_for_each(|containerd| containerd.import(image))
    }

    /// Runs kubectl as an administrator, and returns what it printed.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.server.kubectl(arguments)
    }

    /// `kubectl wait`: until what is named is as `wanted` says.
    pub fn wait(&self, wanted: &str, what: &[&str]) -> Result<()> {
        let mut all = vec!["wait".to_owned(), format!("--for={wanted}")];
        all.push(format!("--timeout={}s", PATIENCE.as_secs()));
        all.extend(what.iter().map(|word| (*word).to_owned()));
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        self.kubectl(&all).map(drop).with_context(|| {
            let mut describe = vec!["describe"];
            describe.extend(what.iter().filter(|word| !word.starts_with("--")));
            self.kubectl(&describe).unwrap_or_default()
        })
    }

    fn start_controllers(&mut self) -> Result<()> {
        let directory = self.server.directory();
        let mut controllers = Command::new(kubernetes_program("kube-controller-manager")?);
        controllers
            .args(["--use-service-account-credentials", "--leader-elect=false"])
            .args(["--port", "0", "--bind-address", "127.0.0.1"])
            .arg("--cert-dir")
            .arg(directory.join("controllers"))
            .arg("--kubeconfig")
            .arg(self.server.kubeconfig(CONTROLLERS))
            .arg("--service-account-private-key-file")
            .arg(self.server.account_key())
            .arg("--root-ca-file")
            .arg(self.server.certificate());
        let mut scheduler = Command::new(kubernetes_program("kube-scheduler")?);
        scheduler
            .args(["--leader-elect=false", "--port", "0", "--bind-address", "127.0.0.1"])
            .arg("--cert-dir")
            .arg(directory.join("scheduler"))
            .arg("--kubeconfig")
            .arg(self.server.kubeconfig(SCHEDULER));
        let place = self.lab.h1.place();
        self.programs.push(place.spawn("controllers", &mut controllers)?);
        self.programs.push(place.spawn("scheduler", &mut scheduler)?);
        Ok(())
    }

    /// `NAME.NAMESPACE.svc.cluster.local` is the Service's address, or those of its pods if it is headless.
    fn start_names(&mut self) -> Result<()> {
        const SCRIPT: &str = r#"
            kubectl get endpoints --all-namespaces --watch --output name | while read -r _; do
                kubectl get services,endpoints --all-namespaces --output go-template="$1" >"$2.new" && mv "$2.new" "$2"
                kill -HUP "$3"
            done
        "#;
        const TEMPLATE: &str = "{{range .items}}{{$item := .}}{{$of := .metadata}}\
            {{with .spec}}{{if ne .clusterIP \"None\"}}\
            {{.clusterIP}} {{$of.name}}.{{$of.namespace}}.svc.cluster.local\n{{end}}{{end}}\
            {{range $label, $_ := $of.labels}}{{if eq $label \"service.kubernetes.io/headless\"}}\
            {{range $item.subsets}}{{range .addresses}}\
            {{.ip}} {{$of.name}}.{{$of.namespace}}.svc.cluster.local\n{{end}}{{end}}{{end}}{{end}}{{end}}";
        let names = self.server.directory().join("names");
        std::fs::write(&names, "")?;
        let place = self.lab.h1.place();
        let mut dnsmasq = Command::new("dnsmasq");
        dnsmasq
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--pid-file=",
            ])
            .args([
                "--user=root",
                "--bind-interfaces",
                "--local-ttl=1",
                "--local=/local/",
                "--log-facility=-",
            ])
            .arg(format!("--listen-address={}", dns_address()))
            .arg(format!("--addn-hosts={}", names.display()));
        let dnsmasq = place.serve("names", &mut dnsmasq, 53)?;
        let mut watch = Command::new("sh");
        watch.args(["-c", SCRIPT, "watch", TEMPLATE]).arg(&names).arg(dnsmasq.pid().to_string());
        self.programs.push(place.spawn("names-watch", self.server.for_administrator(&mut watch))?);
        self.programs.push(dnsmasq);
        Ok(())
    }

    /// An error with what it printed, if a program of the cluster has ended.
    fn expect_running(&mut self) -> Result<()> {
        self.programs.iter_mut().try_for_each(Process::fail_if_ended)?;
        let of_nodes = self.nodes.iter_mut().flat_map(|node| [&mut node.kubelet, &mut node.proxy]);
        of_nodes.into_iter().try_for_each(Process::fail_if_ended)
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.nodes.iter().flat_map(|node| [&node.kubelet, &node.proxy]).for_each(Process::show);
        }
    }
}
