// SPDX-License-Identifier: Apache-2.0
use std::mem::offset_of;

use super::*;
use crate::bytes::as_bytes;

fn event(local: [u8; 16], v6: u8) -> types::connection_event {
    types::connection_event {
        kind: EVENT_CONNECTION,
        tgid: 100,
        tid: 101,
        fd: 7,
        socket: 4026,
        cgroup_id: 99,
        netns: 5,
        local_port: 40000,
        remote_port: 80,
        local,
        remote: local,
        comm: *b"server\0\0\0\0\0\0\0\0\0\0",
        side: SIDE_CLIENT,
        v6,
        padding: [0; 6],
    }
}

#[test]
fn the_layout_is_that_of_the_header() {
    assert_eq!(size_of::<types::connection_event>(), 96);
    assert_eq!(offset_of!(types::connection_event, local), 40);
    assert_eq!(offset_of!(types::connection_event, side), 88);
    assert_eq!(size_of::<types::closed_event>(), 16);
}

#[test]
fn a_mapped_address_is_told_as_ipv4_of_an_ipv6_socket() {
    let mut local = [0; 16];
    local[10..].copy_from_slice(&[0xff, 0xff, 10, 244, 1, 9]);
    let Some(TraceEvent::Connection(seen)) = decode(as_bytes(&event(local, 1))) else { panic!() };
    assert_eq!((seen.local, seen.v6), ("10.244.1.9:40000".parse().unwrap(), true));
    assert_eq!((seen.comm.as_str(), seen.side), ("server", Side::Client));
}

#[test]
fn a_short_or_unknown_record_is_no_event() {
    let bytes = as_bytes(&event([1; 16], 1)).to_vec();
    assert_eq!(decode(&bytes[..bytes.len() - 1]), None);
    assert_eq!(decode(&[9, 0, 0, 0]), None);
    assert_eq!(decode(&[]), None);
}

#[test]
fn the_depth_of_a_cgroup_is_counted_from_the_root_of_its_hierarchy() {
    let root = crate::settings::cgroup2_mount().unwrap();
    assert_eq!(Scope::of(&root).unwrap().level, 0);
}
