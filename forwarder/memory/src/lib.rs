// SPDX-License-Identifier: Apache-2.0
//! Memory that is not needed any more goes back to the system.

use libc::c_int;

/// Memory that one thread has freed serves another: most threads here live for milliseconds.
const ARENAS: c_int = 1;

/// Keep so many bytes that were freed for the next buffers, no more, until [`trim`]. What the system gives is cleared and mapped
/// page by page, which takes as long as filling it. Left to itself, glibc learns from the largest buffer how much to keep, for
/// good. Setting the thresholds ends the learning. To be called first of all.
pub fn keep(most: c_int) {
    // SAFETY: mallopt(3) takes two integers; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, most);
        libc::mallopt(libc::M_TRIM_THRESHOLD, most);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Give back what is free, wherever it lies. Takes about a millisecond, in which nobody else can have memory.
pub fn trim() {
    // SAFETY: malloc_trim(3) takes an integer, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}
