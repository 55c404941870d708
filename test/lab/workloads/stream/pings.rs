// SPDX-License-Identifier: Apache-2.0
//! Request and response: 64 bytes there, the same 64 bytes back.

use std::{
    os::fd::AsFd,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use nix::sys::socket::{setsockopt, sockopt};
use serde_json::{Value, json};

use crate::{
    End, Fds, Shared, company, fail,
    socket::{read_blocking, write_all_at_once},
    wait_for_eof,
};

const SIZE: usize = 64;

/// Pings (client) or answers (server) until the client has had enough.
pub fn run(fds: &Fds, client: bool, end: &End, interval_us: u64, shared: &Shared) -> Value {
    no_delay(fds);
    if !client {
        return json!({ "answered": answer_to_the_end(fds, shared) });
    }
    let mut round_trips_ns = Vec::new();
    while !end.reached(round_trips_ns.len() as u64) && !shared.ending.load(Ordering::Relaxed) {
        round_trips_ns.push(ping(fds, round_trips_ns.len() as u64).as_nanos() as u64);
        shared.received.fetch_add(SIZE as u64, Ordering::Relaxed);
        if interval_us > 0 {
            company::nanosleep(Duration::from_micros(interval_us));
        }
    }
    round_trips_ns.sort_unstable();
    let at = |part: f64| {
        let index = (round_trips_ns.len() as f64 * part) as usize;
        round_trips_ns.get(index.min(round_trips_ns.len().saturating_sub(1))).map(|ns| *ns as f64 / 1000.0)
    };
    json!({ "pings": round_trips_ns.len(), "p50_us": at(0.5), "p99_us": at(0.99), "max_us": at(1.0) })
}

/// A ping, silence, a ping.
pub fn idle(fds: &Fds, client: bool, until_eof: bool, end: &End, shared: &Shared) -> Value {
    no_delay(fds);
    if !client {
        return json!({ "answered": answer_to_the_end(fds, shared) });
    }
    ping(fds, 0);
    if until_eof {
        wait_for_eof();
    } else if let Some(at) = end.at {
        company::nanosleep(at.saturating_duration_since(Instant::now()));
    }
    ping(fds, 1);
    json!({ "pings": 2 })
}

fn no_delay(fds: &Fds) {
    setsockopt(&fds[0], sockopt::TcpNoDelay, &true).unwrap_or_else(|error| fail!("TCP_NODELAY: {error}"));
}

fn ping(fds: &Fds, number: u64) -> Duration {
    let fd = fds[number as usize % fds.len()].as_fd();
    let mut request = [0x5a; SIZE];
    request[..8].copy_from_slice(&number.to_le_bytes());
    let started = Instant::now();
    write_all_at_once(fd, &request);
    let mut response = [0; SIZE];
    let mut length = 0;
    while length < SIZE {
        match read_blocking(fd, &mut response[length..]) {
            0 => fail!("the stream ended in ping {number}"),
            n => length += n,
        }
    }
    if response != request {
        fail!("the answer to ping {number} is another one");
    }
    started.elapsed()
}

fn answer_to_the_end(fds: &Fds, shared: &Shared) -> u64 {
    let mut answered = 0;
    let mut request = [0; SIZE];
    let mut length = 0;
    loop {
        let fd = fds[answered as usize % fds.len()].as_fd();
        match read_blocking(fd, &mut request[length..]) {
            0 if length == 0 => return answered,
            0 => fail!("the stream ended within a ping"),
            n => length += n,
        }
        if length == SIZE {
            write_all_at_once(fd, &request);
            answered += 1;
            shared.received.fetch_add(SIZE as u64, Ordering::Relaxed);
            length = 0;
        }
    }
}
