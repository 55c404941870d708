// SPDX-License-Identifier: Apache-2.0
//! Two ledgers that speak to each other, with forwarders and a network that do as they are told.

use std::collections::{HashSet, VecDeque};

use super::*;
use crate::{
    coordinator::{
        flow::Shown,
        wire::{Rendezvous, TOKEN, Token},
    },
    endpoint::Endpoint,
};

const HERE: PeerAddress = PeerAddress::V4(std::net::Ipv4Addr::new(10, 244, 1, 0));
const THERE: PeerAddress = PeerAddress::V4(std::net::Ipv4Addr::new(10, 244, 2, 0));

/// The connection as its decider sees it.
fn tuple() -> Tuple {
    Tuple { local: "10.244.1.10:40000".parse().unwrap(), remote: "10.244.2.10:80".parse().unwrap() }
}

fn addresses() -> [PeerAddress; 2] {
    [HERE, THERE]
}

/// Host 0 decides, host 1 follows.
struct World {
    ledgers: [Ledger; 2],
    now: Instant,
    queue: VecDeque<(usize, Event)>,
    /// What the forwarder of each host answers to the next questions, instead of yes.
    refusals: [VecDeque<Refusal>; 2],
    moving: [HashSet<ConnId>; 2],
    /// Moves take their time: until [`World::end_moves`].
    moves_wait: bool,
    answers: Vec<(usize, Result<u64, Refusal>)>,
    released: [HashSet<ConnId>; 2],
    said: Vec<Message>,
    /// What each host's sockets were made to look like.
    names: [Vec<Tuple>; 2],
    sockets: u64,
}

impl World {
    fn new() -> World {
        let now = Instant::now();
        let mut world = World {
            ledgers: [Ledger::new(1, now), Ledger::new(2, now)],
            now,
            queue: VecDeque::new(),
            refusals: Default::default(),
            moving: Default::default(),
            moves_wait: false,
            answers: Vec::new(),
            released: Default::default(),
            said: Vec::new(),
            names: Default::default(),
            sockets: 1000,
        };
        world.at(0, Event::ForwarderUp);
        world.at(1, Event::ForwarderUp);
        world
    }

    /// Let something happen at a host, and all that follows from it.
    fn at(&mut self, host: usize, event: Event) {
        self.queue.push_back((host, event));
        while let Some((host, event)) = self.queue.pop_front() {
            for action in self.ledgers[host].handle(self.now, event) {
                self.act(host, action);
            }
        }
    }

    fn act(&mut self, host: usize, action: Action) {
        let other = 1 - host;
        match action {
            Action::Forwarder(Request::Prepare { conn, .. }) => {
                let answer = match self.refusals[host].pop_front() {
                    Some(reason) => Event::Refused(conn, reason),
                    None => Event::Prepared(conn, Holder(1)),
                };
                self.queue.push_back((host, answer));
            }
            Action::Forwarder(Request::Release { conn }) => drop(self.released[host].insert(conn)),
            Action::Forwarder(_)
            | Action::DropPath(_)
            | Action::Report { .. }
            | Action::ReportFalseClaim { .. }
            | Action::ReportRefusal { .. }
            | Action::ReportStall { .. } => {}
            Action::Tell(_, message) => {
                self.said.push(message.clone());
                self.queue.push_back((other, Event::Peer(Node::uncertified(addresses()[host]), message)));
            }
            Action::Reach(peer) => self.queue.push_back((host, Event::PeerUp(peer))),
            Action::Accept { attempted, .. } => {
                let token = Token([7; TOKEN]);
                let rendezvous =
                    Rendezvous { host: Some(("192.0.2.1:5".parse().unwrap(), token)), witness: token };
                let message = Message::Accept { attempted, rendezvous, holder: Holder(1) };
                self.queue.push_back((other, Event::Peer(Node::uncertified(addresses()[host]), message)));
            }
            Action::Connect { conn, .. } => {
                self.queue.push_back((other, Event::Path(conn, true)));
                self.queue.push_back((host, Event::Path(conn, true)));
            }
            Action::ConnectLocal { conn, .. } => self.queue.push_back((host, Event::Path(conn, true))),
            Action::Move { conn, names, .. } => {
                self.names[host].push(Tuple { local: names.local, remote: names.remote });
                self.moving[host].insert(conn);
                if self.moving[other].contains(&conn) && !self.moves_wait {
                    self.end_move(conn);
                }
            }
            Action::MoveLocal { conn, names, .. } => {
                let tuples = names.map(|names| Tuple { local: names.local, remote: names.remote });
                self.names[host].extend(tuples);
                let outcome = Outcome::Moved(self.moved(2));
                self.queue.push_back((host, Event::Ended(conn, outcome)));
            }
            Action::Answer(_, result) => self.answers.push((host, result)),
        }
    }

    fn end_move(&mut self, conn: ConnId) {
        for host in [0, 1] {
            self.moving[host].remove(&conn);
            let outcome = Outcome::Moved(self.moved(1));
            self.queue.push_back((host, Event::Ended(conn, outcome)));
        }
    }

    /// All that are under way at both hosts.
    fn end_moves(&mut self) {
        for conn in self.moving[0].intersection(&self.moving[1]).copied().collect::<Vec<_>>() {
            self.end_move(conn);
        }
        self.at(0, Event::Alarm);
    }

