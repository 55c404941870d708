// SPDX-License-Identifier: Apache-2.0
//! How two routers agree on a transaction, before their forwarders carry it out. Pure: no I/O, no clock.
//!
//! ```text
//!   decider                                follower
//!   Preparing                                                    its forwarder looks, stops nothing
//!      | Prepared            Offer  ----->  Checking             so does this one
//!   Offered                                    | Prepared
//!      |                   <-----  Accept   Promised             a token waits for the host connection
//!   Connecting   witness, host connection, tokens -> |
//!   Connected              <-----  Begin    Moving               both go to the forwarder
//!   Moving                                                       likewise; the forwarders are on their own
//! ```
//!
//! On the way back there is only the witness to make. A connection within one host has one router for both ends:
//! Preparing, Connecting, Moving, and no witness.
//!
//! Until Moving, everything can be given up by anybody, and nothing has been stopped. From then on only the forwarder
//! knows; a lost peer is told to it, and it goes back or on as its own protocol says.

use forwarder_api::{Direction, Moved, Outcome, Refusal, Role};

/// What a router is in one negotiation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    Decider,
    Follower,
    /// Both ends are on this host.
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    Preparing,
    Offered,
    /// The connections to the follower's host are being made.
    Connecting,
    /// As Connecting; the follower has them already, and says so on another way.
    ConnectingBegun,
    Connected,
    Checking,
    Promised,
    Moving,
}

/// A negotiation under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Negotiation {
    pub part: Part,
    pub direction: Direction,
    pub state: State,
}

/// What happens to it.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Our forwarder's answers.
    Prepared,
    Refused(Refusal),
    Ended(Outcome),
    ForwarderLost,
    /// The connections between the two hosts.
    PathReady,
    PathFailed,
    /// The peer's router.
    PeerAccepts,
    PeerRefuses(Refusal),
    PeerBegins,
    PeerCancels(Refusal),
    PeerLost,
    /// Nothing has come for too long.
    Overdue,
    /// We do not want it any more.
    GiveUp(Refusal),
}

/// What is to be done about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Output {
    /// Ask our forwarder to look.
    Prepare,
    /// Tell the peer's router.
    Offer,
    Accept,
    Begin,
    Refuse(Refusal),
    CancelPeer(Refusal),
    /// Make the connections to the other host, or within this one.
    Connect,
    /// Our forwarder shall move, with these connections.
    Move(Role),
    MoveLocal,
    /// Our forwarder shall give up, if it still may.
    CancelForwarder(Refusal),
}

/// How it goes on.
#[derive(Clone, Debug, PartialEq)]
pub enum Next {
    Goes(Negotiation),
    Ended(Result<Moved, Refusal>),
}

impl Negotiation {
    pub fn start(part: Part, direction: Direction) -> (Negotiation, Vec<Output>) {
        let state = match part {
            Part::Decider | Part::Both => State::Preparing,
            Part::Follower => State::Checking,
        };
        (Negotiation { part, direction, state }, vec![Output::Prepare])
    }

    /// Is this the forwarders' time?
    pub fn is_moving(&self) -> bool {
        self.state == State::Moving
    }

    pub fn step(self, input: Input) -> (Next, Vec<Output>) {
        match self.state {
            State::Moving => self.moving(input),
            State::Preparing
            | State::Offered
            | State::Connecting
            | State::ConnectingBegun
            | State::Connected
            | State::Checking
            | State::Promised => self.before_moving(input),
        }
    }

    fn before_moving(self, input: Input) -> (Next, Vec<Output>) {
        match input {
            Input::Prepared => self.prepared(),
            // Cancelled as well: an answer to an earlier, abandoned question may have come in the place of ours.
            Input::Refused(reason) => self.end(reason, true),
            Input::PeerAccepts => self.accepted(),
            Input::PeerRefuses(reason) | Input::PeerCancels(reason) => self.end(reason, false),
            Input::PeerBegins => self.begun(),
            Input::PathReady => self.path_ready(),
            Input::PathFailed => self.end(Refusal::HostPathFailed, true),
            Input::PeerLost => self.end(Refusal::PeerGone, false),
            Input::ForwarderLost => self.end(Refusal::ForwarderGone, true),
            Input::Overdue => self.end(self.overdue(), true),
            Input::GiveUp(reason) => self.end(reason, true),
            // Nothing was started yet: the forwarder cannot have ended it, and need not be told.
            Input::Ended(Outcome::Aborted { reason, .. }) => self.end(reason, true),
            Input::Ended(Outcome::Moved(_)) => self.goes(self.state, vec![]),
        }
    }

