// SPDX-License-Identifier: Apache-2.0
//! Memory that is not needed any more goes back to the system.

use libc::c_int;

/// Buffers from this size on are mappings of their own.
const OWN_MAPPING: c_int = 128 << 10;

/// Memory that one thread has freed serves another: most threads here live for milliseconds.
const ARENAS: c_int = 1;

/// Carried bytes are megabytes, for milliseconds. glibc learns from the first such buffer to keep the memory of the
/// next ones, in each of its arenas: tens of megabytes for good. Setting the threshold ends the learning. To be called
/// first of all.
pub fn keep_small() {
    // SAFETY: mallopt(3) takes two integers; no other thread exists yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Give back what is free, wherever it lies. Takes about a millisecond, in which nobody else can have memory.
pub fn trim() {
    // SAFETY: malloc_trim(3) takes an integer, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}
