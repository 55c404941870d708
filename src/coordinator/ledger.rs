// SPDX-License-Identifier: Apache-2.0
//! All connections of this host, and what is to be done about each. Pure: events come in with the time, actions go
//! out.
//!
//! A connection is learned from tracing or a scan. Its end is told to the peer's router; when both ends are known and
//! both want it, the decider opens a negotiation ([`super::negotiation`]). What was refused in passing is tried again,
//! later and later. Orders (a person, a stop) go before rules.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use forwarder_api::{ConnId, Direction, Moved, Outcome, PrepareTarget, Refusal, Request, Role, SocketInode};

use super::{
    flow::{Attempt, Flow, FlowView, Home, Note, OnHost, Order, Path, PeerSays},
    negotiation::{Input, Negotiation, Next, Output, Part},
    wire::{Attempted, Cause, Message, Token, Tuple},
};
use crate::{identity::Names, peers::PeerAddress, trace::Side, workload::Workload};

/// How long the other end may take to be known before that is a reason.
const GRACE: Duration = Duration::from_secs(1);
/// How long each step of a negotiation may take.
const STEP: Duration = Duration::from_secs(3);
/// How long an order is pursued; one to stop longer, because nobody will ask again.
const ORDER: Duration = Duration::from_secs(5);
const STOP: Duration = Duration::from_secs(10);
/// Between two tries: doubled from the first to the last. Orders do not wait longer than `ORDER_RETRY`.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(5);
const ORDER_RETRY: Duration = Duration::from_millis(100);
/// Between two times that a follower asks its decider.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// The most connections that are kept. More are left alone, counted.
const MAX_FLOWS: usize = 1 << 16;

/// A connection that tracing or a scan has shown, with what was looked up about it.
#[derive(Clone, Debug)]
pub struct Learned {
    pub tuple: Tuple,
    pub side: Side,
    pub v6: bool,
    pub netns: u32,
    pub socket: SocketInode,
    pub workload: Workload,
    pub home: Home,
    pub declined: Option<Refusal>,
    /// When it was seen, at the earliest.
    pub seen: Instant,
}

/// A swapped connection that the forwarder keeps the way back of.
#[derive(Clone, Debug)]
pub struct Restored {
    pub conn: ConnId,
    pub sockets: Vec<SocketInode>,
    pub note: Note,
    pub moved: Moved,
}

#[derive(Clone, Debug)]
pub enum Event {
    Learned(Learned),
    /// All sockets that a scan begun at this time has found, and their bytes sent and received.
    Scanned {
        began: Instant,
        sockets: HashMap<SocketInode, (u64, u64)>,
    },
    Parked(Vec<Restored>),
    /// The host socket of this swap has left ESTABLISHED.
    HostSocketClosed(u64),
    ForwarderUp,
    ForwarderDown,
    Prepared(ConnId),
    Refused(ConnId, Refusal),
    Ended(ConnId, Outcome),
    /// From our forwarder to the one at the other end.
    ToPeer(ConnId, Vec<u8>),
    ParkedEnded(ConnId),
    /// The host connection could be made, or not.
    Path(ConnId, bool),
    PeerUp(PeerAddress),
    PeerDown(PeerAddress),
    Peer(PeerAddress, Message),
    /// Our rules have changed: what they say now.
    Verdict(Tuple, Option<Refusal>),
    /// A person wants it moved.
    Order(Tuple, Direction),
    Stop {
        leave: bool,
    },
    /// [`Ledger::alarm`] has come.
    Alarm,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// To our forwarder; no descriptors go with it.
    Forwarder(Request),
    /// To our forwarder, with the host socket of this connection if it is `ToHost`.
    Move {
        conn: ConnId,
        role: Role,
        names: Names,
    },
    /// Likewise, with both host sockets.
    MoveLocal {
        conn: ConnId,
        names: [Names; 2],
    },
    /// Connect to the follower's host; the answer is [`Event::Path`].
    Connect {
        conn: ConnId,
        v6: bool,
        rendezvous: (std::net::SocketAddr, Token),
    },
    /// Let the peer connect to us: tell it where and with which token. The answer is [`Event::Path`].
    Accept {
        attempted: Attempted,
        v6: bool,
        peer: PeerAddress,
    },
    /// Make a connection within this host, for these families. The answer is [`Event::Path`].
    ConnectLocal {
        conn: ConnId,
        v6: [bool; 2],
    },
    /// Close what was made for this connection and not given to the forwarder.
    DropPath(ConnId),
    Tell(PeerAddress, Message),
    /// Get into touch with this router, and stay.
    Reach(PeerAddress),
    /// An order is done, or cannot be.
    Answer(Tuple, Result<u64, Refusal>),
    /// For the log.
    Report {
        conn: ConnId,
        tuple: Tuple,
        direction: Direction,
        result: Result<Moved, Refusal>,
    },
}

/// Since the router started.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    pub swaps: u64,
    pub swap_backs: u64,
    pub refused: BTreeMap<&'static str, u64>,
    /// Connections that were too many to be kept.
    pub overflow: u64,
}

