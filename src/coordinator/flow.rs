// SPDX-License-Identifier: Apache-2.0
//! A connection of this host, as the router knows it, and as it shows it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forwarder_api::{ConnId, Direction, Holder, Moved, Refusal, SocketInode};
use serde::{Deserialize, Serialize};

use super::{
    host_path::Family,
    negotiation::{Negotiation, Part},
    tally::Traffic,
    wire::{Cause, Rendezvous, Tuple},
};
use crate::{peers::PeerAddress, trace::Side, workload::Workload};

/// Where the other end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Home {
    Peer(PeerAddress),
    /// Another container of this host.
    SameHost,
    /// Not known, because.
    Nowhere(Refusal),
}

impl std::fmt::Display for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Home::Peer(peer) => write!(f, "at {peer}"),
            Home::SameHost => f.write_str("on this host"),
            Home::Nowhere(reason) => write!(f, "not known ({reason})"),
        }
    }
}

/// Which network the connection is on.
#[derive(Clone, Debug, PartialEq)]
pub enum Path {
    Overlay,
    Host(OnHost),
}

/// What is known of a swapped connection.
#[derive(Clone, Debug, PartialEq)]
pub struct OnHost {
    /// The number of the swap, which its host socket carries.
    pub swap: u64,
    /// Not known where router and forwarder died since.
    pub moved: Option<Moved>,
    /// The forwarder keeps the overlay socket.
    pub way_back: bool,
    /// Nothing gets through, and at this time the way back is tried again.
    pub stalled: Option<Instant>,
}

/// What the other end's router has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerSays {
    Nothing,
    Wants,
    /// Why it stays, as we show it.
    Declines(Refusal),
}

/// A move that is wanted whatever the rules say: it is tried again until it is done, refused for good, or too late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub direction: Direction,
    pub cause: Cause,
    /// None: what orders it says so when it does not want it any more.
    pub until: Option<Instant>,
}

/// A move under way.
#[derive(Clone, Debug)]
pub struct Attempt {
    pub negotiation: Negotiation,
    pub cause: Cause,
    /// Given by the decider; its host sockets carry it.
    pub number: u64,
    /// Where the follower waits for the host connection.
    pub rendezvous: Option<Rendezvous>,
    /// Who holds it here, and at the other end, once the forwarders have found out.
    pub holder: Option<Holder>,
    pub other_holder: Option<Holder>,
}

#[derive(Clone, Debug)]
pub struct Flow {
    pub conn: ConnId,
    /// The socket's own.
    pub tuple: Tuple,
    /// What this host's address translation makes of it.
    pub translated: Option<Tuple>,
    pub side: Side,
    /// An AF_INET6 socket, also where the addresses are v4-mapped.
    pub v6: bool,
    /// Network namespace of the overlay socket; 0 where it is not known any more.
    pub netns: u32,
    pub workload: Arc<Workload>,
    pub home: Home,
    pub path: Path,
    pub overlay_socket: SocketInode,
    /// The one that the application has now.
    pub socket: SocketInode,
    /// Why our rules do not want it swapped.
    pub declined: Option<Refusal>,
    pub peer_says: PeerSays,
    /// Sent back by a person: stays until a person wants it swapped.
    pub held: bool,
    /// Why it is where it is, if that is not where it should be.
    pub reason: Option<Refusal>,
    /// In a box: most have none.
    pub attempt: Option<Box<Attempt>>,
    pub order: Option<Order>,
    /// Stands in line for an attempt.
    pub in_line: bool,
    /// Refusals in a row.
    pub failures: u32,
    /// How often in a row the host path has failed it, and until when it is not swapped for that.
    pub stalls: u32,
    pub avoids_host_until: Option<Instant>,
    /// When to look at it again.
    pub alarm: Option<Instant>,
    pub since: Instant,
    /// When it last changed its path.
    pub changed: Instant,
    /// When its last attempt ended: what was seen before may have been a socket lent for it.
    pub tried: Instant,
    pub swaps: u32,
    /// Of the socket that the application has now.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// How much of that is counted already, and how much of the overlay socket's while it is parked. None: what it carried
    /// before is not known, and is not counted.
    pub counted: Option<Traffic>,
    pub counted_on_overlay: Option<Traffic>,
    /// Carried on each path, both ways.
    pub overlay_bytes: u64,
    pub host_bytes: u64,
}

