// SPDX-License-Identifier: Apache-2.0
//! All connections of this host, and what is to be done about each. Pure: events come in with the time, actions go
//! out.
//!
//! A connection is learned from tracing or a scan. Its end is told to the peer's router; when both ends are known and
//! both want it, the decider opens a negotiation ([`super::negotiation`]). What was refused in passing is tried again,
//! later and later. Orders (a person, a stop) go before rules.

mod known;
mod moves;
mod peers;
mod stalls;
#[cfg(test)]
mod tests;
mod wants;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Bound,
    sync::Arc,
    time::{Duration, Instant},
};

use forwarder_api::{
    ConnId, Direction, Holder, Manner, Moved, OtherEnd, Outcome, Refusal, Request, Role, SocketInode,
};

use super::{
    flow::{Attempt, Flow, FlowView, Home, Note, NotedEnd, OnHost, Order, Path, PeerSays},
    host_path::Family,
    negotiation::{Input, Negotiation, Next, Output, Part, State},
    tally::{Tally, Traffic},
    wire::{Attempted, Cause, Message, Rendezvous, Tuple},
};
use crate::{identity::Names, peers::PeerAddress, trace::Side, trust::Node, workload::Workload};

/// How long the other end may take to be known before that is a reason.
const GRACE: Duration = Duration::from_secs(1);
/// How long each step of a negotiation may take.
const STEP: Duration = Duration::from_secs(3);
/// How long an order is pursued; one to stop longer, because nobody will ask again.
const ORDER: Duration = Duration::from_secs(5);
const STOP: Duration = Duration::from_secs(15);
/// One to leave a host path that has failed: tried later and later, because each try stops programs in vain.
const PURSUIT: Duration = Duration::from_secs(60);
/// Between two tries: doubled from the first to the last. Orders that somebody waits for do not wait longer than `ORDER_RETRY`.
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(5);
const ORDER_RETRY: Duration = Duration::from_millis(100);
/// Between two times that a follower asks its decider.
const ASK_AGAIN: Duration = Duration::from_millis(500);
/// Between two lines about false claims of one peer.
const ACCUSATION: Duration = Duration::from_secs(60);
/// The most attempts that this router leads at once: each needs connections of its own, until it is over. Enough for the
/// forwarder to move many together.
const MAX_ATTEMPTS: usize = 2048;
/// The most connections that are kept. More are left alone, counted.
const MAX_FLOWS: usize = 1 << 16;

