// SPDX-License-Identifier: Apache-2.0
//! A router asked straight over its control socket, for those who ask many times a second: a program for each
//! question would take longer than the answer.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::{Flow, Host, Status};

/// Longer than a router pursues an order.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where each thread of a process stands, and how busy the machine is.
fn what_it_does(pid: i32) -> String {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let of_threads = threads.flat_map(|thread| ["stat", "stack"].map(|file| thread.path().join(file)));
    let texts = of_threads.chain([PathBuf::from("/proc/loadavg")]).map(std::fs::read_to_string);
    texts.map(|text| text.unwrap_or_else(|error| format!("{error}\n"))).collect()
}

/// The control socket of a host's router, whichever runs there.
#[derive(Clone)]
pub struct Direct {
    path: PathBuf,
}

impl Host {
    pub fn direct(&self) -> Direct {
        Direct { path: self.place().directory.join("router.sock") }
    }
}

impl Direct {
    pub fn flows(&self) -> Result<Option<Vec<Flow>>> {
        self.ask(&json!("Flows"))
    }

    pub fn status(&self) -> Result<Option<Status>> {
        self.ask(&json!("Status"))
    }

    /// Orders a move to or from the host network, and waits until it is done or refused.
    pub fn order(&self, conn: &str, to_host: bool) -> Result<()> {
        let number = u64::from_str_radix(conn, 16).with_context(|| format!("a connection named {conn}"))?;
        let question = if to_host { json!({ "Swap": number }) } else { json!({ "SwapBack": number }) };
        self.ask::<Value>(&question).map(drop)
    }

    /// `None` if there is no router, or it ended before it answered. One that takes too long is an error.
    fn ask<T: DeserializeOwned>(&self, question: &Value) -> Result<Option<T>> {
        let Ok(mut stream) = UnixStream::connect(&self.path) else { return Ok(None) };
        stream.set_read_timeout(Some(PATIENCE))?;
        if stream.write_all(question.to_string().as_bytes()).is_err() {
            return Ok(None);
        }
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(0) => Ok(None),
            Ok(_) => {
                let text = || format!("to {question} it answered {}", String::from_utf8_lossy(&answer));
                Ok(Some(serde_json::from_slice(&answer).with_context(text)?))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let pid = getsockopt(&stream, PeerCredentials).map(|of| of.pid())?;
                bail!("no answer to {question} within {PATIENCE:?}; process {pid}:\n{}", what_it_does(pid))
            }
            Err(_) => Ok(None),
        }
    }
}
