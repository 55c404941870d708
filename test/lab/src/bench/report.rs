// SPDX-License-Identifier: Apache-2.0
//! What was measured, as a table and as JSON.

use std::fmt::Write;

use lab::measure::{PingPong, median};
use serde_json::{Value, json};

use super::{Way, latency, live::Live, pauses, throughput};

pub struct Report {
    pub throughput: Vec<throughput::Row>,
    pub latency: Vec<latency::Row>,
    pub pauses: Vec<pauses::Row>,
    pub live: Live,
}

impl Report {
    /// Connections that were seen on the host network with a router.
    pub fn swaps(&self) -> usize {
        self.throughput.iter().map(|row| row.swapped).sum::<usize>()
            + self.latency.iter().map(|row| row.swapped).sum::<usize>()
            + self.pauses.iter().map(|row| row.pauses_us.len()).sum::<usize>()
            + usize::from(self.live.swapped_at_s.is_some())
    }

    /// Kinds of iperf3 runs, in order.
    pub fn kinds(&self) -> Vec<&'static str> {
        let mut kinds: Vec<_> = self.throughput.iter().map(|row| row.kind).collect();
        kinds.dedup();
        kinds
    }

    pub fn gbps(&self, kind: &str, way: Way) -> f64 {
        self.throughput.iter().find(|row| row.kind == kind && row.way == way).map_or(0.0, |row| row.gbps)
    }

    /// Pauses of all iperf3 connections.
    fn iperf3_pauses_us(&self) -> Vec<f64> {
        self.throughput.iter().flat_map(|row| row.pauses_us.iter().copied()).collect()
    }

    pub fn table(&self) -> String {
        self.try_table().unwrap_or_default()
    }

    fn try_table(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        writeln!(
            out,
            "{:<27} {:<8} {:>7} {:>6} {:>8} {:>8} {:>10}",
            "iperf3", "way", "Gbit/s", "CPU %", "of host", "swapped", "pause p50"
        )?;
        for row in &self.throughput {
            let ratio = row.of_host;
            let (swapped, pause) = match row.way {
                Way::Router => {
                    (format!("{}/{}", row.swapped, row.connections), text_us(median(&row.pauses_us)))
                }
                Way::Overlay | Way::Host => (String::new(), String::new()),
            };
            let kind = if row.way == Way::Overlay { row.kind } else { "" };
            writeln!(
                out,
                "{kind:<27} {:<8} {:>7.1} {:>6.0} {ratio:>8.2} {swapped:>8} {pause:>10}",
                row.way.name(),
                row.gbps,
                row.cpu_percent
            )?;
        }
        writeln!(
            out,
            "\n{:<27} {:<8} {:>7} {:>7} {:>7} {:>8}",
            "sockperf ping-pong 64 B", "way", "mean µs", "p50 µs", "p99 µs", "of host"
        )?;
        for row in &self.latency {
            let ratio = row.of_host;
            let PingPong { mean_us, p50_us, p99_us } = row.figures;
            writeln!(
                out,
                "{:<27} {:<8} {mean_us:>7.1} {p50_us:>7.1} {p99_us:>7.1} {ratio:>8.2}",
                "(one way)",
                row.way.name()
            )?;
        }
        writeln!(out, "\n{:<27} {:>8} {:>10} {:>10}", "pause of a swap", "swaps", "p50", "max")?;
        for row in &self.pauses {
            let max = row.pauses_us.iter().copied().max_by(f64::total_cmp);
            writeln!(
                out,
                "{:<27} {:>8} {:>10} {:>10}",
                row.kind,
                row.pauses_us.len(),
                text_us(median(&row.pauses_us)),
                text_us(max)
            )?;
        }
        writeln!(out, "\niperf3 first, the routers 3 s later; iperf3's own rates:")?;
        for (second, gbps) in self.live.gbps.iter().enumerate() {
            let swapped = self.live.swapped_at_s.is_some_and(|at| at as usize == second);
            let mark = if swapped {
                format!("  <- swapped, pause {}", text_us(self.live.pause_us))
            } else {
                String::new()
            };
            writeln!(out, "  {second:>2}-{:<2} s {gbps:>6.1} Gbit/s{mark}", second + 1)?;
        }
        Ok(out)
    }

    /// What the file `iperf3.json` has.
    pub fn json(&self, rounds: u32, seconds: u32) -> Value {
        let first = self.kinds().first().copied().unwrap_or_default();
        let kernel = nix::sys::utsname::uname().map(|names| names.release().to_string_lossy().into_owned());
        json!({
            "overlay_gbps": round(self.gbps(first, Way::Overlay)),
            "router_gbps": round(self.gbps(first, Way::Router)),
            "host_gbps": round(self.gbps(first, Way::Host)),
            "swaps": self.swaps(),
            "pause_us_p50": median(&self.iperf3_pauses_us()),
            "throughput": self.throughput.iter().map(|row| json!({
                "kind": row.kind,
                "way": row.way.name(),
                "gbps": round(row.gbps),
                "of_host": round(row.of_host),
                "cpu_percent": round(row.cpu_percent),
                "connections": row.connections,
                "swapped": row.swapped,
                "pause_us_p50": median(&row.pauses_us),
            })).collect::<Vec<_>>(),
            "latency": self.latency.iter().map(|row| json!({
                "way": row.way.name(),
                "mean_us": row.figures.mean_us,
                "p50_us": row.figures.p50_us,
                "p99_us": row.figures.p99_us,
                "of_host": round(row.of_host),
                "swapped": row.swapped,
            })).collect::<Vec<_>>(),
            "pauses": self.pauses.iter().map(|row| json!({
                "kind": row.kind,
                "pause_us_p50": median(&row.pauses_us),
                "pause_us": row.pauses_us,
            })).collect::<Vec<_>>(),
            "live": {
                "gbps_each_second": self.live.gbps,
                "swapped_at_s": self.live.swapped_at_s.map(round),
                "pause_us": self.live.pause_us,
            },
            "rounds": rounds,
            "seconds": seconds,
            "kernel": kernel.unwrap_or_default(),
            "cpus": std::thread::available_parallelism().map_or(0, usize::from),
        })
    }
}

fn round(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}

fn text_us(us: Option<f64>) -> String {
    us.map_or("-".into(), |us| format!("{:.2} ms", us / 1000.0))
}
