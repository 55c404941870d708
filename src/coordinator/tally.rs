// SPDX-License-Identifier: Apache-2.0
//! What is counted from the router's start on. Pure.

use std::{collections::BTreeMap, ops::AddAssign};

use forwarder_api::{Direction, Refusal};

/// Upper bounds of the histogram of pauses, microseconds: what an application does not notice, to the longest budget.
pub const PAUSE_BOUNDS_US: [u64; 13] =
    [100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub swaps: u64,
    pub swap_backs: u64,
    pub refused: BTreeMap<Refusal, u64>,
    /// What peers said about connections that they do not hold.
    pub false_claims: u64,
    /// Connections that were too many to be kept.
    pub overflow: u64,
    pub pauses: Pauses,
    /// Carried by connections that the router knows, or knew.
    pub on_overlay: Traffic,
    pub on_host: Traffic,
}

/// How long applications stood still, once for each connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pauses {
    pub to_host: Histogram,
    pub to_overlay: Histogram,
    /// Those of moves that were given up.
    pub aborted_to_host: Histogram,
    pub aborted_to_overlay: Histogram,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// One for each bound, and one for what is longer than the last.
    counts: [u64; PAUSE_BOUNDS_US.len() + 1],
    pub sum_us: u64,
}

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub sent: u64,
    pub received: u64,
}

impl Pauses {
    pub fn of(&mut self, direction: Direction, moved: bool) -> &mut Histogram {
        match (direction, moved) {
            (Direction::ToHost, true) => &mut self.to_host,
            (Direction::ToOverlay, true) => &mut self.to_overlay,
            (Direction::ToHost, false) => &mut self.aborted_to_host,
            (Direction::ToOverlay, false) => &mut self.aborted_to_overlay,
        }
    }
}

impl Histogram {
    pub fn add(&mut self, us: u64) {
        self.counts[PAUSE_BOUNDS_US.partition_point(|bound| *bound < us)] += 1;
        self.sum_us += us;
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Each upper bound in microseconds (none: no bound), and how many are below it and above the one before.
    pub fn buckets(&self) -> impl Iterator<Item = (Option<u64>, u64)> {
        let bounds = PAUSE_BOUNDS_US.into_iter().map(Some).chain([None]);
        bounds.zip(self.counts)
    }
}

impl Traffic {
    pub fn total(self) -> u64 {
        self.sent + self.received
    }

    pub fn since(self, earlier: Traffic) -> Traffic {
        Traffic {
            sent: self.sent.saturating_sub(earlier.sent),
            received: self.received.saturating_sub(earlier.received),
        }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, more: Traffic) {
        self.sent += more.sent;
        self.received += more.received;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_counted_once_below_its_bound() {
        let mut histogram = Histogram::default();
        for us in [0, 100, 101, 1_000_000, 1_000_001] {
            histogram.add(us);
        }
        let counted: Vec<_> = histogram.buckets().filter(|(_, count)| *count > 0).collect();
        assert_eq!(counted, [(Some(100), 2), (Some(250), 1), (Some(1_000_000), 1), (None, 1)]);
        assert_eq!((histogram.count(), histogram.sum_us), (5, 2_000_202));
    }

    #[test]
    fn a_socket_that_counts_anew_takes_nothing_back() {
        let (before, after) = (Traffic { sent: 10, received: 5 }, Traffic { sent: 4, received: 9 });
        assert_eq!(after.since(before), Traffic { sent: 0, received: 4 });
    }
}
