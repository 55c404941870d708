// SPDX-License-Identifier: Apache-2.0
//! Connections whose host path carries nothing any more go back, and stay off it for a while.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use forwarder_api::{Direction, Refusal};

use super::{Action, Cause, Flow, Home, Ledger, PURSUIT, Path, Tuple};

/// How long a connection stays off the host network that has failed it: doubled each time, from the first to the
/// last. One that was carried for longer than the last begins anew.
const FIRST_BACKOFF: Duration = Duration::from_secs(30);
const LAST_BACKOFF: Duration = Duration::from_secs(600);
/// How soon the way back is tried anew after it was refused for good.
const PURSUE_AGAIN: Duration = Duration::from_secs(5);

impl Ledger {
    /// `swaps` are all that are stalled now, with the bytes that wait at each: the others are carried.
    pub(super) fn stalled(&mut self, swaps: &HashMap<u64, u32>) {
        if swaps.is_empty() && !self.any_stalled {
            return;
        }
        let concerned = |flow: &Flow| -> Option<(Tuple, Option<u32>)> {
            let on_host = flow.on_host()?;
            let waiting = swaps.get(&on_host.swap).copied();
            (waiting.is_some() || on_host.stalled.is_some()).then_some((flow.tuple, waiting))
        };
        let concerned: Vec<_> = self.flows().filter_map(concerned).collect();
        self.any_stalled = !concerned.is_empty();
        for (tuple, waiting) in concerned {
            match waiting {
                _ if self.is_in_a_move(tuple) => {}
                Some(bytes) => self.leave_host_path(tuple, bytes),
                None => self.stay_on_host_path(tuple),
            }
        }
    }

    fn leave_host_path(&mut self, tuple: Tuple, unacknowledged_bytes: u32) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        let Path::Host(on_host) = &mut flow.path else { return };
        if on_host.stalled.is_some_and(|retry| retry > self.now) {
            return;
        }
        let is_new = on_host.stalled.replace(self.now + PURSUE_AGAIN).is_none();
        let (conn, home, way_back) = (flow.conn, flow.home, on_host.way_back);
        // Whoever has ordered a move wants it back as well, or is answered at once.
        let has_order = flow.order.is_some();
        if is_new {
            self.refuse(tuple, Refusal::HostPathStalled);
            self.act(Action::ReportStall { conn, tuple, unacknowledged_bytes });
        }
        match home {
            _ if has_order => {}
            _ if !way_back => self.refuse(tuple, Refusal::NotParked),
            Home::Peer(peer) if !self.is_up(peer) => self.refuse(tuple, Refusal::PeerUnreachable),
            Home::Peer(_) | Home::SameHost | Home::Nowhere(_) => {
                self.order(tuple, Direction::ToOverlay, Cause::HostPath, Some(PURSUIT));
            }
        }
    }

    /// It carries again before the connection could leave.
    fn stay_on_host_path(&mut self, tuple: Tuple) {
        let Some(flow) = self.flows.get_mut(&tuple) else { return };
        if let Path::Host(on_host) = &mut flow.path {
            on_host.stalled = None;
            flow.reason = None;
            flow.order.take_if(|order| order.cause == Cause::HostPath);
        }
    }

    /// It would be swapped, were the host network to be trusted with it again.
    pub(super) fn stay_off_host_path(&mut self, tuple: Tuple, until: Instant) {
        if let Some(flow) = self.flows.get_mut(&tuple) {
            flow.reason.get_or_insert(Refusal::HostPathStalled);
        }
        self.set_alarm(tuple, until);
    }
}

impl Flow {
    /// It is back from a host path that had carried it for so long.
    pub(super) fn avoid_host_path(&mut self, carried_for: Duration, now: Instant) {
        if carried_for > LAST_BACKOFF {
            self.stalls = 0;
        }
        let doubled = FIRST_BACKOFF.saturating_mul(1 << self.stalls.min(10));
        self.stalls += 1;
        self.avoids_host_until = Some(now + doubled.min(LAST_BACKOFF));
    }
}
