// SPDX-License-Identifier: Apache-2.0
//! iperf3 and sockperf between two places, and the figures in what they print.

use std::{net::IpAddr, process::Command, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{DEADLINE, Place, Process};

/// A finished run of iperf3's client.
#[derive(Clone, Debug)]
pub struct Iperf3 {
    json: Value,
}

/// Both ends of an iperf3 run, while it runs.
pub struct RunningIperf3 {
    pub server: Process,
    pub client: Process,
}

pub const IPERF3_PORT: u16 = 5201;

impl RunningIperf3 {
    /// Starts a server for one test, and a client once that listens. For [`RunningIperf3::finish`], the arguments
    /// must ask for JSON.
    pub fn start(
        client: &Place,
        server: &Place,
        address: IpAddr,
        arguments: &[&str],
    ) -> Result<RunningIperf3> {
        let mut command = Command::new("iperf3");
        let server = server.serve("iperf3-server", command.args(["-s", "-1"]), IPERF3_PORT)?;
        let mut command = Command::new("iperf3");
        command.args(["-c", &address.to_string(), "-i", "1"]).args(arguments);
        let client = client.spawn("iperf3-client", &mut command)?;
        Ok(RunningIperf3 { server, client })
    }

    /// What the client printed for people.
    pub fn finish_text(self) -> Result<String> {
        let finished = self.client.wait(DEADLINE * 4)?.expect_success()?;
        self.server.wait(DEADLINE)?.expect_success()?;
        Ok(finished.stdout)
    }

    pub fn finish(self) -> Result<Iperf3> {
        let finished = self.client.wait(DEADLINE * 4)?;
        let json: Value = serde_json::from_str(&finished.stdout)
            .with_context(|| format!("iperf3 printed {}{}", finished.stdout, finished.stderr))?;
        if let Some(error) = json["error"].as_str() {
            bail!("iperf3: {error}");
        }
        finished.expect_success()?;
        self.server.wait(DEADLINE)?.expect_success()?;
        Ok(Iperf3 { json })
    }
}

impl Iperf3 {
    pub fn json(&self) -> &Value {
        &self.json
    }

    /// Bits received per second over the whole run (without what `-O` omits), both directions added up.
    pub fn gbps(&self) -> f64 {
        let end = &self.json["end"];
        let of = |sum: &str| end[sum]["bits_per_second"].as_f64().unwrap_or(0.0) / 1e9;
        of("sum_received") + of("sum_received_bidir_reverse")
    }

    /// CPU time of both programs, in percent of one CPU.
    pub fn cpu_percent(&self) -> f64 {
        let cpu = &self.json["end"]["cpu_utilization_percent"];
        cpu["host_total"].as_f64().unwrap_or(0.0) + cpu["remote_total"].as_f64().unwrap_or(0.0)
    }
}

/// What iperf3 says at the end of a run with `--json`.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Summary {
    /// Received, both directions added up.
    pub gbps: f64,
    /// CPU time of each program, in percent of one CPU.
    pub client_cpu_percent: f64,
    pub server_cpu_percent: f64,
}

pub fn iperf3_summary(text: &str) -> Result<Summary> {
    let json: Value = serde_json::from_str(text.trim()).with_context(|| format!("iperf3 printed {text}"))?;
    if let Some(error) = json["error"].as_str() {
        bail!("iperf3: {error}");
    }
    let cpu = &json["end"]["cpu_utilization_percent"];
    let load = |end: &str| cpu[end].as_f64().with_context(|| format!("iperf3 printed no {end}: {text}"));
    let (client_cpu_percent, server_cpu_percent) = (load("host_total")?, load("remote_total")?);
    Ok(Summary { gbps: Iperf3 { json }.gbps(), client_cpu_percent, server_cpu_percent })
}

/// The rate in a line of iperf3.
fn gbps(line: &str) -> Option<f64> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let rate = |unit: &str| -> Option<f64> {
        let at = words.iter().position(|word| *word == unit)?;
        words.get(at.checked_sub(1)?)?.parse().ok()
    };
    rate("Gbits/sec").or_else(|| Some(rate("Mbits/sec")? / 1000.0))
}

/// The rate of each second, in the text that iperf3 prints for one stream.
pub fn gbps_each_second(text: &str) -> Vec<f64> {
    // What follows the line of dashes is the summary.
    let seconds = text.lines().take_while(|line| !line.starts_with("- - -"));
    seconds.filter_map(gbps).collect()
}

/// What sockperf says about a ping-pong, one way.
#[derive(Clone, Copy, Debug)]
pub struct PingPong {
    pub mean_us: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
}

pub const SOCKPERF_PORT: u16 = 11111;

/// Both ends of a TCP ping-pong of sockperf, while it runs.
pub struct RunningPingPong {
    pub client: Process,
    pub server: Process,
}

impl RunningPingPong {
    pub fn start(
        client: &Place,
        server: &Place,
        address: IpAddr,
        bytes: u32,
        time: Duration,
    ) -> Result<RunningPingPong> {
        let (address, port, bytes) = (address.to_string(), SOCKPERF_PORT.to_string(), bytes.to_string());
        let mut command = Command::new("sockperf");
        // Without the size a server ends connections whose messages are longer than it expects.
        command.args(["server", "--tcp", "-i", &address, "-p", &port, "-m", "65507"]);
        let server = server.serve("sockperf-server", &mut command, SOCKPERF_PORT)?;
        let seconds = time.as_secs().to_string();
        let mut command = Command::new("sockperf");
        command.args(["ping-pong", "--tcp", "-i", &address, "-p", &port, "-m", &bytes, "-t", &seconds]);
        Ok(RunningPingPong { client: client.spawn("sockperf-client", &mut command)?, server })
    }
}

