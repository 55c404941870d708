// SPDX-License-Identifier: Apache-2.0
//! What router and forwarder say to each other over the forwarder's unix socket: plain types and their framing.
//!
//! The router decides and faces the network; the forwarder acts and faces processes. One router at a time is
//! connected; a new connection takes the place of the old one. Each [`Request`] may carry file descriptors
//! (`SCM_RIGHTS` on the first byte of its frame); [`Request::fds`] says how many belong to it.

mod frame;
mod refusal;

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

pub use frame::{Frame, FrameError, MAX_FRAME};
pub use refusal::Refusal;

/// Bumped with every change of a type in this crate; both sides refuse to talk to another version.
pub const VERSION: u32 = 5;

/// Unread bytes (see design: acknowledged by the kernel, not yet read by the application) that one end of a swap
/// may carry over, in bytes. More is refused with [`Refusal::TooManyUnreadBytes`].
pub const MAX_UNREAD_BYTES: usize = 16 << 20;

/// Bytes not acknowledged that one end of a [`Manner::Salvage`] may take out of its send queue, in bytes: far more than
/// the kernel lets a queue grow to by itself. More is refused with [`Refusal::TooManyUnreadBytes`].
pub const MAX_QUEUED_BYTES: usize = 64 << 20;

/// A connection under the routers' care: drawn at random by the deciding router, the same at both ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ConnId(pub u64);