/// What the forwarder keeps with a parked socket, for a restarted router.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    pub swap: u64,
    /// One end, or two of a connection within this host.
    pub ends: Vec<NotedEnd>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NotedEnd {
    pub tuple: Tuple,
    pub translated: Option<Tuple>,
    pub side: Side,
    pub v6: bool,
    pub overlay_socket: SocketInode,
    pub workload: Arc<Workload>,
    pub home: Home,
}

impl Flow {
    /// On the overlay, nothing said or decided about it yet.
    pub fn new(conn: ConnId, end: NotedEnd, now: Instant) -> Flow {
        Flow {
            conn,
            tuple: end.tuple,
            translated: end.translated,
            side: end.side,
            v6: end.v6,
            netns: 0,
            workload: end.workload,
            home: end.home,
            path: Path::Overlay,
            overlay_socket: end.overlay_socket,
            socket: end.overlay_socket,
            declined: None,
            peer_says: PeerSays::Nothing,
            held: false,
            reason: None,
            attempt: None,
            order: None,
            in_line: false,
            failures: 0,
            stalls: 0,
            avoids_host_until: None,
            alarm: None,
            since: now,
            changed: now,
            tried: now,
            swaps: 0,
            bytes_sent: 0,
            bytes_received: 0,
            counted: Some(Traffic::default()),
            counted_on_overlay: None,
            overlay_bytes: 0,
            host_bytes: 0,
        }
    }

    /// Its socket has carried so much by now: the part of it that is new.
    pub fn carried(&mut self, now: Traffic) -> Traffic {
        (self.bytes_sent, self.bytes_received) = (now.sent, now.received);
        let more = now.since(self.counted.replace(now).unwrap_or(now));
        match self.path {
            Path::Overlay => self.overlay_bytes += more.total(),
            Path::Host(_) => self.host_bytes += more.total(),
        }
        more
    }

    pub fn noted(&self) -> NotedEnd {
        NotedEnd {
            tuple: self.tuple,
            translated: self.translated,
            side: self.side,
            v6: self.v6,
            overlay_socket: self.overlay_socket,
            workload: Arc::clone(&self.workload),
            home: self.home,
        }
    }

    /// What routers call it: the addresses that the packets between the two hosts have. Each translates on its own side of
    /// them, and both know them.
    pub fn name(&self) -> Tuple {
        self.translated.unwrap_or(self.tuple)
    }

    /// This end's own address, and that of the other end as far as this host knows.
    pub fn ends(&self) -> Tuple {
        Tuple { local: self.tuple.local, remote: self.name().remote }
    }

    /// Does this end lead? The same answer at both.
    pub fn decides(&self) -> bool {
        match self.home {
            Home::SameHost => self.ends().decides(),
            Home::Peer(_) | Home::Nowhere(_) => self.name().decides(),
        }
    }

    /// What it means that the peer says nothing about it. A host's own address may be that of a container there, masqueraded.
    pub fn unanswered(&self) -> Refusal {
        match self.home {
            Home::Peer(peer) if peer == self.name().remote.ip() => Refusal::HostAddress,
            Home::Peer(_) | Home::SameHost | Home::Nowhere(_) => Refusal::PeerUnknown,
        }
    }

    pub fn family(&self) -> Family {
        if self.v6 { Family::V6 } else { Family::V4 }
    }

    pub fn on_host(&self) -> Option<&OnHost> {
        match &self.path {
            Path::Overlay => None,
            Path::Host(on_host) => Some(on_host),
        }
    }

    /// Nobody answers for its other end.
    pub fn lacks_a_peer(&self) -> bool {
        let may_be_found = matches!(self.home, Home::Peer(_) | Home::Nowhere(Refusal::NoPeerHost));
        may_be_found && self.on_host().is_none() && self.peer_says == PeerSays::Nothing
    }

