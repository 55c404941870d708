// SPDX-License-Identifier: Apache-2.0
//! A cluster with the router installed, and a stream between two of its pods.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{Cluster, Flow, Host, Lab, PATIENCE, containerd::LAB_IMAGE, wait_for};

/// A cluster with the router installed.
pub struct Installed<'lab> {
    pub cluster: Cluster<'lab>,
    pub lab: &'lab Lab,
}

impl<'lab> Installed<'lab> {
    /// As README says: certificates on the nodes, the image, two manifests.
    pub fn new(lab: &'lab Lab) -> Result<Installed<'lab>> {
        let installed = Installed::not_yet(lab)?;
        installed.kubectl(&["apply", "-f", &deploy("rules.yaml"), "-f", &deploy("simple-ds.yaml")])?;
        installed.wait_until_ready()?;
        Ok(installed)
    }

    /// All but the manifests.
    pub fn not_yet(lab: &'lab Lab) -> Result<Installed<'lab>> {
        let cluster = Cluster::start(lab)?;
        for host in lab.hosts() {
            let copy = "mkdir -p /etc/ebpf-router/tls && cp \"$0\"/* /etc/ebpf-router/tls";
            host.place().run(Command::new("sh").args(["-c", copy]).arg(host.tls()))?;
        }
        let archive = lab.directory().join("ebpf-router.tar");
        let mut make = Command::new(deploy("image.sh"));
        ensure!(make.arg(&archive).status()?.success(), "no image");
        cluster.import(&archive)?;
        Ok(Installed { cluster, lab })
    }

    /// Routers and forwarders on both nodes.
    pub fn wait_until_ready(&self) -> Result<()> {
        wait_for("pods of the DaemonSet on both nodes", PATIENCE, || {
            let pods =
                self.in_system(&["get", "pods", "--selector", "app=ebpf-router", "--output", "name"])?;
            Ok((pods.lines().count() == 2).then_some(()))
        })?;
        let pods = ["--namespace", "kube-system", "pods", "--selector", "app=ebpf-router"];
        self.cluster.wait("condition=Ready", &pods).with_context(|| self.told())?;
        Ok(())
    }

    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl(arguments)
    }

    pub fn in_system(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["--namespace", "kube-system"];
        all.extend(arguments);
        self.kubectl(&all)
    }

    /// The router's pod on a host.
    pub fn pod_on(&self, host: &Host) -> Result<String> {
        let on = format!("spec.nodeName={}", host.name);
        let pod =
            ["get", "pods", "--selector", "app=ebpf-router", "--field-selector", &on, "--output", "name"];
        Ok(self.in_system(&pod)?.trim().to_owned())
    }

    /// Runs `router` in the router's container on a host.
    pub fn router(&self, host: &Host, arguments: &[&str]) -> Result<String> {
        let pod = self.pod_on(host)?;
        let mut all = vec!["exec", pod.as_str(), "--container", "router", "--", "router"];
        all.extend(arguments);
        self.in_system(&all)
    }

    pub fn flow(&self, host: &Host, port: u16) -> Result<Option<Flow>> {
        Ok(self.flows(host, port)?.into_iter().next())
    }

    fn flows(&self, host: &Host, port: u16) -> Result<Vec<Flow>> {
        let mut flows: Vec<Flow> = serde_json::from_str(&self.router(host, &["flows", "--json"])?)?;
        flows.retain(|flow| flow.has_port(port));
        Ok(flows)
    }

    /// Waits until both ends of the connection of this port, wherever they are, are on this path.
    pub fn wait_until_on(&self, path: &str, port: u16) -> Result<()> {
        let [h1, h2] = self.lab.hosts();
        wait_for(&format!("both ends of port {port} to be on the path {path}"), PATIENCE, || {
            let ends = [self.flows(h1, port)?, self.flows(h2, port)?].concat();
            Ok((ends.len() == 2 && ends.iter().all(|end| end.path == path)).then_some(()))
        })
        .with_context(|| self.told())
    }

    /// As deploy/README.md says; nothing is left of it.
    pub fn remove(&self) -> Result<()> {
        let files = [deploy("simple-ds.yaml"), deploy("rules.yaml")];
        self.kubectl(&["delete", "--cascade=foreground", "-f", &files[0], "-f", &files[1]])?;
        self.expect_nothing_left()
    }

    pub fn expect_nothing_left(&self) -> Result<()> {
        let pods = self.in_system(&["get", "pods", "--selector", "app=ebpf-router", "--output", "name"])?;
        ensure!(pods.is_empty(), "deleted, and there are {pods}");
        for host in self.lab.hosts() {
            let (pins, connections) = (host.pins()?, host_connections(host)?);
            ensure!(pins.is_empty() && connections.is_empty(), "on {}: {pins:?} {connections}", host.name);
        }
        Ok(())
    }

    /// For a person who wonders.
    pub fn told(&self) -> String {
        let mut all = self.kubectl(&["describe", "pods", "--all-namespaces"]).unwrap_or_default();
        for container in ["forwarder", "router"] {
            let logs = ["logs", "--selector", "app=ebpf-router", "--tail", "50", "--container", container];
            all += &self.in_system(&logs).unwrap_or_default();
        }
        all
    }

    /// Two pods, one on each node, with a connection between them.
    pub fn stream(&self, port: u16) -> Result<Stream<'_, 'lab>> {
        self.connect(&self.serve("h2", port)?, port)
    }

    /// The pod `server` on this node, which accepts a connection; its address.
    pub fn serve(&self, node: &str, port: u16) -> Result<String> {
        self.run_pod("server", node, &format!("/bin/stream --server 0.0.0.0:{port} --pings --names"))?;
        self.cluster.wait("condition=Ready", &["pod/server"])?;
        self.kubectl(&["get", "pod", "server", "--output", "jsonpath={.status.podIP}"])
    }

    /// The pod `client` on h1, which connects to the server, or to what stands for it.
    pub fn connect(&self, address: &str, port: u16) -> Result<Stream<'_, 'lab>> {
        let client = format!("/bin/stream --client {address}:{port} --pings --names --until-eof");
        self.run_pod("client", "h1", &client)?;
        self.cluster.wait("condition=Ready", &["pod/client"])?;
        let connected = format!("\"remote\":\"{address}:{port}\"");
        wait_for(&format!("the client to be connected to {address}:{port}"), PATIENCE, || {
            Ok(self.kubectl(&["logs", "client"])?.contains(&connected).then_some(()))
        })?;
        Ok(Stream { installed: self })
    }

    /// Its standard input is open until somebody has attached to it, and left.
    fn run_pod(&self, name: &str, node: &str, command: &str) -> Result<()> {
        let words: Vec<&str> = command.split_whitespace().collect();
        let manifest = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": { "app": name } },
            "spec": {
                "nodeSelector": { "kubernetes.io/hostname": node }, "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 1,
                "containers": [{
                    "name": name, "image": LAB_IMAGE, "command": words, "stdin": true, "stdinOnce": true,
                }],
            },
        });
        self.cluster.server().apply(name, &manifest.to_string())
    }
}

