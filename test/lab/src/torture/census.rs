// SPDX-License-Identifier: Apache-2.0
//! What routers, forwarders and kernel keep when no application runs: figures that must not grow.

use std::{path::Path, process::Command, time::Duration};

use anyhow::{Context, Result};
use lab::{Host, Place, Pod};
use serde_json::Value;

/// All figures at a moment.
pub struct Census {
    /// Since connections were first made.
    pub age: Duration,
    pub figures: Vec<Figure>,
}

/// A quantity at a moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Host, thing, quantity.
    pub name: String,
    pub kind: Kind,
    pub value: u64,
    /// The process that it belongs to. Another process begins anew.
    pub pid: Option<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Threads,
    Descriptors,
    MemoryKb,
    MapEntries,
    Sockets,
    Orphans,
    TimeWait,
}

impl Kind {
    /// How much more there may be later. A leak of one for each swap is far more; what is allowed is what comes and
    /// goes by itself.
    pub fn allowed(self, before: u64) -> u64 {
        match self {
            Kind::Threads | Kind::Descriptors | Kind::Sockets | Kind::Orphans => before + 8,
            Kind::MapEntries => before + 16,
            // The allocator's arenas fill up slowly.
            Kind::MemoryKb => before + before / 4 + 4096,
            Kind::TimeWait => 2 * before + 200,
        }
    }

    /// Does it come to rest by itself?
    pub fn is_steady(self) -> bool {
        !matches!(self, Kind::MemoryKb | Kind::TimeWait)
    }
}

pub fn take(hosts: &[&Host], pods: &[Pod]) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for host in hosts {
        for (program, pid) in [("router", host.router_pid()), ("forwarder", host.forwarder_pid())] {
            let pid = pid.with_context(|| format!("no {program} is running on {}", host.name))?;
            let mut add = |what: &str, kind, value| {
                let name = format!("{} {program} {what}", host.name);
                figures.push(Figure { name, kind, value, pid: Some(pid) });
            };
            add("threads", Kind::Threads, entries(&format!("/proc/{pid}/task"))?);
            add("descriptors", Kind::Descriptors, entries(&format!("/proc/{pid}/fd"))?);
            add("memory, KB", Kind::MemoryKb, resident_kb(pid)?);
            add("BPF map entries", Kind::MapEntries, map_entries(pid)?);
        }
        sockets(&host.name, host.place(), &mut figures)?;
    }
    for pod in pods {
        sockets(&pod.name, pod.place(), &mut figures)?;
    }
    Ok(figures)
}

fn entries(directory: &str) -> Result<u64> {
    Ok(std::fs::read_dir(directory).with_context(|| format!("listing {directory}"))?.count() as u64)
}

fn resident_kb(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Entries of all hash maps that the process has open.
fn map_entries(pid: u32) -> Result<u64> {
    const HASH: &str = "1";
    let mut total = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // It may have closed it since.
        let Ok(info) = std::fs::read_to_string(entry?.path()) else { continue };
        let value = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        if let (Some(HASH), Some(id)) = (value("map_type:"), value("map_id:")) {
            let output = Command::new("bpftool").args(["-j", "map", "dump", "id", id]).output()?;
            let dump: Value = serde_json::from_slice(&output.stdout).context("what bpftool dumped")?;
            total += dump.as_array().map_or(0, Vec::len) as u64;
        }
    }
    Ok(total)
}

/// Of a network namespace: all sockets, TCP sockets that no process has, and TIME_WAIT.
fn sockets(name: &str, place: &Place, figures: &mut Vec<Figure>) -> Result<()> {
    let mut add = |what: &str, kind, value| {
        figures.push(Figure { name: format!("{name} {what}"), kind, value, pid: None });
    };
    let sockstat = place.network.run(|| {
        let path = Path::new("/proc/thread-self/net/sockstat");
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
    })?;
    let used = sockstat.lines().find_map(|line| line.strip_prefix("sockets: used ")).context("no sockets")?;
    add("sockets", Kind::Sockets, used.trim().parse()?);
    let listed = place.run(Command::new("ss").args(["-Htane"]))?;
    let time_wait = |line: &&str| line.starts_with("TIME-WAIT");
    let orphaned = |line: &&str| !time_wait(line) && !has_inode(line);
    add("orphaned sockets", Kind::Orphans, listed.lines().filter(orphaned).count() as u64);
    add("TIME_WAIT", Kind::TimeWait, listed.lines().filter(time_wait).count() as u64);
    Ok(())
}

