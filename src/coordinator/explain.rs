// SPDX-License-Identifier: Apache-2.0
//! Why a connection is where it is, step by step. Pure.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use forwarder_api::{ConnId, Direction, Refusal, SocketInode};
use serde::{Deserialize, Serialize};

use super::{
    flow::{Flow, FlowView, Home, PeerSays},
    negotiation::State,
    wire::Cause,
};
use crate::{
    peers::Source,
    rules::{After, Judged},
};

/// What is asked about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Subject {
    Conn(ConnId),
    /// Either end's addresses.
    Addresses {
        local: SocketAddr,
        remote: SocketAddr,
    },
    /// A process and the sockets that its descriptors were seen to be, if they could be seen.
    Process {
        tgid: u32,
        sockets: Vec<SocketInode>,
    },
}

/// The answer: one for each connection, or what is known otherwise.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// What it is about.
    pub about: String,
    /// In one sentence.
    pub conclusion: String,
    pub steps: Vec<Step>,
    /// The connection, if it is known.
    pub flow: Option<FlowView>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    pub step: String,
    pub says: Says,
    pub because: String,
    /// What to do, where something can be done.
    pub way_out: Option<String>,
}

/// What a step says about a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Says {
    Yes,
    No,
    /// Not now.
    Wait,
    /// Neither.
    Note,
}

/// All that a decision about a connection is made of.
pub struct Facts<'a> {
    pub flow: &'a Flow,
    /// The other end, where it is on this host.
    pub mate: Option<&'a Flow>,
    pub rules: Vec<Judged>,
    pub after: After,
    pub never_swapped: Option<IpAddr>,
    /// Who told of the peer, if that was since the router started.
    pub peer_source: Option<Source>,
    pub peer_is_up: bool,
    pub forwarder: Option<u32>,
    pub is_stopping: bool,
    pub now: Instant,
}

impl Step {
    pub fn new(step: &str, says: Says, because: impl Into<String>) -> Step {
        Step { step: step.into(), says, because: because.into(), way_out: None }
    }

    fn of_refusal(step: &str, refusal: Refusal) -> Step {
        let says = if refusal.is_passing() { Says::Wait } else { Says::No };
        let because = format!("{refusal} ({})", refusal.label());
        Step { way_out: Some(way_out(refusal).into()), ..Step::new(step, says, because) }
    }
}

pub fn explain(facts: &Facts<'_>) -> Explanation {
    let flow = facts.flow;
    let mut steps = vec![seen(facts), age(facts), workload(flow)];
    steps.extend(rules(facts));
    steps.extend(translation(flow));
    steps.push(addresses(facts));
    steps.extend(other_end(facts));
    steps.push(forwarder(facts));
    steps.extend(orders(facts));
    steps.extend(last_attempt(flow));
    steps.push(path(flow));
    Explanation {
        about: format!(
            "{} {} - {} ({}) of {}",
            flow.conn,
            flow.tuple.local,
            flow.tuple.remote,
            format!("{:?}", flow.side).to_lowercase(),
            name(&flow.workload.name)
        ),
        conclusion: conclusion(facts, &steps),
        flow: Some(flow.view(facts.now)),
        steps,
    }
}

fn conclusion(facts: &Facts<'_>, steps: &[Step]) -> String {
    let flow = facts.flow;
    let moving = flow.attempt.as_ref().filter(|attempt| attempt.negotiation.is_moving());
    if let Some(attempt) = moving {
        return format!("moving to {} now", place(attempt.negotiation.direction));
    }
    if flow.on_host().is_some() {
        return if flow.is_stalled() {
            "on the host network, which stopped carrying it; it goes back to the overlay".into()
        } else {
            "swapped: on the host network".into()
        };
    }
    let first = |says| steps.iter().find(|step| step.says == says);
    match first(Says::No).or_else(|| first(Says::Wait)) {
        Some(step) => format!("on the overlay, because of {}: {}", step.step, step.because),
        None if flow.attempt.is_some() => "on the overlay; a swap is being agreed".into(),
        None => "on the overlay; nothing is in the way, and it is about to be swapped".into(),
    }
}

