// SPDX-License-Identifier: Apache-2.0
//! The host network stops carrying a swapped connection, while the overlay goes on.

use std::{process::Command, time::Instant};

use anyhow::{Context, Result, ensure};
use lab::{Cut, DEADLINE, Flow, Host, Scene, wait_for};
use nix::sys::signal::Signal;

const PORT: u16 = 7000;
const OTHER: u16 = 7001;
const BOTH_WAYS: &str = "--names";
const PINGS: &str = "--pings";

fn is_stalled(flow: &Flow) -> bool {
    flow.reason.as_deref() == Some("host_path_stalled")
}

fn cut(cut: Cut) -> impl Fn(&Host) -> Result<()> {
    move |host| host.cut(cut)
}

/// Breaks the host path of a busy connection at h1: `flows` of either host says so, and the programs are well when
/// the fault is over.
fn check_noticed(
    test: &str,
    arguments: &str,
    fault: impl Fn(&Host) -> Result<()>,
    repair: impl Fn(&Host) -> Result<()>,
) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let mut stream = scene.swapped_stream(PORT, arguments)?;
    fault(&scene.lab.h1)?;
    let began = Instant::now();
    scene.lab.h1.wait_for_flow(PORT, "known to be stalled", is_stalled)?;
    eprintln!("{test}: noticed after {:?}", began.elapsed());
    scene.lab.h2.wait_for_flow(PORT, "known to be stalled", is_stalled)?;
    repair(&scene.lab.h1)?;
    stream.expect_running()?;
    stream.finish()?;
    Ok(())
}

/// As above; and the connection is on the overlay then, with all its bytes, while the fault lasts.
fn check_recovered(test: &str, arguments: &str, fault: impl Fn(&Host, u16) -> Result<()>) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let mut stream = scene.swapped_stream(PORT, arguments)?;
    fault(&scene.lab.h1, scene.lab.h1.host_port_of(&stream.client)?)?;
    let began = Instant::now();
    scene.wait_until_on_overlay(PORT)?;
    let took = began.elapsed();
    eprintln!("{test}: back after {took:?}");
    for host in scene.lab.hosts() {
        let flow = host.wait_until_on_overlay(PORT)?;
        ensure!(is_stalled(&flow), "{flow:?}");
    }
    stream.expect_running()?;
    stream.finish()?;
    ensure!(took.as_secs() < 3, "it took {took:?}");
    Ok(())
}

fn cut_one_way_and_both(test: &str, arguments: &str) -> Result<()> {
    for (name, cut) in [("all", Cut::Everything), ("out", Cut::Outgoing), ("in", Cut::Incoming)] {
        check_recovered(&format!("{test}-{name}"), arguments, |host, _| host.cut(cut)).context(name)?;
    }
    Ok(())
}

#[test]
fn a_firewall_that_drops_everything_is_noticed() -> Result<()> {
    check_noticed("stall-all", BOTH_WAYS, cut(Cut::Everything), Host::heal)
}

#[test]
fn a_firewall_that_drops_what_leaves_is_noticed() -> Result<()> {
    check_noticed("stall-out", BOTH_WAYS, cut(Cut::Outgoing), Host::heal)
}

#[test]
fn a_firewall_that_drops_what_arrives_is_noticed() -> Result<()> {
    check_noticed("stall-in", BOTH_WAYS, cut(Cut::Incoming), Host::heal)
}

#[test]
fn an_interface_that_goes_down_is_noticed() -> Result<()> {
    check_noticed("stall-down", BOTH_WAYS, Host::take_host_if_down, Host::bring_host_if_up)
}

#[test]
fn a_connection_that_waits_for_an_answer_is_noticed() -> Result<()> {
    check_noticed("stall-pings", PINGS, cut(Cut::Everything), Host::heal)
}

#[test]
fn only_the_connection_that_is_not_carried_is_stalled() -> Result<()> {
    let scene = Scene::with_routers("stall-one")?;
    let stalled = scene.swapped_stream(PORT, BOTH_WAYS)?;
    let well = scene.swapped_stream(OTHER, BOTH_WAYS)?;
    let host = &scene.lab.h1;
    host.cut(Cut::Connection(host.host_port_of(&stalled.client)?))?;
    host.wait_for_flow(PORT, "known to be stalled", is_stalled)?;
    let other = host.wait_until_on_host(OTHER)?;
    ensure!(other.reason.is_none(), "{other:?}");
    host.heal()?;
    stalled.finish()?;
    well.finish()?;
    Ok(())
}

#[test]
fn a_reader_that_does_not_read_is_no_stall() -> Result<()> {
    let scene = Scene::with_routers("slow-reader")?;
    // A blocking write is cut short by a stop, on any network.
    let stream = scene.swapped_stream(PORT, "--io poll")?;
    let host = &scene.lab.h1;
    stream.server.signal(Signal::SIGSTOP)?;
    wait_for("four probes of the closed window", DEADLINE, || {
        let sockets = host.place().run(Command::new("ss").args(["-Htni", "state", "established"]))?;
        let backoffs =
            sockets.split_whitespace().filter_map(|word| word.strip_prefix("backoff:")?.parse().ok());
        Ok((backoffs.max() >= Some(4)).then_some(()))
    })?;
    let flow = host.wait_until_on_host(PORT)?;
    ensure!(flow.reason.is_none(), "{flow:?}");
    stream.server.signal(Signal::SIGCONT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_saturated_connection_that_a_firewall_drops_goes_back_and_loses_nothing() -> Result<()> {
    cut_one_way_and_both("back", BOTH_WAYS)
}

#[test]
fn requests_that_a_firewall_drops_go_back_and_lose_nothing() -> Result<()> {
    cut_one_way_and_both("back-pings", PINGS)
}

#[test]
fn a_connection_whose_interface_goes_down_goes_back_and_loses_nothing() -> Result<()> {
    check_recovered("back-down", BOTH_WAYS, |host, _| host.take_host_if_down())
}

#[test]
fn one_connection_that_is_dropped_goes_back_alone() -> Result<()> {
    check_recovered("back-one", BOTH_WAYS, |host, port| host.cut(Cut::Connection(port)))
}
