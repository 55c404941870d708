// SPDX-License-Identifier: Apache-2.0
//! When a connection has shown enough to be worth a swap. Pure.

use std::{str::FromStr, time::Duration};

/// A connection is old enough when it has lived for `time` or carried `bytes` (sent and received), whichever comes
/// first. `None`: that never suffices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct After {
    pub time: Option<Duration>,
    pub bytes: Option<u64>,
}

impl After {
    /// Where no rule says otherwise. Measured: test/BENCHMARKS.md.
    pub const DEFAULT: After = After { time: Some(Duration::from_millis(100)), bytes: Some(16 << 20) };

    pub fn is_reached(self, age: Duration, bytes: u64) -> bool {
        self.time.is_some_and(|time| age >= time) || self.bytes.is_some_and(|limit| bytes >= limit)
    }

    /// What suffices for either of the two.
    pub fn or(self, other: After) -> After {
        let (time, bytes) =
            (self.time.into_iter().chain(other.time), self.bytes.into_iter().chain(other.bytes));
        After { time: time.min(), bytes: bytes.min() }
    }
}

/// `0`, a time such as `20ms`, or a size such as `64KiB`.
impl FromStr for After {
    type Err = ();

    fn from_str(text: &str) -> Result<After, ()> {
        let time = |time| After { time: Some(time), bytes: None };
        let bytes = |bytes| After { time: None, bytes: Some(bytes) };
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(drop)?;
        let times = |unit: u64| number.checked_mul(unit).ok_or(());
        match unit {
            "" if number == 0 => Ok(time(Duration::ZERO)),
            "ms" => Ok(time(Duration::from_millis(number))),
            "s" => Ok(time(Duration::from_secs(number))),
            "B" => Ok(bytes(number)),
            "KiB" => times(1 << 10).map(bytes),
            "MiB" => times(1 << 20).map(bytes),
            "GiB" => times(1 << 30).map(bytes),
            _ => Err(()),
        }
    }
}
