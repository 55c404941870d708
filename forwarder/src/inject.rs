// SPDX-License-Identifier: Apache-2.0
//! Runs a table of system calls in a frozen process: sockets in, old ones out.
//!
//! Sequence, for one process (the *block* is the code described in [`crate::arch`]):
//! ```text
//! forwarder                                  block, in a borrowed thread of the process
//! write foothold data, start it              mmap scratch memory (first time only)
//! write the table of calls                   socketpair
//! copy one end of the pair, send the         close that end, recvmsg: gate, host sockets, carried bytes
//!   descriptors                              send "armed", wait at the gate (recv MSG_PEEK)
//! ...every process armed: one byte on the gate lets all go; closing it turns all back...
//!                                            epoll_ctl DEL, dup3, epoll_ctl ADD; sendfile(carried bytes)
//!                                            close all that was lent, send "done", wait a moment
//! stop it, put the registers back
//! ```
//! The gate is one socket shared by all processes of an end, so that one `send` decides for all of them, and a dead
//! forwarder is an end of file at the gate: every block turns back. After the byte, every block goes through to its
//! end without us. Invariants 4 and 8 of the design rest on this.

use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

use forwarder_api::Refusal;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        ptrace,
        socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair},
    },
    unistd::Pid,
};

use crate::{
    arch::{self, Call, Regs, scratch},
    freeze::{FrozenProcess, Stop, go_on, read_regs, wait_for_stop, write_regs},
    process::{self, RemoteAddr, RemoteFd, Tid},
};

/// Everything that is done to one descriptor table, after the gate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TablePlan {
    /// Registrations to take away before and to make again after.
    pub watchers: Vec<WatcherPlan>,
    pub replacements: Vec<Replacement>,
    /// This table's block sends the carried bytes (see [`Lend::carried`]), after everything else.
    pub carries: bool,
}

impl TablePlan {
    /// Is there room for it in a process's scratch memory?
    fn fits(&self, lend: &Lend<'_>) -> bool {
        /// All that there is once in each block: the pair, the report, the gate, and their ends.
        const FRAME: usize = 16;
        let descriptors = 1 + lend.sockets.len() + lend.carried.len();
        let calls = FRAME + 2 * descriptors + 2 * self.watchers.len() + self.replacements.len();
        calls <= scratch::MAX_CALLS
            && self.watchers.len() <= scratch::MAX_EVENTS
            && descriptors <= scratch::MAX_FDS
    }
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
    /// Index of the new socket.
    pub socket: usize,
}

/// What a process is lent for the time of the block.
pub struct Lend<'a> {
    pub sockets: &'a [BorrowedFd<'a>],
    pub carried: &'a [Carried<'a>],
}

/// A memory file whose bytes go into a new socket after the gate.
#[derive(Clone, Copy)]
pub struct Carried<'a> {
    pub file: BorrowedFd<'a>,
    pub length: usize,
    /// Index of the new socket.
    pub socket: usize,
}

/// The decision for all processes of an end: one byte lets all blocks go, dropping it turns all back.
pub struct Gate {
    decide: OwnedFd,
    wait: OwnedFd,
}

impl Gate {
    pub fn new() -> Result<Gate, Refusal> {
        let (decide, wait) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|_| Refusal::InjectionFailed)?;
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

/// Positions of the calls in the table.
const RECVMSG: usize = 2;

/// How a block ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// It went through the gate and replaced the descriptors.
    Replaced,
    /// It turned back at the gate, or before; the process is as it was.
    TurnedBack,
}

/// A block that runs, or waits, in a thread of a frozen process.
pub struct Block {
    tid: Tid,
    regs: Regs,
    mask: u64,
    foothold: crate::foothold::Foothold,
    /// Our end of the pair; `None` until the block has made it.
    pair: Option<OwnedFd>,
    calls: usize,
    gate: usize,
    first_replacement: usize,
    replacements: usize,
    /// The thread has left the place where it was frozen.
    started: bool,
}