    fn moved(&mut self, sockets: u64) -> Moved {
        self.sockets += sockets;
        let first = self.sockets - sockets;
        Moved { pause_us: 700, sockets: (first..self.sockets).map(SocketInode).collect(), ..Moved::default() }
    }

    fn learned(&self, tuple: Tuple, home: Home, declined: Option<Refusal>) -> Event {
        Event::Learned(Learned {
            tuple,
            translated: None,
            side: Side::Client,
            v6: false,
            netns: u32::from(tuple.local.port()),
            socket: SocketInode(u64::from(tuple.local.port())),
            workload: Arc::default(),
            home,
            declined,
            seen: self.now,
        })
    }

    /// Whose address this host translates to what `name` says.
    fn learned_as(&self, tuple: Tuple, name: Tuple, home: Home) -> Event {
        match self.learned(tuple, home, None) {
            Event::Learned(learned) => Event::Learned(Learned { translated: Some(name), ..learned }),
            other => other,
        }
    }

    fn learn(&mut self, host: usize, declined: Option<Refusal>) {
        let tuple = if host == 0 { tuple() } else { tuple().reversed() };
        let event = self.learned(tuple, Home::Peer(addresses()[1 - host]), declined);
        self.at(host, event);
    }

    fn swapped() -> World {
        let mut world = World::new();
        world.learn(0, None);
        world.learn(1, None);
        world.expect_all(Shown::Host);
        world
    }

    fn wait(&mut self, time: Duration) {
        let end = self.now + time;
        while let Some(at) = self.ledgers.iter().filter_map(Ledger::alarm).min().filter(|alarm| *alarm <= end)
        {
            self.now = self.now.max(at);
            self.at(0, Event::Alarm);
            self.at(1, Event::Alarm);
        }
        self.now = end;
    }

    fn view(&self, host: usize) -> FlowView {
        let views = self.ledgers[host].views();
        assert_eq!(views.len(), 1, "{views:?}");
        views[0].clone()
    }

    fn expect_all(&self, path: Shown) {
        assert_eq!([self.view(0).path, self.view(1).path], [path, path]);
        assert_eq!(self.view(0).conn, self.view(1).conn);
    }

    fn expect_all_on_overlay(&self) {
        assert_eq!([self.view(0).path, self.view(1).path], [Shown::Overlay, Shown::Overlay]);
    }

    fn reasons(&self) -> [Option<String>; 2] {
        [self.view(0).reason, self.view(1).reason]
    }

    fn expect_reasons(&self, decider: Refusal, follower: Refusal) {
        assert_eq!(self.reasons(), [Some(decider.label().into()), Some(follower.label().into())]);
    }
}

#[test]
fn a_connection_that_both_ends_want_is_swapped_whichever_learns_of_it_first() {
    for first in [0, 1] {
        let mut world = World::new();
        world.learn(first, None);
        world.learn(1 - first, None);
        world.expect_all(Shown::Host);
        assert_eq!(world.ledgers[0].tally().swaps, 1);
    }
}

#[test]
fn of_too_many_connections_each_gets_its_turn_also_after_a_refusal() {
    let mut world = World::new();
    world.moves_wait = true;
    let many = 2 * MAX_ATTEMPTS + 100;
    for number in 0..many {
        let local = Endpoint::new(tuple().local.ip(), 10_000 + number as u16);
        let tuple = Tuple { local, ..tuple() };
        for (host, tuple) in [(0, tuple), (1, tuple.reversed())] {
            let event = world.learned(tuple, Home::Peer(addresses()[1 - host]), None);
            world.at(host, event);
        }
    }
    assert_eq!(world.moving[0].len(), MAX_ATTEMPTS);
    world.refusals[0].extend([Refusal::HolderBusy; 50]);
    while world.ledgers[0].swapped() < many {
        world.end_moves();
        world.wait(Duration::from_millis(100));
        assert!(world.moving[0].len() <= MAX_ATTEMPTS);
    }
    world.refusals[0].extend([Refusal::UnseenReference; 50]);
    world.at(0, Event::Stop { leave: false });
    let last = world.ledgers[0].flows().last().map(|flow| flow.tuple);
    for before in [None, last] {
        assert!(world.ledgers[0].awaited(before).is_some());
    }
    for _ in 0..20 {
        world.end_moves();
        world.wait(Duration::from_millis(100));
    }
    assert_eq!(world.ledgers[0].swapped(), 0);
    for before in [None, last] {
        assert_eq!(world.ledgers[0].awaited(before), None);
    }
}

#[test]
fn a_connection_that_one_end_does_not_want_stays_and_both_say_why() {
    let mut world = World::new();
    world.learn(0, None);
    world.learn(1, Some(Refusal::NoRuleMatches));
    world.expect_all_on_overlay();
    world.expect_reasons(Refusal::PeerSaysNo, Refusal::NoRuleMatches);
}

#[test]
fn an_end_that_the_peer_does_not_know_stays_with_that_reason() {
    let mut world = World::new();
    world.learn(0, None);
    world.wait(Duration::from_secs(2));
    assert_eq!(world.view(0).reason.as_deref(), Some("peer_unknown"));
    world.learn(1, None);
    world.expect_all(Shown::Host);
}

