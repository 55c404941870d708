// SPDX-License-Identifier: Apache-2.0
//! Freeze and thaw: every thread of every process that holds a socket stands still, and goes on later as if nothing
//! had been.
//!
//! PTRACE_SEIZE and PTRACE_INTERRUPT, so no signal is sent and no SIGCHLD reaches a parent. A [`Frozen`] belongs to
//! the thread that made it (ptrace answers no other), and thaws when it is dropped, whatever happens. Never
//! PTRACE_O_EXITKILL: if the forwarder dies, the kernel detaches every thread and each goes on by itself.
//!
//! What a stop does to a system call is undone here, at once and for every thread, also when the swap is given up
//! later: see [`crate::arch::interrupted`].
//!
//! While anything is frozen, nothing here waits for anybody but the kernel.

use std::{
    cell::RefCell,
    collections::HashMap,
    marker::PhantomData,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use forwarder_api::Refusal;
use nix::{errno::Errno, sys::ptrace, unistd::Pid};

use crate::{
    alarm::{Alarm, Alarms, Waits},
    arch::{self, Frame, Interrupted, Regs, Timed},
    child,
    fault::{self, Point},
    foothold::Foothold,
    inspect::FdFacts,
    process::{self, Memory, RemoteAddr, RemoteFd, Tgid, Tid},
    rseq,
};

/// One thread is looked at without a pause for so long.
const SPIN: Duration = Duration::from_micros(5);
/// Between two looks at what does not stand still yet: from the first to the last.
const FIRST_NAP: Duration = Duration::from_micros(5);
const LAST_NAP: Duration = Duration::from_millis(1);
/// So many threads are looked at whenever one of them has stopped.
const FEW: usize = 32;
/// How long a thread that did not stop in time is waited for, to be put right.
const LATE: Duration = Duration::from_secs(1);

/// A process all of whose threads stand still.
pub struct FrozenProcess {
    pub tgid: Tgid,
    pub pidfd: OwnedFd,
    pub memory: Memory,
    pub foothold: Foothold,
    /// Descriptors that were looked at: nobody changes them before the gate.
    pub seen: RefCell<HashMap<RemoteFd, Option<FdFacts>>>,
    threads: Vec<FrozenThread>,
}

struct FrozenThread {
    tid: Tid,
    /// What the thread goes on with.
    regs: Regs,
    /// Its own signal mask, while it is in a hold.
    held: Option<u64>,
}

/// A thread that was just found to stand still.
struct Standing {
    stop: Stop,
    /// None: killed meanwhile.
    regs: Option<Regs>,
}

/// Processes that stand still. Dropping it thaws them.
pub struct Frozen {
    processes: Vec<FrozenProcess>,
    /// Seized and perhaps not stopped yet: only while freezing, or after it failed.
    seized: HashMap<Tid, Tgid>,
    /// Ours, closed after the thaw: each takes 10 µs.
    leftovers: Vec<OwnedFd>,
    _here: PhantomData<*const ()>,
}

impl Frozen {
    /// Stop all threads of `tgids` before `deadline`. Their `alarms` were looked at just before.
    pub fn freeze(tgids: &[Tgid], alarms: &Alarms<'_>, deadline: Instant) -> Result<Frozen, Refusal> {
        let mut frozen = Frozen {
            processes: Vec::with_capacity(tgids.len()),
            seized: HashMap::new(),
            leftovers: Vec::new(),
            _here: PhantomData,
        };
        process::hurry();
        // From the first stop on until every thread is put right.
        let _outliving = child::outlive();
        let mut stopped = HashMap::new();
        if let Err(reason) = frozen.stop_all(tgids, &mut stopped, deadline) {
            frozen.give_up(tgids, alarms, stopped);
            return Err(reason);
        }
        fault::point(Point::Stopped);
        let mut refusal = None;
        // Every process is put right, also when another one makes the swap impossible.
        for tgid in tgids {
            match frozen.examine(*tgid, alarms, &stopped) {
                Ok(process) => frozen.processes.push(process),
                Err(reason) => refusal = Some(reason),
            }
        }
        fault::point(Point::Frozen);
        refusal.map_or(Ok(frozen), Err)
    }

    fn stop_all(
        &mut self,
        tgids: &[Tgid],
        stopped: &mut HashMap<Tid, Standing>,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        for tgid in tgids {
            self.seize_new_threads(*tgid)?;
        }
        // A thread that is not stopped yet may make another one: look again until all stand still and none is new.
        loop {
            self.wait_all_stopped(stopped, deadline)?;
            let mut new = 0;
            for tgid in tgids {
                new += self.seize_new_threads(*tgid)?;
            }
            if new == 0 {
                return Ok(());
            }
        }
    }

    /// Not all could be stopped: put right those who stand still and let them go, then those who are late. Each has
    /// been interrupted, and would see that.
    fn give_up(mut self, tgids: &[Tgid], alarms: &Alarms<'_>, mut stopped: HashMap<Tid, Standing>) {
        for patience in [Duration::ZERO, LATE] {
            let _ = self.wait_all_stopped(&mut stopped, Instant::now() + patience);
            for tgid in tgids {
                let _ = self.examine(*tgid, alarms, &stopped);
            }
            for (tid, _) in stopped.drain() {
                let _ = ptrace::detach(Pid::from_raw(tid.0), None);
                self.seized.remove(&tid);
            }
        }
    }

    pub fn processes(&self) -> &[FrozenProcess] {
        &self.processes
    }

    pub fn process(&mut self, tgid: Tgid) -> Option<&mut FrozenProcess> {
        self.processes.iter_mut().find(|process| process.tgid == tgid)
    }

    pub fn threads(&self) -> usize {
        self.processes.iter().map(|process| process.threads.len()).sum()
    }

    /// A descriptor of ours that is not needed any more.
    pub fn close_later(&mut self, fd: OwnedFd) {
        self.leftovers.push(fd);
    }

    fn seize_new_threads(&mut self, tgid: Tgid) -> Result<usize, Refusal> {
        let mut new = 0;
        for tid in process::threads(tgid).map_err(process::lacking)? {
            if self.seized.contains_key(&tid) {
                continue;
            }
            match ptrace::seize(Pid::from_raw(tid.0), ptrace::Options::PTRACE_O_TRACESYSGOOD) {
                Ok(()) => {}
                Err(error) => match (process::state(tgid, tid).map_err(process::lacking)?, error) {
                    // Gone, or a zombie: a leader that ended before its threads.
                    (None | Some('Z' | 'X'), _) => continue,
                    (Some(_), Errno::EPERM) => return Err(Refusal::HolderTraced),
                    (Some(_), _) => return Err(Refusal::HolderVanished),
                },
            }
            self.seized.insert(tid, tgid);
            fault::point(Point::Seizing);
            // ESRCH: it is ending; waiting for it will show that.
            let _ = ptrace::interrupt(Pid::from_raw(tid.0));
            new += 1;
        }
        Ok(new)
    }

    fn wait_all_stopped(
        &mut self,
        stopped: &mut HashMap<Tid, Standing>,
        deadline: Instant,
    ) -> Result<(), Refusal> {
        let began = Instant::now();
        loop {
            let waiting: Vec<Tid> =
                self.seized.keys().filter(|tid| !stopped.contains_key(tid)).copied().collect();
            if waiting.is_empty() {
                return Ok(());
            }
            let mut progress = false;
            for &tid in &waiting {
                match stop_of(tid) {
                    Some(Stop::Gone) => {
                        self.seized.remove(&tid);
                        progress = true;
                    }
                    // Deliver it; the thread then stops for us before it runs the handler.
                    Some(Stop::Signal(signal)) => {
                        go_on(libc::PTRACE_CONT, tid, signal)?;
                        progress = true;
                    }
                    Some(stop) => {
                        stopped.insert(tid, Standing { stop, regs: repeat_call_at_once(tid) });
                        progress = true;
                    }
                    None => {}
                }
            }
            if Instant::now() >= deadline {
                return Err(Refusal::FreezeBudget);
            }
            if progress {
                continue;
            }
            if waiting.len() <= FEW { child::doze(LAST_NAP) } else { nap(began) }
        }
    }

    /// All threads of this process stand still: see what the stop did to their system calls, and undo it.
    fn examine(
        &self,
        tgid: Tgid,
        alarms: &Alarms<'_>,
        stopped: &HashMap<Tid, Standing>,
    ) -> Result<FrozenProcess, Refusal> {
        let memory = Memory::open(tgid).map_err(process::lacking)?;
        let vdso = process::vdso(tgid).map_err(process::lacking)?.ok_or(Refusal::NoInjectionRoom)?;
        let mut process = FrozenProcess {
            tgid,
            pidfd: process::pidfd(tgid).map_err(process::lacking)?,
            foothold: Foothold { at: RemoteAddr(0), scratch: None, shelter: None },
            memory,
            seen: RefCell::default(),
            threads: Vec::new(),
        };
        let mut refusal = None;
        for tid in self.seized.iter().filter(|(_, of)| **of == tgid).map(|(tid, _)| *tid) {
            let Some(Standing { stop, regs }) = stopped.get(&tid) else {
                refusal = Some(Refusal::FreezeBudget);
                continue;
            };
            let Some(regs) = *regs else {
                refusal = Some(Refusal::HolderVanished);
                continue;
            };
            if !arch::is_64_bit(&regs) {
                return Err(Refusal::Holder32Bit);
            }
            if *stop != Stop::Interrupted {
                refusal = Some(Refusal::HolderStopped);
            }
            process.threads.push(FrozenThread { tid, regs, held: None });
        }
        if process.threads.is_empty() {
            return Err(Refusal::HolderVanished);
        }
        // A thread that waits in a system call is the first choice for the block.
        process.threads.sort_by_key(|thread| !arch::in_syscall(&thread.regs));
        process.foothold = Foothold::establish(&process.memory, vdso)?;
        let waits = alarms.of_stopped(tgid);
        for index in 0..process.threads.len() {
            // Every thread is put right, also when another one makes the swap impossible.
            if let Err(reason) = process.undo_interruption(index, Some(&waits)) {
                refusal = Some(reason);
            }
        }
        match refusal {
            None => Ok(process),
            Some(reason) => Err(reason),
        }
    }

    /// Let every thread go on. The same as dropping, by its name.
    pub fn thaw(self) -> Instant {
        drop(self);
        Instant::now()
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // A thread that has other registers than its own at this moment gets them back from the code that it stands in.
        for tid in self.seized.keys() {
            fault::point(Point::Thawing);
            // A thread that is not stopped yet cannot be detached here: the end of this tracer thread does it.
            let _ = ptrace::detach(Pid::from_raw(tid.0), None);
        }
    }
}

impl FrozenProcess {
    /// `waits`: unless the thread has run since they were looked at.
    fn undo_interruption(&mut self, index: usize, waits: Option<&Waits<'_>>) -> Result<(), Refusal> {
        let FrozenThread { tid, regs, .. } = self.threads[index];
        if self.foothold.is_in_block(regs.rip) {
            return Err(Refusal::HolderBusy);
        }
        if let Some(abort) = rseq::abort_of(tid, &self.memory, &regs) {
            let regs = arch::continue_at(&regs, abort);
            self.threads[index].regs = regs;
            return write_regs(tid, regs).map_err(|_| Refusal::HolderVanished);
        }
        let next = |at| {
            let mut bytes = [0; 2];
            self.memory.read(RemoteAddr(at), &mut bytes).ok().map(|()| bytes)
        };
        if arch::is_rewound(&regs, next) {
            return Ok(());
        }
        if let Some(resume) = self.wait_on(&self.threads[index], waits)? {
            return self.enter_resume(index, resume);
        }
        match arch::interrupted(&regs) {
            // A seccomp filter that allows the call may well kill for restart_syscall (OpenSSH's does).
            Interrupted::No if !(arch::goes_on_by_another_call(&regs) && self.is_filtered(waits, tid)) => {
                Ok(())
            }
            Interrupted::No | Interrupted::Call => {
                // At once, not at the thaw: if we die before, the thread must still see no EINTR.
                let regs = arch::repeat_call(&regs);
                self.threads[index].regs = regs;
                write_regs(tid, regs).map_err(|_| Refusal::HolderVanished)
            }
            Interrupted::Transfer(transfer)
                if transfer.dont_wait || !is_blocking(tid, RemoteFd(transfer.fd)) =>
            {
                Ok(())
            }
            Interrupted::Transfer(transfer) => {
                let (frame, read) =
                    (self.resume_frame(&regs)?, |at, count| self.read_words(RemoteAddr(at), count));
                match transfer.resume(&regs, self.foothold.at.0, frame, &read)? {
                    Some(resume) => self.enter_resume(index, resume),
                    None => Ok(()),
                }
            }
        }
    }

    /// How a thread goes on with a call that shall end when it would have ended without us, if that is known.
    fn wait_on(
        &self,
        FrozenThread { tid, regs, .. }: &FrozenThread,
        waits: Option<&Waits<'_>>,
    ) -> Result<Option<arch::Resume>, Refusal> {
        let Some(timed) = arch::timed(regs, self.foothold.is_in_resume(regs.rip)) else { return Ok(None) };
        let frame = self.resume_frame(regs)?;
        let alarm = match &frame {
            Some(frame) => frame.alarm().map(Alarm),
            None => waits
                .and_then(|waits| waits.alarm(*tid))
                .filter(|_| self.may_wait_for(timed, *tid, regs, waits)),
        };
        let resume =
            |alarm: Alarm| arch::resume_until(regs, timed, alarm.0, alarm.left(), self.foothold.at.0, frame);
        Ok(alarm.map(resume))
    }

    /// Where another call than the thread's own has to wait, it must come to the same, and no seccomp filter may kill
    /// for it.
    fn may_wait_for(&self, timed: Timed, tid: Tid, regs: &Regs, waits: Option<&Waits<'_>>) -> bool {
        timed != Timed::Receive
            || process::socket_inode(tid, RemoteFd(arch::descriptor(regs))).is_some()
                && !self.is_filtered(waits, tid)
    }

    fn is_filtered(&self, waits: Option<&Waits<'_>>, tid: Tid) -> bool {
        waits.map_or_else(|| process::is_filtered(self.tgid, tid), |waits| waits.is_filtered(tid))
    }

    /// The frame of a thread that stands in the resume code already.
    fn resume_frame(&self, regs: &Regs) -> Result<Option<Frame>, Refusal> {
        if !self.foothold.is_in_resume(regs.rip) {
            return Ok(None);
        }
        let words = self.read_words(RemoteAddr(regs.rsp), arch::FRAME_LEN / 8)?;
        Ok(Frame::read(regs.rsp, &words))
    }

    fn read_words(&self, at: RemoteAddr, count: usize) -> Result<Vec<u64>, Refusal> {
        let mut bytes = vec![0; 8 * count];
        self.memory.read(at, &mut bytes).map_err(|_| Refusal::HolderVanished)?;
        Ok(bytes
            .chunks_exact(8)
            .filter_map(|word| word.first_chunk().copied())
            .map(u64::from_le_bytes)
            .collect())
    }

    fn enter_resume(&mut self, index: usize, resume: arch::Resume) -> Result<(), Refusal> {
        for (at, words) in &resume.writes {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            self.memory.write(RemoteAddr(*at), &bytes).map_err(|_| Refusal::UnfinishedCall)?;
        }
        let tid = self.threads[index].tid;
        self.threads[index].regs = resume.regs;
        write_regs(tid, resume.regs).map_err(|_| Refusal::HolderVanished)
    }

    pub fn thread_count(&self) -> usize {
        self.threads.len()
    }

    /// The thread to run injected code in, and what it goes on with afterwards.
    pub fn lend_thread(&self) -> (Tid, Regs) {
        (self.threads[0].tid, self.threads[0].regs)
    }

    /// The lent thread came back by itself, ran on, and was stopped again: freeze it where it is now.
    pub fn take_back_thread(&mut self) -> Result<(), Refusal> {
        let thread = &mut self.threads[0];
        thread.regs = read_regs(thread.tid).map_err(|_| Refusal::HolderVanished)?;
        // What it does now was not looked at; a call that it goes on with has its alarm in the frame.
        self.undo_interruption(0, None)
    }

    /// Put every thread but the lent one into a hold of its own, to wait there, if we die, until the word at `over` is
    /// not zero.
    pub fn hold_other_threads(&mut self, over: u64) -> Result<(), Refusal> {
        let vanished = |_| Refusal::HolderVanished;
        let Some(shelter) = self.foothold.shelter else { return Ok(()) };
        let others = &mut self.threads[1..];
        let mut holds = Vec::with_capacity(others.len() * arch::hold_len());
        let mut masks = Vec::with_capacity(others.len());
        for thread in others.iter() {
            let mask = signal_mask(thread.tid)?;
            masks.push(mask);
            holds.extend(arch::hold(&thread.regs, mask, over));
        }
        self.memory.write(shelter.at, &holds).map_err(vanished)?;
        for (index, (thread, mask)) in others.iter_mut().zip(masks).enumerate() {
            let hold = shelter.at.0 + (index * arch::hold_len()) as u64;
            // The registers first: killed between the two, we leave a thread that waits with its own mask.
            fault::point(Point::Holding);
            write_regs(thread.tid, arch::enter_hold(&thread.regs, hold))
                .map_err(|_| Refusal::HolderVanished)?;
            thread.held = Some(mask);
            set_signal_mask(thread.tid, u64::MAX)?;
        }
        Ok(())
    }

    /// The block is over: every thread that is in a hold shall go on as it was frozen.
    pub fn release_other_threads(&mut self) -> Result<(), Refusal> {
        for thread in &mut self.threads[1..] {
            if let Some(mask) = thread.held.take() {
                fault::point(Point::Releasing);
                set_signal_mask(thread.tid, mask)?;
                write_regs(thread.tid, thread.regs).map_err(|_| Refusal::HolderVanished)?;
            }
        }
        Ok(())
    }
}

/// A thread that has just stopped must see no EINTR, not even if we die before all the others stand still. Its registers,
/// unless it was killed.
fn repeat_call_at_once(tid: Tid) -> Option<Regs> {
    let regs = read_regs(tid).ok()?;
    if !arch::is_64_bit(&regs) || arch::interrupted(&regs) != Interrupted::Call {
        return Some(regs);
    }
    let regs = arch::repeat_call(&regs);
    write_regs(tid, regs).ok()?;
    Some(regs)
}

fn is_blocking(tid: Tid, fd: RemoteFd) -> bool {
    process::open_flags(tid, fd).is_ok_and(|flags| flags & libc::O_NONBLOCK == 0)
}

/// Longer, the longer it takes: those that are waited for may need the very CPUs that we are on, and we go first.
pub fn next_nap(waiting_since: Instant) -> Duration {
    (waiting_since.elapsed() / 4).clamp(FIRST_NAP, LAST_NAP)
}

pub fn nap(waiting_since: Instant) {
    std::thread::sleep(next_nap(waiting_since));
}

/// How a seized thread was found by waitpid(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// By PTRACE_INTERRUPT.
    Interrupted,
    /// By job control: the whole process is stopped.
    Group,
    /// In a system call, at its entry or its exit.
    Syscall,
    /// This signal is about to be delivered to it.
    Signal(i32),
    /// It ended.
    Gone,
}

