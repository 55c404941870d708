// SPDX-License-Identifier: Apache-2.0
//! Calls on the socket itself that are in progress while it moves.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::null_mut,
    time::Duration,
};

use anyhow::{Result, ensure};
use io_uring::{IoUring, opcode, types::Fd};

use crate::{
    Behaviour, Left,
    Left::Usable,
    tools::{
        SPEECH, expect_pattern, is_told, pattern, pipe, raw, read, receive, say, speak, sys, wait_for_line,
        write,
    },
};

const MEGABYTE: usize = 1 << 20;

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "read", subject: read_waits, partner: speaks },
    Behaviour { name: "recv-waitall", subject: recv_waitall, partner: speaks_in_two_halves },
    Behaviour { name: "recvmsg-waitall", subject: recvmsg_waitall, partner: speaks_in_two_halves },
    Behaviour { name: "peek-waits", subject: peek_waits, partner: speaks },
    Behaviour { name: "write", subject: write_64_megabytes, partner: listens_slowly::<64> },
    Behaviour { name: "send", subject: send_64_megabytes, partner: listens_slowly::<64> },
    Behaviour { name: "sendfile", subject: sendfile_64_megabytes, partner: listens_slowly::<64> },
    Behaviour { name: "splice-out", subject: splice_out, partner: listens_slowly::<32> },
    Behaviour { name: "splice-in", subject: splice_in, partner: speaks },
    Behaviour { name: "sendmsg", subject: sendmsg_of_many_parts, partner: listens_slowly::<32> },
    Behaviour { name: "writev", subject: writev_of_many_parts, partner: listens_slowly::<32> },
    Behaviour { name: "sendmmsg", subject: sendmmsg_of_large_messages, partner: listens_slowly::<32> },
    Behaviour { name: "io-uring-idle", subject: io_uring_idle, partner: speaks },
    Behaviour { name: "io-uring-recv", subject: io_uring_recv, partner: speaks },
    Behaviour { name: "io-uring-registered", subject: io_uring_registered, partner: speaks },
];

/// Says its piece when the state is to end.
pub fn speaks(fd: OwnedFd) -> Result<Left> {
    say("ready");
    wait_for_line("leave")?;
    speak(&fd, SPEECH)?;
    Ok(Usable(fd))
}

fn speaks_in_two_halves(fd: OwnedFd) -> Result<Left> {
    write(&fd, &pattern(0, MEGABYTE / 2))?;
    say("ready");
    wait_for_line("leave")?;
    write(&fd, &pattern(MEGABYTE / 2, MEGABYTE / 2))?;
    Ok(Usable(fd))
}

