// SPDX-License-Identifier: Apache-2.0
//! Exchanges the sockets of frozen processes: checks that nothing changed since they were found, arms every process,
//! loads what is to be carried, opens the gate, and knows how to go back.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::FileExt,
    },
    time::{Duration, Instant},
};

use forwarder_api::{MAX_UNREAD_BYTES, Refusal};
use nix::sys::{
    memfd::{MFdFlags, memfd_create},
    socket::{MsgFlags, recv, setsockopt, sockopt::ReceiveTimeout},
    time::{TimeVal, TimeValLike},
};

use crate::{
    fault::{self, Point},
    freeze::{Frozen, nap},
    holders::{Descriptors, Holders, Table, plan},
    inject::{Block, Done, Gate, Lend, RECOVERY, channel},
    inspect::{FdFacts, InspectError, Inspector, SocketFacts},
    options::{Given, SendRoom, acknowledge, make_room_for_carried},
    process::{self, RemoteFd, Tgid},
    site::{PreparedEnd, may_be_moved},
    table::{Plan, Rank, Silence, Verdict},
    transaction::Look,
};

/// Unread bytes up to this are taken along with the first look, by all connections of a batch together.
pub const SMALL_UNREAD: usize = 64 << 10;

/// A reference that nobody shows is looked at so often again, after so long, before it counts.
const PASSING_LOOKS: u32 = 3;
const PASSING: Duration = Duration::from_micros(20);

/// Time for the blocks to end once the gate is open: nothing in them waits for anybody.
const INSTALL_TIME: Duration = Duration::from_secs(5);

/// What `ends` look like now, their processes frozen; an error if one cannot be moved as it is.
pub fn facts_while_frozen<'a>(
    ends: impl IntoIterator<Item = &'a PreparedEnd> + Clone,
    frozen: &Frozen,
    inspector: &Inspector,
    deadline: Instant,
) -> Result<Vec<SocketFacts>, Refusal> {
    look_at_descriptors(ends.clone(), frozen, inspector)?;
    let old: Vec<_> = ends.clone().into_iter().map(|end| end.old.as_fd()).collect();
    let looked = inspector.sockets(&old).map_err(cannot_look)?;
    let facts: Result<Vec<SocketFacts>, Refusal> = ends
        .clone()
        .into_iter()
        .zip(looked)
        .map(|(end, looked)| in_time(deadline).and_then(|()| facts_of(end, looked, frozen, inspector)))
        .collect();
    nobody_else_uses_the_tables(ends.into_iter().map(|end| &end.holders), frozen, inspector)?;
    facts
}

/// Those of all `ends`, many at a time, before they are asked for one by one.
fn look_at_descriptors<'a>(
    ends: impl IntoIterator<Item = &'a PreparedEnd> + Clone,
    frozen: &Frozen,
    inspector: &Inspector,
) -> Result<(), Refusal> {
    for process in frozen.processes() {
        let tables = ends.clone().into_iter().flat_map(|end| &end.holders.tables);
        let of_process = tables.filter(|table| table.tgid == process.tgid);
        let mut seen = process.seen.borrow_mut();
        let fds = of_process.flat_map(|table| table.fds.iter().copied());
        let fds: Vec<RemoteFd> = fds.filter(|fd| !seen.contains_key(fd)).collect();
        let found = inspector.fds(process.pidfd.as_fd(), &fds).map_err(cannot_look)?;
        seen.extend(fds.into_iter().zip(found));
    }
    Ok(())
}

/// With many connections each step takes its time.
fn in_time(deadline: Instant) -> Result<(), Refusal> {
    if Instant::now() < deadline { Ok(()) } else { Err(Refusal::FreezeBudget) }
}

