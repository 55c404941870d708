// SPDX-License-Identifier: Apache-2.0
//! Connections as they are seen over time: how fast each carries, and what workloads carry together. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    time::Instant,
};

use serde::Serialize;

use crate::{
    coordinator::{FlowView, OtherHost, Shown},
    saving::encapsulation_bytes,
};

/// Remembers what was seen, so that the next look gives rates.
#[derive(Debug, Default)]
pub struct Sampler {
    last: Option<(Instant, Seen)>,
}

/// Bytes on the overlay and on the host path, of each.
type Seen = HashMap<Key, (u64, u64)>;

/// An end of a connection: within this host, both have one name.
type Key = (String, SocketAddr);

/// A connection now.
#[derive(Clone, Debug, Serialize)]
pub struct Live {
    #[serde(flatten)]
    pub flow: FlowView,
    /// Both ways, since the look before.
    pub overlay_bytes_per_second: u64,
    pub host_bytes_per_second: u64,
}

/// What connections have together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sum {
    pub on_overlay: u64,
    pub on_host: u64,
    pub moving: u64,
    pub overlay_bytes_per_second: u64,
    pub host_bytes_per_second: u64,
    pub overlay_bytes: u64,
    pub host_bytes: u64,
}

/// The connections of one workload with one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    pub workload: String,
    pub other_host: OtherHost,
    #[serde(flatten)]
    pub sum: Sum,
}

impl Sampler {
    pub fn look(&mut self, now: Instant, flows: Vec<FlowView>) -> Vec<Live> {
        let key = |flow: &FlowView| (flow.conn.clone(), flow.local);
        let (before, seconds) = match self.last.take() {
            Some((when, before)) => (before, now.saturating_duration_since(when).as_secs_f64()),
            None => (HashMap::new(), 0.0),
        };
        let rate = |now: u64, before: u64| {
            if seconds > 0.0 { (now.saturating_sub(before) as f64 / seconds) as u64 } else { 0 }
        };
        let seen = flows.iter().map(|flow| (key(flow), (flow.overlay_bytes, flow.host_bytes))).collect();
        self.last = Some((now, seen));
        flows
            .into_iter()
            .map(|flow| {
                // A new one has shown no rate yet.
                let (overlay, host) =
                    before.get(&key(&flow)).copied().unwrap_or((flow.overlay_bytes, flow.host_bytes));
                Live {
                    overlay_bytes_per_second: rate(flow.overlay_bytes, overlay),
                    host_bytes_per_second: rate(flow.host_bytes, host),
                    flow,
                }
            })
            .collect()
    }
}

impl Live {
    pub fn bytes_per_second(&self) -> u64 {
        self.overlay_bytes_per_second + self.host_bytes_per_second
    }
}

impl Sum {
    pub fn of<'a>(lives: impl IntoIterator<Item = &'a Live>) -> Sum {
        lives.into_iter().fold(Sum::default(), Sum::with)
    }

    fn with(mut self, live: &Live) -> Sum {
        match live.flow.path {
            Shown::Overlay => self.on_overlay += 1,
            Shown::Host => self.on_host += 1,
            Shown::Moving => self.moving += 1,
        }
        self.overlay_bytes_per_second += live.overlay_bytes_per_second;
        self.host_bytes_per_second += live.host_bytes_per_second;
        self.overlay_bytes += live.flow.overlay_bytes;
        self.host_bytes += live.flow.host_bytes;
        self
    }

    pub fn connections(&self) -> u64 {
        self.on_overlay + self.on_host + self.moving
    }

    pub fn bytes_per_second(&self) -> u64 {
        self.overlay_bytes_per_second + self.host_bytes_per_second
    }

    /// Of VXLAN headers, at least.
    pub fn saved_bytes(&self) -> u64 {
        encapsulation_bytes(self.host_bytes)
    }
}

impl std::ops::Add for Sum {
    type Output = Sum;

    fn add(self, other: Sum) -> Sum {
        Sum {
            on_overlay: self.on_overlay + other.on_overlay,
            on_host: self.on_host + other.on_host,
            moving: self.moving + other.moving,
            overlay_bytes_per_second: self.overlay_bytes_per_second + other.overlay_bytes_per_second,
            host_bytes_per_second: self.host_bytes_per_second + other.host_bytes_per_second,
            overlay_bytes: self.overlay_bytes + other.overlay_bytes,
            host_bytes: self.host_bytes + other.host_bytes,
        }
    }
}

/// By workload and other host, in their order.
pub fn groups(lives: &[Live]) -> Vec<Group> {
    let mut groups: BTreeMap<(&str, OtherHost), Sum> = BTreeMap::new();
    for live in lives {
        let sum = groups.entry((&live.flow.workload, live.flow.other_host)).or_default();
        *sum = sum.with(live);
    }
    let group = |((workload, other_host), sum): ((&str, OtherHost), Sum)| Group {
        workload: workload.to_owned(),
        other_host,
        sum,
    };
    groups.into_iter().map(group).collect()
}

#[cfg(test)]
pub mod tests {
    use std::time::Duration;

    use super::*;
    use crate::trace::Side;

    pub fn flow(conn: &str, workload: &str, path: Shown, host_bytes: u64) -> FlowView {
        FlowView {
            conn: conn.into(),
            local: "10.244.1.9:4000".parse().unwrap(),
            remote: "10.244.2.9:80".parse().unwrap(),
            workload: workload.into(),
            side: Side::Client,
            path,
            age_ms: 1000,
            bytes_sent: 0,
            bytes_received: 0,
            overlay_bytes: 0,
            host_bytes,
            other_host: OtherHost::Peer("192.0.2.2".parse().unwrap()),
            swaps: 1,
            pause_us: None,
            freeze_us: None,
            settle_us: None,
            install_us: None,
            unread_bytes: None,
            together: None,
            way_back: None,
            reason: None,
            reason_text: None,
        }
    }

    #[test]
    fn a_rate_is_what_was_carried_between_two_looks() {
        let (mut sampler, now) = (Sampler::default(), Instant::now());
        let first = sampler.look(now, vec![flow("a", "web", Shown::Host, 5_000)]);
        assert_eq!(first[0].bytes_per_second(), 0);
        let later = vec![flow("a", "web", Shown::Host, 7_000), flow("b", "web", Shown::Host, 9_000)];
        let second = sampler.look(now + Duration::from_secs(2), later);
        let rates: Vec<_> = second.iter().map(Live::bytes_per_second).collect();
        assert_eq!(rates, [1_000, 0], "one that is new has no rate yet");
    }

    #[test]
    fn connections_of_a_workload_with_a_host_are_one_group() {
        let flows = vec![
            flow("a", "web", Shown::Host, 1398),
            flow("b", "web", Shown::Overlay, 0),
            flow("c", "db", Shown::Moving, 0),
        ];
        let groups = groups(&Sampler::default().look(Instant::now(), flows));
        let shown: Vec<_> = groups.iter().map(|g| (g.workload.as_str(), g.sum.connections())).collect();
        assert_eq!(shown, [("db", 1), ("web", 2)]);
        assert_eq!((groups[1].sum.on_host, groups[1].sum.saved_bytes()), (1, 50));
    }
}
