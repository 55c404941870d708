// SPDX-License-Identifier: Apache-2.0
//! Many live connections: redis holds them open for redis-benchmark, which says nothing on them (`-I`). Both wait in one
//! epoll set for all. They are there before the routers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    Host,
    programs::{REDIS_PORT, redis, redis_clients, silent_redis_clients},
};

use super::{ALL_PODS, Figure, Key, Part, Quantity, Run, Setting, Way, figure::Target};

pub static KEY: Key = Key {
    name: "scale",
    title: "many live connections: how fast they move, and what they cost while they are swapped",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 6,
    parts,
    live: None,
};

static SWAPS: Quantity = Quantity::more("swaps", "1/s").target(Target::Value(2000.0));
static SWAPPED: Quantity = Quantity::more("connections swapped within 30 s", "%");
static MEMORY: Quantity =
    Quantity::less("user memory for each swapped connection, router and forwarder", "KiB")
        .target(Target::Value(2.0));
static ROUTER_MEMORY: Quantity = Quantity::less("of that the router", "KiB");
static FORWARDER_MEMORY: Quantity = Quantity::less("of that the forwarder", "KiB");
static IDLE: Quantity = Quantity::less("CPU of router and forwarder while nothing happens", "%");
static BACK: Quantity =
    Quantity::less("all back on the overlay when the router is stopped", "s").target(Target::Value(10.0));

const SIZES: [(&str, usize); 6] = [
    ("100 connections", 100),
    ("500 connections", 500),
    ("1,000 connections", 1000),
    ("2,000 connections", 2000),
    ("4,000 connections", 4000),
    ("10,000 connections", 10_000),
];

/// What is not swapped by then does not count.
const LIMIT: Duration = Duration::from_secs(30);

/// Between two looks at how many are swapped.
const SHORTEST_LOOK: Duration = Duration::from_millis(5);
const LONGEST_LOOK: Duration = Duration::from_millis(100);

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let part = |(case, connections)| {
        Part::new(case, move |run| measure(run, case, connections)).by(&[Way::Router]).with_own_routers()
    };
    Ok(SIZES.map(part).into())
}

fn measure(run: &Run<'_>, case: &str, connections: usize) -> Result<Vec<Figure>> {
    let setting = run.setting;
    let host = &setting.lab.h1;
    setting.restart_forwarders()?;
    setting.start_routers()?;
    std::thread::sleep(AT_REST);
    let before = Memory::of(host)?;
    setting.stop_routers()?;

    let _redis = run.serve(&redis(run.address), REDIS_PORT)?;
    let _clients = silent_redis_clients(run.client, run.address, connections)?;

    let (moved, took) = std::thread::scope(|scope| -> Result<(usize, Duration)> {
        let watching = scope.spawn(|| time_of_swaps(host, connections));
        setting.start_routers()?;
        watching.join().map_err(|_| anyhow::anyhow!("the watch of the swaps ended with a panic"))?
    })?;
    ensure!(moved > 0, "no connection was swapped within {LIMIT:?}: {:?}", host.status()?);
    let idle_percent = idle_percent(host)?;
    let after = Memory::of(host)?;
    let stopping = Instant::now();
    setting.stop_routers()?;
    let back = stopping.elapsed();
    let left = redis_clients(run.client, run.address)?;
    ensure!(left >= connections, "{left} of {connections} connections are left");

    let kib_each = |kib: u64, before: u64| kib.saturating_sub(before) as f64 / moved as f64;
    let router = kib_each(after.router_kib, before.router_kib);
    let forwarder = kib_each(after.forwarder_kib, before.forwarder_kib);
    Ok(vec![
        SWAPS.of(case, moved as f64 / took.as_secs_f64()),
        SWAPPED.of(case, moved as f64 / connections as f64 * 100.0),
        MEMORY.of(case, router + forwarder),
        ROUTER_MEMORY.of(case, router),
        FORWARDER_MEMORY.of(case, forwarder),
        IDLE.of(case, idle_percent),
        BACK.of(case, back.as_secs_f64()),
    ])
}

/// How many are swapped, and the time from the last look at which none was to the first at which all are.
fn time_of_swaps(host: &Host, connections: usize) -> Result<(usize, Duration)> {
    let router = host.direct();
    let (deadline, mut first) = (Instant::now() + LIMIT, Instant::now());
    loop {
        let now = Instant::now();
        let swapped = router.status()?.map_or(0, |status| status.swapped as usize);
        if swapped == 0 {
            first = now;
        }
        if swapped >= connections || now >= deadline {
            return Ok((swapped, first.elapsed()));
        }
        // To 2 %: each look costs the router more, the more connections it has.
        std::thread::sleep((first.elapsed() / 50).clamp(SHORTEST_LOOK, LONGEST_LOOK));
    }
}

/// Anonymous memory.
struct Memory {
    router_kib: u64,
    forwarder_kib: u64,
}

impl Memory {
    fn of(host: &Host) -> Result<Memory> {
        let kib = |pid: u32| -> Result<u64> {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            kib.with_context(|| format!("no RssAnon of process {pid}"))
        };
        let [router, forwarder] = pids(host)?;
        Ok(Memory { router_kib: kib(router)?, forwarder_kib: kib(forwarder)? })
    }
}

/// After that, a router and a forwarder have given back what they needed to start, or to move.
const AT_REST: Duration = Duration::from_secs(3);

/// Over so long, of one CPU.
fn idle_percent(host: &Host) -> Result<f64> {
    let cpu_ns = || -> Result<u64> {
        let mut sum = 0;
        for pid in pids(host)? {
            for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                // A thread may end in between.
                let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
                sum += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
            }
        }
        Ok(sum)
    };
    let before = cpu_ns()?;
    std::thread::sleep(AT_REST);
    Ok(cpu_ns()?.saturating_sub(before) as f64 / AT_REST.as_nanos() as f64 * 100.0)
}

fn pids(host: &Host) -> Result<[u32; 2]> {
    let router = host.router_pid().context("no router is running")?;
    Ok([router, host.forwarder_pid().context("no forwarder is running")?])
}
