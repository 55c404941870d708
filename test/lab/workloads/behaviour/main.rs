// SPDX-License-Identifier: Apache-2.0
//! One TCP connection in one particular state, for as long as the test wants: the rows of test/TRANSPARENCY.md.
//!
//! Each behaviour has two sides: the *subject* connects and gets into the state, the *partner* accepts and does what
//! the state needs. Both say `connected`, wait for the line `enter`, and say `ready` when they are in the state; the
//! line `leave` ends it. Then both send each other checked bytes over the connection and say `ok`. Whatever is not as
//! it would be without anybody moving the connection ends the program with exit code 1 and a line that says what.

mod calls;
mod churn;
mod elsewhere;
mod processes;
mod readiness;
mod sharing;
mod state;
mod tools;
mod waits;

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::Path,
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
    /// Another program in another container, given the socket of the subject.
    Holder,
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
    if options.side == Side::Holder {
        return sharing::has_what_was_passed_on();
    }
    if let Some(ending) = churn::ending_of(&options.behaviour) {
        let run = if options.side == Side::Subject { churn::subject } else { churn::partner };
        return run(ending, options.address);
    }
    let behaviour =
        [calls::ALL, waits::ALL, elsewhere::ALL, readiness::ALL, sharing::ALL, state::ALL, processes::ALL]
            .into_iter()
            .flatten()
            .find(|behaviour| behaviour.name == options.behaviour)
            .with_context(|| format!("no behaviour {}", options.behaviour))?;
    let fd: OwnedFd = match options.side {
        Side::Subject => connect(options)?,
        Side::Partner | Side::Holder => accept(options)?,
    };
    say("connected");
    wait_for_line("enter")?;
    let left = match options.side {
        Side::Subject => (behaviour.subject)(fd),
        Side::Partner | Side::Holder => (behaviour.partner)(fd),
    }?;
    if let Left::Usable(fd) = left {
        goodbye(&fd, options.side == Side::Subject).context("the last exchange")?;
    }
    say("ok");
    Ok(())
}

fn connect(options: &Options) -> Result<OwnedFd> {
    if options.behaviour == "fast-open" {
        return tools::connect_with_data(options.address);
    }
    if let Some(namespace) = std::env::var_os("BEHAVIOUR_NETWORK") {
        return tools::connect_in(Path::new(&namespace), options.address);
    }
    if let Ok(from) = std::env::var("BEHAVIOUR_BIND") {
        return tools::connect_from(from.parse()?, options.address);
    }
    Ok(TcpStream::connect(options.address).context("connect")?.into())
}

fn accept(options: &Options) -> Result<OwnedFd> {
    let listener = TcpListener::bind(options.address).context("bind")?;
    match options.behaviour.as_str() {
        "prefork" => {
            say("listening");
            sharing::accept_in_a_child(&listener)
        }
        "fast-open" => tools::accept_with_data(listener.into()),
        _ => {
            say("listening");
            Ok(listener.accept().context("accept")?.0.into())
        }
    }
}
