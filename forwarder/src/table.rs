// SPDX-License-Identifier: Apache-2.0
//! The table of system calls that a block runs in a process. Pure: what is to be done goes in, calls come out.
//!
//! ```text
//!   socketpair, recvmsg               the new and the old sockets, the gate, and whatever else is lent
//!   report; gate                      wait here until all processes are decided upon at once
//!   epoll_ctl DEL, dup3               the new sockets in the places of the old ones
//!   barrier                           the lead waits until all other processes have done the same
//!   sendfile                          the lead sends the carried bytes: nobody could write before them
//!   verdict                           see [`Verdict`]; without a good one, undo: dup3 the old sockets back
//!   epoll_ctl ADD
//!   close, "over", close              what was lent goes, the threads in their holds go on; the end of the pair reports
//! ```
//! From the gate on, no call needs the forwarder: killed at any moment, every process comes to the same end.

use std::ops::Range;

use crate::{
    arch::{Call, scratch},
    process::RemoteFd,
};

/// Everything that is done to one process, after the gate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Registrations to take away before and to make again after.
    pub watchers: Vec<WatcherPlan>,
    pub replacements: Vec<Replacement>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatcherPlan {
    pub epoll: RemoteFd,
    pub fd: RemoteFd,
    pub events: u32,
    pub data: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replacement {
    pub fd: RemoteFd,
    pub close_on_exec: bool,
    /// Index of the old socket and of the new one.
    pub socket: usize,
}

/// Where the decision comes from that the new sockets stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The lead says `C` on the witness, then all wait there for the peer's `I`: the end of the witness without it
    /// means that the peer has not moved, and never will.
    FromPeer(Silence),
    /// The lead decides for all processes of this end; then all say `I` on the witness.
    ToPeer,
    /// The lead decides, and nobody else needs to know: both ends are in these processes.
    Own,
}

/// What it means that nothing comes from the witness, neither a word nor its end: the routers cannot reach each other. The
/// peer was told to move, and may have heard it or not. But it resets the host connection when it leaves it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// The new connection is the host connection: after a reset the peer has gone back.
    AskNew,
    /// The old one is: without a reset the peer is still there.
    AskOld,
    /// The host path is dead, and nothing says that the peer has not moved.
    Keep,
}

/// A process's place among those of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rank {
    /// Sends the carried bytes and speaks for all.
    Lead {
        others: bool,
    },
    Other,
}

/// What is lent to a process, in the order in which it arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lent {
    /// Pairs of old and new sockets.
    pub sockets: usize,
    /// Is there a file of carried bytes (lead only), a barrier, does the lead's verdict go over a socket, is there a witness?
    pub carried: bool,
    pub barrier: bool,
    pub verdict: bool,
    pub witness: bool,
}

impl Lent {
    pub fn count(&self) -> usize {
        let flags = [self.carried, self.barrier, self.verdict, self.witness];
        // And the gate, which comes last: a process that has too few free descriptors does not pass it.
        2 * self.sockets + flags.iter().filter(|is| **is).count() + 1
    }

    /// Messages that they arrive in.
    pub fn parts(&self) -> usize {
        self.count().div_ceil(scratch::PART_FDS)
    }

    fn slot(index: usize) -> u64 {
        scratch::fd(index)
    }

    fn new_socket(&self, index: usize) -> u64 {
        Self::slot(index)
    }

    fn old_socket(&self, index: usize) -> u64 {
        Self::slot(self.sockets + index)
    }

    fn carried(&self) -> u64 {
        Self::slot(2 * self.sockets)
    }

    fn barrier(&self) -> u64 {
        Self::slot(2 * self.sockets + usize::from(self.carried))
    }

    fn verdict(&self) -> u64 {
        Self::slot(2 * self.sockets + usize::from(self.carried) + usize::from(self.barrier))
    }

    fn witness(&self) -> u64 {
        Self::slot(self.count() - 2)
    }

    fn gate(&self) -> u64 {
        Self::slot(self.count() - 1)
    }
}

/// The calls, and where in them to look for what came of it.
#[derive(Debug)]
pub struct Table {
    pub calls: Vec<Call>,
    /// What is lent arrives in these.
    pub receive: Range<usize>,
    /// Maps the shelter, if one was asked for.
    pub shelter: Option<usize>,
    /// Each sends what is carried to one connection: nothing, as long as [`Table::carry`] was not called.
    pub carry: Range<usize>,
    /// Made only if the new sockets stay.
    pub kept: usize,
    /// Where the peer's word on the witness is waited for: one byte if it has come.
    pub word: Option<Range<usize>>,
    /// Its result is not zero once the process is as it shall be.
    pub over: usize,
}

