// SPDX-License-Identifier: Apache-2.0
//! In a cluster, what README and deploy/README.md tell a user to do.
//!
//! Run by `test/run.sh --kubernetes`, which builds the cluster's programs.

mod helm;
mod installed;
mod services;

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{ApiServer, Lab, containerd::Image};

use installed::{Installed, deploy, host_connections};

const PORT: u16 = 7000;
/// What `deploy/image.sh` makes, and what the manifest asks for.
const IMAGE: &str = "docker.io/library/ebpf-router:0.1.0";
/// What the pods of test/jobs ask for.
const JOBS_IMAGE: &str = "docker.io/library/debian:bookworm-slim";

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
    let finished = installed.cluster.server().run(&mut script, Duration::from_secs(600))?;
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

/// Without the lab's own roles, which have the manifests' names.
fn empty_server(lab: &Lab) -> Result<ApiServer> {
    let server = ApiServer::start(&lab.h1)?;
    server.kubectl(&["delete", "clusterrole,clusterrolebinding", "ebpf-router"])?;
    server.kubectl(&["delete", "--namespace", "kube-system", "role,rolebinding", "ebpf-router"])?;
    Ok(server)
}

#[test]
fn the_api_server_takes_every_manifest() -> Result<()> {
    let lab = Lab::new("kubernetes-manifests")?;
    let server = empty_server(&lab)?;
    let mut all: Vec<[String; 2]> = Vec::new();
    for directory in ["base", "overlays/calico", "overlays/flannel"] {
        all.push(["-k".into(), deploy(directory)]);
    }
    for entry in std::fs::read_dir(deploy("../test/jobs"))? {
        all.push(["-f".into(), entry?.path().to_string_lossy().into_owned()]);
    }
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
    installed.wait_until_on("host", PORT)?;
    for host in lab.hosts() {
        ensure!(!host_connections(host)?.is_empty(), "swapped, and nothing between the hosts");
    }
    installed.remove()?;
    stream.finish()
}

#[test]
fn labels_of_pods_that_are_changed_while_they_run_decide_anew() -> Result<()> {
    let lab = Lab::new("kubernetes-labels")?;
    let installed = Installed::new(&lab)?;
    let rule = r#"{ "data": { "fast": "type=podLabel\nname=network\nvalue=fast\n" } }"#;
    installed.in_system(&["patch", "configmap", "ebpf-router-rules", "--patch", rule])?;
    let stream = installed.stream(PORT)?;
    installed.wait_until_on("overlay", PORT)?;
    let label = |label: &str| installed.kubectl(&["label", "pods", "client", "server", "--overwrite", label]);
    for (change, path) in [("network=fast", "host"), ("network=slow", "overlay"), ("network=fast", "host")] {
        label(change)?;
        installed.wait_until_on(path, PORT)?;
    }
    // What a runtime was told when the pod was made is not taken for its labels of now.
    for host in lab.hosts() {
        installed.in_system(&["delete", &installed.pod_on(host)?])?;
    }
    installed.wait_until_ready()?;
    installed.wait_until_on("host", PORT)?;
    label("network-")?;
    installed.wait_until_on("overlay", PORT)?;
    stream.finish()
}

#[test]
fn an_upgrade_replaces_the_routers_and_touches_no_connection() -> Result<()> {
    let lab = Lab::new("kubernetes-upgrade")?;
    let installed = Installed::new(&lab)?;
    let stream = installed.stream(PORT)?;
    installed.wait_until_on("host", PORT)?;
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
    let finished = installed.cluster.server().run(script.arg(new), Duration::from_secs(300))?;
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