fn facts_of(
    end: &PreparedEnd,
    looked: Option<SocketFacts>,
    frozen: &Frozen,
    inspector: &Inspector,
) -> Result<SocketFacts, Refusal> {
    let live = Live { frozen, inspector };
    let mut facts = looked.ok_or(Refusal::HolderVanished)?;
    // Whoever lists descriptors, such as we do, has a reference of its own to each for a moment.
    for _ in 0..PASSING_LOOKS {
        if end.holders.account_for(&facts, 1) {
            break;
        }
        std::thread::sleep(PASSING);
        let looked = inspector.socket(end.old.as_fd()).map_err(cannot_look)?;
        facts = looked.ok_or(Refusal::HolderVanished)?;
    }
    may_be_moved(&facts)?;
    for table in &end.holders.tables {
        for fd in &table.fds {
            if live.fd(table, *fd)?.is_none_or(|found| found.file != facts.file) {
                return Err(Refusal::HolderVanished);
            }
        }
    }
    if end.holders.account_for(&facts, 1) { Ok(facts) } else { Err(Refusal::UnseenReference) }
}

/// A descriptor table may have come to be shared with a process that is not frozen.
fn nobody_else_uses_the_tables<'a>(
    holders: impl Iterator<Item = &'a Holders>,
    frozen: &Frozen,
    inspector: &Inspector,
) -> Result<(), Refusal> {
    let mut users: BTreeMap<u64, (usize, u32)> = BTreeMap::new();
    for process in frozen.processes() {
        let Some(facts) = inspector.table(process.pidfd.as_fd()).map_err(cannot_look)? else {
            // The leader has ended before its other threads.
            continue;
        };
        let entry = users.entry(facts.table).or_default();
        entry.0 += process.thread_count();
        entry.1 = facts.users;
    }
    let shared_with_others = holders
        .flat_map(|holders| &holders.tables)
        .any(|table| users.get(&table.table).is_some_and(|(frozen, users)| *frozen as u32 != *users));
    if shared_with_others { Err(Refusal::UnseenReference) } else { Ok(()) }
}

/// The sequence numbers in `facts`, and the unread bytes if they are no more than so many.
pub fn look(old: BorrowedFd<'_>, facts: &SocketFacts, most: usize) -> Result<Look, Refusal> {
    let unread = facts.rcv_nxt.wrapping_sub(facts.copied_seq) as usize;
    if unread > MAX_UNREAD_BYTES {
        return Err(Refusal::TooManyUnreadBytes);
    }
    let unread = if unread <= most { Some(peek(old, unread)?) } else { None };
    Ok(Look { write_seq: facts.write_seq, rcv_nxt: facts.rcv_nxt, unread })
}

/// The first `length` unread bytes, left where they are.
fn peek(socket: BorrowedFd<'_>, length: usize) -> Result<Vec<u8>, Refusal> {
    use std::os::fd::AsRawFd;
    let mut bytes = vec![0; length];
    if length > 0 {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        if recv(socket.as_raw_fd(), &mut bytes, flags) != Ok(length) {
            return Err(Refusal::NotSettled);
        }
    }
    Ok(bytes)
}

/// Take the first `length` unread bytes out of a socket that is to be parked: they were carried over.
pub fn discard(socket: BorrowedFd<'_>, length: usize) -> bool {
    use std::os::fd::AsRawFd;
    let mut left = length;
    let mut bytes = vec![0; left.min(1 << 20)];
    while left > 0 {
        let part = left.min(bytes.len());
        match recv(socket.as_raw_fd(), &mut bytes[..part], MsgFlags::MSG_DONTWAIT) {
            Ok(count) if count > 0 => left -= count,
            Ok(_) | Err(_) => return false,
        }
    }
    true
}

/// One socket to be taken out and the one that takes its place.
pub struct Substitution<'a> {
    pub old: BorrowedFd<'a>,
    pub new: BorrowedFd<'a>,
    pub facts: SocketFacts,
    pub holders: &'a Holders,
    /// The options of the old one that the new one has already.
    pub given: &'a Given,
}

