// SPDX-License-Identifier: Apache-2.0
//! What is learned of connections, and that they are over.

use std::{
    collections::{BTreeSet, HashMap},
    time::Instant,
};

use forwarder_api::{ConnId, Refusal, Request, SocketInode};

use super::{
    Action, Flow, GRACE, Home, Input, Learned, Ledger, MAX_FLOWS, Names, NotedEnd, OnHost, Path, PeerAddress,
    PeerSays, Restored, Stranded, Traffic, Tuple,
};

impl Ledger {
    /// Does this connection have this socket now, as far as is known?
    pub fn knows(&self, tuple: Tuple, socket: SocketInode) -> bool {
        self.flows.get(&tuple).is_some_and(|flow| flow.socket == socket)
    }

    pub fn knows_of(&self, tuple: Tuple) -> bool {
        self.flows.contains_key(&tuple)
    }

    pub(super) fn learn(&mut self, learned: Learned) {
        let tuple = learned.tuple;
        if let Some(known) = self.flows.get_mut(&tuple) {
            let moved_since = known.changed.max(known.tried) >= learned.seen;
            if known.attempt.is_some() || moved_since || known.socket == learned.socket {
                return;
            }
            if known.overlay_socket == learned.socket {
                // The forwarder died in a move: the application has its overlay socket again.
                known.path = Path::Overlay;
                known.socket = known.overlay_socket;
                known.changed = self.now;
                return;
            }
            self.forget(tuple);
        }
        if self.flows.len() >= MAX_FLOWS {
            self.tally.overflow += 1;
            return;
        }
        let conn = ConnId(self.number());
        self.conns.insert(conn, tuple);
        let Learned { tuple, translated, side, v6, netns, socket, workload, home, declined, seen } = learned;
        let end = NotedEnd { tuple, translated, side, v6, overlay_socket: socket, workload, home };
        let flow = Flow { netns, declined, changed: seen, tried: seen, ..Flow::new(conn, end, self.now) };
        self.insert(flow);
        if let Some(reason) = declined {
            self.refuse(tuple, reason);
        }
        match home {
            Home::Peer(peer) => self.introduce(tuple, peer),
            Home::SameHost | Home::Nowhere(Refusal::NoPeerHost) => {
                self.pair(tuple);
                self.set_alarm(tuple, self.now + GRACE);
            }
            Home::Nowhere(reason) => self.refuse(tuple, reason),
        }
        self.consider(tuple);
    }

    /// Where two are called the same, one of them is over, and it is not this one.
    fn insert(&mut self, flow: Flow) {
        match flow.translated {
            Some(name) => self.translated.insert(name, flow.tuple),
            None => self.translated.remove(&flow.tuple),
        };
        self.flows.insert(flow.tuple, Box::new(flow));
    }

    /// Ask the peer's router about a connection, and give it time to answer.
    fn introduce(&mut self, tuple: Tuple, peer: PeerAddress) {
        self.reach(peer);
        if self.is_up(peer) {
            self.tell_know(tuple, false);
        }
        self.set_alarm(tuple, self.now + GRACE);
    }

