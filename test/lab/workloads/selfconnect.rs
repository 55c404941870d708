// SPDX-License-Identifier: Apache-2.0
//! A single-threaded program that connects to itself, accepts only then, and talks to itself until standard input
//! is closed. Whoever stops it in `connect` until it has accepted waits for ever.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
};

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, poll};

fn main() -> Result<()> {
    let address: SocketAddr =
        std::env::args().nth(1).context("usage: selfconnect ADDRESS:PORT")?.parse().context("address")?;
    let listener = TcpListener::bind(address).context("bind")?;
    let near = TcpStream::connect(address).context("connect")?;
    let (far, _) = listener.accept().context("accept")?;
    println!("{}", serde_json::json!({"event": "connected"}));

    let stdin = std::io::stdin();
    let mut pings = 0u64;
    while poll(&mut [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)], 0u8).context("poll")? == 0 {
        for (mut from, mut to) in [(&near, &far), (&far, &near)] {
            // `write` and `read`, not `write_all` and `read_exact`: those hide EINTR.
            let message = pings.to_le_bytes();
            ensure!(from.write(&message).context("write")? == message.len(), "short write");
            let mut answer = [0; 8];
            ensure!(to.read(&mut answer).context("read")? == answer.len(), "short read");
            ensure!(answer == message, "ping {pings} came as {}", u64::from_le_bytes(answer));
            pings += 1;
        }
    }
    println!("{}", serde_json::json!({"event": "done", "pings": pings}));
    Ok(())
}
