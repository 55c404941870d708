// SPDX-License-Identifier: Apache-2.0
//! States of the socket itself.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use nix::sys::socket::{SockaddrStorage, getpeername, getsockname};

use crate::{
    Behaviour, Left,
    Left::{Over, Usable},
    calls::speaks,
    tools::{
        SPEECH, expect_end, is_told, pattern, raw, read, receive, say, set_blocking, speak, sys, unread,
        wait_for_line, write,
    },
    waits::waits,
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "options-set", subject: options_that_were_set, partner: speaks },
    Behaviour { name: "options-unset", subject: options_stay, partner: speaks },
    Behaviour { name: "half-closed", subject: closes_its_half, partner: hears_the_end },
    Behaviour { name: "peer-half-closed", subject: hears_the_end, partner: closes_its_half },
    Behaviour { name: "urgent", subject: urgent_byte_waits, partner: sends_an_urgent_byte },
    Behaviour { name: "urgent-read", subject: urgent_byte_was_read, partner: sends_an_urgent_byte },
    Behaviour { name: "unread-1", subject: reads_late::<1>, partner: has_spoken::<1> },
    Behaviour { name: "unread-1k", subject: reads_late::<1024>, partner: has_spoken::<1024> },
    Behaviour { name: "unread-64k", subject: reads_late::<65536>, partner: has_spoken::<65536> },
    Behaviour { name: "unread-1m", subject: reads_late::<1048576>, partner: has_spoken::<1048576> },
    Behaviour { name: "unread-8m", subject: reads_late::<8388608>, partner: has_spoken::<8388608> },
    Behaviour { name: "unread-both", subject: both_read_late, partner: both_read_late },
    Behaviour { name: "unread-counted", subject: counts_unread_bytes, partner: has_spoken::<1048576> },
    Behaviour { name: "zero-window", subject: fills_the_window, partner: reads_after_all::<24> },
    Behaviour { name: "fast-open", subject: waits, partner: waits },
    Behaviour { name: "keepalive", subject: is_kept_alive, partner: waits },
    Behaviour { name: "linger-reset", subject: resets, partner: is_reset },
    Behaviour { name: "peer-reset", subject: is_reset, partner: resets },
    Behaviour { name: "linger-close", subject: lingers, partner: reads_slowly_to_the_end },
    Behaviour { name: "close-unread", subject: closes_with_unread_bytes, partner: has_spoken_and_is_reset },
    Behaviour { name: "pings", subject: asks, partner: answers },
    Behaviour { name: "pings-epoll", subject: asks, partner: answers },
];

// linux/tcp.h and asm-generic/socket.h; not in the libc crate.
const TCP_THIN_LINEAR_TIMEOUTS: i32 = 16;
const TCP_NOTSENT_LOWAT: i32 = 25;
const TCP_INQ: i32 = 36;

/// Options by level, name, and a value that is not the default.
const OPTIONS: &[(i32, i32, i32)] = &[
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 77),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 33),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 45_000),
    (libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT, 100_000),
    (libc::IPPROTO_TCP, libc::TCP_LINGER2, 40),
    (libc::IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS, 1),
    (libc::IPPROTO_TCP, TCP_INQ, 1),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 3),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL, 50),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1),
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1),
    (libc::IPPROTO_IP, libc::IP_TOS, 16),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 4),
    (libc::IPPROTO_IP, libc::IP_TTL, 61),
    (libc::IPPROTO_IP, libc::IP_RECVTOS, 1),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, 150_000),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 150_000),
];

/// Longer ones: linger, two time-outs, pacing, congestion control.
const LONGER: &[(i32, i32, &[u8])] = &[
    (libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 9, 0, 0, 0]),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, &[11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, &[12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, &[0, 0, 0, 8, 0, 0, 0, 0]),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno"),
];

fn get(fd: &OwnedFd, level: i32, name: i32, length: usize) -> Result<Vec<u8>> {
    let mut value = vec![0; length];
    let mut length = length as libc::socklen_t;
    // SAFETY: room for `length` bytes.
    let got = unsafe { libc::getsockopt(raw(fd), level, name, value.as_mut_ptr().cast(), &raw mut length) };
    sys("getsockopt", got)?;
    value.truncate(length as usize);
    Ok(value)
}

