// SPDX-License-Identifier: Apache-2.0
//! Connections that are old enough by the least of all rules, and not by their own: when to look at them again.
//! Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use crate::rules::After;

/// Between two looks at one connection at least.
const PERIOD: Duration = Duration::from_millis(10);
/// Who is too young for longer is left to the scans.
const PATIENCE: Duration = Duration::from_secs(10);
/// The most that are kept, about 5 MB. More are left to the scans.
const MAX_YOUNG: usize = 1 << 16;

/// What becomes of a connection that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Tell,
    LookAgain(Duration),
    LeaveToScans,
}

/// Each look comes after a quarter of the age, so that a connection costs a few dozen looks at most.
pub fn judge(after: After, age: Duration, bytes: u64, is_accepted: bool) -> Verdict {
    if is_accepted && after.is_reached(age, bytes) {
        return Verdict::Tell;
    }
    if age >= PATIENCE {
        return Verdict::LeaveToScans;
    }
    let left = after.time.map(|time| time.saturating_sub(age)).filter(|left| !left.is_zero());
    let next = (age / 4).max(PERIOD);
    Verdict::LookAgain(left.map_or(next, |left| left.min(next)))
}

/// Those that are to be looked at again, by the time of that and their socket's cookie.
pub struct Young<B>(BTreeMap<(Instant, u64), B>);

impl<B> Young<B> {
    pub fn new() -> Young<B> {
        Young(BTreeMap::new())
    }

    pub fn add(&mut self, at: Instant, cookie: u64, birth: B) {
        if self.0.len() < MAX_YOUNG {
            self.0.insert((at, cookie), birth);
        }
    }

    /// One whose time has come.
    pub fn due(&mut self, now: Instant) -> Option<B> {
        let first = self.0.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }

    pub fn next(&self) -> Option<Instant> {
        self.0.first_key_value().map(|((at, _), _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn check(time: Option<u32>, age: u32, bytes: u64, expected: Verdict) {
        let after = After { time: time.map(|ms| ms * MS), bytes: Some(1000) };
        assert_eq!(judge(after, age * MS, bytes, true), expected, "{after:?} {age} ms {bytes} bytes");
    }

    #[test]
    fn who_has_lived_or_carried_enough_is_told() {
        check(Some(50), 50, 0, Verdict::Tell);
        check(Some(50), 20, 1000, Verdict::Tell);
        check(None, 20, 1000, Verdict::Tell);
    }

    #[test]
    fn who_has_not_is_looked_at_when_its_time_comes_or_after_a_quarter_of_its_age() {
        check(Some(50), 45, 0, Verdict::LookAgain(5 * MS));
        check(Some(500), 20, 0, Verdict::LookAgain(10 * MS));
        check(Some(9000), 2000, 0, Verdict::LookAgain(500 * MS));
        check(None, 2000, 999, Verdict::LookAgain(500 * MS));
    }

    #[test]
    fn who_is_too_young_for_long_is_left_to_the_scans() {
        check(Some(60_000), 10_000, 0, Verdict::LeaveToScans);
        check(None, 10_000, 999, Verdict::LeaveToScans);
    }

    #[test]
    fn nobody_is_told_before_it_is_accepted() {
        let judge = |age| judge(After { time: Some(20 * MS), bytes: None }, age, 0, false);
        assert_eq!(judge(20 * MS), Verdict::LookAgain(10 * MS));
        assert_eq!(judge(10_000 * MS), Verdict::LeaveToScans);
    }

    #[test]
    fn those_that_are_due_come_in_the_order_of_their_times() {
        let now = Instant::now();
        let mut young = Young::new();
        young.add(now + 2 * MS, 1, "second");
        young.add(now, 2, "first");
        assert_eq!((young.next(), young.due(now), young.due(now)), (Some(now), Some("first"), None));
        assert_eq!((young.next(), young.due(now + 2 * MS)), (Some(now + 2 * MS), Some("second")));
    }
}
