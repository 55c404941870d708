// SPDX-License-Identifier: Apache-2.0
//! Runs a table of system calls in a frozen process: sockets in, old ones out.
//!
//! Sequence, for one process (the *block* is the code described in [`crate::arch`], its calls are in [`crate::table`]):
//! ```text
//! forwarder                                  block, in a borrowed thread of the process
//! write foothold data, start it              mmap scratch memory (first time only)
//! write the table of calls                   socketpair
//! copy one end of the pair, send the         close that end, recvmsg: sockets, carried bytes, gate
//!   descriptors                              send "armed", wait at the gate (recv MSG_PEEK)
//! put the other threads into their holds
//! ...every process armed: one byte on the gate lets all go; closing it turns all back...
//!                                            replace, carry, come to a verdict
//!                                            close all that was lent and its end of the pair, wait a moment
//! stop it, put the registers back, the other threads' too
//! ```
//! The gate is one socket shared by all processes of an end, so that one `send` decides for all of them, and a dead
//! forwarder is an end of file at the gate: every block turns back. After the byte, every block goes through to its
//! end without us, and no other thread runs before. Invariants 4 and 8 of the design rest on this.

use std::{
    io::IoSlice,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use forwarder_api::Refusal;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::{
        ptrace,
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair},
    },
    unistd::Pid,
};

use crate::{
    arch::{self, Call, Regs, scratch},
    child,
    fault::{self, Point},
    foothold::{Foothold, Shelter},
    freeze::{
        FrozenProcess, Stop, go_on, nap, read_regs, set_signal_mask, signal_mask, stop_of, wait_for_stop,
        write_regs,
    },
    process::{self, RemoteAddr, RemoteFd, Tgid, Tid, copy_fd, not_made},
    table::{Lent, Plan, Rank, Table, Verdict, WatcherPlan, call_at, msghdr_at, result_at},
    transaction::Word,
};

/// What a process is lent for the time of the block.
pub struct Lend<'a> {
    pub rank: Rank,
    pub verdict: Verdict,
    pub new: &'a [BorrowedFd<'a>],
    pub old: &'a [BorrowedFd<'a>],
    /// The lead's alone: a file that is filled later, see [`Block::carry`].
    pub carried: Option<BorrowedFd<'a>>,
    /// Where the lead waits for the others, or they tell it.
    pub barrier: Option<BorrowedFd<'a>>,
    /// Where the lead gives its verdict, or they wait for it.
    pub ruling: Option<BorrowedFd<'a>>,
    pub witness: Option<BorrowedFd<'a>>,
}

impl Lend<'_> {
    fn lent(&self) -> Lent {
        Lent {
            sockets: self.new.len(),
            carried: self.carried.is_some(),
            barrier: self.barrier.is_some(),
            verdict: self.ruling.is_some(),
            witness: self.witness.is_some(),
        }
    }

    /// In the order that [`Lent`] knows.
    fn descriptors(&self, gate: &Gate) -> Vec<RawFd> {
        let sockets = self.new.iter().chain(self.old);
        let others = self.carried.iter().chain(&self.barrier).chain(&self.ruling).chain(&self.witness);
        let lent = sockets.chain(others);
        lent.map(AsRawFd::as_raw_fd).chain([gate.wait.as_raw_fd()]).collect()
    }
}

/// The decision for all processes of an end: one byte lets all blocks go, dropping it turns all back.
pub struct Gate {
    decide: OwnedFd,
    wait: OwnedFd,
}

impl Gate {
    pub fn new() -> Result<Gate, Refusal> {
        let (decide, wait) = channel()?;
        Ok(Gate { decide, wait })
    }

    /// Let all blocks go, for good.
    pub fn open(self) -> Result<(), Refusal> {
        match nix::sys::socket::send(
            self.decide.as_raw_fd(),
            b"g",
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
        ) {
            Ok(_) => Ok(()),
            Err(_) => Err(Refusal::InjectionFailed),
        }
    }

    /// Turn all blocks back.
    pub fn close(self) {}
}

/// Two ends that blocks speak and wait on.
pub fn channel() -> Result<(OwnedFd, OwnedFd), Refusal> {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).map_err(not_made)
}

