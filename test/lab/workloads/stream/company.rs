// SPDX-License-Identifier: Apache-2.0
//! The threads and processes around the connection: they wait in many kinds of system calls, and none of these may
//! be cut short.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    ptr::null_mut,
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags},
        eventfd::EventFd,
        wait::{WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork, pipe},
};

use crate::{Fds, Shared, fail, transfer};

/// Memory that child processes share with us.
pub fn shared_memory() -> &'static Shared {
    // SAFETY: a fresh anonymous mapping of the right size, zeroed, which is a valid `Shared` (atomics only), page
    // aligned and never unmapped.
    unsafe {
        let memory = libc::mmap(
            null_mut(),
            size_of::<Shared>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if memory == libc::MAP_FAILED {
            fail!("mmap: {}", Errno::last());
        }
        &*memory.cast::<Shared>()
    }
}

/// Child processes that have the socket because they inherited it, and wait for the parent to let them go.
pub struct Holders {
    children: Vec<Pid>,
    leash: Option<OwnedFd>,
}

pub fn fork_holders(count: usize) -> Holders {
    if count == 0 {
        return Holders { children: Vec::new(), leash: None };
    }
    let (wait, leash) = pipe().unwrap_or_else(|error| fail!("pipe: {error}"));
    let mut children = Vec::new();
    for _ in 0..count {
        // SAFETY: no other thread exists yet.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                drop(leash);
                match nix::unistd::read(&wait, &mut [0]) {
                    Ok(0) => std::process::exit(0),
                    other => fail!("a child's read: {other:?}"),
                }
            }
            Ok(ForkResult::Parent { child }) => children.push(child),
            Err(error) => fail!("fork: {error}"),
        }
    }
    Holders { children, leash: Some(leash) }
}

/// Lets the holders go and looks how they fared.
pub fn release(holders: Holders) {
    drop(holders.leash);
    for child in holders.children {
        expect_success(child);
    }
}

/// A child process that does all the reading.
pub fn fork_reader(fds: &Fds, server: bool, shared: &Shared) -> Pid {
    // SAFETY: no other thread exists yet.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            transfer::read_to_the_end(fds, server, shared);
            std::process::exit(0)
        }
        Ok(ForkResult::Parent { child }) => child,
        Err(error) => fail!("fork: {error}"),
    }
}

pub fn expect_success(child: Pid) {
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, 0)) => (),
        other => fail!("child process: {other:?}"),
    }
}

/// Threads that have nothing to do with the connection.
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

/// A word that the threads which wait without time-out wait on.
static GATE: AtomicU32 = AtomicU32::new(0);
const SHORT: Duration = Duration::from_millis(30);

impl Threads {
    pub fn start(count: usize, idle: bool, shared: &'static Shared) -> Threads {
        let kinds: [fn(); 6] = [compute, sleep, futex, epoll, poll_nothing, || wait_on_futex(None)];
        let threads = (0..count)
            .map(|index| {
                // One that computes is enough to be stopped in user mode; more would only take the CPUs.
                let kind = if index == 0 && !idle { kinds[0] } else { kinds[1 + index % (kinds.len() - 1)] };
                std::thread::spawn(move || {
                    while !shared.finished.load(Ordering::Relaxed) {
                        kind();
                    }
                })
            })
            .collect();
        Threads { threads }
    }

    pub fn join(self) {
        GATE.store(1, Ordering::Relaxed);
        // SAFETY: GATE is a static word; FUTEX_WAKE only compares its address.
        unsafe { libc::syscall(libc::SYS_futex, GATE.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
        for thread in self.threads {
            if thread.join().is_err() {
                fail!("a thread panicked");
            }
        }
    }
}

fn compute() {
    let started = Instant::now();
    let mut random = crate::data::Random::new(1);
    while started.elapsed() < Duration::from_millis(1) {
        std::hint::black_box(random.next());
    }
    nanosleep(Duration::from_millis(4));
}

fn sleep() {
    nanosleep(SHORT);
}

/// Not std's: that one goes on after EINTR in silence.
pub fn nanosleep(time: Duration) {
    let time = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
    // SAFETY: a valid timespec; the remaining time is not asked for.
    let result = unsafe { libc::nanosleep(&raw const time, null_mut()) };
    if result != 0 {
        fail!("nanosleep: {}", Errno::last());
    }
}

fn futex() {
    wait_on_futex(Some(SHORT));
}

fn wait_on_futex(time: Option<Duration>) {
    let time = time.map(|time| libc::timespec { tv_sec: 0, tv_nsec: i64::from(time.subsec_nanos()) });
    let pointer = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: GATE is a static word and the time-out lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_futex, GATE.as_ptr(), libc::FUTEX_WAIT, 0, pointer) };
    match if result == 0 { Errno::UnknownErrno } else { Errno::last() } {
        // Woken, timed out, or the gate is open already.
        Errno::UnknownErrno | Errno::ETIMEDOUT | Errno::EAGAIN => (),
        error => fail!("futex: {error}"),
    }
}

fn epoll() {
    static SETUP: OnceLock<(Epoll, EventFd)> = OnceLock::new();
    let (epoll, _never) = SETUP.get_or_init(|| {
        let epoll =
            Epoll::new(EpollCreateFlags::empty()).unwrap_or_else(|error| fail!("epoll_create1: {error}"));
        let event = EventFd::new().unwrap_or_else(|error| fail!("eventfd: {error}"));
        epoll
            .add(event.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))
            .unwrap_or_else(|error| fail!("epoll_ctl: {error}"));
        (epoll, event)
    });
    match epoll.wait(&mut [EpollEvent::empty()], SHORT.as_millis() as u16) {
        Ok(0) => (),
        other => fail!("epoll_wait: {other:?}"),
    }
}

fn poll_nothing() {
    static EVENT: OnceLock<EventFd> = OnceLock::new();
    let event = EVENT.get_or_init(|| EventFd::new().unwrap_or_else(|error| fail!("eventfd: {error}")));
    debug_assert!(event.as_fd().as_raw_fd() >= 0);
    match poll(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], SHORT.as_millis() as u16) {
        Ok(0) => (),
        other => fail!("poll: {other:?}"),
    }
}
