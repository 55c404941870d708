// SPDX-License-Identifier: Apache-2.0
//! Whose turn it is, and who goes with it. Pure.

use std::{collections::HashSet, time::Duration};

use forwarder_api::{Direction, Manner, OtherEnd};

use crate::process::Tgid;

/// The most connections of one transaction: each adds to the time that all of them stand still.
pub const MAX_BATCH: usize = 200;
/// The most processes at the other end: likewise.
const MAX_OTHER_HOLDERS: usize = 8;

/// No batch shall make processes stand still for longer, if smaller ones can help it.
const AIM: Duration = Duration::from_millis(5);
const SMALLEST: usize = 16;

/// How many connections may go in one transaction, by what the last ones took: it depends on the machine and on how busy
/// it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace(usize);

impl Default for Pace {
    fn default() -> Pace {
        Pace(4 * SMALLEST)
    }
}

impl Pace {
    /// After a batch of so many.
    pub fn learn(&mut self, connections: usize, pause: Duration) {
        if pause > AIM {
            let fitting = connections as f64 * AIM.as_secs_f64() / pause.as_secs_f64();
            self.0 = self.0.min((fitting as usize).max(SMALLEST));
        } else if connections >= self.0 {
            self.0 = (2 * self.0).min(MAX_BATCH);
        }
    }
}

/// A connection that waits for its turn, as far as it matters for that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting<'a> {
    /// The processes that hold it here.
    pub tgids: &'a [Tgid],
    pub direction: Direction,
    pub manner: Manner,
    /// None: both ends are here.
    pub other_end: Option<OtherEnd>,
    /// The most connections that it may go with, itself included.
    pub most: usize,
}

impl Waiting<'_> {
    fn may_go_with(&self, first: &Waiting<'_>) -> bool {
        let host = |waiting: &Waiting<'_>| waiting.other_end.map(|other| other.host);
        (self.tgids, self.direction, self.manner, host(self))
            == (first.tgids, first.direction, first.manner, host(first))
    }
}

/// Of a line, the first one whose processes are free, and all that may go with it: their places in the line. Those that
/// stand behind others with the same processes wait for them.
pub fn next_batch(
    line: &[Waiting<'_>],
    pace: Pace,
    mut is_free: impl FnMut(&[Tgid]) -> bool,
) -> Option<Vec<usize>> {
    let mut seen: HashSet<&[Tgid]> = HashSet::new();
    let mut free = line.iter().filter(|waiting| seen.insert(waiting.tgids) && is_free(waiting.tgids));
    let first = free.next()?;
    let mut others = HashSet::new();
    let mut goes_along = |waiting: &Waiting<'_>| {
        let Some(other) = waiting.other_end else { return true };
        others.contains(&other.holder) || others.len() < MAX_OTHER_HOLDERS && others.insert(other.holder)
    };
    let (mut batch, mut most) = (Vec::new(), pace.0);
    for (place, waiting) in line.iter().enumerate() {
        let has_room = batch.len() < most.min(waiting.most);
        if has_room && waiting.may_go_with(first) && goes_along(waiting) {
            batch.push(place);
            most = most.min(waiting.most);
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
        Waiting { tgids, direction, manner, other_end: Some(other), most: MAX_BATCH }
    }

    fn all_free(_: &[Tgid]) -> bool {
        true
    }

    fn next_batch(line: &[Waiting<'_>], is_free: impl FnMut(&[Tgid]) -> bool) -> Option<Vec<usize>> {
        super::next_batch(line, Pace(MAX_BATCH), is_free)
    }

    #[test]
    fn batches_grow_while_they_are_short_and_shrink_when_they_are_not() {
        let mut pace = Pace::default();
        for _ in 0..10 {
            pace.learn(pace.0, AIM);
        }
        assert_eq!(pace, Pace(MAX_BATCH));
        pace.learn(3, AIM / 2);
        assert_eq!(pace, Pace(MAX_BATCH));
        pace.learn(MAX_BATCH, 2 * AIM);
        assert_eq!(pace, Pace(MAX_BATCH / 2));
        pace.learn(1, 100 * AIM);
        assert_eq!(pace, Pace(SMALLEST));
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
    fn what_is_to_go_with_few_goes_with_few() {
        let with = |most| Waiting { most, ..waiting(HERE, 1, 7) };
        assert_eq!(next_batch(&[with(1), with(9)], all_free), Some(vec![0]));
        assert_eq!(next_batch(&[with(9), with(1)], all_free), Some(vec![0]));
        assert_eq!(next_batch(&[with(9), with(9), with(2), with(9)], all_free), Some(vec![0, 1, 3]));
        assert_eq!(next_batch(&[with(3), with(9), with(9), with(9)], all_free), Some(vec![0, 1, 2]));
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