/// Slow until the state is to end: the writer waits for most of the time.
fn listens_slowly<const MEGABYTES: usize>(fd: OwnedFd) -> Result<Left> {
    const STEP: usize = 32 << 10;
    say("ready");
    for from in (0..MEGABYTES * MEGABYTE).step_by(STEP) {
        receive(&fd, from, STEP)?;
        if !is_told()? {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    wait_for_line("leave")?;
    Ok(Usable(fd))
}

fn read_waits(fd: OwnedFd) -> Result<Left> {
    let mut buffer = vec![0; 1 << 16];
    say("ready");
    let n = read(&fd, &mut buffer)?;
    ensure!(n == SPEECH, "{n} bytes");
    expect_pattern(&buffer[..n], 0)?;
    Ok(Usable(fd))
}

fn recv(fd: &OwnedFd, buffer: &mut [u8], flags: i32) -> Result<usize> {
    // SAFETY: the buffer is valid for its length.
    sys("recv", unsafe { libc::recv(raw(fd), buffer.as_mut_ptr().cast(), buffer.len(), flags) } as i64)
}

fn recv_waitall(fd: OwnedFd) -> Result<Left> {
    let mut buffer = vec![0; MEGABYTE];
    say("ready");
    let n = recv(&fd, &mut buffer, libc::MSG_WAITALL)?;
    ensure!(n == MEGABYTE, "MSG_WAITALL: {n} of {MEGABYTE} bytes");
    expect_pattern(&buffer, 0)?;
    Ok(Usable(fd))
}

fn recvmsg_waitall(fd: OwnedFd) -> Result<Left> {
    let mut buffer = vec![0; MEGABYTE];
    let mut parts: Vec<libc::iovec> = buffer
        .chunks_mut(MEGABYTE / 8)
        .map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
        .collect();
    let mut message = message(&mut parts);
    say("ready");
    // SAFETY: the message points to parts of the buffer; all live through the call.
    let n = unsafe { libc::recvmsg(raw(&fd), &raw mut message, libc::MSG_WAITALL) };
    let n = sys("recvmsg", n as i64)?;
    ensure!(n == MEGABYTE, "MSG_WAITALL: {n} of {MEGABYTE} bytes");
    expect_pattern(&buffer, 0)?;
    Ok(Usable(fd))
}

fn peek_waits(fd: OwnedFd) -> Result<Left> {
    let mut buffer = vec![0; 1 << 16];
    say("ready");
    let n = recv(&fd, &mut buffer, libc::MSG_PEEK)?;
    ensure!(n == SPEECH, "{n} bytes");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

fn write_64_megabytes(fd: OwnedFd) -> Result<Left> {
    let bytes = pattern(0, 64 * MEGABYTE);
    say("ready");
    write(&fd, &bytes)?;
    Ok(Usable(fd))
}

fn send_64_megabytes(fd: OwnedFd) -> Result<Left> {
    let bytes = pattern(0, 64 * MEGABYTE);
    say("ready");
    // SAFETY: the bytes are valid for their length.
    let n = sys("send", unsafe { libc::send(raw(&fd), bytes.as_ptr().cast(), bytes.len(), 0) } as i64)?;
    ensure!(n == bytes.len(), "a short send: {n} of {} bytes", bytes.len());
    Ok(Usable(fd))
}

/// A file in memory with the bytes from 0 on.
fn file(length: usize) -> Result<File> {
    // SAFETY: a constant name; the descriptor is new and ours.
    let mut file =
        unsafe { File::from_raw_fd(sys("memfd_create", libc::memfd_create(c"data".as_ptr(), 0))? as i32) };
    file.write_all(&pattern(0, length))?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn sendfile_64_megabytes(fd: OwnedFd) -> Result<Left> {
    let length = 64 * MEGABYTE;
    let file = file(length)?;
    say("ready");
    // SAFETY: both descriptors are open; the offset is the file's own.
    let n =
        sys("sendfile", unsafe { libc::sendfile(raw(&fd), file.as_raw_fd(), null_mut(), length) } as i64)?;
    ensure!(n == length, "a short sendfile: {n} of {length} bytes");
    Ok(Usable(fd))
}

fn splice(from: &OwnedFd, to: &OwnedFd, length: usize) -> Result<usize> {
    // SAFETY: both descriptors are open, and neither has an offset.
    let n = unsafe { libc::splice(raw(from), null_mut(), raw(to), null_mut(), length, 0) };
    sys("splice", n as i64)
}

/// A pipe is at most one pipe full at a time: how much a splice moves is not said anywhere, but none is lost.
fn splice_out(fd: OwnedFd) -> Result<Left> {
    let length = 32 * MEGABYTE;
    let (from, to) = pipe()?;
    say("ready");
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || write(&to, &pattern(0, length)));
        let mut moved = 0;
        while moved < length {
            let n = splice(&from, &fd, length - moved)?;
            ensure!(n > 0, "splice moved nothing");
            moved += n;
        }
        writer.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?
    })?;
    Ok(Usable(fd))
}

fn splice_in(fd: OwnedFd) -> Result<Left> {
    let (from, to) = pipe()?;
    say("ready");
    let n = splice(&fd, &to, 1 << 16)?;
    ensure!(n == SPEECH, "{n} bytes");
    receive(&from, 0, n)?;
    Ok(Usable(fd))
}

fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: a msghdr of zeros has no name, parts, control data or flags.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    message
}

fn parts_of(bytes: &mut [u8], count: usize) -> Vec<libc::iovec> {
    let length = bytes.len().div_ceil(count);
    bytes
        .chunks_mut(length)
        .map(|part| libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: part.len() })
        .collect()
}