/// A socket without an inode belongs to no process.
fn has_inode(line: &str) -> bool {
    line.split_whitespace().any(|word| word.strip_prefix("ino:").is_some_and(|inode| inode != "0"))
}

/// A figure now and then, and what that means.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    pub name: String,
    pub before: u64,
    pub after: u64,
    pub allowed: u64,
    /// It was measured first when its process had been started anew.
    pub fresh: bool,
}

impl Growth {
    pub fn is_leak(&self) -> bool {
        self.after > self.allowed
    }
}

/// How long a socket stays in TIME_WAIT: TCP_TIMEWAIT_LEN, `include/net/tcp.h`.
const TIME_WAIT_LASTS: Duration = Duration::from_secs(60);

/// Each figure of the last census, compared with the first in which the same process was there.
pub fn compare(censuses: &[Census]) -> Vec<Growth> {
    let Some((last, earlier)) = censuses.split_last() else { return Vec::new() };
    let growth = |after: &Figure| {
        let same = |before: &&Figure| before.name == after.name && before.pid == after.pid;
        let of = |census: &Census| census.figures.iter().find(same).map(|figure| figure.value);
        let (turn, age, before) =
            earlier.iter().enumerate().find_map(|(turn, census)| Some((turn, census.age, of(census)?)))?;
        let expected = match after.kind {
            // Each connection that ended and each swap back left one: as many as there were of them in so long.
            Kind::TimeWait => {
                let covered =
                    |age: Duration| age.clamp(Duration::from_secs(1), TIME_WAIT_LASTS).as_secs_f64();
                (before as f64 * covered(last.age) / covered(age)) as u64
            }
            _ => before,
        };
        Some(Growth {
            name: after.name.clone(),
            before,
            after: after.value,
            allowed: after.kind.allowed(expected),
            fresh: turn > 0,
        })
    };
    last.figures.iter().filter_map(growth).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn census(age: u64, kind: Kind, value: u64, pid: Option<u32>) -> Census {
        let figure = Figure { name: format!("h1 {kind:?}"), kind, value, pid };
        Census { age: Duration::from_secs(age), figures: vec![figure] }
    }

    fn descriptors(value: u64, pid: u32) -> Census {
        census(60, Kind::Descriptors, value, Some(pid))
    }

    #[test]
    fn one_descriptor_for_each_swap_is_a_leak() {
        let growth = compare(&[descriptors(30, 1), descriptors(40, 1), descriptors(530, 1)]);
        assert_eq!((growth[0].before, growth[0].after, growth[0].fresh), (30, 530, false));
        assert!(growth[0].is_leak());
    }

    #[test]
    fn a_process_started_anew_is_compared_with_itself() {
        let growth = compare(&[descriptors(30, 1), descriptors(90, 2), descriptors(91, 2)]);
        assert_eq!((growth[0].before, growth[0].after, growth[0].fresh), (90, 91, true));
        assert!(!growth[0].is_leak());
    }

    #[test]
    fn sockets_in_time_wait_are_compared_with_as_long_a_time() {
        let time_wait = |age, value| census(age, Kind::TimeWait, value, None);
        assert!(!compare(&[time_wait(6, 60), time_wait(30, 400)])[0].is_leak());
        assert!(compare(&[time_wait(6, 60), time_wait(30, 1000)])[0].is_leak());
        assert!(compare(&[time_wait(60, 60), time_wait(600, 400)])[0].is_leak());
    }

    #[test]
    fn sockets_of_processes_are_told_from_orphans() {
        assert!(has_inode("ESTAB 0 0 10.0.0.1:1 10.0.0.2:2 uid:5 ino:4711 sk:1 <->"));
        assert!(!has_inode("FIN-WAIT-2 0 0 10.0.0.1:1 10.0.0.2:2 timer:(timewait,10sec,0) ino:0 sk:1"));
    }
}
