// SPDX-License-Identifier: Apache-2.0
//! Memory that is not needed any more goes back to the system.

use std::{env, ffi::CString, os::unix::ffi::OsStringExt};

use nix::{errno::Errno, fcntl::readlink, unistd::execve};
use thiserror::Error;

/// What glibc reads when a program starts (<https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html>).
const TUNABLES: &str = "GLIBC_TUNABLES";

#[derive(Debug, Error)]
#[error("memory that was freed is kept as the C library likes: this program cannot start itself anew: {0}")]
pub struct Unkept(#[from] Errno);

/// Start this program anew, as the same process, with a C library that keeps no more than `most` bytes of freed memory for the
/// next buffers; where it was started so, go on. To be called first of all: nothing but command line and environment stays.
///
/// What the system gives is cleared and mapped page by page, which takes as long as filling it: so something is kept. Left to
/// itself, glibc learns from the largest buffer how much, for good; it keeps memory for each processor, though most threads
/// here live for milliseconds; and each thread has up to seven pieces of each size for itself, which no trim gives back
/// and for which there is no mallopt(3).
///
/// An error: the program is not started anew, and nothing is changed.
pub fn keep(most: usize) -> Result<(), Unkept> {
    let ours = format!(
        "glibc.malloc.trim_threshold={most}:glibc.malloc.mmap_threshold={most}\
         :glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0"
    );
    let set = env::var_os(TUNABLES).unwrap_or_default().into_vec();
    if set.ends_with(ours.as_bytes()) {
        return Ok(());
    }
    // SAFETY: getauxval(3) takes an integer.
    if unsafe { libc::getauxval(libc::AT_SECURE) } != 0 {
        // The C library takes nothing from whoever starts a program with rights of its own, and might hide it from us.
        return Err(Unkept(Errno::EPERM));
    }
    let separator: &[u8] = if set.is_empty() { b"" } else { b":" };
    let tuned = [TUNABLES.as_bytes(), b"=", &set, separator, ours.as_bytes()].concat();
    let others = env::vars_os().filter(|(name, _)| name != TUNABLES);
    let others = others.map(|(name, value)| [name.into_vec(), value.into_vec()].join(&b'='));
    // By its path: it gives the process its name.
    let program = c_string(readlink("/proc/self/exe")?.into_vec())?;
    let arguments =
        env::args_os().map(|argument| c_string(argument.into_vec())).collect::<Result<Vec<_>, _>>()?;
    let environment = others.chain([tuned]).map(c_string).collect::<Result<Vec<_>, _>>()?;
    match execve(&program, &arguments, &environment)? {}
}

fn c_string(bytes: Vec<u8>) -> Result<CString, Errno> {
    CString::new(bytes).map_err(|_| Errno::EINVAL)
}

/// Give back what is free, wherever it lies. Takes about a millisecond, in which nobody else can have memory.
pub fn trim() {
    // SAFETY: malloc_trim(3) takes an integer, and may be called at any time.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(test)]
mod tests {
    use std::{alloc, process::Command};

    use super::*;

    /// In this test's program, when it is the one that is started anew.
    const INNER: &str = "MEMORY_TEST_INNER";

    /// So many bytes are not free, for whichever thread.
    fn in_use() -> usize {
        // SAFETY: mallinfo2(3) takes nothing and gives a structure.
        unsafe { libc::mallinfo2() }.uordblks
    }

    #[test]
    fn a_thread_keeps_nothing_that_it_has_freed_and_other_tunables_stay() {
        if env::var_os(INNER).is_none() {
            let mut program = Command::new(env::current_exe().unwrap());
            program
                .args(["--exact", "tests::a_thread_keeps_nothing_that_it_has_freed_and_other_tunables_stay"]);
            program.env(INNER, "").env(TUNABLES, "glibc.malloc.perturb=85");
            assert!(program.status().unwrap().success());
            return;
        }
        keep(1 << 20).unwrap();
        assert!(env::var(TUNABLES).unwrap().starts_with("glibc.malloc.perturb=85:"));
        let layout = alloc::Layout::from_size_align(1000, 8).unwrap();
        let before = in_use();
        // SAFETY: the layout has a size, each piece is freed once, and nobody reads them.
        unsafe {
            let pieces = [(); 7].map(|()| alloc::alloc(layout));
            assert!(in_use() >= before + 7 * layout.size());
            pieces.into_iter().for_each(|piece| alloc::dealloc(piece, layout));
        }
        assert_eq!(in_use(), before);
    }
}
