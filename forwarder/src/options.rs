// SPDX-License-Identifier: Apache-2.0
//! Carries the options of a socket over to the one that takes its place, and refuses what cannot be carried.
//!
//! Only values that differ from those of the new socket are set. Nothing is ever set on the old socket here.

use std::os::fd::{AsRawFd, BorrowedFd};

use forwarder_api::Refusal;
use nix::sys::socket::MsgFlags;

use crate::inspect::{Inspector, OptionsMark, SocketFacts};

/// An option that is one `int`, by level and name.
struct IntOption {
    level: i32,
    name: i32,
    /// IPv6 sockets only.
    v6_only: bool,
}

const fn int(level: i32, name: i32) -> IntOption {
    IntOption { level, name, v6_only: false }
}

const fn int_v6(name: i32) -> IntOption {
    IntOption { level: libc::IPPROTO_IPV6, name, v6_only: true }
}

// linux/tcp.h, linux/in.h and asm-generic/socket.h; not in the libc crate.
const TCP_THIN_LINEAR_TIMEOUTS: i32 = 16;
const TCP_SAVED_SYN: i32 = 28;
const TCP_TX_DELAY: i32 = 37;
const TCP_NOTSENT_LOWAT: i32 = 25;
const TCP_INQ: i32 = 36;
const SO_BUF_LOCK: i32 = 72;
const SO_PEEK_OFF: i32 = 42;
const SO_PREFER_BUSY_POLL: i32 = 69;
const SOCK_SNDBUF_LOCK: i32 = 1;
const SOCK_RCVBUF_LOCK: i32 = 2;

/// In the order in which they are set.
const INT_OPTIONS: &[IntOption] = &[
    int(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE),
    int(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL),
    int(libc::IPPROTO_TCP, libc::TCP_KEEPCNT),
    int(libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    int(libc::IPPROTO_TCP, libc::TCP_NODELAY),
    int(libc::IPPROTO_TCP, libc::TCP_CORK),
    int(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    int(libc::IPPROTO_TCP, TCP_NOTSENT_LOWAT),
    int(libc::IPPROTO_TCP, libc::TCP_LINGER2),
    int(libc::IPPROTO_TCP, TCP_THIN_LINEAR_TIMEOUTS),
    int(libc::IPPROTO_TCP, TCP_INQ),
    int(libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    int(libc::SOL_SOCKET, libc::SO_OOBINLINE),
    int(libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    int(libc::SOL_SOCKET, SO_PREFER_BUSY_POLL),
    int(libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    int(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    int(libc::SOL_SOCKET, libc::SO_TIMESTAMPING),
    int(libc::SOL_SOCKET, libc::SO_REUSEADDR),
    int(libc::SOL_SOCKET, libc::SO_ZEROCOPY),
    int(libc::IPPROTO_IP, libc::IP_TOS),
    // After IP_TOS, which sets it too.
    int(libc::SOL_SOCKET, libc::SO_PRIORITY),
    int(libc::IPPROTO_IP, libc::IP_TTL),
    int(libc::IPPROTO_IP, libc::IP_RECVTOS),
    int(libc::IPPROTO_IP, libc::IP_RECVTTL),
    int_v6(libc::IPV6_TCLASS),
    int_v6(libc::IPV6_UNICAST_HOPS),
    int_v6(libc::IPV6_RECVTCLASS),
];

/// Options that the new socket cannot have: set at all (not zero), they are refused.
const REFUSED: &[(i32, i32, Refusal)] = &[
    (libc::IPPROTO_TCP, TCP_SAVED_SYN, Refusal::UnknownOption),
    (libc::IPPROTO_TCP, TCP_TX_DELAY, Refusal::UnknownOption),
    (libc::SOL_SOCKET, libc::SO_MARK, Refusal::UnknownOption),
];

/// Refuse a socket that has something the new one could not be given. Changes nothing.
pub fn may_be_carried(socket: BorrowedFd<'_>) -> Result<(), Refusal> {
    if get_int(socket, libc::SOL_SOCKET, SO_PEEK_OFF).is_some_and(|offset| offset >= 0) {
        return Err(Refusal::PeekOffset);
    }
    // Bytes that were told once would raise their signal again, and with the wrong descriptor in it.
    // SAFETY: F_GETFL takes nothing and gives flags.
    let flags = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_GETFL) };
    if flags & libc::O_ASYNC != 0 {
        return Err(Refusal::SignalDriven);
    }
    for (level, name, reason) in REFUSED {
        if get_int(socket, *level, *name).is_some_and(|value| value != 0) {
            return Err(*reason);
        }
    }
    let mut device = [0u8; 16];
    if get(socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut device).is_some_and(|length| length > 0) {
        return Err(Refusal::UnknownOption);
    }
    Ok(())
}

/// Options of more than an int, and their lengths: struct linger, struct timeval twice, u64, and a name.
const LONG_OPTIONS: [(i32, i32, usize); 5] = [
    (libc::SOL_SOCKET, libc::SO_LINGER, 8),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 8),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
];

/// The options, flags and owner of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    v6: bool,
    /// As in [`INT_OPTIONS`] and [`LONG_OPTIONS`]; `None` where this kernel or socket does not have one.
    ints: Vec<Option<i32>>,
    longs: Vec<Option<Vec<u8>>>,
    file: FileFlags,
    buffers: BufferSizes,
}

/// O_NONBLOCK and O_ASYNC, and who gets the signals of the latter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileFlags {
    flags: i32,
    signal: i32,
    owner: Owner,
}

/// `struct f_owner_ex` of fcntl(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    kind: i32,
    pid: i32,
}

