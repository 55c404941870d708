// SPDX-License-Identifier: Apache-2.0
//! What all behaviours use: strict reads and writes, bytes that can be checked, and the line to the test.

use std::{
    io::{BufRead, Write},
    net::{SocketAddr, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    ptr::null_mut,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn};

/// What the partner says when the state ends, unless the behaviour is about more.
pub const SPEECH: usize = 1000;
/// What both sides send each other at the end.
const GOODBYE: usize = 256 << 10;

/// To the test. At once, also when standard output is a file.
pub fn say(word: &str) {
    println!("{word}");
    let _ = std::io::stdout().flush();
}

/// From the test.
pub fn wait_for_line(word: &str) -> Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("standard input")?;
    ensure!(line.trim_end() == word, "`{word}` expected on standard input, {line:?} received");
    Ok(())
}

/// Has the test sent a line? FIONREAD does not wait, so that no signal can interrupt it.
pub fn is_told() -> Result<bool> {
    Ok(unread(0)? > 0)
}

/// Bytes that have arrived and were not read.
pub fn unread(fd: RawFd) -> Result<usize> {
    let mut count = 0i32;
    // SAFETY: FIONREAD writes an int.
    sys("FIONREAD", unsafe { libc::ioctl(fd, libc::FIONREAD, &raw mut count) })?;
    Ok(count as usize)
}

/// The result of a system call, or its error, EINTR as well.
pub fn sys(what: &str, result: impl Into<i64>) -> Result<usize> {
    let result = result.into();
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context(what.to_owned());
    }
    Ok(result as usize)
}

/// Bytes `from..from + length` of a stream that never repeats itself.
pub fn pattern(from: usize, length: usize) -> Vec<u8> {
    let byte = |at: usize| ((at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
    (from..from + length).map(byte).collect()
}

pub fn expect_pattern(bytes: &[u8], from: usize) -> Result<()> {
    match bytes.iter().zip(pattern(from, bytes.len())).position(|(is, should)| *is != should) {
        Some(at) => bail!("byte {} is another one", from + at),
        None => Ok(()),
    }
}

/// One read(2).
pub fn read(fd: &OwnedFd, buffer: &mut [u8]) -> Result<usize> {
    // SAFETY: the buffer is valid for its length.
    sys("read", unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } as i64)
}

/// One write(2) on a blocking descriptor, which writes everything.
pub fn write(fd: &OwnedFd, bytes: &[u8]) -> Result<()> {
    // SAFETY: the bytes are valid for their length.
    let written =
        sys("write", unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as i64)?;
    ensure!(written == bytes.len(), "a short write: {written} of {} bytes", bytes.len());
    Ok(())
}

/// Reads and checks bytes `from..from + length`.
pub fn receive(fd: &OwnedFd, from: usize, length: usize) -> Result<()> {
    let mut buffer = vec![0; length.min(256 << 10)];
    let mut received = 0;
    while received < length {
        let room = buffer.len().min(length - received);
        let n = read(fd, &mut buffer[..room])?;
        ensure!(n > 0, "the stream ended after {received} of {length} bytes");
        expect_pattern(&buffer[..n], from + received)?;
        received += n;
    }
    Ok(())
}

/// Sends bytes from 0 on.
pub fn speak(fd: &OwnedFd, length: usize) -> Result<()> {
    write(fd, &pattern(0, length))
}

pub fn expect_end(fd: &OwnedFd) -> Result<()> {
    let n = read(fd, &mut [0; 64])?;
    ensure!(n == 0, "{n} bytes after the last one");
    Ok(())
}

/// The connection works in both directions, to its end.
pub fn goodbye(fd: &OwnedFd, first: bool) -> Result<()> {
    set_blocking(fd, true)?;
    if first {
        speak(fd, GOODBYE)?;
        receive(fd, 0, GOODBYE)?;
    } else {
        receive(fd, 0, GOODBYE)?;
        speak(fd, GOODBYE)?;
    }
    // SAFETY: plain integers.
    sys("shutdown", unsafe { libc::shutdown(fd.as_raw_fd(), libc::SHUT_WR) })?;
    expect_end(fd)
}

pub fn set_blocking(fd: &OwnedFd, blocking: bool) -> Result<()> {
    // SAFETY: fcntl(2) with plain integers.
    unsafe {
        let flags = sys("F_GETFL", libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))? as i32;
        let flags = if blocking { flags & !libc::O_NONBLOCK } else { flags | libc::O_NONBLOCK };
        sys("F_SETFL", libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags))?;
    }
    Ok(())
}

