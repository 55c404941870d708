// SPDX-License-Identifier: Apache-2.0
//! How router and forwarder log: lines of text or of JSON, on standard error.
//!
//! Whoever logs never waits: whoever reads our standard error may be the one that we have stopped, and a pipe that nobody
//! reads must not stall a router. A thread writes; what finds no room in its queue is counted, and told in its place.

mod json;
mod queue;

use std::{str::FromStr, time::Duration};

use log::LevelFilter;

/// How long the lines that are queued may take when a program ends.
const LAST: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    #[default]
    Text,
    /// One object a line: `time`, `level`, `target`, `message`, and what the line is about by name.
    Json,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "text" => Ok(Format::Text),
            "json" => Ok(Format::Json),
            _ => Err("expected text or json".into()),
        }
    }
}

/// What is queued is written when this is dropped, if that takes no longer than a second.
pub struct Log(());

impl Drop for Log {
    fn drop(&mut self) {
        flush();
    }
}

/// Begin to log. Starts a thread, which blocks the signals that its caller does. `silent`: modules that have nothing to
/// say.
pub fn start(level: LevelFilter, format: Format, silent: &[&str]) -> Log {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    for module in silent {
        builder.filter_module(module, LevelFilter::Off);
    }
    match queue::open(format) {
        Ok(writer) => builder.target(env_logger::Target::Pipe(Box::new(writer))),
        // Without a thread, whoever logs writes.
        Err(_) => builder.target(env_logger::Target::Stderr),
    };
    if format == Format::Json {
        builder.format(json::write);
    }
    builder.init();
    Log(())
}

/// Wait until what is queued is written, at most a second.
pub fn flush() {
    queue::flush(LAST);
}

/// Lines that found no room since the program started.
pub fn lost_lines() -> u64 {
    queue::lost_lines()
}