/// Where the application fixed them: otherwise the kernel goes on tuning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BufferSizes {
    send: Option<i32>,
    receive: Option<i32>,
}

impl Options {
    /// Those of this socket. Not while a [`Shallow`] or a [`ReceiveRoom`] of it is there: they change its buffers.
    pub fn of(socket: BorrowedFd<'_>, v6: bool) -> Result<Options, Refusal> {
        let locked = get_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
        let size =
            |lock, name| (locked & lock != 0).then(|| get_int(socket, libc::SOL_SOCKET, name)).flatten();
        let buffers = BufferSizes {
            send: size(SOCK_SNDBUF_LOCK, libc::SO_SNDBUF),
            receive: size(SOCK_RCVBUF_LOCK, libc::SO_RCVBUF),
        };
        Options::with_buffers(socket, v6, buffers)
    }

    fn with_buffers(socket: BorrowedFd<'_>, v6: bool, buffers: BufferSizes) -> Result<Options, Refusal> {
        let int = |option: &IntOption| {
            (v6 || !option.v6_only).then(|| get_int(socket, option.level, option.name)).flatten()
        };
        let long = |(level, name, length): &(i32, i32, usize)| {
            let mut value = vec![0; *length];
            let length = get(socket, *level, *name, &mut value)?;
            value.truncate(length);
            Some(value)
        };
        Ok(Options {
            v6,
            ints: INT_OPTIONS.iter().map(int).collect(),
            longs: LONG_OPTIONS.iter().map(long).collect(),
            file: FileFlags::of(socket)?,
            buffers,
        })
    }

    /// Give them to `new`, which nobody else has.
    pub fn give(&self, new: BorrowedFd<'_>) -> Result<(), Refusal> {
        for (option, wanted) in INT_OPTIONS.iter().zip(&self.ints) {
            if let Some(wanted) = wanted
                && get_int(new, option.level, option.name) != Some(*wanted)
            {
                set(new, option.level, option.name, &wanted.to_ne_bytes())?;
            }
        }
        for ((level, name, length), wanted) in LONG_OPTIONS.iter().zip(&self.longs) {
            let mut present = vec![0; *length];
            if let (Some(wanted), Some(length)) = (wanted, get(new, *level, *name, &mut present))
                && present[..length] != wanted[..]
            {
                set(new, *level, *name, wanted)?;
            }
        }
        let BufferSizes { send, receive } = self.buffers;
        for (size, force) in [(send, libc::SO_SNDBUFFORCE), (receive, libc::SO_RCVBUFFORCE)] {
            if let Some(size) = size {
                // The kernel doubles what it is given (socket(7)).
                set(new, libc::SOL_SOCKET, force, &(size / 2).to_ne_bytes())?;
            }
        }
        self.file.give(new)
    }
}

