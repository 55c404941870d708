// SPDX-License-Identifier: Apache-2.0
use std::mem::offset_of;

use super::{
    reader::{EVENT_BIRTH, EVENT_CONNECTION, Record, SIDE_CLIENT, connection, decode, types},
    *,
};
use crate::bytes::as_bytes;

fn event(local: [u8; 16], v6: u8) -> types::connection_event {
    types::connection_event {
        kind: EVENT_CONNECTION,
        netns: 5,
        birth: types::birth { cookie: 1, sock: 2, born_ns: 3, side: SIDE_CLIENT },
        age_ns: 7,
        bytes: 8,
        socket: 4026,
        cgroup_id: 99,
        local_port: 40000,
        remote_port: 80,
        local,
        remote: local,
        v6,
        padding: [0; 3],
    }
}

#[test]
fn the_layout_is_that_of_the_header() {
    assert_eq!(size_of::<types::connection_event>(), 112);
    assert_eq!(offset_of!(types::connection_event, birth), 8);
    assert_eq!(offset_of!(types::connection_event, local), 76);
    assert_eq!(offset_of!(types::connection_event, v6), 108);
    assert_eq!(size_of::<types::closed_event>(), 56);
    assert_eq!(offset_of!(types::closed_event, identity), 8);
}

#[test]
fn a_mapped_address_is_told_as_ipv4_of_an_ipv6_socket() {
    let mut local = [0; 16];
    local[10..].copy_from_slice(&[0xff, 0xff, 10, 244, 1, 9]);
    let Record::Connection(record) = decode(as_bytes(&event(local, 1))) else { panic!() };
    let seen = connection(&record, Instant::now());
    assert_eq!((seen.local, seen.v6), ("10.244.1.9:40000".parse().unwrap(), true));
    assert_eq!((seen.socket, seen.side), (SocketInode(4026), Side::Client));
}

#[test]
fn a_short_or_unknown_record_is_odd() {
    let bytes = as_bytes(&event([1; 16], 1)).to_vec();
    let is_odd = |bytes: &[u8]| matches!(decode(bytes), Record::Odd);
    assert!(is_odd(&bytes[..bytes.len() - 1]) && is_odd(&[9, 0, 0, 0]) && is_odd(&[]));
    assert!(matches!(decode(&EVENT_BIRTH.to_ne_bytes()), Record::Birth));
}