/// The stop that waits to be reported by this thread, if there is one.
pub fn stop_of(tid: Tid) -> Option<Stop> {
    let mut status = 0;
    // SAFETY: waitpid(2) writes an int to the given place. (nix's waitpid knows no real-time signals.)
    let ret = unsafe { libc::waitpid(tid.0, &mut status, libc::__WALL | libc::WNOHANG) };
    if ret == 0 {
        return None;
    }
    if ret < 0 || !libc::WIFSTOPPED(status) {
        return Some(Stop::Gone);
    }
    let signal = libc::WSTOPSIG(status);
    Some(match (signal, status >> 16) {
        (libc::SIGTRAP, libc::PTRACE_EVENT_STOP) => Stop::Interrupted,
        (_, libc::PTRACE_EVENT_STOP) => Stop::Group,
        (signal, _) if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        (signal, _) => Stop::Signal(signal),
    })
}

/// Let a stopped thread go on in the way that `request` (PTRACE_CONT or PTRACE_SYSCALL) says, with that signal.
pub fn go_on(request: libc::c_uint, tid: Tid, signal: i32) -> Result<(), Refusal> {
    // SAFETY: these two requests take no address, and the signal as data.
    let ret =
        unsafe { libc::ptrace(request, tid.0, std::ptr::null_mut::<libc::c_void>(), signal as libc::c_long) };
    if ret < 0 { Err(Refusal::HolderVanished) } else { Ok(()) }
}