/// The options of an old socket that its new one has been given.
pub struct Given {
    options: Options,
    /// The new one's since.
    mark: Option<OptionsMark>,
}

impl Given {
    /// As [`Options::of`], and nobody else has `new`.
    pub fn from(
        old: BorrowedFd<'_>,
        v6: bool,
        new: BorrowedFd<'_>,
        inspector: &Inspector,
    ) -> Result<Given, Refusal> {
        let options = Options::of(old, v6)?;
        options.give(new)?;
        let facts = inspector.socket(new).map_err(|_| Refusal::InjectionFailed)?;
        Ok(Given { options, mark: facts.and_then(|facts| facts.options) })
    }

    /// What was changed at `old` since, which `facts` show now that nobody can change it, is changed at `new`, too. But for the
    /// buffers, whose sizes may be ours now.
    pub fn keep_up(
        &self,
        old: BorrowedFd<'_>,
        facts: &SocketFacts,
        new: BorrowedFd<'_>,
    ) -> Result<(), Refusal> {
        if self.mark.is_some() && self.mark == facts.options {
            return Ok(());
        }
        let Given { options: Options { v6, buffers, .. }, .. } = self;
        let now = Options::with_buffers(old, *v6, *buffers)?;
        if now == self.options { Ok(()) } else { now.give(new) }
    }
}

const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;
const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;

impl FileFlags {
    fn of(socket: BorrowedFd<'_>) -> Result<FileFlags, Refusal> {
        let fd = socket.as_raw_fd();
        let mut owner = Owner { kind: 0, pid: 0 };
        // SAFETY: F_GETOWN_EX writes a struct f_owner_ex, whose layout Owner has. The others give integers.
        let (flags, signal, ret) = unsafe {
            let owned = libc::fcntl(fd, F_GETOWN_EX, &raw mut owner);
            (libc::fcntl(fd, libc::F_GETFL), libc::fcntl(fd, F_GETSIG), owned)
        };
        let known = flags >= 0 && signal >= 0 && ret >= 0;
        let flags = flags & (libc::O_NONBLOCK | libc::O_ASYNC);
        if known { Ok(FileFlags { flags, signal, owner }) } else { Err(Refusal::UnknownOption) }
    }

    fn give(&self, new: BorrowedFd<'_>) -> Result<(), Refusal> {
        let new = new.as_raw_fd();
        // SAFETY: F_SETOWN_EX reads a struct f_owner_ex, whose layout Owner has. The others take integers.
        let ok = unsafe {
            (self.owner.pid == 0 || libc::fcntl(new, F_SETOWN_EX, &raw const self.owner) >= 0)
                && (self.signal == 0 || libc::fcntl(new, F_SETSIG, self.signal) >= 0)
                && libc::fcntl(new, libc::F_SETFL, self.flags) >= 0
        };
        if ok { Ok(()) } else { Err(Refusal::UnknownOption) }
    }
}

/// Room in the send buffer for `bytes` that are written before anybody reads; undone by [`SendRoom::give_back`].
pub struct SendRoom {
    locked: i32,
    size: i32,
}

