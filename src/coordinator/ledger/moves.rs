// SPDX-License-Identifier: Apache-2.0
//! Moves under way, from the first question to the forwarder to what came of them.

use forwarder_api::{
    ConnId, Direction, Holder, Manner, Moved, OtherEnd, Outcome, PrepareTarget, Refusal, Request, Role,
};

use super::{
    Action, Attempt, Attempted, Cause, FIRST_RETRY, Flow, Home, Input, LAST_RETRY, Ledger, MAX_ATTEMPTS,
    Message, Names, Negotiation, Next, Note, ORDER_RETRY, OnHost, Output, Part, Path, PeerAddress, PeerSays,
    STEP, State, Traffic, Tuple,
};

impl Ledger {
    pub(super) fn start(
        &mut self,
        tuple: Tuple,
        part: Part,
        direction: Direction,
        cause: Cause,
        number: u64,
    ) {
        let (negotiation, outputs) = Negotiation::start(part, direction);
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let attempt =
            Attempt { negotiation, cause, number, rendezvous: None, holder: None, other_holder: None };
        flow.attempt = Some(Box::new(attempt));
        flow.in_line = false;
        self.attempts += usize::from(part != Part::Follower);
        self.set_alarm(tuple, self.now + STEP);
        for output in outputs {
            self.carry_out(tuple, output);
        }
    }

    pub(super) fn step_conn(&mut self, conn: ConnId, input: Input) {
        if let Some(tuple) = self.conns.get(&conn).copied() {
            self.step(tuple, input);
        }
    }

    pub(super) fn step_peer(&mut self, peer: PeerAddress, attempted: Attempted, input: Input) {
        if self.attempt_with(peer, attempted).is_some() {
            self.step_conn(attempted.conn, input);
        }
    }

