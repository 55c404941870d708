// SPDX-License-Identifier: Apache-2.0
//! In a cluster, what README and deploy/README.md tell a user to do.
//!
//! Run by `test/run.sh --kubernetes`, which builds the cluster's programs.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    ApiServer, Cluster, Flow, Host, Lab, PATIENCE,
    containerd::{Image, LAB_IMAGE},
    wait_for,
};

const PORT: u16 = 7000;
/// What `deploy/image.sh` makes, and what the manifest asks for.
const IMAGE: &str = "docker.io/library/ebpf-router:0.1.0";
/// What the pods of test/jobs ask for.
const JOBS_IMAGE: &str = "docker.io/library/debian:bookworm-slim";

/// A cluster with the router installed.
struct Installed<'lab> {
    cluster: Cluster<'lab>,
    lab: &'lab Lab,
}

impl<'lab> Installed<'lab> {
    /// As README says: certificates on the nodes, the image, two manifests.
    fn new(lab: &'lab Lab) -> Result<Installed<'lab>> {
        let cluster = Cluster::start(lab)?;
        for host in lab.hosts() {
            let copy = "mkdir -p /etc/ebpf-router/tls && cp \"$0\"/* /etc/ebpf-router/tls";
            host.place().run(Command::new("sh").args(["-c", copy]).arg(host.tls()))?;
        }
        let archive = lab.directory().join("ebpf-router.tar");
        let mut make = Command::new(deploy("image.sh"));
        ensure!(make.arg(&archive).status()?.success(), "no image");
        cluster.import(&archive)?;
        let installed = Installed { cluster, lab };
        installed.kubectl(&["apply", "-f", &deploy("rules.yaml"), "-f", &deploy("simple-ds.yaml")])?;
        wait_for("pods of the DaemonSet on both nodes", PATIENCE, || {
            let pods =
                installed.in_system(&["get", "pods", "--selector", "app=ebpf-router", "--output", "name"])?;
            Ok((pods.lines().count() == 2).then_some(()))
        })?;
        let pods = ["--namespace", "kube-system", "pods", "--selector", "app=ebpf-router"];
        installed.cluster.wait("condition=Ready", &pods).with_context(|| installed.told())?;
        Ok(installed)
    }

    fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster.kubectl(arguments)
    }

    fn in_system(&self, arguments: &[&str]) -> Result<String> {
        let mut all = vec!["--namespace", "kube-system"];
        all.extend(arguments);
        self.kubectl(&all)
    }

    /// The router's pod on a host.
    fn pod_on(&self, host: &Host) -> Result<String> {
        let on = format!("spec.nodeName={}", host.name);
        let pod =
            ["get", "pods", "--selector", "app=ebpf-router", "--field-selector", &on, "--output", "name"];
        Ok(self.in_system(&pod)?.trim().to_owned())
    }

    /// Runs `router` in the router's container on a host.
    fn router(&self, host: &Host, arguments: &[&str]) -> Result<String> {
        let pod = self.pod_on(host)?;
        let mut all = vec!["exec", pod.as_str(), "--container", "router", "--", "router"];
        all.extend(arguments);
        self.in_system(&all)
    }

    fn flow(&self, host: &Host, port: u16) -> Result<Option<Flow>> {
        let flows: Vec<Flow> = serde_json::from_str(&self.router(host, &["flows", "--json"])?)?;
        Ok(flows.into_iter().find(|flow| flow.has_port(port)))
    }

    fn wait_until_on_host(&self, port: u16) -> Result<()> {
        self.lab.hosts().into_iter().try_for_each(|host| {
            wait_for(&format!("port {port} on {} to be swapped", host.name), PATIENCE, || {
                Ok(self.flow(host, port)?.filter(Flow::on_host).map(drop))
            })
            .with_context(|| self.told())
        })
    }

    /// For a person who wonders.
    fn told(&self) -> String {
        let mut all = self.kubectl(&["describe", "pods", "--all-namespaces"]).unwrap_or_default();
        for container in ["forwarder", "router"] {
            let logs = ["logs", "--selector", "app=ebpf-router", "--tail", "50", "--container", container];
            all += &self.in_system(&logs).unwrap_or_default();
        }
        all
    }

    /// Two pods, one on each node, with a connection between them.
    fn stream(&self, port: u16) -> Result<Stream<'_, 'lab>> {
        let server = format!("/bin/stream --server 0.0.0.0:{port} --pings");
        self.run_pod("server", "h2", &server)?;
        self.cluster.wait("condition=Ready", &["pod/server"])?;
        let address = self.kubectl(&["get", "pod", "server", "--output", "jsonpath={.status.podIP}"])?;
        self.run_pod("client", "h1", &format!("/bin/stream --client {address}:{port} --pings --until-eof"))?;
        self.cluster.wait("condition=Ready", &["pod/client"])?;
        wait_for("the client to be connected", PATIENCE, || {
            Ok(self.kubectl(&["logs", "client"])?.contains("connected").then_some(()))
        })?;
        Ok(Stream { installed: self })
    }