/// A stream between two pods; both check every byte, and their sockets' addresses all the time.
pub struct Stream<'a, 'lab> {
    installed: &'a Installed<'lab>,
}

impl Stream<'_, '_> {
    /// Lets the client come to its end, and checks that both are content.
    pub fn finish(self) -> Result<()> {
        let installed = self.installed;
        installed.kubectl(&["attach", "--stdin", "client"])?;
        for pod in ["client", "server"] {
            wait_for(&format!("the end of {pod}"), PATIENCE, || {
                let phase =
                    installed.kubectl(&["get", "pod", pod, "--output", "jsonpath={.status.phase}"])?;
                let logs = || installed.kubectl(&["logs", pod]).unwrap_or_default();
                ensure!(phase != "Failed", "{pod} has failed: {}", logs());
                Ok((phase == "Succeeded").then_some(()))
            })?;
        }
        let last = |pod| -> Result<serde_json::Value> {
            let log = installed.kubectl(&["logs", pod])?;
            Ok(serde_json::from_str(log.lines().last().context("it printed nothing")?)?)
        };
        let (client, server) = (last("client")?, last("server")?);
        for (sent, received) in [("sent_digest", "received_digest"), ("received_digest", "sent_digest")] {
            ensure!(client[sent] == server[received], "client {client}, server {server}");
        }
        for end in [&client, &server] {
            ensure!(end["names_checked"].as_u64() > Some(0), "its addresses were not looked at: {end}");
        }
        Ok(())
    }
}

/// Cargo runs tests in the package's directory, which programs on a host of the lab do not begin in.
pub fn deploy(name: &str) -> String {
    format!("{}/../../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Those that carry what was swapped: nothing else is at the addresses of the tunnel's network.
pub fn host_connections(host: &Host) -> Result<String> {
    let mut ss = Command::new("ss");
    ss.args(["-Htn", "state", "established", "src", "192.168.78.0/24", "dst", "192.168.78.0/24"]);
    host.place().run(&mut ss)
}
