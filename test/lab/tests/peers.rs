// SPDX-License-Identifier: Apache-2.0
//! Whatever comes to ROUTER_PORT is dropped with one log line, costs little memory, and disturbs nobody.

use std::{
    io::{ErrorKind, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{DEADLINE, Host, Scene, wait_for};

const ROUTER_PORT: u16 = 1234;
const PORT: u16 = 7000;

/// A connection from `from` to the router of `to`.
fn knock(from: &Host, to: &Host) -> Result<TcpStream> {
    let tunnel = IpAddr::from([10, 244, to.index, 0]);
    let stream = from.place().network.run(|| {
        let mut last = None;
        for address in [IpAddr::from(to.address), tunnel] {
            match TcpStream::connect_timeout(&SocketAddr::new(address, ROUTER_PORT), DEADLINE) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = Some(error),
            }
        }
        bail!("the router of {} does not listen: {last:?}", to.name)
    })?;
    stream.set_read_timeout(Some(DEADLINE))?;
    Ok(stream)
}

/// The router closes the connection; what it says before does not matter.
fn expect_closed(mut stream: TcpStream) -> Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => (),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => return Err(error).context("the router did not close the connection"),
        }
    }
}

fn lines_about(host: &Host, peer: SocketAddr) -> usize {
    let port = format!(":{}", peer.port());
    host.router_log().lines().filter(|line| line.contains(&port)).count()
}

fn check_dropped(test: &str, bytes: &[u8]) -> Result<()> {
    let scene = Scene::with_routers(test)?;
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    let mut stream = knock(h2, h1)?;
    let us = stream.local_addr()?;
    // The router may have seen enough before all is written.
    let _ = stream.write_all(bytes);
    expect_closed(stream)?;
    wait_for("a log line about the peer", DEADLINE, || Ok((lines_about(h1, us) > 0).then_some(())))?;
    ensure!(lines_about(h1, us) == 1, "more than one line:\n{}", h1.router_log());
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    Ok(())
}

#[test]
fn garbage_is_dropped() -> Result<()> {
    check_dropped("peer-garbage", b"GET / HTTP/1.1\r\nHost: router\r\n\r\n")
}

#[test]
fn an_oversized_length_is_dropped() -> Result<()> {
    // Whatever the byte order and the place of the length.
    check_dropped("peer-length", &[0xff; 64])
}

#[test]
fn an_unknown_version_is_dropped() -> Result<()> {
    let mut frame = vec![8, 0, 0, 0];
    frame.extend([0, 0x7f, 0x7f, 0x7f, 0x7f, 0, 0, 0]);
    check_dropped("peer-version", &frame)
}

#[test]
fn a_peer_that_stalls_is_dropped() -> Result<()> {
    check_dropped("peer-stall", &[1])
}

#[test]
fn many_peers_that_stall_do_not_make_the_router_grow_or_refuse_others() -> Result<()> {
    let scene = Scene::with_routers("peer-many")?;
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    let mut stalled = Vec::new();
    for _ in 0..300 {
        let mut stream = knock(h2, h1)?;
        let _ = stream.write_all(&[0xff, 0xff]);
        stalled.push(stream);
    }
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    let pid = h1.router_pid().context("the router runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    let kilobytes: u64 = resident.trim().trim_end_matches(" kB").parse()?;
    ensure!(kilobytes < 100_000, "the router takes {kilobytes} kB");
    Ok(())
}