    /// Its standard input is open until somebody has attached to it, and left.
    fn run_pod(&self, name: &str, node: &str, command: &str) -> Result<()> {
        let words: Vec<&str> = command.split_whitespace().collect();
        let manifest = serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name },
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

/// A stream between two pods; both check every byte.
struct Stream<'a, 'lab> {
    installed: &'a Installed<'lab>,
}

impl Stream<'_, '_> {
    /// Lets the client come to its end, and checks that both are content.
    fn finish(self) -> Result<()> {
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
        Ok(())
    }
}

/// Cargo runs tests in the package's directory, which programs on a host of the lab do not begin in.
fn deploy(name: &str) -> String {
    format!("{}/../../deploy/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Those that carry what was swapped: nothing else is at the addresses of the tunnel's network.
fn host_connections(host: &Host) -> Result<String> {
    let mut ss = Command::new("ss");
    ss.args(["-Htn", "state", "established", "src", "192.168.78.0/24", "dst", "192.168.78.0/24"]);
    host.place().run(&mut ss)
}

/// A cluster with the router, and an image for the pods of test/jobs: Debian's, with these packages.
fn for_benchmarks<'lab>(lab: &'lab Lab, packages: &[&str]) -> Result<Installed<'lab>> {
    let installed = Installed::new(lab)?;
    let mut all = vec!["bash", "coreutils", "libc-bin", "hostname"];
    all.extend(packages);
    installed.cluster.import(&Image::of_packages(lab.directory(), JOBS_IMAGE, &all)?)?;
    Ok(installed)
}

/// `test/script.sh test KEY ../deploy/simple-ds.yaml`, whose log it returns.
fn benchmark(installed: &Installed, key: &str) -> Result<String> {
    let mut script = Command::new(deploy("../test/script.sh"));
    script.args(["test", key, "../deploy/simple-ds.yaml"]);
    let finished = installed.cluster.run(&mut script, Duration::from_secs(600))?;
    let log = finished.expect_success().with_context(|| installed.told())?.stdout;
    eprintln!("{log}");
    ensure!(swaps(&log)? > 0, "nothing was swapped: {log}");
    Ok(log)
}

/// How many `router status` says there were on the client's node.
fn swaps(log: &str) -> Result<u64> {
    let line = log.lines().find_map(|line| line.strip_prefix("swaps")).context("no line of swaps")?;
    let number = line.split_whitespace().next().context("no number of swaps")?;
    Ok(number.parse()?)
}

/// The chart with its own values, as `helm template` would print it: see `test/deploy/render`.
fn chart() -> Result<String> {
    let mut render = Command::new("go");
    render.args(["run", "main.go"]).arg(deploy("helm/ebpf-router")).arg("kube-system");
    render.current_dir(deploy("../test/deploy/render"));
    render.env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode");
    let output = render.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

#[test]
fn the_api_server_takes_every_manifest() -> Result<()> {
    let lab = Lab::new("kubernetes-manifests")?;
    let server = ApiServer::start(&lab.h1)?;
    // Of the lab's own: with the same names as the manifests'.
    server.kubectl(&["delete", "clusterrole,clusterrolebinding", "ebpf-router"])?;
    server.kubectl(&["delete", "--namespace", "kube-system", "role,rolebinding", "ebpf-router"])?;
    let rendered = lab.directory().join("chart.yaml");
    std::fs::write(&rendered, chart()?)?;
    let mut all: Vec<[String; 2]> = Vec::new();
    for directory in ["base", "overlays/calico", "overlays/flannel"] {
        all.push(["-k".into(), deploy(directory)]);
    }
    for entry in std::fs::read_dir(deploy("../test/jobs"))? {
        all.push(["-f".into(), entry?.path().to_string_lossy().into_owned()]);
    }
    all.push(["-f".into(), rendered.to_string_lossy().into_owned()]);
    for [kind, path] in &all {
        server.kubectl(&["apply", "--dry-run=server", kind, path])?;
        let made = server.kubectl(&["create", kind, path])?;
        let deleted = server.kubectl(&["delete", "--wait=false", kind, path])?;
        ensure!(made.lines().count() == deleted.lines().count(), "{path}: {made}{deleted}");
    }
    Ok(())
}

#[test]
fn a_connection_between_pods_is_swapped_and_comes_back_before_the_router_is_gone() -> Result<()> {
    let lab = Lab::new("kubernetes-install")?;
    let installed = Installed::new(&lab)?;
    for host in lab.hosts() {
        installed.router(host, &["check"])?;
    }
    let stream = installed.stream(PORT)?;
    installed.wait_until_on_host(PORT)?;
    for host in lab.hosts() {
        ensure!(!host_connections(host)?.is_empty(), "swapped, and nothing between the hosts");
    }
    let files = [deploy("simple-ds.yaml"), deploy("rules.yaml")];
    installed.kubectl(&["delete", "--cascade=foreground", "-f", &files[0], "-f", &files[1]])?;
    let pods = installed.in_system(&["get", "pods", "--selector", "app=ebpf-router", "--output", "name"])?;
    ensure!(pods.is_empty(), "deleted, and there are {pods}");
    for host in lab.hosts() {
        let (pins, connections) = (host.pins()?, host_connections(host)?);
        ensure!(pins.is_empty() && connections.is_empty(), "on {}: {pins:?} {connections}", host.name);
    }
    stream.finish()
}

#[test]
fn an_upgrade_replaces_the_routers_and_touches_no_connection() -> Result<()> {
    let lab = Lab::new("kubernetes-upgrade")?;
    let installed = Installed::new(&lab)?;
    let stream = installed.stream(PORT)?;
    installed.wait_until_on_host(PORT)?;
    let pids = |name: &str| -> Result<Vec<String>> {
        let path = format!("jsonpath={{.status.containerStatuses[?(@.name==\"{name}\")].containerID}}");
        lab.hosts()
            .into_iter()
            .map(|host| installed.in_system(&["get", &installed.pod_on(host)?, "--output", &path]))
            .collect()
    };
    let (routers, forwarders) = (pids("router")?, pids("forwarder")?);
    let pauses =
        |host| -> Result<Option<u64>> { Ok(installed.flow(host, PORT)?.and_then(|flow| flow.pause_us)) };
    let before: Vec<_> = lab.hosts().into_iter().map(pauses).collect::<Result<_>>()?;
    let new = "docker.io/library/ebpf-router:0.1.1";
    for host in lab.hosts() {
        host.place().run(Command::new("ctr").args(["--namespace", "k8s.io", "image", "tag", IMAGE, new]))?;
    }
    let mut script = Command::new(deploy("upgrade.sh"));
    let finished = installed.cluster.run(script.arg(new), Duration::from_secs(300))?;
    let said = finished.expect_success().with_context(|| installed.told())?.stdout;
    ensure!(said.matches("replaced").count() == 2, "{said}");
    ensure!(pids("forwarder")? == forwarders, "a forwarder was replaced");
    ensure!(pids("router")?.iter().all(|router| !routers.contains(router)), "a router was not replaced");
    for (host, before) in lab.hosts().into_iter().zip(before) {
        let flow = installed.flow(host, PORT)?.context("the connection is not known any more")?;
        ensure!(flow.on_host() && flow.way_back != Some(false), "{flow:?}");
        ensure!(before.is_some());
    }
    stream.finish()
}

#[test]
fn the_benchmark_iperf3_runs_in_the_cluster() -> Result<()> {
    let lab = Lab::new("kubernetes-iperf3")?;
    let log = benchmark(&for_benchmarks(&lab, &["iperf3"])?, "iperf3")?;
    ensure!(log.matches("receiver").count() >= 2, "{log}");
    Ok(())
}

#[test]
fn the_benchmark_memcached_runs_in_the_cluster() -> Result<()> {
    let lab = Lab::new("kubernetes-memcached")?;
    let log = benchmark(&for_benchmarks(&lab, &["memcached", "libmemcached-tools"])?, "memcached")?;
    ensure!(log.contains("TPS"), "{log}");
    Ok(())
}

/// With the packages that all of them need.
fn benchmark_of_mpi(key: &str) -> Result<()> {
    let own = ["openmpi-bin", "libopenmpi-dev", "netpipe-openmpi", "openssh-server", "openssh-client"];
    let compiler = ["gcc", "libc6-dev"];
    let lab = Lab::new(&format!("kubernetes-{key}"))?;
    benchmark(&for_benchmarks(&lab, &[&own[..], &compiler[..]].concat())?, key).map(drop)
}

#[test]
fn the_benchmark_mpilat_runs_in_the_cluster() -> Result<()> {
    benchmark_of_mpi("mpilat")
}

#[test]
fn the_benchmark_mpibw_runs_in_the_cluster() -> Result<()> {
    benchmark_of_mpi("mpibw")
}

#[test]
fn the_benchmark_mpiall_runs_in_the_cluster() -> Result<()> {
    benchmark_of_mpi("mpiall")
}
