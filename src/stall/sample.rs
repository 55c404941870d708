// SPDX-License-Identifier: Apache-2.0
//! When does a socket count as stalled? Pure.

/// So many time-outs or probes in a row that brought nothing. With the kernel's shortest time-out of 200 ms the second
/// has passed after 0.6 s. One is not enough: where segments are lost now and then, it comes without any fault.
const IN_VAIN: u8 = 2;

/// How a host socket gets on, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub unacknowledged_bytes: u32,
    /// Retransmission time-outs in a row, with nothing new acknowledged since.
    pub retransmissions: u8,
    /// Probes of a closed window or of an idle connection (keepalive), none of them answered.
    pub probes: u8,
}

impl Sample {
    /// The kernel resets both counts with what the peer acknowledges or answers, so one look is enough. A slow
    /// reader is no stall: its closed window is probed, and the probes are answered.
    pub fn is_stalled(&self) -> bool {
        self.retransmissions >= IN_VAIN || self.probes >= IN_VAIN
    }
}

#[cfg(test)]
mod tests {
    use super::Sample;

    fn check(unacknowledged_bytes: u32, retransmissions: u8, probes: u8, stalled: bool) {
        let sample = Sample { unacknowledged_bytes, retransmissions, probes };
        assert_eq!(sample.is_stalled(), stalled, "{sample:?}");
    }

    #[test]
    fn data_on_its_way_is_no_stall() {
        check(0, 0, 0, false);
        check(4_000_000, 0, 0, false);
    }

    #[test]
    fn one_lost_segment_or_probe_is_no_stall() {
        check(1448, 1, 0, false);
        check(1448, 0, 1, false);
    }

    #[test]
    fn repeated_time_outs_without_progress_are_a_stall() {
        check(1448, 2, 0, true);
        check(1448, 15, 0, true);
    }

    #[test]
    fn unanswered_probes_are_a_stall_even_where_nothing_was_written() {
        check(1448, 0, 2, true);
        check(0, 0, 2, true);
    }
}
