// SPDX-License-Identifier: Apache-2.0
//! PostgreSQL and pgbench, 8 connections.

use std::path::Path;

use anyhow::{Context, Result};
use lab::{
    DEADLINE,
    programs::{POSTGRES_PORT, command, postgres, postgres_data, postgres_program},
};

use super::{ALL_PODS, Key, Part, Quantity, Run, Setting};

pub static KEY: Key = Key {
    name: "postgres",
    title: "transactions of 8 connections (pgbench)",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 3,
    parts,
    live: None,
};

static SELECTS: Quantity = Quantity::more("transactions, select only", "1/s");
static SELECTS_LATENCY: Quantity = Quantity::less("mean latency, select only", "ms");
static BOOKS: Quantity = Quantity::more("transactions, TPC-B", "1/s");
static BOOKS_LATENCY: Quantity = Quantity::less("mean latency, TPC-B", "ms");

fn parts(setting: &Setting) -> Result<Vec<Part>> {
    let data = postgres_data(&setting.lab)?;
    fill(setting, &data)?;
    let part = |name, arguments: &'static str, rate: &'static Quantity, latency: &'static Quantity| {
        let data = data.clone();
        Part::new(name, move |run| {
            let got = once(run, &data, arguments)?;
            Ok(vec![rate.of("pgbench", got.transactions_per_s), latency.of("pgbench", got.latency_ms)])
        })
    };
    Ok(vec![part("select only", "-S", &SELECTS, &SELECTS_LATENCY), part("TPC-B", "", &BOOKS, &BOOKS_LATENCY)])
}

/// pgbench's tables.
fn fill(setting: &Setting, data: &Path) -> Result<()> {
    let (place, address) = (setting.lab.h1.place(), setting.lab.h1.address.into());
    let mut server = place.serve("postgres", &mut command(&postgres(data, address)?), POSTGRES_PORT)?;
    server.wait_until_it_says("ready to accept", DEADLINE)?;
    let pgbench = postgres_program("pgbench")?;
    place.run(&mut command(&format!("{pgbench} -h {address} -U postgres -i -s 8 -q postgres")))?;
    // SIGINT is its fast shutdown.
    server.signal(nix::sys::signal::Signal::SIGINT)?;
    server.wait(DEADLINE)?.expect_success().map(drop)
}

struct Pgbench {
    transactions_per_s: f64,
    latency_ms: f64,
}

fn once(run: &Run<'_>, data: &Path, arguments: &str) -> Result<Pgbench> {
    let mut server = run.serve(&postgres(data, run.address)?, POSTGRES_PORT)?;
    server.wait_until_it_says("ready to accept", DEADLINE)?;
    let (pgbench, address, seconds) = (postgres_program("pgbench")?, run.address, run.seconds);
    let words = format!(
        "{pgbench} -h {address} -U postgres {arguments} -n -M prepared -c 8 -j 2 -T {seconds} postgres"
    );
    let got = parse(&run.client(&words)?)?;
    server.signal(nix::sys::signal::Signal::SIGINT)?;
    server.wait(DEADLINE)?.expect_success()?;
    Ok(got)
}

fn parse(output: &str) -> Result<Pgbench> {
    let after = |words: &str| {
        let text = output.split_once(words)?.1.split_whitespace().next()?;
        text.parse::<f64>().ok()
    };
    let figure = |words: &str| {
        after(words).with_context(|| format!("no \"{words}\" in what pgbench printed:\n{output}"))
    };
    Ok(Pgbench { transactions_per_s: figure("tps = ")?, latency_ms: figure("latency average = ")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_pgbench_prints() {
        let output = "number of failed transactions: 0 (0.000%)\nlatency average = 0.412 ms\n\
                      initial connection time = 21.5 ms\ntps = 19400.5 (without initial connection time)\n";
        let got = parse(output).unwrap();
        assert_eq!((got.transactions_per_s, got.latency_ms), (19400.5, 0.412));
        assert!(parse("pgbench: error: connection failed").is_err());
    }
}