/// Wait for the next stop of a thread.
pub fn wait_for_stop(tid: Tid, deadline: Instant) -> Result<Stop, Refusal> {
    let began = Instant::now();
    loop {
        match stop_of(tid) {
            Some(Stop::Gone) => return Err(Refusal::HolderVanished),
            Some(stop) => return Ok(stop),
            None => {}
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(Refusal::FreezeBudget);
        }
        if now.duration_since(began) > SPIN {
            child::doze(LAST_NAP);
        }
    }
}

fn tracee(tid: Tid) -> pete::Tracee {
    // pete's own tracer is not used (see ARCHITECTURE.md); its tracee reads and writes registers of any stopped
    // thread. The stop that it is told is not looked at for that.
    pete::Tracee::new(pete::Pid::from_raw(tid.0), None, pete::Stop::Attach)
}

pub fn read_regs(tid: Tid) -> Result<Regs, pete::Error> {
    tracee(tid).registers()
}

pub fn write_regs(tid: Tid, regs: Regs) -> Result<(), pete::Error> {
    tracee(tid).set_registers(regs)
}

pub fn signal_mask(tid: Tid) -> Result<u64, Refusal> {
    let mut mask = 0u64;
    // SAFETY: PTRACE_GETSIGMASK writes `addr` = 8 bytes to the place that `data` points to.
    let ret = unsafe { libc::ptrace(PTRACE_GETSIGMASK, tid.0, 8usize, &raw mut mask) };
    if ret < 0 { Err(Refusal::HolderVanished) } else { Ok(mask) }
}

pub fn set_signal_mask(tid: Tid, mask: u64) -> Result<(), Refusal> {
    // SAFETY: PTRACE_SETSIGMASK reads `addr` = 8 bytes from the place that `data` points to.
    let ret = unsafe { libc::ptrace(PTRACE_SETSIGMASK, tid.0, 8usize, &raw const mask) };
    if ret < 0 { Err(Refusal::HolderVanished) } else { Ok(()) }
}

/// ptrace(2), Linux 3.11; not in the libc crate.
const PTRACE_GETSIGMASK: libc::c_uint = 0x420a;
const PTRACE_SETSIGMASK: libc::c_uint = 0x420b;
