// SPDX-License-Identifier: Apache-2.0
//! Fuzz targets: everything that is parsed of what a peer, an operator or a runtime has written. Each takes any bytes; it
//! fails by a panic, or by taking too long or too much memory.
//!
//! `cargo fuzz` runs them with coverage (`test/run.sh --fuzz MINUTES`); the tests here run each for a second, from the
//! same seeds, without.

pub mod seeds;

use ebpf_router::{untrusted, wire};
use forwarder_api::{Event, Frame, MAX_FRAME, Request};

/// All that a peer's router may send: a preamble, then frames.
pub fn wire(data: &[u8]) {
    if let Some((preamble, _)) = data.split_first_chunk() {
        let _ = wire::check_preamble(*preamble);
    }
    let Some((head, rest)) = data.split_first_chunk() else { return };
    if let Ok(length) = wire::body_length(*head) {
        assert!(length <= wire::MAX_FRAME);
    }
    if let Ok(message) = wire::decode(rest) {
        let again = wire::encode(&message).map(|frame| wire::decode(&frame[4..]));
        assert!(matches!(again, Ok(Ok(again)) if again == message), "{message:?}");
    }
}

/// What a peer's forwarder says, handed on by both routers.
pub fn letter(data: &[u8]) {
    forwarder::is_letter(data);
}

/// From the router to the forwarder.
pub fn request(data: &[u8]) {
    frame::<Request>(data);
}

/// From the forwarder to the router.
pub fn event(data: &[u8]) {
    frame::<Event>(data);
}

fn frame<T: serde::Serialize + serde::de::DeserializeOwned>(data: &[u8]) {
    let Some((head, body)) = data.split_first_chunk() else { return };
    if let Ok(length) = Frame::body_length(*head) {
        assert!(length <= MAX_FRAME);
    }
    if let Ok(message) = Frame::decode::<T>(body) {
        assert!(Frame::encode(&message).is_ok());
    }
}

pub fn rule(data: &[u8]) {
    of_text(data, untrusted::is_rule);
}

pub fn manifest(data: &[u8]) {
    of_text(data, untrusted::is_manifest);
}

pub fn labels(data: &[u8]) {
    of_text(data, untrusted::are_labels);
}

pub fn peers(data: &[u8]) {
    of_text(data, untrusted::are_peers);
}

fn of_text(data: &[u8], parse: impl FnOnce(&str) -> bool) {
    if let Ok(text) = std::str::from_utf8(data) {
        parse(text);
    }
}

#[cfg(test)]
mod tests;