/// A connection that tracing or a scan has shown, with what was looked up about it.
#[derive(Clone, Debug)]
pub struct Learned {
    pub tuple: Tuple,
    pub translated: Option<Tuple>,
    pub side: Side,
    pub v6: bool,
    pub netns: u32,
    pub socket: SocketInode,
    pub workload: Arc<Workload>,
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

/// A swapped connection that nobody has the way back of: router and forwarder were killed. Its host socket tells its
/// names.
#[derive(Clone, Debug)]
pub struct Stranded {
    pub tuple: Tuple,
    pub swap: u64,
    pub side: Side,
    pub v6: bool,
    pub socket: SocketInode,
    pub workload: Arc<Workload>,
    pub home: Home,
    pub declined: Option<Refusal>,
}

#[derive(Clone, Debug)]
pub enum Event {
    Learned(Learned),
    Stranded(Stranded),
    /// All sockets that a scan begun at this time has found, and their bytes sent and received.
    Scanned {
        began: Instant,
        sockets: HashMap<SocketInode, (u64, u64)>,
    },
    Parked(Vec<Restored>),
    /// The host socket with these names has left ESTABLISHED.
    HostSocketClosed(Names),
    /// The swaps whose host sockets get nothing through now, all of them, and the bytes that wait there.
    Stalled(HashMap<u64, u32>),
    ForwarderUp,
    ForwarderDown,
    Prepared(ConnId, Holder),
    Refused(ConnId, Refusal),
    Ended(ConnId, Outcome),
    /// From our forwarder to the one at the other end.
    ToPeer(ConnId, Vec<u8>),
    ParkedEnded(ConnId),
    /// What the overlay made of its addresses is forgotten there.
    TranslationLost(ConnId),
    /// The host connection could be made, or not.
    Path(ConnId, bool),
    /// The other end has been found on another host, or at another address of its host.
    Relocated(Tuple, PeerAddress),
    PeerUp(PeerAddress),
    PeerDown(PeerAddress),
    Peer(Node, Message),
    /// Our rules have changed: what they say now.
    Verdict(Tuple, Option<Refusal>),
    /// The container is known better, and what the rules say of it.
    Workload(Tuple, Arc<Workload>, Option<Refusal>),
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
    /// To our forwarder, with the host socket of this connection if it is `ToHost`. `with`: who holds the other end, if
    /// it may be moved together with others.
    Move {
        conn: ConnId,
        role: Role,
        manner: Manner,
        names: Names,
        with: Option<OtherEnd>,
    },
    /// Likewise, with both host sockets.
    MoveLocal {
        conn: ConnId,
        names: [Names; 2],
        alone: bool,
    },
    /// Connect to the follower's host, with a host socket of this family; the answer is [`Event::Path`].
    Connect {
        conn: ConnId,
        family: Family,
        peer: PeerAddress,
        rendezvous: Rendezvous,
    },
    /// Let the peer connect to us, with a host socket of this family if there is to be one: tell it where and with which
    /// tokens. The answer is [`Event::Path`].
    Accept {
        attempted: Attempted,
        host: Option<Family>,
        peer: PeerAddress,
        holder: Holder,
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
    /// For the log. `node` spoke about a connection whose other end is at `home`.
    ReportFalseClaim {
        node: PeerAddress,
        tuple: Tuple,
        home: Home,
    },
    ReportStall {
        conn: ConnId,
        tuple: Tuple,
        unacknowledged_bytes: u32,
    },
    Report {
        conn: ConnId,
        tuple: Tuple,
        direction: Direction,
        result: Result<Moved, Refusal>,
    },
    /// It is left on the overlay, without an attempt.
    ReportRefusal {
        conn: ConnId,
        tuple: Tuple,
        reason: Refusal,
    },
}

pub struct Ledger {
    /// In boxes: half of the room in the nodes of a tree is empty.
    flows: BTreeMap<Tuple, Box<Flow>>,
    /// What routers call those that this host translates.
    translated: HashMap<Tuple, Tuple>,
    conns: BTreeMap<ConnId, Tuple>,
    alarms: BTreeSet<(Instant, Tuple)>,
    /// Peers that are to be reached, and whether they are.
    peers: BTreeMap<PeerAddress, bool>,
    /// When a false claim of each was last logged.
    accused: BTreeMap<PeerAddress, Instant>,
    forwarder_is_up: bool,
    stopping: Option<Stopping>,
    /// Attempts under way that we lead, and who waits for one of them to end.
    attempts: usize,
    line: VecDeque<Tuple>,
    /// Was any host path stalled when they were last looked at?
    any_stalled: bool,
    tally: Tally,
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
            translated: HashMap::new(),
            conns: BTreeMap::new(),
            alarms: BTreeSet::new(),
            peers: BTreeMap::new(),
            accused: BTreeMap::new(),
            forwarder_is_up: false,
            stopping: None,
            attempts: 0,
            line: VecDeque::new(),
            any_stalled: false,
            tally: Tally::default(),
            numbers: seed,
            now,
            actions: Vec::new(),
        }
    }

    pub fn handle(&mut self, now: Instant, event: Event) -> Vec<Action> {
        self.now = now;
        match event {
            Event::Learned(learned) => self.learn(learned),
            Event::Stranded(stranded) => self.take_in(stranded),
            Event::Scanned { began, sockets } => self.scanned(began, &sockets),
            Event::Parked(parked) => self.parked(parked),
            Event::HostSocketClosed(names) => self.host_socket_closed(names),
            Event::Stalled(swaps) => self.stalled(&swaps),
            Event::ForwarderUp => {
                self.forwarder_is_up = true;
                self.consider_all();
            }
            Event::ForwarderDown => self.forwarder_down(),
            Event::Prepared(conn, holder) => self.prepared(conn, holder),
            Event::Refused(conn, reason) => self.step_conn(conn, Input::Refused(reason)),
            Event::Ended(conn, outcome) => {
                self.count_pause(conn, &outcome);
                self.step_conn(conn, Input::Ended(outcome));
            }
            Event::ToPeer(conn, message) => self.relay(conn, message),
            Event::ParkedEnded(conn) | Event::TranslationLost(conn) => self.no_way_back(conn),
            Event::Path(conn, true) => self.step_conn(conn, Input::PathReady),
            Event::Path(conn, false) => self.step_conn(conn, Input::PathFailed),
            Event::Relocated(tuple, peer) => self.relocated(tuple, peer),
            Event::PeerUp(peer) => self.peer_up(peer),
            Event::PeerDown(peer) => self.peer_down(peer),
            Event::Peer(node, message) => self.peer_said(&node, message),
            Event::Verdict(tuple, declined) => self.verdict(tuple, declined),
            Event::Workload(tuple, workload, declined) => self.workload(tuple, workload, declined),
            Event::Order(tuple, direction) => self.order(tuple, direction, Cause::Order, Some(ORDER)),
            Event::Stop { leave } => self.stop(leave),
            Event::Alarm => self.ring(),
        }
        std::mem::take(&mut self.actions)
    }

    /// When [`Event::Alarm`] is to come.
    pub fn alarm(&self) -> Option<Instant> {
        self.alarms.first().map(|(at, _)| *at)
    }