/// What goes from one new socket to its peer, and comes to it.
pub struct Load {
    /// Sent right after the socket is in place.
    pub carry: Vec<u8>,
    /// Bytes that arrive before anybody reads.
    pub arriving: u64,
}

/// How the processes of this end come to know that the new sockets stay.
#[derive(Clone, Copy)]
pub enum Deal<'a> {
    /// Decider, with the witness.
    Decides(BorrowedFd<'a>, Silence),
    /// Follower, with the witness.
    Follows(BorrowedFd<'a>),
    /// Both ends are in these processes.
    Within,
}

impl<'a> Deal<'a> {
    fn verdict(self) -> Verdict {
        match self {
            Deal::Decides(_, silence) => Verdict::FromPeer(silence),
            Deal::Follows(_) => Verdict::ToPeer,
            Deal::Within => Verdict::Own,
        }
    }

    fn witness(self) -> Option<BorrowedFd<'a>> {
        match self {
            Deal::Decides(witness, _) | Deal::Follows(witness) => Some(witness),
            Deal::Within => None,
        }
    }
}

/// What is needed to arm, made before anything stands still.
pub struct Gear {
    gate: Gate,
    /// A nameless one in memory, lent to the lead.
    carried: File,
}

impl Gear {
    pub fn new() -> Result<Gear, Refusal> {
        let carried =
            memfd_create(c"ebpf-router-carried", MFdFlags::MFD_CLOEXEC).map_err(process::not_made)?;
        Ok(Gear { gate: Gate::new()?, carried: carried.into() })
    }
}

/// Processes that wait at the gate with the new sockets in hand.
pub struct Armed {
    gear: Gear,
    /// The lead's first.
    blocks: Vec<(Tgid, Block)>,
    rooms: Vec<(usize, SendRoom)>,
}