#[test]
fn a_connection_is_swapped_once_its_peer_is_found_and_stays_with_it_then() {
    let elsewhere = "192.0.2.9".parse().unwrap();
    for unknown in [Home::Peer(elsewhere), Home::Nowhere(Refusal::NoPeerHost)] {
        let mut world = World::new();
        world.at(0, world.learned(tuple(), unknown, None));
        world.learn(1, None);
        world.wait(Duration::from_secs(2));
        world.expect_all_on_overlay();
        world.at(0, Event::Relocated(tuple(), THERE));
        world.expect_all(Shown::Host);
        world.at(0, Event::Relocated(tuple(), elsewhere));
        world.at(0, Event::Order(tuple(), Direction::ToOverlay));
        world.expect_all(Shown::Overlay);
    }
}

#[test]
fn a_peer_that_is_lost_is_a_reason_until_it_is_back() {
    let mut world = World::new();
    world.learn(0, None);
    world.at(0, Event::PeerDown(THERE));
    assert_eq!(world.view(0).reason.as_deref(), Some("peer_unreachable"));
    world.learn(1, None);
    world.at(0, Event::PeerUp(THERE));
    world.expect_all(Shown::Host);
}

#[test]
fn a_passing_refusal_is_tried_again_and_a_lasting_one_is_not() {
    for (reason, swapped) in [(Refusal::HolderBusy, true), (Refusal::SocketFilter, false)] {
        for host in [0, 1] {
            let mut world = World::new();
            world.refusals[host].extend([reason, reason]);
            world.learn(0, None);
            world.learn(1, None);
            world.wait(Duration::from_secs(5));
            assert_eq!(world.view(0).path == Shown::Host, swapped, "{reason:?} at {host}");
            assert_eq!(world.view(1).path == Shown::Host, swapped, "{reason:?} at {host}");
            if !swapped {
                world.expect_reasons(reason, reason);
            }
        }
    }
}

#[test]
fn a_connection_sent_back_by_a_person_stays_until_a_person_wants_it() {
    for host in [0, 1] {
        let mut world = World::swapped();
        let of_host = if host == 0 { tuple() } else { tuple().reversed() };
        world.at(host, Event::Order(of_host, Direction::ToOverlay));
        world.expect_all(Shown::Overlay);
        world.expect_reasons(Refusal::SwappedBack, Refusal::SwappedBack);
        world.wait(Duration::from_secs(60));
        world.expect_all(Shown::Overlay);
        world.at(host, Event::Order(of_host, Direction::ToHost));
        world.expect_all(Shown::Host);
        // The decider, asked by the follower, has an order of its own.
        world.answers.retain(|(at, _)| *at == host);
        assert_eq!(world.answers, [(host, Ok(0)), (host, Ok(700))]);
    }
}

#[test]
fn an_order_that_cannot_be_carried_out_is_answered_with_the_reason() {
    let mut world = World::swapped();
    world.refusals[0].push_back(Refusal::NotParked);
    world.at(0, Event::Order(tuple(), Direction::ToOverlay));
    assert_eq!(world.answers, [(0, Err(Refusal::NotParked))]);
    assert_eq!(world.view(0).way_back, Some(false));
}

#[test]
fn an_order_that_the_decider_refuses_for_good_is_not_asked_for_without_end() {
    let mut world = World::new();
    world.refusals[0].extend([Refusal::SocketFilter; 100]);
    world.learn(0, None);
    world.learn(1, None);
    world.at(1, Event::Order(tuple().reversed(), Direction::ToHost));
    world.wait(Duration::from_secs(10));
    let answered = world.answers.iter().filter(|(host, _)| *host == 1).collect::<Vec<_>>();
    assert_eq!(answered, [&(1, Err(Refusal::SocketFilter))]);
    let asked = world.said.iter().filter(|message| matches!(message, Message::Ask { .. })).count();
    assert!(asked < 20, "asked {asked} times");
}

#[test]
fn a_stop_of_either_host_takes_all_back_and_comes_to_rest() {
    for host in [0, 1] {
        let mut world = World::swapped();
        world.at(host, Event::Stop { leave: false });
        world.expect_all(Shown::Overlay);
        assert_eq!(world.ledgers[host].awaited(None), None);
        let (stopped, other) = (Refusal::Stopping, Refusal::PeerGone);
        let expected = if host == 0 { [stopped, other] } else { [other, stopped] };
        world.expect_reasons(expected[0], expected[1]);
    }
}

#[test]
fn a_stop_that_leaves_moves_nothing() {
    let mut world = World::swapped();
    world.at(0, Event::Stop { leave: true });
    world.expect_all(Shown::Host);
    assert_eq!(world.ledgers[0].awaited(None), None);
}

#[test]
fn a_stop_without_the_peer_comes_to_rest() {
    let mut world = World::swapped();
    world.at(0, Event::PeerDown(THERE));
    world.at(0, Event::Stop { leave: false });
    assert_eq!(world.ledgers[0].awaited(None), None);
    assert_eq!(world.ledgers[0].swapped(), 1);
}

#[test]
fn rules_that_no_longer_want_a_connection_take_it_back() {
    for host in [0, 1] {
        let mut world = World::swapped();
        let of_host = if host == 0 { tuple() } else { tuple().reversed() };
        world.at(host, Event::Verdict(of_host, Some(Refusal::NoRuleMatches)));
        world.expect_all(Shown::Overlay);
        world.wait(Duration::from_secs(60));
        world.expect_all(Shown::Overlay);
        world.at(host, Event::Verdict(of_host, None));
        world.expect_all(Shown::Host);
    }
}