/// How a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It went through the gate and replaced the descriptors. `heard`: the peer's word came, where one was waited for.
    Replaced { heard: bool },
    /// It turned back at the gate, or before or after; the process is as it was.
    TurnedBack,
}

/// A block that runs, or waits, in a thread of a frozen process.
pub struct Block {
    tid: Tid,
    regs: Regs,
    mask: u64,
    foothold: Foothold,
    /// Our end of the pair; `None` until the block has made it.
    pair: Option<OwnedFd>,
    table: Option<Table>,
    /// The thread has left the place where it was frozen.
    started: bool,
}

impl Block {
    /// Start the block, up to the gate, and put the other threads into their holds. After an error, too, the block must
    /// be finished, once the gate is closed; the process is then as it was.
    pub fn arm(
        process: &mut FrozenProcess,
        plan: &Plan,
        lend: &Lend<'_>,
        gate: &Gate,
        deadline: Instant,
    ) -> (Block, Result<(), Refusal>) {
        let (tid, regs) = process.lend_thread();
        let foothold = process.foothold;
        let mut block = Block { tid, regs, mask: 0, foothold, pair: None, table: None, started: false };
        let armed = block.start(process, plan, lend, gate, deadline);
        if armed.is_err() {
            // A block that waits for descriptors turns back by itself.
            block.pair = None;
        }
        (block, armed)
    }

    fn start(
        &mut self,
        process: &mut FrozenProcess,
        plan: &Plan,
        lend: &Lend<'_>,
        gate: &Gate,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let vanished = |_| Refusal::HolderVanished;
        self.mask = signal_mask(self.tid)?;
        let data = process.foothold.data(&self.regs, self.mask);
        process.memory.write(process.foothold.at, &data).map_err(vanished)?;
        // A container's seccomp filter does not know the block's calls. (EPERM: we are filtered ourselves, or the
        // kernel cannot; then the filter decides.)
        let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
            | ptrace::Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP);
        let _ = ptrace::setoptions(Pid::from_raw(self.tid.0), options);
        // The registers first: were we killed between the two, the block would still give the thread its mask back.
        write_regs(self.tid, arch::start_block(&self.regs, process.foothold.at.0))
            .map_err(|_| Refusal::HolderVanished)?;
        self.started = true;
        fault::point(Point::Started);
        set_signal_mask(self.tid, u64::MAX)?;

        if process.foothold.scratch.is_none() {
            let made = self.step_over_syscall(deadline)?;
            if !(0..).contains(&made) {
                return Err(Refusal::InjectionFailed);
            }
            process.foothold.scratch = Some(RemoteAddr(made as u64));
            self.note_foothold(process)?;
        }
        let scratch_at = process.foothold.scratch.map_or(0, |at| at.0);
        let (shelter, lent) = (process.foothold.shelter_missing(process.thread_count() - 1), lend.lent());
        let table = Table::new(scratch_at, plan, lend.rank, lend.verdict, &lent, shelter);
        if table.calls.len() >= scratch::MAX_CALLS
            || plan.watchers.len() > scratch::MAX_EVENTS
            || lent.count() > scratch::MAX_FDS
        {
            return Err(Refusal::TooManyDescriptors);
        }
        for (at, bytes) in [
            (0, head(scratch_at, lent.count())),
            (scratch::EVENTS, events(plan)),
            (scratch::CALLS, calls(&table.calls)),
        ] {
            process.memory.write(RemoteAddr(scratch_at + at), &bytes).map_err(vanished)?;
        }
        let (receive, shelter_call, over) = (table.receive.clone(), table.shelter, table.over);
        self.table = Some(table);

