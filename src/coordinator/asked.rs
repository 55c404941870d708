// SPDX-License-Identifier: Apache-2.0
//! What people and programs ask about connections, and its answers.

use std::{net::SocketAddr, time::Instant};

use forwarder_api::SocketRecord;
use tokio::sync::oneshot;

use super::{
    Coordinator,
    explain::{self, Explanation, Facts, Says, Step, Subject},
    flow::{Flow, FlowView, Home},
    ledger::Ledger,
    lookup::{side_of, tuple_of},
    tally::Tally,
    wire::Tuple,
};
use crate::peers::PeerAddress;

/// What is answered once a scan has shown how things are.
pub(super) enum AfterScan {
    Flows(oneshot::Sender<Vec<FlowView>>),
    Explain(Subject, oneshot::Sender<Vec<Explanation>>),
}

/// For metrics.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub tally: Tally,
    pub forwarder_is_up: bool,
    pub rules: usize,
    /// What is in force is older than what stands there, which is wrong.
    pub rules_are_wrong: bool,
    /// How often other wrong rules were read.
    pub rule_errors: u64,
    /// Ends of connections: one within this host counts twice.
    pub on_overlay: usize,
    pub on_host: usize,
    pub without_way_back: usize,
    /// Connections that tracing had no room for.
    pub not_traced: u64,
    pub peers: Vec<(PeerAddress, bool)>,
}

impl Coordinator {
    pub(super) fn figures(&self) -> Figures {
        let rules = self.parts.lookup.rules();
        let mut figures = Figures {
            tally: self.ledger.tally().clone(),
            forwarder_is_up: self.forwarder.is_some(),
            rules: rules.len(),
            rules_are_wrong: rules.error().is_some(),
            rule_errors: rules.errors(),
            not_traced: self.parts.tracer.drops(),
            peers: self.ledger.peers().iter().map(|(peer, reached)| (*peer, *reached)).collect(),
            ..Figures::default()
        };
        for flow in self.ledger.flows() {
            match flow.on_host() {
                None => figures.on_overlay += 1,
                Some(on_host) => {
                    figures.on_host += 1;
                    figures.without_way_back += usize::from(!on_host.way_back);
                }
            }
        }
        figures
    }

    pub(super) fn answer_after_scan(&mut self, asked: AfterScan) {
        match self.scan() {
            Some(seq) => self.scans.wait_for(seq, asked),
            None => self.answer(vec![asked], &[]),
        }
    }

    /// To all who wait, whatever has come.
    pub(super) fn answer_all(&mut self) {
        let waiting = self.scans.take_waiting();
        self.answer(waiting, &[]);
    }

    pub(super) fn answer(&mut self, waiting: Vec<AfterScan>, records: &[SocketRecord]) {
        for asked in waiting {
            match asked {
                AfterScan::Flows(answer) => drop(answer.send(self.ledger.views())),
                AfterScan::Explain(subject, answer) => drop(answer.send(self.explain(&subject, records))),
            }
        }
    }

    fn explain(&mut self, subject: &Subject, records: &[SocketRecord]) -> Vec<Explanation> {
        let is_about = |record: &&SocketRecord| match subject {
            Subject::Conn(_) => false,
            Subject::Addresses { local, remote } => is_between(tuple_of(record), *local, *remote),
            Subject::Process { tgid, sockets } => record.tgid == *tgid || sockets.contains(&record.socket),
        };
        let shown: Vec<&SocketRecord> = records.iter().filter(is_about).collect();
        let flows = flows_of(&self.ledger, subject, &shown);
        let mut explained: Vec<Explanation> =
            flows.iter().map(|flow| explain::explain(&self.facts(flow))).collect();
        let is_known = |record: &&&SocketRecord| flows.iter().any(|flow| flow.socket == record.socket);
        let unknown: Vec<&SocketRecord> = shown.iter().filter(|record| !is_known(record)).copied().collect();
        explained.extend(unknown.into_iter().map(|record| self.explain_unknown(record)));
        match subject {
            Subject::Process { tgid, .. } if explained.is_empty() => vec![self.explain_process(*tgid)],
            Subject::Conn(_) | Subject::Addresses { .. } | Subject::Process { .. } => explained,
        }
    }