impl Block {
    /// Start the block, up to the gate. An error leaves the process as it was.
    pub fn arm(
        process: &mut FrozenProcess,
        plan: &TablePlan,
        lend: &Lend<'_>,
        gate: &Gate,
        deadline: Instant,
    ) -> Result<Block, Refusal> {
        if !plan.fits(lend) {
            return Err(Refusal::TooManyDescriptors);
        }
        let lent = process.lend_thread();
        let (tid, regs) = (lent.tid, lent.regs);
        let mask = signal_mask(tid)?;
        let mut block = Block {
            tid,
            regs,
            mask,
            foothold: process.foothold,
            pair: None,
            calls: 0,
            gate: 0,
            first_replacement: 0,
            replacements: plan.replacements.len(),
            started: false,
        };
        match block.start(process, plan, lend, gate, deadline) {
            Ok(()) => Ok(block),
            Err(reason) => {
                // Without its pair's other end the block turns back by itself.
                block.pair = None;
                block.finish(process, deadline + RECOVERY)?;
                Err(reason)
            }
        }
    }

    fn start(
        &mut self,
        process: &mut FrozenProcess,
        plan: &TablePlan,
        lend: &Lend<'_>,
        gate: &Gate,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let vanished = |_| Refusal::HolderVanished;
        let scratch_at = process.foothold.scratch.map_or(0, |at| at.0);
        let data = arch::foothold_data(scratch_at, &self.regs, self.mask);
        process.memory.write(process.foothold.at, &data).map_err(vanished)?;
        // A container's seccomp filter does not know the block's calls. (EPERM: we are filtered ourselves, or the
        // kernel cannot; then the filter decides.)
        let options = ptrace::Options::PTRACE_O_TRACESYSGOOD
            | ptrace::Options::from_bits_retain(libc::PTRACE_O_SUSPEND_SECCOMP);
        let _ = ptrace::setoptions(Pid::from_raw(self.tid.0), options);
        set_signal_mask(self.tid, u64::MAX)?;
        write_regs(self.tid, arch::start_block(&self.regs, process.foothold.at.0))
            .map_err(|_| Refusal::HolderVanished)?;
        self.started = true;

        if process.foothold.scratch.is_none() {
            let made = self.step_over_syscall(deadline)?;
            if !(0..).contains(&made) {
                return Err(Refusal::InjectionFailed);
            }
            process.foothold.scratch = Some(RemoteAddr(made as u64));
            process
                .memory
                .write(RemoteAddr(process.foothold.at.0 + 8), &made.to_ne_bytes())
                .map_err(vanished)?;
        }
        self.foothold = process.foothold;
        let scratch_at = process.foothold.scratch.map_or(0, |at| at.0);
        let image = self.image(scratch_at, plan, lend);
        process.memory.write(RemoteAddr(scratch_at), &image).map_err(vanished)?;

        if self.step_over_syscall(deadline)? < 0 {
            return Err(Refusal::NoFreeDescriptor);
        }
        let mut pair = [0; 8];
        process.memory.read(RemoteAddr(scratch_at + scratch::PAIR), &mut pair).map_err(vanished)?;
        let theirs = RemoteFd(i32::from_ne_bytes([pair[4], pair[5], pair[6], pair[7]]));
        let ours = process::copy_fd(&process.pidfd, theirs).map_err(|_| Refusal::InjectionFailed)?;
        self.send_descriptors(&ours, lend, gate)?;
        self.pair = Some(ours);
        go_on(libc::PTRACE_CONT, self.tid, 0)?;
        self.wait_armed(lend, deadline)
    }

    /// From a stop before a system call: let it happen, and see its result.
    fn step_over_syscall(&self, deadline: Instant) -> Result<i64, Refusal> {
        for _ in ["entry", "exit"] {
            go_on(libc::PTRACE_SYSCALL, self.tid, 0)?;
            loop {
                match wait_for_stop(self.tid, deadline)? {
                    Stop::Syscall => break,
                    Stop::Interrupted | Stop::Group => go_on(libc::PTRACE_SYSCALL, self.tid, 0)?,
                    // SIGSTOP cannot be blocked. The stop takes effect at the thaw.
                    Stop::Signal(signal) => go_on(libc::PTRACE_SYSCALL, self.tid, signal)?,
                    Stop::Gone => return Err(Refusal::HolderVanished),
                }
            }
        }
        Ok(arch::syscall_result(&read_regs(self.tid).map_err(|_| Refusal::HolderVanished)?))
    }

