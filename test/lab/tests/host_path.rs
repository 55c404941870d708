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

/// As above; and the connection is on the overlay then, with all its bytes, while the fault lasts. Nothing is left of
/// its sockets on the host network.
fn check_recovered(test: &str, arguments: &str, fault: impl Fn(&Host, u16) -> Result<()>) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let mut stream = scene.swapped_stream(PORT, arguments)?;
    let port = scene.lab.h1.host_port_of(&stream.client)?;
    fault(&scene.lab.h1, port)?;
    let began = Instant::now();
    scene.wait_until_on_overlay(PORT)?;
    let took = began.elapsed();
    eprintln!("{test}: back after {took:?}");
    for host in scene.lab.hosts() {
        let flow = host.wait_until_on_overlay(PORT)?;
        ensure!(is_stalled(&flow), "{flow:?}");
        wait_for("the end of the dead sockets", DEADLINE, || {
            let either = format!("sport = :{port} or dport = :{port}");
            let left = host.place().run(Command::new("ss").args(["-Htan", &either]))?;
            Ok(left.is_empty().then_some(()))
        })?;
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

#[test]
fn a_connection_that_went_back_is_swapped_again_by_order_when_the_path_is_well() -> Result<()> {
    let scene = Scene::with_routers("back-and-forth")?;
    let mut stream = scene.swapped_stream(PORT, BOTH_WAYS)?;
    for _ in 0..3 {
        scene.lab.h1.cut(Cut::Everything)?;
        scene.wait_until_on_overlay(PORT)?;
        scene.lab.h1.heal()?;
        scene.lab.h1.move_to(PORT, "host")?;
        scene.wait_until_on_host(PORT)?;
        stream.expect_running()?;
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn a_path_that_heals_while_a_connection_leaves_it_loses_nothing() -> Result<()> {
    let scene = Scene::with_routers("back-healed")?;
    let mut stream = scene.swapped_stream(PORT, BOTH_WAYS)?;
    let (mut back, host) = (0, &scene.lab.h1);
    for _ in 0..5 {
        host.cut(Cut::Everything)?;
        host.wait_for_flow(PORT, "known to be stalled", is_stalled)?;
        host.heal()?;
        // It may have been too late, or early enough to stay.
        let decided = |flow: &Flow| !flow.on_host() || flow.reason.is_none();
        for host in scene.lab.hosts() {
            host.wait_for_flow(PORT, "back, or carried again", decided)?;
        }
        back += u32::from(!host.wait_for_flow(PORT, "there", |_| true)?.on_host());
        host.move_to(PORT, "host")?;
        scene.wait_until_on_host(PORT)?;
        stream.expect_running()?;
    }
    eprintln!("{back} of 5 went back");
    stream.finish()?;
    Ok(())
}

#[test]
fn many_connections_of_many_processes_go_back_at_once() -> Result<()> {
    const STREAMS: u16 = 20;
    let scene = Scene::with_routers("back-many")?;
    let arguments = |port: u16| if port.is_multiple_of(4) { BOTH_WAYS } else { PINGS };
    let started: Result<Vec<_>> =
        (PORT..PORT + STREAMS).map(|port| scene.stream(port, arguments(port))).collect();
    let mut streams = started?;
    // A program for each question would be slower than the moves on a machine as busy as this one is then.
    let wait_until_all_are_on = |path: &str| {
        wait_for(&format!("all to be on the {path}"), DEADLINE, || {
            let mut there = 0;
            for host in scene.lab.hosts() {
                let flows = host.direct().flows()?.context("no router answers")?;
                there += flows.iter().filter(|flow| flow.path == path).count();
            }
            Ok((there == 2 * usize::from(STREAMS)).then_some(()))
        })
    };
    wait_until_all_are_on("host")?;
    scene.lab.h1.cut(Cut::Everything)?;
    let began = Instant::now();
    wait_until_all_are_on("overlay")?;
    eprintln!("all are back after {:?}", began.elapsed());
    streams.iter_mut().try_for_each(|stream| stream.expect_running())?;
    streams.into_iter().try_for_each(|stream| stream.finish().map(drop))
}

/// Leaves the TCP sockets of a process in repair mode (TCP_REPAIR is option 19): 438 is pidfd_getfd(2).
const REPAIR: &str = "
import ctypes, os, socket, sys
pid = int(sys.argv[1])
for fd in os.listdir(f'/proc/{pid}/fd'):
    if os.readlink(f'/proc/{pid}/fd/{fd}').startswith('socket:'):
        copy = ctypes.CDLL(None).syscall(438, os.pidfd_open(pid), int(fd), 0)
        socket.socket(fileno=copy).setsockopt(socket.IPPROTO_TCP, 19, 1)
";

#[test]
fn a_forwarder_ends_what_an_earlier_one_was_killed_over() -> Result<()> {
    let scene = Scene::with_routers("left-in-repair")?;
    // A blocking write is cut short by a stop, on any network.
    let mut stream = scene.swapped_stream(PORT, "--io poll")?;
    let host = &scene.lab.h1;
    // As if it were frozen.
    stream.client.signal(Signal::SIGSTOP)?;
    host.place().run(Command::new("python3").args(["-c", REPAIR, &stream.client.pid().to_string()]))?;
    host.kill_forwarder()?;
    host.start_forwarder()?;
    stream.client.signal(Signal::SIGCONT)?;
    stream.expect_running()?;
    stream.finish()?;
    Ok(())
}
