// SPDX-License-Identifier: Apache-2.0
//! Connections by way of Services, whose addresses kube-proxy translates.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{Host, Lab, PATIENCE, wait_for};

use crate::installed::Installed;

/// Of Services, their pods and their nodes: one that may be a NodePort.
const PORT: u16 = 30700;

/// The Service `server` of this kind, whose endpoint is a pod on this node; kube-proxy knows of it. The pod's address.
fn serve(installed: &Installed, kind: &str, node: &str) -> Result<String> {
    let pod = installed.serve(node, PORT)?;
    let tcp = format!("--tcp={PORT}");
    let mut create = vec!["create", "service", kind, "server", &tcp];
    let node_port = format!("--node-port={PORT}");
    if kind == "nodeport" {
        create.push(&node_port);
    }
    installed.kubectl(&create)?;
    installed.lab.hosts().into_iter().try_for_each(|host| wait_until_translated(host, &pod, true))?;
    Ok(pod)
}

fn service_address(installed: &Installed) -> Result<String> {
    installed.kubectl(&["get", "service", "server", "--output", "jsonpath={.spec.clusterIP}"])
}

/// Waits until kube-proxy of this host makes this pod's address of a Service's, or does so no more.
fn wait_until_translated(host: &Host, pod: &str, wanted: bool) -> Result<()> {
    let to_pod = format!("--to-destination {pod}:{PORT}");
    wait_for(&format!("kube-proxy of {} to translate to {pod}: {wanted}", host.name), PATIENCE, || {
        let rules = host.place().run(Command::new("iptables").args(["-t", "nat", "-S"]))?;
        Ok((rules.contains(&to_pod) == wanted).then_some(()))
    })
}

fn take_back(installed: &Installed) -> Result<()> {
    installed.router(&installed.lab.h1, &["swap-back", "--all"])?;
    installed.wait_until_on("overlay", PORT)
}

/// One more rule: of connections to NodePorts the client's socket has the address of a node.
fn want_node_ports(installed: &Installed) -> Result<()> {
    let rule = "type=cidr\nfrom=192.168.77.0/24\nto=10.244.0.0/16\n";
    let patch = serde_json::json!({ "data": { "nodes": rule } }).to_string();
    let patch = ["patch", "configmap", "ebpf-router-rules", "--type", "merge", "--patch", &patch];
    installed.in_system(&patch).map(drop)
}

#[test]
fn a_connection_through_a_service_is_swapped_and_comes_back_before_the_router_is_gone() -> Result<()> {
    let lab = Lab::new("kubernetes-service")?;
    let installed = Installed::new(&lab)?;
    serve(&installed, "clusterip", "h2")?;
    let stream = installed.connect(&service_address(&installed)?, PORT)?;
    installed.wait_until_on("host", PORT)?;
    installed.remove()?;
    stream.finish()
}

#[test]
fn a_connection_through_a_service_to_a_pod_of_the_same_node_is_swapped_and_comes_back() -> Result<()> {
    let lab = Lab::new("kubernetes-service-near")?;
    let installed = Installed::new(&lab)?;
    serve(&installed, "clusterip", "h1")?;
    let stream = installed.connect(&service_address(&installed)?, PORT)?;
    installed.wait_until_on("host", PORT)?;
    take_back(&installed)?;
    stream.finish()
}

#[test]
fn a_swapped_connection_outlives_its_endpoint_in_the_service_and_comes_back() -> Result<()> {
    let lab = Lab::new("kubernetes-service-changed")?;
    let installed = Installed::new(&lab)?;
    let pod = serve(&installed, "clusterip", "h2")?;
    let stream = installed.connect(&service_address(&installed)?, PORT)?;
    installed.wait_until_on("host", PORT)?;
    installed.kubectl(&["label", "pod", "server", "app-"])?;
    lab.hosts().into_iter().try_for_each(|host| wait_until_translated(host, &pod, false))?;
    installed.wait_until_on("host", PORT)?;
    take_back(&installed)?;
    stream.finish()
}

#[test]
fn a_masqueraded_connection_through_a_node_port_is_swapped_and_comes_back() -> Result<()> {
    let lab = Lab::new("kubernetes-node-port")?;
    let installed = Installed::new(&lab)?;
    want_node_ports(&installed)?;
    serve(&installed, "nodeport", "h2")?;
    let stream = installed.connect(&lab.h1.address.to_string(), PORT)?;
    installed.wait_until_on("host", PORT)?;
    let seen = installed.flow(&lab.h2, PORT)?.context("the server's end is not known")?.remote;
    ensure!(seen.starts_with("10.244.1.0:"), "not masqueraded: {seen}");
    take_back(&installed)?;
    stream.finish()
}

#[test]
fn a_connection_through_a_node_port_of_another_node_stays() -> Result<()> {
    let lab = Lab::new("kubernetes-node-port-far")?;
    let installed = Installed::new(&lab)?;
    want_node_ports(&installed)?;
    serve(&installed, "nodeport", "h2")?;
    let stream = installed.connect(&lab.h2.address.to_string(), PORT)?;
    for (host, reason) in [(&lab.h1, "no_peer_host"), (&lab.h2, "peer_unknown")] {
        wait_for(&format!("{reason} on {}", host.name), PATIENCE, || {
            let flow = installed.flow(host, PORT)?;
            Ok(flow.filter(|flow| flow.reason.as_deref() == Some(reason)).map(drop))
        })?;
    }
    stream.finish()
}
