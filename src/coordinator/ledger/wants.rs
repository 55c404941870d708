// SPDX-License-Identifier: Apache-2.0
//! What is wanted of each connection: by rules, by people, by a stop.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use forwarder_api::{Direction, Refusal};

use super::{
    ASK_AGAIN, Action, Attempt, Cause, Flow, GRACE, Home, Input, Ledger, MAX_ATTEMPTS, Message, Order, Part,
    PeerSays, STOP, Stopping, Tuple,
};
use crate::workload::Workload;

impl Ledger {
    pub(super) fn verdict(&mut self, tuple: Tuple, declined: Option<Refusal>) {
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
            Some(_) if on_host => self.order(tuple, Direction::ToOverlay, Cause::Rules, None),
            Some(reason) => self.refuse(tuple, reason),
            None => self.no_longer_ordered_by_rules(tuple),
        }
        self.tell_know(tuple, true);
        self.consider(tuple);
        // What our rules do not keep on the overlay any more may be kept there by something else.
        if declined.is_none() && self.get(tuple).is_some_and(|flow| flow.alarm.is_none()) {
            self.set_alarm(tuple, self.now + GRACE);
        }
    }

    fn no_longer_ordered_by_rules(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if flow.order.take_if(|order| order.cause == Cause::Rules).is_some() && !flow.is_stalled() {
            flow.reason = None;
        }
    }

    pub(super) fn workload(&mut self, tuple: Tuple, workload: Arc<Workload>, declined: Option<Refusal>) {
        if let Some(flow) = self.flows.get_mut(&tuple) {
            flow.workload = workload;
        }
        self.verdict(tuple, declined);
    }

    pub(super) fn order(&mut self, tuple: Tuple, direction: Direction, cause: Cause, time: Option<Duration>) {
        let Some(flow) = self.flows.get_mut(&tuple) else {
            return self.act(Action::Answer(tuple, Err(Refusal::NotEstablished)));
        };
        // Whoever ordered first waits as well: another order of the same kind gives it no more time.
        let pending = flow.order.filter(|order| order.cause == cause).map(|order| order.until);
        let until = pending.unwrap_or_else(|| time.map(|time| self.now + time));
        if cause == Cause::Order {
            flow.held = direction == Direction::ToOverlay;
        }
        if direction == Direction::ToHost && self.stopping.is_some() {
            return self.act(Action::Answer(tuple, Err(Refusal::Stopping)));
        }
        let given = flow.order.replace(Order { direction, cause, until });
        if given.is_some_and(|order| order.direction == direction && order.cause == cause) {
            // It is pursued already.
            return;
        }
        flow.failures = 0;
        match &flow.attempt {
            None => {
                self.clear_alarm(tuple);
                self.consider(tuple);
            }
            // It ends by itself; whoever waits is answered in time all the same.
            Some(attempt) if attempt.negotiation.is_moving() => self.give_up_at(tuple, until),
            Some(_) => {}
        }
    }

    pub(super) fn stop(&mut self, leave: bool) {
        self.stopping = Some(Stopping { leave, until: self.now + STOP });
        for tuple in self.flows.keys().copied().collect::<Vec<_>>() {
            let Some(flow) = self.flows.get(&tuple) else { continue };
            let to_host = |attempt: &Attempt| leave || attempt.negotiation.direction == Direction::ToHost;
            if flow.attempt.as_deref().is_some_and(to_host) {
                self.step(tuple, Input::GiveUp(Refusal::Stopping));
            }
            if leave {
                self.no_longer_ordered_by_rules(tuple);
            }
            self.order_back(tuple);
        }
    }

    /// While stopping, all go back.
    pub(super) fn order_back(&mut self, tuple: Tuple) {
        let Some(stopping) = self.stopping.filter(|stopping| !stopping.leave) else { return };
        let mate_leads = |flow: &Flow| flow.home == Home::SameHost && !flow.decides();
        if self.flows.get(&tuple).is_some_and(|flow| flow.on_host().is_some() && !mate_leads(flow)) {
            let time = stopping.until.saturating_duration_since(self.now);
            self.order(tuple, Direction::ToOverlay, Cause::Stop, Some(time));
        }
    }

    pub(super) fn consider_all(&mut self) {
        for tuple in self.flows.keys().copied().collect::<Vec<_>>() {
            if let Some(flow) = self.flows.get_mut(&tuple)
                && flow.reason == Some(Refusal::ForwarderGone)
            {
                flow.reason = None;
            }
            self.consider(tuple);
        }
    }

    /// Start what is wanted and possible. Whoever ordered it hears in the end if nothing is.
    pub(super) fn consider(&mut self, tuple: Tuple) {
        self.try_to_start(tuple);
        let Some(flow) = self.flows.get(&tuple) else { return };
        if let (Some(order), None, None) = (flow.order, &flow.attempt, flow.alarm) {
            self.give_up_at(tuple, order.until);
        }
    }

    pub(super) fn give_up_at(&mut self, tuple: Tuple, until: Option<Instant>) {
        if let Some(until) = until {
            self.set_alarm(tuple, until);
        }
    }

    fn try_to_start(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get(&tuple) else { return };
        if flow.attempt.is_some() || !self.forwarder_is_up {
            return;
        }
        let (home, order) = (flow.home, flow.order);
        if order.is_some_and(|order| flow.has_arrived(order.direction)) {
            self.order_done(tuple);
            return self.consider(tuple);
        }
        let (name, decides) = (flow.name(), flow.decides());
        if home == Home::SameHost && !decides {
            // The deciding end leads; an order goes there.
            let Some(mate) = self.mate(tuple) else { return };
            if order.is_some()
                && let Some(mate) = self.flows.get_mut(&mate)
                && mate.order.is_none()
            {
                mate.order = order;
                mate.failures = 0;
            }
            return self.consider(mate);
        }
        let (direction, cause) = match order {
            // Whoever wants it back: where the host path has failed, there is one way only.
            Some(order) if order.direction == Direction::ToOverlay && flow.is_stalled() => {
                (order.direction, Cause::HostPath)
            }
            Some(order) => (order.direction, order.cause),
            None if self.wants_swap(flow) => match flow.avoids_host_until {
                Some(until) if until > self.now => return self.stay_off_host_path(tuple, until),
                Some(_) | None => (Direction::ToHost, Cause::Rules),
            },
            None => return,
        };
        // After a refusal; or the decider was asked a moment ago, and whatever it says about the connection is no reason
        // to ask again: two routers would do nothing else.
        let may_wait = flow.failures > 0 || flow.part() == Some(Part::Follower);
        if may_wait && flow.alarm.is_some_and(|at| at > self.now) {
            return;
        }
        match (home, flow.part()) {
            (Home::Peer(peer), _) if !self.is_up(peer) => match order.map(|order| order.cause) {
                // It begins when the peer is back.
                Some(Cause::Rules) => self.refuse(tuple, Refusal::PeerUnreachable),
                Some(Cause::Order | Cause::Stop | Cause::HostPath) | None => {
                    self.order_failed(tuple, Refusal::PeerUnreachable);
                }
            },
            (Home::Peer(peer), Some(Part::Follower)) => {
                self.act(Action::Tell(peer, Message::Ask { tuple: name, direction, cause }));
                self.set_alarm(tuple, self.now + ASK_AGAIN);
            }
            (_, Some(_)) if self.attempts >= MAX_ATTEMPTS => self.wait_in_line(tuple),
            (_, Some(part)) => {
                let number = self.number();
                self.start(tuple, part, direction, cause, number);
            }
            (Home::Nowhere(reason), None) => self.order_failed(tuple, reason),
            (Home::Peer(_) | Home::SameHost, None) => {}
        }
    }

    fn wait_in_line(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if !std::mem::replace(&mut flow.in_line, true) {
            self.line.push_back(tuple);
        }
    }

    /// Do rules, peer and history say that it is to be swapped now?
    pub(super) fn wants_swap(&self, flow: &Flow) -> bool {
        let agreed = match flow.home {
            Home::Peer(_) => flow.decides() && flow.peer_says == PeerSays::Wants,
            Home::SameHost => self.mate(flow.tuple).and_then(|mate| self.get(mate)).is_some_and(|mate| {
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
}
