// SPDX-License-Identifier: Apache-2.0
//! Each target, for a second, with seeds that were changed at random. The seed of the run is printed with a failure.

use std::time::{Duration, Instant};

use crate::seeds;

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

#[test]
fn frames_of_a_peer() {
    check(crate::wire, &seeds::wire());
}

#[test]
fn letters_of_a_peers_forwarder() {
    check(crate::letter, &seeds::letter());
}

#[test]
fn requests_to_the_forwarder() {
    check(crate::request, &seeds::request());
}

#[test]
fn events_of_the_forwarder() {
    check(crate::event, &seeds::event());
}

#[test]
fn rules() {
    check(crate::rule, &seeds::rule());
}

#[test]
fn manifests() {
    check(crate::manifest, &seeds::manifest());
}

#[test]
fn label_files() {
    check(crate::labels, &seeds::labels());
}

#[test]
fn peer_files() {
    check(crate::peers, &seeds::peers());
}
