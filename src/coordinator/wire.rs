// SPDX-License-Identifier: Apache-2.0
//! What routers say to each other: a preamble with the version, then frames of bounded length.
//!
//! Each router speaks on the connection that it made, and listens on those made to it. The preamble is eight bytes
//! each way, so that both know the other's version before TLS begins, or a frame is read. A frame is a little-endian `u32`
//! length and that many bytes of postcard. Pure: no I/O.

use std::net::SocketAddr;

use forwarder_api::{ConnId, Direction, Holder, MAX_UNREAD_BYTES, Refusal};
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;

/// Bumped with every change of [`Message`], and of what the forwarders say through it.
pub const VERSION: u16 = 7;
pub const PREAMBLE: usize = 8;
/// The longest frame body, in bytes: a relayed message with all the unread bytes allowed, and room for its head.
pub const MAX_FRAME: usize = MAX_UNREAD_BYTES + (1 << 20);
pub const TOKEN: usize = 16;

const MAGIC: [u8; 4] = *b"eBPr";

/// What a connection to ROUTER_PORT is for. The fifth and sixth byte of a preamble are the version, the seventh is this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Messages follow, of whoever it is.
    Plain = 0,
    /// A token follows, and then whatever the forwarders use a witness for.
    Witness = 1,
    /// TLS follows, and in it messages.
    Secure = 2,
}

/// Opens one connection, once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub [u8; TOKEN]);

/// A secret: it is not to be found in logs.
impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(..)")
    }
}

/// The connections that a decider is to make for one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rendezvous {
    /// For `ToHost`: where the host connection is taken, and its token.
    pub host: Option<(SocketAddr, Token)>,
    /// For the witness, which is taken at ROUTER_PORT.
    pub witness: Token,
}

/// The overlay addresses of a connection, as the end sees them that `local` belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tuple {
    pub local: Endpoint,
    pub remote: Endpoint,
}

impl Tuple {
    /// The same connection, seen from its other end.
    pub fn reversed(self) -> Tuple {
        Tuple { local: self.remote, remote: self.local }
    }

    /// Does this end decide? The same answer at both: the numerically smaller address does.
    pub fn decides(self) -> bool {
        (self.local.ip(), self.local.port()) < (self.remote.ip(), self.remote.port())
    }
}

/// One negotiation of a connection, numbered by its decider: what comes late from an earlier one is told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Attempted {
    pub conn: ConnId,
    pub number: u64,
}

/// Tuples are those of the sender's end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// I hold this end, and want it swapped, or do not, because. Sent when an end is learned, and as the answer to
    /// one that is no answer itself.
    Know {
        tuple: Tuple,
        declined: Option<Refusal>,
        answer: bool,
    },
    /// Follower to decider: please move it, because.
    Ask {
        tuple: Tuple,
        direction: Direction,
        cause: Cause,
    },
    /// Decider to follower.
    Offer {
        attempted: Attempted,
        tuple: Tuple,
        direction: Direction,
        cause: Cause,
    },
    Refuse {
        attempted: Attempted,
        reason: Refusal,
    },
    /// `holder`: a process that has it at the follower's host, to tell which connections can be moved together.
    Accept {
        attempted: Attempted,
        rendezvous: Rendezvous,
        holder: Holder,
    },
    /// The follower has all that the decider was to connect.
    Begin {
        attempted: Attempted,
    },
    Cancel {
        attempted: Attempted,
        reason: Refusal,
    },
    /// From forwarder to forwarder.
    Relay {
        attempted: Attempted,
        #[serde(with = "serde_bytes")]
        message: Vec<u8>,
    },
}

/// Why a move is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Cause {
    /// The rules ask for it, or do no longer.
    Rules,
    /// A person does.
    Order,
    /// A router stops.
    Stop,
    /// The host path carries nothing any more.
    HostPath,
}

/// Why bytes are not what a router says.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("it is no router: it began with {received:02x?}, {MAGIC:02x?} expected")]
    NoRouter { received: [u8; 4] },
    #[error(
        "it speaks version {received} of the routers' protocol, version {VERSION} expected: run the same release on all hosts"
    )]
    Version { received: u16 },
    #[error("it came for purpose {received}, 0 (plain), 1 (witness) or 2 (TLS) expected")]
    Purpose { received: u8 },
    #[error("it speaks plain TCP, TLS expected: start it without --insecure, with certificates (ROUTER_TLS)")]
    Plain,
    #[error("it speaks TLS, and this router was started with --insecure: start both alike")]
    Secure,
    #[error("it sent a frame of {length} bytes, at most {MAX_FRAME} expected")]
    TooLong { length: usize },
    #[error("it sent a frame of {length} bytes that cannot be decoded: {source}")]
    Malformed { length: usize, source: postcard::Error },
}

pub fn preamble(purpose: Purpose) -> [u8; PREAMBLE] {
    let mut bytes = [0; PREAMBLE];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[6] = purpose as u8;
    bytes
}