impl SendRoom {
    pub fn make(socket: BorrowedFd<'_>, bytes: usize) -> Result<Option<SendRoom>, Refusal> {
        let size = get_int(socket, libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0);
        // An skb costs more than the bytes in it.
        let wanted = i32::try_from(bytes * 2).map_err(|_| Refusal::TooManyUnreadBytes)?;
        if wanted <= size {
            return Ok(None);
        }
        let locked = get_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
        set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &wanted.to_ne_bytes())?;
        Ok(Some(SendRoom { locked, size }))
    }

    /// The buffer as before: of its size if the application fixed it, or tuned by the kernel.
    pub fn give_back(self, socket: BorrowedFd<'_>) {
        if self.locked & SOCK_SNDBUF_LOCK != 0 {
            let _ = set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &(self.size / 2).to_ne_bytes());
        }
        let _ = set(socket, libc::SOL_SOCKET, SO_BUF_LOCK, &self.locked.to_ne_bytes());
    }
}

/// Room in the receive buffer of a new socket for `bytes` that arrive before anybody reads. It stays: a smaller buffer would
/// drop what comes after them. The kernel goes on tuning it; one that the application fixed is left as it is.
pub fn make_room_for_carried(new: BorrowedFd<'_>, bytes: u64) -> Result<(), Refusal> {
    let size = get_int(new, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0);
    let locked = get_int(new, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0);
    let wanted = i32::try_from(bytes).map_err(|_| Refusal::TooManyUnreadBytes)?;
    // Half of the buffer is offered to the peer, and the kernel doubles what it is given (socket(7)).
    if locked & SOCK_RCVBUF_LOCK != 0 || wanted <= size / 2 {
        return Ok(());
    }
    set(new, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &wanted.to_ne_bytes())?;
    set(new, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &wanted.to_ne_bytes())?;
    set(new, libc::SOL_SOCKET, SO_BUF_LOCK, &locked.to_ne_bytes())
}

/// A connection that is kept shallow until it is frozen: its application waits, instead of filling the send buffer, and the
/// peer's, instead of filling the receive buffer. Undone when dropped.
///
/// Bytes that are queued already are not touched, and what the peer was told that it may send, it may: the window shrinks by
/// what comes ([`SocketFacts::receive_window`](crate::inspect::SocketFacts)). The receive buffer is left alone: in a smaller
/// one the kernel drops what has no room, and closes the window for long (tcp_clamp_window in net/ipv4/tcp_input.c).
pub struct Shallow<'a> {
    socket: BorrowedFd<'a>,
    locked: i32,
    send: i32,
    clamp: i32,
}

/// Bytes that may be queued on a shallow connection, each way.
const SHALLOW_BYTES: i32 = 128 << 10;

impl<'a> Shallow<'a> {
    pub fn make(socket: BorrowedFd<'a>) -> Result<Shallow<'a>, Refusal> {
        let shallow = Shallow {
            socket,
            locked: get_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0),
            send: get_int(socket, libc::SOL_SOCKET, libc::SO_SNDBUF).unwrap_or(0),
            clamp: get_int(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP).unwrap_or(0),
        };
        // Or the kernel would go on tuning the buffers, and the clamp with them.
        let locked = shallow.locked | SOCK_SNDBUF_LOCK | SOCK_RCVBUF_LOCK;
        set(socket, libc::SOL_SOCKET, SO_BUF_LOCK, &locked.to_ne_bytes())?;
        if shallow.send / 2 > SHALLOW_BYTES {
            set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SHALLOW_BYTES.to_ne_bytes())?;
        }
        if shallow.clamp > SHALLOW_BYTES {
            set(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &SHALLOW_BYTES.to_ne_bytes())?;
        }
        Ok(shallow)
    }

    pub fn socket(&self) -> BorrowedFd<'a> {
        self.socket
    }
}

impl Drop for Shallow<'_> {
    fn drop(&mut self) {
        if self.clamp > SHALLOW_BYTES {
            let _ = set(self.socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &self.clamp.to_ne_bytes());
        }
        if self.send / 2 > SHALLOW_BYTES {
            let size = self.send / 2;
            let _ = set(self.socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &size.to_ne_bytes());
        }
        let _ = set(self.socket, libc::SOL_SOCKET, SO_BUF_LOCK, &self.locked.to_ne_bytes());
    }
}