    fn facts<'a>(&'a self, flow: &'a Flow) -> Facts<'a> {
        let lookup = &self.parts.lookup;
        let (rules, after) = lookup.judge(flow.side, flow.tuple, &flow.workload);
        let (peer_source, peer_is_up) = match flow.home {
            Home::Peer(peer) => {
                (lookup.source_of(peer), self.ledger.peers().get(&peer).copied().unwrap_or_default())
            }
            Home::SameHost | Home::Nowhere(_) => (None, false),
        };
        Facts {
            flow,
            mate: self.ledger.mate(flow.tuple).and_then(|mate| self.ledger.get(mate)),
            rules,
            after,
            never_swapped: lookup.never_swapped(flow.ends()),
            peer_source,
            peer_is_up,
            forwarder: self.forwarder.as_ref().map(|(pid, _)| *pid),
            is_stopping: self.ledger.is_stopping(),
            now: Instant::now(),
        }
    }

    /// A socket that a scan shows, and that is no connection of ours (yet).
    fn explain_unknown(&mut self, record: &SocketRecord) -> Explanation {
        const ESTABLISHED: u8 = 1;
        let (tuple, side) = (tuple_of(record), side_of(record));
        let workload = self.parts.lookup.container(record.tgid).unwrap_or_default();
        let lookup = &self.parts.lookup;
        let (rules, after) = lookup.judge(side, tuple, &workload);
        let step = if record.state != ESTABLISHED {
            let because = "it is not established: it listens, is being made, or is being closed";
            Step::new("state", Says::No, because)
        } else if lookup.is_in_own_network(record) {
            Step::new("network", Says::No, "it is in the host's own network: it has no overlay to leave")
        } else {
            let since = self.scans.seen_since(record.socket);
            let seen = since.map_or("a moment".into(), |since| explain::span(since.elapsed()));
            let because =
                format!("too young: seen for {seen}, taken in at after={}", explain::after_text(after));
            Step::new("age", Says::Wait, because)
        };
        let rules = rules.into_iter().map(|judged| {
            let verb = if judged.holds { "holds" } else { "does not hold" };
            Step::new(&format!("rule {}", judged.rule), Says::Note, format!("{verb}: {}", judged.why))
        });
        Explanation {
            about: format!(
                "{} - {} of process {} ({})",
                record.local, record.remote, record.tgid, workload.name
            ),
            conclusion: format!("left alone: {}", step.because),
            steps: std::iter::once(step).chain(rules).collect(),
            flow: None,
        }
    }

    /// A process that has no connection here.
    fn explain_process(&mut self, tgid: u32) -> Explanation {
        let about = format!("process {tgid}");
        let explanation = |steps: Vec<Step>, conclusion: &str| Explanation {
            about,
            conclusion: conclusion.into(),
            steps,
            flow: None,
        };
        let cgroups = match std::fs::read_to_string(format!("/proc/{tgid}/cgroup")) {
            Ok(cgroups) => cgroups,
            Err(error) => {
                let step = Step::new("process", Says::No, format!("/proc/{tgid}: {error}"));
                return explanation(vec![step], "no such process is seen from here");
            }
        };
        let cgroup = cgroups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let scope = &self.parts.scope.path;
        let is_within = crate::settings::cgroup2_mount()
            .is_some_and(|root| root.join(cgroup.trim_start_matches('/')).starts_with(scope));
        let place = if is_within {
            Step::new(
                "cgroup",
                Says::Yes,
                format!("{cgroup} is within the router's scope, {}", scope.display()),
            )
        } else {
            let because = format!("{cgroup} is not within the router's scope, {}", scope.display());
            let way_out = "give the directory that holds it with ROUTER_CGROUP".to_owned();
            Step { way_out: Some(way_out), ..Step::new("cgroup", Says::No, because) }
        };
        let workload = self.parts.lookup.container(tgid).unwrap_or_default();
        let conclusion = if is_within { "it has no TCP socket" } else { "the router does not look at it" };
        explanation(vec![place, Step::new("container", Says::Note, workload.name)], conclusion)
    }
}

/// Whichever of the two ends it is.
fn is_between(tuple: Tuple, one: SocketAddr, other: SocketAddr) -> bool {
    let asked = Tuple { local: one.into(), remote: other.into() };
    tuple == asked || tuple == asked.reversed()
}

fn flows_of<'a>(ledger: &'a Ledger, subject: &Subject, shown: &[&SocketRecord]) -> Vec<&'a Flow> {
    let is_about = |flow: &&Flow| match subject {
        Subject::Conn(conn) => flow.conn == *conn,
        Subject::Addresses { local, remote } => is_between(flow.tuple, *local, *remote),
        Subject::Process { sockets, .. } => {
            sockets.contains(&flow.socket) || shown.iter().any(|record| record.socket == flow.socket)
        }
    };
    ledger.flows().filter(is_about).collect()
}
