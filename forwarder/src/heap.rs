// SPDX-License-Identifier: Apache-2.0
//! The memory of large buffers goes back to the system.

use libc::c_int;

/// Buffers from this size on are mappings of their own.
const OWN_MAPPING: c_int = 128 << 10;

/// Carried bytes are megabytes, for milliseconds. glibc learns from the first such buffer to keep the memory of the
/// next ones, in each of its arenas: tens of megabytes for good. Setting the threshold ends the learning.
pub fn return_large_buffers() {
    // SAFETY: mallopt(3) takes two integers; no other thread exists yet.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_MAPPING) };
}