pub fn raw(fd: &OwnedFd) -> RawFd {
    fd.as_raw_fd()
}

/// The call ended in its time: not before, and not much later.
pub fn expect_lasted(started: Instant, expected: Duration) -> Result<()> {
    let lasted = started.elapsed();
    // A timer may be a tick early by the other clock.
    ensure!(
        lasted + Duration::from_millis(5) >= expected,
        "it ended after {lasted:?}, {expected:?} expected"
    );
    ensure!(lasted < expected + Duration::from_secs(1), "it ended after {lasted:?}, {expected:?} expected");
    Ok(())
}

/// Reading and writing end.
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe().context("pipe")
}

/// A child process. Dropping it kills it.
pub struct Child(pub i32);

impl Child {
    /// Runs `what` in a child process, which ends with it.
    pub fn fork(what: impl FnOnce() -> Result<()>) -> Result<Child> {
        // SAFETY: these programs fork before they have a second thread.
        let pid = sys("fork", unsafe { libc::fork() })?;
        if pid > 0 {
            return Ok(Child(pid as i32));
        }
        let code = match what() {
            Ok(()) => 0,
            Err(error) => {
                eprintln!("error in a child: {error:#}");
                1
            }
        };
        // SAFETY: nothing of the parent's is to be flushed or dropped twice.
        unsafe { libc::_exit(code) }
    }

    pub fn expect_success(self) -> Result<()> {
        let mut status = 0;
        // SAFETY: room for the status.
        sys("waitpid", unsafe { libc::waitpid(self.0, &raw mut status, 0) })?;
        std::mem::forget(self);
        ensure!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "a child: status {status:#x}");
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: our child, not waited for yet.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// connect(2) and the first write in one: TCP Fast Open. Without a cookie, which net.ipv4.tcp_fastopen must allow.
pub fn connect_with_data(address: SocketAddr) -> Result<OwnedFd> {
    let SocketAddr::V4(address) = address else { bail!("an IPv4 address is needed") };
    let there = SockaddrIn::from(address);
    let fd = nix::sys::socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None)?;
    let sent = nix::sys::socket::sendto(
        raw(&fd),
        &pattern(0, SPEECH),
        &there,
        MsgFlags::from_bits_retain(libc::MSG_FASTOPEN),
    )?;
    ensure!(sent == SPEECH, "{sent} bytes were sent");
    Ok(fd)
}

/// The other side: what came with the SYN is there at once.
pub fn accept_with_data(listener: OwnedFd) -> Result<OwnedFd> {
    static QUEUE: i32 = 8;
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: an int and its size; a new descriptor that is ours.
    let fd = unsafe {
        let queue = (&raw const QUEUE).cast();
        sys(
            "TCP_FASTOPEN",
            libc::setsockopt(raw(&listener), libc::IPPROTO_TCP, libc::TCP_FASTOPEN, queue, length),
        )?;
        say("listening");
        OwnedFd::from_raw_fd(sys("accept", libc::accept(raw(&listener), null_mut(), null_mut()))? as i32)
    };
    receive(&fd, 0, SPEECH)?;
    Ok(fd)
}

/// A socket of another network namespace than this process's.
pub fn connect_in(namespace: &Path, address: SocketAddr) -> Result<OwnedFd> {
    let namespace = std::fs::File::open(namespace).context("the namespace")?;
    let thread = std::thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).context("setns")?;
        Ok(TcpStream::connect(address).context("connect")?.into())
    });
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// From a port of one's own choice, which a connection before may have had.
pub fn connect_from(from: SocketAddr, address: SocketAddr) -> Result<OwnedFd> {
    let (SocketAddr::V4(from), SocketAddr::V4(address)) = (from, address) else {
        bail!("IPv4 addresses are needed")
    };
    let fd = nix::sys::socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::ReuseAddr, &true)?;
    nix::sys::socket::bind(raw(&fd), &SockaddrIn::from(from)).context("bind")?;
    nix::sys::socket::connect(raw(&fd), &SockaddrIn::from(address)).context("connect")?;
    Ok(fd)
}
