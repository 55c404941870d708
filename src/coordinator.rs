// SPDX-License-Identifier: Apache-2.0
//! Brings the two ends of a connection together: hears tracing, forwarder, peers and people, asks the ledger what is
//! to be done, and does it.
//!
//! ```text
//!   trace ──┐                               ┌── forwarder   prepare, move, release
//!   scan  ──┤   look up:        ledger      ├── peers       know, offer, accept, relay
//!   peers ──┼── workload, ──▶  (pure) ──▶───┼── host path   connect, accept, token
//!   people ─┘   rules, route                └── answers, log
//! ```
//!
//! One task does it all, so that nothing needs a lock. What takes long (connecting) is a task of its own and comes
//! back as an event.

mod asked;
mod effects;
mod explain;
mod flow;
mod host_path;
mod ledger;
mod lookup;
mod negotiation;
mod peer;
mod scans;
mod session;
mod tally;
pub mod wire;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::Ipv4Addr,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use forwarder_api::{ConnId, Direction, Event as Said, Refusal, Request, SocketInode, SocketRecord};
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};

pub use asked::Figures;
pub use explain::{Explanation, Says, Subject};
pub use flow::{FlowView, OtherHost, Shown};
pub use lookup::Lookup;
pub use peer::PeerView;
pub use session::listen;
pub use tally::Histogram;

use asked::AfterScan;
use flow::{Flow, Note};
use host_path::{Arrived, HostPath, Line};
use ledger::{Event, Ledger, Restored};
use peer::Contacts;
use scans::Scans;
use session::SessionEvent;
use wire::{Message, Tuple};

use crate::{
    cluster::Reach,
    forwarder::{ForwarderEvent, Sent},
    identity::Identity,
    lanes::{self, lanes},
    peers::PeerAddress,
    rules::Reading,
    settings::Settings,
    stall::{HostSocket, Watch},
    trace::{Scope, TraceEvent, Tracer},
    trust::Trust,
    workload::Told,
};

/// So many events at once, in a burst: what has come meanwhile, and may be urgent, is looked at in between.
const AT_ONCE: u32 = 4;
/// Between two looks at addresses and pods that may have changed, and at connections that may be over.
const SURROUNDINGS: Duration = Duration::from_secs(2);
const SCAN: Duration = Duration::from_secs(30);
/// Between two looks at the host sockets, for those whose probes nobody answers: of time-outs the kernel tells.
const WATCH: Duration = Duration::from_secs(1);
/// After its word, when all that the same word tells has happened (TELL_WAITS_NS of `bpf/event.h`), but not sooner after the look
/// before: where thousands wait, a look takes many milliseconds, and there is a word all the time.
const WATCH_AFTER_WORD: Duration = Duration::from_millis(60);
const SHORTEST_WATCH: Duration = Duration::from_millis(300);
/// How many translations are kept in one look at the surroundings: about a millisecond. For the most connections that there
/// can be, each is kept every ten minutes.
const KEPT_AT_ONCE: usize = 256;
/// How long `router flows` waits for a scan before it shows what is known.
const FRESH: Duration = Duration::from_secs(1);
/// How long the last scan of a router that stops may take.
const LAST_SCAN: Duration = Duration::from_secs(5);
/// How long [`Wish::Leave`] holds: longer than it takes to stop a router, shorter than until somebody has forgotten it.
const LEAVING: Duration = Duration::from_secs(60);
/// How long a stop waits at most: the ledger gives its orders up earlier.
const STOP: Duration = Duration::from_secs(20);

/// What people ask of a running router.
pub enum Wish {
    Status(oneshot::Sender<Status>),
    Flows(oneshot::Sender<Vec<FlowView>>),
    /// For metrics: nothing is looked up for it.
    Figures(oneshot::Sender<Figures>),
    Explain(Subject, oneshot::Sender<Vec<Explanation>>),
    Peers(oneshot::Sender<Vec<PeerView>>),
    /// A stop in the next while leaves connections where they are. The answer is how long that holds.
    Leave(oneshot::Sender<Duration>),
    Move(ConnId, Direction, oneshot::Sender<Answer>),
}