/// Rules decline it at this host, whose peer's router is away.
fn declined_without_the_peer(host: usize) -> (World, Tuple, PeerAddress) {
    let mut world = World::swapped();
    let (tuple, peer) = if host == 0 { (tuple(), THERE) } else { (tuple().reversed(), HERE) };
    world.at(host, Event::PeerDown(peer));
    world.at(host, Event::Verdict(tuple, Some(Refusal::NoRuleMatches)));
    world.wait(Duration::from_secs(600));
    let view = world.view(host);
    assert_eq!((view.path, view.reason.as_deref()), (Shown::Host, Some("peer_unreachable")));
    (world, tuple, peer)
}

#[test]
fn rules_take_a_connection_back_however_late_its_peer_is_reached() {
    for host in [0, 1] {
        let (mut world, _, peer) = declined_without_the_peer(host);
        world.at(host, Event::PeerUp(peer));
        world.expect_all(Shown::Overlay);
        assert_eq!(world.view(host).reason.as_deref(), Some("no_rule_matches"));
    }
}

#[test]
fn rules_that_want_a_connection_again_leave_it_where_it_is() {
    for host in [0, 1] {
        let (mut world, tuple, peer) = declined_without_the_peer(host);
        world.at(host, Event::Verdict(tuple, None));
        world.at(host, Event::PeerUp(peer));
        world.expect_all(Shown::Host);
        assert_eq!((world.view(host).reason, world.view(host).swaps), (None, 1));
    }
}

#[test]
fn a_stop_that_leaves_does_not_wait_for_what_rules_want() {
    let (mut world, ..) = declined_without_the_peer(0);
    assert!(world.ledgers[0].awaited(None).is_some());
    world.at(0, Event::Stop { leave: true });
    assert_eq!(world.ledgers[0].awaited(None), None);
}

#[test]
fn rules_take_a_connection_back_however_long_it_is_busy_and_try_later_and_later() {
    for host in [0, 1] {
        let mut world = World::swapped();
        world.refusals[0].extend([Refusal::HolderBusy; 100]);
        let of_host = if host == 0 { tuple() } else { tuple().reversed() };
        world.at(host, Event::Verdict(of_host, Some(Refusal::NoRuleMatches)));
        world.wait(Duration::from_secs(300));
        world.expect_all(Shown::Host);
        let tries = 100 - world.refusals[0].len();
        assert!((40..90).contains(&tries), "{tries} tries in 300 s, wanted by {host}");
        world.refusals[0].clear();
        world.wait(Duration::from_secs(10));
        world.expect_all(Shown::Overlay);
    }
}

#[test]
fn rules_that_want_a_connection_at_last_leave_the_reason_of_others() {
    let check = |home: Home, of_peer: Option<Refusal>, reason: Refusal| {
        let mut world = World::new();
        let no_rule = Some(Refusal::NoRuleMatches);
        let event = world.learned(tuple(), home, no_rule);
        world.at(0, event);
        if of_peer.is_some() {
            world.learn(1, of_peer);
        }
        world.wait(Duration::from_secs(60));
        world.at(0, Event::Verdict(tuple(), None));
        world.wait(Duration::from_secs(2));
        assert_eq!(world.ledgers[0].views()[0].reason.as_deref(), Some(reason.label()));
    };
    check(Home::Nowhere(Refusal::NoPeerHost), None, Refusal::NoPeerHost);
    check(Home::Peer(THERE), None, Refusal::PeerUnknown);
    check(Home::Peer(THERE), Some(Refusal::NoRuleMatches), Refusal::PeerSaysNo);
}

#[test]
fn labels_that_come_late_decide_as_if_they_had_been_there() {
    for (host, of_host) in [(0, tuple()), (1, tuple().reversed())] {
        let mut world = World::swapped();
        let workload = Arc::new(Workload { name: "default/shop/web".into(), ..Workload::default() });
        let declined = Some(Refusal::NoRuleMatches);
        world.at(host, Event::Workload(of_host, Arc::clone(&workload), declined));
        world.expect_all(Shown::Overlay);
        world.at(host, Event::Workload(of_host, workload, None));
        world.expect_all(Shown::Host);
        assert_eq!(world.ledgers[host].views()[0].workload, "default/shop/web");
    }
}

#[test]
fn the_end_of_a_host_socket_releases_what_is_parked() {
    let mut world = World::swapped();
    let swap = world.ledgers[0].flows().next().and_then(Flow::on_host).map(|on_host| on_host.swap).unwrap();
    let names = Names { swap, local: tuple().local, remote: tuple().remote };
    world.at(0, Event::HostSocketClosed(Names { swap: swap + 1, ..names }));
    assert_eq!(world.ledgers[0].views().len(), 1, "another swap's socket is not this one's");
    world.at(0, Event::HostSocketClosed(names));
    assert!(world.ledgers[0].views().is_empty());
    assert_eq!(world.released[0].len(), 1);
}