impl Table {
    /// For scratch memory at `at`. `shelter`: bytes to map for the holds of the other threads, zero if there are enough.
    pub fn new(at: u64, plan: &Plan, rank: Rank, verdict: Verdict, lent: &Lent, shelter: usize) -> Table {
        let (mut draft, undo, clean, end, kept) =
            (Draft::default(), Label::new(0), Label::new(1), Label::new(2), Label::new(3));
        let peek = |fd, flags: i32| {
            let flags = (libc::MSG_PEEK | flags) as u64;
            Call::new(libc::SYS_recvfrom, &[0, at + scratch::BYTE, 1, flags, 0, 0])
                .indirect(0, fd)
                .at_least(1)
        };
        let say = |fd, word: u64| {
            let flags = (libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) as u64;
            Call::new(libc::SYS_sendto, &[0, at + word, 1, flags, 0, 0]).indirect(0, fd).at_least(1)
        };
        // One byte, whichever: what came of the calls is in the scratch memory.
        let report = || {
            Call::new(libc::SYS_sendto, &[0, at + scratch::BYTE, 1, libc::MSG_NOSIGNAL as u64, 0, 0])
                .indirect(0, scratch::PAIR)
                .at_least(0)
        };
        let close = |fd| Call::new(libc::SYS_close, &[0]).indirect(0, fd);
        let mark = || Call::new(libc::SYS_getpid, &[]);

        let seqpacket = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        let pair = [libc::AF_UNIX as u64, seqpacket, 0, at + scratch::PAIR];
        draft.call(Call::new(libc::SYS_socketpair, &pair).at_least(0)).or(end);
        draft.call(close(scratch::PAIR + 4));
        let shelter = (shelter > 0).then(|| {
            let (access, kind) = (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let map = [0, shelter as u64, access as u64, kind as u64, u64::MAX, 0];
            draft.call(Call::new(libc::SYS_mmap, &map).at_least(0)).or(clean).index
        });
        let first = draft.calls.len();
        for part in 0..lent.parts() {
            let receive = [0, at + msghdr_at(part), libc::MSG_CMSG_CLOEXEC as u64];
            let receive = Call::new(libc::SYS_recvmsg, &receive).indirect(0, scratch::PAIR).at_least(1);
            draft.call(receive).or(clean);
        }
        let receive = first..draft.calls.len();
        draft.call(report()).or(clean);
        draft.call(peek(lent.gate(), 0)).or(clean);

        for watcher in &plan.watchers {
            let (epoll, fd) = (watcher.epoll.0 as u64, watcher.fd.0 as u64);
            draft.call(Call::new(libc::SYS_epoll_ctl, &[epoll, libc::EPOLL_CTL_DEL as u64, fd, 0]));
        }
        let put = |replacement: &Replacement, socket: u64| {
            let flags = if replacement.close_on_exec { libc::O_CLOEXEC as u64 } else { 0 };
            Call::new(libc::SYS_dup3, &[0, replacement.fd.0 as u64, flags]).indirect(0, socket).at_least(0)
        };
        for replacement in &plan.replacements {
            draft.call(put(replacement, lent.new_socket(replacement.socket))).or(undo);
        }
        match rank {
            Rank::Other => {
                draft.call(close(lent.barrier()));
            }
            Rank::Lead { others: true } => {
                // The end: all the others have closed it, or are dead. A word: one of them could not.
                draft.call(peek(lent.barrier(), 0).at_least(0)).or(undo);
                draft.call(peek(lent.barrier(), libc::MSG_DONTWAIT)).then(undo);
            }
            Rank::Lead { others: false } => {}
        }
        let first = draft.calls.len();
        for socket in 0..if lent.carried { lent.sockets } else { 0 } {
            let send = Call::new(libc::SYS_sendfile, &[0, 0, 0, 0]);
            let send = send.indirect(0, lent.new_socket(socket)).indirect(1, lent.carried());
            draft.call(send.at_least(0)).or(undo);
        }
        let carry = first..draft.calls.len();
        let word = draft.verdict(rank, verdict, lent, (undo, kept), &peek, &say);

        draft.place(undo);
        if lent.witness {
            // For all other processes of this end, and for the peer.
            let both = libc::SHUT_RDWR as u64;
            draft.call(Call::new(libc::SYS_shutdown, &[0, both]).indirect(0, lent.witness()));
        }
        if rank == Rank::Other {
            draft.call(say(lent.barrier(), scratch::WORDS));
        }
        for replacement in &plan.replacements {
            draft.call(put(replacement, lent.old_socket(replacement.socket)));
        }
        let rearm = Label::new(4);
        draft.call(mark()).then(rearm);
        draft.place(kept);
        let kept = draft.call(mark()).index;
        draft.place(rearm);
        for (index, watcher) in plan.watchers.iter().enumerate() {
            let (epoll, fd) = (watcher.epoll.0 as u64, watcher.fd.0 as u64);
            let event = at + scratch::EVENTS + 12 * index as u64;
            draft.call(Call::new(libc::SYS_epoll_ctl, &[epoll, libc::EPOLL_CTL_ADD as u64, fd, event]));
        }

        draft.place(clean);
        for index in 0..lent.count() {
            draft.call(close(Lent::slot(index)));
        }
        let over = draft.call(mark()).index;
        let wake = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
        draft.call(Call::new(libc::SYS_futex, &[at + result_at(over), wake as u64, i32::MAX as u64]));
        draft.call(close(scratch::PAIR));
        draft.place(end);
        Table { calls: draft.finish(), receive, shelter, carry, kept, word, over }
    }

    /// So many bytes go to each connection, in their order in the file. The calls that send them, changed.
    pub fn carry(&mut self, lengths: impl Iterator<Item = usize>) -> &[Call] {
        let calls = &mut self.calls[self.carry.clone()];
        for (call, length) in calls.iter_mut().zip(lengths) {
            // No more than there is: sendfile(2) would say MSG_MORE, and TCP keep the last segment back for 200 ms.
            call.args[3] = length as u64;
            call.least = length as i64;
        }
        calls
    }
}

/// Where in the scratch memory a call is.
pub fn call_at(call: usize) -> u64 {
    scratch::CALLS + (call * size_of::<Call>()) as u64
}

/// Where in the scratch memory the result of a call is.
pub fn result_at(call: usize) -> u64 {
    call_at(call) + std::mem::offset_of!(Call, result) as u64
}

/// Where in the scratch memory the `struct msghdr` of a part is.
pub fn msghdr_at(part: usize) -> u64 {
    scratch::MSGHDRS + scratch::MSGHDR_LEN * part as u64
}

/// Fails once the connection was reset: ENOTCONN, and EFAULT otherwise, because there is nowhere to write the answer to.
fn ask_for_peer(socket: u64) -> Call {
    let connected = -i64::from(libc::EFAULT);
    Call::new(libc::SYS_getpeername, &[0, 0, 0]).indirect(0, socket).at_least(connected)
}

/// A place in the table that calls go on to.
#[derive(Clone, Copy)]
struct Label(usize);

impl Label {
    const fn new(number: usize) -> Label {
        Label(number)
    }
}

/// A table in the making: labels are not places yet.
#[derive(Default)]
struct Draft {
    calls: Vec<Call>,
    places: [usize; 6],
    failures: Vec<(usize, Label)>,
    successes: Vec<(usize, Label)>,
}

/// A call that was just added.
struct Added<'a> {
    draft: &'a mut Draft,
    index: usize,
}