        if self.step_over_syscall(deadline)? < 0 {
            return Err(Refusal::NoFreeDescriptor);
        }
        let mut pair = [0; 8];
        process.memory.read(RemoteAddr(scratch_at + scratch::PAIR), &mut pair).map_err(vanished)?;
        let theirs = RemoteFd(i32::from_ne_bytes([pair[4], pair[5], pair[6], pair[7]]));
        let ours = copy_fd(&process.pidfd, theirs).map_err(not_made)?;
        for part in lend.descriptors(gate).chunks(scratch::PART_FDS) {
            send_descriptors(&ours, part)?;
        }
        self.pair = Some(ours);
        fault::point(Point::Lent);
        go_on(libc::PTRACE_CONT, self.tid, 0)?;
        self.wait_armed(process, receive, lent.count(), deadline)?;
        if let Some(call) = shelter_call {
            let at = result(process, call).filter(|at| *at > 0).ok_or(Refusal::InjectionFailed)?;
            process.foothold.shelter = Some(Shelter { at: RemoteAddr(at as u64), length: shelter });
            self.note_foothold(process)?;
        }
        process.hold_other_threads(scratch_at + result_at(over))
    }

    /// Another forwarder shall find what belongs to the foothold.
    fn note_foothold(&mut self, process: &FrozenProcess) -> Result<(), Refusal> {
        self.foothold = process.foothold;
        let data = process.foothold.data(&self.regs, self.mask);
        process.memory.write(process.foothold.at, &data).map_err(|_| Refusal::HolderVanished)
    }

    /// From a stop before a system call: let it happen, and see its result.
    fn step_over_syscall(&self, deadline: Instant) -> Result<i64, Refusal> {
        for _ in ["entry", "exit"] {
            go_on(libc::PTRACE_SYSCALL, self.tid, 0)?;
            loop {
                match wait_for_stop(self.tid, deadline)? {
                    Stop::Syscall => break,
                    stop => self.go_on_from(stop, libc::PTRACE_SYSCALL)?,
                }
            }
        }
        Ok(arch::syscall_result(&read_regs(self.tid).map_err(|_| Refusal::HolderVanished)?))
    }

    fn wait_armed(
        &self,
        process: &FrozenProcess,
        receive: Range<usize>,
        lent: usize,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let reported = self.wait_for_report(deadline)?;
        let received = receive.clone().all(|call| result(process, call) == Some(1));
        let mut fds = vec![0; receive.len() * scratch::CONTROL_LEN as usize];
        scratch_memory(process, scratch::CONTROLS, &mut fds).ok_or(Refusal::HolderVanished)?;
        let fd = |index: usize| &fds[(scratch::fd(index) - scratch::CONTROLS) as usize..][..4];
        if reported && received && (0..lent).all(|index| fd(index) != [0xff; 4]) {
            Ok(())
        } else {
            Err(Refusal::NoFreeDescriptor)
        }
    }

    /// Our end of the pair, once the block is over.
    pub fn into_pair(self) -> Option<OwnedFd> {
        self.pair
    }

    /// Until the block has something to tell, in its scratch memory. False once it has closed its end.
    fn wait_for_report(&self, deadline: Instant) -> Result<bool, Refusal> {
        let Some(pair) = &self.pair else { return Ok(false) };
        let mut fds = [PollFd::new(pair.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, STOPPED_FOR_MS) {
                Ok(0) if Instant::now() >= deadline => return Err(Refusal::FreezeBudget),
                Ok(0) => {
                    if let Some(stop) = stop_of(self.tid) {
                        self.go_on_from(stop, libc::PTRACE_CONT)?;
                    }
                }
                Err(Errno::EINTR) => {}
                Ok(_) => break,
                Err(_) => return Err(Refusal::InjectionFailed),
            }
        }
        let length = recv(pair.as_raw_fd(), &mut [0], MsgFlags::MSG_DONTWAIT);
        length.map(|length| length > 0).map_err(|_| Refusal::InjectionFailed)
    }

    /// From a stop that is not ours: a signal that cannot be blocked (SIGSTOP, which takes effect at the thaw), or the end
    /// of a stop (SIGCONT).
    fn go_on_from(&self, stop: Stop, request: libc::c_uint) -> Result<(), Refusal> {
        match stop {
            Stop::Gone => Err(Refusal::HolderVanished),
            Stop::Signal(signal) => go_on(request, self.tid, signal),
            Stop::Interrupted | Stop::Group | Stop::Syscall => go_on(request, self.tid, 0),
        }
    }

    /// While the block waits at the gate: after it, so many bytes of the lent file go to each new socket.
    pub fn carry(
        &mut self,
        process: &FrozenProcess,
        lengths: impl Iterator<Item = usize>,
    ) -> Result<(), Refusal> {
        let (Some(table), Some(scratch)) = (&mut self.table, process.foothold.scratch) else {
            return Err(Refusal::HolderVanished);
        };
        let at = RemoteAddr(scratch.0 + call_at(table.carry.start));
        process.memory.write(at, bytes_of(table.carry(lengths))).map_err(|_| Refusal::HolderVanished)
    }

    /// After the gate was opened or closed: wait for the block's end and put the threads back where they were frozen.
    pub fn finish(&self, process: &mut FrozenProcess, deadline: Instant) -> Result<Done, Refusal> {
        if !self.started {
            return Ok(Done::TurnedBack);
        }
        while self.wait_for_report(deadline)? {}
        let done = self.table.as_ref().map_or(Done::TurnedBack, |table| how_it_ended(process, table));
        // A thread that has left by itself is stopped wherever it is.
        let _outliving = child::outlive();
        let end = self.stop_at_end(process.tgid, deadline)?;
        let _ = ptrace::setoptions(Pid::from_raw(self.tid.0), ptrace::Options::PTRACE_O_TRACESYSGOOD);
        match end {
            End::InBlock => {
                set_signal_mask(self.tid, self.mask)?;
                fault::point(Point::Restoring);
                write_regs(self.tid, self.regs).map_err(|_| Refusal::HolderVanished)?;
            }
            End::Left => process.take_back_thread()?,
        }
        process.release_other_threads()?;
        Ok(done)
    }

    /// The thread's stop, if it stands in one that nobody has seen. From one that was seen (an error before the gate, a look
    /// too early) it goes on.
    fn stop_by_itself(&self) -> Option<Stop> {
        // ptrace(2) answers for a thread that stands still, and for no other.
        signal_mask(self.tid).ok()?;
        let stop = stop_of(self.tid);
        if stop.is_none() {
            let _ = go_on(libc::PTRACE_CONT, self.tid, 0);
        }
        stop
    }

    /// Until the thread waits for something, or for so long.
    fn let_run(&self, tgid: Tgid, time: Duration) {
        let began = Instant::now();
        while began.elapsed() < time {
            nap(began);
            if !matches!(process::state(tgid, self.tid), Ok(Some('R'))) {
                break;
            }
        }
    }

    /// Stop the thread when its block has made its last call.
    fn stop_at_end(&self, tgid: Tgid, deadline: Instant) -> Result<End, Refusal> {
        let waited = self.foothold.at.0 + arch::waited_offset();
        // That call closed its end of the pair, which we have seen.
        let is_over = self.pair.is_some();
        let mut run = Duration::ZERO;
        loop {
            let stop = match self.stop_by_itself() {
                Some(stop) => stop,
                None => {
                    if !is_over {
                        // Really run: interrupted at once, it would stop again where it stands.
                        self.let_run(tgid, run);
                        run = (2 * run).clamp(STRIDE, LONGEST_STRIDE);
                    }
                    // Interrupted as well, one that has stopped for a signal would stop once more when it goes on, each
                    // time, and get nowhere.
                    match stop_of(self.tid) {
                        Some(stop) => stop,
                        None => {
                            let _ = ptrace::interrupt(Pid::from_raw(self.tid.0));
                            wait_for_stop(self.tid, deadline)?
                        }
                    }
                }
            };
            match stop {
                Stop::Interrupted => {
                    let regs = read_regs(self.tid).map_err(|_| Refusal::HolderVanished)?;
                    if !self.foothold.is_in_block(regs.rip) {
                        return Ok(End::Left);
                    }
                    if is_over || regs.rip == waited {
                        return Ok(End::InBlock);
                    }
                }
                stop => self.go_on_from(stop, libc::PTRACE_CONT)?,
            }
        }
    }
}

