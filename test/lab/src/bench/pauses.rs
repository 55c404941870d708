// SPDX-License-Identifier: Apache-2.0
//! How long applications stand still: a connection of each kind is swapped, swapped back, and swapped again.

use anyhow::{Context, Result};
use lab::{
    measure::median,
    workload::{Stream, StreamOptions},
};

use super::{Part, Quantity, Run, Way};

static MEDIAN: Quantity = Quantity::less("pause of a swap, median", "ms");
static LONGEST: Quantity = Quantity::less("pause of a swap, longest of ten", "ms");

/// Swaps of each kind in a round.
const SWAPS: u32 = 10;

/// What it is called, and what `stream` is told.
const KINDS: [(&str, &str); 3] =
    [("idle", "--idle"), ("request and response", "--pings"), ("saturated both ways", "--io blocking")];

pub fn parts() -> impl Iterator<Item = Part> {
    KINDS.into_iter().zip(7100..).map(|((kind, arguments), port)| {
        Part::new(kind, move |run| {
            let pauses_ms =
                pauses_ms(run, port, arguments).with_context(|| format!("a connection that is {kind}"))?;
            let longest = pauses_ms.iter().copied().fold(0.0, f64::max);
            Ok(vec![MEDIAN.of(kind, median(&pauses_ms).unwrap_or(0.0)), LONGEST.of(kind, longest)])
        })
        .by(&[Way::Router])
    })
}

/// Of the swaps onto the host network, as the client's host saw them.
fn pauses_ms(run: &Run<'_>, port: u16, arguments: &str) -> Result<Vec<f64>> {
    let host = &run.setting.lab.h1;
    let (client, server) = (&run.setting.client, &run.setting.server);
    let stream = Stream::start(client, server, port, &StreamOptions::both(arguments))?;
    host.wait_until_on_host(port)?;
    let mut pauses_ms = Vec::new();
    for _ in 0..SWAPS {
        host.move_to(port, "overlay")?;
        pauses_ms.extend(host.move_to(port, "host")?.pause_us.map(|us| us as f64 / 1000.0));
    }
    stream.finish()?;
    Ok(pauses_ms)
}
