// SPDX-License-Identifier: Apache-2.0
//! OpenMPI: NetPIPE from one rank to another, and all-to-all exchanges (test/programs/alltoall.c).

use anyhow::{Context, Result, ensure};
use lab::programs::{compile, mpirun};
use serde::Deserialize;

use super::{ALL_PODS, Figure, Key, Part, Quantity, Run, Setting};

pub static LATENCY: Key = Key {
    name: "mpilat",
    title: "how long a message of MPI takes, one way (OpenMPI, NetPIPE)",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 3,
    parts: latency,
    live: None,
};

pub static BANDWIDTH: Key = Key {
    name: "mpibw",
    title: "how much goes through between two ranks of MPI (OpenMPI, NetPIPE)",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 3,
    parts: bandwidth,
    live: None,
};

pub static ALL_TO_ALL: Key = Key {
    name: "mpiall",
    title: "an exchange of all with all, 2 ranks on each host (OpenMPI)",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 3,
    parts: all_to_all,
    live: None,
};

static ONE_WAY: Quantity = Quantity::less("one way", "µs");
static THROUGHPUT: Quantity = Quantity::more("throughput", "Gbit/s");
static SMALL_EXCHANGE: Quantity = Quantity::less("MPI_Alltoall, 64 B for each rank", "µs");
static LARGE_EXCHANGE: Quantity = Quantity::less("MPI_Alltoall, 64 KiB for each rank", "µs");

fn latency(_: &Setting) -> Result<Vec<Part>> {
    let part = Part::new("NetPIPE", |run| {
        // It begins with sizes that are not shown; the swap happens then.
        let lines = netpipe(run, "-l 8 -u 1024 -n 1000")?;
        figures(&lines, &[("64 B", 64), ("1 KiB", 1 << 10)], |case, line| ONE_WAY.of(case, line.us))
    });
    Ok(vec![part])
}

fn bandwidth(_: &Setting) -> Result<Vec<Part>> {
    let part = Part::new("NetPIPE", |run| {
        let lines = netpipe(run, "-l 32768 -u 4194304 -n 60")?;
        let sizes = [("128 KiB", 128 << 10), ("1 MiB", 1 << 20), ("4 MiB", 4 << 20)];
        figures(&lines, &sizes, |case, line| THROUGHPUT.of(case, line.bytes as f64 * 8.0 / line.us / 1000.0))
    });
    Ok(vec![part])
}

fn figures(
    lines: &[Line],
    sizes: &[(&str, u64)],
    figure: impl Fn(&str, &Line) -> Figure,
) -> Result<Vec<Figure>> {
    let of_size = |(case, bytes): &(&str, u64)| {
        let line = lines.iter().find(|line| line.bytes == *bytes);
        Ok(figure(case, line.with_context(|| format!("NetPIPE sent nothing of {bytes} bytes"))?))
    };
    sizes.iter().map(of_size).collect()
}

fn mpi(run: &Run<'_>, ranks: u32) -> Result<String> {
    mpirun((run.client, run.from), (run.server, run.address), ranks)
}

/// A size, and the time that a message of it takes one way: the best of seven trials, as NetPIPE says it.
struct Line {
    bytes: u64,
    us: f64,
}

fn netpipe(run: &Run<'_>, sizes: &str) -> Result<Vec<Line>> {
    let results = run.client.directory.join("netpipe");
    let output = run.client(&format!("{} NPopenmpi -p 0 {sizes} -o {}", mpi(run, 1)?, results.display()))?;
    let lines: Vec<Line> = output.lines().filter_map(parse).collect();
    ensure!(!lines.is_empty(), "NetPIPE printed:\n{output}");
    Ok(lines)
}

fn parse(line: &str) -> Option<Line> {
    let (head, result) = line.split_once(" times -->")?;
    let bytes = head.split_once(':')?.1.split_whitespace().next()?.parse().ok()?;
    let us = result.split_once(" in ")?.1.split_whitespace().next()?.parse().ok()?;
    Some(Line { bytes, us })
}

#[derive(Deserialize)]
struct Exchanges {
    small_us: f64,
    large_us: f64,
}

fn all_to_all(setting: &Setting) -> Result<Vec<Part>> {
    let program = compile(&setting.lab, "mpicc", "alltoall")?;
    let part = Part::new("MPI_Alltoall", move |run| {
        let output = run.client(&format!("{} {} {}", mpi(run, 2)?, program.display(), run.seconds))?;
        let line = output.lines().find(|line| line.starts_with('{'));
        let line = line.with_context(|| format!("alltoall printed:\n{output}"))?;
        let Exchanges { small_us, large_us } = serde_json::from_str(line)?;
        Ok(vec![SMALL_EXCHANGE.of("median", small_us), LARGE_EXCHANGE.of("median", large_us)])
    });
    Ok(vec![part])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_netpipe_prints() {
        let line = parse(" 12:      64 bytes   1000 times -->     16.95 Mbps in      28.81 usec").unwrap();
        assert_eq!((line.bytes, line.us), (64, 28.81));
        assert!(parse("Now starting the main loop").is_none());
    }
}
