// SPDX-License-Identifier: Apache-2.0
//! Processes that are special: by what the kernel allows them, or by how they use it.

use std::{
    mem::{offset_of, zeroed},
    os::fd::{FromRawFd, OwnedFd},
    ptr::null_mut,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Result, ensure};

use crate::{
    Behaviour, Left,
    Left::{Over, Usable},
    calls::speaks,
    state::{answers, asks},
    tools::{SPEECH, expect_end, pattern, raw, receive, say, speak, sys, wait_for_line},
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "seccomp-strict", subject: strict, partner: speaks_and_listens },
    Behaviour { name: "seccomp-filter", subject: filtered, partner: speaks },
    Behaviour { name: "no-descriptors", subject: without_free_descriptors, partner: speaks },
    Behaviour { name: "alarms", subject: |fd| is_alarmed(fd, 0), partner: answers },
    Behaviour { name: "alternate-stack", subject: |fd| is_alarmed(fd, libc::SA_ONSTACK), partner: answers },
];

fn speaks_and_listens(fd: OwnedFd) -> Result<Left> {
    say("ready");
    wait_for_line("leave")?;
    speak(&fd, SPEECH)?;
    receive(&fd, 0, SPEECH)?;
    expect_end(&fd)?;
    Ok(Over)
}

/// Nothing but read, write, and the end of the thread: anything else kills the process.
fn strict(fd: OwnedFd) -> Result<Left> {
    let (expected, mut received) = (pattern(0, SPEECH), [0u8; SPEECH]);
    let socket = raw(&fd);
    // SAFETY: buffers that were made before; only read(2), write(2) and exit(2) from here on.
    unsafe {
        sys("PR_SET_SECCOMP", libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT))?;
        libc::write(1, c"ready\n".as_ptr().cast(), 6);
        let n = libc::read(socket, received.as_mut_ptr().cast(), SPEECH);
        let mut failed = n != SPEECH as isize || received[..] != expected[..];
        failed |= libc::write(socket, expected.as_ptr().cast(), SPEECH) != SPEECH as isize;
        libc::syscall(libc::SYS_exit, i32::from(failed));
    }
    Ok(Over)
}

const READ_WRITE_AND_END: [libc::c_long; 8] = [
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_shutdown,
    libc::SYS_munmap,
    libc::SYS_sigaltstack,
    libc::SYS_exit_group,
];

/// What this program needs itself is let through; anything else kills the process.
fn filtered(fd: OwnedFd) -> Result<Left> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let number = offset_of!(libc::seccomp_data, nr) as u32;
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, number)];
    // Memory is given and taken by brk, mmap and mremap, too.
    for call in READ_WRITE_AND_END.into_iter().chain([libc::SYS_brk, libc::SYS_mmap, libc::SYS_mremap]) {
        let code = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code, jt: 0, jf: 1, k: call as u32 });
        program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_KILL_PROCESS));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the call, which copies it.
    unsafe {
        sys("PR_SET_NO_NEW_PRIVS", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        sys(
            "PR_SET_SECCOMP",
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
        )?;
    }
    say("ready");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

/// RLIMIT_NOFILE is the number of the next descriptor: no more can be made.
fn without_free_descriptors(fd: OwnedFd) -> Result<Left> {
    // SAFETY: a new descriptor that is ours.
    let next = unsafe { OwnedFd::from_raw_fd(sys("dup", libc::dup(0))? as i32) };
    let limit = libc::rlimit { rlim_cur: raw(&next) as u64, rlim_max: raw(&next) as u64 };
    drop(next);
    // SAFETY: a valid limit.
    sys("setrlimit", unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    ensure!(fd.try_clone().is_err(), "there are free descriptors");
    say("ready");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

static ALARMS: AtomicU32 = AtomicU32::new(0);
static OFF_STACK: AtomicU32 = AtomicU32::new(0);
static STACK: AtomicU32 = AtomicU32::new(0);

const STACK_LENGTH: usize = 64 << 10;

extern "C" fn alarmed(_signal: i32) {
    ALARMS.fetch_add(1, Ordering::Relaxed);
    let here = 0u8;
    // Where the alternate stack is, in pages; zero if there is none.
    let stack = STACK.load(Ordering::Relaxed) as usize;
    let page = ((&raw const here) as usize >> 12) as u32 as usize;
    if stack != 0 && !(stack..stack + (STACK_LENGTH >> 12)).contains(&page) {
        OFF_STACK.fetch_add(1, Ordering::Relaxed);
    }
}

/// A signal every millisecond, in the middle of everything. With SA_RESTART no call ends because of it.
fn is_alarmed(fd: OwnedFd, more_flags: i32) -> Result<Left> {
    // SAFETY: the handler uses atomics only; the stack is never given back.
    unsafe {
        if more_flags & libc::SA_ONSTACK != 0 {
            let (read_write, private) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let memory = libc::mmap(null_mut(), STACK_LENGTH, read_write, private, -1, 0);
            ensure!(memory != libc::MAP_FAILED, "mmap");
            STACK.store((memory as usize >> 12) as u32, Ordering::Relaxed);
            let stack = libc::stack_t { ss_sp: memory, ss_flags: 0, ss_size: STACK_LENGTH };
            sys("sigaltstack", libc::sigaltstack(&raw const stack, null_mut()))?;
        }
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = alarmed as *const () as usize;
        action.sa_flags = libc::SA_RESTART | more_flags;
        sys("sigaction", libc::sigaction(libc::SIGALRM, &raw const action, null_mut()))?;
    }
    every(1000)?;
    let left = asks(fd)?;
    every(0)?;
    let (alarms, off) = (ALARMS.load(Ordering::Relaxed), OFF_STACK.load(Ordering::Relaxed));
    ensure!(alarms > 10, "only {alarms} signals came");
    ensure!(off == 0, "{off} signals were handled off the alternate stack");
    Ok(left)
}

fn every(microseconds: i64) -> Result<()> {
    let interval = libc::timeval { tv_sec: 0, tv_usec: microseconds };
    let timer = libc::itimerval { it_interval: interval, it_value: interval };
    // SAFETY: a valid timer; the old one is not asked for.
    sys("setitimer", unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, null_mut()) }).map(drop)
}
