// SPDX-License-Identifier: Apache-2.0
//! What the page shows: workloads and hosts, and of the connections those that carry most. Pure.

use std::net::IpAddr;

use serde::Serialize;

use crate::{
    coordinator::Status,
    live::{Group, Live, Sum, groups},
};

/// So many groups and connections are shown; of the others, their number. A page with all of 10,000 would be of no use.
const MAX_GROUPS: usize = 200;
const MAX_FLOWS: usize = 200;

#[derive(Debug, Serialize)]
pub struct Page {
    host: IpAddr,
    status: Status,
    sum: Sum,
    /// Of VXLAN headers, at least.
    saved_bytes: u64,
    groups: Vec<Group>,
    /// Of those that are not shown.
    more_groups: Sum,
    flows: Vec<Live>,
    more_flows: usize,
}

pub fn shown(host: IpAddr, status: &Status, mut lives: Vec<Live>) -> Page {
    let sum = Sum::of(&lives);
    let mut groups = groups(&lives);
    groups.sort_by_key(|group| std::cmp::Reverse((group.sum.bytes_per_second(), group.sum.connections())));
    let rest = groups.split_off(groups.len().min(MAX_GROUPS));
    lives.sort_by_key(|live| {
        let bytes = live.flow.overlay_bytes + live.flow.host_bytes;
        std::cmp::Reverse((live.bytes_per_second(), bytes))
    });
    let more_flows = lives.len().saturating_sub(MAX_FLOWS);
    lives.truncate(MAX_FLOWS);
    Page {
        host,
        status: status.clone(),
        sum,
        saved_bytes: sum.saved_bytes(),
        groups,
        more_groups: rest.iter().fold(Sum::default(), |sum, group| sum + group.sum),
        flows: lives,
        more_flows,
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, time::Instant};

    use super::*;
    use crate::{
        coordinator::Shown,
        live::{Sampler, tests::flow},
    };

    #[test]
    fn of_ten_thousand_connections_those_that_carry_most_are_shown() {
        let status = Status {
            version: "1".into(),
            pid: 1,
            forwarder: None,
            rules: 0,
            rules_error: None,
            rules_errors: 0,
            kubernetes: None,
            flows: 10_000,
            swapped: 0,
            swaps: 0,
            swap_backs: 0,
            turned_away: 0,
            false_claims: 0,
            refused: BTreeMap::new(),
            drops: 0,
            peers: BTreeMap::new(),
        };
        let flows =
            (0..10_000).map(|n| flow(&n.to_string(), &format!("pod{}", n % 300), Shown::Host, n)).collect();
        let lives = Sampler::default().look(Instant::now(), flows);
        let page = shown("192.0.2.1".parse().unwrap(), &status, lives);
        assert_eq!((page.flows.len(), page.more_flows), (MAX_FLOWS, 10_000 - MAX_FLOWS));
        assert_eq!(page.flows[0].flow.conn, "9999");
        let shown: u64 = page.groups.iter().map(|group| group.sum.connections()).sum();
        assert_eq!(shown + page.more_groups.connections(), 10_000);
        assert!(serde_json::to_vec(&page).unwrap().len() < 300_000);
    }
}