/// Where a thread was found when its block was over.
enum End {
    /// In its block, which has nothing left to do but to put it back.
    InBlock,
    /// Outside: we came so late that the block had restored the thread by itself.
    Left,
}

/// Between two looks whether a thread that is to run the block was stopped, milliseconds.
const STOPPED_FOR_MS: u8 = 1;

/// What a thread needs to get from the last report of its block into its last wait; doubled if it did not get there.
const STRIDE: Duration = Duration::from_micros(10);

/// And where many others want to run: a thread that is interrupted before its turn has come gets nowhere.
const LONGEST_STRIDE: Duration = Duration::from_secs(1);

/// Extra time to bring a thread back after a deadline has passed.
pub const RECOVERY: Duration = Duration::from_millis(200);

fn how_it_ended(process: &FrozenProcess, table: &Table) -> Done {
    if result(process, table.kept).is_none_or(|result| result == 0) {
        return Done::TurnedBack;
    }
    let came = |calls: Range<usize>| calls.into_iter().any(|call| result(process, call) == Some(1));
    Done::Replaced { heard: table.word.clone().is_none_or(came) }
}

/// What a call of the block came to. None: the process has ended.
fn result(process: &FrozenProcess, call: usize) -> Option<i64> {
    let mut result = [0; 8];
    scratch_memory(process, result_at(call), &mut result)?;
    Some(i64::from_ne_bytes(result))
}

