// SPDX-License-Identifier: Apache-2.0
//! System calls on the socket. Everything that a careful program could notice is noticed here.

use std::{
    io::IoSlice,
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    sync::atomic::Ordering,
    time::Duration,
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, SockaddrStorage,
        connect as connect_fd, getsockopt, sendmsg, setsockopt, shutdown, socket, sockopt,
    },
};

use crate::{Fds, Odd, Shared, fail};

pub fn accept(
    address: SocketAddr,
    connections: usize,
    delay: Duration,
    listening: impl FnOnce(),
) -> Vec<OwnedFd> {
    let listener =
        TcpListener::bind(address).unwrap_or_else(|error| fail!("listening on {address}: {error}"));
    listening();
    if !delay.is_zero() {
        std::thread::sleep(delay);
    }
    let accept = |_| match listener.accept() {
        Ok((stream, _)) => stream.into(),
        Err(error) => fail!("accept: {error}"),
    };
    (0..connections).map(accept).collect()
}

pub fn connect(address: SocketAddr, nonblocking: bool) -> OwnedFd {
    if !nonblocking {
        return TcpStream::connect(address)
            .unwrap_or_else(|error| fail!("connecting to {address}: {error}"))
            .into();
    }
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC, None)
        .unwrap_or_else(|error| fail!("socket: {error}"));
    match connect_fd(fd.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) => (),
        Err(Errno::EINPROGRESS) => {
            wait_until(&fd, PollFlags::POLLOUT);
            match getsockopt(&fd, sockopt::SocketError) {
                Ok(0) => (),
                Ok(error) => fail!("connecting to {address}: {}", Errno::from_raw(error)),
                Err(error) => fail!("SO_ERROR: {error}"),
            }
        }
        Err(error) => fail!("connecting to {address}: {error}"),
    }
    fd
}

pub fn set_nonblocking(fd: &OwnedFd) {
    let flags = FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
    fcntl(fd, flags).unwrap_or_else(|error| fail!("O_NONBLOCK: {error}"));
}

/// The socket and `more` duplicates of it.
pub fn duplicates(fd: OwnedFd, more: usize) -> Fds {
    let mut fds = vec![fd];
    for _ in 0..more {
        let copy = fds[0].try_clone().unwrap_or_else(|error| fail!("dup: {error}"));
        fds.push(copy);
    }
    fds
}

/// `None` is EAGAIN. EINTR and every other error end the program.
pub fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Option<usize> {
    match nix::unistd::read(fd, buffer) {
        Ok(n) => Some(n),
        Err(Errno::EAGAIN) => None,
        Err(error) => fail!("read: {error}"),
    }
}

/// As [`read`].
pub fn write(fd: BorrowedFd<'_>, bytes: &[u8]) -> Option<usize> {
    match nix::unistd::write(fd, bytes) {
        Ok(n) => Some(n),
        Err(Errno::EAGAIN) => None,
        Err(error) => fail!("write: {error}"),
    }
}

/// A blocking write writes everything, or something interfered.
pub fn write_all_at_once(fd: BorrowedFd<'_>, bytes: &[u8]) {
    match write(fd, bytes) {
        Some(n) if n == bytes.len() => (),
        Some(n) => fail!("short write: {n} of {} bytes on a blocking socket", bytes.len()),
        None => fail!("EAGAIN from a write on a blocking socket"),
    }
}

