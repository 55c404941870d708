// SPDX-License-Identifier: Apache-2.0
use std::{
    io::Write as _,
    mem::offset_of,
    net::{TcpListener, TcpStream},
    os::fd::AsFd as _,
    time::Duration,
};

use super::{
    reader::{
        EVENT_BIRTH, EVENT_CONNECTION, EVENT_HOST_SOCKET_WAITS, Record, SIDE_CLIENT, connection, decode,
        types,
    },
    *,
};
use crate::{
    bytes::as_bytes,
    testing::{comes_true, give_names, lose_all},
};

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
    assert!(matches!(decode(&EVENT_HOST_SOCKET_WAITS.to_ne_bytes()), Record::HostSocketWaits));
}

/// After 200, 400 and 800 ms on loopback.
const THREE_TIME_OUTS: Duration = Duration::from_millis(1600);

#[test]
fn a_host_socket_that_times_out_twice_is_told_and_no_other() {
    let identities = crate::identity::nobody().unwrap();
    let scope = Scope::of(&crate::settings::cgroup2_mount().unwrap()).unwrap();
    let (events, mut told) = mpsc::channel(1024);
    let _tracer = Tracer::start(&scope, identities.as_fd(), Telling::AtOnce, events).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        lose_all(&server);
        (client, server)
    };

    let (mut other, _server) = connect();
    other.write_all(b"lost").unwrap();
    std::thread::sleep(THREE_TIME_OUTS);
    let waits = |event| event == TraceEvent::HostSocketWaits;
    assert!(!std::iter::from_fn(|| told.try_recv().ok()).any(waits));

    let (mut host_socket, _server) = connect();
    give_names(&host_socket, &identities);
    host_socket.write_all(b"lost").unwrap();
    assert!(comes_true(|| std::iter::from_fn(|| told.try_recv().ok()).any(waits)));
}