    /// The contents of the scratch memory.
    fn image(&mut self, at: u64, plan: &TablePlan, lend: &Lend<'_>) -> Vec<u8> {
        let descriptors = 1 + lend.sockets.len() + lend.carried.len();
        let mut image = vec![0; scratch::CALLS as usize];
        let mut put = |offset: u64, bytes: &[u8]| {
            image[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        };
        // struct iovec { &BYTE, 1 }; struct msghdr { .., &IOVEC, 1, &CONTROL, length, .. }
        put(scratch::IOVEC, &(at + scratch::BYTE).to_ne_bytes());
        put(scratch::IOVEC + 8, &1u64.to_ne_bytes());
        put(scratch::MSGHDR + 16, &(at + scratch::IOVEC).to_ne_bytes());
        put(scratch::MSGHDR + 24, &1u64.to_ne_bytes());
        put(scratch::MSGHDR + 32, &(at + scratch::CONTROL).to_ne_bytes());
        put(scratch::MSGHDR + 40, &(16 + 4 * descriptors as u64).to_ne_bytes());
        // A descriptor that does not arrive is -1, never 0.
        put(scratch::PAIR, &[0xff; 8]);
        put(scratch::FDS, &[0xff; 4 * scratch::MAX_FDS]);
        for (index, watcher) in plan.watchers.iter().enumerate() {
            let event = scratch::EVENTS + 12 * index as u64;
            put(event, &watcher.events.to_ne_bytes());
            put(event + 4, &watcher.data.to_ne_bytes());
        }
        let calls = self.calls(at, plan, lend);
        self.calls = calls.len();
        for call in &calls {
            // SAFETY: Call is repr(C) without padding beyond its own field, made of integers.
            let bytes = unsafe {
                std::slice::from_raw_parts(std::ptr::from_ref(call).cast::<u8>(), size_of::<Call>())
            };
            image.extend_from_slice(bytes);
        }
        image.extend_from_slice(&[0; size_of::<Call>()]);
        image
    }

    fn calls(&mut self, at: u64, plan: &TablePlan, lend: &Lend<'_>) -> Vec<Call> {
        const FAR_END: u64 = scratch::PAIR + 4;
        let gate_fd = scratch::FDS;
        let socket_fd = |index: usize| scratch::FDS + 4 * (1 + index as u64);
        let carried_fd = |index: usize| socket_fd(lend.sockets.len() + index);
        let report = |calls: &[Call]| (calls.len() + 1) * size_of::<Call>() + scratch::CALLS as usize;

        let mut body = Vec::new();
        for watcher in &plan.watchers {
            let (epoll, fd) = (watcher.epoll.0 as u64, watcher.fd.0 as u64);
            body.push(Call::new(libc::SYS_epoll_ctl, &[epoll, libc::EPOLL_CTL_DEL as u64, fd, 0]));
        }
        let first_replacement = body.len();
        let registrations = 2 * plan.watchers.len();
        let carry = if plan.carries { lend.carried.len() } else { 0 };
        let clean = 5 + registrations + plan.replacements.len() + carry;
        for replacement in &plan.replacements {
            let flags = if replacement.close_on_exec { libc::O_CLOEXEC as u64 } else { 0 };
            body.push(
                Call::new(libc::SYS_dup3, &[0, replacement.fd.0 as u64, flags])
                    .indirect(0, socket_fd(replacement.socket))
                    // The carried bytes begin with the mark that says that all is in place: not if it is not.
                    .or_go_to(0, clean),
            );
        }
        for (index, watcher) in plan.watchers.iter().enumerate() {
            let (epoll, fd) = (watcher.epoll.0 as u64, watcher.fd.0 as u64);
            let event = at + scratch::EVENTS + 12 * index as u64;
            body.push(Call::new(libc::SYS_epoll_ctl, &[epoll, libc::EPOLL_CTL_ADD as u64, fd, event]));
        }

        let pair = || Call::new(libc::SYS_close, &[0]).indirect(0, scratch::PAIR);
        let end = clean + 1 + lend.sockets.len() + lend.carried.len() + 2;
        let seqpacket = (libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC) as u64;
        let mut calls = vec![
            Call::new(libc::SYS_socketpair, &[libc::AF_UNIX as u64, seqpacket, 0, at + scratch::PAIR])
                .or_go_to(0, end),
            Call::new(libc::SYS_close, &[0]).indirect(0, FAR_END),
            Call::new(libc::SYS_recvmsg, &[0, at + scratch::MSGHDR, libc::MSG_CMSG_CLOEXEC as u64])
                .indirect(0, scratch::PAIR)
                .or_go_to(1, clean),
            Call::new(libc::SYS_sendto, &[0, at, 0, libc::MSG_NOSIGNAL as u64, 0, 0])
                .indirect(0, scratch::PAIR)
                .or_go_to(0, clean),
            Call::new(libc::SYS_recvfrom, &[0, at + scratch::BYTE, 1, libc::MSG_PEEK as u64, 0, 0])
                .indirect(0, gate_fd)
                .or_go_to(1, clean),
        ];
        self.gate = calls.len() - 1;
        self.first_replacement = calls.len() + first_replacement;
        calls.append(&mut body);
        for (index, carried) in lend.carried.iter().take(carry).enumerate() {
            // Until the memory file is at its end. The exact length: a larger one would make sendfile(2) say
            // MSG_MORE, and TCP keep the last segment back for 200 ms.
            let again = calls.len();
            calls.push(
                Call::new(libc::SYS_sendfile, &[0, 0, 0, carried.length as u64])
                    .indirect(0, socket_fd(carried.socket))
                    .indirect(1, carried_fd(index))
                    .or_go_to(1, again + 1)
                    .then_go_to(again),
            );
        }
        calls.push(Call::new(libc::SYS_close, &[0]).indirect(0, gate_fd));
        for index in 0..lend.sockets.len() {
            calls.push(Call::new(libc::SYS_close, &[0]).indirect(0, socket_fd(index)));
        }
        for index in 0..lend.carried.len() {
            calls.push(Call::new(libc::SYS_close, &[0]).indirect(0, carried_fd(index)));
        }
        calls.push(
            Call::new(libc::SYS_sendto, &[0, at, 0, libc::MSG_NOSIGNAL as u64, 0, 0])
                .indirect(0, scratch::PAIR),
        );
        calls.push(pair());
        debug_assert_eq!(calls.len(), end);
        let length = report(&calls) as u64;
        for call in &mut calls {
            if call.number_plus_one == libc::SYS_sendto as u32 + 1 {
                call.args[2] = length;
            }
        }
        calls
    }

    fn send_descriptors(&self, pair: &OwnedFd, lend: &Lend<'_>, gate: &Gate) -> Result<(), Refusal> {
        let mut fds: Vec<RawFd> = vec![gate.wait.as_raw_fd()];
        fds.extend(lend.sockets.iter().map(AsRawFd::as_raw_fd));
        fds.extend(lend.carried.iter().map(|carried| carried.file.as_raw_fd()));
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(
            pair.as_raw_fd(),
            &[IoSlice::new(b"d")],
            &[ControlMessage::ScmRights(&fds)],
            flags,
            None,
        )
        .map(drop)
        .map_err(|_| Refusal::InjectionFailed)
    }

    fn wait_armed(&self, lend: &Lend<'_>, deadline: Instant) -> Result<(), Refusal> {
        let report = self.report(deadline)?.ok_or(Refusal::NoFreeDescriptor)?;
        if result(&report, RECVMSG) != Some(1) {
            return Err(Refusal::NoFreeDescriptor);
        }
        let arrived = 1 + lend.sockets.len() + lend.carried.len();
        let fds = &report[scratch::FDS as usize..][..4 * arrived];
        if fds.chunks_exact(4).any(|fd| fd == [0xff; 4]) {
            return Err(Refusal::NoFreeDescriptor);
        }
        Ok(())
    }

    /// What the block sends: its scratch memory. `None` once it has closed its end.
    fn report(&self, deadline: Instant) -> Result<Option<Vec<u8>>, Refusal> {
        let Some(pair) = &self.pair else { return Ok(None) };
        let mut fds = [PollFd::new(pair.as_fd(), PollFlags::POLLIN)];
        let left = deadline.saturating_duration_since(Instant::now()).as_millis() + 1;
        let left = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, left) {
            Ok(0) => return Err(Refusal::InjectionFailed),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return Err(Refusal::InjectionFailed),
        }
        let mut report = vec![0; arch::SCRATCH_LEN];
        let length = {
            let mut buffers = [IoSliceMut::new(&mut report)];
            let message = recvmsg::<()>(pair.as_raw_fd(), &mut buffers, None, MsgFlags::MSG_DONTWAIT)
                .map_err(|_| Refusal::InjectionFailed)?;
            message.bytes
        };
        report.truncate(length);
        Ok((length >= scratch::CALLS as usize).then_some(report))
    }