#[test]
fn what_one_end_finds_amid_a_move_is_the_reason_of_both_and_it_is_not_tried_again() {
    let found = Refusal::NotTheSameConnection;
    for finder in [0, 1] {
        for first in [0, 1] {
            let mut world = World::new();
            world.moves_wait = true;
            world.learn(0, None);
            world.learn(1, None);
            let conn = world.ledgers[0].flows().next().unwrap().conn;
            for host in [first, 1 - first] {
                world.moving[host].remove(&conn);
                let reason = if host == finder { found } else { Refusal::PeerAborted };
                world.at(host, Event::Ended(conn, Outcome::Aborted { reason, pause_us: 500 }));
            }
            world.wait(Duration::from_secs(600));
            world.expect_reasons(found, found);
            assert!(world.moving.iter().all(HashSet::is_empty), "tried again");
        }
    }
}

#[test]
fn a_late_message_of_an_earlier_attempt_changes_nothing() {
    let mut world = World::new();
    world.refusals[1].push_back(Refusal::HolderBusy);
    world.learn(0, None);
    world.learn(1, None);
    let is_refusal = |message: &&Message| matches!(message, Message::Refuse { .. });
    let late = world.said.iter().find(is_refusal).unwrap().clone();
    world.wait(Duration::from_secs(1));
    world.expect_all(Shown::Host);
    world.at(0, Event::Order(tuple(), Direction::ToOverlay));
    world.at(0, Event::Peer(Node::uncertified(THERE), late));
    world.expect_all(Shown::Overlay);
}

#[test]
fn a_peer_cannot_speak_about_a_connection_with_another_peer() {
    let mut world = World::new();
    world.learn(0, None);
    let stranger = Node::uncertified("10.244.3.0".parse().unwrap());
    let know = Message::Know { tuple: tuple().reversed(), declined: None, answer: true };
    world.at(0, Event::Peer(stranger, know));
    assert_eq!(world.view(0).path, Shown::Overlay);
    assert!(!world.said.iter().any(|message| matches!(message, Message::Offer { .. })));
}

#[test]
fn both_ends_on_one_host_are_swapped_together() {
    let mut world = World::new();
    for tuple in [tuple(), tuple().reversed()] {
        let event = world.learned(tuple, Home::Nowhere(Refusal::NoPeerHost), None);
        world.at(0, event);
    }
    let views = world.ledgers[0].views();
    assert!(views.iter().all(|view| view.path == Shown::Host && view.conn == views[0].conn), "{views:?}");
    assert_eq!(world.ledgers[0].swapped(), 1);
    world.at(0, Event::Order(tuple().reversed(), Direction::ToOverlay));
    assert!(world.ledgers[0].views().iter().all(|view| view.path == Shown::Overlay));
    assert!(world.answers.contains(&(0, Ok(0))), "{:?}", world.answers);
}

/// A connection to a Service that host 0 translates, as its socket has it.
fn to_service() -> Tuple {
    Tuple { local: "10.244.1.99:40001".parse().unwrap(), remote: "10.96.0.1:80".parse().unwrap() }
}

fn swapped_through_a_service() -> World {
    let mut world = World::new();
    world.at(0, world.learned_as(to_service(), tuple(), Home::Peer(THERE)));
    world.learn(1, None);
    world.expect_all(Shown::Host);
    world
}

#[test]
fn a_connection_whose_ends_know_other_addresses_is_swapped_and_each_keeps_its_own() {
    for first in [0, 1] {
        let mut world = World::new();
        for host in [first, 1 - first] {
            match host {
                0 => world.at(0, world.learned_as(to_service(), tuple(), Home::Peer(THERE))),
                _ => world.learn(1, None),
            }
        }
        world.expect_all(Shown::Host);
        let views = [world.view(0), world.view(1)]
            .map(|view| Tuple { local: view.local.into(), remote: view.remote.into() });
        let (own, other) = (to_service(), tuple().reversed());
        assert_eq!(views, [own, other]);
        assert_eq!(world.names[0], [to_service()]);
        assert_eq!(world.names[1], [tuple().reversed()]);
    }
}

#[test]
fn either_end_of_a_translated_connection_can_order_it_to_and_fro() {
    for (host, own) in [(0, to_service()), (1, tuple().reversed())] {
        let mut world = swapped_through_a_service();
        world.at(host, Event::Order(own, Direction::ToOverlay));
        world.expect_all(Shown::Overlay);
        world.at(host, Event::Order(own, Direction::ToHost));
        world.expect_all(Shown::Host);
    }
}

#[test]
fn a_peer_may_not_call_a_translated_connection_by_its_socket() {
    let mut world = World::new();
    world.at(0, world.learned_as(to_service(), tuple(), Home::Peer(THERE)));
    let know = Message::Know { tuple: to_service().reversed(), declined: None, answer: true };
    world.at(0, Event::Peer(Node::uncertified(THERE), know));
    world.wait(Duration::from_secs(2));
    assert_eq!(world.view(0).reason.as_deref(), Some("peer_unknown"));
}

#[test]
fn a_ledger_that_was_shrunk_knows_what_it_knew() {
    let mut world = World::new();
    world.learn(0, None);
    world.learn(1, None);
    world.expect_all(Shown::Host);
    world.ledgers.iter_mut().for_each(Ledger::shrink);
    world.at(0, Event::Order(tuple(), Direction::ToOverlay));
    world.expect_all(Shown::Overlay);
}