fn seen(facts: &Facts<'_>) -> Step {
    let flow = facts.flow;
    let known = span(facts.now.saturating_duration_since(flow.since));
    let text = format!(
        "known for {known}; sent {} B and received {} B as of the last scan; swapped {} times",
        flow.bytes_sent, flow.bytes_received, flow.swaps
    );
    Step::new("seen", Says::Yes, text)
}

fn age(facts: &Facts<'_>) -> Step {
    Step::new("age", Says::Yes, format!("old enough: it has reached after={}", after_text(facts.after)))
}

/// As a rule would say it.
pub fn after_text(after: After) -> String {
    let time = after.time.map(|time| format!("{}ms", time.as_millis()));
    let bytes = after.bytes.map(|bytes| format!("{bytes}B"));
    let both: Vec<String> = time.into_iter().chain(bytes).collect();
    if both.is_empty() { "never".into() } else { both.join(" or ") }
}

fn workload(flow: &Flow) -> Step {
    let labels = |what: &str, labels: &BTreeMap<String, String>| {
        let pairs: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        if pairs.is_empty() {
            format!("no {what} labels")
        } else {
            format!("{what} labels {}", pairs.join(", "))
        }
    };
    let workload = &flow.workload;
    let text = format!(
        "{}; {}; {}",
        name(&workload.name),
        labels("pod", &workload.pod_labels),
        labels("container", &workload.container_labels)
    );
    Step::new("workload", Says::Note, text)
}

fn name(workload: &str) -> &str {
    if workload.is_empty() { "no container" } else { workload }
}

fn rules(facts: &Facts<'_>) -> Vec<Step> {
    let mut steps: Vec<Step> = facts
        .rules
        .iter()
        .map(|judged| {
            let verb = if judged.holds { "holds" } else { "does not hold" };
            Step::new(&format!("rule {}", judged.rule), Says::Note, format!("{verb}: {}", judged.why))
        })
        .collect();
    steps.push(match (facts.flow.declined, facts.rules.is_empty()) {
        (Some(refusal), _) => Step::of_refusal("rules", refusal),
        (None, true) => Step::new("rules", Says::Yes, "there are none: every connection may be swapped"),
        (None, false) => Step::new("rules", Says::Yes, "of each kind of rule that there is, one holds"),
    });
    steps
}

fn translation(flow: &Flow) -> Option<Step> {
    let name = flow.translated?;
    let text = format!("this host translates its addresses to {} - {}", name.local, name.remote);
    Some(Step::new("translation", Says::Note, text))
}

fn addresses(facts: &Facts<'_>) -> Step {
    match facts.never_swapped {
        Some(address) => {
            let refusal = Step::of_refusal("addresses", Refusal::HostAddress);
            Step { because: format!("{address}: {}", refusal.because), ..refusal }
        }
        None => Step::new("addresses", Says::Yes, "neither is loopback, link-local or one of this host's"),
    }
}

fn other_end(facts: &Facts<'_>) -> Vec<Step> {
    let flow = facts.flow;
    match flow.home {
        // Said already.
        Home::Nowhere(Refusal::HostAddress) if facts.never_swapped.is_some() => vec![],
        Home::Nowhere(refusal) => vec![Step::of_refusal("other end", refusal)],
        Home::SameHost => {
            let there = Step::new("other end", Says::Yes, "another container of this host has it");
            let mate = match facts.mate {
                Some(mate) => match mate.declined {
                    Some(refusal) => Step::of_refusal("other end's rules", refusal),
                    None => Step::new("other end's rules", Says::Yes, "they want it swapped as well"),
                },
                None => Step::of_refusal("other end's rules", Refusal::PeerUnknown),
            };
            vec![there, mate]
        }
        Home::Peer(peer) => {
            let source = facts.peer_source.map_or("before the router started", Source::sentence);
            let found = format!("{peer} holds it, as was found {source}");
            let reached = if facts.peer_is_up {
                Step::new("peer's router", Says::Yes, format!("{peer} is reached"))
            } else {
                Step::of_refusal("peer's router", Refusal::PeerUnreachable)
            };
            let says = match flow.peer_says {
                PeerSays::Wants => Step::new("peer says", Says::Yes, "its rules want it swapped as well"),
                PeerSays::Declines(refusal) => Step::of_refusal("peer says", refusal),
                PeerSays::Nothing if flow.on_host().is_some() => {
                    Step::new("peer says", Says::Note, "nothing since this router was started")
                }
                PeerSays::Nothing => Step::of_refusal("peer says", flow.unanswered()),
            };
            vec![Step::new("other end", Says::Yes, found), reached, says]
        }
    }
}

