// SPDX-License-Identifier: Apache-2.0
//! Restartable sequences (rseq(2)): a thread that is interrupted in one must go on at its abort handler.
//!
//! The kernel sees to that when the thread returns to user mode, by its instruction pointer. A thread that is lent to a
//! block, or waits in a hold, returns elsewhere, and the kernel forgets the sequence: so the abort is done here.

use crate::{
    arch::{Regs, user_position},
    process::{Memory, RemoteAddr, Tid},
};

/// `struct ptrace_rseq_configuration` of linux/ptrace.h.
#[repr(C)]
#[derive(Default)]
struct Configuration {
    area: u64,
    size: u32,
    signature: u32,
    flags: u32,
    padding: u32,
}

/// ptrace(2), Linux 5.13; not in the libc crate.
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// Of `struct rseq` in linux/rseq.h: the address of the sequence that the thread is in.
const RSEQ_CS: u64 = 8;

/// Where a stopped thread must go on, if it stands within a restartable sequence.
pub fn abort_of(tid: Tid, memory: &Memory, regs: &Regs) -> Option<u64> {
    let position = user_position(regs)?;
    let area = area_of(tid)?;
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read(RemoteAddr(at), &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let sequence = word(area + RSEQ_CS).filter(|at| *at != 0)?;
    // struct rseq_cs: version and flags, start, length, abort handler.
    let (start, length, abort) = (word(sequence + 8)?, word(sequence + 16)?, word(sequence + 24)?);
    (position.wrapping_sub(start) < length).then_some(abort)
}

fn area_of(tid: Tid) -> Option<u64> {
    let mut configuration = Configuration::default();
    let size = size_of::<Configuration>();
    // SAFETY: PTRACE_GET_RSEQ_CONFIGURATION writes at most `addr` bytes to the place that `data` points to.
    let ret = unsafe { libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid.0, size, &raw mut configuration) };
    (ret > 0 && configuration.area != 0).then_some(configuration.area)
}
