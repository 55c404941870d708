// SPDX-License-Identifier: Apache-2.0
//! What a stop of the router does to connections, and what it leaves behind.

use std::process::Command;

use anyhow::{Result, ensure};
use lab::{Cgroup, Host, RouterOptions, Scene};

const PORT: u16 = 7000;

/// Ids of the BPF links that these processes hold, as fdinfo tells them.
fn links_of(pids: &[u32]) -> Result<Vec<u64>> {
    let mut links = Vec::new();
    for pid in pids {
        for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
            let info = std::fs::read_to_string(entry?.path()).unwrap_or_default();
            let id = info.lines().find_map(|line| line.strip_prefix("link_id:"));
            links.extend(id.and_then(|id| id.trim().parse::<u64>().ok()));
        }
    }
    Ok(links)
}

fn link_exists(id: u64) -> Result<bool> {
    Ok(Command::new("bpftool").args(["link", "show", "id", &id.to_string()]).output()?.status.success())
}

/// Programs attached to a cgroup.
fn attached(cgroup: &Cgroup) -> Result<String> {
    let output = Command::new("bpftool").args(["-j", "cgroup", "show"]).arg(cgroup.path()).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

fn check_nothing_is_left(host: &Host, links: &[u64]) -> Result<()> {
    let pins = host.pins()?;
    ensure!(pins.is_empty(), "pins on {}: {pins:?}", host.name);
    for link in links {
        ensure!(!link_exists(*link)?, "the BPF link {link} of {} is left", host.name);
    }
    let programs = attached(host.cgroup())?;
    ensure!(programs.is_empty() || programs == "[]", "attached to the cgroup of {}: {programs}", host.name);
    let processes = host.place().cgroup.processes();
    ensure!(processes.is_empty(), "processes on {}: {processes:?}", host.name);
    let sockets = host.place().run(Command::new("ss").args(["-Htn", "state", "established"]))?;
    ensure!(sockets.trim().is_empty(), "host connections of {}: {sockets}", host.name);
    for name in ["router.sock", "forwarder.sock"] {
        ensure!(!host.place().directory.join(name).exists(), "{name} of {} is left", host.name);
    }
    Ok(())
}

#[test]
fn a_stop_takes_every_connection_back_and_leaves_nothing() -> Result<()> {
    let scene = Scene::with_routers("stop")?;
    let stream = scene.swapped_stream(PORT, "--names")?;
    let hosts = scene.lab.hosts();
    let mut links = Vec::new();
    for host in hosts {
        let pids: Vec<u32> = [host.router_pid(), host.forwarder_pid()].into_iter().flatten().collect();
        let held = links_of(&pids)?;
        ensure!(!held.is_empty(), "{pids:?} hold no BPF link: this test would prove nothing");
        links.push(held);
    }
    scene.lab.stop_everything()?;
    for (host, links) in hosts.into_iter().zip(&links) {
        check_nothing_is_left(host, links)?;
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn forwarders_and_routers_stopped_at_once_take_every_connection_back() -> Result<()> {
    let scene = Scene::with_routers("stop-at-once")?;
    let stream = scene.swapped_stream(PORT, "--names")?;
    let hosts = scene.lab.hosts();
    // As when a DaemonSet is deleted.
    for host in hosts {
        host.terminate_forwarder()?;
        host.terminate_router()?;
    }
    for host in hosts {
        let (router, forwarder) = (host.wait_for_router()?, host.wait_for_forwarder()?);
        ensure!(router.success() && forwarder.success(), "{router:?} {forwarder:?}");
        check_nothing_is_left(host, &[])?;
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn a_stop_of_one_router_takes_its_connections_back() -> Result<()> {
    let scene = Scene::with_routers("stop-one")?;
    let stream = scene.swapped_stream(PORT, "--names")?;
    let end = scene.lab.h2.stop_router()?;
    ensure!(end.success(), "{end:?}");
    scene.lab.h1.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_router_told_to_leave_leaves_connections_where_they_are() -> Result<()> {
    let scene = Scene::without_routers("leave")?;
    let leaving = RouterOptions { leave: true, ..RouterOptions::default() };
    scene.lab.start_everything(&leaving)?;
    let mut stream = scene.swapped_stream(PORT, "--names")?;
    scene.lab.stop_routers()?;
    stream.expect_running()?;
    // The next routers know it, and can take it back.
    scene.lab.start_routers(&RouterOptions::default())?;
    scene.wait_until_on_host(PORT)?;
    scene.lab.h1.move_to(PORT, "overlay")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_router_that_is_replaced_after_an_order_to_leave_touches_no_connection() -> Result<()> {
    let scene = Scene::with_routers("upgrade")?;
    let stream = scene.swapped_stream(PORT, "--names")?;
    let host = &scene.lab.h1;
    let before = host.wait_until_on_host(PORT)?;
    host.ask(&["leave"])?;
    let end = host.stop_router()?;
    ensure!(end.success(), "{end:?}");
    host.start_router(&RouterOptions::default())?;
    let after = host.wait_until_on_host(PORT)?;
    ensure!(before.conn == after.conn, "the connection was moved: {before:?}, then {after:?}");
    ensure!(host.status()?.swaps == 0, "the new router has moved it");
    // The forwarder has kept the way back.
    host.move_to(PORT, "overlay")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_router_stops_when_there_is_nothing_to_take_back() -> Result<()> {
    let scene = Scene::with_routers("stop-idle")?;
    scene.lab.stop_everything()?;
    scene.lab.hosts().into_iter().try_for_each(|host| check_nothing_is_left(host, &[]))
}
