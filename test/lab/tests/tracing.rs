// SPDX-License-Identifier: Apache-2.0
//! What `router trace` shows of the connections that containers make and accept.

use std::{net::SocketAddr, process::Command};

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Family, Host, Process, Scene, program, wait_for, workload::StreamOptions};
use nix::sys::signal::Signal;

const PORT: u16 = 7000;

struct Traced {
    scene: Scene,
    client: Process,
    server: Process,
}

/// A scene without routers, and `router trace` on both hosts.
fn traced(test: &str) -> Result<Traced> {
    let scene = Scene::without_routers(test)?;
    let (client, server) = (trace(&scene.lab.h1)?, trace(&scene.lab.h2)?);
    Ok(Traced { scene, client, server })
}

fn trace(host: &Host) -> Result<Process> {
    let mut command = Command::new(program("router")?);
    command.arg("trace").envs(host.environment());
    let mut running = host.place().spawn("trace", &mut command)?;
    running.wait_until_it_says("tracing in", DEADLINE)?;
    Ok(running)
}

fn wait_for_line(trace: &Process, words: &[&str]) -> Result<String> {
    let is_meant = |line: &&str| words.iter().all(|word| line.contains(word));
    wait_for(&format!("a line with {words:?}"), DEADLINE, || {
        Ok(trace.stdout().lines().find(is_meant).map(str::to_owned))
    })
    .with_context(|| trace.stdout())
}

fn check(test: &str, family: Family, arguments: &str) -> Result<()> {
    let traced = traced(test)?;
    let options = StreamOptions { family: Some(family), ..StreamOptions::both(arguments) };
    let stream = traced.scene.stream_with(PORT, &options)?;
    // A mapped address is shown as what it stands for.
    let shown = if family == Family::Mapped { Family::V4 } else { family };
    let server: SocketAddr = traced.scene.server.address(shown, PORT);
    let made = wait_for_line(&traced.client, &["connect", &format!("- {server} "), "by podclient/client"])?;
    let local = made.split_whitespace().nth(1).context("an address")?.to_owned();
    wait_for_line(&traced.server, &["accept", &format!("{server} - {local} "), "by podserver/server"])?;
    stream.finish()?;
    Ok(())
}

#[test]
fn ipv4_connections_are_traced_at_both_ends() -> Result<()> {
    check("trace-v4", Family::V4, "")
}

#[test]
fn ipv6_connections_are_traced_at_both_ends() -> Result<()> {
    check("trace-v6", Family::V6, "")
}

#[test]
fn connections_with_mapped_addresses_are_traced_at_both_ends() -> Result<()> {
    check("trace-mapped", Family::Mapped, "")
}

#[test]
fn a_connect_that_does_not_wait_is_traced_when_it_is_established() -> Result<()> {
    check("trace-nonblocking", Family::V4, "--io epoll")
}

#[test]
fn a_connect_that_fails_is_not_traced() -> Result<()> {
    let traced = traced("trace-failed")?;
    let nobody = traced.scene.server.address(Family::V4, PORT + 1).to_string();
    let failed = traced.scene.client.exec(
        "nobody",
        Command::new(program("stream")?).args(["--client", &nobody]),
        DEADLINE,
    )?;
    ensure!(!failed.success(), "somebody listens at {nobody}");
    // One that succeeds later has been told: so would the other have been.
    let stream = traced.scene.stream(PORT, "")?;
    wait_for_line(&traced.client, &["connect", &format!(":{PORT} ")])?;
    ensure!(!traced.client.stdout().contains(&nobody), "{}", traced.client.stdout());
    stream.finish()?;
    Ok(())
}

#[test]
fn each_host_sees_its_own_containers_only() -> Result<()> {
    let traced = traced("trace-scope")?;
    let stream = traced.scene.stream(PORT, "")?;
    wait_for_line(&traced.client, &["connect", &format!(":{PORT} ")])?;
    wait_for_line(&traced.server, &["accept", &format!(":{PORT} ")])?;
    for (trace, foreign) in [(&traced.client, "accept"), (&traced.server, "connect")] {
        ensure!(!trace.stdout().contains(foreign), "{}", trace.stdout());
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_that_ends_at_once_is_traced_too() -> Result<()> {
    let traced = traced("trace-short")?;
    for _ in 0..3 {
        let options = StreamOptions { client: "--bytes 1".into(), ..StreamOptions::default() };
        let stream = traced.scene.stream_with(PORT, &options)?;
        stream.end()?;
    }
    let lines = |trace: &Process| trace.stdout().lines().filter(|line| line.contains(":7000 ")).count();
    wait_for("three lines at each end", DEADLINE, || {
        Ok((lines(&traced.client) == 3 && lines(&traced.server) == 3).then_some(()))
    })
}

#[test]
fn a_trace_beside_a_router_leaves_what_the_router_has_pinned() -> Result<()> {
    let scene = Scene::with_routers("trace-beside")?;
    let stream = scene.swapped_stream(PORT, "--names")?;
    for host in scene.lab.hosts() {
        let pins = host.pins()?;
        let trace = trace(host)?;
        trace.signal(Signal::SIGINT)?;
        let end = trace.wait(DEADLINE)?;
        ensure!(end.success(), "{end:?}");
        ensure!(!pins.is_empty() && host.pins()? == pins, "{pins:?} were pinned, {:?} are", host.pins()?);
    }
    // It looks at its addresses as long as it runs.
    stream.finish()?;
    Ok(())
}
