// SPDX-License-Identifier: Apache-2.0
//! When the time of sleeping threads is up: looked at before they are stopped, because a stop ends the call and its
//! timer with it.
//!
//! A thread may wake between the look and its stop, and sleep in another call by then. It has waited in the kernel
//! more often then: such an alarm is not given out. (One case is not seen: in the microseconds between, the thread wakes,
//! calls again, and is stopped before it sleeps. The new call then ends with the time of the one before.)

use std::{collections::HashMap, os::fd::AsFd, time::Duration};

use nix::time::{ClockId, clock_gettime};

use crate::{
    inspect::{InspectError, Inspector},
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
#[derive(Default)]
pub struct Alarms(HashMap<Tid, Asleep>);

impl Alarms {
    /// To be called right before these processes are frozen. What cannot be found is left out.
    pub fn look(inspector: &Inspector, tgids: &[Tgid]) -> Alarms {
        let mut alarms = Alarms::default();
        for tgid in tgids {
            if let Err(error) = alarms.look_at(inspector, *tgid) {
                log::warn!("process {}: its sleeping threads cannot be looked at: {error}", tgid.0);
            }
        }
        alarms
    }

    fn look_at(&mut self, inspector: &Inspector, tgid: Tgid) -> Result<(), InspectError> {
        // Gone: the freeze will say so.
        let Ok(pidfd) = process::pidfd(tgid) else { return Ok(()) };
        let (now, found) = (now_ns(), inspector.sleepers(pidfd.as_fd())?);
        let asleep = |left: Duration, switches| Asleep {
            until: Alarm(now.saturating_add(left.as_nanos() as u64)),
            switches,
        };
        self.0.extend(found.iter().map(|sleeper| (sleeper.tid, asleep(sleeper.left, sleeper.switches))));
        Ok(())
    }

    /// When the call would have ended in which this thread was stopped.
    pub fn of_stopped(&self, tgid: Tgid, tid: Tid) -> Option<Alarm> {
        let asleep = self.0.get(&tid)?;
        // Once more: to stand still.
        (process::voluntary_switches(tgid, tid) == Some(asleep.switches + 1)).then_some(asleep.until)
    }
}