impl Armed {
    /// Bring the new sockets into every process. An error leaves all as it was.
    pub fn arm(
        frozen: &mut Frozen,
        gear: Gear,
        inspector: &Inspector,
        pairs: &[Substitution<'_>],
        deal: Deal<'_>,
        deadline: Instant,
    ) -> Result<Armed, Refusal> {
        for pair in pairs {
            in_time(deadline)?;
            pair.given.keep_up(pair.old, &pair.facts, pair.new)?;
        }
        let plans = plans(frozen, inspector, pairs)?;
        let new: Vec<BorrowedFd<'_>> = pairs.iter().map(|pair| pair.new).collect();
        let old: Vec<BorrowedFd<'_>> = pairs.iter().map(|pair| pair.old).collect();
        let verdict = deal.verdict();
        let others = plans.len() > 1;
        // Our own ends are closed on return: an end of file says that no process has one any more.
        let barrier = if others { Some(barrier()?) } else { None };
        let ruling = if others && !matches!(verdict, Verdict::FromPeer(_)) { Some(channel()?) } else { None };
        let mut armed = Armed { gear, blocks: Vec::new(), rooms: Vec::new() };
        for (index, (tgid, plan)) in plans.iter().enumerate() {
            let leads = index == 0;
            let lend = Lend {
                rank: if leads { Rank::Lead { others } } else { Rank::Other },
                verdict,
                new: &new,
                old: &old,
                carried: leads.then(|| armed.gear.carried.as_fd()),
                barrier: end_of(&barrier, leads),
                ruling: end_of(&ruling, leads),
                witness: deal.witness(),
            };
            let result = match frozen.process(*tgid) {
                Some(process) => {
                    let (block, result) = Block::arm(process, plan, &lend, &armed.gear.gate, deadline);
                    armed.blocks.push((*tgid, block));
                    result
                }
                None => Err(Refusal::HolderVanished),
            };
            if let Err(reason) = result {
                armed.turn_back(frozen, &new);
                return Err(reason);
            }
        }
        fault::point(Point::Armed);
        Ok(armed)
    }

    /// Take along what is to be carried to the peer of each of the `new` sockets. After an error the gate must be closed.
    pub fn load(
        &mut self,
        frozen: &mut Frozen,
        new: &[BorrowedFd<'_>],
        loads: &[Load],
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let mut length = 0;
        for (index, (new, load)) in new.iter().zip(loads).enumerate() {
            in_time(deadline)?;
            if load.arriving > 0 {
                make_room_for_carried(*new, load.arriving)?;
            }
            if !load.carry.is_empty() {
                self.gear.carried.write_all_at(&load.carry, length).map_err(process::not_made)?;
                length += load.carry.len() as u64;
                self.rooms.extend(SendRoom::make(*new, load.carry.len())?.map(|room| (index, room)));
            }
        }
        if length == 0 {
            return Ok(());
        }
        let (tgid, lead) = self.blocks.first_mut().ok_or(Refusal::HolderVanished)?;
        let process = frozen.process(*tgid).ok_or(Refusal::HolderVanished)?;
        lead.carry(process, loads.iter().map(|load| load.carry.len()))
    }

    /// Open the gate, wait until the `new` sockets are in place, or until all processes have gone back by themselves.
    pub fn install(self, frozen: &mut Frozen, new: &[BorrowedFd<'_>]) -> Result<Installed, Refusal> {
        let Gear { gate, carried } = self.gear;
        fault::point(Point::Opening);
        gate.open()?;
        fault::point(Point::Opened);
        frozen.close_later(carried.into());
        let deadline = Instant::now() + INSTALL_TIME;
        // None: no process is left that could have them.
        let mut result = Err(Refusal::HolderVanished);
        for (tgid, block) in self.blocks {
            let done = match frozen.process(tgid) {
                Some(process) => block.finish(process, deadline),
                None => Err(Refusal::HolderVanished),
            };
            fault::point(Point::Finishing);
            if let Some(pair) = block.into_pair() {
                frozen.close_later(pair);
            }
            match done {
                // The process has ended.
                Err(Refusal::HolderVanished) => {}
                Ok(Done::Replaced { heard }) => result = Ok(Installed { heard }),
                Ok(Done::TurnedBack) => result = Err(Refusal::PeerAborted),
                // Its block is slow and goes to its end without us. What is past the gate cannot be called back.
                Err(reason) => {
                    log::warn!("process {}: its block did not end within {INSTALL_TIME:?}: {reason}", tgid.0);
                    result = Ok(Installed { heard: false });
                }
            }
        }
        give_back(self.rooms, new);
        fault::point(Point::Installed);
        result
    }

    /// Close the gate: every process is as it was, and the `new` sockets are.
    pub fn turn_back(self, frozen: &mut Frozen, new: &[BorrowedFd<'_>]) {
        self.gear.gate.close();
        for (tgid, block) in self.blocks {
            if let Some(process) = frozen.process(tgid) {
                // An error means that the process ended, or that its block comes back by itself after the thaw.
                let _ = block.finish(process, Instant::now() + RECOVERY);
            }
        }
        give_back(self.rooms, new);
    }
}

fn give_back(rooms: Vec<(usize, SendRoom)>, new: &[BorrowedFd<'_>]) {
    for (index, room) in rooms {
        room.give_back(new[index]);
    }
}

/// Wait, while nobody can read, until what the applications had not read is in their new sockets: a program that was told how
/// much there is must not find less.
pub fn wait_for_carried<'a>(
    new: impl Iterator<Item = (BorrowedFd<'a>, u64)>,
    inspector: &Inspector,
    deadline: Instant,
) {
    let waiting: Vec<_> = new.filter(|(_, unread)| *unread > 0).collect();
    let sockets: Vec<_> = waiting.iter().map(|(new, _)| *new).collect();
    let missing = || -> u64 {
        sockets.iter().copied().for_each(acknowledge);
        let looked = inspector.sockets(&sockets).unwrap_or_default();
        let arrived = looked.into_iter().map(|facts| facts.map_or(u64::MAX, |facts| facts.unread_bytes()));
        waiting.iter().zip(arrived).map(|((_, unread), arrived)| unread.saturating_sub(arrived)).sum()
    };
    let began = Instant::now();
    while missing() > 0 && Instant::now() < deadline {
        nap(began);
    }
}

/// The lead's end of a channel, or the one that all others have.
fn end_of(channel: &Option<(OwnedFd, OwnedFd)>, lead: bool) -> Option<BorrowedFd<'_>> {
    let (leads, others) = channel.as_ref()?;
    Some(if lead { leads.as_fd() } else { others.as_fd() })
}

/// The new sockets are in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// False: at a decider whose peer said nothing, neither that it has moved nor that it will not.
    pub heard: bool,
}

/// How long a lead waits for the other processes of its end.
const BARRIER_SECONDS: i64 = 1;

/// The lead's end, and the one of the others.
fn barrier() -> Result<(OwnedFd, OwnedFd), Refusal> {
    let (collects, tells) = channel()?;
    setsockopt(&collects, ReceiveTimeout, &TimeVal::seconds(BARRIER_SECONDS))
        .map_err(|_| Refusal::InjectionFailed)?;
    Ok((collects, tells))
}

/// Descriptors as they are, now that nobody changes them.
struct Live<'a> {
    frozen: &'a Frozen,
    inspector: &'a Inspector,
}

impl Live<'_> {
    fn fd(&self, table: &Table, fd: RemoteFd) -> Result<Option<FdFacts>, Refusal> {
        let process = self.frozen.processes().iter().find(|process| process.tgid == table.tgid);
        let process = process.ok_or(Refusal::HolderVanished)?;
        if let Some(facts) = process.seen.borrow().get(&fd) {
            return Ok(*facts);
        }
        let looked = self.inspector.fds(process.pidfd.as_fd(), &[fd]).map_err(cannot_look)?;
        let facts = looked.into_iter().next().flatten();
        process.seen.borrow_mut().insert(fd, facts);
        Ok(facts)
    }
}

impl Descriptors for Live<'_> {
    fn close_on_exec(&self, table: &Table, fd: RemoteFd) -> Result<bool, Refusal> {
        Ok(self.fd(table, fd)?.ok_or(Refusal::HolderVanished)?.close_on_exec)
    }

