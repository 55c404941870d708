// SPDX-License-Identifier: Apache-2.0
//! Calls that wait until the socket is ready, for ever or for a time.

use std::{
    mem::zeroed,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr::{null, null_mut},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{
    Behaviour, Left,
    Left::Usable,
    calls::speaks,
    tools::{SPEECH, expect_lasted, raw, receive, say, sys, wait_for_line},
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "poll", subject: |fd| readable(fd, poll), partner: speaks },
    Behaviour { name: "ppoll", subject: |fd| readable(fd, ppoll), partner: speaks },
    Behaviour { name: "select", subject: |fd| readable(fd, select), partner: speaks },
    Behaviour { name: "pselect", subject: |fd| readable(fd, pselect), partner: speaks },
    Behaviour { name: "epoll-wait", subject: |fd| readable(fd, epoll_wait), partner: speaks },
    Behaviour { name: "epoll-pwait2", subject: |fd| readable(fd, epoll_pwait2), partner: speaks },
    Behaviour { name: "poll-time", subject: |fd| times_out(fd, poll), partner: waits },
    Behaviour { name: "ppoll-time", subject: |fd| times_out(fd, ppoll), partner: waits },
    Behaviour { name: "select-time", subject: |fd| times_out(fd, select), partner: waits },
    Behaviour { name: "pselect-time", subject: |fd| times_out(fd, pselect), partner: waits },
    Behaviour { name: "epoll-wait-time", subject: |fd| times_out(fd, epoll_wait), partner: waits },
    Behaviour { name: "epoll-pwait2-time", subject: |fd| times_out(fd, epoll_pwait2), partner: waits },
    Behaviour { name: "recv-time", subject: recv_timeout, partner: waits },
];

pub const TIME: Duration = Duration::from_secs(2);

/// The state is the other side's matter.
pub fn waits(fd: OwnedFd) -> Result<Left> {
    say("ready");
    wait_for_line("leave")?;
    Ok(Usable(fd))
}

/// A call that waits for bytes on this socket, for ever or for a time, and returns how many are ready.
type Wait = fn(RawFd, Option<Duration>) -> i32;

fn readable(fd: OwnedFd, wait: Wait) -> Result<Left> {
    say("ready");
    let ready = sys("the wait", wait(raw(&fd), None))?;
    ensure!(ready == 1, "{ready} descriptors are ready");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

fn times_out(fd: OwnedFd, wait: Wait) -> Result<Left> {
    say("ready");
    let started = Instant::now();
    let ready = sys("the wait", wait(raw(&fd), Some(TIME)))?;
    expect_lasted(started, TIME)?;
    ensure!(ready == 0, "{ready} descriptors are ready");
    say("over");
    Ok(Usable(fd))
}

pub fn timespec(time: Duration) -> libc::timespec {
    libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

/// A pointer to the time, or none.
fn pointer<T>(time: &Option<T>) -> *const T {
    time.as_ref().map_or(null(), std::ptr::from_ref)
}

fn milliseconds(time: Option<Duration>) -> i32 {
    time.map_or(-1, |time| time.as_millis() as i32)
}

fn poll(fd: RawFd, time: Option<Duration>) -> i32 {
    let mut fds = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd.
    unsafe { libc::poll(&raw mut fds, 1, milliseconds(time)) }
}

fn ppoll(fd: RawFd, time: Option<Duration>) -> i32 {
    let mut fds = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let time = time.map(timespec);
    // SAFETY: one pollfd, a time or none, no signal mask.
    unsafe { libc::ppoll(&raw mut fds, 1, pointer(&time), null()) }
}

fn set_of(fd: RawFd) -> libc::fd_set {
    // SAFETY: an empty set is all zeros, and `fd` is below FD_SETSIZE in these small programs.
    unsafe {
        let mut set = zeroed();
        libc::FD_SET(fd, &raw mut set);
        set
    }
}

fn select(fd: RawFd, time: Option<Duration>) -> i32 {
    let mut set = set_of(fd);
    let mut time = time.map(|time| libc::timeval { tv_sec: time.as_secs() as i64, tv_usec: 0 });
    let time = time.as_mut().map_or(null_mut(), std::ptr::from_mut);
    // SAFETY: one set, a time or none.
    unsafe { libc::select(fd + 1, &raw mut set, null_mut(), null_mut(), time) }
}

fn pselect(fd: RawFd, time: Option<Duration>) -> i32 {
    let mut set = set_of(fd);
    let time = time.map(timespec);
    // SAFETY: one set, a time or none, no signal mask.
    unsafe { libc::pselect(fd + 1, &raw mut set, null_mut(), null_mut(), pointer(&time), null()) }
}

/// The data of the registration, which must come back.
const DATA: u64 = 0x0123_4567_89ab_cdef;

/// An epoll set with one registration.
fn epoll_of(fd: RawFd) -> OwnedFd {
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: DATA };
    // SAFETY: a new descriptor that is ours; the event lives through the call.
    unsafe {
        let epoll = OwnedFd::from_raw_fd(libc::epoll_create1(0));
        libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event);
        epoll
    }
}

/// A wrong event counts as many ready descriptors.
fn checked(ready: i32, event: libc::epoll_event) -> i32 {
    let (events, data) = (event.events, event.u64);
    if ready == 1 && (events, data) != (libc::EPOLLIN as u32, DATA) { 1000 } else { ready }
}

fn epoll_wait(fd: RawFd, time: Option<Duration>) -> i32 {
    let epoll = epoll_of(fd);
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: room for one event.
    let ready = unsafe { libc::epoll_wait(epoll.as_raw_fd(), &raw mut event, 1, milliseconds(time)) };
    checked(ready, event)
}

fn epoll_pwait2(fd: RawFd, time: Option<Duration>) -> i32 {
    let epoll = epoll_of(fd);
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    let (epoll, time) = (epoll.as_raw_fd(), time.map(timespec));
    let (events, time) = (&raw mut event, pointer(&time));
    // SAFETY: room for one event, a time or none, no signal mask. (Not in glibc before 2.35.)
    let ready = unsafe { libc::syscall(libc::SYS_epoll_pwait2, epoll, events, 1, time, 0usize, 8usize) };
    checked(ready as i32, event)
}

fn recv_timeout(fd: OwnedFd) -> Result<Left> {
    set_timeout(&fd, libc::SO_RCVTIMEO, TIME)?;
    say("ready");
    let started = Instant::now();
    let mut byte = 0u8;
    // SAFETY: room for one byte.
    let n = unsafe { libc::recv(raw(&fd), (&raw mut byte).cast(), 1, 0) };
    let error = std::io::Error::last_os_error();
    expect_lasted(started, TIME)?;
    ensure!(n < 0 && error.raw_os_error() == Some(libc::EAGAIN), "recv: {n}, {error}");
    say("over");
    set_timeout(&fd, libc::SO_RCVTIMEO, Duration::ZERO)?;
    Ok(Usable(fd))
}

pub fn set_timeout(fd: &OwnedFd, option: i32, time: Duration) -> Result<()> {
    let time = libc::timeval { tv_sec: time.as_secs() as i64, tv_usec: 0 };
    let length = size_of::<libc::timeval>() as libc::socklen_t;
    // SAFETY: the time and its size.
    let set =
        unsafe { libc::setsockopt(raw(fd), libc::SOL_SOCKET, option, (&raw const time).cast(), length) };
    sys("setsockopt", set).map(drop)
}