pub fn set(fd: &OwnedFd, level: i32, name: i32, value: &[u8]) -> Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the value and its length.
    let set = unsafe { libc::setsockopt(raw(fd), level, name, value.as_ptr().cast(), length) };
    sys(&format!("setsockopt {level}, {name}"), set).map(drop)
}

fn set_int(fd: &OwnedFd, level: i32, name: i32, value: i32) -> Result<()> {
    set(fd, level, name, &value.to_ne_bytes())
}

/// All that can be asked, as level, name and value. Buffer sizes that the kernel tunes are left out.
fn looks(fd: &OwnedFd, with_sizes: bool) -> Result<Vec<(i32, i32, Vec<u8>)>> {
    let is_size = |name: i32| name == libc::SO_SNDBUF || name == libc::SO_RCVBUF;
    let ints = OPTIONS.iter().map(|(level, name, _)| (*level, *name, 4));
    let longer = LONGER.iter().map(|(level, name, _)| (*level, *name, 16));
    ints.chain(longer)
        .filter(|(level, name, _)| with_sizes || *level != libc::SOL_SOCKET || !is_size(*name))
        .map(|(level, name, length)| Ok((level, name, get(fd, level, name, length)?)))
        .collect()
}

fn options_that_were_set(fd: OwnedFd) -> Result<Left> {
    for (level, name, value) in OPTIONS {
        set_int(&fd, *level, *name, *value)?;
    }
    for (level, name, value) in LONGER {
        set(&fd, *level, *name, value)?;
    }
    same_looks(fd, true)
}

fn options_stay(fd: OwnedFd) -> Result<Left> {
    same_looks(fd, false)
}

fn addresses(fd: &OwnedFd) -> Result<[SockaddrStorage; 2]> {
    Ok([getsockname(raw(fd))?, getpeername(raw(fd))?])
}