fn forwarder(facts: &Facts<'_>) -> Step {
    match facts.forwarder {
        Some(pid) => Step::new("forwarder", Says::Yes, format!("process {pid} is reached")),
        None => Step::of_refusal("forwarder", Refusal::ForwarderGone),
    }
}

/// What people, a stop and the host path's history say.
fn orders(facts: &Facts<'_>) -> Vec<Step> {
    let flow = facts.flow;
    let mut steps = Vec::new();
    if facts.is_stopping {
        steps.push(Step::of_refusal("stop", Refusal::Stopping));
    }
    if flow.held {
        steps.push(Step::of_refusal("held", Refusal::SwappedBack));
    }
    if let Some(order) = flow.order {
        let who = match order.cause {
            Cause::Rules => "the rules",
            Cause::Order => "a person",
            Cause::Stop => "the stop of a router",
            Cause::HostPath => "the failure of its host path",
        };
        let left = |until: Instant| {
            format!("for another {} at most", span(until.saturating_duration_since(facts.now)))
        };
        let how_long = order.until.map_or("until they want it where it is".to_owned(), left);
        let text = format!("to {} by order of {who}; tried {how_long}", place(order.direction));
        steps.push(Step::new("order", Says::Note, text));
    }
    if let Some(until) = flow.avoids_host_until.filter(|until| *until > facts.now) {
        let left = span(until.saturating_duration_since(facts.now));
        let text = format!(
            "the host network has failed it {} times in a row; not swapped for another {left}",
            flow.stalls
        );
        let way_out = format!("mend the hosts' network; `router swap {}` does not wait", flow.conn);
        steps.push(Step { way_out: Some(way_out), ..Step::new("back-off", Says::Wait, text) });
    }
    if flow.in_line {
        steps.push(Step::new("turn", Says::Wait, "other connections are moved first"));
    }
    if let Some(attempt) = &flow.attempt {
        let text = match attempt.negotiation.state {
            State::Preparing | State::Checking => "this host's forwarder looks whether it can be moved",
            State::Offered => "the peer's router is asked",
            State::Connecting | State::ConnectingBegun => "the host connection is being made",
            State::Connected | State::Promised => "the peer is waited for",
            State::Moving => "the forwarders move it",
        };
        steps.push(Step::new("attempt", Says::Note, text));
    } else if let Some(at) = flow.alarm.filter(|at| flow.failures > 0 && *at > facts.now) {
        let left = span(at.saturating_duration_since(facts.now));
        let text = format!("refused {} times in a row; tried again in {left}", flow.failures);
        steps.push(Step::new("next attempt", Says::Note, text));
    }
    steps
}

/// Why the last attempt came to nothing, unless a step above says so.
fn last_attempt(flow: &Flow) -> Option<Step> {
    let is_said = |reason: &Refusal| {
        Some(*reason) == flow.declined
            || *reason == Refusal::SwappedBack && flow.held
            || flow.home == Home::Nowhere(*reason)
            || matches!(reason, Refusal::PeerSaysNo | Refusal::PeerUnreachable | Refusal::PeerUnknown)
            || matches!(reason, Refusal::ForwarderGone | Refusal::Stopping)
    };
    flow.reason.filter(|reason| !is_said(reason)).map(|reason| Step::of_refusal("last attempt", reason))
}

fn path(flow: &Flow) -> Step {
    let Some(on_host) = flow.on_host() else { return Step::new("path", Says::Note, "overlay") };
    let mut text = "host network".to_owned();
    if let Some(moved) = &on_host.moved {
        text += &format!(
            "; the swap's pause: {} us (freeze {}, settle {}, install {}), {} unread bytes carried over, {} moved \
             together, {} processes with {} threads and {} descriptors",
            moved.pause_us,
            moved.freeze_us,
            moved.settle_us,
            moved.install_us,
            moved.unread_bytes,
            moved.together,
            moved.processes,
            moved.threads,
            moved.fds
        );
    }
    if !on_host.way_back {
        text += "; no way back: the forwarder that kept the overlay socket is gone";
    }
    Step::new("path", Says::Note, text)
}