#[test]
fn of_two_connections_that_are_called_the_same_the_later_is_meant() {
    let mut world = World::new();
    let elsewhere = "10.244.1.98:40002".parse().unwrap();
    let earlier = Tuple { local: elsewhere, ..to_service() };
    world.at(0, world.learned_as(earlier, tuple(), Home::Peer(THERE)));
    world.at(0, world.learned_as(to_service(), tuple(), Home::Peer(THERE)));
    assert_eq!(world.ledgers[0].named(tuple()), Some(to_service()));
    world.at(0, world.learned(tuple(), Home::Peer(THERE), None));
    assert_eq!(world.ledgers[0].named(tuple()), Some(tuple()));
}

#[test]
fn a_masqueraded_client_is_believed_to_be_one_when_its_router_says_so() {
    let masqueraded = Tuple { local: Endpoint::new(HERE, 61_000), ..tuple() };
    let mut world = World::new();
    world.at(1, world.learned(masqueraded.reversed(), Home::Peer(HERE), None));
    world.wait(Duration::from_secs(2));
    assert_eq!(world.view(1).reason.as_deref(), Some("host_address"));
    world.at(0, world.learned_as(to_service(), masqueraded, Home::Peer(THERE)));
    world.expect_all(Shown::Host);
}

#[test]
fn both_ends_of_a_translated_connection_within_one_host_are_swapped_together() {
    let (server, seen) = ("10.244.1.10:8080".parse().unwrap(), "10.244.1.1:61000".parse().unwrap());
    // Whichever address is the smaller.
    for client in ["10.244.1.9:40000", "10.244.1.11:40000"] {
        let client = Tuple { local: client.parse().unwrap(), ..to_service() };
        let of_server = Tuple { local: server, remote: seen };
        let nowhere = Home::Nowhere(Refusal::NoPeerHost);
        let mut world = World::new();
        world.at(0, world.learned_as(client, of_server.reversed(), nowhere));
        world.at(0, world.learned_as(of_server, client.reversed(), nowhere));
        let views = world.ledgers[0].views();
        assert!(views.iter().all(|view| view.path == Shown::Host && view.conn == views[0].conn), "{views:?}");
        assert_eq!(world.ledgers[0].swapped(), 1);
        let ends: HashSet<Tuple> = world.names[0].iter().copied().collect();
        assert_eq!(ends, HashSet::from([client, of_server]));
        world.at(0, Event::Order(of_server, Direction::ToOverlay));
        world.at(0, Event::Order(client, Direction::ToHost));
        assert!(world.ledgers[0].views().iter().all(|view| view.path == Shown::Host));
        let flows: Vec<Flow> = world.ledgers[0].flows().cloned().collect();
        world.ledgers[0] = Ledger::new(3, world.now);
        let leads_first = |flow: &&Flow| !flow.decides();
        let mut ends: Vec<&Flow> = flows.iter().collect();
        ends.sort_by_key(leads_first);
        let restored = Restored {
            conn: flows[0].conn,
            sockets: ends.iter().map(|flow| flow.socket).collect(),
            note: Note { swap: 9, ends: ends.iter().map(|flow| flow.noted()).collect() },
            moved: Moved::default(),
        };
        world.at(0, Event::Parked(vec![restored]));
        world.at(0, Event::ForwarderUp);
        world.at(0, Event::Order(client, Direction::ToOverlay));
        assert!(world.ledgers[0].views().iter().all(|view| view.path == Shown::Overlay));
    }
}

#[test]
fn a_translation_that_is_lost_leaves_no_way_back() {
    let mut world = swapped_through_a_service();
    let conn = world.ledgers[0].flows().next().unwrap().conn;
    world.at(0, Event::TranslationLost(conn));
    assert_eq!(world.view(0).way_back, Some(false));
}

/// The first router is a new one; its forwarder goes on, and tells of its one swapped connection.
fn restart_beside_what_is_parked(world: &mut World) {
    let flow = world.ledgers[0].flows().next().unwrap().clone();
    let note = Note { swap: 9, ends: vec![flow.noted()] };
    let restored = Restored { conn: flow.conn, sockets: vec![flow.socket], note, moved: Moved::default() };
    world.ledgers[0] = Ledger::new(3, world.now);
    world.at(0, Event::Parked(vec![restored]));
    world.at(0, Event::ForwarderUp);
}

#[test]
fn a_restarted_router_knows_what_is_translated() {
    let mut world = swapped_through_a_service();
    restart_beside_what_is_parked(&mut world);
    world.at(1, Event::Order(tuple().reversed(), Direction::ToOverlay));
    world.expect_all(Shown::Overlay);
}

fn expect_an_order_to_fail(mut world: World, tuple: Tuple, direction: Direction) {
    world.at(0, Event::Order(tuple, direction));
    world.wait(Duration::from_secs(10));
    assert!(matches!(world.answers[..], [(0, Err(_))]), "{:?}", world.answers);
}

#[test]
fn an_order_without_a_forwarder_is_answered_in_time() {
    let mut world = World::swapped();
    world.at(0, Event::ForwarderDown);
    expect_an_order_to_fail(world, tuple(), Direction::ToOverlay);
}

