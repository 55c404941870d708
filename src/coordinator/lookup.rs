// SPDX-License-Identifier: Apache-2.0
//! What is to be known about a connection before the ledger hears of it: its container, what the rules say, and where
//! its other end is.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    sync::Arc,
    time::{Duration, Instant},
};

use forwarder_api::{Refusal, SocketInode, SocketRecord};
use tokio::sync::watch;

use super::{
    flow::{Flow, Home},
    ledger::{Event, Learned, Stranded},
    wire::Tuple,
};
use crate::{
    attachment::Attachments,
    conntrack::{Conntrack, ConntrackError},
    identity::Names,
    peers::{Facts, Interfaces, PeerAddress, Peers, Source, Whereabouts},
    process::Processes,
    rules::{After, Candidate, InForce, Judged, Outcome, Reading, RuleSet, Verdict, is_never_swapped},
    trace::{Connection, Side},
    workload::{Told, Workload, Workloads},
};

/// How long what was looked up of an address is believed, and of how many it is kept.
const FACTS: Duration = Duration::from_secs(2);
const MAX_FACTS: usize = 4096;
/// Of include/net/tcp_states.h.
const TCP_ESTABLISHED: u8 = 1;

pub struct Lookup {
    netlink: rtnetlink::Handle,
    interfaces: Interfaces,
    attachments: Attachments,
    peers: Peers,
    /// None where the kernel has none.
    conntrack: Option<Conntrack>,
    workloads: Workloads,
    /// Each once: a container may have thousands of connections.
    containers: HashSet<Arc<Workload>>,
    processes: Processes,
    /// Whoever sees new connections reads them as well.
    rules: watch::Sender<RuleSet>,
    in_force: InForce,
    own_netns: u32,
    facts: HashMap<IpAddr, (Instant, Facts)>,
    /// Who told of each peer.
    sources: HashMap<PeerAddress, Source>,
    /// Of the pods' hosts, when they were last looked at for connections without a peer.
    pods_version: u64,
    /// Of the labels of this host's pods, when connections were last held against the rules for them.
    labels_version: u64,
}

/// What the kernel shows of a connection, whichever way.
struct Seen {
    tuple: Tuple,
    side: Side,
    v6: bool,
    netns: u32,
    socket: SocketInode,
}

fn candidate(server: IpAddr, client: IpAddr, workload: &Workload) -> Candidate<'_> {
    let Workload { pod_labels, container_labels, .. } = workload;
    Candidate { server, client, pod_labels, container_labels }
}

pub fn side_of(record: &SocketRecord) -> Side {
    if record.accepted { Side::Server } else { Side::Client }
}

pub fn tuple_of(record: &SocketRecord) -> Tuple {
    Tuple { local: record.local.into(), remote: record.remote.into() }
}

impl Lookup {
    pub fn new(
        netlink: rtnetlink::Handle,
        interfaces: Interfaces,
        peers: Peers,
        workloads: Workloads,
        processes: Processes,
        rules: watch::Sender<RuleSet>,
    ) -> io::Result<Lookup> {
        let own_netns = std::fs::metadata("/proc/self/ns/net")?.ino() as u32;
        let in_force = InForce::new(rules.borrow().clone());
        let warn =
            |error: &ConntrackError| log::warn!("{error}: connections through a Service stay on the overlay");
        let conntrack = Conntrack::open().inspect_err(warn).ok();
        Ok(Lookup {
            attachments: Attachments::new(netlink.clone()),
            netlink,
            interfaces,
            peers,
            conntrack,
            workloads,
            containers: HashSet::new(),
            processes,
            rules,
            in_force,
            own_netns,
            facts: HashMap::new(),
            sources: HashMap::new(),
            pods_version: 0,
            labels_version: 0,
        })
    }

    pub fn rules(&self) -> &InForce {
        &self.in_force
    }

    /// What the rules say of this connection, one by one, and when it is old enough.
    pub fn judge(&self, side: Side, tuple: Tuple, workload: &Workload) -> (Vec<Judged>, After) {
        let (server, client) = side.server_and_client(tuple.local.ip(), tuple.remote.ip());
        let rules = self.rules.borrow();
        (rules.judge(&candidate(server, client, workload)), rules.after(server, client))
    }

    /// Which of its ends' addresses keeps it on the overlay, whatever the rules say.
    pub fn never_swapped(&self, ends: Tuple) -> Option<IpAddr> {
        let addresses = [ends.local.ip(), ends.remote.ip()];
        addresses.into_iter().find(|address| is_never_swapped(*address, &self.interfaces.addresses))
    }

    /// The container of a process.
    pub fn container(&mut self, tgid: u32) -> io::Result<Workload> {
        self.workloads.of_process(tgid)
    }

    /// Is this socket in the host's own network?
    pub fn is_in_own_network(&self, record: &SocketRecord) -> bool {
        record.netns == self.own_netns
    }

