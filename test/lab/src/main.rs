// SPDX-License-Identifier: Apache-2.0
//! The lab's command line: a lab to play in, the benchmark, and torture. `test/script.sh` calls it.

mod bench;
mod playground;
mod torture;

use std::{path::Path, process::ExitCode};

use clap::{Parser, Subcommand};
use lab::transparency;

/// Two hosts, an overlay between them and pods, on this machine.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Raise a lab that stays until `lab down`: hosts h1 and h2, pods client (on h1) and server (on h2).
    Up {
        /// Start no forwarders and routers.
        #[arg(long)]
        without_router: bool,
    },
    /// End the lab of `lab up`.
    Down,
    /// A shell, or a command, in the lab of `lab up`.
    Shell {
        /// h1, h2, client or server.
        place: String,
        /// The command; a shell if there is none.
        #[arg(trailing_var_arg = true)]
        command: Vec<String>,
    },
    /// Compare overlay, router and host network.
    Bench(bench::Options),
    /// Move many connections to and fro while everything around them is killed, restarted and changed.
    Torture(torture::Options),
    /// Write test/TRANSPARENCY.md from what the tests of that name have recorded.
    #[command(hide = true)]
    Transparency {
        /// Before the tests: forget what earlier runs have recorded.
        #[arg(long)]
        clear: bool,
    },
    /// Build a lab, say so, and keep it until SIGTERM.
    #[command(hide = true)]
    Hold {
        name: String,
        #[arg(long)]
        state: Option<std::path::PathBuf>,
        #[arg(long)]
        with_router: bool,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Up { without_router } => playground::up(!without_router),
        Command::Down => playground::down(),
        Command::Shell { place, command } => playground::shell(&place, &command),
        Command::Hold { name, state, with_router } => playground::hold(&name, state.as_deref(), with_router),
        Command::Bench(options) => bench::run(&options),
        Command::Torture(options) => torture::run(&options),
        Command::Transparency { clear: true } => transparency::clear(),
        Command::Transparency { clear: false } => {
            transparency::write_table(Path::new("test/TRANSPARENCY.md"))
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
