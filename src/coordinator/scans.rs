// SPDX-License-Identifier: Apache-2.0
//! Lists of all sockets of this host, which the forwarder makes, and what is taken in from them: a few sockets at a time,
//! because each is looked up, there may be thousands that nobody knew, and moves are under way.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::Instant,
};

use forwarder_api::{Request, SocketInode, SocketRecord};

use super::{Coordinator, FRESH, SCAN, asked::AfterScan, ledger::Event, lookup};

/// So many sockets are looked up at once: some 20 µs each.
const AT_ONCE: usize = 4;

/// Scans under way, and who waits for them.
#[derive(Default)]
pub(super) struct Scans {
    last: u64,
    began: BTreeMap<u64, Instant>,
    /// Those that have come; the first is being taken in.
    come: VecDeque<Scan>,
    /// Since when scans show the sockets that are too young to be known. None: there was no scan yet.
    young: Option<Sightings>,
    waiting: Vec<(u64, AfterScan)>,
}

type Sightings = HashMap<SocketInode, Instant>;

struct Scan {
    seq: u64,
    began: Instant,
    records: Vec<SocketRecord>,
    /// How many of them are done.
    taken: usize,
    young: Sightings,
}

impl Scans {
    pub(super) fn scanned(&mut self, seq: u64, records: Vec<SocketRecord>) {
        if let Some(began) = self.began.remove(&seq) {
            self.come.push_back(Scan { seq, began, records, taken: 0, young: HashMap::new() });
        }
    }

    pub(super) fn has_more(&self) -> bool {
        !self.come.is_empty()
    }

    pub(super) fn wait_for(&mut self, seq: u64, asked: AfterScan) {
        self.waiting.push((seq, asked));
    }

    pub(super) fn take_waiting(&mut self) -> Vec<AfterScan> {
        std::mem::take(&mut self.waiting).into_iter().map(|(_, asked)| asked).collect()
    }

    /// Whoever waits for one that has not come for long has waited enough.
    pub(super) fn forget_overdue(&mut self) -> bool {
        let are_overdue = self.began.values().any(|began| began.elapsed() > FRESH);
        self.began.retain(|_, began| began.elapsed() < SCAN);
        are_overdue
    }

    /// Nobody will answer.
    pub(super) fn forget_asked(&mut self) {
        self.began.clear();
    }

    /// Since when a socket that is not known has been seen.
    pub(super) fn seen_since(&self, socket: SocketInode) -> Option<Instant> {
        self.young.as_ref()?.get(&socket).copied()
    }
}

impl Coordinator {
    pub(super) fn scan(&mut self) -> Option<u64> {
        self.forwarder.as_ref()?;
        self.scans.last += 1;
        let seq = self.scans.last;
        self.scans.began.insert(seq, Instant::now());
        self.ask(Request::Scan { seq, cgroup_id: self.parts.scope.cgroup_id }, vec![]);
        Some(seq)
    }

    /// The next sockets of the first scan that has come.
    pub(super) async fn take_in(&mut self) {
        let Some(mut scan) = self.scans.come.pop_front() else { return };
        let mut looked_up = 0;
        while looked_up < AT_ONCE {
            let Some(record) = scan.records.get(scan.taken) else { return self.taken_in(scan).await };
            scan.taken += 1;
            let tuple = lookup::tuple_of(record);
            // Most are known as they are: nothing about them needs to be looked up again.
            if self.ledger.knows(tuple, record.socket) {
                continue;
            }
            // Tracing will tell of it, but for what it has missed. Who is in the first scan may be of any age.
            let before = self.scans.young.as_ref();
            let since = before.map(|before| *before.get(&record.socket).unwrap_or(&scan.began));
            let age = since.map(|since| scan.began.saturating_duration_since(since));
            if !self.ledger.knows_of(tuple) && !self.parts.lookup.is_old_enough(record, age) {
                scan.young.insert(record.socket, since.unwrap_or(scan.began));
                continue;
            }
            looked_up += 1;
            if let Some(learned) = self.parts.lookup.record(record, scan.began).await {
                self.handle(Event::Learned(learned)).await;
            }
        }
        self.scans.come.push_front(scan);
    }

    async fn taken_in(&mut self, scan: Scan) {
        let Scan { seq, began, records, young, .. } = scan;
        self.scans.young = Some(young);
        self.take_in_stranded(&records).await;
        let bytes = |record: &SocketRecord| (record.socket, (record.bytes_sent, record.bytes_received));
        let sockets = records.iter().map(bytes).collect();
        self.handle(Event::Scanned { began, sockets }).await;
        let (ready, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.scans.waiting).into_iter().partition(|(of, _)| *of <= seq);
        self.scans.waiting = later;
        self.answer(ready.into_iter().map(|(_, asked)| asked).collect(), &records);
    }

    /// Of swapped connections that were left alone when router and forwarder died, the host sockets remain.
    async fn take_in_stranded(&mut self, records: &[SocketRecord]) {
        let known: HashSet<SocketInode> = self.ledger.flows().map(|flow| flow.socket).collect();
        let is_stranded =
            |record: &&SocketRecord| !known.contains(&record.socket) && self.parts.lookup.is_swapped(record);
        let stranded: Vec<&SocketRecord> = records.iter().filter(is_stranded).collect();
        if stranded.is_empty() {
            return;
        }
        let seen = match self.parts.watch.host_sockets() {
            Ok(seen) => seen,
            Err(error) => return log::warn!("{error}"),
        };
        for record in stranded {
            let names = seen.iter().find(|seen| seen.socket == record.socket).map(|seen| seen.names);
            if let Some(names) = names
                && let Some(stranded) = self.parts.lookup.stranded(record, names).await
            {
                self.handle(Event::Stranded(stranded)).await;
            }
        }
    }
}
