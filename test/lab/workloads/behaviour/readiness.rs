// SPDX-License-Identifier: Apache-2.0
//! Who is told that the socket is ready, and how often.

use std::{
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::null_mut,
    sync::atomic::{AtomicI32, AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Result, ensure};

use crate::{
    Behaviour, Left,
    Left::Usable,
    calls::speaks,
    tools::{
        Child, SPEECH, is_told, pipe, raw, receive, say, set_blocking, sys, unread, wait_for_line, write,
    },
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "epoll-level", subject: level, partner: speaks },
    Behaviour { name: "epoll-edge", subject: edge, partner: speaks },
    Behaviour { name: "epoll-edge-unread", subject: edge_with_unread_bytes, partner: speaks_twice },
    Behaviour { name: "epoll-oneshot-armed", subject: one_shot_armed, partner: speaks },
    Behaviour { name: "epoll-oneshot-fired", subject: one_shot_fired, partner: speaks_twice },
    Behaviour { name: "epoll-exclusive", subject: exclusive, partner: speaks },
    Behaviour { name: "epoll-nested", subject: nested, partner: speaks },
    Behaviour { name: "epoll-forked", subject: shared_over_fork, partner: speaks },
    Behaviour { name: "epoll-several", subject: several_sets::<5>, partner: speaks },
    Behaviour { name: "epoll-many", subject: several_sets::<17>, partner: speaks },
    Behaviour { name: "epoll-duplicate", subject: duplicate_registered, partner: speaks },
    Behaviour { name: "epoll-orphan", subject: closed_after_registration, partner: speaks },
    Behaviour { name: "epoll-elsewhere", subject: set_of_another_process, partner: speaks },
    Behaviour { name: "sigio", subject: sigio, partner: speaks },
    Behaviour { name: "sigio-descriptor", subject: sigio_with_descriptor, partner: speaks },
];

const IN: u32 = libc::EPOLLIN as u32;
const OUT: u32 = libc::EPOLLOUT as u32;
const EDGE: u32 = libc::EPOLLET as u32;
const ONE_SHOT: u32 = libc::EPOLLONESHOT as u32;
const EXCLUSIVE: u32 = libc::EPOLLEXCLUSIVE as u32;
/// All 64 bits of a registration's data come back.
const DATA: u64 = 0xfedc_ba98_7654_3210;

struct Set(OwnedFd);

impl Set {
    fn new() -> Result<Set> {
        // SAFETY: a new descriptor that is ours.
        Ok(Set(unsafe { OwnedFd::from_raw_fd(sys("epoll_create1", libc::epoll_create1(0))? as i32) }))
    }

    fn of(fd: &OwnedFd, events: u32) -> Result<Set> {
        let set = Set::new()?;
        set.control(libc::EPOLL_CTL_ADD, raw(fd), events)?;
        Ok(set)
    }

    fn control(&self, operation: i32, fd: i32, events: u32) -> Result<()> {
        let mut event = libc::epoll_event { events, u64: DATA };
        // SAFETY: the event lives through the call.
        sys("epoll_ctl", unsafe { libc::epoll_ctl(raw(&self.0), operation, fd, &raw mut event) }).map(drop)
    }

    /// The events of the one registration; zero when none comes within this time.
    fn wait(&self, milliseconds: i32) -> Result<u32> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: room for eight events.
        let ready = unsafe { libc::epoll_wait(raw(&self.0), events.as_mut_ptr(), 8, milliseconds) };
        let ready = sys("epoll_wait", ready)?;
        ensure!(ready <= 1, "{ready} events of one registration");
        let (happened, data) = (events[0].events, events[0].u64);
        ensure!(ready == 0 || data == DATA, "data {data:#x}");
        Ok(happened)
    }

    fn expect(&self, events: u32, milliseconds: i32) -> Result<()> {
        let happened = self.wait(milliseconds)?;
        ensure!(happened == events, "events {happened:#x}, {events:#x} expected");
        Ok(())
    }

    /// The registration is still there, under the same descriptor.
    fn forget(&self, fd: &OwnedFd) -> Result<()> {
        self.control(libc::EPOLL_CTL_MOD, raw(fd), IN)?;
        self.control(libc::EPOLL_CTL_DEL, raw(fd), 0)
    }
}