/// What came of an order: the pause in microseconds, or the reason why not. None: no such connection is known.
pub type Answer = Option<Result<u64, Refusal>>;

/// `router status`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    /// Process id of the forwarder, if it is reached.
    pub forwarder: Option<u32>,
    pub rules: usize,
    /// What is wrong with the rules that were read last; those before are in force. And how often rules were wrong, since
    /// this router started.
    pub rules_error: Option<String>,
    pub rules_errors: u64,
    /// Is the Kubernetes API server reached? None: none is asked.
    pub kubernetes: Option<bool>,
    /// Connections known, and those on the host network now.
    pub flows: usize,
    pub swapped: usize,
    /// Since this router started.
    pub swaps: u64,
    pub swap_backs: u64,
    pub refused: BTreeMap<String, u64>,
    /// Who connected to ROUTER_PORT and was not let in, and what peers said about connections that they do not hold.
    pub turned_away: u64,
    pub false_claims: u64,
    /// Connections that were not seen, because a buffer was full.
    pub drops: u64,
    /// Peer routers, and whether they are reached.
    pub peers: BTreeMap<PeerAddress, bool>,
}

/// What the coordinator works with.
pub struct Parts {
    pub settings: Settings,
    /// HOST_IF's.
    pub host_address: Ipv4Addr,
    pub lookup: Lookup,
    pub identity: Identity,
    pub scope: Scope,
    pub tracer: Tracer,
    pub watch: Watch,
    pub trust: Trust,
    /// Of the Kubernetes API server, if there is one.
    pub kubernetes: Option<Arc<Reach>>,
}

/// What the coordinator hears, besides what it opens itself.
pub struct Inlets {
    pub traced: mpsc::Receiver<TraceEvent>,
    /// Container runtimes' answers.
    pub told: mpsc::Receiver<Told>,
    /// ROUTER_PORT
    pub peers: TcpListener,
    pub wishes: mpsc::Receiver<Wish>,
    pub rules: mpsc::Receiver<Reading>,
}

struct Coordinator {
    parts: Parts,
    ledger: Ledger,
    host_path: HostPath,
    forwarder: Option<(u32, mpsc::UnboundedSender<Sent>)>,
    sessions: HashMap<PeerAddress, mpsc::Sender<Message>>,
    contacts: Contacts,
    /// Connections to peers that the forwarder has not been given yet.
    lines: HashMap<ConnId, Lines>,
    scans: Scans,
    waiting: HashMap<Tuple, Vec<oneshot::Sender<Answer>>>,
    turned_away: Arc<AtomicU64>,
    to_sessions: lanes::Sender<SessionEvent>,
    to_made: mpsc::Sender<Made>,
    leave: Leave,
    /// Whose translation was kept last.
    kept: Option<Tuple>,
    /// When the host sockets were looked at last, and when to look next.
    watched_at: Instant,
    watch_at: Instant,
}

/// Does a stop leave connections on the host network?
#[derive(Clone, Copy)]
enum Leave {
    Never,
    Until(Instant),
    Always,
}

impl Leave {
    fn at(self, now: Instant) -> bool {
        match self {
            Leave::Never => false,
            Leave::Until(end) => now < end,
            Leave::Always => true,
        }
    }
}

/// A stop under way.
#[derive(Clone, Copy)]
struct Stop {
    by: Instant,
    leave: bool,
    /// A connection that is not back yet, nor given up.
    awaited: Option<Tuple>,
}

/// What a transaction needs.
#[derive(Default)]
struct Lines {
    /// `ToHost`: one, or two for a connection within this host.
    host: Vec<OwnedFd>,
    hosts_wanted: usize,
    /// Between two hosts.
    witness: Option<OwnedFd>,
}

/// Lines made by us, or not.
type Made = (ConnId, io::Result<Lines>);