    /// A connection that tracing has shown; `None` if it is the host's own, or left to the next scan.
    pub async fn connection(&mut self, seen: &Connection) -> Option<Learned> {
        let tuple = Tuple { local: seen.local.into(), remote: seen.remote.into() };
        let known = Seen { tuple, side: seen.side, v6: seen.v6, netns: seen.netns, socket: seen.socket };
        let tgid = self.processes.find(seen.cgroup_id, seen.netns).unwrap_or_else(|error| {
            log::warn!("{error}");
            None
        })?;
        self.learned(known, tgid, seen.born).await
    }

    /// A socket that a scan has found; `None` if it is the host's own, or not established.
    pub async fn record(&mut self, record: &SocketRecord, began: Instant) -> Option<Learned> {
        if record.state != TCP_ESTABLISHED {
            return None;
        }
        let tuple = tuple_of(record);
        let side = side_of(record);
        let known = Seen { tuple, side, v6: record.v6, netns: record.netns, socket: record.socket };
        self.learned(known, record.tgid, began).await
    }

    /// Is a connection of this age (unknown: it is older than we are) old enough to be swapped?
    pub fn is_old_enough(&self, record: &SocketRecord, age: Option<Duration>) -> bool {
        let (server, client) = side_of(record).server_and_client(record.local.ip(), record.remote.ip());
        let after = self.rules.borrow().after(server, client);
        after.is_reached(age.unwrap_or(Duration::MAX), record.bytes_sent + record.bytes_received)
    }

    /// Is it a host socket that a container has? Its process lives in another network than the socket. Whose process we
    /// may not look at counts as one.
    pub fn is_swapped(&self, record: &SocketRecord) -> bool {
        let of_process = std::fs::metadata(format!("/proc/{}/ns/net", record.tgid));
        record.netns == self.own_netns && of_process.map_or(true, |ns| ns.ino() as u32 != self.own_netns)
    }

    /// A host socket that a container has, and nobody knows why; `None` if it is not established.
    pub async fn stranded(&mut self, record: &SocketRecord, names: Names) -> Option<Stranded> {
        if record.state != TCP_ESTABLISHED {
            return None;
        }
        let tuple = Tuple { local: names.local, remote: names.remote };
        let side = side_of(record);
        let workload = self.workload(record.tgid)?;
        let (home, declined) = (self.home(tuple).await, self.verdict(side, tuple, &workload));
        let (swap, v6, socket) = (names.swap, record.v6, record.socket);
        Some(Stranded { tuple, swap, side, v6, socket, workload, home, declined })
    }

    async fn learned(&mut self, known: Seen, tgid: u32, seen: Instant) -> Option<Learned> {
        let Seen { tuple, side, v6, netns, socket } = known;
        if netns == self.own_netns {
            return None;
        }
        let workload = self.workload(tgid)?;
        let translated = self.translation(tuple);
        let remote = translated.map_or(tuple.remote, |beyond| beyond.remote);
        let home = match self.home(Tuple { local: tuple.local, remote }).await {
            Home::Peer(_) if !self.is_attached(tgid).await => Home::Nowhere(Refusal::ForeignNamespace),
            home => home,
        };
        let declined = self.verdict(side, tuple, &workload);
        Some(Learned { tuple, translated, side, v6, netns, socket, workload, home, declined, seen })
    }

    /// What this host's address translation makes of it, if anything is known of that.
    fn translation(&mut self, tuple: Tuple) -> Option<Tuple> {
        let asked = self.conntrack.as_mut()?.translation(tuple);
        asked.unwrap_or_else(|error| {
            log::debug!("{} - {}: {error}", tuple.local, tuple.remote);
            None
        })
    }

    /// Is its address still translated as it was? Otherwise its next packet on the overlay goes to somebody else.
    pub fn is_translated_still(&mut self, flow: &Flow) -> bool {
        flow.translated.is_none() || self.translation(flow.tuple) == flow.translated
    }

    /// No packet of a swapped connection passes the translation, which is to be there when it goes back. False: it is not
    /// there any more.
    pub fn keep_translation(&mut self, tuple: Tuple) -> bool {
        let Some(conntrack) = &mut self.conntrack else { return false };
        conntrack.keep(tuple).unwrap_or_else(|error| {
            log::debug!("{} - {}: its translation may not last: {error}", tuple.local, tuple.remote);
            true
        })
    }

    fn workload(&mut self, tgid: u32) -> Option<Arc<Workload>> {
        let workload = self
            .workloads
            .of_process(tgid)
            .inspect_err(|error| log::warn!("process {tgid}: its container cannot be told now: {error}"))
            .ok()?;
        Some(self.once(workload))
    }

    pub fn told(&mut self, said: Told) {
        self.workloads.learn(said);
    }

    /// Its container, if more is known of that now, or something else.
    pub fn renewed(&mut self, flow: &Flow) -> Option<Arc<Workload>> {
        let renewed = self.workloads.renewed(&flow.workload)?;
        Some(self.once(renewed))
    }

    /// Have pods of this host been labelled otherwise since this was last asked?
    pub fn pods_are_relabelled(&mut self) -> bool {
        let version = self.peers.pods().labels_version();
        std::mem::replace(&mut self.labels_version, version) != version
    }