impl Added<'_> {
    /// Where to go when the call fails.
    fn or(self, label: Label) -> Self {
        self.draft.failures.push((self.index, label));
        self
    }

    /// Where to go when it succeeds.
    fn then(self, label: Label) -> Self {
        self.draft.successes.push((self.index, label));
        self
    }
}

impl Draft {
    fn call(&mut self, call: Call) -> Added<'_> {
        self.calls.push(call);
        Added { index: self.calls.len() - 1, draft: self }
    }

    fn place(&mut self, label: Label) {
        self.places[label.0] = self.calls.len();
    }

    /// Come to the verdict: go on to `kept`, or fall through to `undo`, which follows.
    fn verdict(
        &mut self,
        rank: Rank,
        verdict: Verdict,
        lent: &Lent,
        (undo, kept): (Label, Label),
        peek: &impl Fn(u64, i32) -> Call,
        say: &impl Fn(u64, u64) -> Call,
    ) -> Option<Range<usize>> {
        const COMMIT_WORD: u64 = scratch::WORDS;
        const INSTALLED_WORD: u64 = scratch::WORDS + 1;
        if let Verdict::FromPeer(silence) = verdict {
            if rank != Rank::Other {
                self.call(say(lent.witness(), COMMIT_WORD)).or(undo);
            }
            let first = self.calls.len();
            // Twice: SIGSTOP ends a wait that has a time-out.
            self.call(peek(lent.witness(), 0)).then(kept);
            self.call(peek(lent.witness(), 0)).then(kept);
            // Nothing within the time set on the witness, and not its end either.
            let silent = Label::new(5);
            self.call(peek(lent.witness(), libc::MSG_DONTWAIT).at_least(0)).or(silent);
            self.call(peek(lent.witness(), libc::MSG_DONTWAIT)).then(kept);
            let word = first..self.calls.len();
            self.call(Call::new(libc::SYS_getpid, &[])).then(undo);
            self.place(silent);
            match silence {
                Silence::AskNew => self.call(ask_for_peer(lent.new_socket(0))).then(kept).or(undo),
                Silence::AskOld => self.call(ask_for_peer(lent.old_socket(0))).then(undo).or(kept),
                Silence::Keep => self.call(Call::new(libc::SYS_getpid, &[])).then(kept),
            };
            return Some(word);
        }
        match rank {
            Rank::Lead { others: true } => {
                self.call(say(lent.verdict(), COMMIT_WORD)).or(undo);
            }
            Rank::Lead { others: false } => {}
            Rank::Other => {
                self.call(peek(lent.verdict(), 0)).or(undo);
            }
        }
        let last = match verdict {
            // Said by every process: one that is killed now has not moved in vain. (An error: the peer is dead.)
            Verdict::ToPeer => say(lent.witness(), INSTALLED_WORD).at_least(i64::MIN),
            Verdict::FromPeer(_) | Verdict::Own => Call::new(libc::SYS_getpid, &[]),
        };
        self.call(last).then(kept);
        None
    }

    fn finish(mut self) -> Vec<Call> {
        for (call, label) in self.failures {
            self.calls[call].on_failure = self.places[label.0] as u16 + 1;
        }
        for (call, label) in self.successes {
            self.calls[call].on_success = self.places[label.0] as u16 + 1;
        }
        self.calls
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCHED: WatcherPlan = WatcherPlan { epoll: RemoteFd(9), fd: RemoteFd(5), events: 1, data: 7 };

    /// Descriptors of the slots, in their order.
    const NEW: u64 = 0;
    const OLD: u64 = 1;

    fn table(rank: Rank, verdict: Verdict) -> (Table, Lent) {
        let plan = Plan {
            watchers: vec![WATCHED],
            replacements: vec![Replacement { fd: RemoteFd(5), close_on_exec: false, socket: 0 }],
        };
        let others = rank != Rank::Lead { others: false };
        let lent = Lent {
            sockets: 1,
            carried: rank != Rank::Other,
            barrier: others,
            verdict: others && !matches!(verdict, Verdict::FromPeer(_)),
            witness: verdict != Verdict::Own,
        };
        let mut table = Table::new(0x1000, &plan, rank, verdict, &lent, 0);
        table.carry([1].into_iter());
        (table, lent)
    }

    /// What a block would do if its calls came to what `result` says: the calls made, as (number, first argument).
    fn run(table: &Table, result: impl Fn(i64, u64) -> i64) -> Vec<(i64, u64)> {
        let (mut made, mut at) = (Vec::new(), 0);
        while let Some(call) = table.calls.get(at) {
            let number = i64::from(call.number_plus_one) - 1;
            assert!(made.len() < 1000, "it never ends");
            let result = result(number, call.args[0]);
            made.push((number, call.args[0]));
            let next = if result < call.least { call.on_failure } else { call.on_success };
            at = if next == 0 { at + 1 } else { usize::from(next) - 1 };
        }
        made
    }

    /// Everything works, and everybody says the best.
    fn well(lent: &Lent) -> impl Fn(i64, u64) -> i64 {
        let barrier = lent.barrier.then(|| lent.barrier());
        move |number, first| if number == libc::SYS_recvfrom && Some(first) == barrier { 0 } else { 1 }
    }

    fn position(made: &[(i64, u64)], call: (i64, u64)) -> Option<usize> {
        made.iter().position(|made| *made == call)
    }

    const ALL: [(Rank, Verdict); 9] = {
        let (alone, lead) = (Rank::Lead { others: false }, Rank::Lead { others: true });
        [
            (alone, Verdict::FromPeer(Silence::AskNew)),
            (lead, Verdict::FromPeer(Silence::AskOld)),
            (Rank::Other, Verdict::FromPeer(Silence::Keep)),
            (alone, Verdict::ToPeer),
            (lead, Verdict::ToPeer),
            (Rank::Other, Verdict::ToPeer),
            (alone, Verdict::Own),
            (lead, Verdict::Own),
            (Rank::Other, Verdict::Own),
        ]
    };

    #[test]
    fn every_block_keeps_the_new_sockets_when_all_is_well_and_closes_what_was_lent() {
        for (rank, verdict) in ALL {
            let (table, lent) = table(rank, verdict);
            let made = run(&table, well(&lent));
            let puts = made.iter().filter(|(number, _)| *number == libc::SYS_dup3).collect::<Vec<_>>();
            assert_eq!(puts, [&(libc::SYS_dup3, Lent::slot(NEW as usize))], "{rank:?} {verdict:?}");
            for index in 0..lent.count() {
                assert!(made.contains(&(libc::SYS_close, Lent::slot(index))), "{rank:?} {verdict:?} {index}");
            }
            assert_eq!(made.last(), Some(&(libc::SYS_close, scratch::PAIR)));
        }
    }

    #[test]
    fn a_closed_gate_leaves_every_descriptor_alone() {
        for (rank, verdict) in ALL {
            let (table, lent) = table(rank, verdict);
            let gate = lent.gate();
            let made =
                run(&table, |number, first| i64::from(!(number == libc::SYS_recvfrom && first == gate)));
            let touched = [libc::SYS_dup3, libc::SYS_epoll_ctl, libc::SYS_sendfile, libc::SYS_shutdown];
            assert!(!made.iter().any(|(number, _)| touched.contains(number)), "{rank:?} {verdict:?}");
            assert!(made.contains(&(libc::SYS_futex, 0x1000 + result_at(table.over))));
        }
    }

    #[test]
    fn a_witness_that_ends_brings_the_old_sockets_back_and_their_registrations() {
        for rank in [Rank::Lead { others: false }, Rank::Lead { others: true }, Rank::Other] {
            let (table, lent) = table(rank, Verdict::FromPeer(Silence::AskNew));
            let (witness, well) = (lent.witness(), well(&lent));
            let made = run(&table, |number, first| {
                if number == libc::SYS_recvfrom && first == witness { 0 } else { well(number, first) }
            });
            let puts: Vec<u64> =
                made.iter().filter(|(number, _)| *number == libc::SYS_dup3).map(|(_, from)| *from).collect();
            assert_eq!(puts, [NEW, OLD].map(|slot| Lent::slot(slot as usize)), "{rank:?}");
            let registrations = made.iter().filter(|(number, _)| *number == libc::SYS_epoll_ctl).count();
            assert_eq!(registrations, 2);
        }
    }

    #[test]
    fn a_silent_witness_leaves_it_to_the_host_connection_which_the_peer_has_reset_if_it_left_it() {
        for (silence, reset, keeps) in [
            (Silence::AskNew, false, true),
            (Silence::AskNew, true, false),
            (Silence::AskOld, false, false),
            (Silence::AskOld, true, true),
            (Silence::Keep, false, true),
            (Silence::Keep, true, true),
        ] {
            let (table, lent) = table(Rank::Lead { others: false }, Verdict::FromPeer(silence));
            let witness = lent.witness();
            let made = run(&table, |number, first| match number {
                libc::SYS_recvfrom if first == witness => -i64::from(libc::EAGAIN),
                libc::SYS_getpeername => -i64::from(if reset { libc::ENOTCONN } else { libc::EFAULT }),
                _ => 1,
            });
            let puts = made.iter().filter(|(number, _)| *number == libc::SYS_dup3).count();
            assert_eq!(puts, if keeps { 1 } else { 2 }, "{silence:?}, reset: {reset}");
        }
    }

    #[test]
    fn a_descriptor_that_cannot_be_replaced_tells_the_other_processes_and_the_peer() {
        let (table, lent) = table(Rank::Other, Verdict::ToPeer);
        let made = run(&table, |number, _| if number == libc::SYS_dup3 { -1 } else { 1 });
        assert!(made.contains(&(libc::SYS_shutdown, lent.witness())));
        assert!(made.contains(&(libc::SYS_sendto, lent.barrier())));
        assert!(!made.contains(&(libc::SYS_sendto, lent.witness())));
    }

    #[test]
    fn a_lead_sends_the_carried_bytes_when_all_have_replaced_and_speaks_only_then() {
        for verdict in [Verdict::FromPeer(Silence::AskNew), Verdict::ToPeer] {
            let (table, lent) = table(Rank::Lead { others: true }, verdict);
            let made = run(&table, well(&lent));
            let places = [
                (libc::SYS_dup3, Lent::slot(NEW as usize)),
                (libc::SYS_recvfrom, lent.barrier()),
                (libc::SYS_sendfile, Lent::slot(NEW as usize)),
                (libc::SYS_sendto, lent.witness()),
            ]
            .map(|call| position(&made, call));
            assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{verdict:?} {places:?}");
            // One that could not: nothing is sent.
            let made = run(&table, |_, _| 1);
            assert_eq!(position(&made, (libc::SYS_sendfile, Lent::slot(NEW as usize))), None);
        }
    }
}
