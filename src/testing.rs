// SPDX-License-Identifier: Apache-2.0
//! Host sockets for unit tests, over loopback.

use std::{
    net::TcpStream,
    os::fd::{AsFd as _, AsRawFd as _},
    time::Duration,
};

use libbpf_rs::MapHandle;
use nix::libc;

use crate::identity::Names;

/// Make it a host socket of the router that has this map.
pub fn give_names(socket: &TcpStream, identities: &MapHandle) -> Names {
    let [local, remote] = ["10.244.1.10:40000", "10.244.2.10:80"].map(|end| end.parse().unwrap());
    let names = Names { swap: 7, local, remote };
    names.write(identities, socket.as_fd()).unwrap();
    names
}

/// From now on nothing arrives at this socket, and nobody is told.
pub fn lose_all(socket: &TcpStream) {
    let nothing = libc::sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: 0 };
    let filter = libc::sock_fprog { len: 1, filter: (&raw const nothing).cast_mut() };
    let (at, length) = ((&raw const filter).cast(), size_of_val(&filter) as u32);
    // SAFETY: setsockopt(2) reads a program of one instruction, which is there until it returns.
    let attached =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, at, length) };
    assert_eq!(attached, 0);
}

/// Within ten seconds?
pub fn comes_true(mut is_so: impl FnMut() -> bool) -> bool {
    (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        is_so()
    })
}
