// SPDX-License-Identifier: Apache-2.0
//! Points of a move at which tests let the forwarder die.
//!
//! Only the program `forwarder-with-faults`, built with the feature `faults`, has them: FORWARDER_FAULT names a point,
//! and `opened:3` the third time that it is passed. In the forwarder itself, [`point`] is nothing.

/// In the order of a move.
#[derive(Clone, Copy, Debug)]
pub enum Point {
    /// The first thread is being stopped.
    Seizing,
    /// All threads stand still, and nothing is put right yet.
    Stopped,
    Frozen,
    /// A thread was sent into the block.
    Started,
    /// Its process has been lent the sockets.
    Lent,
    /// Some threads are in their holds.
    Holding,
    /// Every process waits at the gate.
    Armed,
    /// Follower: the promise is told.
    Promised,
    /// About to open the gate.
    Opening,
    Opened,
    /// The first block is over.
    Finishing,
    /// A thread has its own signal mask again, and not yet its registers.
    Restoring,
    /// Some threads are released from their holds.
    Releasing,
    Installed,
    /// Some threads are let go.
    Thawing,
    Parking,
}

#[cfg(not(feature = "faults"))]
#[inline(always)]
pub fn point(_: Point) {}

/// Let the forwarder die here, as by SIGKILL at this instant, if FORWARDER_FAULT says so.
#[cfg(feature = "faults")]
pub fn point(point: Point) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };

    use nix::sys::signal::{Signal, kill};

    use crate::child;

    static WANTED: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static PASSED: AtomicU32 = AtomicU32::new(0);
    let wanted = WANTED.get_or_init(|| {
        let fault = std::env::var("FORWARDER_FAULT").ok()?;
        let (name, times) = fault.split_once(':').unwrap_or((&fault, "1"));
        Some((name.to_owned(), times.parse().ok()?))
    });
    let Some((name, times)) = wanted else { return };
    if format!("{point:?}").eq_ignore_ascii_case(name) && PASSED.fetch_add(1, Ordering::Relaxed) + 1 == *times
    {
        let _ = kill(child::forwarder(), Signal::SIGKILL);
        // The child's own end comes a moment later: nothing is done until then, unless it outlives.
        while !child::is_outliving() {
            std::thread::park();
        }
    }
}