    /// Is it where a move in this direction would take it?
    pub fn has_arrived(&self, direction: Direction) -> bool {
        match direction {
            Direction::ToHost => self.on_host().is_some(),
            Direction::ToOverlay => self.on_host().is_none(),
        }
    }

    /// The part that this host plays in a move of it.
    pub fn part(&self) -> Option<Part> {
        match self.home {
            Home::Peer(_) if self.decides() => Some(Part::Decider),
            Home::Peer(_) => Some(Part::Follower),
            Home::SameHost => Some(Part::Both),
            Home::Nowhere(_) => None,
        }
    }

    /// A stall stays the reason while going back from it is refused for another.
    fn shown_reason(&self) -> Option<Refusal> {
        self.is_stalled().then_some(Refusal::HostPathStalled).or(self.reason)
    }

    fn reason_text(&self) -> Option<String> {
        let shown = self.shown_reason()?;
        Some(match self.reason {
            Some(reason) if reason != shown => format!("{shown}; it cannot go back now: {reason}"),
            Some(_) | None => shown.to_string(),
        })
    }

    pub fn is_stalled(&self) -> bool {
        self.on_host().is_some_and(|on_host| on_host.stalled.is_some())
    }

    pub fn view(&self, now: Instant) -> FlowView {
        let moved = self.on_host().and_then(|on_host| on_host.moved.as_ref());
        let moving = self.attempt.as_ref().is_some_and(|attempt| attempt.negotiation.is_moving());
        FlowView {
            conn: self.conn.to_string(),
            local: self.tuple.local.into(),
            remote: self.tuple.remote.into(),
            workload: self.workload.name.clone(),
            side: self.side,
            path: match (moving, self.on_host()) {
                (true, _) => Shown::Moving,
                (false, Some(_)) => Shown::Host,
                (false, None) => Shown::Overlay,
            },
            age_ms: millis(now.saturating_duration_since(self.since)),
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            overlay_bytes: self.overlay_bytes,
            host_bytes: self.host_bytes,
            other_host: match self.home {
                Home::Peer(peer) => OtherHost::Peer(peer),
                Home::SameHost => OtherHost::Same,
                Home::Nowhere(_) => OtherHost::Unknown,
            },
            swaps: self.swaps,
            pause_us: moved.map(|moved| moved.pause_us),
            freeze_us: moved.map(|moved| moved.freeze_us),
            settle_us: moved.map(|moved| moved.settle_us),
            install_us: moved.map(|moved| moved.install_us),
            unread_bytes: moved.map(|moved| moved.unread_bytes),
            together: moved.map(|moved| moved.together),
            way_back: self.on_host().map(|on_host| on_host.way_back),
            reason: self.shown_reason().map(Refusal::label).map(str::to_owned),
            reason_text: self.reason_text(),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

/// Where a connection is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shown {
    Overlay,
    Host,
    Moving,
}

/// Where the other end is, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OtherHost {
    Unknown,
    /// This one.
    Same,
    Peer(PeerAddress),
}

/// One line of `router flows`, and one object of its JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlowView {
    pub conn: String,
    pub local: std::net::SocketAddr,
    pub remote: std::net::SocketAddr,
    pub workload: String,
    pub side: Side,
    pub path: Shown,
    pub age_ms: u64,
    /// Of the socket that the application has now.
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Carried on each path since the router knows it, both ways, as of the last scan.
    pub overlay_bytes: u64,
    pub host_bytes: u64,
    pub other_host: OtherHost,
    pub swaps: u32,
    /// Of the last swap: how long the application stood still, and the parts of that.
    pub pause_us: Option<u64>,
    pub freeze_us: Option<u64>,
    pub settle_us: Option<u64>,
    pub install_us: Option<u64>,
    pub unread_bytes: Option<u64>,
    /// Connections that moved in the same freeze, this one included.
    pub together: Option<u32>,
    /// Can it go back? Not after the forwarder was lost.
    pub way_back: Option<bool>,
    /// Why it is not swapped: a name, and a sentence.
    pub reason: Option<String>,
    pub reason_text: Option<String>,
}
