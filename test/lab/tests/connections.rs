// SPDX-License-Identifier: Apache-2.0
//! Kinds of connections that are swapped, and that behave afterwards as before.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE, Family, RouterOptions, Scene,
    measure::{SOCKPERF_PORT, ping_pong},
    program, wait_for,
    workload::{Stream, StreamOptions},
};

const PORT: u16 = 7000;

fn check(test: &str, options: StreamOptions) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let stream = scene.stream_with(PORT, &options)?;
    scene.wait_until_on_host(PORT)?;
    scene.lab.h1.move_to(PORT, "overlay")?;
    scene.lab.h1.move_to(PORT, "host")?;
    stream.finish()?;
    Ok(())
}

fn check_family(test: &str, family: Family, arguments: &str) -> Result<()> {
    check(test, StreamOptions { family: Some(family), ..StreamOptions::both(arguments) })
}

#[test]
fn a_server_that_speaks_first_loses_no_byte() -> Result<()> {
    check("server-first", StreamOptions::both("--speak-first server"))
}

#[test]
fn a_client_that_speaks_first_loses_no_byte() -> Result<()> {
    check("client-first", StreamOptions::both("--speak-first client --io epoll-et"))
}

#[test]
fn a_client_that_writes_before_the_server_accepts_loses_no_byte() -> Result<()> {
    check("early", StreamOptions { server: "--accept-delay-ms 2000".into(), ..StreamOptions::default() })
}

#[test]
fn an_ipv4_program_sees_its_own_addresses_and_options() -> Result<()> {
    check_family("names-v4", Family::V4, "--names")
}

#[test]
fn an_ipv6_program_sees_its_own_addresses_and_options() -> Result<()> {
    check_family("names-v6", Family::V6, "--names --io epoll")
}

#[test]
fn a_program_with_mapped_addresses_sees_its_own_addresses_and_options() -> Result<()> {
    check_family("names-mapped", Family::Mapped, "--names --io poll")
}

#[test]
fn a_program_that_connects_to_itself_and_then_accepts_goes_on() -> Result<()> {
    let scene = Scene::with_routers("self")?;
    let address = scene.client.address(Family::V4, PORT).to_string();
    let mut running =
        scene.client.spawn("selfconnect", Command::new(program("selfconnect")?).arg(address))?;
    running.wait_until_it_says("connected", DEADLINE)?;
    // Swapped or refused: the router has made up its mind.
    scene.lab.h1.wait_for_flow(PORT, "decided", |flow| flow.on_host() || flow.reason.is_some())?;
    running.close_stdin();
    running.wait(DEADLINE)?.expect_success()?;
    Ok(())
}

#[test]
fn two_pods_of_one_host_are_swapped() -> Result<()> {
    let scene = Scene::with_routers("same-host")?;
    let neighbour = scene.lab.h1.pod("neighbour")?;
    let stream = Stream::start(&scene.client, &neighbour, PORT, &StreamOptions::both("--names"))?;
    let host = &scene.lab.h1;
    host.wait_until_on_host(PORT)?;
    host.move_to(PORT, "overlay")?;
    host.move_to(PORT, "host")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_older_than_the_routers_is_swapped() -> Result<()> {
    let scene = Scene::without_routers("older")?;
    let stream = scene.stream(PORT, "--names")?;
    scene.lab.start_everything(&RouterOptions::default())?;
    scene.wait_until_on_host(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn ten_connections_are_swapped_at_once() -> Result<()> {
    let scene = Scene::with_routers("ten")?;
    let ports = PORT..PORT + 10;
    let streams = ports.clone().map(|port| scene.stream(port, "--pings")).collect::<Result<Vec<_>>>()?;
    for port in ports.clone() {
        scene.wait_until_on_host(port)?;
    }
    scene.lab.h1.swap_back_all()?;
    for port in ports {
        scene.wait_until_on_overlay(port)?;
    }
    for stream in streams {
        stream.finish()?;
    }
    Ok(())
}

#[test]
fn an_order_for_a_connection_that_nobody_knows_says_so() -> Result<()> {
    const UNKNOWN: &str = "0000000000000007";
    let scene = Scene::with_routers("unknown")?;
    for refused in [scene.lab.h1.swap(UNKNOWN), scene.lab.h1.swap_back(UNKNOWN)] {
        let said = format!("{:#}", refused.err().context("it was carried out")?);
        ensure!(said.contains(&format!("{UNKNOWN}: the router knows no such connection")), "{said}");
    }
    Ok(())
}

#[test]
fn hosts_remember_nothing_of_the_moves_of_fifty_connections() -> Result<()> {
    let scene = Scene::with_routers("remembered")?;
    let stream = scene.stream(PORT, "--pings --connections 50")?;
    for host in scene.lab.hosts() {
        wait_for("fifty connections to be swapped", DEADLINE, || {
            Ok((host.status()?.swapped == 50).then_some(()))
        })?;
    }
    scene.lab.h1.swap_back_all()?;
    scene.wait_until_on_overlay(PORT)?;
    for host in scene.lab.hosts() {
        let mut ss = Command::new("ss");
        ss.args(["-Htn", "state", "time-wait", "( sport = :1234 or dport = :1234 )"]);
        let remembered = host.place().run(&mut ss)?;
        ensure!(remembered.is_empty(), "on {}: {remembered}", host.name);
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn a_server_that_is_started_anew_gets_its_address_back() -> Result<()> {
    let scene = Scene::with_routers("anew")?;
    let (client, server) = (scene.client.place(), scene.server.place());
    // sockperf binds its address without SO_REUSEADDR: a parked socket in TIME_WAIT would be in its way.
    for _ in 0..3 {
        let swapped = || scene.lab.h1.wait_until_on_host(SOCKPERF_PORT);
        ping_pong(client, server, scene.server.v4.into(), Duration::from_secs(1), swapped)?;
        wait_for("the parked sockets to close", DEADLINE, || {
            let sockets = server.run(Command::new("ss").args(["-Htn", "state", "established"]))?;
            Ok(sockets.trim().is_empty().then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn parked_sockets_close_soon_after_the_application_has_closed() -> Result<()> {
    let scene = Scene::with_routers("parked")?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    for (pod, host) in [(&scene.client, &scene.lab.h1), (&scene.server, &scene.lab.h2)] {
        wait_for("the parked socket to close", DEADLINE, || {
            let sockets = pod.place().run(Command::new("ss").args(["-Htn", "state", "established"]))?;
            Ok(sockets.trim().is_empty().then_some(()))
        })?;
        wait_for("the flow to go", DEADLINE, || {
            Ok((!host.flows()?.iter().any(|flow| flow.has_port(PORT) && flow.on_host())).then_some(()))
        })?;
        ensure!(host.status()?.swapped == 0, "{:?}", host.status()?);
    }
    Ok(())
}
