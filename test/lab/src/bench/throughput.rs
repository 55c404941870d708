// SPDX-License-Identifier: Apache-2.0
//! iperf3, four kinds, three ways.

use std::time::Duration;

use anyhow::Result;
use lab::measure::{IPERF3_PORT, RunningIperf3, median, paired_ratio};

use super::{Setting, Way};

/// Seconds at the start of a run that do not count. The swap happens in them.
const OMITTED: u32 = 2;

/// A kind of run: what it is called, iperf3's arguments, and the data connections it makes.
const KINDS: [(&str, &[&str], usize); 4] = [
    ("1 stream", &[], 1),
    ("reverse (-R)", &["-R"], 1),
    ("both directions (--bidir)", &["--bidir"], 2),
    ("8 streams (-P 8)", &["-P", "8"], 8),
];

/// Medians over the rounds.
pub struct Row {
    pub kind: &'static str,
    pub way: Way,
    pub gbps: f64,
    /// Median of the ratios to the host network's rate in the same round: both had the machine as it was then.
    pub of_host: f64,
    /// Both programs together, percent of one CPU.
    pub cpu_percent: f64,
    /// Data and control connections that were swapped, in all rounds, and those there were.
    pub swapped: usize,
    pub connections: usize,
    pub pauses_us: Vec<f64>,
}

pub fn measure(setting: &Setting, rounds: u32, seconds: u32) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (kind, arguments, streams) in KINDS {
        let mut runs = Way::ALL.map(|way| (way, Vec::new(), Vec::new(), Vec::new()));
        for round in 1..=rounds {
            for (way, gbps, cpu, pauses) in &mut runs {
                let (rate, load, mut swaps) = once(setting, *way, arguments, streams, seconds)?;
                eprintln!("iperf3 {kind}, round {round}, {}: {rate:.1} Gbit/s", way.name());
                gbps.push(rate);
                cpu.push(load);
                pauses.append(&mut swaps);
            }
        }
        let host = runs[Way::ALL.len() - 1].1.clone();
        for (way, gbps, cpu, pauses_us) in runs {
            let of_host = paired_ratio(&gbps, &host);
            let (gbps, cpu_percent) = (median(&gbps).unwrap_or(0.0), median(&cpu).unwrap_or(0.0));
            // One more than the streams: iperf3's control connection.
            let connections = if way == Way::Router { rounds as usize * (streams + 1) } else { 0 };
            rows.push(Row {
                kind,
                way,
                gbps,
                of_host,
                cpu_percent,
                swapped: pauses_us.len(),
                connections,
                pauses_us,
            });
        }
    }
    Ok(rows)
}

/// Rate, CPU load and the pauses of what was swapped.
fn once(
    setting: &Setting,
    way: Way,
    arguments: &[&str],
    streams: usize,
    seconds: u32,
) -> Result<(f64, f64, Vec<f64>)> {
    setting.by(way, |run| {
        let (time, omitted) = (seconds.to_string(), OMITTED.to_string());
        let mut all = vec!["--json", "-t", &time, "-O", &omitted];
        all.extend(arguments);
        let running = RunningIperf3::start(run.client, run.server, run.address, &all)?;
        let pauses = run.watch_swaps(IPERF3_PORT, streams + 1, Duration::from_secs(u64::from(OMITTED)))?;
        let finished = running.finish()?;
        Ok((finished.gbps(), finished.cpu_percent(), pauses))
    })
}
