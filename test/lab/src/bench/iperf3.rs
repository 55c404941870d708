// SPDX-License-Identifier: Apache-2.0
//! Throughput: iperf3.

use std::time::Duration;

use anyhow::Result;
use lab::measure::{IPERF3_PORT, RunningIperf3, Summary, iperf3_summary};

use super::{Figure, Key, Part, Quantity, Rules, Run, Setting, figure::Target, live, pause};

pub static KEY: Key = Key {
    name: "iperf3",
    title: "how much goes through, and what it costs",
    rules: Rules::File("rules/iperf3.yaml"),
    rounds: 3,
    most_rounds: 9,
    parts,
    live: Some(live::measure),
};

static THROUGHPUT: Quantity = Quantity::more("throughput", "Gbit/s").target(Target::OfHost(0.98));
static WITHIN_A_HOST: Quantity =
    Quantity::more("throughput within a host", "Gbit/s").target(Target::OfOverlay(1.4));
static CLIENT_CPU: Quantity = Quantity::less("CPU time of the client", "s per GB");
static SERVER_CPU: Quantity = Quantity::less("CPU time of the server", "s per GB");

/// Seconds at the start of a run that do not count. The swap happens in them.
const OMITTED: u32 = 2;

/// What it is called, iperf3's arguments, and the data connections it makes.
const KINDS: [(&str, &[&str], usize); 5] = [
    ("1 stream", &[], 1),
    ("1 stream, reverse", &["-R"], 1),
    ("both directions", &["--bidir"], 2),
    ("8 streams", &["-P", "8"], 8),
    ("8 streams, reverse", &["-P", "8", "-R"], 8),
];

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let between =
        KINDS.into_iter().map(|(kind, arguments, streams)| part(kind, &THROUGHPUT, arguments, streams));
    let within = part("1 stream, both on one host", &WITHIN_A_HOST, &[], 1).on_one_host();
    Ok(between.chain([within]).chain(pause::main_parts()).collect())
}

fn part(
    kind: &'static str,
    throughput: &'static Quantity,
    arguments: &'static [&str],
    streams: usize,
) -> Part {
    Part::new(kind, move |run| {
        let Summary { gbps, client_cpu_percent, server_cpu_percent } = once(run, arguments, streams)?;
        let cpu_s_per_gb = |percent: f64| percent / 100.0 / (gbps / 8.0);
        Ok(vec![
            throughput.of(kind, gbps),
            CLIENT_CPU.of(kind, cpu_s_per_gb(client_cpu_percent)),
            SERVER_CPU.of(kind, cpu_s_per_gb(server_cpu_percent)),
        ])
    })
}

pub fn once(run: &Run<'_>, arguments: &[&str], streams: usize) -> Result<Summary> {
    let (time, omitted) = (run.seconds.to_string(), OMITTED.to_string());
    let mut all = vec!["--json", "-t", &time, "-O", &omitted];
    all.extend(arguments);
    let RunningIperf3 { client, server } = RunningIperf3::start(run.client, run.server, run.address, &all)?;
    // One more than the streams: iperf3's control connection.
    run.watch_swaps(IPERF3_PORT, streams + 1, Duration::from_secs(u64::from(OMITTED)))?;
    let summary = iperf3_summary(&run.finish(client)?)?;
    server.wait(lab::DEADLINE)?.expect_success()?;
    Ok(summary)
}

/// One stream that no rule is about.
pub fn unmatched(quantity: &'static Quantity) -> Part {
    let case = "iperf3, 1 stream";
    Part::new(case, move |run| -> Result<Vec<Figure>> {
        let time = run.seconds.to_string();
        let RunningIperf3 { client, server: _server } =
            RunningIperf3::start(run.client, run.server, run.address, &["--json", "-t", &time])?;
        Ok(vec![quantity.of(case, iperf3_summary(&run.finish(client)?)?.gbps)])
    })
}