    /// After the gate was opened or closed: wait for the block's end and put the thread back where it was frozen.
    pub fn finish(self, process: &mut FrozenProcess, deadline: Instant) -> Result<Done, Refusal> {
        let mut done = Done::TurnedBack;
        while let Some(report) = self.report(deadline)? {
            let replaced = |index| result(&report, self.first_replacement + index).is_some_and(|fd| fd >= 0);
            if result(&report, self.gate) == Some(1) && (0..self.replacements).all(replaced) {
                done = Done::Replaced;
            }
        }
        let end = if self.started { self.stop_at_end(deadline)? } else { End::Waiting };
        let _ = ptrace::setoptions(Pid::from_raw(self.tid.0), ptrace::Options::PTRACE_O_TRACESYSGOOD);
        process.foothold = self.foothold;
        match end {
            End::Waiting => {
                set_signal_mask(self.tid, self.mask)?;
                write_regs(self.tid, self.regs).map_err(|_| Refusal::HolderVanished)?;
                process.lend_thread().give_back();
            }
            End::Left => process.take_back_thread()?,
        }
        Ok(done)
    }

    /// Stop the thread in the block's last wait.
    fn stop_at_end(&self, deadline: Instant) -> Result<End, Refusal> {
        let waited = self.foothold.at.0 + arch::waited_offset();
        let mut run = Duration::ZERO;
        loop {
            // The thread may stand in a stop that was seen already (an error before the gate): let it run first. And
            // really run: interrupted at once, it would stop again where it stands.
            let _ = go_on(libc::PTRACE_CONT, self.tid, 0);
            std::thread::sleep(run);
            run = STRIDE;
            let _ = ptrace::interrupt(Pid::from_raw(self.tid.0));
            match wait_for_stop(self.tid, deadline)? {
                Stop::Gone => return Err(Refusal::HolderVanished),
                Stop::Interrupted => {
                    let regs = read_regs(self.tid).map_err(|_| Refusal::HolderVanished)?;
                    if regs.rip == waited {
                        return Ok(End::Waiting);
                    }
                    if !self.foothold.is_in_block(regs.rip) {
                        return Ok(End::Left);
                    }
                }
                Stop::Signal(signal) => go_on(libc::PTRACE_CONT, self.tid, signal)?,
                Stop::Group | Stop::Syscall => {}
            }
        }
    }
}