fn sendmsg_of_many_parts(fd: OwnedFd) -> Result<Left> {
    let mut bytes = pattern(0, 32 * MEGABYTE);
    let mut parts = parts_of(&mut bytes, libc::UIO_MAXIOV as usize);
    let message = message(&mut parts);
    say("ready");
    // SAFETY: the message points to parts of the bytes; all live through the call.
    let n = sys("sendmsg", unsafe { libc::sendmsg(raw(&fd), &raw const message, 0) } as i64)?;
    ensure!(n == bytes.len(), "a short sendmsg: {n} of {} bytes", bytes.len());
    Ok(Usable(fd))
}

fn writev_of_many_parts(fd: OwnedFd) -> Result<Left> {
    let mut bytes = pattern(0, 32 * MEGABYTE);
    let parts = parts_of(&mut bytes, libc::UIO_MAXIOV as usize);
    say("ready");
    // SAFETY: the parts point to the bytes, which live through the call.
    let n = sys("writev", unsafe { libc::writev(raw(&fd), parts.as_ptr(), parts.len() as i32) } as i64)?;
    ensure!(n == bytes.len(), "a short writev: {n} of {} bytes", bytes.len());
    Ok(Usable(fd))
}

fn sendmmsg_of_large_messages(fd: OwnedFd) -> Result<Left> {
    const MESSAGES: usize = 4;
    let mut bytes = pattern(0, 32 * MEGABYTE);
    let length = bytes.len() / MESSAGES;
    let mut parts = parts_of(&mut bytes, MESSAGES);
    let mut messages: Vec<libc::mmsghdr> =
        parts.chunks_mut(1).map(|part| libc::mmsghdr { msg_hdr: message(part), msg_len: 0 }).collect();
    say("ready");
    // SAFETY: the messages point to parts of the bytes; all live through the call.
    let n = unsafe { libc::sendmmsg(raw(&fd), messages.as_mut_ptr(), MESSAGES as u32, 0) };
    ensure!(sys("sendmmsg", n)? == MESSAGES, "a short sendmmsg: {n} of {MESSAGES} messages");
    for message in &messages {
        ensure!(message.msg_len as usize == length, "a short message: {} of {length} bytes", message.msg_len);
    }
    Ok(Usable(fd))
}

fn io_uring_idle(fd: OwnedFd) -> Result<Left> {
    let mut ring = IoUring::new(8)?;
    let nop = opcode::Nop::new().build();
    // SAFETY: a nop refers to nothing.
    unsafe { ring.submission().push(&nop) }?;
    ring.submit_and_wait(1)?;
    read_waits(fd)
}

/// Waits for the partner's speech in the ring, `fd` as the kernel is told it.
fn io_uring_receives(mut ring: IoUring, fd: &OwnedFd, registered: bool) -> Result<()> {
    let mut buffer = vec![0; 1 << 16];
    let (at, length) = (buffer.as_mut_ptr(), buffer.len() as u32);
    let entry = if registered {
        opcode::Recv::new(io_uring::types::Fixed(0), at, length).build()
    } else {
        opcode::Recv::new(Fd(raw(fd)), at, length).build()
    };
    // SAFETY: the buffer lives until the completion has come.
    unsafe { ring.submission().push(&entry) }?;
    ring.submit()?;
    say("ready");
    ring.submit_and_wait(1)?;
    let result = ring.completion().next().map(|completion| completion.result());
    ensure!(result == Some(SPEECH as i32), "the ring received {result:?}");
    expect_pattern(&buffer[..SPEECH], 0)
}

fn io_uring_recv(fd: OwnedFd) -> Result<Left> {
    io_uring_receives(IoUring::new(8)?, &fd, false)?;
    Ok(Usable(fd))
}

fn io_uring_registered(fd: OwnedFd) -> Result<Left> {
    let ring = IoUring::new(8)?;
    ring.submitter().register_files(&[raw(&fd)])?;
    io_uring_receives(ring, &fd, true)?;
    Ok(Usable(fd))
}
