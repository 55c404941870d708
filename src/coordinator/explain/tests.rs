// SPDX-License-Identifier: Apache-2.0
use std::sync::Arc;

use super::*;
use crate::{
    coordinator::{flow::NotedEnd, wire::Tuple},
    endpoint::Endpoint,
    trace::Side,
    workload::Workload,
};

const PEER: &str = "192.0.2.2";

fn flow(now: Instant) -> Flow {
    let tuple = Tuple { local: "10.244.1.9:4000".parse().unwrap(), remote: "10.244.2.9:80".parse().unwrap() };
    let workload = Arc::new(Workload { name: "shop/web".into(), ..Workload::default() });
    let (home, overlay_socket) = (Home::Peer(PEER.parse().unwrap()), SocketInode(7));
    let end =
        NotedEnd { tuple, translated: None, side: Side::Client, v6: false, overlay_socket, workload, home };
    Flow { peer_says: PeerSays::Wants, ..Flow::new(ConnId(1), end, now) }
}

/// A host where everything speaks for a swap, but for what `change` does to it.
fn check(change: impl FnOnce(&mut Flow, Instant), conclusion: &str) {
    check_with(change, |_| {}, conclusion);
}

fn check_with(
    change: impl FnOnce(&mut Flow, Instant),
    facts_change: impl FnOnce(&mut Facts<'_>),
    conclusion: &str,
) {
    let now = Instant::now();
    let mut flow = flow(now);
    change(&mut flow, now);
    let mut facts = Facts {
        flow: &flow,
        mate: None,
        rules: vec![Judged { rule: "pods".into(), holds: true, why: "both are in".into() }],
        after: After::DEFAULT,
        never_swapped: None,
        peer_source: Some(Source::Route),
        peer_is_up: true,
        forwarder: Some(100),
        is_stopping: false,
        now,
    };
    facts_change(&mut facts);
    let explained = explain(&facts);
    assert!(explained.conclusion.contains(conclusion), "{explained:#?}");
    assert!(explained.steps.iter().any(|step| step.step == "rule pods"), "{explained:#?}");
}

#[test]
fn where_everything_speaks_for_a_swap_it_is_about_to_be_made() {
    check(|_, _| {}, "nothing is in the way");
}

#[test]
fn rules_that_decline_are_the_conclusion() {
    check(|flow, _| flow.declined = Some(Refusal::NoRuleMatches), "because of rules: no rule asks");
}

#[test]
fn a_peer_that_is_not_reached_is_the_conclusion() {
    check_with(|_, _| {}, |facts| facts.peer_is_up = false, "because of peer's router");
}

#[test]
fn a_missing_forwarder_is_the_conclusion() {
    check_with(|_, _| {}, |facts| facts.forwarder = None, "because of forwarder");
}

#[test]
fn a_person_who_holds_it_is_the_conclusion() {
    let held = |flow: &mut Flow, _| (flow.held, flow.reason) = (true, Some(Refusal::SwappedBack));
    check(held, "because of held: it was sent back to the overlay by command");
}

#[test]
fn what_the_forwarder_refused_is_the_conclusion() {
    check(|flow, _| flow.reason = Some(Refusal::IoUring), "because of last attempt");
}

#[test]
fn a_host_path_that_has_failed_is_named_with_the_time_left() {
    let failed = |flow: &mut Flow, now: Instant| {
        flow.stalls = 1;
        flow.avoids_host_until = Some(now + Duration::from_secs(20));
    };
    check(failed, "not swapped for another 20 s");
}

#[test]
fn every_refusal_has_a_way_out() {
    for refusal in Refusal::ALL {
        assert!(way_out(refusal).len() > 10, "{refusal:?}");
    }
}

#[test]
fn a_translation_is_shown() {
    let now = Instant::now();
    let mut flow = flow(now);
    flow.translated = Some(Tuple { remote: "10.244.2.7:8080".parse().unwrap(), ..flow.tuple });
    let step = translation(&flow).unwrap();
    assert!(step.because.contains("10.244.1.9:4000 - 10.244.2.7:8080"), "{step:?}");
}

#[test]
fn a_hosts_own_address_that_its_router_says_nothing_about_is_the_hosts() {
    let of_the_peer_itself = |flow: &mut Flow, _| {
        flow.peer_says = PeerSays::Nothing;
        flow.tuple.remote = Endpoint::new(PEER.parse().unwrap(), flow.tuple.remote.port());
    };
    check(of_the_peer_itself, "(host_address)");
}
