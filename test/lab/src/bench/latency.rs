// SPDX-License-Identifier: Apache-2.0
//! sockperf's ping-pong, three ways.

use std::time::Duration;

use anyhow::Result;
use lab::measure::{PingPong, SOCKPERF_PORT, median, paired_ratio, ping_pong};

use super::{Setting, Way};

pub struct Row {
    pub way: Way,
    /// One way, half a round trip. Medians over the rounds.
    pub figures: PingPong,
    /// Of the median latency, and the host network's in the same round; the median over the rounds.
    pub of_host: f64,
    pub swapped: usize,
}

pub fn measure(setting: &Setting, rounds: u32) -> Result<Vec<Row>> {
    let mut runs = Way::ALL.map(|way| (way, Vec::<PingPong>::new(), 0));
    for round in 1..=rounds {
        for (way, figures, swapped) in &mut runs {
            let (got, pauses) = setting.by(*way, |run| {
                // sockperf warms up before it measures; the swap happens then.
                ping_pong(run.client, run.server, run.address, Duration::from_secs(3), || {
                    run.watch_swaps(SOCKPERF_PORT, 1, Duration::from_secs(2))
                })
            })?;
            eprintln!("sockperf, round {round}, {}: {:.1} µs", way.name(), got.mean_us);
            figures.push(got);
            *swapped += pauses.len();
        }
    }
    let middle = |figures: &[PingPong], of: fn(&PingPong) -> f64| {
        median(&figures.iter().map(of).collect::<Vec<_>>()).unwrap_or(0.0)
    };
    let p50s = |figures: &[PingPong]| figures.iter().map(|one| one.p50_us).collect::<Vec<_>>();
    let host = p50s(&runs[Way::ALL.len() - 1].1);
    Ok(runs
        .map(|(way, all, swapped)| {
            let of_host = paired_ratio(&p50s(&all), &host);
            let figures = PingPong {
                mean_us: middle(&all, |one| one.mean_us),
                p50_us: middle(&all, |one| one.p50_us),
                p99_us: middle(&all, |one| one.p99_us),
            };
            Row { way, figures, of_host, swapped }
        })
        .into())
}