/// Open what peers need, and run until SIGTERM or SIGINT and, then, until connections are where they shall stay.
pub async fn run(parts: Parts, mut inlets: Inlets) -> anyhow::Result<()> {
    let (to_arrived, mut arrived) = mpsc::channel(64);
    let (to_made, mut made) = mpsc::channel(64);
    let (to_sessions, mut sessions) = lanes();
    let (to_forwarder, mut forwarder) = lanes();
    let mut seed = [0; 8];
    getrandom::fill(&mut seed)?;
    let mut coordinator = Coordinator {
        ledger: Ledger::new(u64::from_ne_bytes(seed), Instant::now()),
        host_path: HostPath::open(parts.host_address, to_arrived.clone())?,
        forwarder: None,
        sessions: HashMap::new(),
        contacts: Contacts::default(),
        lines: HashMap::new(),
        scans: Scans::default(),
        waiting: HashMap::new(),
        turned_away: Arc::default(),
        to_sessions: to_sessions.clone(),
        to_made,
        leave: if parts.settings.leave { Leave::Always } else { Leave::Never },
        kept: None,
        watched_at: Instant::now(),
        watch_at: Instant::now(),
        parts,
    };
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let expected = coordinator.host_path.expected.clone();
    let (trust, turned_away) = (coordinator.parts.trust.clone(), Arc::clone(&coordinator.turned_away));
    let doors = session::Doors { events: to_sessions, expected, arrived: to_arrived, trust, turned_away };
    tokio::spawn(session::hear(inlets.peers, doors));
    tokio::spawn(crate::forwarder::reach(coordinator.parts.settings.forwarder.clone(), to_forwarder));
    let (mut surroundings, mut scan) = (interval(SURROUNDINGS), interval(SCAN));
    for ticks in [&mut surroundings, &mut scan] {
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    let mut stop: Option<Stop> = None;
    // How many were swapped when what the last burst had left was given back.
    let mut trimmed_at = None;
    let mut turn: u32 = 0;
    loop {
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(AT_ONCE) {
            tokio::task::yield_now().await;
        }
        let alarm = coordinator.ledger.alarm().or(stop.map(|stop| stop.by));
        tokio::select! {
            Some(event) = inlets.traced.recv() => coordinator.traced(event).await,
            Some(said) = inlets.told.recv() => coordinator.told(said).await,
            Some(event) = forwarder.recv() => coordinator.forwarder(event).await,
            Some(event) = sessions.recv() => coordinator.session(event).await,
            Some(line) = arrived.recv() => coordinator.arrived(line).await,
            Some((conn, lines)) = made.recv() => coordinator.made(conn, lines).await,
            Some(wish) = inlets.wishes.recv() => coordinator.wish(wish).await,
            () = at(alarm) => coordinator.handle(Event::Alarm).await,
            () = std::future::ready(()), if coordinator.scans.has_more() => coordinator.take_in().await,
            Some(reading) = inlets.rules.recv() => coordinator.read_rules(reading).await,
            _ = surroundings.tick() => {
                coordinator.look_around().await;
                let swapped = coordinator.ledger.swapped();
                if coordinator.ledger.is_at_rest() && trimmed_at != Some(swapped) {
                    coordinator.ledger.shrink();
                    memory::trim();
                    trimmed_at = Some(swapped);
                }
            }
            _ = scan.tick() => drop(coordinator.scan()),
            () = at(Some(coordinator.watch_at)) => coordinator.watch().await,
            _ = terminate.recv(), if stop.is_none() => stop = Some(coordinator.stop().await),
            _ = interrupt.recv(), if stop.is_none() => stop = Some(coordinator.stop().await),
        }
        if let Some(stop) = &mut stop {
            stop.awaited = coordinator.ledger.awaited(stop.awaited);
            if stop.awaited.is_none() || Instant::now() >= stop.by {
                break;
            }
        }
    }
    coordinator.finish(stop.is_some_and(|stop| stop.leave), forwarder).await;
    Ok(())
}

async fn at(alarm: Option<Instant>) {
    match alarm {
        Some(alarm) => sleep_until(alarm.into()).await,
        None => std::future::pending().await,
    }
}

impl Coordinator {
    async fn handle(&mut self, event: Event) {
        for action in self.ledger.handle(Instant::now(), event) {
            self.act(action).await;
        }
    }

    async fn traced(&mut self, event: TraceEvent) {
        let event = match event {
            TraceEvent::HostSocketClosed(names) => Event::HostSocketClosed(names),
            TraceEvent::HostSocketWaits => {
                // It may be one that the last walk has missed.
                self.parts.watch.expect_more();
                let soon = (Instant::now() + WATCH_AFTER_WORD).max(self.watched_at + SHORTEST_WATCH);
                self.watch_at = self.watch_at.min(soon);
                return;
            }
            TraceEvent::Connection(connection) => match self.parts.lookup.connection(&connection).await {
                Some(learned) => Event::Learned(learned),
                None => return,
            },
        };
        self.handle(event).await;
    }

    async fn told(&mut self, said: Told) {
        self.parts.lookup.told(said);
        self.look_for_workloads().await;
    }

    /// Connections of containers that no runtime has told of: has one now?
    async fn look_for_workloads(&mut self) {
        let is_unknown = |flow: &&Flow| !flow.workload.unknown.is_empty();
        let lookup = &mut self.parts.lookup;
        let known = |flow| lookup.renewed(flow).map(|workload| lookup.judged(flow, Some(workload)));
        let known: Vec<Event> = self.ledger.flows().filter(is_unknown).filter_map(known).collect();
        self.handle_all(known).await;
    }

    /// By the rules and the labels that there are now.
    async fn judge_all(&mut self) {
        let lookup = &mut self.parts.lookup;
        let judged = |flow| {
            let renewed = lookup.renewed(flow);
            lookup.judged(flow, renewed)
        };
        let judged: Vec<Event> = self.ledger.flows().map(judged).collect();
        self.handle_all(judged).await;
    }

    async fn handle_all(&mut self, events: Vec<Event>) {
        for event in events {
            self.handle(event).await;
        }
    }

    async fn forwarder(&mut self, event: ForwarderEvent) {
        let event = match event {
            ForwarderEvent::Up { pid, requests } => {
                self.forwarder = Some((pid, requests));
                // What is parked comes first: it is not to be taken for something new.
                self.ask(Request::List { seq: 0 }, vec![]);
                return;
            }
            ForwarderEvent::Down => {
                self.forwarder = None;
                self.scans.forget_asked();
                self.answer_all();
                Event::ForwarderDown
            }
            ForwarderEvent::Said(said) => match said {
                Said::Hello { .. } => return,
                Said::Sockets { seq, sockets } => return self.scans.scanned(seq, sockets),
                Said::Prepared { conn, holder } => Event::Prepared(conn, holder),
                Said::Refused { conn, reason } => Event::Refused(conn, reason),
                Said::ToPeer { conn, message } => Event::ToPeer(conn, message),
                Said::Ended { conn, outcome } => Event::Ended(conn, outcome),
                Said::ParkedEnded { conn } => Event::ParkedEnded(conn),
                Said::Parked { parked, .. } => {
                    let restored = parked.into_iter().filter_map(|parked| {
                        let note: Note = postcard::from_bytes(&parked.note)
                            .map_err(|error| log::warn!("{}: its note cannot be read: {error}", parked.conn))
                            .ok()?;
                        let (conn, sockets, moved) = (parked.conn, parked.host_sockets, parked.moved);
                        Some(Restored { conn, sockets, note, moved })
                    });
                    self.handle(Event::Parked(restored.collect())).await;
                    // The rules may be others than those by which an earlier router swapped them, and so may labels.
                    self.judge_all().await;
                    self.scan();
                    Event::ForwarderUp
                }
            },
        };
        self.handle(event).await;
    }

    async fn session(&mut self, event: SessionEvent) {
        let event = match event {
            SessionEvent::Up(peer, sender) => {
                self.sessions.insert(peer, sender);
                self.contacts.note(peer, true, Instant::now());
                Event::PeerUp(peer)
            }
            SessionEvent::Down(peer) => {
                self.sessions.remove(&peer);
                self.contacts.note(peer, false, Instant::now());
                Event::PeerDown(peer)
            }
            SessionEvent::Heard(node, message) => {
                if let Message::Know { tuple, .. } = &message {
                    self.make_way(node.address, tuple.reversed()).await;
                }
                Event::Peer(node, message)
            }
        };
        self.handle(event).await;
    }

    async fn arrived(&mut self, (conn, line, socket): Arrived) {
        if line == Line::Host {
            self.note_host_of(conn, &socket);
        }
        // None: given up in the meantime.
        let Some(lines) = self.lines.get_mut(&conn) else { return };
        match line {
            Line::Host => lines.host.push(socket),
            Line::Witness => lines.witness = Some(socket),
        }
        if lines.witness.is_some() && lines.host.len() == lines.hosts_wanted {
            self.handle(Event::Path(conn, true)).await;
        }
    }

    async fn made(&mut self, conn: ConnId, lines: io::Result<Lines>) {
        let ready = match lines {
            Ok(lines) => {
                self.lines.insert(conn, lines);
                true
            }
            Err(error) => {
                log::warn!("{conn}: the connections to its other host could not be made: {error}");
                false
            }
        };
        self.handle(Event::Path(conn, ready)).await;
    }

    async fn wish(&mut self, wish: Wish) {
        match wish {
            Wish::Status(answer) => drop(answer.send(self.status())),
            Wish::Figures(answer) => drop(answer.send(self.figures())),
            Wish::Flows(answer) => self.answer_after_scan(AfterScan::Flows(answer)),
            Wish::Explain(subject, answer) => self.answer_after_scan(AfterScan::Explain(subject, answer)),
            Wish::Peers(answer) => drop(answer.send(self.peer_views())),
            Wish::Leave(answer) => {
                if !matches!(self.leave, Leave::Always) {
                    self.leave = Leave::Until(Instant::now() + LEAVING);
                }
                let _ = answer.send(LEAVING);
            }
            Wish::Move(conn, direction, answer) => {
                let Some(tuple) = self.ledger.find(conn).map(|flow| flow.tuple) else {
                    let _ = answer.send(None);
                    return;
                };
                self.waiting.entry(tuple).or_default().push(answer);
                self.handle(Event::Order(tuple, direction)).await;
            }
        }
    }

    fn status(&self) -> Status {
        let (counts, rules) = (self.ledger.tally(), self.parts.lookup.rules());
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            forwarder: self.forwarder.as_ref().map(|(pid, _)| *pid),
            rules: rules.len(),
            rules_error: rules.error().map(str::to_owned),
            rules_errors: rules.errors(),
            kubernetes: self.parts.kubernetes.as_ref().map(|reach| reach.is_reached()),
            flows: self.ledger.len(),
            swapped: self.ledger.swapped(),
            swaps: counts.swaps,
            swap_backs: counts.swap_backs,
            turned_away: self.turned_away.load(Relaxed),
            false_claims: counts.false_claims,
            refused: counts
                .refused
                .iter()
                .map(|(reason, count)| (reason.label().to_owned(), *count))
                .collect(),
            drops: self.parts.tracer.drops() + counts.overflow,
            peers: self.ledger.peers().clone(),
        }
    }

    /// Ask the forwarder for all sockets of our containers; its answer comes to [`Coordinator::scanned`].
    async fn look_around(&mut self) {
        // A scan that has not come for so long is not worth waiting for.
        if self.scans.forget_overdue() {
            self.answer_all();
        }
        self.parts.lookup.look_at_interfaces().await;
        self.look_for_pods().await;
        if self.parts.lookup.pods_are_relabelled() {
            self.judge_all().await;
        } else {
            self.look_for_workloads().await;
        }
        self.keep_translations().await;
    }

    /// Of some of the swapped connections, in turn: a few thousand must not hold up what is under way.
    async fn keep_translations(&mut self) {
        let is_translated = |flow: &&Flow| flow.translated.is_some() && flow.on_host().is_some();
        let names = |flow: &Flow| (flow.conn, flow.tuple);
        let some: Vec<(ConnId, Tuple)> =
            self.ledger.flows_after(self.kept).filter(is_translated).map(names).take(KEPT_AT_ONCE).collect();
        // At the end it begins anew.
        self.kept = some.last().map(|(_, tuple)| *tuple).filter(|_| some.len() == KEPT_AT_ONCE);
        for (conn, tuple) in some {
            if !self.parts.lookup.keep_translation(tuple) {
                self.handle(Event::TranslationLost(conn)).await;
            }
        }
    }

    async fn read_rules(&mut self, reading: Reading) {
        if self.parts.lookup.take_rules(reading) {
            self.judge_all().await;
        }
    }

    /// Is the host path of every swapped connection alive?
    async fn watch(&mut self) {
        self.watched_at = Instant::now();
        self.watch_at = self.watched_at + WATCH;
        if self.ledger.swapped() == 0 {
            return;
        }
        match self.parts.watch.stalled() {
            Ok(stalled) => {
                let waiting =
                    |stalled: &HostSocket| (stalled.names.swap, stalled.sample.unacknowledged_bytes);
                self.handle(Event::Stalled(stalled.iter().map(waiting).collect())).await;
            }
            Err(error) => log::warn!("{error}"),
        }
    }

    async fn stop(&mut self) -> Stop {
        let leave = self.leave.at(Instant::now());
        let swapped = self.ledger.swapped();
        if leave {
            log::info!("stopping; {swapped} connections stay on the host network");
        } else {
            log::info!("stopping; {swapped} connections go back to the overlay");
        }
        self.handle(Event::Stop { leave }).await;
        Stop { by: Instant::now() + STOP, leave, awaited: None }
    }

    /// A router may be stopped before it has reached its forwarder: it is waited for.
    async fn last_scan(
        &mut self,
        forwarder: &mut lanes::Receiver<ForwarderEvent>,
    ) -> Option<Vec<SocketRecord>> {
        let mut asked = self.scan();
        loop {
            match forwarder.recv().await? {
                ForwarderEvent::Up { pid, requests } => {
                    self.forwarder = Some((pid, requests));
                    asked = self.scan();
                }
                ForwarderEvent::Down => self.forwarder = None,
                ForwarderEvent::Said(Said::Sockets { seq, sockets }) if Some(seq) == asked => {
                    return Some(sockets);
                }
                ForwarderEvent::Said(_) => {}
            }
        }
    }

    /// Take away what nobody needs any more.
    async fn finish(mut self, leave: bool, mut forwarder: lanes::Receiver<ForwarderEvent>) {
        // The answer to a last question shows that the forwarder has heard all that came before.
        let time = if self.forwarder.is_some() { LAST_SCAN } else { FRESH };
        let sockets = timeout(time, self.last_scan(&mut forwarder)).await.ok().flatten();
        // What was said last is on its way to the peers.
        let sessions = std::mem::take(&mut self.sessions);
        for sender in sessions.into_values() {
            let _ =
                timeout(FRESH, async { sender.reserve_many(sender.max_capacity()).await.map(drop) }).await;
        }
        // Also of connections that no router knows any more, because their forwarder is gone: without the programs they
        // would lose their names.
        let swapped = match (sockets, self.parts.watch.host_sockets()) {
            (Some(sockets), Ok(seen)) => {
                // Other programs of the host have sockets in its network too, and a router in a pod may not look at them.
                let named: HashSet<SocketInode> = seen.iter().map(|seen| seen.socket).collect();
                let left = |record: &&SocketRecord| {
                    named.contains(&record.socket) && self.parts.lookup.is_swapped(record)
                };
                sockets.iter().filter(left).count()
            }
            (None, _) => return log::warn!("no forwarder says what is swapped: the pinned programs stay"),
            (_, Err(error)) => return log::warn!("{error}: the pinned programs stay"),
        };
        match swapped {
            0 => {
                if let Err(error) = self.parts.identity.unpin() {
                    log::warn!("{}: cannot be removed: {error}", self.parts.settings.pins.display());
                }
            }
            swapped if !leave => {
                log::warn!("{swapped} connections could not go back and stay on the host network");
            }
            _ => {}
        }
    }
}