    /// One that is swapped, or about to be, stays with the router that this was agreed with.
    pub(super) fn relocated(&mut self, tuple: Tuple, peer: PeerAddress) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if flow.home == Home::Peer(peer) || flow.attempt.is_some() || flow.on_host().is_some() {
            return;
        }
        flow.home = Home::Peer(peer);
        flow.peer_says = PeerSays::Nothing;
        let of_another_home = [
            Refusal::NoPeerHost,
            Refusal::HostAddress,
            Refusal::PeerUnknown,
            Refusal::PeerUnreachable,
            Refusal::PeerGone,
        ];
        flow.reason = flow.reason.filter(|reason| !of_another_home.contains(reason));
        self.introduce(tuple, peer);
    }

    /// Are both ends here?
    pub(super) fn pair(&mut self, tuple: Tuple) {
        let mate = self.mate(tuple).and_then(|mate| self.flows.get(&mate));
        let Some(mate) = mate.filter(|mate| mate.on_host().is_none()) else { return };
        let one_network = self.flows.get(&tuple).is_some_and(|flow| flow.netns == mate.netns);
        for end in [tuple, mate.tuple] {
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

    pub(super) fn scanned(&mut self, began: Instant, sockets: &HashMap<SocketInode, (u64, u64)>) {
        let mut gone = Vec::new();
        for flow in self.flows.values_mut() {
            match sockets.get(&flow.socket) {
                Some((sent, received)) => {
                    let more = flow.carried(Traffic { sent: *sent, received: *received });
                    let of_path = if flow.on_host().is_some() {
                        &mut self.tally.on_host
                    } else {
                        &mut self.tally.on_overlay
                    };
                    *of_path += more;
                }
                None if flow.changed.max(flow.tried) < began && flow.since < began => gone.push(flow.tuple),
                None => {}
            }
        }
        for tuple in gone {
            if !self.is_in_a_move(tuple) {
                self.forget(tuple);
            }
        }
    }

    pub(super) fn parked(&mut self, parked: Vec<Restored>) {
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
                let on_host = OnHost {
                    swap: restored.note.swap,
                    moved: Some(restored.moved.clone()),
                    way_back: true,
                    stalled: None,
                };
                let flow = Flow {
                    path: Path::Host(on_host),
                    socket: *socket,
                    peer_says: PeerSays::Wants,
                    swaps: 1,
                    counted_on_overlay: None,
                    ..Flow::new(restored.conn, end.clone(), self.now)
                };
                self.forget(end.tuple);
                self.conns.insert(restored.conn, end.tuple);
                self.insert(flow);
                if let Home::Peer(peer) = end.home {
                    self.reach(peer);
                }
            }
            // A connection within this host goes by its deciding end.
            let decides = |end: &&NotedEnd| self.get(end.tuple).is_some_and(Flow::decides);
            if let Some(end) = restored.note.ends.iter().find(decides) {
                self.conns.insert(restored.conn, end.tuple);
            }
        }
    }

    pub(super) fn take_in(&mut self, stranded: Stranded) {
        let Stranded { tuple, swap, side, v6, socket, workload, home, declined } = stranded;
        // A move that is under way, or was when this was seen: it will be told how that ended.
        if self.flows.contains_key(&tuple) || self.flows.len() >= MAX_FLOWS {
            return;
        }
        let conn = ConnId(self.number());
        let end =
            NotedEnd { tuple, translated: None, side, v6, overlay_socket: SocketInode(0), workload, home };
        let on_host = OnHost { swap, moved: None, way_back: false, stalled: None };
        let flow = Flow { path: Path::Host(on_host), socket, declined, ..Flow::new(conn, end, self.now) };
        self.conns.insert(conn, tuple);
        self.insert(flow);
        if let Home::Peer(peer) = home {
            self.reach(peer);
        }
    }

    pub(super) fn host_socket_closed(&mut self, names: Names) {
        let tuple = Tuple { local: names.local, remote: names.remote };
        let of_swap = |flow: &Flow| flow.on_host().is_some_and(|on_host| on_host.swap == names.swap);
        for end in self.ends_here(tuple) {
            if self.get(end).is_some_and(of_swap) && !self.is_in_a_move(end) {
                self.forget(end);
            }
        }
    }

    /// Its sockets come and go, then, without the connection being over.
    pub(super) fn is_in_a_move(&self, tuple: Tuple) -> bool {
        let moves = |flow: &Flow| flow.attempt.is_some();
        let mate = self.mate(tuple).and_then(|mate| self.get(mate));
        let mate = mate.filter(|mate| mate.home == Home::SameHost);
        self.get(tuple).is_some_and(moves) || mate.is_some_and(moves)
    }

    /// The connection is over, as far as this host can know.
    pub(super) fn forget(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.remove(&tuple) else { return };
        if let Some(name) = flow.translated
            && self.translated.get(&name) == Some(&tuple)
        {
            self.translated.remove(&name);
        }
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

    pub(super) fn no_way_back(&mut self, conn: ConnId) {
        let Some(tuple) = self.conns.get(&conn).copied() else { return };
        for end in self.ends_here(tuple) {
            if let Some(flow) = self.flows.get_mut(&end).filter(|flow| flow.conn == conn)
                && let Path::Host(on_host) = &mut flow.path
            {
                on_host.way_back = false;
            }
        }
    }

    pub(super) fn forwarder_down(&mut self) {
        self.forwarder_is_up = false;
        let attempts = self.flows().filter(|flow| flow.attempt.is_some());
        for tuple in attempts.map(|flow| flow.tuple).collect::<Vec<_>>() {
            self.step(tuple, Input::ForwarderLost);
        }
    }
}