pub struct Ledger {
    flows: BTreeMap<Tuple, Flow>,
    conns: HashMap<ConnId, Tuple>,
    alarms: BTreeSet<(Instant, Tuple)>,
    /// Peers that are to be reached, and whether they are.
    peers: BTreeMap<PeerAddress, bool>,
    forwarder_is_up: bool,
    stopping: Option<Stopping>,
    counts: Counts,
    numbers: u64,
    now: Instant,
    actions: Vec<Action>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stopping {
    leave: bool,
    until: Instant,
}

impl Ledger {
    /// `seed` makes the names of connections differ from those of other routers and of other times.
    pub fn new(seed: u64, now: Instant) -> Ledger {
        Ledger {
            flows: BTreeMap::new(),
            conns: HashMap::new(),
            alarms: BTreeSet::new(),
            peers: BTreeMap::new(),
            forwarder_is_up: false,
            stopping: None,
            counts: Counts::default(),
            numbers: seed,
            now,
            actions: Vec::new(),
        }
    }

    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Action> {
        self.now = now;
        match event {
            Event::Learned(learned) => self.learn(learned),
            Event::Scanned { began, sockets } => self.scanned(began, &sockets),
            Event::Parked(parked) => self.parked(parked),
            Event::HostSocketClosed(swap) => self.host_socket_closed(swap),
            Event::ForwarderUp => {
                self.forwarder_is_up = true;
                self.consider_all();
            }
            Event::ForwarderDown => self.forwarder_down(),
            Event::Prepared(conn) => self.step_conn(conn, Input::Prepared),
            Event::Refused(conn, reason) => self.step_conn(conn, Input::Refused(reason)),
            Event::Ended(conn, outcome) => self.step_conn(conn, Input::Ended(outcome)),
            Event::ToPeer(conn, message) => self.relay(conn, message),
            Event::ParkedEnded(conn) => self.no_way_back(conn),
            Event::Path(conn, true) => self.step_conn(conn, Input::PathReady),
            Event::Path(conn, false) => self.step_conn(conn, Input::PathFailed),
            Event::PeerUp(peer) => self.peer_up(peer),
            Event::PeerDown(peer) => self.peer_down(peer),
            Event::Peer(peer, message) => self.peer_said(peer, message),
            Event::Verdict(tuple, declined) => self.verdict(tuple, declined),
            Event::Order(tuple, direction) => self.order(tuple, direction, Cause::Order, ORDER),
            Event::Stop { leave } => self.stop(leave),
            Event::Alarm => self.ring(),
        }
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Alarm`] is to come.
    pub fn alarm(&self) -> Option<Instant> {
        self.alarms.first().map(|(at, _)| *at)
    }

    /// After a stop: is there nothing left to wait for?
    pub fn is_quiet(&self) -> bool {
        self.flows.values().all(|flow| flow.attempt.is_none() && flow.order.is_none())
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Connections on the host network; one within this host counts once.
    pub fn swapped(&self) -> usize {
        let first = |flow: &&Flow| flow.home != Home::SameHost || flow.tuple.decides();
        self.flows.values().filter(|flow| flow.on_host().is_some()).filter(first).count()
    }

    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.values()
    }

    pub fn views(&self) -> Vec<FlowView> {
        self.flows.values().map(|flow| flow.view(self.now)).collect()
    }

    pub fn peers(&self) -> &BTreeMap<PeerAddress, bool> {
        &self.peers
    }

    pub fn find(&self, conn: ConnId) -> Option<&Flow> {
        self.flows.values().find(|flow| flow.conn == conn)
    }

    // What is learned, and what is over.

    fn learn(&mut self, learned: Learned) {
        let tuple = learned.tuple;
        if let Some(known) = self.flows.get_mut(&tuple) {
            let moved_since = known.changed >= learned.seen;
            if known.attempt.is_some() || known.socket == learned.socket {
                return;
            }
            if known.overlay_socket == learned.socket {
                if !moved_since {
                    // The forwarder died in a move: the application has its overlay socket again.
                    known.path = Path::Overlay;
                    known.socket = known.overlay_socket;
                    known.changed = self.now;
                }
                return;
            }
            self.forget(tuple);
        }
        if self.flows.len() >= MAX_FLOWS {
            self.counts.overflow += 1;
            return;
        }
        let conn = ConnId(self.number());
        self.conns.insert(conn, tuple);
        self.flows.insert(
            tuple,
            Flow {
                conn,
                tuple,
                side: learned.side,
                v6: learned.v6,
                netns: learned.netns,
                workload: learned.workload,
                home: learned.home,
                path: Path::Overlay,
                overlay_socket: learned.socket,
                socket: learned.socket,
                declined: learned.declined,
                peer_says: PeerSays::Nothing,
                held: false,
                reason: None,
                attempt: None,
                order: None,
                failures: 0,
                alarm: None,
                since: self.now,
                changed: learned.seen,
                swaps: 0,
                bytes_sent: 0,
                bytes_received: 0,
            },
        );
        if let Some(reason) = learned.declined {
            self.refuse(tuple, reason);
        }
        match learned.home {
            Home::Peer(peer) => {
                self.reach(peer);
                if self.is_up(peer) {
                    self.tell_know(tuple, false);
                }
                self.set_alarm(tuple, self.now + GRACE);
            }
            Home::SameHost | Home::Nowhere(Refusal::NoPeerHost) => {
                self.pair(tuple);
                self.set_alarm(tuple, self.now + GRACE);
            }
            Home::Nowhere(reason) => self.refuse(tuple, reason),
        }
        self.consider(tuple);
    }

    /// Are both ends here?
    fn pair(&mut self, tuple: Tuple) {
        let Some(mate) = self.flows.get(&tuple.reversed()).filter(|mate| mate.on_host().is_none()) else {
            return;
        };
        let one_network = self.flows.get(&tuple).is_some_and(|flow| flow.netns == mate.netns);
        for end in [tuple, tuple.reversed()] {
            let Some(flow) = self.flows.get_mut(&end) else { continue };
            flow.home = if one_network { Home::Nowhere(Refusal::SameNetwork) } else { Home::SameHost };
            if flow.reason == Some(Refusal::NoPeerHost) {
                flow.reason = None;
            }
            if one_network {
                self.refuse(end, Refusal::SameNetwork);
            }
        }
    }

    fn scanned(&mut self, began: Instant, sockets: &HashMap<SocketInode, (u64, u64)>) {
        let mut gone = Vec::new();
        for flow in self.flows.values_mut() {
            match sockets.get(&flow.socket) {
                Some((sent, received)) => (flow.bytes_sent, flow.bytes_received) = (*sent, *received),
                None if flow.changed < began && flow.since < began => gone.push(flow.tuple),
                None => {}
            }
        }
        for tuple in gone {
            if !self.is_in_a_move(tuple) {
                self.forget(tuple);
            }
        }
    }

    fn parked(&mut self, parked: Vec<Restored>) {
        let kept: BTreeSet<ConnId> = parked.iter().map(|restored| restored.conn).collect();
        for flow in self.flows.values_mut().filter(|flow| !kept.contains(&flow.conn)) {
            if let (Path::Host(on_host), None) = (&mut flow.path, &flow.attempt) {
                on_host.way_back = false;
            }
        }
        for restored in parked.into_iter().filter(|restored| !restored.sockets.is_empty()) {
            if self.conns.contains_key(&restored.conn) {
                continue;
            }
            for (end, socket) in restored.note.ends.iter().zip(&restored.sockets) {
                let on_host =
                    OnHost { swap: restored.note.swap, moved: restored.moved.clone(), way_back: true };
                let flow = Flow {
                    conn: restored.conn,
                    tuple: end.tuple,
                    side: end.side,
                    v6: end.v6,
                    netns: 0,
                    workload: end.workload.clone(),
                    home: end.home,
                    path: Path::Host(on_host),
                    overlay_socket: end.overlay_socket,
                    socket: *socket,
                    declined: None,
                    peer_says: PeerSays::Wants,
                    held: false,
                    reason: None,
                    attempt: None,
                    order: None,
                    failures: 0,
                    alarm: None,
                    since: self.now,
                    changed: self.now,
                    swaps: 1,
                    bytes_sent: 0,
                    bytes_received: 0,
                };
                self.forget(end.tuple);
                self.conns.insert(restored.conn, end.tuple);
                self.flows.insert(end.tuple, flow);
                if let Home::Peer(peer) = end.home {
                    self.reach(peer);
                }
            }
            // A connection within this host goes by its deciding end.
            if let Some(end) = restored.note.ends.iter().find(|end| end.tuple.decides()) {
                self.conns.insert(restored.conn, end.tuple);
            }
        }
    }

    fn host_socket_closed(&mut self, swap: u64) {
        let of_swap = |flow: &&Flow| flow.on_host().is_some_and(|on_host| on_host.swap == swap);
        let closed: Vec<Tuple> = self.flows.values().filter(of_swap).map(|flow| flow.tuple).collect();
        for tuple in closed {
            if !self.is_in_a_move(tuple) {
                self.forget(tuple);
            }
        }
    }

    /// Its sockets come and go, then, without the connection being over.
    fn is_in_a_move(&self, tuple: Tuple) -> bool {
        let moves = |flow: &Flow| flow.attempt.is_some();
        let mate = self.flows.get(&tuple.reversed()).filter(|mate| mate.home == Home::SameHost);
        self.flows.get(&tuple).is_some_and(moves) || mate.is_some_and(moves)
    }

    /// The connection is over, as far as this host can know.
    fn forget(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.remove(&tuple) else { return };
        if let Some(at) = flow.alarm {
            self.alarms.remove(&(at, tuple));
        }
        if self.conns.get(&flow.conn) == Some(&tuple) {
            self.conns.remove(&flow.conn);
        }
        if flow.on_host().is_some() {
            self.act(Action::Forwarder(Request::Release { conn: flow.conn }));
        }
        if flow.order.is_some() {
            self.act(Action::Answer(tuple, Err(Refusal::NotEstablished)));
        }
    }

    fn no_way_back(&mut self, conn: ConnId) {
        for flow in self.flows.values_mut().filter(|flow| flow.conn == conn) {
            if let Path::Host(on_host) = &mut flow.path {
                on_host.way_back = false;
            }
        }
    }

    fn forwarder_down(&mut self) {
        self.forwarder_is_up = false;
        let attempts = self.flows.values().filter(|flow| flow.attempt.is_some());
        for tuple in attempts.map(|flow| flow.tuple).collect::<Vec<_>>() {
            self.step(tuple, Input::ForwarderLost);
        }
    }

    // Peers.

    fn reach(&mut self, peer: PeerAddress) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.peers.entry(peer) {
            entry.insert(false);
            self.act(Action::Reach(peer));
        }
    }

    fn is_up(&self, peer: PeerAddress) -> bool {
        self.peers.get(&peer).copied().unwrap_or(false)
    }

    fn of_peer(&self, peer: PeerAddress) -> Vec<Tuple> {
        let there = |flow: &&Flow| flow.home == Home::Peer(peer);
        self.flows.values().filter(there).map(|flow| flow.tuple).collect()
    }

    fn peer_up(&mut self, peer: PeerAddress) {
        self.peers.insert(peer, true);
        for tuple in self.of_peer(peer) {
            let Some(flow) = self.flows.get_mut(&tuple) else { continue };
            if flow.on_host().is_none() {
                if flow.reason == Some(Refusal::PeerUnreachable) {
                    flow.reason = None;
                    self.set_alarm(tuple, self.now + GRACE);
                }
                self.tell_know(tuple, false);
            }
            self.consider(tuple);
        }
    }

    fn peer_down(&mut self, peer: PeerAddress) {
        self.peers.insert(peer, false);
        for tuple in self.of_peer(peer) {
            self.step(tuple, Input::PeerLost);
            let Some(flow) = self.flows.get_mut(&tuple) else { continue };
            if flow.on_host().is_none() {
                flow.peer_says = PeerSays::Nothing;
                if flow.declined.is_none() && flow.attempt.is_none() {
                    self.refuse(tuple, Refusal::PeerUnreachable);
                }
            }
            self.consider(tuple);
        }
    }

    fn tell_know(&mut self, tuple: Tuple, answer: bool) {
        let Some(flow) = self.flows.get(&tuple) else { return };
        if let Home::Peer(peer) = flow.home {
            let declined = flow.declined;
            self.act(Action::Tell(peer, Message::Know { tuple, declined, answer }));
        }
    }

    fn peer_said(&mut self, peer: PeerAddress, message: Message) {
        match message {
            Message::Know { tuple, declined, answer } => {
                self.peer_knows(peer, tuple.reversed(), declined, answer);
            }
            Message::Ask { tuple, direction, cause } => {
                let tuple = tuple.reversed();
                if self.is_with(peer, tuple) && tuple.decides() {
                    self.order(tuple, direction, cause, ORDER);
                }
            }
            Message::Offer { attempted, tuple, direction, cause } => {
                self.offered(peer, attempted, tuple.reversed(), direction, cause);
            }
            Message::Refuse { attempted, reason } => {
                self.step_peer(peer, attempted, Input::PeerRefuses(reason));
            }
            Message::Accept { attempted, path } => {
                if let Some(attempt) = self.attempt_with(peer, attempted) {
                    attempt.rendezvous = path;
                    self.step_peer(peer, attempted, Input::PeerAccepts);
                }
            }
            Message::Begin { attempted } => self.step_peer(peer, attempted, Input::PeerBegins),
            Message::Cancel { attempted, reason } => {
                self.step_peer(peer, attempted, Input::PeerCancels(reason));
            }
            Message::Relay { attempted, message } => {
                if self.attempt_with(peer, attempted).is_some() {
                    let conn = attempted.conn;
                    self.act(Action::Forwarder(Request::FromPeer { conn, message }));
                }
            }
        }
    }

    /// The attempt that a message of this peer is about, if that is the one under way.
    fn attempt_with(&mut self, peer: PeerAddress, attempted: Attempted) -> Option<&mut Attempt> {
        let tuple = *self.conns.get(&attempted.conn)?;
        let flow = self.flows.get_mut(&tuple).filter(|flow| flow.home == Home::Peer(peer))?;
        flow.attempt.as_mut().filter(|attempt| attempt.number == attempted.number)
    }

    fn is_with(&self, peer: PeerAddress, tuple: Tuple) -> bool {
        self.flows.get(&tuple).is_some_and(|flow| flow.home == Home::Peer(peer))
    }

    fn peer_knows(&mut self, peer: PeerAddress, tuple: Tuple, declined: Option<Refusal>, answer: bool) {
        let Some(flow) = self.flows.get_mut(&tuple).filter(|flow| flow.home == Home::Peer(peer)) else {
            return;
        };
        if flow.on_host().is_some() {
            return;
        }
        match declined {
            None => {
                flow.peer_says = PeerSays::Wants;
                let of_peer = [
                    Refusal::PeerUnknown,
                    Refusal::PeerUnreachable,
                    Refusal::PeerGone,
                    Refusal::PeerSaysNo,
                    Refusal::Stopping,
                ];
                if flow.reason.is_some_and(|reason| of_peer.contains(&reason)) {
                    flow.reason = None;
                }
            }
            Some(reason) => {
                flow.peer_says = PeerSays::Declines(reason);
                if flow.declined.is_none() && flow.attempt.is_none() {
                    let reason = if reason == Refusal::NoRuleMatches { Refusal::PeerSaysNo } else { reason };
                    self.refuse(tuple, reason);
                }
            }
        }
        if !answer {
            self.tell_know(tuple, true);
        }
        self.consider(tuple);
    }

    fn offered(
        &mut self,
        peer: PeerAddress,
        attempted: Attempted,
        tuple: Tuple,
        direction: Direction,
        cause: Cause,
    ) {
        let conn = attempted.conn;
        if let Err(reason) = self.may_follow(peer, conn, tuple, direction, cause) {
            return self.act(Action::Tell(peer, Message::Refuse { attempted, reason }));
        }
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let old = std::mem::replace(&mut flow.conn, conn);
        self.conns.remove(&old);
        self.conns.insert(conn, tuple);
        self.start(tuple, Part::Follower, direction, cause, attempted.number);
    }

    fn may_follow(
        &self,
        peer: PeerAddress,
        conn: ConnId,
        tuple: Tuple,
        direction: Direction,
        cause: Cause,
    ) -> Result<(), Refusal> {
        let known = self.flows.get(&tuple).filter(|flow| flow.home == Home::Peer(peer));
        let flow = known.ok_or(Refusal::PeerUnknown)?;
        let named_elsewhere = self.conns.get(&conn).is_some_and(|other| *other != tuple);
        if flow.attempt.is_some() || named_elsewhere {
            return Err(Refusal::HolderBusy);
        }
        if tuple.decides() || flow.has_arrived(direction) {
            return Err(Refusal::PeerUnknown);
        }
        if !self.forwarder_is_up {
            return Err(Refusal::ForwarderGone);
        }
        if direction == Direction::ToOverlay {
            return if flow.conn == conn { Ok(()) } else { Err(Refusal::PeerUnknown) };
        }
        if self.stopping.is_some() {
            return Err(Refusal::Stopping);
        }
        if flow.declined.is_some() {
            return Err(Refusal::PeerSaysNo);
        }
        if flow.held && cause != Cause::Order { Err(Refusal::SwappedBack) } else { Ok(()) }
    }

    fn relay(&mut self, conn: ConnId, message: Vec<u8>) {
        let Some(flow) = self.conns.get(&conn).and_then(|tuple| self.flows.get(tuple)) else { return };
        if let (Home::Peer(peer), Some(attempt)) = (flow.home, &flow.attempt) {
            let attempted = Attempted { conn, number: attempt.number };
            self.act(Action::Tell(peer, Message::Relay { attempted, message }));
        }
    }

    // What is wanted.

    fn verdict(&mut self, tuple: Tuple, declined: Option<Refusal>) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if flow.declined == declined {
            return;
        }
        let before = std::mem::replace(&mut flow.declined, declined);
        if flow.reason.is_some() && flow.reason == before {
            flow.reason = None;
        }
        let on_host = flow.on_host().is_some();
        match declined {
            Some(_) if on_host => self.order(tuple, Direction::ToOverlay, Cause::Rules, ORDER),
            Some(reason) => self.refuse(tuple, reason),
            None => {}
        }
        self.tell_know(tuple, true);
        self.consider(tuple);
    }

    fn order(&mut self, tuple: Tuple, direction: Direction, cause: Cause, time: Duration) {
        let until = self.now + time;
        let Some(flow) = self.flows.get_mut(&tuple) else {
            return self.act(Action::Answer(tuple, Err(Refusal::NotEstablished)));
        };
        if cause == Cause::Order {
            flow.held = direction == Direction::ToOverlay;
        }
        if direction == Direction::ToHost && self.stopping.is_some() {
            return self.act(Action::Answer(tuple, Err(Refusal::Stopping)));
        }
        flow.order = Some(Order { direction, cause, until });
        flow.failures = 0;
        if flow.attempt.is_none() {
            self.clear_alarm(tuple);
            self.consider(tuple);
        }
    }

    fn stop(&mut self, leave: bool) {
        self.stopping = Some(Stopping { leave, until: self.now + STOP });
        for tuple in self.flows.keys().copied().collect::<Vec<_>>() {
            let Some(flow) = self.flows.get(&tuple) else { continue };
            let to_host = |attempt: &Attempt| leave || attempt.negotiation.direction == Direction::ToHost;
            if flow.attempt.as_ref().is_some_and(to_host) {
                self.step(tuple, Input::GiveUp(Refusal::Stopping));
            }
            self.order_back(tuple);
        }
    }

    /// While stopping, all go back.
    fn order_back(&mut self, tuple: Tuple) {
        let Some(stopping) = self.stopping.filter(|stopping| !stopping.leave) else { return };
        let mate_leads = |flow: &Flow| flow.home == Home::SameHost && !flow.tuple.decides();
        if self.flows.get(&tuple).is_some_and(|flow| flow.on_host().is_some() && !mate_leads(flow)) {
            let time = stopping.until.saturating_duration_since(self.now);
            self.order(tuple, Direction::ToOverlay, Cause::Stop, time);
        }
    }

    fn consider_all(&mut self) {
        for tuple in self.flows.keys().copied().collect::<Vec<_>>() {
            if let Some(flow) = self.flows.get_mut(&tuple)
                && flow.reason == Some(Refusal::ForwarderGone)
            {
                flow.reason = None;
            }
            self.consider(tuple);
        }
    }

    /// Start what is wanted and possible.
    fn consider(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get(&tuple) else { return };
        if flow.attempt.is_some() || !self.forwarder_is_up {
            return;
        }
        let (home, order) = (flow.home, flow.order);
        if order.is_some_and(|order| flow.has_arrived(order.direction)) {
            return self.order_done(tuple);
        }
        if home == Home::SameHost && !tuple.decides() {
            // The deciding end leads; an order goes there.
            if let Some(order) = order {
                let until = order.until;
                if let Some(mate) = self.flows.get_mut(&tuple.reversed())
                    && mate.order.is_none()
                {
                    mate.order = Some(Order { until, ..order });
                    mate.failures = 0;
                }
            }
            return self.consider(tuple.reversed());
        }
        let Some(flow) = self.flows.get(&tuple) else { return };
        let (direction, cause) = match order.or(flow.order) {
            Some(order) => (order.direction, order.cause),
            None if self.wants_swap(flow) => (Direction::ToHost, Cause::Rules),
            None => return,
        };
        let waits = flow.failures > 0 && flow.alarm.is_some_and(|at| at > self.now);
        if waits {
            return;
        }
        match (home, flow.part()) {
            (Home::Peer(peer), _) if !self.is_up(peer) => {
                self.order_failed(tuple, Refusal::PeerUnreachable);
            }
            (Home::Peer(peer), Some(Part::Follower)) => {
                self.act(Action::Tell(peer, Message::Ask { tuple, direction, cause }));
                self.set_alarm(tuple, self.now + ASK_AGAIN);
            }
            (_, Some(part)) => {
                let number = self.number();
                self.start(tuple, part, direction, cause, number);
            }
            (Home::Nowhere(reason), None) => self.order_failed(tuple, reason),
            (Home::Peer(_) | Home::SameHost, None) => {}
        }
    }

    /// Do rules, peer and history say that it is to be swapped now?
    fn wants_swap(&self, flow: &Flow) -> bool {
        let agreed = match flow.home {
            Home::Peer(_) => flow.tuple.decides() && flow.peer_says == PeerSays::Wants,
            Home::SameHost => self.flows.get(&flow.tuple.reversed()).is_some_and(|mate| {
                mate.declined.is_none() && mate.attempt.is_none() && !mate.held && mate.on_host().is_none()
            }),
            Home::Nowhere(_) => false,
        };
        agreed
            && self.stopping.is_none()
            && flow.on_host().is_none()
            && flow.declined.is_none()
            && !flow.held
            && flow.reason.is_none_or(Refusal::is_passing)
    }

    // Moves.

    fn start(&mut self, tuple: Tuple, part: Part, direction: Direction, cause: Cause, number: u64) {
        let (negotiation, outputs) = Negotiation::start(part, direction);
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        flow.attempt = Some(Attempt { negotiation, cause, number, rendezvous: None });
        self.set_alarm(tuple, self.now + STEP);
        for output in outputs {
            self.carry_out(tuple, output);
        }
    }

    fn step_conn(&mut self, conn: ConnId, input: Input) {
        if let Some(tuple) = self.conns.get(&conn).copied() {
            self.step(tuple, input);
        }
    }

    fn step_peer(&mut self, peer: PeerAddress, attempted: Attempted, input: Input) {
        if self.attempt_with(peer, attempted).is_some() {
            self.step_conn(attempted.conn, input);
        }
    }

    fn step(&mut self, tuple: Tuple, input: Input) {
        let Some(attempt) = self.flows.get_mut(&tuple).and_then(|flow| flow.attempt.as_mut()) else { return };
        let (next, outputs) = attempt.negotiation.step(input);
        if let Next::Goes(negotiation) = &next {
            let progress = attempt.negotiation != *negotiation;
            attempt.negotiation = *negotiation;
            if negotiation.is_moving() {
                self.clear_alarm(tuple);
            } else if progress {
                self.set_alarm(tuple, self.now + STEP);
            }
        }
        for output in outputs {
            self.carry_out(tuple, output);
        }
        if let Next::Ended(result) = next {
            self.ended(tuple, result);
        }
    }

    fn carry_out(&mut self, tuple: Tuple, output: Output) {
        let Some(flow) = self.flows.get(&tuple) else { return };
        let Some(attempt) = &flow.attempt else { return };
        let (conn, direction, cause) = (flow.conn, attempt.negotiation.direction, attempt.cause);
        let attempted = Attempted { conn, number: attempt.number };
        let peer = match flow.home {
            Home::Peer(peer) => Some(peer),
            Home::SameHost | Home::Nowhere(_) => None,
        };
        let names = |tuple: Tuple| Names { swap: attempted.number, local: tuple.local, remote: tuple.remote };
        let tell = |message| peer.map(|peer| Action::Tell(peer, message));
        let action = match output {
            Output::Prepare => {
                let target = self.prepare_target(flow, attempt);
                Some(Action::Forwarder(Request::Prepare { conn, direction, target }))
            }
            Output::Offer => tell(Message::Offer { attempted, tuple, direction, cause }),
            Output::Accept if direction == Direction::ToOverlay => {
                tell(Message::Accept { attempted, path: None })
            }
            Output::Accept => peer.map(|peer| Action::Accept { attempted, v6: flow.v6, peer }),
            Output::Begin => tell(Message::Begin { attempted }),
            Output::Refuse(reason) => tell(Message::Refuse { attempted, reason }),
            Output::CancelPeer(reason) => tell(Message::Cancel { attempted, reason }),
            Output::Connect => match (attempt.negotiation.part, attempt.rendezvous) {
                (Part::Both, _) => {
                    let mate = self.flows.get(&tuple.reversed());
                    let v6 = [flow.v6, mate.is_some_and(|mate| mate.v6)];
                    Some(Action::ConnectLocal { conn, v6 })
                }
                (_, Some(rendezvous)) => Some(Action::Connect { conn, v6: flow.v6, rendezvous }),
                // Accepted without saying where: nothing will come, and the time runs out.
                (_, None) => None,
            },
            Output::Move(role) => Some(Action::Move { conn, role, names: names(tuple) }),
            Output::MoveLocal => {
                Some(Action::MoveLocal { conn, names: [names(tuple), names(tuple.reversed())] })
            }
            Output::CancelForwarder(reason) => {
                self.act(Action::DropPath(conn));
                Some(Action::Forwarder(Request::Cancel { conn, reason }))
            }
        };
        self.actions.extend(action);
    }

    fn prepare_target(&self, flow: &Flow, attempt: &Attempt) -> PrepareTarget {
        if attempt.negotiation.direction == Direction::ToOverlay {
            return PrepareTarget::Parked;
        }
        let mate = self.flows.get(&flow.tuple.reversed());
        let mate = mate.filter(|_| attempt.negotiation.part == Part::Both);
        let ends = [Some(flow), mate].into_iter().flatten().map(Flow::noted).collect();
        let note = postcard::to_stdvec(&Note { swap: attempt.number, ends }).unwrap_or_default();
        match mate {
            None => PrepareTarget::Remote { socket: flow.socket, note },
            Some(mate) => PrepareTarget::Local { first: flow.socket, second: mate.socket, note },
        }
    }

    fn ended(&mut self, tuple: Tuple, result: Result<Moved, Refusal>) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let Some(attempt) = flow.attempt.take() else { return };
        let Negotiation { part, direction, .. } = attempt.negotiation;
        let conn = flow.conn;
        self.clear_alarm(tuple);
        self.act(Action::Report { conn, tuple, direction, result: result.clone() });
        match result {
            Ok(moved) => {
                match direction {
                    Direction::ToHost => self.counts.swaps += 1,
                    Direction::ToOverlay => self.counts.swap_backs += 1,
                }
                let ends = if part == Part::Both { vec![tuple, tuple.reversed()] } else { vec![tuple] };
                for (index, end) in ends.into_iter().enumerate() {
                    self.arrived(end, conn, index, &attempt, &moved);
                }
            }
            Err(reason) => self.not_moved(tuple, &attempt, reason),
        }
    }

    fn arrived(&mut self, tuple: Tuple, conn: ConnId, index: usize, attempt: &Attempt, moved: &Moved) {
        let stopping = self.stopping.is_some();
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let direction = attempt.negotiation.direction;
        flow.conn = conn;
        flow.changed = self.now;
        flow.failures = 0;
        match direction {
            Direction::ToHost => {
                flow.path = Path::Host(OnHost { swap: attempt.number, moved: moved.clone(), way_back: true });
                flow.socket = moved.sockets.get(index).copied().unwrap_or(flow.socket);
                flow.reason = None;
                flow.held = false;
                flow.swaps += 1;
            }
            Direction::ToOverlay => {
                flow.path = Path::Overlay;
                flow.socket = flow.overlay_socket;
                flow.held = attempt.cause == Cause::Order;
                flow.reason = Some(match attempt.cause {
                    Cause::Order => Refusal::SwappedBack,
                    Cause::Stop if stopping => Refusal::Stopping,
                    Cause::Stop => Refusal::PeerGone,
                    Cause::Rules => flow.declined.unwrap_or(Refusal::PeerSaysNo),
                });
                if attempt.cause == Cause::Stop {
                    flow.peer_says = PeerSays::Nothing;
                }
            }
        }
        self.order_back(tuple);
        self.consider(tuple);
    }

    fn not_moved(&mut self, tuple: Tuple, attempt: &Attempt, reason: Refusal) {
        self.refuse(tuple, reason);
        if reason == Refusal::NotEstablished {
            if attempt.negotiation.part == Part::Both {
                self.forget(tuple.reversed());
            }
            return self.forget(tuple);
        }
        if reason == Refusal::NotParked {
            if let Some(conn) = self.flows.get(&tuple).map(|flow| flow.conn) {
                self.no_way_back(conn);
            }
        }
        let mate = tuple.reversed();
        if attempt.negotiation.part == Part::Both
            && let Some(mate) = self.flows.get_mut(&mate)
        {
            mate.reason = Some(reason);
        }
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        flow.failures += 1;
        let doubled = FIRST_RETRY.saturating_mul(1 << flow.failures.min(12)).min(LAST_RETRY);
        let ordered = flow.order;
        let retry = if ordered.is_some() { doubled.min(ORDER_RETRY) } else { doubled };
        // Two hosts that refuse each other must not come back at the same times for ever.
        let at = self.now + retry.mul_f64(1.0 + (self.number() % 256) as f64 / 512.0);
        match ordered {
            Some(order) if reason.is_passing() && at < order.until => self.set_alarm(tuple, at),
            Some(_) => self.order_failed(tuple, reason),
            None if reason.is_passing() => self.set_alarm(tuple, at),
            None => {}
        }
        // The other router has not heard of a refusal before the offer.
        let unheard = attempt.negotiation.part == Part::Decider && !reason.is_passing();
        if unheard && let Some(Home::Peer(peer)) = self.flows.get(&tuple).map(|flow| flow.home) {
            let declined = Some(reason);
            self.act(Action::Tell(peer, Message::Know { tuple, declined, answer: true }));
        }
    }

    fn order_done(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let pause_us = flow.on_host().map_or(0, |on_host| on_host.moved.pause_us);
        if flow.order.take().is_some() {
            self.act(Action::Answer(tuple, Ok(pause_us)));
        }
    }

    fn order_failed(&mut self, tuple: Tuple, reason: Refusal) {
        for end in [tuple, tuple.reversed()] {
            let Some(flow) = self.flows.get_mut(&end) else { continue };
            if end != tuple && flow.home != Home::SameHost {
                continue;
            }
            if flow.order.take().is_some() {
                self.act(Action::Answer(end, Err(reason)));
            }
        }
    }

    /// Leave it where it is, because.
    fn refuse(&mut self, tuple: Tuple, reason: Refusal) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if flow.reason.replace(reason) != Some(reason) || flow.failures > 0 {
            *self.counts.refused.entry(reason.label()).or_default() += 1;
        }
    }

    // Time.

    fn set_alarm(&mut self, tuple: Tuple, at: Instant) {
        self.clear_alarm(tuple);
        if let Some(flow) = self.flows.get_mut(&tuple) {
            flow.alarm = Some(at);
            self.alarms.insert((at, tuple));
        }
    }

    fn clear_alarm(&mut self, tuple: Tuple) {
        if let Some(at) = self.flows.get_mut(&tuple).and_then(|flow| flow.alarm.take()) {
            self.alarms.remove(&(at, tuple));
        }
    }

    fn ring(&mut self) {
        while let Some((at, tuple)) = self.alarms.first().copied()
            && at <= self.now
        {
            self.clear_alarm(tuple);
            let Some(flow) = self.flows.get(&tuple) else { continue };
            if flow.attempt.is_some() {
                self.step(tuple, Input::Overdue);
                continue;
            }
            if flow.order.is_some_and(|order| order.until <= self.now) {
                let reason = flow.reason.unwrap_or(Refusal::PeerUnknown);
                self.order_failed(tuple, reason);
                continue;
            }
            let unknown = match (flow.home, flow.peer_says) {
                (Home::Peer(peer), PeerSays::Nothing) if self.is_up(peer) => Some(Refusal::PeerUnknown),
                (Home::Peer(_), PeerSays::Nothing) => Some(Refusal::PeerUnreachable),
                (Home::Nowhere(reason), _) => Some(reason),
                (Home::Peer(_) | Home::SameHost, _) => None,
            };
            if let Some(reason) = unknown
                && flow.reason.is_none()
                && flow.on_host().is_none()
            {
                self.refuse(tuple, reason);
            }
            self.consider(tuple);
        }
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    /// A number that does not come again (splitmix64).
    fn number(&mut self) -> u64 {
        self.numbers = self.numbers.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.numbers ^ (self.numbers >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