    /// After a stop: one that is waited for. The search goes on from where it was found `before`: of thousands, all would
    /// be looked at whenever one is done.
    pub fn awaited(&self, before: Option<Tuple>) -> Option<Tuple> {
        let is_awaited = |flow: &&Flow| flow.attempt.is_some() || flow.order.is_some();
        let first = before.and_then(|tuple| self.get(tuple));
        let mut all = first.into_iter().chain(self.flows_after(before)).chain(self.flows());
        all.find(is_awaited).map(|flow| flow.tuple)
    }

    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.is_some()
    }

    pub fn get(&self, tuple: Tuple) -> Option<&Flow> {
        self.flows.get(&tuple).map(Box::as_ref)
    }

    /// Connections on the host network; one within this host counts once.
    pub fn swapped(&self) -> usize {
        let first = |flow: &&Flow| flow.home != Home::SameHost || flow.decides();
        self.flows().filter(|flow| flow.on_host().is_some()).filter(first).count()
    }

    /// No connection is on its way by our lead.
    pub fn is_at_rest(&self) -> bool {
        self.attempts == 0
    }

    /// Keep no room for more than there are. A tree that is collected has full nodes; one that has grown, half empty ones.
    pub fn shrink(&mut self) {
        self.flows = std::mem::take(&mut self.flows).into_iter().collect();
        self.conns = std::mem::take(&mut self.conns).into_iter().collect();
        self.translated.shrink_to_fit();
    }

    pub fn len(&self) -> usize {
        self.flows.len()
    }

    pub fn flows(&self) -> impl Iterator<Item = &Flow> {
        self.flows.values().map(Box::as_ref)
    }

    pub fn flows_after(&self, tuple: Option<Tuple>) -> impl Iterator<Item = &Flow> {
        let from = tuple.map_or(Bound::Unbounded, Bound::Excluded);
        self.flows.range((from, Bound::Unbounded)).map(|(_, flow)| flow.as_ref())
    }

    pub fn views(&self) -> Vec<FlowView> {
        self.flows().map(|flow| flow.view(self.now)).collect()
    }

    pub fn peers(&self) -> &BTreeMap<PeerAddress, bool> {
        &self.peers
    }

    pub fn flow(&self, tuple: Tuple) -> Option<&Flow> {
        self.flows.get(&tuple).map(Box::as_ref)
    }

    /// The connection that routers call so, seen from this end.
    pub fn named(&self, name: Tuple) -> Option<Tuple> {
        let own = || self.get(name).filter(|flow| flow.translated.is_none()).map(|flow| flow.tuple);
        self.translated.get(&name).copied().or_else(own)
    }

    /// The other end of this connection, if it is here: each has the addresses that the other sees.
    pub fn mate(&self, tuple: Tuple) -> Option<Tuple> {
        let name = self.flows.get(&tuple)?.name();
        let mate = self.flows.get(&name.reversed())?;
        (mate.name() == tuple.reversed()).then_some(mate.tuple)
    }

    /// This end, and the other one if it is here, too.
    fn ends_here(&self, tuple: Tuple) -> impl Iterator<Item = Tuple> + use<> {
        [Some(tuple), self.mate(tuple)].into_iter().flatten()
    }

    /// One within this host goes by the end that leads.
    pub fn of(&self, conn: ConnId) -> Option<&Flow> {
        self.flow(*self.conns.get(&conn)?)
    }

    /// The host of this connection's other end.
    pub fn peer_of(&self, conn: ConnId) -> Option<PeerAddress> {
        match self.of(conn)?.home {
            Home::Peer(peer) => Some(peer),
            Home::SameHost | Home::Nowhere(_) => None,
        }
    }

    pub fn find(&self, conn: ConnId) -> Option<&Flow> {
        self.flows().find(|flow| flow.conn == conn)
    }

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
            let is_moving = flow.attempt.as_ref().is_some_and(|attempt| attempt.negotiation.is_moving());
            if flow.attempt.is_some() && !is_moving {
                self.step(tuple, Input::Overdue);
                continue;
            }
            if flow.order.and_then(|order| order.until).is_some_and(|until| until <= self.now) {
                let otherwise = if is_moving { Refusal::HolderBusy } else { Refusal::PeerUnknown };
                let reason = flow.reason.unwrap_or(otherwise);
                self.order_failed(tuple, reason);
                continue;
            }
            if is_moving {
                continue;
            }
            let elsewhere = match (flow.home, flow.peer_says) {
                (Home::Peer(peer), PeerSays::Nothing) if self.is_up(peer) => Some(flow.unanswered()),
                (Home::Peer(_), PeerSays::Nothing) => Some(Refusal::PeerUnreachable),
                (Home::Peer(_), PeerSays::Declines(reason)) => Some(reason),
                (Home::Nowhere(reason), _) => Some(reason),
                (Home::Peer(_), PeerSays::Wants) | (Home::SameHost, _) => None,
            };
            if let Some(reason) = elsewhere
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