/// Room to receive what the peer has sent already, while nobody reads; undone when dropped.
pub struct ReceiveRoom<'a> {
    socket: BorrowedFd<'a>,
    locked: i32,
    size: i32,
    clamp: i32,
}

impl<'a> ReceiveRoom<'a> {
    pub fn make(socket: BorrowedFd<'a>, bytes: usize) -> Result<ReceiveRoom<'a>, Refusal> {
        let room = ReceiveRoom {
            socket,
            locked: get_int(socket, libc::SOL_SOCKET, SO_BUF_LOCK).unwrap_or(0),
            size: get_int(socket, libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0),
            clamp: get_int(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP).unwrap_or(0),
        };
        let wanted = i32::try_from(bytes).map_err(|_| Refusal::TooManyUnreadBytes)?;
        set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &wanted.to_ne_bytes())?;
        set(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &wanted.to_ne_bytes())?;
        // A peer that saw no window would ask only after 200 ms.
        acknowledge(socket);
        Ok(room)
    }
}

impl Drop for ReceiveRoom<'_> {
    fn drop(&mut self) {
        let _ = set(self.socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(self.size / 2).to_ne_bytes());
        let _ = set(self.socket, libc::SOL_SOCKET, SO_BUF_LOCK, &self.locked.to_ne_bytes());
        if self.clamp > 0 {
            let _ = set(self.socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &self.clamp.to_ne_bytes());
        }
    }
}

/// Tell the peer at once what has arrived, and how much room there is. The kernel does so when something is read, and peeking
/// counts as reading (tcp_cleanup_rbuf in net/ipv4/tcp.c); while nobody reads, it acknowledges after 40 ms.
pub fn acknowledge(socket: BorrowedFd<'_>) {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let _ = nix::sys::socket::recv(socket.as_raw_fd(), &mut [0], flags);
}

/// A connection whose last bytes are sent at once, undone when dropped. Left to Nagle, those that are less than a segment wait
/// until the peer, where nobody reads, has acknowledged the ones before, which takes it 40 ms.
pub struct Pushed<'a>(BorrowedFd<'a>);

impl<'a> Pushed<'a> {
    /// `None`: they are anyway.
    pub fn new(socket: BorrowedFd<'a>) -> Option<Pushed<'a>> {
        let delays = get_int(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY) == Some(0);
        // Not `then_some`: what is not returned would be undone.
        (delays && set_int(socket, libc::IPPROTO_TCP, libc::TCP_NODELAY, 1)).then(|| Pushed(socket))
    }
}

impl Drop for Pushed<'_> {
    fn drop(&mut self) {
        let _ = set_int(self.0, libc::IPPROTO_TCP, libc::TCP_NODELAY, 0);
    }
}

pub fn get_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> Option<i32> {
    let mut bytes = [0; 4];
    (get(socket, level, name, &mut bytes)? == 4).then(|| i32::from_ne_bytes(bytes))
}

pub fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> bool {
    set(socket, level, name, &value.to_ne_bytes()).is_ok()
}

/// The length of the value; `None` if this kernel or socket does not have the option.
fn get(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> Option<usize> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: getsockopt(2) writes at most `length` bytes to `value`, and how many to `length`.
    let ret =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut length) };
    (ret == 0).then_some(length as usize)
}

