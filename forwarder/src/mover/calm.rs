// SPDX-License-Identifier: Apache-2.0
//! Makes connections over which much goes shallow, while their applications run, so that little has to land and to be carried
//! while they stand still.

use std::{
    os::fd::AsFd,
    time::{Duration, Instant},
};

use forwarder_api::Refusal;

use crate::{inspect::Inspector, options::Shallow, site::PreparedEnd};

/// A connection over which so many go in a millisecond, or that has so many queued, is made shallow.
const BUSY_BYTES: u32 = 64 << 10;
/// It is calm once no more than this is queued, or may be sent to it.
const CALM_BYTES: u32 = 256 << 10;
/// How long that may take, and how often it is looked at.
const CALM_TIME: Duration = Duration::from_millis(300);
const CALM_POLL: Duration = Duration::from_micros(500);
/// Looks at so many take as long as one waits for the next.
const MANY: usize = 16;

/// The busy ones of a transaction. They are as they were once this is dropped.
pub struct Shallows<'a> {
    busy: Vec<Busy<'a>>,
    began: Instant,
}

struct Busy<'a> {
    shallow: Shallow<'a>,
    /// Its peer sends much: what it was told that it may, it will.
    receives: bool,
}

impl<'a> Shallows<'a> {
    pub fn make(
        ends: impl Iterator<Item = &'a PreparedEnd>,
        inspector: &Inspector,
    ) -> Result<Shallows<'a>, Refusal> {
        let busy = ends.filter_map(|end| Busy::new(end, inspector).transpose()).collect::<Result<_, _>>()?;
        Ok(Shallows { busy, began: Instant::now() })
    }

    /// Much comes to one of them.
    pub fn receive(&self) -> bool {
        self.busy.iter().any(|busy| busy.receives)
    }

    /// They will not become calmer.
    pub fn are_calm(&self, inspector: &Inspector) -> bool {
        self.busy.iter().all(|busy| busy.is_calm(inspector)) || self.began.elapsed() >= CALM_TIME
    }

    /// When to look again.
    pub fn next_look(&self) -> Instant {
        Instant::now() + CALM_POLL * (1 + self.busy.len() / MANY) as u32
    }
}

impl<'a> Busy<'a> {
    fn new(end: &'a PreparedEnd, inspector: &Inspector) -> Result<Option<Busy<'a>>, Refusal> {
        // What cannot be looked at, the freeze will say.
        let Ok(Some(facts)) = inspector.socket(end.old.as_fd()) else { return Ok(None) };
        let since_ms = 1 + end.looked_at.elapsed().as_millis() as u32;
        let is_much = |bytes: u32| bytes / since_ms > BUSY_BYTES;
        let receives = is_much(facts.rcv_nxt.wrapping_sub(end.rcv_nxt));
        let sends = is_much(facts.write_seq.wrapping_sub(end.write_seq));
        if !sends && !receives && facts.queued_bytes() <= BUSY_BYTES {
            return Ok(None);
        }
        Ok(Some(Busy { shallow: Shallow::make(end.old.as_fd())?, receives }))
    }

    /// Little is queued, and little can come before the peer is frozen as well.
    fn is_calm(&self, inspector: &Inspector) -> bool {
        let Ok(Some(facts)) = inspector.socket(self.shallow.socket()) else { return true };
        facts.queued_bytes() <= CALM_BYTES && (!self.receives || facts.receive_window <= CALM_BYTES)
    }
}
