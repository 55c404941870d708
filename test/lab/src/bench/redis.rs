// SPDX-License-Identifier: Apache-2.0
//! redis and redis-benchmark, 50 connections.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    RULE_FOR_ALL_PODS, RouterOptions,
    programs::{REDIS_PORT, command, redis, silent_redis_clients},
};

use super::{
    ALL_PODS, Figure, Key, Part, Quantity, Run, Setting, Way, figure::Target, setting::RULE_FOR_NOBODY,
};

pub static KEY: Key = Key {
    name: "redis",
    title: "requests of 50 connections, one at a time and pipelined",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 9,
    parts,
    live: None,
};

static SINGLE: Quantity = Quantity::more("requests, one at a time", "1/s");
static SINGLE_P99: Quantity = Quantity::less("99th percentile, one at a time", "ms");
static BUSY_P99: Quantity =
    Quantity::less("99th percentile of 50 clients while 500 other connections of theirs are swapped", "ms")
        .target(Target::OfOverlay(1.5));
static PIPELINED: Quantity = Quantity::more("requests, pipelined by 16", "1/s");

/// redis-benchmark is told how many requests to make, not how long: about as many as a small machine answers in a second.
const SINGLE_PER_S: u32 = 40_000;
const PIPELINED_PER_S: u32 = 400_000;

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let single = Part::new("one at a time", |run| {
        let _redis = run.serve(&redis(run.address), REDIS_PORT)?;
        let requests = run.seconds * SINGLE_PER_S;
        let words = format!("redis-benchmark -h {} -t set,get -c 50 -n {requests} --csv", run.address);
        let lines = parse(&run.client(&words)?)?;
        let figures = lines.into_iter().flat_map(|(test, requests_per_s, p99_ms)| {
            [SINGLE.of(&test, requests_per_s), SINGLE_P99.of(test, p99_ms)]
        });
        Ok(figures.collect())
    });
    let pipelined = Part::new("pipelined", |run| {
        let _redis = run.serve(&redis(run.address), REDIS_PORT)?;
        let requests = run.seconds * PIPELINED_PER_S;
        let words = format!("redis-benchmark -h {} -t set,get -c 50 -P 16 -n {requests} --csv", run.address);
        let lines = parse(&run.client(&words)?)?;
        Ok(lines.into_iter().map(|(test, requests_per_s, _)| PIPELINED.of(test, requests_per_s)).collect())
    });
    let others = Part::new("while others are swapped", while_others_are_swapped)
        .by(&[Way::Overlay, Way::Router])
        .with_own_routers();
    Ok(vec![single, pipelined, others])
}

/// Connections that say nothing, and are there before the routers.
const OTHERS: usize = 500;
/// The rule for all pods comes into force when the busy clients have been at it for so long.
const BEFORE: Duration = Duration::from_secs(1);

fn while_others_are_swapped(run: &Run<'_>) -> Result<Vec<Figure>> {
    let _redis = run.serve(&redis(run.address), REDIS_PORT)?;
    let _others = silent_redis_clients(run.client, run.address, OTHERS)?;
    let lab = &run.setting.lab;
    let set_rule = |rule: &str| lab.hosts().into_iter().try_for_each(|host| host.replace_rule("pods", rule));
    if run.way == Way::Router {
        set_rule(RULE_FOR_NOBODY)?;
        lab.start_routers(&RouterOptions::default())?;
    }
    let requests = 2 * run.seconds * SINGLE_PER_S;
    let words = format!("redis-benchmark -h {} -t get -c 50 -n {requests} --csv", run.address);
    let busy = run.client.spawn("busy", &mut command(&words))?;
    if run.way == Way::Router {
        std::thread::sleep(BEFORE);
        set_rule(RULE_FOR_ALL_PODS)?;
    }
    let lines = parse(&run.finish(busy)?)?;
    if run.way == Way::Router {
        let swaps = lab.h1.status()?.swaps;
        ensure!(
            swaps as usize > OTHERS,
            "{swaps} swaps while redis-benchmark ran, more than {OTHERS} expected"
        );
        run.setting.stop_routers()?;
    }
    Ok(lines.into_iter().map(|(test, _, p99_ms)| BUSY_P99.of(test, p99_ms)).collect())
}

/// Of each test: its name, requests per second, and the 99th percentile in ms.
fn parse(output: &str) -> Result<Vec<(String, f64, f64)>> {
    let line = |line: &str| {
        let fields: Vec<&str> = line.split(',').map(|field| field.trim_matches('"')).collect();
        let figure = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
        Some((fields.first()?.to_string(), figure(1)?, figure(6)?))
    };
    // The first line names the columns.
    let found: Option<Vec<_>> =
        output.lines().filter(|line| line.starts_with('"')).skip(1).map(line).collect();
    found.filter(|found| !found.is_empty()).with_context(|| format!("redis-benchmark printed:\n{output}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_what_redis_benchmark_prints() {
        let output = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\",\"p50_latency_ms\",\"p95_latency_ms\",\
                      \"p99_latency_ms\",\"max_latency_ms\"\n\
                      \"SET\",\"59523.81\",\"0.619\",\"0.048\",\"0.287\",\"0.759\",\"4.239\",\"75.711\"\n\
                      \"GET\",\"79617.83\",\"0.426\",\"0.040\",\"0.279\",\"0.679\",\"3.359\",\"32.575\"\n";
        let expected = [("SET".to_owned(), 59523.81, 4.239), ("GET".to_owned(), 79617.83, 3.359)];
        assert_eq!(parse(output).unwrap(), expected);
        assert!(parse("Could not connect").is_err());
    }
}
