// SPDX-License-Identifier: Apache-2.0
//! One TCP connection in one particular state, for as long as the test wants: the rows of test/TRANSPARENCY.md.
//!
//! Each behaviour has two sides: the *subject* connects and gets into the state, the *partner* accepts and does what
//! the state needs. Both say `connected`, wait for the line `enter`, and say `ready` when they are in the state; the
//! line `leave` ends it. Then both send each other checked bytes over the connection and say `ok`. Whatever is not as
//! it would be without anybody moving the connection ends the program with exit code 1 and a line that says what.

mod calls;
mod readiness;
mod tools;
mod waits;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    process::ExitCode,
};

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use tools::{goodbye, say, wait_for_line};

#[derive(Parser)]
struct Options {
    behaviour: String,
    side: Side,
    /// Where the partner listens.
    address: SocketAddr,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Side {
    Subject,
    Partner,
}

/// How a side leaves its connection.
pub enum Left {
    /// As it found it: it is to be used once more.
    Usable(OwnedFd),
    /// Closed, or reset.
    Over,
}

pub type Half = fn(OwnedFd) -> Result<Left>;

/// What subject and partner do between `enter` and the last exchange.
pub struct Behaviour {
    pub name: &'static str,
    pub subject: Half,
    pub partner: Half,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let behaviour = [calls::ALL, waits::ALL, readiness::ALL]
        .into_iter()
        .flatten()
        .find(|behaviour| behaviour.name == options.behaviour)
        .with_context(|| format!("no behaviour {}", options.behaviour))?;
    let fd: OwnedFd = match options.side {
        Side::Subject => TcpStream::connect(options.address).context("connect")?.into(),
        Side::Partner => {
            let listener = TcpListener::bind(options.address).context("bind")?;
            say("listening");
            listener.accept().context("accept")?.0.into()
        }
    };
    say("connected");
    wait_for_line("enter")?;
    let left = match options.side {
        Side::Subject => (behaviour.subject)(fd),
        Side::Partner => (behaviour.partner)(fd),
    }?;
    if let Left::Usable(fd) = left {
        goodbye(&fd, options.side == Side::Subject).context("the last exchange")?;
    }
    say("ok");
    Ok(())
}