/// Waits in epoll_wait(2) until there is something to read.
pub fn wait_once(fd: &OwnedFd) -> Result<()> {
    Set::of(fd, IN)?.expect(IN, -1)
}

/// Until the state ends: looks all the time, and nothing may have happened.
fn expect_nothing(mut look: impl FnMut() -> Result<()>) -> Result<()> {
    while !is_told()? {
        look()?;
        std::thread::sleep(Duration::from_millis(1));
    }
    wait_for_line("leave")
}

fn speaks_twice(fd: OwnedFd) -> Result<Left> {
    write(&fd, &crate::tools::pattern(0, SPEECH))?;
    say("ready");
    wait_for_line("leave")?;
    write(&fd, &crate::tools::pattern(SPEECH, SPEECH))?;
    Ok(Usable(fd))
}

fn level(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN)?;
    say("ready");
    set.expect(IN, -1)?;
    set.expect(IN, 0)?;
    receive(&fd, 0, SPEECH)?;
    set.expect(0, 0)?;
    set.forget(&fd)?;
    Ok(Usable(fd))
}

fn edge(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN | EDGE)?;
    say("ready");
    set.expect(IN, -1)?;
    receive(&fd, 0, SPEECH)?;
    set.expect(0, 0)?;
    set.forget(&fd)?;
    Ok(Usable(fd))
}

/// An edge that was told, and not all of it read: another one comes with more bytes.
fn edge_with_unread_bytes(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN | EDGE)?;
    set.expect(IN, -1)?;
    receive(&fd, 0, 10)?;
    say("ready");
    wait_for_line("leave")?;
    // Registered anew, the set may tell the same bytes again: a wait may end without new ones, as epoll(7) says.
    set_blocking(&fd, false)?;
    let mut received = 10;
    while received < 2 * SPEECH {
        set.expect(IN, 5000)?;
        let mut byte = [0; 1];
        // SAFETY: room for one byte.
        while unsafe { libc::recv(raw(&fd), byte.as_mut_ptr().cast(), 1, 0) } == 1 {
            crate::tools::expect_pattern(&byte, received)?;
            received += 1;
        }
    }
    Ok(Usable(fd))
}

fn one_shot_armed(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN | ONE_SHOT)?;
    say("ready");
    set.expect(IN, -1)?;
    set.expect(0, 0)?;
    receive(&fd, 0, SPEECH)?;
    set.forget(&fd)?;
    Ok(Usable(fd))
}

fn one_shot_fired(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN | ONE_SHOT)?;
    set.expect(IN, -1)?;
    say("ready");
    expect_nothing(|| set.expect(0, 0))?;
    set.control(libc::EPOLL_CTL_MOD, raw(&fd), IN | ONE_SHOT)?;
    set.expect(IN, -1)?;
    receive(&fd, 0, 2 * SPEECH)?;
    set.forget(&fd)?;
    Ok(Usable(fd))
}

fn exclusive(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN | EXCLUSIVE)?;
    say("ready");
    set.expect(IN, -1)?;
    receive(&fd, 0, SPEECH)?;
    // An exclusive registration cannot be modified: epoll_ctl(2).
    ensure!(set.control(libc::EPOLL_CTL_MOD, raw(&fd), IN).is_err(), "it is exclusive no more");
    set.control(libc::EPOLL_CTL_DEL, raw(&fd), 0)?;
    Ok(Usable(fd))
}

fn nested(fd: OwnedFd) -> Result<Left> {
    let inner = Set::of(&fd, IN)?;
    let outer = Set::of(&inner.0, IN)?;
    say("ready");
    outer.expect(IN, -1)?;
    inner.expect(IN, 0)?;
    receive(&fd, 0, SPEECH)?;
    outer.expect(0, 0)?;
    Ok(Usable(fd))
}

fn shared_over_fork(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN)?;
    let child = Child::fork(|| set.expect(IN, -1))?;
    say("ready");
    set.expect(IN, -1)?;
    child.expect_success()?;
    receive(&fd, 0, SPEECH)?;
    set.forget(&fd)?;
    Ok(Usable(fd))
}

fn several_sets<const SETS: usize>(fd: OwnedFd) -> Result<Left> {
    let sets = (0..SETS).map(|_| Set::of(&fd, IN)).collect::<Result<Vec<_>>>()?;
    say("ready");
    for set in &sets {
        set.expect(IN, -1)?;
    }
    receive(&fd, 0, SPEECH)?;
    sets.iter().try_for_each(|set| set.forget(&fd))?;
    Ok(Usable(fd))
}