fn scratch_memory(process: &FrozenProcess, at: u64, bytes: &mut [u8]) -> Option<()> {
    let scratch = process.foothold.scratch?;
    process.memory.read(RemoteAddr(scratch.0 + at), bytes).ok()
}

/// The beginning of the scratch memory at `at`, for so many lent descriptors.
fn head(at: u64, lent: usize) -> Vec<u8> {
    let parts = lent.div_ceil(scratch::PART_FDS);
    let mut head = vec![0; (scratch::CONTROLS + parts as u64 * scratch::CONTROL_LEN) as usize];
    // A descriptor that does not arrive is -1, never 0.
    head[scratch::CONTROLS as usize..].fill(0xff);
    let mut put = |offset: u64, bytes: &[u8]| {
        head[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
    };
    // struct iovec { &BYTE, 1 }
    put(scratch::IOVEC, &(at + scratch::BYTE).to_ne_bytes());
    put(scratch::IOVEC + 8, &1u64.to_ne_bytes());
    for part in 0..parts {
        // struct msghdr { .., &IOVEC, 1, &control, length, .. }
        let (header, control) = (msghdr_at(part), scratch::CONTROLS + scratch::CONTROL_LEN * part as u64);
        let fds = (lent - part * scratch::PART_FDS).min(scratch::PART_FDS) as u64;
        put(header + 16, &(at + scratch::IOVEC).to_ne_bytes());
        put(header + 24, &1u64.to_ne_bytes());
        put(header + 32, &(at + control).to_ne_bytes());
        put(header + 40, &(scratch::CONTROL_HEAD + 4 * fds).to_ne_bytes());
    }
    put(scratch::WORDS, &[Word::Commit.byte(), Word::Installed.byte()]);
    put(scratch::PAIR, &[0xff; 8]);
    head
}

fn events(plan: &Plan) -> Vec<u8> {
    let event = |watcher: &WatcherPlan| {
        let (events, data) = (watcher.events.to_ne_bytes(), watcher.data.to_ne_bytes());
        events.into_iter().chain(data)
    };
    plan.watchers.iter().flat_map(event).collect()
}

/// The table, and a call of number zero, which ends it.
fn calls(table: &[Call]) -> Vec<u8> {
    [bytes_of(table), &[0; size_of::<Call>()]].concat()
}

fn bytes_of(calls: &[Call]) -> &[u8] {
    // SAFETY: Call is repr(C) without padding beyond its own field, made of integers.
    unsafe { std::slice::from_raw_parts(calls.as_ptr().cast::<u8>(), size_of_val(calls)) }
}

fn send_descriptors(pair: &OwnedFd, fds: &[RawFd]) -> Result<(), Refusal> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(pair.as_raw_fd(), &[IoSlice::new(b"d")], &[ControlMessage::ScmRights(fds)], flags, None)
        .map(drop)
        .map_err(|_| Refusal::InjectionFailed)
}
