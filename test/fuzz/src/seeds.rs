// SPDX-License-Identifier: Apache-2.0
//! What is well-formed, for fuzzers to begin with. `examples/seeds.rs` writes it to files.

use std::net::SocketAddr;

use ebpf_router::wire::{
    Attempted, Cause, Message, Purpose, Rendezvous, TOKEN, Token, Tuple, encode, preamble,
};
use forwarder_api::{ConnId, Direction, Event, Frame, Holder, PrepareTarget, Refusal, Request, SocketInode};

type Seeds = Vec<Vec<u8>>;

/// Of each program in `targets`, by its name.
pub fn all() -> [(&'static str, Seeds); 8] {
    [
        ("fuzz-wire", wire()),
        ("fuzz-letter", letter()),
        ("fuzz-request", request()),
        ("fuzz-event", event()),
        ("fuzz-rule", rule()),
        ("fuzz-manifest", manifest()),
        ("fuzz-labels", labels()),
        ("fuzz-peers", peers()),
    ]
}

/// Frames of a peer.
pub fn wire() -> Seeds {
    let (attempted, token) = (Attempted { conn: ConnId(7), number: 9 }, Token([3; TOKEN]));
    let local: SocketAddr = ([10, 244, 1, 9], 40000).into();
    let remote: SocketAddr = ([0xfd00, 0, 0, 0, 0, 0, 0, 2], 80).into();
    let tuple = Tuple { local: local.into(), remote: remote.into() };
    let (direction, cause) = (Direction::ToHost, Cause::Rules);
    let rendezvous = Rendezvous { host: Some((local, token)), witness: token };
    let messages = [
        Message::Know { tuple, declined: Some(Refusal::NoRuleMatches), answer: true },
        Message::Ask { tuple, direction, cause },
        Message::Offer { attempted, tuple, direction, cause },
        Message::Refuse { attempted, reason: Refusal::IoUring },
        Message::Accept { attempted, rendezvous, holder: Holder(1) },
        Message::Begin { attempted },
        Message::Cancel { attempted, reason: Refusal::Stopping },
        Message::Relay { attempted, message: vec![1, 2, 3] },
    ];
    let mut seeds: Seeds = messages.iter().flat_map(encode).collect();
    seeds.push(preamble(Purpose::Secure).to_vec());
    seeds
}

/// Of a peer's forwarder.
pub fn letter() -> Seeds {
    // Four bytes of length, the number of the batch, and each word; the last with two looks.
    let words = [vec![0, 2, 1, 2], vec![1, 3, 1, 9, 9, 1, 3, 1, 2, 3], vec![1, 0], vec![1, 5, 20], vec![2]];
    words.iter().map(|word| [&[9, 0, 0, 0, 7][..], word].concat()).collect()
}

/// To the forwarder.
pub fn request() -> Seeds {
    let (conn, direction) = (ConnId(7), Direction::ToHost);
    let target = PrepareTarget::Remote { socket: SocketInode(9), note: vec![1; 20] };
    let requests = [
        Request::Hello { version: 1 },
        Request::Prepare { conn, direction, target },
        Request::FromPeer { conn, message: vec![1; 9] },
        Request::Cancel { conn, reason: Refusal::Stopping },
        Request::Scan { seq: 1, cgroup_id: 2 },
    ];
    requests.iter().flat_map(Frame::encode).collect()
}

/// Of the forwarder.
pub fn event() -> Seeds {
    let conn = ConnId(7);
    let events = [
        Event::Hello { version: 1, pid: 2 },
        Event::Prepared { conn, holder: Holder(1) },
        Event::Refused { conn, reason: Refusal::IoUring },
        Event::ToPeer { conn, message: vec![1; 9] },
        Event::Sockets { seq: 1, sockets: vec![] },
    ];
    events.iter().flat_map(Frame::encode).collect()
}

fn texts(seeds: &[&str]) -> Seeds {
    seeds.iter().map(|text| text.as_bytes().to_vec()).collect()
}

pub fn rule() -> Seeds {
    texts(&[
        "type=cidr\nname=a\nfrom=10.244.0.0/16\nto=\"fd00::/64\"\nreverse=true\nafter=20ms\n",
        "# a comment\n\ntype = podLabel\nname='app'\nvalue=iperf3\n",
        "type=containerLabel\nname=a\nvalue=b\nafter=64KiB\n",
    ])
}

pub fn manifest() -> Seeds {
    const ONE: &str = "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: r }\ndata:\n  \"a\": |\n    type=cidr\n    after=1s\n";
    texts(&[ONE, "kind: ConfigMap\ndata: &a { x: *a }\n"])
}

pub fn labels() -> Seeds {
    const ONE: &str = "containers:\n  - cgroup: pod1/web\n    pod: shop\n    podLabels: { app: shop }\n    containerLabels: { t: w }\n";
    texts(&[ONE])
}

pub fn peers() -> Seeds {
    const ONE: &str = "peers:\n  - overlay: 10.244.2.0/24\n    host: 192.168.77.2\n  - { overlay: \"fd00::/64\", host: \"fd00::1\" }\n";
    texts(&[ONE])
}