fn duplicate_registered(fd: OwnedFd) -> Result<Left> {
    let copy = fd.try_clone()?;
    let (set, other) = (Set::of(&fd, IN)?, Set::of(&copy, IN | OUT)?);
    say("ready");
    set.expect(IN, -1)?;
    other.expect(IN | OUT, 0)?;
    receive(&copy, 0, SPEECH)?;
    other.expect(OUT, 0)?;
    set.forget(&fd)?;
    other.forget(&copy)?;
    Ok(Usable(fd))
}

/// The registration lives as long as the open file does: epoll(7), question 6.
fn closed_after_registration(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN)?;
    let copy = fd.try_clone()?;
    drop(fd);
    say("ready");
    set.expect(IN, -1)?;
    receive(&copy, 0, SPEECH)?;
    Ok(Usable(copy))
}

/// A set that only a process has which does not have the socket.
fn set_of_another_process(fd: OwnedFd) -> Result<Left> {
    let set = Set::of(&fd, IN)?;
    let (told, tell) = pipe()?;
    let socket = raw(&fd);
    let child = Child::fork(|| {
        // SAFETY: the copy of this process, which does not use it.
        unsafe { libc::close(socket) };
        write(&tell, b"x")?;
        set.expect(IN, -1)
    })?;
    drop(set);
    crate::tools::read(&told, &mut [0])?;
    say("ready");
    child.expect_success()?;
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

static SIGNALS: AtomicU32 = AtomicU32::new(0);
static DESCRIPTOR: AtomicI32 = AtomicI32::new(-1);

extern "C" fn count(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    /// `si_band`, `si_fd` of the kernel's siginfo: not in the libc crate.
    #[repr(C)]
    struct Poll {
        head: [i32; 4],
        band: i64,
        fd: i32,
    }
    SIGNALS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel gives a handler with SA_SIGINFO a siginfo_t, of which this is the form for SIGIO.
    DESCRIPTOR.store(unsafe { (*info.cast::<Poll>()).fd }, Ordering::Relaxed);
}

fn sigio(fd: OwnedFd) -> Result<Left> {
    is_signalled(fd, libc::SIGIO)
}

/// With a signal of its own choice a program is told which descriptor is ready: F_SETSIG in fcntl(2).
fn sigio_with_descriptor(fd: OwnedFd) -> Result<Left> {
    is_signalled(fd, libc::SIGRTMIN() + 1)
}

fn is_signalled(fd: OwnedFd, signal: i32) -> Result<Left> {
    const F_SETSIG: i32 = 10;
    // SAFETY: the handler only stores; the rest are plain integers.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        sys("sigaction", libc::sigaction(signal, &raw const action, null_mut()))?;
        sys("F_SETOWN", libc::fcntl(raw(&fd), libc::F_SETOWN, libc::getpid()))?;
        if signal != libc::SIGIO {
            sys("F_SETSIG", libc::fcntl(raw(&fd), F_SETSIG, signal))?;
        }
        let flags = sys("F_GETFL", libc::fcntl(raw(&fd), libc::F_GETFL))? as i32;
        sys("F_SETFL", libc::fcntl(raw(&fd), libc::F_SETFL, flags | libc::O_ASYNC))?;
    }
    say("ready");
    wait_for_line("leave")?;
    // Who waits in a read gets no signal for what it waits for: sock_wake_async in net/socket.c.
    while unread(raw(&fd))? < SPEECH {
        std::thread::sleep(Duration::from_millis(1));
    }
    // More signals than one may be on their way.
    std::thread::sleep(Duration::from_millis(200));
    receive(&fd, 0, SPEECH)?;
    let (signals, descriptor) = (SIGNALS.load(Ordering::Relaxed), DESCRIPTOR.load(Ordering::Relaxed));
    ensure!(signals == 1, "{signals} signals for bytes that came once");
    ensure!(
        signal == libc::SIGIO || descriptor == fd.as_raw_fd(),
        "the signal is about descriptor {descriptor}, {} expected",
        fd.as_raw_fd()
    );
    // SAFETY: plain integers.
    unsafe { sys("F_SETFL", libc::fcntl(raw(&fd), libc::F_SETFL, 0)) }?;
    Ok(Usable(fd))
}
