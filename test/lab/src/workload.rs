// SPDX-License-Identifier: Apache-2.0
//! The program `stream` between two pods.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};

use serde_json::Value;

use crate::{DEADLINE, Family, Pod, Process, program};

/// A stream server and its client, connected.
pub struct Stream {
    pub server: Process,
    pub client: Process,
    pub port: u16,
}

/// How both are started.
#[derive(Clone, Default)]
pub struct StreamOptions {
    pub family: Option<Family>,
    /// For both sides, as a command line has it.
    pub both: String,
    pub server: String,
    pub client: String,
}

impl StreamOptions {
    pub fn both(arguments: &str) -> StreamOptions {
        StreamOptions { both: arguments.to_owned(), ..StreamOptions::default() }
    }
}

impl Stream {
    /// Starts both; the client runs until [`Stream::finish`] unless told otherwise.
    pub fn start(client: &Pod, server: &Pod, port: u16, options: &StreamOptions) -> Result<Stream> {
        let address = server.address(options.family.unwrap_or(Family::V4), port).to_string();
        let command = |role: &str, more: &str| -> Result<Command> {
            let mut command = Command::new(program("stream")?);
            command
                .args([role, &address])
                .args(options.both.split_whitespace())
                .args(more.split_whitespace());
            Ok(command)
        };
        let mut server =
            server.spawn(&format!("stream-{port}-server"), &mut command("--server", &options.server)?)?;
        server.wait_until_it_says("listening", DEADLINE)?;
        let mut command = command("--client", &options.client)?;
        command.arg("--until-eof");
        let mut client = client.spawn(&format!("stream-{port}-client"), &mut command)?;
        client.wait_until_it_says("connected", DEADLINE)?;
        server.wait_until_it_says("connected", DEADLINE)?;
        Ok(Stream { server, client, port })
    }

    /// Neither has found anything wrong so far.
    pub fn expect_running(&mut self) -> Result<()> {
        self.client.fail_if_ended()?;
        self.server.fail_if_ended()
    }

    /// Lets the client come to its end, and checks that both are content. Returns what both printed last.
    pub fn finish(mut self) -> Result<(Value, Value)> {
        self.expect_running()?;
        self.client.close_stdin();
        self.end()
    }

    /// As [`Stream::finish`], for a client that comes to its end by itself.
    pub fn end(self) -> Result<(Value, Value)> {
        let client = self.client.wait(DEADLINE).context("the client")?.expect_success()?.last_json()?;
        let server =
            self.server.wait(Duration::from_secs(5)).context("the server")?.expect_success()?.last_json()?;
        for (sent, received) in [("sent", "received"), ("sent_digest", "received_digest")] {
            ensure!(client[sent] == server[received], "client {client}, server {server}");
            ensure!(client[received] == server[sent], "client {client}, server {server}");
        }
        Ok((client, server))
    }
}
