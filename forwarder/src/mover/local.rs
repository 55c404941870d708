// SPDX-License-Identifier: Apache-2.0
//! Both ends of a connection are on this host: one freeze, one gate, no protocol.

use std::{
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use forwarder_api::{Direction, MAX_UNREAD_BYTES, Moved, Outcome, Refusal};

use super::{Finished, Running, SETTLE_POLL, Times, aborted, socket_inode};
use crate::{
    alarm::Alarms,
    exchange::{self, Armed, Deal, discard, facts_while_frozen},
    freeze::Frozen,
    inspect::{Inspector, SocketFacts},
    options::ReceiveRoom,
    site::{Parked, Prepared, PreparedEnd, Site, report, tgids_of},
    transaction::{Look, Relation, relation},
};

struct Local<'a> {
    site: &'a Site,
    ends: [&'a PreparedEnd; 2],
    new: [&'a OwnedFd; 2],
    budget: Duration,
    times: Times,
    threads: u32,
    /// Bytes that the application of each end had not read.
    unread: [usize; 2],
}

/// Move both ends, from the first look to the thaw.
pub fn run_local(site: &Site, mut prepared: Prepared, new: Vec<OwnedFd>, budget: Duration) -> Finished {
    let ends = std::mem::take(&mut prepared.ends);
    let ([first, second], [new_first, new_second]) = (&ends[..], &new[..]) else {
        return Finished { outcome: aborted(Refusal::HostPathFailed, 0), parked: None };
    };
    let mut local = Local {
        site,
        ends: [first, second],
        new: [new_first, new_second],
        budget,
        times: Times::default(),
        threads: 0,
        unread: [0; 2],
    };
    let result = local.run();
    let Local { times, threads, unread, .. } = local;
    if let Err(reason) = result {
        return Finished { outcome: aborted(reason, times.pause_us()), parked: None };
    }
    let moved = Moved {
        unread_bytes: unread.iter().sum::<usize>() as u64,
        threads,
        processes: tgids_of(&ends).len() as u32,
        fds: ends.iter().map(|end| end.holders.fds() as u32).sum(),
        sockets: new.iter().filter_map(socket_inode).collect(),
        ..times.moved()
    };
    let discarded = ends.iter().zip(unread).all(|(end, unread)| discard(end.old.as_fd(), unread));
    let parked = match prepared.direction {
        Direction::ToHost if !discarded => None,
        Direction::ToHost => Some(Parked {
            overlay: ends.into_iter().map(|end| end.old).collect(),
            host: moved.sockets.clone(),
            note: std::mem::take(&mut prepared.note),
            moved: moved.clone(),
        }),
        Direction::ToOverlay => {
            prepared.parked = None;
            None
        }
    };
    Finished { outcome: Outcome::Moved(moved), parked }
}

impl Local<'_> {
    fn run(&mut self) -> Result<(), Refusal> {
        let inspector = self.site.programs.inspector().map_err(report)?;
        let tgids = tgids_of(self.ends);
        let _room = self.site.rooms.promise(tgids.len())?;
        let alarms = Alarms::look(&inspector, &tgids);
        let deadline = Instant::now() + self.budget;
        self.times.began = Some(Instant::now());
        let frozen = Frozen::freeze(&tgids, &alarms, deadline);
        self.times.thawed = Some(Instant::now());
        let mut frozen = frozen?;
        self.times.frozen = Some(Instant::now());
        self.threads = frozen.threads() as u32;
        let result = self.exchange(&mut frozen, &inspector, deadline);
        self.times.thawed = Some(frozen.thaw());
        result
    }

    fn exchange(
        &mut self,
        frozen: &mut Frozen,
        inspector: &Inspector,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let [first, second] = self.ends;
        let _rooms = [
            ReceiveRoom::make(first.old.as_fd(), MAX_UNREAD_BYTES)?,
            ReceiveRoom::make(second.old.as_fd(), MAX_UNREAD_BYTES)?,
        ];
        let (facts, looks) = self.settle(frozen, inspector, deadline)?;
        self.times.settled = Some(Instant::now());
        let unread_of = |index: usize| match &looks[index].unread {
            Some(bytes) => Ok(bytes.clone()),
            None => exchange::look(self.ends[index].old.as_fd(), &facts[index], true)
                .map(|look| look.unread.unwrap_or_default()),
        };
        let (for_first, for_second) = (unread_of(0)?, unread_of(1)?);
        self.unread = [for_first.len(), for_second.len()];
        // What one end has not read arrives there when the other end's new socket sends it.
        let pairs = [
            Running::substitution(first, self.new[0], &facts[0], for_second),
            Running::substitution(second, self.new[1], &facts[1], for_first),
        ];
        Armed::arm(frozen, &pairs, Deal::Within, deadline)?.install(frozen, &pairs)?;
        self.times.installed = Some(Instant::now());
        Ok(())
    }

    /// Until nothing is in flight.
    fn settle(
        &self,
        frozen: &Frozen,
        inspector: &Inspector,
        deadline: Instant,
    ) -> Result<([SocketFacts; 2], [Look; 2]), Refusal> {
        let [first, second] = self.ends;
        loop {
            let facts = [
                facts_while_frozen(first, frozen, inspector)?,
                facts_while_frozen(second, frozen, inspector)?,
            ];
            let looks = [
                exchange::look(first.old.as_fd(), &facts[0], false)?,
                exchange::look(second.old.as_fd(), &facts[1], false)?,
            ];
            match relation(&looks[0], &looks[1]) {
                Relation::Settled => return Ok((facts, looks)),
                Relation::Strangers => return Err(Refusal::NotTheSameConnection),
                Relation::InFlight if Instant::now() >= deadline => return Err(Refusal::NotSettled),
                Relation::InFlight => std::thread::sleep(SETTLE_POLL),
            }
        }
    }
}
