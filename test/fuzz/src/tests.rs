// SPDX-License-Identifier: Apache-2.0
//! Each target, for a second, with seeds that were changed at random. The seed of the run is printed with a failure.

use std::time::{Duration, Instant};

use ebpf_router::wire::{
    Attempted, Cause, Message, Purpose, Rendezvous, TOKEN, Token, Tuple, encode, preamble,
};
use forwarder_api::{ConnId, Direction, Event, Frame, Holder, PrepareTarget, Refusal, Request, SocketInode};

const TIME: Duration = Duration::from_secs(1);
/// For one input, on a machine that is busy.
const TOO_LONG: Duration = Duration::from_secs(10);
/// Longer than any that a parser reads at once, so that lengths in them can be wrong in all ways.
const LONGEST: usize = 4096;

fn check(target: fn(&[u8]), seeds: &[Vec<u8>]) {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let deadline = Instant::now() + TIME;
    let mut runs = 0;
    while Instant::now() < deadline {
        let data = changed(&mut random, seeds);
        let begun = Instant::now();
        target(&data);
        assert!(begun.elapsed() < TOO_LONG, "{} bytes took {:?}", data.len(), begun.elapsed());
        runs += 1;
    }
    println!("{runs} runs");
    assert!(runs > 0);
}

/// One of the seeds, or a part of each of two, with up to eight changes.
fn changed(random: &mut fastrand::Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let one = |random: &mut fastrand::Rng| seeds[random.usize(..seeds.len())].clone();
    let mut data = one(random);
    if random.u8(..) < 64 {
        let other = one(random);
        data.truncate(random.usize(..=data.len()));
        data.extend_from_slice(&other[random.usize(..=other.len())..]);
    }
    for _ in 0..random.usize(..8) {
        let at = random.usize(..=data.len());
        match random.u8(..6) {
            0 => data.truncate(at),
            1 => data.insert(at, random.u8(..)),
            2 => drop(data.splice(at..at, [0xff; 10])),
            3 => {
                let end = random.usize(at..=data.len());
                let part = data[at..end].to_vec();
                data.splice(at..at, part);
            }
            _ if at < data.len() => data[at] ^= 1 << random.u8(..8),
            _ => {}
        }
        data.truncate(LONGEST);
    }
    data
}

fn tuple() -> Tuple {
    Tuple { local: "10.244.1.9:40000".parse().unwrap(), remote: "[fd00::2]:80".parse().unwrap() }
}

#[test]
fn frames_of_a_peer() {
    let (attempted, token) = (Attempted { conn: ConnId(7), number: 9 }, Token([3; TOKEN]));
    let (tuple, direction, cause) = (tuple(), Direction::ToHost, Cause::Rules);
    let rendezvous = Rendezvous { host: Some((tuple.local, token)), witness: token };
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
    let mut seeds: Vec<Vec<u8>> = messages.iter().map(|message| encode(message).unwrap()).collect();
    seeds.push(preamble(Purpose::Secure).to_vec());
    check(crate::wire, &seeds);
}

#[test]
fn letters_of_a_peers_forwarder() {
    // Four bytes of length, the number of the batch, and each word; the last with two looks.
    let words = [vec![0, 2, 1, 2], vec![1, 3, 1, 9, 9, 1, 3, 1, 2, 3], vec![1, 0], vec![1, 5, 20], vec![2]];
    let seeds: Vec<Vec<u8>> = words.iter().map(|word| [&[9, 0, 0, 0, 7][..], word].concat()).collect();
    check(crate::letter, &seeds);
}

#[test]
fn requests_to_the_forwarder() {
    let (conn, direction) = (ConnId(7), Direction::ToHost);
    let target = PrepareTarget::Remote { socket: SocketInode(9), note: vec![1; 20] };
    let requests = [
        Request::Hello { version: 1 },
        Request::Prepare { conn, direction, target },
        Request::FromPeer { conn, message: vec![1; 9] },
        Request::Cancel { conn, reason: Refusal::Stopping },
        Request::Scan { seq: 1, cgroup_id: 2 },
    ];
    let seeds: Vec<Vec<u8>> = requests.iter().map(|request| Frame::encode(request).unwrap()).collect();
    check(crate::request, &seeds);
}

#[test]
fn events_of_the_forwarder() {
    let conn = ConnId(7);
    let events = [
        Event::Hello { version: 1, pid: 2 },
        Event::Prepared { conn, holder: Holder(1) },
        Event::Refused { conn, reason: Refusal::IoUring },
        Event::ToPeer { conn, message: vec![1; 9] },
        Event::Sockets { seq: 1, sockets: vec![] },
    ];
    let seeds: Vec<Vec<u8>> = events.iter().map(|event| Frame::encode(event).unwrap()).collect();
    check(crate::event, &seeds);
}

fn texts(seeds: &[&str]) -> Vec<Vec<u8>> {
    seeds.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn rules() {
    let seeds = [
        "type=cidr\nname=a\nfrom=10.244.0.0/16\nto=\"fd00::/64\"\nreverse=true\nafter=20ms\n",
        "# a comment\n\ntype = podLabel\nname='app'\nvalue=iperf3\n",
        "type=containerLabel\nname=a\nvalue=b\nafter=64KiB\n",
    ];
    check(crate::rule, &texts(&seeds));
}

#[test]
fn manifests() {
    let seed = "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: r }\ndata:\n  \"a\": |\n    type=cidr\n    after=1s\n";
    check(crate::manifest, &texts(&[seed, "kind: ConfigMap\ndata: &a { x: *a }\n"]));
}

#[test]
fn label_files() {
    let seed = "containers:\n  - cgroup: pod1/web\n    pod: shop\n    podLabels: { app: shop }\n    containerLabels: { t: w }\n";
    check(crate::labels, &texts(&[seed]));
}

#[test]
fn peer_files() {
    let seed = "peers:\n  - overlay: 10.244.2.0/24\n    host: 192.168.77.2\n  - { overlay: \"fd00::/64\", host: \"fd00::1\" }\n";
    check(crate::peers, &texts(&[seed]));
}