/// A ping-pong of 64 bytes. `meanwhile` runs while it does.
pub fn ping_pong<T>(
    client: &Place,
    server: &Place,
    address: IpAddr,
    time: Duration,
    meanwhile: impl FnOnce() -> Result<T>,
) -> Result<(PingPong, T)> {
    let RunningPingPong { client, server: _server } =
        RunningPingPong::start(client, server, address, 64, time)?;
    let got = meanwhile();
    let finished = client.wait(time + DEADLINE)?.expect_success()?;
    Ok((parse_ping_pong(&finished.stdout)?, got?))
}

pub fn parse_ping_pong(output: &str) -> Result<PingPong> {
    // sockperf colours its lines; the figures stand after known words.
    let after = |words: &str| {
        let rest = output.split(words).nth(1)?;
        let number: String = rest
            .trim_start_matches([' ', '='])
            .chars()
            .take_while(|c| c.is_ascii_digit() || *c == '.')
            .collect();
        number.parse::<f64>().ok()
    };
    let figure = |words: &str| {
        after(words).with_context(|| format!("no \"{words}\" in what sockperf printed:\n{output}"))
    };
    Ok(PingPong {
        mean_us: figure("Latency is ")?,
        p50_us: figure("percentile 50.000")?,
        p99_us: figure("percentile 99.000")?,
        p999_us: figure("percentile 99.900")?,
    })
}

/// The middle one.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// The smallest value that this part of the values do not exceed.
pub fn quantile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// Where the median lies of what these values are a sample of, with 95 % confidence, however it is distributed: between two
/// of them. Of less than six values it is between the lowest and the highest with less.
pub fn interval_of_median(values: &[f64]) -> Option<(f64, f64)> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    // As many of them are below that median as heads come up in so many throws of a coin.
    let throws = sorted.len();
    let (mut heads, mut chance) = (0, 0.5_f64.powi(throws as i32));
    let mut chance_of_fewer = 0.0;
    while heads < throws && 2.0 * (chance_of_fewer + chance) <= 0.05 {
        chance_of_fewer += chance;
        chance *= (throws - heads) as f64 / (heads + 1) as f64;
        heads += 1;
    }
    let outside = heads.saturating_sub(1);
    Some((*sorted.get(outside)?, *sorted.get(throws - 1 - outside)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_of_values_is_between_the_middle_ones() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[2.0, 9.0, 1.0]), Some(2.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn the_interval_of_a_median_leaves_out_as_many_values_as_chance_explains() {
        let first = |count: u32| (1..=count).map(f64::from).collect::<Vec<f64>>();
        // The tables of the sign test.
        let expected = [(3, 1.0, 3.0), (6, 1.0, 6.0), (9, 2.0, 8.0), (12, 3.0, 10.0), (28, 9.0, 20.0)];
        for (count, low, high) in expected {
            assert_eq!(interval_of_median(&first(count)), Some((low, high)), "of {count}");
        }
        assert_eq!(interval_of_median(&[]), None);
    }

    #[test]
    fn rates_are_found_in_what_iperf3_prints() {
        let output = "[ ID] Interval           Transfer     Bitrate         Retr  Cwnd\n\
                      [  5]   0.00-1.00   sec  1.70 GBytes  14.6 Gbits/sec    0   3.05 MBytes\n\
                      [  5]   1.00-2.00   sec  2.61 GBytes  22.4 Gbits/sec    1   3.05 MBytes\n\
                      - - - - - - - - - - - - - - - - - - - - - - - - -\n\
                      [  5]   0.00-2.00   sec  4.31 GBytes  18.5 Gbits/sec    1             sender\n";
        assert_eq!(gbps_each_second(output), [14.6, 22.4]);
    }

    #[test]
    fn the_summary_is_found_in_what_iperf3_prints() {
        let output = r#"{"end": {"sum_received": {"bits_per_second": 17.3e9},
            "sum_received_bidir_reverse": {"bits_per_second": 10e9},
            "cpu_utilization_percent": {"host_total": 60.4, "remote_total": 50.1}}}"#;
        let expected = Summary { gbps: 27.3, client_cpu_percent: 60.4, server_cpu_percent: 50.1 };
        assert_eq!(iperf3_summary(output).unwrap(), expected);
        assert!(iperf3_summary(r#"{"error": "unable to connect"}"#).is_err());
    }

    #[test]
    fn figures_are_found_in_what_sockperf_prints() {
        let output = "sockperf: \x1b[2;35m====> avg-latency=31.700 (std-dev=1.0)\x1b[0m\n\
                      sockperf: [Summary: Latency is 31.704 usec]\n\
                      sockperf: ---> percentile 99.900 =   90.5\n\
                      sockperf: ---> percentile 99.000 =   44.1\nsockperf: ---> percentile 50.000 =   30.2\n";
        let got = parse_ping_pong(output).unwrap();
        assert_eq!((got.mean_us, got.p50_us, got.p99_us, got.p999_us), (31.704, 30.2, 44.1, 90.5));
    }
}