#[test]
fn orders_that_are_given_again_and_again_are_answered_in_time() {
    let mut world = World::swapped();
    world.at(0, Event::ForwarderDown);
    for _ in 0..6 {
        world.at(0, Event::Order(tuple(), Direction::ToOverlay));
        world.wait(Duration::from_secs(1));
    }
    assert!(matches!(world.answers[..], [(0, Err(_))]), "{:?}", world.answers);
}

#[test]
fn an_order_for_the_end_that_is_left_of_a_connection_within_one_host_is_answered_in_time() {
    let mut world = World::new();
    for tuple in [tuple(), tuple().reversed()] {
        let unwanted = Some(Refusal::NoRuleMatches);
        let event = world.learned(tuple, Home::Nowhere(Refusal::NoPeerHost), unwanted);
        world.at(0, event);
    }
    world.now += Duration::from_secs(1);
    let left = SocketInode(u64::from(tuple().remote.port()));
    world.at(0, Event::Scanned { began: world.now, sockets: [(left, (0, 0))].into() });
    assert_eq!(world.ledgers[0].views().len(), 1);
    expect_an_order_to_fail(world, tuple().reversed(), Direction::ToHost);
}

#[test]
fn a_lost_forwarder_is_a_reason_until_it_is_back() {
    let mut world = World::new();
    world.at(0, Event::ForwarderDown);
    world.learn(0, None);
    world.learn(1, None);
    world.expect_all_on_overlay();
    world.at(0, Event::ForwarderUp);
    world.expect_all(Shown::Host);
}

#[test]
fn a_restarted_router_knows_what_is_parked() {
    let mut world = World::swapped();
    restart_beside_what_is_parked(&mut world);
    world.expect_all(Shown::Host);
    world.at(0, Event::Order(tuple(), Direction::ToOverlay));
    world.expect_all(Shown::Overlay);
}

fn stall(world: &mut World, host: usize) {
    let swap = world.ledgers[host].flows().find_map(Flow::on_host).map(|on_host| on_host.swap).unwrap();
    world.at(host, Event::Stalled(HashMap::from([(swap, 1448)])));
}

#[test]
fn a_stalled_connection_goes_back_whichever_end_notices_and_is_swapped_again_after_a_while() {
    for host in [0, 1] {
        let mut world = World::swapped();
        for backoff in [30, 60, 120, 240, 480, 600, 600] {
            stall(&mut world, host);
            world.expect_all(Shown::Overlay);
            world.wait(Duration::from_secs(backoff - 1));
            world.expect_all(Shown::Overlay);
            world.expect_reasons(Refusal::HostPathStalled, Refusal::HostPathStalled);
            world.wait(Duration::from_secs(2));
            world.expect_all(Shown::Host);
            assert_eq!(world.reasons(), [None, None]);
        }
        world.wait(Duration::from_secs(601));
        stall(&mut world, host);
        world.wait(Duration::from_secs(31));
        world.expect_all(Shown::Host);
    }
}

#[test]
fn a_person_may_swap_a_connection_that_has_stalled() {
    let mut world = World::swapped();
    stall(&mut world, 0);
    world.at(0, Event::Order(tuple(), Direction::ToHost));
    world.expect_all(Shown::Host);
}

#[test]
fn whoever_orders_at_the_follower_hears_what_kept_the_decider_from_it() {
    let mut world = World::swapped();
    world.refusals[0].extend([Refusal::HolderBusy; 100]);
    world.at(1, Event::Order(tuple().reversed(), Direction::ToOverlay));
    world.wait(Duration::from_secs(10));
    assert!(world.answers.contains(&(1, Err(Refusal::HolderBusy))), "{:?}", world.answers);
}

#[test]
fn an_order_refused_during_the_backoff_does_not_end_it() {
    let mut world = World::swapped();
    stall(&mut world, 0);
    world.refusals[0].extend([Refusal::HolderBusy; 100]);
    world.at(0, Event::Order(tuple(), Direction::ToHost));
    world.wait(Duration::from_secs(10));
    assert_eq!(world.answers.last(), Some(&(0, Err(Refusal::HolderBusy))));
    world.refusals[0].clear();
    world.expect_all(Shown::Overlay);
    world.wait(Duration::from_secs(30));
    world.expect_all(Shown::Host);
}

#[test]
fn a_stalled_connection_stays_while_the_way_back_is_refused_and_says_both() {
    for host in [0, 1] {
        let mut world = World::swapped();
        world.refusals[host].extend([Refusal::NotSettled; 3]);
        stall(&mut world, host);
        world.expect_all(Shown::Host);
        let view = world.view(host);
        assert_eq!(view.reason.as_deref(), Some("host_path_stalled"));
        let text = view.reason_text.unwrap();
        assert!(text.contains("in flight") || host == 1, "{text}");
        world.wait(Duration::from_secs(2));
        world.expect_all(Shown::Overlay);
    }
}

#[test]
fn a_stalled_connection_whose_peer_is_gone_stays_and_says_so() {
    let mut world = World::swapped();
    world.at(0, Event::PeerDown(THERE));
    stall(&mut world, 0);
    let view = world.view(0);
    assert_eq!((view.path, view.reason.as_deref()), (Shown::Host, Some("host_path_stalled")));
    let text = view.reason_text.unwrap();
    assert!(text.contains(Refusal::PeerUnreachable.sentence()), "{text}");
    world.at(0, Event::PeerUp(THERE));
    world.wait(Duration::from_secs(5));
    stall(&mut world, 0);
    world.expect_all(Shown::Overlay);
}