    fn moving(self, input: Input) -> (Next, Vec<Output>) {
        match input {
            Input::Ended(Outcome::Moved(moved)) => (Next::Ended(Ok(moved)), vec![]),
            Input::Ended(Outcome::Aborted { reason, .. }) => (Next::Ended(Err(reason)), vec![]),
            Input::ForwarderLost => (Next::Ended(Err(Refusal::ForwarderGone)), vec![]),
            Input::PeerLost => self.goes(State::Moving, vec![Output::CancelForwarder(Refusal::PeerGone)]),
            Input::PeerCancels(reason) | Input::PeerRefuses(reason) => {
                self.goes(State::Moving, vec![Output::CancelForwarder(reason)])
            }
            Input::GiveUp(_)
            | Input::Overdue
            | Input::Prepared
            | Input::Refused(_)
            | Input::PathReady
            | Input::PathFailed
            | Input::PeerAccepts
            | Input::PeerBegins => self.goes(State::Moving, vec![]),
        }
    }

    fn prepared(self) -> (Next, Vec<Output>) {
        let to_host = self.direction == Direction::ToHost;
        match (self.state, self.part) {
            (State::Preparing, Part::Both) if to_host => self.goes(State::Connecting, vec![Output::Connect]),
            (State::Preparing, Part::Both) => self.goes(State::Moving, vec![Output::MoveLocal]),
            (State::Preparing, Part::Decider | Part::Follower) => {
                self.goes(State::Offered, vec![Output::Offer])
            }
            (State::Checking, _) => self.goes(State::Promised, vec![Output::Accept]),
            (state, _) => self.goes(state, vec![]),
        }
    }

    fn accepted(self) -> (Next, Vec<Output>) {
        match self.state {
            State::Offered => self.goes(State::Connecting, vec![Output::Connect]),
            state => self.goes(state, vec![]),
        }
    }

    fn path_ready(self) -> (Next, Vec<Output>) {
        match (self.state, self.part) {
            (State::Connecting, Part::Both) => self.goes(State::Moving, vec![Output::MoveLocal]),
            (State::Connecting, Part::Decider | Part::Follower) => self.goes(State::Connected, vec![]),
            (State::ConnectingBegun, _) => self.goes(State::Moving, vec![Output::Move(Role::Decider)]),
            (State::Promised, _) => {
                self.goes(State::Moving, vec![Output::Move(Role::Follower), Output::Begin])
            }
            (state, _) => self.goes(state, vec![]),
        }
    }

    fn begun(self) -> (Next, Vec<Output>) {
        match self.state {
            State::Connecting => self.goes(State::ConnectingBegun, vec![]),
            State::Connected => self.goes(State::Moving, vec![Output::Move(Role::Decider)]),
            State::Preparing
            | State::Offered
            | State::ConnectingBegun
            | State::Checking
            | State::Promised
            | State::Moving => self.goes(self.state, vec![]),
        }
    }

    /// What it is that did not come.
    fn overdue(self) -> Refusal {
        match self.state {
            State::Preparing | State::Checking => Refusal::ForwarderGone,
            State::Offered | State::Moving => Refusal::PeerUnreachable,
            State::Connecting | State::ConnectingBegun | State::Connected | State::Promised => {
                Refusal::HostPathFailed
            }
        }
    }

    fn goes(self, state: State, outputs: Vec<Output>) -> (Next, Vec<Output>) {
        (Next::Goes(Negotiation { state, ..self }), outputs)
    }