fn set(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> Result<(), Refusal> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: setsockopt(2) reads `length` bytes from `value`.
    let ret = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if ret == 0 { Ok(()) } else { Err(Refusal::UnknownOption) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    fn socket() -> (TcpStream, TcpListener) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        (TcpStream::connect(listener.local_addr().unwrap()).unwrap(), listener)
    }

    #[test]
    fn options_that_were_set_are_set_on_the_new_socket_too() {
        let ((old, _a), (new, _b)) = (socket(), socket());
        for (level, name, value) in [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
            (libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
            (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 33),
            (libc::IPPROTO_IP, libc::IP_TOS, 16),
            (libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
        ] {
            set(old.as_fd(), level, name, &i32::to_ne_bytes(value)).unwrap();
        }
        set(old.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").unwrap();
        old.set_read_timeout(Some(std::time::Duration::from_millis(1500))).unwrap();
        old.set_nonblocking(true).unwrap();
        Options::of(old.as_fd(), false).unwrap().give(new.as_fd()).unwrap();
        for option in INT_OPTIONS.iter().filter(|option| !option.v6_only) {
            let value = |end: &TcpStream| get_int(end.as_fd(), option.level, option.name);
            assert_eq!(value(&old), value(&new), "option {}/{}", option.level, option.name);
        }
        let mut name = [0; 16];
        get(new.as_fd(), libc::IPPROTO_TCP, libc::TCP_CONGESTION, &mut name).unwrap();
        assert!(name.starts_with(b"reno\0"));
        assert_eq!(new.read_timeout().unwrap(), Some(std::time::Duration::from_millis(1500)));
        // SAFETY: F_GETFL takes nothing and gives flags.
        assert!(unsafe { libc::fcntl(new.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK != 0);
    }

    #[test]
    fn buffer_sizes_are_carried_only_where_the_application_fixed_them() {
        let ((old, _a), (new, _b)) = (socket(), socket());
        set(old.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, &65536i32.to_ne_bytes()).unwrap();
        Options::of(old.as_fd(), false).unwrap().give(new.as_fd()).unwrap();
        assert_eq!(get_int(new.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF), Some(131072));
        assert_eq!(get_int(new.as_fd(), libc::SOL_SOCKET, SO_BUF_LOCK), Some(SOCK_RCVBUF_LOCK));
    }

    #[test]
    fn what_is_changed_after_options_were_given_is_changed_there_too() {
        let ((old, _a), (new, _b)) = (socket(), socket());
        let inspector = inspector();
        let given = Given::from(old.as_fd(), false, new.as_fd(), &inspector).unwrap();
        set(old.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, &1i32.to_ne_bytes()).unwrap();
        old.set_nonblocking(true).unwrap();
        let _ours = Shallow::make(old.as_fd()).unwrap();
        let facts = inspector.socket(old.as_fd()).unwrap().unwrap();
        given.keep_up(old.as_fd(), &facts, new.as_fd()).unwrap();
        assert_eq!(get_int(new.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE), Some(1));
        assert_eq!(FileFlags::of(new.as_fd()), FileFlags::of(old.as_fd()));
        assert_eq!(get_int(new.as_fd(), libc::SOL_SOCKET, SO_BUF_LOCK), Some(0));
    }

    fn inspector() -> Inspector {
        crate::inspect::Programs::load().unwrap().inspector().unwrap()
    }

    fn mark(inspector: &Inspector, end: &TcpStream) -> OptionsMark {
        inspector.socket(end.as_fd()).unwrap().unwrap().options.expect("this kernel keeps options elsewhere")
    }

    #[test]
    fn sockets_with_the_same_options_have_the_same_mark() {
        let inspector = inspector();
        let ((connected, listener), (new, _b)) = (socket(), socket());
        let (accepted, _) = listener.accept().unwrap();
        for old in [&connected, &accepted] {
            old.set_nodelay(true).unwrap();
            old.set_nonblocking(true).unwrap();
            set_int(old.as_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
            let given = Given::from(old.as_fd(), false, new.as_fd(), &inspector).unwrap();
            assert_eq!(given.mark, Some(mark(&inspector, old)));
        }
    }

    #[test]
    fn each_option_that_is_carried_changes_the_mark() {
        let inspector = inspector();
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let changed = |what: &str, change: &dyn Fn(&TcpStream) -> bool| {
            let end = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let before = mark(&inspector, &end);
            assert_eq!(before, mark(&inspector, &end));
            assert!(change(&end), "{what} cannot be changed");
            assert_ne!(before, mark(&inspector, &end), "{what}");
        };
        for IntOption { level, name, .. } in INT_OPTIONS {
            changed(&format!("option {level}/{name}"), &|end| {
                let before = get_int(end.as_fd(), *level, *name);
                [1, 5, 16, 33, 100].iter().any(|value| {
                    set_int(end.as_fd(), *level, *name, *value)
                        && get_int(end.as_fd(), *level, *name) != before
                })
            });
        }
        for (level, name, length) in LONG_OPTIONS {
            changed(&format!("option {level}/{name}"), &|end| {
                let mut value = vec![0; length];
                match level {
                    libc::IPPROTO_TCP => value[..4].copy_from_slice(b"reno"),
                    // One second, or one byte a second.
                    _ => value[0] = 1,
                }
                set(end.as_fd(), level, name, &value).is_ok()
            });
        }
        let own = Owner { kind: 1, pid: std::process::id() as i32 };
        // SAFETY: F_SETOWN_EX reads a struct f_owner_ex, whose layout Owner has. The others take integers.
        unsafe {
            changed("its owner", &|end| libc::fcntl(end.as_raw_fd(), F_SETOWN_EX, &raw const own) >= 0);
            changed("its signal", &|end| libc::fcntl(end.as_raw_fd(), F_SETSIG, libc::SIGUSR1) >= 0);
        }
        changed("O_NONBLOCK", &|end| end.set_nonblocking(true).is_ok());
    }

    #[test]
    fn traffic_does_not_change_the_mark() {
        let inspector = inspector();
        let (mut end, listener) = socket();
        let (mut peer, _) = listener.accept().unwrap();
        let before = mark(&inspector, &end);
        end.write_all(&[0; 100_000]).unwrap();
        peer.read_exact(&mut [0; 100_000]).unwrap();
        peer.write_all(b"answer").unwrap();
        end.read_exact(&mut [0; 6]).unwrap();
        assert_eq!(before, mark(&inspector, &end));
    }

    #[test]
    fn a_shallow_connection_is_as_it_was_afterwards() {
        let (end, _listener) = socket();
        let before = |name| get_int(end.as_fd(), libc::SOL_SOCKET, name);
        let clamp = || get_int(end.as_fd(), libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP);
        set(end.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(4i32 << 20).to_ne_bytes()).unwrap();
        set(end.as_fd(), libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &(2i32 << 20).to_ne_bytes()).unwrap();
        let all = || (before(libc::SO_SNDBUF), before(SO_BUF_LOCK), clamp());
        let was = all();
        let shallow = Shallow::make(end.as_fd()).unwrap();
        assert_eq!(clamp(), Some(SHALLOW_BYTES));
        drop(shallow);
        assert_eq!(all(), was);
    }

    #[test]
    fn bytes_that_wait_for_an_acknowledgement_are_pushed() {
        let (mut end, listener) = socket();
        let (mut peer, _) = listener.accept().unwrap();
        let delays = |socket: &TcpStream| !socket.nodelay().unwrap();
        let pushed = Pushed::new(end.as_fd());
        assert!(!delays(&end));
        drop(pushed);
        assert!(delays(&end));
        peer.set_nodelay(true).unwrap();
        drop(Pushed::new(peer.as_fd()));
        assert!(!delays(&peer));
        // The kernel is in no hurry to acknowledge the first, and Nagle lets the second wait for that.
        set(peer.as_fd(), libc::IPPROTO_TCP, libc::TCP_QUICKACK, &0i32.to_ne_bytes()).unwrap();
        end.write_all(b"a").unwrap();
        end.write_all(b"b").unwrap();
        let _pushed = Pushed::new(end.as_fd());
        peer.set_nonblocking(true).unwrap();
        assert_eq!(peer.read(&mut [0; 4]).unwrap(), 2);
    }

    #[test]
    fn a_peek_offset_is_refused() {
        let (end, _listener) = socket();
        if set(end.as_fd(), libc::SOL_SOCKET, SO_PEEK_OFF, &0i32.to_ne_bytes()).is_ok() {
            assert_eq!(may_be_carried(end.as_fd()), Err(Refusal::PeekOffset));
        }
    }
}
