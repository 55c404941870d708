// SPDX-License-Identifier: Apache-2.0
//! What came of everything, added up by all actors.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::{Host, Status};

/// More are counted, but not kept.
const MAX_KEPT: usize = 50;

pub struct Tally {
    started: Instant,
    counts: Mutex<Counts>,
}

#[derive(Clone, Default)]
pub struct Counts {
    pub errors: u64,
    pub first_errors: Vec<String>,
    /// Connections that came to the end that was meant for them.
    pub connections: u64,
    pub applications_killed: u64,
    /// Routers and forwarders.
    pub kills: u64,
    pub restarts: u64,
    pub rule_changes: u64,
    /// By the routers' own names.
    pub refusals: BTreeMap<String, u64>,
    /// What each host's router has counted so far; a new one begins at nothing.
    seen: [BTreeMap<String, u64>; 2],
}

impl Tally {
    pub fn new() -> Tally {
        Tally { started: Instant::now(), counts: Mutex::default() }
    }

    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Something that must not happen. Said at once: the time tells where to look in the logs.
    pub fn error(&self, what: &str) {
        let line = format!("at {:.1} s: {what}", self.age().as_secs_f64());
        eprintln!("error {line}");
        let mut counts = self.counts();
        counts.errors += 1;
        if counts.first_errors.len() < MAX_KEPT {
            counts.first_errors.push(line);
        }
    }

    pub fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what the router of a host has counted since the last look. Right before it ends, too.
    pub fn look_at(&self, host: &Host) {
        match host.direct().status() {
            Ok(Some(status)) => self.counts().take_over(usize::from(host.index) - 1, &status),
            Ok(None) => (),
            Err(error) => self.error(&format!("the router of {}: {error:#}", host.name)),
        }
    }

    /// A new router counts from nothing.
    pub fn router_ended(&self, host: &Host) {
        self.counts().seen[usize::from(host.index) - 1].clear();
    }
}

impl Counts {
    fn take_over(&mut self, host: usize, status: &Status) {
        for (reason, now) in &status.refused {
            let before = self.seen[host].insert(reason.clone(), *now).unwrap_or_default();
            *self.refusals.entry(reason.clone()).or_default() += now.saturating_sub(before);
        }
    }
}

/// What all routers of a run say in their logs about moves.
#[derive(Default, Debug, PartialEq)]
pub struct Moves {
    pub swaps: u64,
    pub swap_backs: u64,
    /// Of both ends.
    pub pauses_us: Vec<u64>,
}

impl Moves {
    pub fn read(directories: &[&Path]) -> Result<Moves> {
        let mut moves = Moves::default();
        for directory in directories {
            for entry in std::fs::read_dir(directory)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if name.starts_with("router-") && name.ends_with(".err") {
                    let log = std::fs::read_to_string(&path)
                        .with_context(|| format!("reading {}", path.display()))?;
                    log.lines().for_each(|line| moves.take(line));
                }
            }
        }
        moves.pauses_us.sort_unstable();
        Ok(moves)
    }

    /// A line such as `... CONN LOCAL - REMOTE: moved to the overlay, pause 900 us (...`. Both ends say it; the one
    /// with the smaller address counts.
    fn take(&mut self, line: &str) {
        let Some((names, rest)) = line.split_once(": moved to ") else { return };
        let words: Vec<&str> = names.split_whitespace().collect();
        let [.., local, "-", remote] = words.as_slice() else { return };
        let pause =
            rest.split_once("pause ").and_then(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok());
        self.pauses_us.extend(pause);
        let address = |text: &str| text.parse::<std::net::SocketAddr>().ok();
        if address(local) < address(remote) {
            if rest.starts_with("the host network") {
                self.swaps += 1;
            } else {
                self.swap_backs += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_is_counted_once_and_both_its_pauses_are_taken() {
        let mut moves = Moves::default();
        for line in [
            "[2026-11-21T12:00:00Z INFO  router::coordinator::effects] 00000000000000ff 10.244.1.10:4000 - 10.244.2.10:7000: moved to the host network, pause 900 us (freeze 60, settle 1, install 2), 0 bytes unread",
            "[2026-11-21T12:00:00Z INFO  router::coordinator::effects] 00000000000000ff 10.244.2.10:7000 - 10.244.1.10:4000: moved to the host network, pause 800 us (freeze 60, settle 1, install 2), 0 bytes unread",
            "[2026-11-21T12:00:00Z INFO  router::coordinator::effects] 00000000000000ff [fd00::1]:4000 - [fd00::2]:10: moved to the overlay, pause 7 us (freeze 60, settle 1, install 2), 0 bytes unread",
            "[2026-11-21T12:00:00Z INFO  router] stopping",
        ] {
            moves.take(line);
        }
        assert_eq!(moves, Moves { swaps: 1, swap_backs: 1, pauses_us: vec![900, 800, 7] });
    }
}