fn place(direction: Direction) -> &'static str {
    match direction {
        Direction::ToHost => "the host network",
        Direction::ToOverlay => "the overlay",
    }
}

pub fn span(time: Duration) -> String {
    match time.as_secs() {
        0 => format!("{} ms", time.as_millis()),
        seconds @ 1..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

/// What a person can do about it.
fn way_out(refusal: Refusal) -> &'static str {
    use Refusal::*;
    match refusal {
        NoRuleMatches => "add a rule that holds it (ROUTER_RULES), if it is to be swapped",
        PeerSaysNo => "give the other host the same rules; `router explain` there says which rule it lacks",
        HostAddress => "nothing: connections of the host itself have no overlay to leave",
        NoPeerHost => {
            "name the host in ROUTER_PEERS, or set OVERLAY_IF to the interface that leads there; of a Service, see the line \
             conntrack of `router check`"
        }
        PeerUnreachable => {
            "is a router running there, and is ROUTER_PORT open between the hosts? See `router status` at both"
        }
        PeerUnknown => {
            "wait until the server accepts it; otherwise see `router explain` at the other host: its container may be \
             out of its router's scope (ROUTER_CGROUP)"
        }
        PeerGone => "nothing: it is tried again when the other router is back",
        HostPathFailed => "open all TCP ports of HOST_IF between the two hosts",
        HostPathStalled => "mend the hosts' network: a firewall or an interface drops what it carried before",
        HostAddressNotCertified => {
            "issue the other host a certificate that holds its HOST_IF address as well (`router pki issue`)"
        }
        ForwarderGone => "start the forwarder, with the same socket path as ROUTER_FORWARDER",
        Stopping => "nothing: start the router again",
        SwappedBack => "`router swap CONN` moves it, and lets the rules decide again",
        SameNetwork => "nothing: loopback is as fast",
        NotEstablished => "nothing: the connection is over",
        ForeignNamespace => "nothing: a container with the host's network, or with a socket of another's",
        UnseenReference => {
            "nothing, as long as the descriptor is in flight in a unix socket or held by the kernel"
        }
        HolderBusy => "nothing: another move of the same process goes first",
        HolderTraced => "end the debugger or tracer that is attached to the process",
        HolderStopped => "let the process go on (SIGCONT)",
        Holder32Bit => "use a 64-bit build of the program",
        SharedMemory => "nothing: the program uses vfork or clone with shared memory for its whole life",
        NoInjectionRoom => "nothing on this kernel: its vDSO is full",
        TooManyDescriptors => "have the program share the socket under fewer descriptors",
        IoUring => "have the program use epoll in the place of io_uring",
        KernelTls => "switch kernel TLS off in the program",
        Mptcp => "have the program use plain TCP",
        TcpSignature => "nothing: signed connections stay where they are",
        SocketFilter => "detach the socket filter in the program",
        PeekOffset => "nothing: SO_PEEK_OFF cannot be carried over",
        SignalDriven => "have the program use epoll in the place of O_ASYNC",
        UnknownOption => "see the router's log at DEBUG for the option",
        NotParked => "nothing: it stays on the host network until it is closed",
        FreezeBudget => "raise FREEZE_BUDGET_MS, or lower the load: its threads could not be stopped in time",
        NotSettled => "nothing: it is tried again when less is in flight; FREEZE_BUDGET_MS allows more time",
        NotTheSameConnection => "look for address translation that neither host's connection tracking knows",
        HalfClosed => "nothing: it is about to end",
        UrgentData => "nothing: it is tried again when the urgent byte is read",
        TooManyUnreadBytes => "nothing: it is tried again when the application has read more",
        OneShotFired => "nothing: it is tried again when the application has handled its event",
        EpollUnreachable => {
            "nothing, unless the program keeps its epoll set in a process that lacks the socket"
        }
        NoFreeDescriptor => "raise the process's limit of open files (RLIMIT_NOFILE)",
        HolderVanished => "nothing: it is tried again",
        InjectionFailed => {
            "see the forwarder's log: a seccomp filter or a full address space may be in the way"
        }
        PeerAborted => "see `router explain` at the other host: its reason is there",
        UnfinishedCall => "nothing: it is tried again when the call is over",
        Exhausted => "raise the forwarder's limits of open files and threads",
    }
}

#[cfg(test)]
mod tests;