#[test]
fn a_path_that_carries_again_is_no_reason_any_more() {
    let mut world = World::swapped();
    world.at(0, Event::PeerDown(THERE));
    stall(&mut world, 0);
    world.at(0, Event::Stalled(HashMap::new()));
    assert_eq!((world.view(0).path, world.view(0).reason), (Shown::Host, None));
}

#[test]
fn a_stalled_connection_within_one_host_goes_back() {
    let mut world = World::new();
    for tuple in [tuple(), tuple().reversed()] {
        let event = world.learned(tuple, Home::Nowhere(Refusal::NoPeerHost), None);
        world.at(0, event);
    }
    stall(&mut world, 0);
    let views = world.ledgers[0].views();
    let back =
        |view: &FlowView| view.path == Shown::Overlay && view.reason.as_deref() == Some("host_path_stalled");
    assert!(views.iter().all(back), "{views:?}");
}

#[test]
fn the_way_back_of_a_stalled_connection_is_tried_later_and_later() {
    for host in [0, 1] {
        let mut world = World::swapped();
        world.refusals[0].extend([Refusal::NotSettled; 1000]);
        for _ in 0..100 {
            stall(&mut world, host);
            world.wait(Duration::from_millis(300));
        }
        let tries = 1000 - world.refusals[0].len();
        assert!((8..25).contains(&tries), "{tries} tries in 30 s, noticed by {host}");
    }
}

/// The follower's answer to the decider's first offer, host connections to be taken at `host`.
fn answer_offer_with(world: &mut World, node: Node, host: &str) -> Vec<Action> {
    let learned = world.learned(tuple(), Home::Peer(THERE), None);
    let know = Message::Know { tuple: tuple().reversed(), declined: None, answer: true };
    let ledger = &mut world.ledgers[0];
    ledger.handle(world.now, learned);
    ledger.handle(world.now, Event::PeerUp(THERE));
    let asked = ledger.handle(world.now, Event::Peer(node.clone(), know));
    let Some(Action::Forwarder(Request::Prepare { conn, .. })) = asked.last() else { panic!("{asked:?}") };
    let offered = ledger.handle(world.now, Event::Prepared(*conn, Holder(1)));
    let Some(Action::Tell(_, Message::Offer { attempted, .. })) = offered.last() else {
        panic!("{offered:?}")
    };
    let token = Token([7; TOKEN]);
    let rendezvous = Rendezvous { host: Some((host.parse().unwrap(), token)), witness: token };
    let accept = Message::Accept { attempted: *attempted, rendezvous, holder: Holder(1) };
    ledger.handle(world.now, Event::Peer(node, accept))
}

#[test]
fn a_host_address_that_the_peer_has_no_certificate_for_is_not_connected_to() {
    let node = || Node::certified(THERE, vec![THERE, "192.0.2.2".parse().unwrap()]);
    let is_connect = |action: &Action| matches!(action, Action::Connect { .. });
    assert!(answer_offer_with(&mut World::new(), node(), "192.0.2.2:5").iter().any(is_connect));
    let mut world = World::new();
    let actions = answer_offer_with(&mut world, node(), "192.0.2.3:5");
    assert!(!actions.iter().any(is_connect), "{actions:?}");
    assert_eq!(world.ledgers[0].tally().refused[&Refusal::HostAddressNotCertified], 1);
}

#[test]
fn a_peer_is_believed_under_each_address_of_its_certificate() {
    let node = Node::certified("192.0.2.2".parse().unwrap(), vec![THERE, "192.0.2.2".parse().unwrap()]);
    let actions = answer_offer_with(&mut World::new(), node, "192.0.2.2:5");
    assert!(actions.iter().any(|action| matches!(action, Action::Connect { .. })), "{actions:?}");
}

#[test]
fn a_peer_is_not_believed_about_a_connection_of_another() {
    let stranger = Node::certified("192.0.2.3".parse().unwrap(), vec!["192.0.2.3".parse().unwrap()]);
    let mut world = World::swapped();
    let conn = world.ledgers[0].flows().next().unwrap().conn;
    let attempted = Attempted { conn, number: 1 };
    let theirs = tuple().reversed();
    let (direction, cause) = (Direction::ToOverlay, Cause::Order);
    let claims = [
        Message::Know { tuple: theirs, declined: Some(Refusal::NoRuleMatches), answer: false },
        Message::Ask { tuple: theirs, direction, cause },
        Message::Offer { attempted, tuple: theirs, direction, cause },
        Message::Cancel { attempted, reason: Refusal::Stopping },
        Message::Relay { attempted, message: vec![1] },
    ];
    let mut reports = 0;
    for claim in &claims {
        let event = Event::Peer(stranger.clone(), claim.clone());
        for action in world.ledgers[0].handle(world.now, event) {
            match action {
                Action::ReportFalseClaim { .. } => reports += 1,
                Action::Tell(_, Message::Refuse { reason: Refusal::PeerUnknown, .. }) => {}
                other => panic!("{claim:?}: {other:?}"),
            }
        }
    }
    assert_eq!(reports, 1, "one line a minute");
    assert_eq!(world.ledgers[0].tally().false_claims, claims.len() as u64);
    world.expect_all(Shown::Host);
}
