// SPDX-License-Identifier: Apache-2.0
//! SIGKILL of router or forwarder between swaps: applications go on, swapped or not, and after a restart new swaps
//! work.

use anyhow::{Context, Result, ensure};
use lab::{Host, RouterOptions, Scene};

const OLD: u16 = 7000;
const NEW: u16 = 7001;
const BACK: u16 = 7002;

/// One connection on the host network, one on the overlay, both busy, while `crash` happens; then a new one.
fn check(test: &str, crash: impl FnOnce(&Scene) -> Result<()>) -> Result<Scene> {
    let scene = Scene::with_routers(test)?;
    let mut swapped = scene.swapped_stream(OLD, "--names")?;
    let mut back = scene.swapped_stream(BACK, "--names")?;
    scene.lab.h1.move_to(BACK, "overlay")?;
    crash(&scene)?;
    swapped.expect_running()?;
    back.expect_running()?;
    let new = scene.swapped_stream(NEW, "--names")?;
    for stream in [swapped, back, new] {
        stream.finish()?;
    }
    Ok(scene)
}

fn kill_router(host: &Host) -> Result<()> {
    host.kill_router()?;
    host.start_router(&RouterOptions::default())
}

fn kill_forwarder(host: &Host) -> Result<()> {
    host.kill_forwarder()?;
    host.start_forwarder()
}

#[test]
fn the_clients_router_may_be_killed() -> Result<()> {
    check("kill-router-1", |scene| kill_router(&scene.lab.h1)).map(drop)
}

#[test]
fn the_servers_router_may_be_killed() -> Result<()> {
    check("kill-router-2", |scene| kill_router(&scene.lab.h2)).map(drop)
}

#[test]
fn the_clients_forwarder_may_be_killed() -> Result<()> {
    check("kill-forwarder-1", |scene| kill_forwarder(&scene.lab.h1)).map(drop)
}

#[test]
fn the_servers_forwarder_may_be_killed() -> Result<()> {
    check("kill-forwarder-2", |scene| kill_forwarder(&scene.lab.h2)).map(drop)
}

#[test]
fn everything_may_be_killed_at_once() -> Result<()> {
    let crash = |scene: &Scene| {
        for host in scene.lab.hosts() {
            host.kill_router()?;
            host.kill_forwarder()?;
        }
        scene.lab.start_everything(&RouterOptions::default())
    };
    check("kill-all", crash).map(drop)
}

#[test]
fn a_connection_swapped_before_the_routers_were_killed_can_go_back() -> Result<()> {
    let scene = Scene::with_routers("kill-and-back")?;
    let stream = scene.swapped_stream(OLD, "--names")?;
    for host in scene.lab.hosts() {
        kill_router(host)?;
    }
    scene.wait_until_on_host(OLD)?;
    scene.lab.h1.move_to(OLD, "overlay")?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_swapped_before_everything_was_killed_is_shown_without_a_way_back() -> Result<()> {
    let scene = Scene::with_routers("stranded")?;
    let stream = scene.swapped_stream(OLD, "--names")?;
    for host in scene.lab.hosts() {
        host.kill_router()?;
        host.kill_forwarder()?;
    }
    scene.lab.start_everything(&RouterOptions::default())?;
    for host in scene.lab.hosts() {
        let flow = host.wait_until_on_host(OLD)?;
        ensure!(flow.way_back == Some(false), "{} shows {flow:?}", host.name);
        let refused = host.swap_back(&flow.conn.context("a connection without a name")?);
        ensure!(refused.is_err(), "{} let it go back", host.name);
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_that_nobody_knows_any_more_keeps_its_names_when_a_router_stops() -> Result<()> {
    let scene = Scene::with_routers("forgotten")?;
    let mut stream = scene.swapped_stream(OLD, "--names")?;
    for host in scene.lab.hosts() {
        host.kill_router()?;
        host.kill_forwarder()?;
    }
    scene.lab.start_everything(&RouterOptions::default())?;
    scene.lab.stop_routers()?;
    // Names are looked at a hundred times a second.
    std::thread::sleep(std::time::Duration::from_millis(500));
    stream.expect_running()?;
    stream.finish()?;
    Ok(())
}