impl std::fmt::Debug for ConnId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for ConnId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The inode number of a socket in sockfs, as `ls -l /proc/PID/fd` shows it: `socket:[N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SocketInode(pub u64);

/// Which end decides (design, "The swap is a transaction"): the follower, once armed, may no longer abort by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    Decider,
    Follower,
}

/// Where a transaction moves an end to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Direction {
    /// Swap: overlay socket out and parked, host socket in.
    ToHost,
    /// Swap back: host socket out and closed, parked overlay socket in.
    ToOverlay,
}

/// What becomes of the bytes that are on their way when both ends are stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Manner {
    /// They arrive: the connection is made calm, and moves once nothing is in flight.
    Settle,
    /// They are taken out of the queue of the end that sent them: the connection carries nothing any more. Only for
    /// [`Direction::ToOverlay`].
    Salvage,
}

/// From router to forwarder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// First request of a session.
    Hello { version: u32 },
    /// List the TCP sockets held by processes under the cgroup with this id (inode of its directory in cgroup2),
    /// answered by [`Event::Sockets`], or not at all if it fails.
    Scan { seq: u64, cgroup_id: u64 },
    /// Check, without stopping anything, that this socket may be moved, and keep what was found until a transaction of
    /// `conn` ends or [`Request::Cancel`] comes. Answered by [`Event::Prepared`] or
    /// [`Event::Refused`].
    Prepare { conn: ConnId, direction: Direction, target: PrepareTarget },
    /// Run the transaction of a prepared connection, between two hosts, when it is its turn: each process takes part in
    /// one at a time. Carries fds, each connected to the same at the other host, with nothing sent or received that is
    /// not consumed: `ToHost` the host socket; then the witness, over which the two ends of the transaction agree.
    /// Answered by [`Event::Ended`].
    ///
    /// A decider's connections that wait for the same processes here, and for those `with` names, are moved in one
    /// transaction. `None`: this one alone.
    Move { conn: ConnId, role: Role, manner: Manner, budget_us: u32, with: Option<OtherEnd> },
    /// The same for a connection whose two ends both live on this host, in one freeze. Both sockets were prepared
    /// under the same `conn`. `ToHost` carries two fds: the host sockets for `first` and `second`, connected to
    /// each other. `alone`: in a transaction of its own.
    MoveLocal { conn: ConnId, budget_us: u32, alone: bool },
    /// What the forwarder at the other end said: the bytes of its [`Event::ToPeer`], unchanged.
    FromPeer {
        conn: ConnId,
        #[serde(with = "serde_bytes")]
        message: Vec<u8>,
    },
    /// Give a prepared or running transaction up where that is still allowed (otherwise it goes on to its end).
    Cancel { conn: ConnId, reason: Refusal },
    /// Close the parked overlay socket(s) of `conn`: the application has closed the connection.
    Release { conn: ConnId },
    /// List what is parked, answered by [`Event::Parked`].
    List { seq: u64 },
}

/// Who holds the other end of a connection. For comparison only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct OtherEnd {
    pub host: IpAddr,
    pub holder: Holder,
}

/// One of the processes that hold a connection, by its id on its host: always the same one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Holder(pub u32);

/// What [`Request::Prepare`] is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PrepareTarget {
    /// One socket of this host; its other end is on another host. `note` is kept with the parked socket and comes
    /// back in [`ParkedConn`]: what a restarted router needs to know about the connection (opaque here).
    Remote { socket: SocketInode, note: Vec<u8> },
    /// Both ends are on this host.
    Local { first: SocketInode, second: SocketInode, note: Vec<u8> },
    /// The way back of a swapped connection: what it is made of is known from the time of the swap.
    Parked,
}

impl Request {
    /// How many file descriptors travel with this request, given the direction its connection was prepared for.
    pub fn fds(&self, direction: Option<Direction>) -> usize {
        match (self, direction) {
            (Request::Move { .. }, Some(Direction::ToHost)) => 2,
            (Request::Move { .. }, Some(Direction::ToOverlay)) => 1,
            (Request::MoveLocal { .. }, Some(Direction::ToHost)) => 2,
            _ => 0,
        }
    }
}

/// From forwarder to router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// First event of a session.
    Hello {
        version: u32,
        pid: u32,
    },
    Sockets {
        seq: u64,
        sockets: Vec<SocketRecord>,
    },
    Prepared {
        conn: ConnId,
        holder: Holder,
    },
    /// The answer to a `Prepare` that is refused. Nothing was stopped or changed.
    Refused {
        conn: ConnId,
        reason: Refusal,
    },
    /// To be carried to the forwarder at the other end, in order, as its `FromPeer`.
    ToPeer {
        conn: ConnId,
        #[serde(with = "serde_bytes")]
        message: Vec<u8>,
    },
    /// The transaction is over and every process runs. Exactly one for each accepted `Move` or `MoveLocal`.
    Ended {
        conn: ConnId,
        outcome: Outcome,
    },
    /// The parked overlay socket of this connection has ended (its peer's parked socket was closed): there is no
    /// way back any more. It was released.
    ParkedEnded {
        conn: ConnId,
    },
    Parked {
        seq: u64,
        parked: Vec<ParkedConn>,
    },
}

/// How a transaction ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// Both ends are on the new path.
    Moved(Moved),
    /// Both ends are where they were.
    Aborted { reason: Refusal, pause_us: u64 },
}

/// The figures of a transaction that moved an end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// From the first thread stopped to the last one running again, microseconds.
    pub pause_us: u64,
    /// Parts of the pause: until all threads stood still.
    pub freeze_us: u64,
    /// Until nothing was in flight, and the new socket waited at the gate.
    pub settle_us: u64,
    /// Until the new socket was in place.
    pub install_us: u64,
    /// Bytes that this end's application had not read yet, carried over.
    pub unread_bytes: u64,
    /// Connections that moved in the same freeze, this one included.
    pub together: u32,
    /// Processes, threads and descriptors of this end.
    pub processes: u32,
    pub threads: u32,
    pub fds: u32,
    /// The sockets now installed: one, or two (`first`, `second`) for a connection within this host.
    pub sockets: SmallVec<[SocketInode; 2]>,
}

/// A TCP socket and one descriptor of it, as the kernel showed it to a BPF iterator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SocketRecord {
    pub socket: SocketInode,
    pub tgid: u32,
    pub fd: u32,
    /// Of the process, in the default (v2) hierarchy.
    pub cgroup_id: u64,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// As the kernel keeps them in the socket, v4-mapped addresses already turned into v4.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// AF_INET6, also where the addresses are v4-mapped.
    pub v6: bool,
    /// A listening socket on the same port and network namespace was seen: this end accepted the connection.
    pub accepted: bool,
    /// State as in `include/net/tcp_states.h`: 1 is ESTABLISHED.
    pub state: u8,
    pub bytes_sent: u64,
    pub bytes_received: u64,
}

/// A swapped connection whose overlay socket is parked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ParkedConn {
    pub conn: ConnId,
    /// The host sockets now installed: one, or two for a connection within this host.
    pub host_sockets: Vec<SocketInode>,
    pub note: Vec<u8>,
    pub moved: Moved,
}