    pub(super) fn step(&mut self, tuple: Tuple, input: Input) {
        let Some(attempt) = self.flows.get_mut(&tuple).and_then(|flow| flow.attempt.as_mut()) else { return };
        let (next, outputs) = attempt.negotiation.step(input);
        if let Next::Goes(negotiation) = &next {
            let progress = attempt.negotiation != *negotiation;
            attempt.negotiation = *negotiation;
            if negotiation.is_moving() {
                // The forwarder ends it; but whoever has ordered something does not wait for longer than it was to take.
                self.clear_alarm(tuple);
                if let Some(order) = self.flows.get(&tuple).and_then(|flow| flow.order) {
                    self.give_up_at(tuple, order.until);
                }
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

    pub(super) fn carry_out(&mut self, tuple: Tuple, output: Output) {
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
            Output::Offer => tell(Message::Offer { attempted, tuple: flow.name(), direction, cause }),
            Output::Accept => {
                let host = (direction == Direction::ToHost).then_some(flow.family());
                let holder = attempt.holder.unwrap_or_default();
                peer.map(|peer| Action::Accept { attempted, host, peer, holder })
            }
            Output::Begin => tell(Message::Begin { attempted }),
            Output::Refuse(reason) => tell(Message::Refuse { attempted, reason }),
            Output::CancelPeer(reason) => tell(Message::Cancel { attempted, reason }),
            Output::Connect => match (peer, attempt.rendezvous) {
                (None, _) => {
                    let mate = self.mate(tuple).and_then(|mate| self.get(mate));
                    let v6 = [flow.v6, mate.is_some_and(|mate| mate.v6)];
                    Some(Action::ConnectLocal { conn, v6 })
                }
                (Some(peer), Some(rendezvous)) => {
                    Some(Action::Connect { conn, family: flow.family(), peer, rendezvous })
                }
                // It is made when the peer has accepted, and has said where.
                (Some(_), None) => None,
            },
            Output::Move(role) => {
                // Both routers know the cause, from the offer.
                let manner = if cause == Cause::HostPath { Manner::Salvage } else { Manner::Settle };
                // What was refused is tried alone: it shall not hold others back.
                let other = |host| OtherEnd { host, holder: attempt.other_holder.unwrap_or_default() };
                let with = peer.filter(|_| role == Role::Follower || flow.failures == 0).map(other);
                Some(Action::Move { conn, role, manner, names: names(tuple), with })
            }
            Output::MoveLocal => {
                let names = [names(tuple), names(flow.name().reversed())];
                Some(Action::MoveLocal { conn, names, alone: flow.failures > 0 })
            }
            Output::CancelForwarder(reason) => {
                self.act(Action::DropPath(conn));
                Some(Action::Forwarder(Request::Cancel { conn, reason }))
            }
        };
        self.actions.extend(action);
    }

    pub(super) fn prepare_target(&self, flow: &Flow, attempt: &Attempt) -> PrepareTarget {
        if attempt.negotiation.direction == Direction::ToOverlay {
            return PrepareTarget::Parked;
        }
        let mate = self.mate(flow.tuple).and_then(|mate| self.get(mate));
        let mate = mate.filter(|_| attempt.negotiation.part == Part::Both);
        let ends = [Some(flow), mate].into_iter().flatten().map(Flow::noted).collect();
        let note = postcard::to_stdvec(&Note { swap: attempt.number, ends }).unwrap_or_default();
        match mate {
            None => PrepareTarget::Remote { socket: flow.socket, note },
            Some(mate) => PrepareTarget::Local { first: flow.socket, second: mate.socket, note },
        }
    }

    pub(super) fn ended(&mut self, tuple: Tuple, result: Result<Moved, Refusal>) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let Some(attempt) = flow.attempt.take() else { return };
        flow.tried = self.now;
        let Negotiation { part, direction, .. } = attempt.negotiation;
        self.attempts -= usize::from(part != Part::Follower);
        let conn = flow.conn;
        let mate = self.mate(tuple).filter(|_| part == Part::Both);
        self.clear_alarm(tuple);
        self.act(Action::Report { conn, tuple, direction, result: result.clone() });
        match result {
            Ok(moved) => {
                match direction {
                    Direction::ToHost => self.tally.swaps += 1,
                    Direction::ToOverlay => self.tally.swap_backs += 1,
                }
                for (index, end) in [tuple].into_iter().chain(mate).enumerate() {
                    self.arrived(end, conn, index, &attempt, &moved);
                }
            }
            Err(reason) => self.not_moved(tuple, mate, &attempt, reason),
        }
        self.next_in_line();
    }

    pub(super) fn prepared(&mut self, conn: ConnId, holder: Holder) {
        let tuple = self.conns.get(&conn).copied();
        let flow = tuple.and_then(|tuple| self.flows.get_mut(&tuple));
        if let Some(attempt) = flow.and_then(|flow| flow.attempt.as_mut()) {
            attempt.holder = Some(holder);
        }
        self.step_conn(conn, Input::Prepared);
    }

    /// As many as there is room for.
    fn next_in_line(&mut self) {
        while self.attempts < MAX_ATTEMPTS
            && let Some(tuple) = self.line.pop_front()
        {
            // Started by something else meanwhile: this place is void.
            if self.flows.get_mut(&tuple).is_some_and(|flow| std::mem::take(&mut flow.in_line)) {
                self.clear_alarm(tuple);
                self.consider(tuple);
            }
        }
    }

    pub(super) fn arrived(
        &mut self,
        tuple: Tuple,
        conn: ConnId,
        index: usize,
        attempt: &Attempt,
        moved: &Moved,
    ) {
        let stopping = self.stopping.is_some();
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let direction = attempt.negotiation.direction;
        flow.conn = conn;
        let carried_for = self.now.saturating_duration_since(flow.changed);
        flow.changed = self.now;
        flow.failures = 0;
        match direction {
            Direction::ToHost => {
                flow.path = Path::Host(OnHost {
                    swap: attempt.number,
                    moved: Some(moved.clone()),
                    way_back: true,
                    stalled: None,
                });
                flow.socket = moved.sockets.get(index).copied().unwrap_or(flow.socket);
                flow.counted_on_overlay = flow.counted.replace(Traffic::default());
                flow.reason = None;
                flow.held = false;
                flow.swaps += 1;
            }
            Direction::ToOverlay => {
                flow.path = Path::Overlay;
                flow.socket = flow.overlay_socket;
                flow.counted = flow.counted_on_overlay.take();
                // Who was to stay there when the host path failed still is.
                flow.held = attempt.cause == Cause::Order || flow.held && attempt.cause == Cause::HostPath;
                flow.reason = Some(match attempt.cause {
                    Cause::Order => Refusal::SwappedBack,
                    Cause::Stop if stopping => Refusal::Stopping,
                    Cause::Stop => Refusal::PeerGone,
                    Cause::Rules => flow.declined.unwrap_or(Refusal::PeerSaysNo),
                    Cause::HostPath => Refusal::HostPathStalled,
                });
                match attempt.cause {
                    Cause::Stop => flow.peer_says = PeerSays::Nothing,
                    Cause::HostPath => flow.avoid_host_path(carried_for, self.now),
                    Cause::Rules | Cause::Order => {}
                }
            }
        }
        self.order_back(tuple);
        self.consider(tuple);
    }

    /// `mate`: the other end, if it is here.
    fn not_moved(&mut self, tuple: Tuple, mate: Option<Tuple>, attempt: &Attempt, reason: Refusal) {
        let to_host = attempt.negotiation.direction == Direction::ToHost;
        let reason = match self.get(tuple).map(|flow| flow.peer_says) {
            // It has said why already.
            Some(PeerSays::Declines(why)) if to_host && reason == Refusal::PeerAborted => why,
            _ => reason,
        };
        // It is reported with the attempt.
        self.note_refusal(tuple, reason);
        if reason == Refusal::NotEstablished {
            return [tuple].into_iter().chain(mate).for_each(|end| self.forget(end));
        }
        if reason == Refusal::NotParked
            && let Some(conn) = self.flows.get(&tuple).map(|flow| flow.conn)
        {
            self.no_way_back(conn);
        }
        if let Some(mate) = mate.and_then(|mate| self.flows.get_mut(&mate)) {
            mate.reason = Some(reason);
        }
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        flow.failures += 1;
        let doubled = FIRST_RETRY.saturating_mul(1 << flow.failures.min(12)).min(LAST_RETRY);
        let ordered = flow.order;
        let waited_for = ordered.is_some_and(|order| matches!(order.cause, Cause::Order | Cause::Stop));
        let retry = if waited_for { doubled.min(ORDER_RETRY) } else { doubled };
        // Two hosts that refuse each other must not come back at the same times for ever.
        let at = self.now + retry.mul_f64(1.0 + (self.number() % 256) as f64 / 512.0);
        if ordered.is_some_and(|order| !reason.is_passing() || order.until.is_some_and(|until| at >= until)) {
            self.order_failed(tuple, reason);
        }
        if reason.is_passing() {
            self.set_alarm(tuple, at);
        }
        let Some(flow) = self.flows.get(&tuple) else { return };
        let (conn, name) = (flow.conn, flow.name());
        let Home::Peer(peer) = flow.home else { return };
        let is_before_the_offer =
            attempt.negotiation.part == Part::Decider && attempt.negotiation.state == State::Preparing;
        if !reason.is_passing() {
            // Of what its forwarder found amid the move the other router hears only that it was given up.
            self.act(Action::Tell(peer, Message::Know { tuple: name, declined: Some(reason), answer: true }));
        } else if ordered.is_some() && is_before_the_offer {
            let attempted = Attempted { conn, number: attempt.number };
            self.act(Action::Tell(peer, Message::Cancel { attempted, reason }));
        }
    }

    /// The decider could not even offer what was ordered here. Of a connection that was swapped before, both routers have the
    /// same number.
    pub(super) fn not_offered(&mut self, peer: PeerAddress, conn: ConnId, reason: Refusal) {
        let flow = self.conns.get(&conn).and_then(|tuple| self.flows.get_mut(tuple));
        if let Some(flow) = flow.filter(|flow| flow.home == Home::Peer(peer))
            && flow.order.is_some()
            && flow.attempt.is_none()
        {
            flow.reason = Some(reason);
        }
    }

    pub(super) fn order_done(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let pause_us =
            flow.on_host().and_then(|on_host| on_host.moved.as_ref()).map_or(0, |moved| moved.pause_us);
        if flow.order.take().is_some() {
            self.act(Action::Answer(tuple, Ok(pause_us)));
        }
    }

    pub(super) fn order_failed(&mut self, tuple: Tuple, reason: Refusal) {
        for end in self.ends_here(tuple) {
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
    pub(super) fn refuse(&mut self, tuple: Tuple, reason: Refusal) {
        if let Some(conn) = self.note_refusal(tuple, reason) {
            self.act(Action::ReportRefusal { conn, tuple, reason });
        }
    }

    /// The connection, if this is new of it.
    fn note_refusal(&mut self, tuple: Tuple, reason: Refusal) -> Option<ConnId> {
        let flow = self.flows.get_mut(&tuple)?;
        let is_new = flow.reason.replace(reason) != Some(reason);
        if is_new || flow.failures > 0 {
            *self.tally.refused.entry(reason).or_default() += 1;
        }
        is_new.then_some(flow.conn)
    }

    pub(super) fn count_pause(&mut self, conn: ConnId, outcome: &Outcome) {
        let flow = self.conns.get(&conn).and_then(|tuple| self.flows.get(tuple));
        let Some(attempt) = flow.and_then(|flow| flow.attempt.as_ref()) else { return };
        let (us, moved) = match outcome {
            Outcome::Moved(moved) => (moved.pause_us, true),
            // Given up before anything was stopped.
            Outcome::Aborted { pause_us: 0, .. } => return,
            Outcome::Aborted { pause_us, .. } => (*pause_us, false),
        };
        self.tally.pauses.of(attempt.negotiation.direction, moved).add(us);
    }
}
