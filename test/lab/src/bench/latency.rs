// SPDX-License-Identifier: Apache-2.0
//! Latency: sockperf's ping-pong.

use std::time::Duration;

use anyhow::Result;
use lab::measure::{RunningPingPong, SOCKPERF_PORT, parse_ping_pong};

use super::{ALL_PODS, Key, Part, Quantity, Setting, figure::Target};

pub static KEY: Key = Key {
    name: "latency",
    title: "how long a message takes, one way (half a round trip)",
    rules: ALL_PODS,
    rounds: 5,
    most_rounds: 15,
    parts,
    live: None,
};

static P50: Quantity = Quantity::less("median", "µs").target(Target::OfHost(1.02));
static P99: Quantity = Quantity::less("99th percentile", "µs");
static P999: Quantity = Quantity::less("99.9th percentile", "µs").target(Target::OfHost(1.1));

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let part = |(case, bytes): (&'static str, u32)| {
        Part::new(case, move |run| {
            let time = Duration::from_secs(run.seconds.into());
            let RunningPingPong { client, server: _server } =
                RunningPingPong::start(run.client, run.server, run.address, bytes, time)?;
            // sockperf warms up before it measures; the swap happens then.
            run.watch_swaps(SOCKPERF_PORT, 1, Duration::from_secs(2))?;
            let got = parse_ping_pong(&run.finish(client)?)?;
            Ok(vec![P50.of(case, got.p50_us), P99.of(case, got.p99_us), P999.of(case, got.p999_us)])
        })
    };
    Ok([("64 B", 64), ("16 KiB", 16 << 10)].map(part).into())
}
