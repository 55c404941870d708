// SPDX-License-Identifier: Apache-2.0
//! Reads what a socket has not got acknowledged, out of its send queue, and leaves it there.
//!
//! Only a socket in repair mode (TCP_REPAIR, `tcp_peek_sndq` in net/ipv4/tcp.c) shows its send queue. In that mode the
//! application's own calls fail, so nobody who runs may see it: all holders are frozen, and a child process takes the
//! socket in and out of it. The child shares our memory and descriptors and nothing else: a SIGKILL that ends this
//! process in the middle does not end the child. What does (an end of the whole cgroup, of the machine's memory) leaves
//! the socket in repair mode until the next forwarder finds it: [`leave_repair`].

use std::os::fd::{AsRawFd, BorrowedFd};

use forwarder_api::{MAX_QUEUED_BYTES, Refusal};

use crate::options::{get_int, set_int};

/// linux/tcp.h; not in the libc crate.
const TCP_REPAIR_ON: i32 = 1;
/// Without a window probe: nothing is to be sent.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_SEND_QUEUE: i32 = 2;

/// More than one segment of the retransmission queue holds: its first may begin before what is acknowledged.
const SLACK: usize = 1 << 20;

const STACK: usize = 64 << 10;

/// The last bytes that the application has written, up to `write_seq`, with `length` of them not acknowledged: so many,
/// or some more. Its processes must be frozen.
pub fn peek(socket: BorrowedFd<'_>, length: usize) -> Result<Vec<u8>, Refusal> {
    if length > MAX_QUEUED_BYTES {
        return Err(Refusal::TooManyUnreadBytes);
    }
    let mut errand = Errand {
        socket,
        // Not zero: its memory is there then, and the copy short.
        bytes: vec![0xff; length + SLACK],
        // The mode takes it away.
        reuse: get_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR).ok_or(Refusal::InjectionFailed)?,
        read: -1,
    };
    in_child(&mut errand)?;
    // The length of all there is, also when there was no room for it.
    let read = usize::try_from(errand.read).map_err(|_| Refusal::InjectionFailed)?;
    if read > errand.bytes.len() {
        return Err(Refusal::TooManyUnreadBytes);
    }
    errand.bytes.truncate(read);
    Ok(errand.bytes)
}

/// Take a socket out of the repair mode that a child of another forwarder could not end. Was it in it?
pub fn leave_repair(socket: BorrowedFd<'_>) -> bool {
    get_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR) == Some(TCP_REPAIR_ON)
        && set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
}

/// What the child does, and what came of it.
struct Errand<'a> {
    socket: BorrowedFd<'a>,
    bytes: Vec<u8>,
    reuse: i32,
    /// As recv(2) returns it.
    read: isize,
}

/// Runs in the child: system calls only, nothing that takes a lock or allocates.
extern "C" fn run(errand: *mut libc::c_void) -> i32 {
    // SAFETY: `in_child` gives the address of its Errand, which it does not touch until this process has ended; if our
    // parent is killed, the memory stays as long as this process uses it.
    let errand = unsafe { &mut *errand.cast::<Errand<'_>>() };
    let socket = errand.socket;
    if !set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_ON) {
        return 1;
    }
    // From the selection to the end of the mode acknowledgements are processed as if unsent bytes had been sent: they are
    // sent again then, but the time is kept short.
    if set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) {
        let (to, room) = (errand.bytes.as_mut_ptr().cast(), errand.bytes.len());
        // SAFETY: recv(2) writes at most `room` bytes to `to`: the vector has so many.
        errand.read =
            unsafe { libc::recv(socket.as_raw_fd(), to, room, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    }
    let left = set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);
    let given_back = set_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, errand.reuse);
    i32::from(!(left && given_back))
}

/// Let a process of its own do it, and wait for its end.
fn in_child(errand: &mut Errand<'_>) -> Result<(), Refusal> {
    let mut stack = vec![0u8; STACK];
    // CLONE_VFORK: this thread stands still until the child has ended, so that the child may use its thread-local storage
    // (errno). No signal tells of its end.
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK;
    // SAFETY: the stack grows down from its end, which is aligned to 16 bytes; stack and errand live until the child has
    // ended, because this thread waits for it; `run` keeps to what a child that shares memory may do.
    let child = unsafe {
        let top = stack.as_mut_ptr().add(STACK);
        let top = top.sub(top as usize % 16);
        libc::clone(run, top.cast(), flags, std::ptr::from_mut(errand).cast())
    };
    if child < 0 {
        return Err(Refusal::InjectionFailed);
    }
    let mut status = 0;
    loop {
        // SAFETY: waitpid(2) writes an int. __WALL: a child without a signal at its end is not waited for otherwise.
        let ended = unsafe { libc::waitpid(child, &mut status, libc::__WALL) };
        if ended == child {
            break;
        }
        if ended < 0 && std::io::Error::last_os_error().kind() != std::io::ErrorKind::Interrupted {
            return Err(Refusal::InjectionFailed);
        }
    }
    if status == 0 { Ok(()) } else { Err(Refusal::InjectionFailed) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        os::fd::AsFd,
    };

    use super::*;

    /// A sender whose receiver reads nothing, and what it could write before it had to wait: the last bytes of it are
    /// not acknowledged.
    fn full() -> (TcpStream, TcpStream, Vec<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (receiver, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        let mut written = Vec::new();
        loop {
            let next: Vec<u8> = (written.len()..written.len() + 5000).map(|at| (at / 7) as u8).collect();
            match sender.write(&next) {
                Ok(count) => written.extend_from_slice(&next[..count]),
                Err(_) => return (sender, receiver, written),
            }
        }
    }

    fn unacknowledged(sender: &TcpStream) -> usize {
        let mut count = 0;
        // SAFETY: SIOCOUTQ (TIOCOUTQ) writes an int.
        assert_eq!(unsafe { libc::ioctl(sender.as_raw_fd(), libc::TIOCOUTQ, &raw mut count) }, 0);
        count as usize
    }

    #[test]
    fn the_queue_ends_with_the_last_byte_written_and_stays_as_it_is() {
        let (sender, mut receiver, written) = full();
        let queue = peek(sender.as_fd(), unacknowledged(&sender)).unwrap();
        // What is acknowledged meanwhile may be missing.
        let length = unacknowledged(&sender);
        assert!(queue.len() >= length && length > 0, "{} of {length}", queue.len());
        assert!(written.ends_with(&queue));
        drop(sender);
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).unwrap();
        assert!(received == written);
    }

    #[test]
    fn a_socket_is_out_of_repair_and_reuses_its_address_as_before() {
        for reuse in [0, 1] {
            let (sender, _receiver, _) = full();
            assert!(set_int(sender.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse));
            peek(sender.as_fd(), unacknowledged(&sender)).unwrap();
            assert_eq!(get_int(sender.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR), Some(0));
            assert_eq!(get_int(sender.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR), Some(reuse));
            assert!(!leave_repair(sender.as_fd()));
        }
    }

    #[test]
    fn a_socket_that_was_left_in_repair_is_taken_out_of_it() {
        let (sender, mut receiver, written) = full();
        assert!(set_int(sender.as_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_ON));
        assert!(leave_repair(sender.as_fd()));
        drop(sender);
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).unwrap();
        assert!(received == written);
    }

    #[test]
    fn a_queue_that_is_too_long_is_refused() {
        let (sender, _receiver, _) = full();
        assert_eq!(peek(sender.as_fd(), MAX_QUEUED_BYTES + 1), Err(Refusal::TooManyUnreadBytes));
    }
}
