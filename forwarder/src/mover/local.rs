// SPDX-License-Identifier: Apache-2.0
//! Both ends of each connection are on this host: one freeze, one gate, no protocol.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use forwarder_api::{MAX_UNREAD_BYTES, Moved, Refusal};

use super::{Finished, Member, Times, give_options, over, substitutions};
use crate::{
    alarm::Alarms,
    exchange::{Armed, Deal, Gear, Load, facts_while_frozen, wait_for_carried},
    freeze::{Frozen, nap},
    inspect::{Inspector, SocketFacts},
    options::{ReceiveRoom, acknowledge},
    process,
    site::{PreparedEnd, Site, tgids_of},
    transaction::{Look, Relation, relation, worst},
};

struct Local<'a> {
    site: &'a Site,
    members: &'a [Member],
    /// Two for each connection, beside each other.
    ends: Vec<&'a PreparedEnd>,
    new: Vec<BorrowedFd<'a>>,
    budget: Duration,
    times: Times,
    threads: u32,
    /// Bytes that the application of each end had not read.
    unread: Vec<u64>,
}

/// Move both ends of each, from the first look to the thaw.
pub fn run_local(site: &Site, mut members: Vec<Member>, budget: Duration) -> Finished {
    let inspector = match give_options(site, &mut members) {
        Ok(inspector) => inspector,
        Err(reason) => return Finished::Aborted { members, reason, pause_us: 0, afresh: true },
    };
    let mut local = Local {
        site,
        members: &members,
        ends: members.iter().flat_map(|member| &member.prepared.ends).collect(),
        new: members.iter().flat_map(|member| &member.new).map(OwnedFd::as_fd).collect(),
        budget,
        times: Times::default(),
        threads: 0,
        unread: Vec::new(),
    };
    let mut gate_opened = false;
    let result = local.run(&inspector, &mut gate_opened);
    let processes = tgids_of(local.ends.iter().copied()).len() as u32;
    let Local { times, threads, unread, .. } = local;
    if let Err(reason) = result {
        return Finished::Aborted { members, reason, pause_us: times.pause_us(), afresh: !gate_opened };
    }
    let common = Moved { together: members.len() as u32, threads, processes, ..times.moved() };
    let over = |(member, unread): (Member, &[u64])| over(member, unread, true, &common);
    Finished::Moved(members.into_iter().zip(unread.chunks_exact(2)).map(over).collect())
}

impl Local<'_> {
    fn run(&mut self, inspector: &Inspector, gate_opened: &mut bool) -> Result<(), Refusal> {
        let tgids = tgids_of(self.ends.iter().copied());
        if process::any_share_memory(&tgids) {
            return Err(Refusal::SharedMemory);
        }
        let _room = self.site.rooms.promise(tgids.len(), self.ends.len())?;
        let gear = Gear::new()?;
        let alarms = Alarms::look(inspector, &tgids);
        let deadline = Instant::now() + self.budget;
        self.times.began = Some(Instant::now());
        let frozen = Frozen::freeze(&tgids, &alarms, deadline);
        self.times.thawed = Some(Instant::now());
        let mut frozen = frozen?;
        self.times.frozen = Some(Instant::now());
        self.threads = frozen.threads() as u32;
        let result = self.exchange(&mut frozen, gear, inspector, deadline, gate_opened);
        self.times.thawed = Some(frozen.thaw());
        result
    }

    fn exchange(
        &mut self,
        frozen: &mut Frozen,
        gear: Gear,
        inspector: &Inspector,
        deadline: Instant,
        gate_opened: &mut bool,
    ) -> Result<(), Refusal> {
        let (facts, mut looks, _rooms) = match self.look(frozen, inspector, deadline)? {
            (facts, looks, Relation::Settled) => (facts, looks, vec![]),
            (_, _, Relation::InFlight) => {
                let old = self.ends.iter().map(|end| end.old.as_fd());
                let rooms: Result<Vec<ReceiveRoom<'_>>, Refusal> =
                    old.map(|old| ReceiveRoom::make(old, MAX_UNREAD_BYTES)).collect();
                let (facts, looks) = self.settle(frozen, inspector, deadline)?;
                (facts, looks, rooms?)
            }
            (_, _, Relation::Strangers) => return Err(Refusal::NotTheSameConnection),
        };
        self.unread = facts.iter().map(SocketFacts::unread_bytes).collect();
        if looks.iter().any(|look| look.unread.is_none()) {
            looks = super::looks(self.ends.iter().copied(), &facts, true)?;
        }
        // What one end has not read arrives there when the other end's new socket sends it.
        let carry = (0..looks.len()).map(|index| looks[index ^ 1].unread.take().unwrap_or_default());
        let loads = carry.zip(&self.unread).map(|(carry, arriving)| Load { carry, arriving: *arriving });
        let loads: Vec<Load> = loads.collect();
        let pairs = substitutions(self.members, &facts);
        let mut armed = Armed::arm(frozen, gear, inspector, &pairs, Deal::Within, deadline)?;
        if let Err(reason) = armed.load(frozen, &self.new, &loads, deadline) {
            armed.turn_back(frozen, &self.new);
            return Err(reason);
        }
        self.times.settled = Some(Instant::now());
        *gate_opened = true;
        armed.install(frozen, &self.new)?;
        self.times.installed = Some(Instant::now());
        wait_for_carried(self.new.iter().copied().zip(self.unread.iter().copied()), inspector, deadline);
        Ok(())
    }

    fn look(
        &self,
        frozen: &Frozen,
        inspector: &Inspector,
        deadline: Instant,
    ) -> Result<(Vec<SocketFacts>, Vec<Look>, Relation), Refusal> {
        let facts = facts_while_frozen(self.ends.iter().copied(), frozen, inspector, deadline)?;
        let looks = super::looks(self.ends.iter().copied(), &facts, false)?;
        let relation = worst(looks.chunks_exact(2).map(|pair| relation(&pair[0], &pair[1])));
        Ok((facts, looks, relation))
    }

    /// Until nothing is in flight.
    fn settle(
        &self,
        frozen: &Frozen,
        inspector: &Inspector,
        deadline: Instant,
    ) -> Result<(Vec<SocketFacts>, Vec<Look>), Refusal> {
        let began = Instant::now();
        loop {
            match self.look(frozen, inspector, deadline)? {
                (facts, looks, Relation::Settled) => return Ok((facts, looks)),
                (_, _, Relation::Strangers) => return Err(Refusal::NotTheSameConnection),
                (_, _, Relation::InFlight) if Instant::now() >= deadline => return Err(Refusal::NotSettled),
                (_, _, Relation::InFlight) => {
                    self.ends.iter().for_each(|end| acknowledge(end.old.as_fd()));
                    nap(began);
                }
            }
        }
    }
}
