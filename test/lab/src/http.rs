// SPDX-License-Identifier: Apache-2.0
//! What the router's HTTP server answers on a host.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result};

use crate::Host;

/// An answer, as it came.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Host {
    pub fn get(&self, address: &str, path: &str) -> Result<Answer> {
        self.request(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n"))
    }

    /// `head`: without its end.
    pub fn request(&self, address: &str, head: &str) -> Result<Answer> {
        let to: SocketAddr = address.parse()?;
        let text = self.place().network.run(|| {
            let mut stream = TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
            stream.set_read_timeout(Some(Duration::from_secs(15)))?;
            write!(stream, "{head}Connection: close\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok(text)
        })?;
        let (head, body) = text.split_once("\r\n\r\n").with_context(|| format!("no answer: {text}"))?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.with_context(|| format!("no status: {head}"))?;
        Ok(Answer { status, head: head.to_lowercase(), body: body.to_owned() })
    }
}