    fn once(&mut self, workload: Workload) -> Arc<Workload> {
        if let Some(known) = self.containers.get(&workload) {
            return Arc::clone(known);
        }
        self.containers.retain(|known| Arc::strong_count(known) > 1);
        let workload = Arc::new(workload);
        self.containers.insert(Arc::clone(&workload));
        workload
    }

    async fn is_attached(&mut self, tgid: u32) -> bool {
        self.attachments.is_attached(tgid).await.unwrap_or_else(|error| {
            log::warn!("process {tgid}: nothing is known of where its network is attached: {error}");
            false
        })
    }

    /// What the rules say of a connection that was held against them before. Until there are any, what is swapped stays.
    pub fn judged(&self, flow: &Flow, renewed: Option<Arc<Workload>>) -> Event {
        let workload = renewed.as_ref().unwrap_or(&flow.workload);
        let declined = match flow.on_host() {
            Some(_) if self.rules.borrow().are_awaited() => flow.declined,
            Some(_) | None => self.verdict(flow.side, flow.tuple, workload),
        };
        match renewed {
            Some(workload) => Event::Workload(flow.tuple, workload, declined),
            None => Event::Verdict(flow.tuple, declined),
        }
    }

    /// Why our rules do not want it swapped.
    fn verdict(&self, side: Side, tuple: Tuple, workload: &Workload) -> Option<Refusal> {
        let (server, client) = side.server_and_client(tuple.local.ip(), tuple.remote.ip());
        match self.rules.borrow().decide(&candidate(server, client, workload)) {
            Verdict::Swap => None,
            Verdict::Leave { why } => {
                log::debug!("{} - {}: left on the overlay: {why}", tuple.local, tuple.remote);
                Some(Refusal::NoRuleMatches)
            }
        }
    }

    async fn home(&mut self, ends: Tuple) -> Home {
        if self.never_swapped(ends).is_some() {
            return Home::Nowhere(Refusal::HostAddress);
        }
        let of = ends.remote.ip();
        match self.facts(of).await.whereabouts(&self.interfaces.addresses) {
            Whereabouts::Peer(peer, source) => {
                self.sources.insert(peer, source);
                Home::Peer(peer)
            }
            Whereabouts::Host => Home::Nowhere(Refusal::HostAddress),
            Whereabouts::NotOnOverlay => Home::Nowhere(Refusal::NoPeerHost),
        }
    }

    /// Is `heard` another address of the host of a connection's other end, at which that host is to be spoken to instead
    /// of `home`?
    pub async fn makes_way(&mut self, of: IpAddr, home: PeerAddress, heard: PeerAddress) -> bool {
        let source = self.facts(of).await.makes_way(home, heard);
        if let Some(source) = source {
            self.sources.insert(heard, source);
        }
        source.is_some()
    }

    /// Who told of this peer, if it was told since we started.
    pub fn source_of(&self, peer: PeerAddress) -> Option<Source> {
        self.sources.get(&peer).copied()
    }

    /// Has more been heard of pods' hosts since this was last asked?
    pub fn knows_more_pods(&mut self) -> bool {
        let version = self.peers.pods().hosts_version();
        std::mem::replace(&mut self.pods_version, version) != version
    }

    /// The host that this pod's status names, if it is another than this.
    pub fn host_of_pod(&mut self, pod: IpAddr) -> Option<PeerAddress> {
        let host = self.peers.pods().host_of(pod).filter(|host| !self.interfaces.addresses.contains(host))?;
        self.sources.insert(host, Source::Kubernetes);
        Some(host)
    }

    async fn facts(&mut self, of: IpAddr) -> Facts {
        if let Some((when, known)) = self.facts.get(&of)
            && when.elapsed() < FACTS
        {
            return *known;
        }
        let found = self.peers.facts(of, &self.interfaces).await.unwrap_or_else(|error| {
            log::warn!("{of}: no peer can be found: {error}");
            Facts::default()
        });
        if self.facts.len() >= MAX_FACTS {
            self.facts.clear();
        }
        self.facts.insert(of, (Instant::now(), found));
        found
    }

    /// Look again at the addresses of this host.
    pub async fn look_at_interfaces(&mut self) {
        let (overlay_if, host_if) = (&self.interfaces.overlay_if, &self.interfaces.host_if);
        match Interfaces::find(&self.netlink, overlay_if, host_if).await {
            Ok(interfaces) => self.interfaces = interfaces,
            Err(error) => log::debug!("{error}"),
        }
    }

    /// True if the rules are others than before; wrong ones are not taken.
    pub fn take_rules(&mut self, reading: Reading) -> bool {
        match self.in_force.take(reading) {
            Outcome::Changed(rules) => {
                log::info!("{} rules are in force", rules.len());
                self.rules.send_replace(rules);
                true
            }
            Outcome::Wrong(error) => {
                log::error!("the rules stay as they were: {error}");
                false
            }
            Outcome::Same => false,
        }
    }
}
