// SPDX-License-Identifier: Apache-2.0
//! What is said to peers' routers, and heard from them.
//!
//! What a peer says about a connection counts only if it may speak for the address where our own discovery finds the
//! other end. Whatever it says, nothing is installed before the forwarder has found that the sequence numbers of both
//! ends agree.

use forwarder_api::{ConnId, Direction, Refusal, Request};

use super::{
    ACCUSATION, Action, Attempt, Attempted, Cause, Flow, GRACE, Home, Input, Ledger, Message, Node, ORDER,
    PURSUIT, Part, PeerAddress, PeerSays, Tuple,
};

impl Ledger {
    pub(super) fn reach(&mut self, peer: PeerAddress) {
        if let std::collections::btree_map::Entry::Vacant(entry) = self.peers.entry(peer) {
            entry.insert(false);
            self.act(Action::Reach(peer));
        }
    }

    pub(super) fn is_up(&self, peer: PeerAddress) -> bool {
        self.peers.get(&peer).copied().unwrap_or(false)
    }

    pub(super) fn of_peer(&self, peer: PeerAddress) -> Vec<Tuple> {
        let there = |flow: &&Flow| flow.home == Home::Peer(peer);
        self.flows().filter(there).map(|flow| flow.tuple).collect()
    }

    pub(super) fn peer_up(&mut self, peer: PeerAddress) {
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

    pub(super) fn peer_down(&mut self, peer: PeerAddress) {
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

    pub(super) fn tell_know(&mut self, tuple: Tuple, answer: bool) {
        let Some(flow) = self.flows.get(&tuple) else { return };
        if let Home::Peer(peer) = flow.home {
            let (tuple, declined) = (flow.name(), flow.declined);
            self.act(Action::Tell(peer, Message::Know { tuple, declined, answer }));
        }
    }

    pub(super) fn peer_said(&mut self, node: &Node, message: Message) {
        let about = self.about(&message);
        let home = about.and_then(|tuple| self.flows.get(&tuple)).map(|flow| flow.home);
        let peer = match home {
            Some(Home::Peer(peer)) if node.speaks_for(peer) => peer,
            Some(home @ (Home::Peer(_) | Home::SameHost)) => {
                self.accuse(node, about, home);
                self.known_as(node)
            }
            // Not ours, not known yet, or its other end is not.
            Some(Home::Nowhere(_)) | None => self.known_as(node),
        };
        match message {
            Message::Know { declined, answer, .. } => {
                if let Some(tuple) = about {
                    self.peer_knows(peer, tuple, declined, answer);
                }
            }
            Message::Ask { direction, cause, .. } => {
                if let Some(tuple) = about
                    && self.leads_with(peer, tuple)
                {
                    let time = match cause {
                        Cause::HostPath | Cause::Rules => PURSUIT,
                        Cause::Order | Cause::Stop => ORDER,
                    };
                    self.order(tuple, direction, cause, Some(time));
                }
            }
            Message::Offer { attempted, direction, cause, .. } => match about {
                Some(tuple) => self.offered(peer, attempted, tuple, direction, cause),
                None => {
                    let reason = Refusal::PeerUnknown;
                    self.act(Action::Tell(peer, Message::Refuse { attempted, reason }));
                }
            },
            Message::Refuse { attempted, reason } => {
                self.step_peer(peer, attempted, Input::PeerRefuses(reason));
            }
            Message::Accept { attempted, rendezvous, holder } => {
                let host = rendezvous.host.map(|(host, _)| host.ip().to_canonical());
                if host.is_some_and(|host| !node.may_offer(host)) {
                    self.step_peer(peer, attempted, Input::GiveUp(Refusal::HostAddressNotCertified));
                } else if let Some(attempt) = self.attempt_with(peer, attempted) {
                    attempt.rendezvous = Some(rendezvous);
                    attempt.other_holder = Some(holder);
                    self.step_peer(peer, attempted, Input::PeerAccepts);
                }
            }
            Message::Begin { attempted } => self.step_peer(peer, attempted, Input::PeerBegins),
            Message::Cancel { attempted, reason } => {
                self.not_offered(peer, attempted.conn, reason);
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

    /// The connection that a message is about, if it is known here.
    fn about(&self, message: &Message) -> Option<Tuple> {
        match message {
            Message::Know { tuple, .. } | Message::Ask { tuple, .. } | Message::Offer { tuple, .. } => {
                self.named(tuple.reversed())
            }
            Message::Refuse { attempted, .. }
            | Message::Accept { attempted, .. }
            | Message::Begin { attempted }
            | Message::Cancel { attempted, .. }
            | Message::Relay { attempted, .. } => self.conns.get(&attempted.conn).copied(),
        }
    }

    /// Where an answer reaches it: a node may have several addresses.
    fn known_as(&self, node: &Node) -> PeerAddress {
        let reached = self.peers.keys().find(|peer| node.speaks_for(**peer));
        reached.copied().unwrap_or(node.address)
    }

    fn accuse(&mut self, node: &Node, about: Option<Tuple>, home: Home) {
        self.tally.false_claims += 1;
        let Some(tuple) = about else { return };
        let now = self.now;
        self.accused.retain(|_, at| now.saturating_duration_since(*at) < ACCUSATION);
        if self.accused.insert(node.address, now).is_none() {
            self.act(Action::ReportFalseClaim { node: node.address, tuple, home });
        }
    }

    /// The attempt that a message of this peer is about, if that is the one under way.
    pub(super) fn attempt_with(&mut self, peer: PeerAddress, attempted: Attempted) -> Option<&mut Attempt> {
        let tuple = *self.conns.get(&attempted.conn)?;
        let flow = self.flows.get_mut(&tuple).filter(|flow| flow.home == Home::Peer(peer))?;
        flow.attempt.as_deref_mut().filter(|attempt| attempt.number == attempted.number)
    }

    fn leads_with(&self, peer: PeerAddress, tuple: Tuple) -> bool {
        self.get(tuple).is_some_and(|flow| flow.home == Home::Peer(peer) && flow.decides())
    }

    pub(super) fn peer_knows(
        &mut self,
        peer: PeerAddress,
        tuple: Tuple,
        declined: Option<Refusal>,
        answer: bool,
    ) {
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
                    Refusal::HostAddress,
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
                let reason = if reason == Refusal::NoRuleMatches { Refusal::PeerSaysNo } else { reason };
                flow.peer_says = PeerSays::Declines(reason);
                if flow.declined.is_none() && flow.attempt.is_none() {
                    self.refuse(tuple, reason);
                }
            }
        }
        if !answer {
            self.tell_know(tuple, true);
        }
        self.consider(tuple);
    }

    pub(super) fn offered(
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

    pub(super) fn may_follow(
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
        if flow.decides() || flow.has_arrived(direction) {
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

    pub(super) fn relay(&mut self, conn: ConnId, message: Vec<u8>) {
        let Some(flow) = self.conns.get(&conn).and_then(|tuple| self.flows.get(tuple)) else { return };
        if let (Home::Peer(peer), Some(attempt)) = (flow.home, &flow.attempt) {
            let attempted = Attempted { conn, number: attempt.number };
            self.act(Action::Tell(peer, Message::Relay { attempted, message }));
        }
    }
}