fn same_looks(fd: OwnedFd, with_sizes: bool) -> Result<Left> {
    let (before, names) = (looks(&fd, with_sizes)?, addresses(&fd)?);
    say("ready");
    while !is_told()? {
        for (was, is) in before.iter().zip(looks(&fd, with_sizes)?) {
            ensure!(*was == is, "an option was {was:?} and is {is:?}");
        }
        ensure!(names == addresses(&fd)?, "the addresses were {names:?} and are {:?}", addresses(&fd)?);
    }
    wait_for_line("leave")?;
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

fn shut(fd: &OwnedFd) -> Result<()> {
    // SAFETY: plain integers.
    sys("shutdown", unsafe { libc::shutdown(raw(fd), libc::SHUT_WR) }).map(drop)
}

fn closes_its_half(fd: OwnedFd) -> Result<Left> {
    speak(&fd, SPEECH)?;
    shut(&fd)?;
    say("ready");
    receive(&fd, 0, SPEECH)?;
    expect_end(&fd)?;
    Ok(Over)
}

fn hears_the_end(fd: OwnedFd) -> Result<Left> {
    say("ready");
    receive(&fd, 0, SPEECH)?;
    expect_end(&fd)?;
    wait_for_line("leave")?;
    speak(&fd, SPEECH)?;
    Ok(Over)
}

static URGENT: u8 = b'!';

fn sends_an_urgent_byte(fd: OwnedFd) -> Result<Left> {
    // SAFETY: one byte.
    sys("send", unsafe { libc::send(raw(&fd), (&raw const URGENT).cast(), 1, libc::MSG_OOB) } as i64)?;
    say("ready");
    wait_for_line("leave")?;
    speak(&fd, SPEECH)?;
    Ok(Usable(fd))
}

fn read_urgent(fd: &OwnedFd) -> Result<()> {
    let mut byte = 0u8;
    // SAFETY: room for one byte.
    sys("recv", unsafe { libc::recv(raw(fd), (&raw mut byte).cast(), 1, libc::MSG_OOB) } as i64)?;
    ensure!(byte == URGENT, "the urgent byte is {byte}");
    Ok(())
}

fn wait_for_urgent(fd: &OwnedFd) -> Result<()> {
    let mut fds = libc::pollfd { fd: raw(fd), events: libc::POLLPRI, revents: 0 };
    // SAFETY: one pollfd.
    sys("poll", unsafe { libc::poll(&raw mut fds, 1, -1) }).map(drop)
}

fn urgent_byte_waits(fd: OwnedFd) -> Result<Left> {
    wait_for_urgent(&fd)?;
    say("ready");
    wait_for_line("leave")?;
    read_urgent(&fd)?;
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

/// It is gone for good when what comes after it is read, too.
fn urgent_byte_was_read(fd: OwnedFd) -> Result<Left> {
    wait_for_urgent(&fd)?;
    read_urgent(&fd)?;
    say("ready");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

fn make_room(fd: &OwnedFd, length: usize) -> Result<()> {
    if length > 100_000 {
        set_int(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 2 * length as i32)?;
        set_int(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 2 * length as i32)?;
    }
    Ok(())
}

/// Waits until so much has arrived.
fn expect_unread(fd: &OwnedFd, length: usize) -> Result<()> {
    let started = Instant::now();
    while unread(raw(fd))? < length {
        ensure!(
            started.elapsed() < Duration::from_secs(10),
            "{} of {length} bytes arrived",
            unread(raw(fd))?
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn has_spoken<const LENGTH: usize>(fd: OwnedFd) -> Result<Left> {
    make_room(&fd, LENGTH)?;
    say("ready");
    speak(&fd, LENGTH)?;
    wait_for_line("leave")?;
    Ok(Usable(fd))
}

fn reads_late<const LENGTH: usize>(fd: OwnedFd) -> Result<Left> {
    make_room(&fd, LENGTH)?;
    expect_unread(&fd, LENGTH)?;
    say("ready");
    wait_for_line("leave")?;
    receive(&fd, 0, LENGTH)?;
    Ok(Usable(fd))
}

fn both_read_late(fd: OwnedFd) -> Result<Left> {
    const LENGTH: usize = 4 << 20;
    make_room(&fd, LENGTH)?;
    say("ready");
    speak(&fd, LENGTH)?;
    wait_for_line("leave")?;
    receive(&fd, 0, LENGTH)?;
    Ok(Usable(fd))
}

/// What has arrived once is there until it is read: FIONREAD and MSG_PEEK say so at any time.
fn counts_unread_bytes(fd: OwnedFd) -> Result<Left> {
    const LENGTH: usize = 1 << 20;
    make_room(&fd, LENGTH)?;
    expect_unread(&fd, LENGTH)?;
    say("ready");
    while !is_told()? {
        let now = unread(raw(&fd))?;
        ensure!(now == LENGTH, "{now} of {LENGTH} bytes are there");
    }
    wait_for_line("leave")?;
    receive(&fd, 0, LENGTH)?;
    Ok(Usable(fd))
}

const FILL: usize = 24 << 20;

/// Writes until nothing goes any more, and the rest afterwards.
fn fills_the_window(fd: OwnedFd) -> Result<Left> {
    set_blocking(&fd, false)?;
    let bytes = pattern(0, FILL);
    let mut written = 0;
    loop {
        // SAFETY: what is left of the bytes.
        let n = unsafe { libc::write(raw(&fd), bytes[written..].as_ptr().cast(), FILL - written) };
        if n < 0 {
            let error = std::io::Error::last_os_error();
            ensure!(error.raw_os_error() == Some(libc::EAGAIN), "write: {error}");
            break;
        }
        written += n as usize;
    }
    ensure!(written < FILL, "the window is not full after {FILL} bytes");
    say("ready");
    wait_for_line("leave")?;
    set_blocking(&fd, true)?;
    write(&fd, &bytes[written..])?;
    Ok(Usable(fd))
}

fn reads_after_all<const MEGABYTES: usize>(fd: OwnedFd) -> Result<Left> {
    say("ready");
    wait_for_line("leave")?;
    receive(&fd, 0, MEGABYTES << 20)?;
    Ok(Usable(fd))
}

fn is_kept_alive(fd: OwnedFd) -> Result<Left> {
    set_int(&fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    for name in [libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL, libc::TCP_KEEPCNT] {
        set_int(&fd, libc::IPPROTO_TCP, name, 1)?;
    }
    say("ready");
    wait_for_line("leave")?;
    // Long enough to die of a probe that is not answered.
    std::thread::sleep(Duration::from_secs(3));
    Ok(Usable(fd))
}

fn resets(fd: OwnedFd) -> Result<Left> {
    set(&fd, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 0, 0, 0, 0])?;
    say("ready");
    wait_for_line("leave")?;
    drop(fd);
    Ok(Over)
}

fn expect_reset(fd: &OwnedFd) -> Result<()> {
    let mut byte = [0];
    let result = read(fd, &mut byte);
    let error = std::io::Error::last_os_error();
    ensure!(
        result.is_err() && error.raw_os_error() == Some(libc::ECONNRESET),
        "{result:?}, a reset expected"
    );
    Ok(())
}

fn is_reset(fd: OwnedFd) -> Result<Left> {
    say("ready");
    expect_reset(&fd)?;
    Ok(Over)
}

const LONG: usize = 16 << 20;

/// close(2) returns when everything has arrived.
fn lingers(fd: OwnedFd) -> Result<Left> {
    set(&fd, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 9, 0, 0, 0])?;
    say("ready");
    wait_for_line("leave")?;
    speak(&fd, LONG)?;
    let started = Instant::now();
    drop(fd);
    ensure!(started.elapsed() < Duration::from_secs(8), "close took {:?}", started.elapsed());
    Ok(Over)
}

fn reads_slowly_to_the_end(fd: OwnedFd) -> Result<Left> {
    say("ready");
    for step in 0..16 {
        receive(&fd, step * LONG / 16, LONG / 16)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    expect_end(&fd)?;
    Ok(Over)
}

/// Bytes that nobody reads make the end a reset: RFC 1122, 4.2.2.13.
fn closes_with_unread_bytes(fd: OwnedFd) -> Result<Left> {
    expect_unread(&fd, SPEECH)?;
    say("ready");
    wait_for_line("leave")?;
    drop(fd);
    Ok(Over)
}

fn has_spoken_and_is_reset(fd: OwnedFd) -> Result<Left> {
    speak(&fd, SPEECH)?;
    say("ready");
    expect_reset(&fd)?;
    Ok(Over)
}

/// Requests of growing sizes; one of no bytes ends it.
pub fn asks(fd: OwnedFd) -> Result<Left> {
    say("ready");
    let mut number = 0;
    while !is_told()? {
        ask(&fd, number, 1 + number * 7919 % 30_000)?;
        number += 1;
    }
    wait_for_line("leave")?;
    write(&fd, &0u32.to_le_bytes())?;
    Ok(Usable(fd))
}

fn ask(fd: &OwnedFd, number: usize, length: usize) -> Result<()> {
    let mut request = (length as u32).to_le_bytes().to_vec();
    request.extend(pattern(number, length));
    write(fd, &request)?;
    receive(fd, number, length)
}

pub fn answers(fd: OwnedFd) -> Result<Left> {
    say("ready");
    loop {
        let mut head = [0; 4];
        read_exactly(&fd, &mut head)?;
        let mut body = vec![0; u32::from_le_bytes(head) as usize];
        if body.is_empty() {
            return Ok(Usable(fd));
        }
        read_exactly(&fd, &mut body)?;
        write(&fd, &body)?;
    }
}

fn read_exactly(fd: &OwnedFd, mut buffer: &mut [u8]) -> Result<()> {
    while !buffer.is_empty() {
        let n = read(fd, buffer)?;
        ensure!(n > 0, "the stream ended");
        buffer = &mut buffer[n..];
    }
    Ok(())
}
