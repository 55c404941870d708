// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is, and who goes with it. Pure.

use std::collections::HashSet;

use forwarder_api::{Direction, Manner, OtherEnd};

use crate::process::Tgid;

/// The most connections of one transaction: each adds to the time that all of them stand still.
pub const MAX_BATCH: usize = 200;
/// The most processes at the other end: likewise.
const MAX_OTHER_HOLDERS: usize = 8;

/// A connection that waits for its turn, as far as it matters for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting<'a> {
    /// The processes that hold it here.
    pub tgids: &'a [Tgid],
    pub direction: Direction,
    pub manner: Manner,
    /// None: both ends are here.
    pub other_end: Option<OtherEnd>,
    /// To be moved in a transaction of its own.
    pub alone: bool,
}

impl Waiting<'_> {
    fn may_go_with(&self, first: &Waiting<'_>) -> bool {
        let host = |waiting: &Waiting<'_>| waiting.other_end.map(|other| other.host);
        !self.alone
            && !first.alone
            && (self.tgids, self.direction, self.manner, host(self))
                == (first.tgids, first.direction, first.manner, host(first))
    }
}

/// Of a line, the first one whose processes are free, and all that may go with it: their places in the line. Those that
/// stand behind others with the same processes wait for them.
pub fn next_batch(line: &[Waiting<'_>], mut is_free: impl FnMut(&[Tgid]) -> bool) -> Option<Vec<usize>> {
    let mut seen: HashSet<&[Tgid]> = HashSet::new();
    let mut free = line.iter().filter(|waiting| seen.insert(waiting.tgids) && is_free(waiting.tgids));
    let first = free.next()?;
    let mut others = HashSet::new();
    let mut goes_along = |waiting: &Waiting<'_>| {
        let Some(other) = waiting.other_end else { return true };
        others.contains(&other.holder) || others.len() < MAX_OTHER_HOLDERS && others.insert(other.holder)
    };
    let mut batch = Vec::new();
    for (place, waiting) in line.iter().enumerate() {
        let is_first = std::ptr::eq(waiting, first);
        if batch.len() < MAX_BATCH && (is_first || waiting.may_go_with(first)) && goes_along(waiting) {
            batch.push(place);
        }
    }
    Some(batch)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use forwarder_api::Holder;

    use super::*;

    const HERE: &[Tgid] = &[Tgid(1)];
    const THERE: &[Tgid] = &[Tgid(2)];

    fn waiting(tgids: &[Tgid], host: u8, holder: u32) -> Waiting<'_> {
        let other = OtherEnd { host: IpAddr::V4(Ipv4Addr::new(10, 0, 0, host)), holder: Holder(holder) };
        let (direction, manner) = (Direction::ToHost, Manner::Settle);
        Waiting { tgids, direction, manner, other_end: Some(other), alone: false }
    }

    fn all_free(_: &[Tgid]) -> bool {
        true
    }

    #[test]
    fn all_that_wait_for_the_same_two_processes_go_together() {
        let line = [waiting(HERE, 1, 7), waiting(THERE, 1, 7), waiting(HERE, 1, 7), waiting(HERE, 2, 7)];
        assert_eq!(next_batch(&line, all_free), Some(vec![0, 2]));
    }

    #[test]
    fn whoever_is_busy_is_waited_for_by_its_own_connections_only() {
        let line = [waiting(HERE, 1, 7), waiting(THERE, 1, 7), waiting(HERE, 1, 7)];
        assert_eq!(next_batch(&line, |tgids| tgids != HERE), Some(vec![1]));
        assert_eq!(next_batch(&line, |_| false), None);
        assert_eq!(next_batch(&[], all_free), None);
    }

    #[test]
    fn what_is_to_go_alone_goes_alone() {
        let alone = Waiting { alone: true, ..waiting(HERE, 1, 7) };
        assert_eq!(next_batch(&[alone, waiting(HERE, 1, 7)], all_free), Some(vec![0]));
        assert_eq!(next_batch(&[waiting(HERE, 1, 7), alone], all_free), Some(vec![0]));
    }

    #[test]
    fn ways_are_not_mixed() {
        let back = Waiting { direction: Direction::ToOverlay, ..waiting(HERE, 1, 7) };
        let saved = Waiting { manner: Manner::Salvage, ..back };
        assert_eq!(next_batch(&[waiting(HERE, 1, 7), back, saved], all_free), Some(vec![0]));
    }

    #[test]
    fn a_batch_is_bounded_in_connections_and_in_processes_at_the_other_end() {
        let line: Vec<Waiting<'_>> = (0..300).map(|_| waiting(HERE, 1, 7)).collect();
        assert_eq!(next_batch(&line, all_free).map(|batch| batch.len()), Some(MAX_BATCH));
        let line: Vec<Waiting<'_>> = (0..20).map(|holder| waiting(HERE, 1, holder % 10)).collect();
        let batch = next_batch(&line, all_free).unwrap();
        assert!(batch.iter().all(|place| place % 10 < MAX_OTHER_HOLDERS) && batch.len() == 16, "{batch:?}");
    }
}
