// SPDX-License-Identifier: Apache-2.0
//! Reads what a socket has not got acknowledged, out of its send queue, and leaves it there.
//!
//! Only a socket in repair mode (TCP_REPAIR, `tcp_peek_sndq` in net/ipv4/tcp.c) shows its send queue. In that mode the
//! application's own calls fail, so nobody who runs may see it: all holders are frozen, by a child that outlives a SIGKILL of
//! this process until the mode is over ([`crate::child`]). What ends the child as well (an end of the whole cgroup, of the
//! machine's memory) leaves the socket in repair mode until the next forwarder finds it: [`leave_repair`].

use std::os::fd::{AsRawFd, BorrowedFd};

use forwarder_api::{MAX_QUEUED_BYTES, Refusal};

use crate::{
    child,
    options::{get_int, set_int},
};

/// linux/tcp.h; not in the libc crate.
const TCP_REPAIR_ON: i32 = 1;
/// Without a window probe: nothing is to be sent.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_SEND_QUEUE: i32 = 2;

/// More than one segment of the retransmission queue holds: its first may begin before what is acknowledged.
const SLACK: usize = 1 << 20;

/// The last bytes that the application has written, up to `write_seq`, with `length` of them not acknowledged: so many,
/// or some more. Its processes must be frozen.
pub fn peek(socket: BorrowedFd<'_>, length: usize) -> Result<Vec<u8>, Refusal> {
    if length > MAX_QUEUED_BYTES {
        return Err(Refusal::TooManyUnreadBytes);
    }
    // Not zero: its memory is there then, and the copy short.
    let mut bytes = vec![0xff; length + SLACK];
    // The mode takes it away.
    let reuse = get_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR).ok_or(Refusal::InjectionFailed)?;
    // The length of all there is, also when there was no room for it.
    let read = read_in_repair(socket, &mut bytes, reuse).ok_or(Refusal::InjectionFailed)?;
    if read > bytes.len() {
        return Err(Refusal::TooManyUnreadBytes);
    }
    bytes.truncate(read);
    Ok(bytes)
}

/// As recv(2) returns it, and the socket as it was. System calls only.
fn read_in_repair(socket: BorrowedFd<'_>, bytes: &mut [u8], reuse: i32) -> Option<usize> {
    let _outliving = child::outlive();
    if !set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_ON) {
        return None;
    }
    let mut read = -1;
    // From the selection to the end of the mode acknowledgements are processed as if unsent bytes had been sent: they are
    // sent again then, but the time is kept short.
    if set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) {
        let (to, room) = (bytes.as_mut_ptr().cast(), bytes.len());
        // SAFETY: recv(2) writes at most `room` bytes to `to`: the slice has so many.
        read = unsafe { libc::recv(socket.as_raw_fd(), to, room, libc::MSG_PEEK | libc::MSG_DONTWAIT) };
    }
    let left = set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP);
    let given_back = set_int(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse);
    usize::try_from(read).ok().filter(|_| left && given_back)
}

/// Take a socket out of the repair mode that a child of another forwarder could not end. Was it in it?
pub fn leave_repair(socket: BorrowedFd<'_>) -> bool {
    get_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR) == Some(TCP_REPAIR_ON)
        && set_int(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
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