/// Where a thread was found when its block was over.
enum End {
    /// In the block's last wait.
    Waiting,
    /// Outside: we came so late that the block had restored the thread by itself.
    Left,
}

/// What a thread needs at most to get from the last report of its block into its last wait.
const STRIDE: Duration = Duration::from_micros(50);

/// Extra time to bring a thread back after a deadline has passed.
pub const RECOVERY: Duration = Duration::from_millis(200);

fn result(report: &[u8], call: usize) -> Option<i64> {
    let at = scratch::CALLS as usize + call * size_of::<Call>() + std::mem::offset_of!(Call, result);
    let bytes = report.get(at..at + 8)?;
    bytes.try_into().ok().map(i64::from_ne_bytes)
}

fn signal_mask(tid: Tid) -> Result<u64, Refusal> {
    let mut mask = 0u64;
    // SAFETY: PTRACE_GETSIGMASK writes `addr` = 8 bytes to the place that `data` points to.
    let ret = unsafe { libc::ptrace(PTRACE_GETSIGMASK, tid.0, 8usize, &raw mut mask) };
    if ret < 0 { Err(Refusal::HolderVanished) } else { Ok(mask) }
}

fn set_signal_mask(tid: Tid, mask: u64) -> Result<(), Refusal> {
    // SAFETY: PTRACE_SETSIGMASK reads `addr` = 8 bytes from the place that `data` points to.
    let ret = unsafe { libc::ptrace(PTRACE_SETSIGMASK, tid.0, 8usize, &raw const mask) };
    if ret < 0 { Err(Refusal::HolderVanished) } else { Ok(()) }
}

/// ptrace(2), Linux 3.11; not in the libc crate.
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
