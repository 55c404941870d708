// SPDX-License-Identifier: Apache-2.0
//! Takes bytes and descriptors out of a unix socket. recvmsg(2) of the nix crate fails when not all descriptors find room
//! in our table, and leaves those that did open for ever: here they come back, and are closed.

use std::{
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

/// Room for 12 descriptors at once, in words: a control message must be aligned.
const CONTROL_WORDS: usize = 8;

pub struct Received {
    /// Bytes; zero at the end.
    pub length: usize,
    pub fds: Vec<OwnedFd>,
    /// There were more, and our table was full.
    pub lost_fds: bool,
}

pub fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<Received> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    // SAFETY: all zero is a msghdr that says nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut iovec;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control);
    // SAFETY: `message` points to one buffer of bytes and one for control messages, which outlive the call.
    let length = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;
    let lost_fds = message.msg_flags & libc::MSG_CTRUNC != 0;
    Ok(Received { length, fds: descriptors(&message), lost_fds })
}

fn descriptors(message: &libc::msghdr) -> Vec<OwnedFd> {
    let mut fds = Vec::new();
    // SAFETY: the kernel has filled the control buffer with whole messages, within its length, and these walk over them.
    // The descriptors in it were made for us just now; nobody else owns them.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(message);
        while let Some(control) = header.as_ref() {
            if (control.cmsg_level, control.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
                let count = (control.cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                fds.extend((0..count).map(|index| OwnedFd::from_raw_fd(data.add(index).read_unaligned())));
            }
            header = libc::CMSG_NXTHDR(message, header);
        }
    }
    fds
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::IoSlice, os::fd::AsRawFd};

    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

    use super::*;

    fn sent(count: usize) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..count).map(|_| File::open("/dev/null").unwrap()).collect();
        let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let control = [ControlMessage::ScmRights(&raw)];
        sendmsg::<()>(theirs.as_raw_fd(), &[IoSlice::new(b"word")], &control, MsgFlags::empty(), None)
            .unwrap();
        ours
    }

    fn check(count: usize, received: usize, lost_fds: bool) {
        let mut bytes = [0; 16];
        let message = receive(&sent(count), &mut bytes).unwrap();
        assert_eq!((message.length, &bytes[..4]), (4, &b"word"[..]));
        assert_eq!((message.fds.len(), message.lost_fds), (received, lost_fds));
    }

    #[test]
    fn descriptors_come_with_the_bytes() {
        check(2, 2, false);
    }

    #[test]
    fn of_more_descriptors_than_find_room_the_first_come_and_the_others_are_known_to_be_lost() {
        check(13, 12, true);
    }
}
