// SPDX-License-Identifier: Apache-2.0
//! What is not swapped keeps working on the overlay, and `router flows` names the reason.

use anyhow::{Result, ensure};
use lab::{DEADLINE, RouterOptions, Scene, wait_for};
use nix::{
    sys::{ptrace, wait::waitpid},
    unistd::Pid,
};

const PORT: u16 = 7000;
const NO_POD: &str = "type=cidr\nname=elsewhere\nfrom=10.99.0.0/16\nto=10.99.0.0/16\nreverse=false\n";

fn check_reason(scene: &Scene, expected: &str) -> Result<()> {
    let mut last = String::new();
    let what = format!("a flow refused with {expected}");
    let found = wait_for(&what, DEADLINE, || {
        last = scene.lab.h1.wait_until_refused(PORT)?;
        Ok((last == expected).then_some(()))
    });
    ensure!(found.is_ok(), "refused with {last}, {expected} expected");
    ensure!(scene.lab.h1.status()?.refused.contains_key(expected), "{:?}", scene.lab.h1.status()?);
    Ok(())
}

/// Older than the routers, so that they meet the socket as it is.
fn check_odd_socket(test: &str, arguments: &str, expected: &str) -> Result<()> {
    let scene = Scene::without_routers(test)?;
    let stream = scene.stream(PORT, arguments)?;
    scene.lab.start_everything(&RouterOptions::default())?;
    check_reason(&scene, expected)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_that_no_rule_matches_stays() -> Result<()> {
    let scene = Scene::without_routers("no-rule")?;
    for host in scene.lab.hosts() {
        host.start_forwarder()?;
        host.start_router(&RouterOptions::with_rules(&host.write_rules("elsewhere", NO_POD)?))?;
    }
    let stream = scene.stream(PORT, "")?;
    check_reason(&scene, "no_rule_matches")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_that_only_one_end_wants_swapped_stays() -> Result<()> {
    let scene = Scene::without_routers("one-end")?;
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    for host in [h1, h2] {
        host.start_forwarder()?;
    }
    h1.start_router(&RouterOptions::default())?;
    h2.start_router(&RouterOptions::with_rules(&h2.write_rules("elsewhere", NO_POD)?))?;
    let stream = scene.stream(PORT, "")?;
    check_reason(&scene, "peer_says_no")?;
    ensure!(h2.wait_until_refused(PORT)? == "no_rule_matches");
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_whose_peer_runs_no_router_stays() -> Result<()> {
    let scene = Scene::without_routers("no-peer")?;
    scene.lab.h1.start_forwarder()?;
    scene.lab.h1.start_router(&RouterOptions::default())?;
    let stream = scene.stream(PORT, "")?;
    check_reason(&scene, "peer_unreachable")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_socket_in_flight_through_a_unix_socket_stays() -> Result<()> {
    check_odd_socket("in-flight", "--odd in-flight", "unseen_reference")
}

#[test]
fn a_socket_with_a_filter_stays() -> Result<()> {
    check_odd_socket("filter", "--odd filter", "socket_filter")
}

#[test]
fn a_process_that_is_traced_stays() -> Result<()> {
    let scene = Scene::without_routers("traced")?;
    let stream = scene.stream(PORT, "--pings --interval-us 1000")?;
    let pid = Pid::from_raw(stream.client.pid() as i32);
    ptrace::seize(pid, ptrace::Options::empty())?;
    scene.lab.start_everything(&RouterOptions::default())?;
    let reason = check_reason(&scene, "holder_traced");
    ptrace::interrupt(pid)?;
    waitpid(pid, None)?;
    ptrace::detach(pid, None)?;
    reason?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_between_the_hosts_themselves_is_left_alone() -> Result<()> {
    let scene = Scene::without_routers("hosts")?;
    let everything = "type=cidr\nname=all\nfrom=0.0.0.0/0\nto=0.0.0.0/0\nreverse=false\n";
    for host in scene.lab.hosts() {
        host.start_forwarder()?;
        host.start_router(&RouterOptions::with_rules(&host.write_rules("all", everything)?))?;
    }
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    let address = std::net::SocketAddr::new(h2.address.into(), PORT);
    let listener = h2.place().network.run(|| Ok(std::net::TcpListener::bind(address)?))?;
    let near = h1.place().network.run(|| Ok(std::net::TcpStream::connect(address)?))?;
    let (far, _) = listener.accept()?;
    // A pod's connection made later has been decided: so has this one.
    let stream = scene.stream(PORT + 1, "--pings")?;
    scene.wait_until_on_host(PORT + 1)?;
    for host in [h1, h2] {
        ensure!(!host.flows()?.iter().any(|flow| flow.has_port(PORT) && flow.on_host()));
    }
    stream.finish()?;
    drop((near, far));
    Ok(())
}
