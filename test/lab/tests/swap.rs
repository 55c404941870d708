// SPDX-License-Identifier: Apache-2.0
//! A stream that saturates both directions is swapped, swapped back and swapped again, many times while it runs.
//! Each program checks every byte and every system call.

use anyhow::{Context, Result};
use lab::Scene;

const SWAPS: u32 = 20;
const PORT: u16 = 7000;

fn check(test: &str, arguments: &str) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let mut stream = scene.swapped_stream(PORT, arguments)?;
    for swap in 1..=SWAPS {
        for path in ["overlay", "host"] {
            scene.lab.h1.move_to(PORT, path).with_context(|| format!("move {swap} to {path}"))?;
            stream.expect_running().with_context(|| format!("after move {swap} to {path}"))?;
        }
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn blocking_reads_and_writes_survive_twenty_swaps() -> Result<()> {
    check("swap-blocking", "--io blocking --names")
}

#[test]
fn sixty_four_threads_survive_twenty_swaps() -> Result<()> {
    check("swap-threads", "--threads 64")
}

#[test]
fn a_socket_inherited_by_four_children_survives_twenty_swaps() -> Result<()> {
    check("swap-forks", "--fork 4")
}

#[test]
fn a_child_that_reads_for_its_parent_survives_twenty_swaps() -> Result<()> {
    check("swap-reader", "--fork-reader")
}

#[test]
fn a_socket_duplicated_twice_survives_twenty_swaps() -> Result<()> {
    check("swap-dup", "--dup 2")
}

#[test]
fn a_duplicated_socket_in_an_epoll_set_survives_twenty_swaps() -> Result<()> {
    check("swap-dup-epoll", "--dup 2 --io epoll")
}

#[test]
fn poll_survives_twenty_swaps() -> Result<()> {
    check("swap-poll", "--io poll")
}

#[test]
fn select_survives_twenty_swaps() -> Result<()> {
    check("swap-select", "--io select")
}

#[test]
fn level_triggered_epoll_survives_twenty_swaps() -> Result<()> {
    check("swap-epoll", "--io epoll")
}

#[test]
fn edge_triggered_epoll_survives_twenty_swaps() -> Result<()> {
    check("swap-epoll-et", "--io epoll-et")
}

#[test]
fn one_shot_epoll_survives_twenty_swaps() -> Result<()> {
    check("swap-epoll-oneshot", "--io epoll-oneshot")
}

#[test]
fn threads_children_and_duplicates_at_once_survive_twenty_swaps() -> Result<()> {
    check("swap-everything", "--threads 16 --fork 2 --dup 2 --io epoll-et --names")
}

#[test]
fn request_and_response_survive_twenty_swaps() -> Result<()> {
    check("swap-pings", "--pings --names")
}

#[test]
fn an_idle_connection_survives_twenty_swaps() -> Result<()> {
    check("swap-idle", "--idle --names")
}