    fn end(self, reason: Refusal, tell_peer: bool) -> (Next, Vec<Output>) {
        let mut outputs = vec![Output::CancelForwarder(reason)];
        if tell_peer {
            match self.state {
                State::Checking => outputs.push(Output::Refuse(reason)),
                State::Offered
                | State::Connecting
                | State::ConnectingBegun
                | State::Connected
                | State::Promised
                    if self.part != Part::Both =>
                {
                    outputs.push(Output::CancelPeer(reason));
                }
                State::Preparing
                | State::Offered
                | State::Connecting
                | State::ConnectingBegun
                | State::Connected
                | State::Promised
                | State::Moving => {}
            }
        }
        (Next::Ended(Err(reason)), outputs)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn inputs() -> Vec<Input> {
        let reason = Refusal::NotSettled;
        vec![
            Input::Prepared,
            Input::Refused(reason),
            Input::Ended(Outcome::Moved(Moved::default())),
            Input::Ended(Outcome::Aborted { reason, pause_us: 0 }),
            Input::ForwarderLost,
            Input::PathReady,
            Input::PathFailed,
            Input::PeerAccepts,
            Input::PeerRefuses(reason),
            Input::PeerBegins,
            Input::PeerCancels(reason),
            Input::PeerLost,
            Input::Overdue,
            Input::GiveUp(reason),
        ]
    }

    /// Every state that any order of inputs leads to, and every step out of it.
    fn every_step(mut check: impl FnMut(Negotiation, &Input, &Next, &[Output])) {
        for part in [Part::Decider, Part::Follower, Part::Both] {
            for direction in [Direction::ToHost, Direction::ToOverlay] {
                let mut seen = HashSet::new();
                let mut left = vec![Negotiation::start(part, direction).0];
                while let Some(from) = left.pop() {
                    if !seen.insert(from) {
                        continue;
                    }
                    for input in inputs() {
                        let (next, outputs) = from.step(input.clone());
                        check(from, &input, &next, &outputs);
                        if let Next::Goes(to) = next {
                            left.push(to);
                        }
                    }
                }
                assert!(seen.iter().any(Negotiation::is_moving), "{part:?} {direction:?} never moves");
            }
        }
    }

    #[test]
    fn a_forwarder_that_was_asked_to_prepare_is_asked_to_move_or_told_to_give_up() {
        every_step(|from, input, next, outputs| {
            let told = outputs.iter().any(|output| matches!(output, Output::CancelForwarder(_)));
            if matches!(next, Next::Ended(_)) && !from.is_moving() {
                assert!(told, "{from:?} {input:?} {outputs:?}");
            }
        });
    }

    #[test]
    fn a_move_is_ordered_once_and_only_on_the_way_to_moving() {
        every_step(|from, input, next, outputs| {
            let moves =
                outputs.iter().filter(|output| matches!(output, Output::Move(_) | Output::MoveLocal)).count();
            let enters = !from.is_moving() && matches!(next, Next::Goes(to) if to.is_moving());
            assert_eq!(moves, usize::from(enters), "{from:?} {input:?} {outputs:?}");
        });
    }

    #[test]
    fn only_the_forwarder_ends_a_move() {
        every_step(|from, input, next, _| {
            if from.is_moving() && matches!(next, Next::Ended(_)) {
                assert!(matches!(input, Input::Ended(_) | Input::ForwarderLost), "{input:?}");
            }
        });
    }

    #[test]
    fn a_negotiation_that_is_overdue_before_it_moves_ends() {
        every_step(|from, input, next, _| {
            if *input == Input::Overdue && !from.is_moving() {
                assert!(matches!(next, Next::Ended(Err(_))), "{from:?}");
            }
        });
    }

    #[test]
    fn a_connection_within_a_host_speaks_to_no_peer() {
        every_step(|from, _, _, outputs| {
            let to_peer = |output: &Output| {
                matches!(
                    output,
                    Output::Offer
                        | Output::Accept
                        | Output::Begin
                        | Output::Refuse(_)
                        | Output::CancelPeer(_)
                )
            };
            assert!(from.part != Part::Both || !outputs.iter().any(to_peer), "{from:?} {outputs:?}");
        });
    }

    /// Both ends of a swap, until each has its forwarder moving.
    #[test]
    fn decider_and_follower_meet_whichever_of_path_and_begin_is_seen_first() {
        for early in [false, true] {
            let (decider, _) = Negotiation::start(Part::Decider, Direction::ToHost);
            let (follower, _) = Negotiation::start(Part::Follower, Direction::ToHost);
            let go = |machine: Negotiation, input| match machine.step(input) {
                (Next::Goes(machine), outputs) => (machine, outputs),
                (Next::Ended(_), _) => panic!(),
            };
            let (decider, offer) = go(decider, Input::Prepared);
            assert_eq!(offer, [Output::Offer]);
            let (follower, accept) = go(follower, Input::Prepared);
            assert_eq!(accept, [Output::Accept]);
            let (decider, connect) = go(decider, Input::PeerAccepts);
            assert_eq!(connect, [Output::Connect]);
            let (follower, begin) = go(follower, Input::PathReady);
            assert_eq!(begin, [Output::Move(Role::Follower), Output::Begin]);
            let order = if early {
                [Input::PeerBegins, Input::PathReady]
            } else {
                [Input::PathReady, Input::PeerBegins]
            };
            let decider = order.into_iter().fold(decider, |machine, input| go(machine, input).0);
            assert!(decider.is_moving() && follower.is_moving());
        }
    }
}