    fn epoll_at(&self, table: &Table, fd: RemoteFd) -> Option<u64> {
        self.fd(table, fd).ok().flatten()?.epoll
    }

    fn epoll_sets(&self, table: &Table) -> Result<Vec<RemoteFd>, Refusal> {
        process::epoll_sets(table.tid).map_err(process::lacking)
    }
}

/// What each frozen process has to do, its lead first. Those with nothing to replace only hold their threads.
fn plans(
    frozen: &Frozen,
    inspector: &Inspector,
    pairs: &[Substitution<'_>],
) -> Result<Vec<(Tgid, Plan)>, Refusal> {
    let mut tables: BTreeMap<u64, Plan> = BTreeMap::new();
    for (index, pair) in pairs.iter().enumerate() {
        plan(&mut tables, pair.holders, &pair.facts, index, &Live { frozen, inspector })?;
    }
    let mut plans: BTreeMap<Tgid, Plan> =
        frozen.processes().iter().map(|process| (process.tgid, Plan::default())).collect();
    let all_tables = || pairs.iter().flat_map(|pair| &pair.holders.tables);
    for (table, plan) in tables {
        let owner = all_tables().find(|of| of.table == table).ok_or(Refusal::HolderVanished)?;
        plans.insert(owner.tgid, plan);
    }
    let mut plans: Vec<(Tgid, Plan)> = plans.into_iter().collect();
    plans.sort_by_key(|(_, plan)| plan.replacements.is_empty());
    Ok(plans)
}

/// Not logged: something is frozen.
fn cannot_look(_: InspectError) -> Refusal {
    Refusal::InjectionFailed
}

#[cfg(test)]
mod tests;
