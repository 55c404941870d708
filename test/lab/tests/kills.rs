// SPDX-License-Identifier: Apache-2.0
//! SIGKILL while connections move. The streams saturate both directions and check every byte.
//!
//! LAB_KILLS sets how often; the default is short enough for every run.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Host, RouterOptions, Scene};

const KINDS: [&str; 4] = ["", "--io epoll --threads 8", "--fork 2 --dup 1", "--pings"];

fn kills() -> u32 {
    std::env::var("LAB_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(24)
}

/// Each time a new stream, which the routers swap as soon as they see it, and a kill at another moment of that.
fn check(test: &str, kill: impl Fn(&Scene, &Host) -> Result<()>) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let mut swapped = 0;
    for number in 0..kills() {
        let (port, kind) = (7000 + number as u16, KINDS[number as usize % KINDS.len()]);
        let host = scene.lab.hosts()[number as usize / 2 % 2];
        let context = || format!("kill {} ({}), {kind}", number + 1, host.name);
        let mut stream = scene.stream(port, kind)?;
        std::thread::sleep(Duration::from_micros(u64::from(number * 7919 % 40_000)));
        kill(&scene, host).with_context(context)?;
        stream.expect_running().with_context(context)?;
        // A router that was killed too does not know what the forwarder has forgotten: it is not waited for.
        swapped += u32::from(scene.lab.h1.flows()?.iter().any(|flow| flow.has_port(port) && flow.on_host()));
        stream.finish().with_context(context)?;
    }
    ensure!(swapped > 0, "nothing was swapped");
    eprintln!("{} kills survived, {swapped} connections known to be swapped", kills());
    Ok(())
}

#[test]
fn forwarders_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-forwarders", |_, host| {
        host.kill_forwarder()?;
        host.start_forwarder()
    })
}

#[test]
fn routers_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-routers", |_, host| {
        host.kill_router()?;
        host.start_router(&RouterOptions::default())
    })
}

#[test]
fn everything_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-everything", |scene, _| {
        for host in scene.lab.hosts() {
            host.kill_router()?;
            host.kill_forwarder()?;
        }
        scene.lab.start_everything(&RouterOptions::default())
    })
}
