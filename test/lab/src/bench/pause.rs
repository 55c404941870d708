// SPDX-License-Identifier: Apache-2.0
//! How long applications stand still: connections of each kind are swapped, swapped back, and swapped again.

use anyhow::{Context, Result};
use lab::{
    DEADLINE,
    measure::{median, quantile},
    programs::{REDIS_PORT, redis, silent_redis_clients},
    wait_for,
    workload::{Stream, StreamOptions},
};

use super::{ALL_PODS, Figure, Key, Part, Quantity, Run, Setting, Way, figure::Target};

pub static KEY: Key = Key {
    name: "pause",
    title: "how long an application stands still while its connections move",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 6,
    parts,
    live: None,
};

static MEDIAN: Quantity = Quantity::less("pause, median", "ms");
static P99: Quantity = Quantity::less("pause, 99th percentile", "ms");
static TALK: Quantity =
    Quantity::less("pause of request and response, median", "ms").target(Target::Value(0.3));
static TALK_P99: Quantity =
    Quantity::less("pause of request and response, 99th percentile", "ms").target(Target::Value(1.0));
static SATURATED: Quantity =
    Quantity::less("pause when saturated both ways, median", "ms").target(Target::Value(3.0));
static THREADS: Quantity =
    Quantity::less("pause of a process with so many threads, median", "ms").target(Target::Value(20.0));
static BATCH: Quantity =
    Quantity::less("pause of one process while so many connections of it move in one freeze, median", "ms");
static BATCH_OF_100: Quantity =
    Quantity::less("pause of 100 connections moved in one freeze, median", "ms").target(Target::Value(3.0));

/// A connection that is moved to and fro.
struct Kind {
    name: &'static str,
    /// For the program `stream`: of both ends, and more of the server.
    arguments: &'static str,
    server: &'static str,
    swaps: u32,
    median: &'static Quantity,
    p99: Option<&'static Quantity>,
}

const fn kind(name: &'static str, arguments: &'static str) -> Kind {
    Kind { name, arguments, server: "", swaps: 100, median: &MEDIAN, p99: Some(&P99) }
}

const fn threads(name: &'static str, arguments: &'static str) -> Kind {
    Kind { name, arguments, server: "", swaps: 20, median: &THREADS, p99: None }
}

const KINDS: [Kind; 8] = [
    kind("idle", "--idle --threads 1"),
    Kind { median: &TALK, p99: Some(&TALK_P99), ..kind("request and response", "--pings --threads 1") },
    Kind { server: "--pause-ms 1000", ..kind("saturated one way", "--io blocking") },
    Kind { median: &SATURATED, ..kind("saturated both ways", "--io blocking") },
    threads("1 thread", "--idle --idle-threads --threads 1"),
    threads("10 threads", "--idle --idle-threads --threads 10"),
    threads("100 threads", "--idle --idle-threads --threads 100"),
    threads("1,000 threads", "--idle --idle-threads --threads 1000"),
];

/// Connections that are there when routers start.
const BATCHES: [(&str, usize); 5] = [
    ("1 connection", 1),
    ("10 connections", 10),
    ("50 connections", 50),
    ("100 connections", 100),
    ("200 connections", 200),
];
/// Times that they are moved in a round; the first ones are moved in smaller batches.
const STARTS: u32 = 5;

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let batch = |(case, connections)| {
        Part::new(case, move |run| batches(run, case, connections)).by(&[Way::Router]).with_own_routers()
    };
    Ok(kinds(&KINDS).chain(BATCHES.into_iter().map(batch)).collect())
}

/// The first of them, which are shown with the throughput.
pub fn main_parts() -> impl Iterator<Item = Part> {
    kinds(&KINDS[..4])
}

fn kinds(kinds: &'static [Kind]) -> impl Iterator<Item = Part> {
    kinds.iter().zip(7100..).map(|(kind, port)| {
        Part::new(kind.name, move |run| {
            let pauses_ms = pauses_ms(run, port, kind)
                .with_context(|| format!("a connection of the kind {}", kind.name))?;
            let p50 = kind.median.of(kind.name, median(&pauses_ms).unwrap_or(0.0));
            let p99 = kind.p99.map(|p99| p99.of(kind.name, quantile(&pauses_ms, 0.99).unwrap_or(0.0)));
            Ok([Some(p50), p99].into_iter().flatten().collect())
        })
        .by(&[Way::Router])
    })
}

/// Of the swaps onto the host network, as the client's host saw them.
fn pauses_ms(run: &Run<'_>, port: u16, kind: &Kind) -> Result<Vec<f64>> {
    let host = &run.setting.lab.h1;
    let (client, server) = (&run.setting.client, &run.setting.server);
    let options = StreamOptions { server: kind.server.to_owned(), ..StreamOptions::both(kind.arguments) };
    let stream = Stream::start(client, server, port, &options)?;
    host.wait_until_on_host(port)?;
    let mut pauses_ms = Vec::new();
    for _ in 0..kind.swaps {
        host.move_to(port, "overlay")?;
        pauses_ms.extend(host.move_to(port, "host")?.pause_us.map(|us| us as f64 / 1000.0));
    }
    stream.finish()?;
    Ok(pauses_ms)
}

/// redis holds them open for redis-benchmark, which says nothing on them. How many move together is up to the forwarder:
/// the largest batch of each start counts, if it is half of them.
fn batches(run: &Run<'_>, case: &str, connections: usize) -> Result<Vec<Figure>> {
    let (setting, host) = (run.setting, &run.setting.lab.h1);
    let _redis = run.serve(&redis(run.address), REDIS_PORT)?;
    let _clients = silent_redis_clients(run.client, run.address, connections)?;
    let mut pauses_ms = Vec::new();
    for _ in 0..STARTS {
        setting.start_routers()?;
        wait_for("all of them to be swapped", DEADLINE, || {
            Ok((host.status()?.swapped as usize >= connections).then_some(()))
        })?;
        let flows = host.flows()?;
        let largest = flows.iter().filter(|flow| flow.on_host()).max_by_key(|flow| flow.together);
        if let Some((together, pause_us)) = largest.and_then(|flow| Some((flow.together?, flow.pause_us?))) {
            // One of half the size tells more than enough, in proportion: a part of each pause is the same for all.
            if 2 * together as usize >= connections {
                pauses_ms.push(pause_us as f64 / 1000.0 * connections as f64 / f64::from(together));
            }
        }
        setting.stop_routers()?;
    }
    let quantity = if connections == 100 { &BATCH_OF_100 } else { &BATCH };
    Ok(median(&pauses_ms).map(|pause_ms| quantity.of(case, pause_ms)).into_iter().collect())
}
