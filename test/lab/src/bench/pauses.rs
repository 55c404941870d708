// SPDX-License-Identifier: Apache-2.0
//! How long applications stand still: a connection of each kind is swapped, swapped back, and swapped again.

use anyhow::{Context, Result};
use lab::workload::{Stream, StreamOptions};

use super::{Setting, Way};

const KINDS: [(&str, &str); 3] =
    [("idle", "--idle"), ("request-response", "--pings"), ("saturated both ways", "--io blocking")];

pub struct Row {
    pub kind: &'static str,
    /// Of the swaps onto the host network, as the client's host saw them.
    pub pauses_us: Vec<f64>,
}

pub fn measure(setting: &Setting, samples: u32) -> Result<Vec<Row>> {
    // The rules of the benchmark are about pods, whatever the port.
    setting.by(Way::Router, |run| {
        let host = &run.setting.lab.h1;
        let mut rows = Vec::new();
        for ((kind, arguments), port) in KINDS.into_iter().zip(7100..) {
            let stream =
                Stream::start(&setting.client, &setting.server, port, &StreamOptions::both(arguments))?;
            host.wait_until_on_host(port).with_context(|| format!("a connection that is {kind}"))?;
            let mut pauses_us = Vec::new();
            for _ in 0..samples {
                host.move_to(port, "overlay")?;
                pauses_us.extend(host.move_to(port, "host")?.pause_us.map(|us| us as f64));
            }
            stream.finish()?;
            eprintln!("pauses, {kind}: {pauses_us:?} µs");
            rows.push(Row { kind, pauses_us });
        }
        Ok(rows)
    })
}