/// A blocking read: at least a byte, unless the connection has ended.
pub fn read_blocking(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> usize {
    read(fd, buffer).unwrap_or_else(|| fail!("EAGAIN from a read on a blocking socket"))
}

/// Says goodbye, and waits for the other side's goodbye.
pub fn part(fd: &OwnedFd) {
    shutdown(fd.as_raw_fd(), Shutdown::Write).unwrap_or_else(|error| fail!("shutdown: {error}"));
    let mut byte = [0];
    loop {
        wait_until(fd, PollFlags::POLLIN);
        match read(fd.as_fd(), &mut byte) {
            Some(0) => return,
            Some(_) => fail!("a byte after the end of the stream"),
            None => (),
        }
    }
}

fn wait_until(fd: &OwnedFd, what: PollFlags) {
    let mut fds = [PollFd::new(fd.as_fd(), what)];
    match poll(&mut fds, PollTimeout::NONE) {
        Ok(1) => (),
        other => fail!("poll: {other:?}"),
    }
}

/// What a program can ask about its socket.
#[derive(PartialEq, Eq, Debug)]
pub struct Looks {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    file_flags: i32,
    fd_flags: i32,
    nodelay: bool,
    keepalive: bool,
    keepidle: u32,
    user_timeout: u32,
    domain: i32,
    tos: i32,
    priority: i32,
}

impl Looks {
    pub fn of(fd: &OwnedFd) -> Looks {
        // A copy of the descriptor would change the number of references; borrow it for the calls of std.
        let stream = std::mem::ManuallyDrop::new(stream_of(fd));
        fn known<T, E: std::fmt::Display>(what: &str, result: Result<T, E>) -> T {
            result.unwrap_or_else(|error| fail!("{what}: {error}"))
        }
        Looks {
            local: known("getsockname", stream.local_addr()),
            remote: known("getpeername", stream.peer_addr()),
            file_flags: known("F_GETFL", fcntl(fd, FcntlArg::F_GETFL)),
            fd_flags: known("F_GETFD", fcntl(fd, FcntlArg::F_GETFD)),
            nodelay: known("TCP_NODELAY", getsockopt(fd, sockopt::TcpNoDelay)),
            keepalive: known("SO_KEEPALIVE", getsockopt(fd, sockopt::KeepAlive)),
            keepidle: known("TCP_KEEPIDLE", getsockopt(fd, sockopt::TcpKeepIdle)),
            user_timeout: known("TCP_USER_TIMEOUT", getsockopt(fd, sockopt::TcpUserTimeout)),
            domain: number(fd, libc::SOL_SOCKET, libc::SO_DOMAIN),
            tos: number(fd, libc::IPPROTO_IP, libc::IP_TOS),
            priority: number(fd, libc::SOL_SOCKET, libc::SO_PRIORITY),
        }
    }
}

fn stream_of(fd: &OwnedFd) -> TcpStream {
    use std::os::fd::FromRawFd;
    let raw: RawFd = fd.as_raw_fd();
    // SAFETY: the caller wraps the stream in ManuallyDrop, so the descriptor is not closed, and `fd` outlives it.
    unsafe { TcpStream::from_raw_fd(raw) }
}

fn number(fd: &OwnedFd, level: i32, option: i32) -> i32 {
    let mut value = 0i32;
    let mut length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: value and length live through the call, and length is the size of value.
    let result =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length) };
    if result != 0 {
        fail!("getsockopt {level}, {option}: {}", Errno::last());
    }
    value
}

/// Values that no socket has by default.
pub fn set_options(fd: &OwnedFd) {
    let set = |what: &str, result: nix::Result<()>| {
        result.unwrap_or_else(|error| fail!("{what}: {error}"));
    };
    set("TCP_NODELAY", setsockopt(fd, sockopt::TcpNoDelay, &true));
    set("SO_KEEPALIVE", setsockopt(fd, sockopt::KeepAlive, &true));
    set("TCP_KEEPIDLE", setsockopt(fd, sockopt::TcpKeepIdle, &77));
    set("TCP_USER_TIMEOUT", setsockopt(fd, sockopt::TcpUserTimeout, &45_000));
    set("SO_PRIORITY", setsockopt(fd, sockopt::Priority, &4));
}

/// Returns what must stay open for the oddity to last.
pub fn make_odd(fd: &OwnedFd, odd: Odd) -> Option<(UnixStream, UnixStream)> {
    match odd {
        Odd::InFlight => {
            let (from, to) = UnixStream::pair().unwrap_or_else(|error| fail!("socketpair: {error}"));
            let fds = [fd.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&fds)];
            sendmsg::<()>(from.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)
                .unwrap_or_else(|error| fail!("sendmsg: {error}"));
            Some((from, to))
        }
        Odd::Filter => {
            // BPF_RET | BPF_K: let every packet through.
            let mut code = [libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: u32::MAX }];
            let filter = libc::sock_fprog { len: 1, filter: code.as_mut_ptr() };
            let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
            let (level, option) = (libc::SOL_SOCKET, libc::SO_ATTACH_FILTER);
            // SAFETY: the filter and its one instruction live through the call.
            let result = unsafe {
                libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const filter).cast(), length)
            };
            if result != 0 {
                fail!("SO_ATTACH_FILTER: {}", Errno::last());
            }
            None
        }
    }
}

/// Every 10 ms, until the work is done: the socket looks as it did.
pub fn watch(fd: &OwnedFd, before: &Looks, shared: &Shared) {
    while !shared.finished.load(Ordering::Relaxed) {
        let now = Looks::of(fd);
        if now != *before {
            fail!("the socket changed: it was {before:?} and is {now:?}");
        }
        shared.names_checked.fetch_add(1, Ordering::Relaxed);
        crate::company::nanosleep(Duration::from_millis(10));
    }
}