/// Is this a router of our version, and what does it want?
pub fn check_preamble(bytes: [u8; PREAMBLE]) -> Result<Purpose, WireError> {
    let [a, b, c, d, low, high, purpose, _] = bytes;
    if [a, b, c, d] != MAGIC {
        return Err(WireError::NoRouter { received: [a, b, c, d] });
    }
    match (u16::from_le_bytes([low, high]), purpose) {
        (VERSION, 0) => Ok(Purpose::Plain),
        (VERSION, 1) => Ok(Purpose::Witness),
        (VERSION, 2) => Ok(Purpose::Secure),
        (VERSION, received) => Err(WireError::Purpose { received }),
        (received, _) => Err(WireError::Version { received }),
    }
}

/// Both ends of a connection for messages want the same of it.
pub fn agree(own: Purpose, theirs: Purpose) -> Result<(), WireError> {
    match theirs {
        theirs if theirs == own => Ok(()),
        Purpose::Plain => Err(WireError::Plain),
        Purpose::Secure => Err(WireError::Secure),
        Purpose::Witness => Err(WireError::Purpose { received: Purpose::Witness as u8 }),
    }
}

/// Length and body.
pub fn encode(message: &Message) -> Result<Vec<u8>, WireError> {
    let body = postcard::to_stdvec(message).map_err(|source| WireError::Malformed { length: 0, source })?;
    let length = checked(body.len())?;
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(frame)
}

/// The body's length, from a frame's first four bytes.
pub fn body_length(head: [u8; 4]) -> Result<usize, WireError> {
    checked(u32::from_le_bytes(head) as usize).map(|length| length as usize)
}

pub fn decode(body: &[u8]) -> Result<Message, WireError> {
    let length = body.len();
    let malformed = |source| WireError::Malformed { length, source };
    let (message, rest) = postcard::take_from_bytes(body).map_err(malformed)?;
    if rest.is_empty() { Ok(message) } else { Err(malformed(postcard::Error::DeserializeBadEncoding)) }
}

fn checked(length: usize) -> Result<u32, WireError> {
    if length > MAX_FRAME { Err(WireError::TooLong { length }) } else { Ok(length as u32) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple() -> Tuple {
        Tuple { local: "10.244.1.9:40000".parse().unwrap(), remote: "10.244.2.9:80".parse().unwrap() }
    }

    fn messages() -> Vec<Message> {
        let (tuple, direction) = (tuple(), Direction::ToHost);
        let attempted = Attempted { conn: ConnId(7), number: 9 };
        let token = Token([3; TOKEN]);
        vec![
            Message::Know { tuple, declined: Some(Refusal::NoRuleMatches), answer: true },
            Message::Ask { tuple, direction: Direction::ToOverlay, cause: Cause::HostPath },
            Message::Offer { attempted, tuple: tuple.reversed(), direction, cause: Cause::Rules },
            Message::Refuse { attempted, reason: Refusal::IoUring },
            Message::Accept {
                attempted,
                rendezvous: Rendezvous { host: Some((tuple.local.into(), token)), witness: token },
                holder: Holder(1),
            },
            Message::Begin { attempted },
            Message::Cancel { attempted, reason: Refusal::Stopping },
            Message::Relay { attempted, message: vec![1, 2, 3] },
        ]
    }

    #[test]
    fn every_message_comes_back_as_it_was_sent() {
        for message in messages() {
            let frame = encode(&message).unwrap();
            let (head, body) = frame.split_first_chunk().unwrap();
            assert_eq!(body_length(*head).unwrap(), body.len());
            assert_eq!(decode(body).unwrap(), message);
        }
    }

    #[test]
    fn a_message_that_is_cut_or_too_long_is_malformed() {
        for message in messages() {
            let body = &encode(&message).unwrap()[4..];
            assert!(decode(&body[..body.len() - 1]).is_err(), "{message:?}");
            assert!(decode(&[body, &[0]].concat()).is_err(), "{message:?}");
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_anything_is_read() {
        assert!(matches!(body_length([0xff; 4]), Err(WireError::TooLong { length: 0xffff_ffff })));
        assert!(body_length((MAX_FRAME as u32).to_le_bytes()).is_ok());
    }

    #[test]
    fn other_programs_and_other_versions_are_told_apart() {
        for purpose in [Purpose::Plain, Purpose::Witness, Purpose::Secure] {
            assert_eq!(check_preamble(preamble(purpose)).unwrap(), purpose);
        }
        assert!(matches!(check_preamble(*b"GET / HT"), Err(WireError::NoRouter { .. })));
        let mut next = preamble(Purpose::Secure);
        next[4..6].copy_from_slice(&(VERSION + 1).to_le_bytes());
        assert!(
            matches!(check_preamble(next), Err(WireError::Version { received }) if received == VERSION + 1)
        );
    }

    #[test]
    fn plain_and_secure_routers_do_not_agree() {
        assert!(agree(Purpose::Secure, Purpose::Secure).is_ok());
        assert!(matches!(agree(Purpose::Secure, Purpose::Plain), Err(WireError::Plain)));
        assert!(matches!(agree(Purpose::Plain, Purpose::Secure), Err(WireError::Secure)));
    }

    #[test]
    fn exactly_one_end_decides() {
        assert!(tuple().decides());
        assert!(!tuple().reversed().decides());
        let same = Tuple { local: "10.0.0.1:2".parse().unwrap(), remote: "10.0.0.1:10".parse().unwrap() };
        assert!(same.decides());
    }

    #[test]
    fn a_token_is_not_shown() {
        assert_eq!(format!("{:?}", Token([7; TOKEN])), "Token(..)");
    }
}
