// SPDX-License-Identifier: Apache-2.0
//! When the time of sleeping threads is up: looked at before they are stopped, because a stop ends the call and its
//! timer with it.
//!
//! A thread may wake between the look and its stop, and sleep in another call by then. It has waited in the kernel
//! more often then: such an alarm is not given out. (One case is not seen: in the microseconds between, the thread wakes,
//! calls again, and is stopped before it sleeps. The new call then ends with the time of the one before.)

use std::{cell::OnceCell, collections::HashMap, os::fd::AsFd, time::Duration};

use nix::time::{ClockId, clock_gettime};

use crate::{
    inspect::{InspectError, Inspector, sleep::Stopped},
    process::{self, Tgid, Tid},
};

/// A point in time, in nanoseconds of CLOCK_MONOTONIC. Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alarm(pub u64);

impl Alarm {
    pub fn left(self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(now_ns()))
    }
}

fn now_ns() -> u64 {
    // Does not fail: the clock is there on every Linux.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    now.as_nanos() as u64
}

struct Asleep {
    until: Alarm,
    switches: u64,
}

/// The alarms of some processes' threads.
pub struct Alarms<'a> {
    inspector: &'a Inspector,
    asleep: HashMap<Tid, Asleep>,
}

impl Alarms<'_> {
    /// To be called right before these processes are frozen. What cannot be found is left out.
    pub fn look<'a>(inspector: &'a Inspector, tgids: &[Tgid]) -> Alarms<'a> {
        let mut alarms = Alarms { inspector, asleep: HashMap::new() };
        for tgid in tgids {
            if let Err(error) = alarms.look_at(*tgid) {
                log::warn!("process {}: its sleeping threads cannot be looked at: {error}", tgid.0);
            }
        }
        alarms
    }

    fn look_at(&mut self, tgid: Tgid) -> Result<(), InspectError> {
        // Gone: the freeze will say so.
        let Ok(pidfd) = process::pidfd(tgid) else { return Ok(()) };
        let (now, found) = (now_ns(), self.inspector.sleepers(pidfd.as_fd())?);
        let asleep = |left: Duration, switches| Asleep {
            until: Alarm(now.saturating_add(left.as_nanos() as u64)),
            switches,
        };
        let found = found.iter().map(|sleeper| (sleeper.tid, asleep(sleeper.left, sleeper.switches)));
        self.asleep.extend(found);
        Ok(())
    }

    /// The process stands still now.
    pub fn of_stopped(&self, tgid: Tgid) -> Waits<'_> {
        Waits { alarms: self, tgid, stopped: OnceCell::new() }
    }
}

/// What is known of the calls in which the threads of a process were stopped.
pub struct Waits<'a> {
    alarms: &'a Alarms<'a>,
    tgid: Tgid,
    /// Looked at when the first thread needs it.
    stopped: OnceCell<HashMap<Tid, Stopped>>,
}

impl Waits<'_> {
    /// When the call would have ended in which this thread was stopped.
    pub fn alarm(&self, tid: Tid) -> Option<Alarm> {
        let asleep = self.alarms.asleep.get(&tid)?;
        // Once more: to stand still.
        (self.stopped(tid)?.switches == asleep.switches + 1).then_some(asleep.until)
    }

    /// Might a seccomp filter kill the thread for another call than its own?
    pub fn is_filtered(&self, tid: Tid) -> bool {
        // There are more threads than the look tells of.
        let left_out = || process::is_filtered(self.tgid, tid);
        self.stopped(tid).map_or_else(left_out, |stopped| stopped.is_filtered)
    }

    fn stopped(&self, tid: Tid) -> Option<&Stopped> {
        self.stopped.get_or_init(|| self.look().unwrap_or_default()).get(&tid)
    }

    /// Not logged: something is frozen.
    fn look(&self) -> Option<HashMap<Tid, Stopped>> {
        let pidfd = process::pidfd(self.tgid).ok()?;
        let stopped = self.alarms.inspector.stopped(pidfd.as_fd()).ok()?;
        Some(stopped.into_iter().map(|stopped| (stopped.tid, stopped)).collect())
    }
}
