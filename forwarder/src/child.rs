// SPDX-License-Identifier: Apache-2.0
//! A process of its own for each transaction, which a SIGKILL of the forwarder does not end at the wrong moment.
//!
//! What a stop does to a thread's system call is undone by whoever stopped it, some microseconds later: until then that one
//! must not die. So a transaction runs in a child that shares our memory and descriptors (CLONE_VM, CLONE_FILES) and little
//! else, above all not the thread group that a signal ends:
//! ```text
//! forwarder, thread "move"            child
//! run() ---------------------------->  the transaction; SIGKILL when its maker ends (PR_SET_PDEATHSIG)
//!   stands still until the child         outlive(): none. Threads are stopped, and put right
//!   has ended (CLONE_VFORK)              dropped: SIGKILL again, and the end at once if the maker has ended meanwhile
//!   has the result  <----------------  its end
//! ```
//! The child uses the thread-local storage of the thread that made it, which stands still: for Rust and the C library it *is*
//! that thread. After a SIGKILL of the forwarder all other threads are gone, and with them who had a lock. So between
//! [`outlive`] and its end nothing may be done that takes one; memory comes from a [region](crate::heap) of the child's own.
//!
//! Who ends both processes in the same microseconds (`cgroup.kill`; memory that is short, but for oom_score_adj) still ends
//! them in the wrong moment.

use std::{
    any::Any,
    cell::Cell,
    io,
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    time::Duration,
};

use nix::{
    sys::signal::{SigHandler, SigSet, Signal, signal},
    unistd::{Pid, getpid, getppid},
};

use crate::heap::{self, Region};

/// As much as a thread has, half of it never touched.
const STACK: usize = 2 << 20;
/// Never readable nor writable: a stack that grows into it ends the child.
const GUARD: usize = 64 << 10;

thread_local! {
    /// In a child: the forwarder.
    static MAKER: Cell<Option<Pid>> = const { Cell::new(None) };
    /// How many [`Outliving`] there are in this child.
    static OUTLIVING: Cell<u32> = const { Cell::new(0) };
}

/// Run `work` in a child, and wait for its end. An error: there is no child, and nothing was run.
pub fn run<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    let stack = Stack::new()?;
    let region = Region::take().ok_or(io::ErrorKind::OutOfMemory)?;
    let mut errand = Errand { work: Some(work), maker: getpid(), region: &region, result: None };
    clone_and_wait(&mut errand, &stack)?;
    match errand.result {
        Some(Ok(result)) => Ok(result),
        Some(Err(panic)) => resume_unwind(panic),
        // Killed by somebody, with what it had locked. A forwarder that is killed is provided for.
        None => std::process::abort(),
    }
}

struct Errand<'a, F, T> {
    work: Option<F>,
    maker: Pid,
    region: &'a Region,
    result: Option<Result<T, Box<dyn Any + Send>>>,
}

fn clone_and_wait<T, F: FnOnce() -> T>(errand: &mut Errand<'_, F, T>, stack: &Stack) -> io::Result<()> {
    // No signal tells of its end.
    let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_VFORK;
    // SAFETY: the stack grows down from its end; stack and errand live until the child has ended, because this thread stands
    // still until then. If our process is killed, they stay as long as the child uses its memory.
    let child = unsafe { libc::clone(start::<T, F>, stack.top(), flags, std::ptr::from_mut(errand).cast()) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut status = 0;
    // SAFETY: waitpid(2) writes an int. __WALL: a child without a signal at its end is not waited for otherwise.
    while unsafe { libc::waitpid(child, &mut status, libc::__WALL) } < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
    Ok(())
}

extern "C" fn start<T, F: FnOnce() -> T>(errand: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `clone_and_wait` gives the address of its errand, and does not touch it until this process has ended.
    let errand = unsafe { &mut *errand.cast::<Errand<'_, F, T>>() };
    MAKER.set(Some(errand.maker));
    errand.region.use_here();
    end_with(errand.maker);
    let_tracees_report();
    errand.result = errand.work.take().map(|work| catch_unwind(AssertUnwindSafe(work)));
    heap::use_no_region();
    MAKER.set(None);
    0
}

/// The calling child does not end with the forwarder while this is there. Elsewhere it is nothing.
#[must_use]
pub struct Outliving(PhantomData<*const ()>);

pub fn outlive() -> Outliving {
    let depth = OUTLIVING.replace(OUTLIVING.get() + 1);
    if depth == 0 && MAKER.get().is_some() {
        set_signal_at_makers_end(0);
        heap::enter_region();
    }
    Outliving(PhantomData)
}

impl Drop for Outliving {
    fn drop(&mut self) {
        let depth = OUTLIVING.get() - 1;
        OUTLIVING.set(depth);
        if depth == 0
            && let Some(maker) = MAKER.get()
        {
            // Before memory is given back with a lock that nobody may be left to open.
            end_with(maker);
            heap::leave_region();
        }
    }
}

/// The forwarder, whoever asks.
#[cfg(feature = "faults")]
pub fn forwarder() -> Pid {
    MAKER.get().unwrap_or_else(getpid)
}

/// Is the end of the calling process put off?
#[cfg(feature = "faults")]
pub fn is_outliving() -> bool {
    MAKER.get().is_some() && OUTLIVING.get() > 0
}

/// From now on the calling child ends when its maker does; at once, if that was earlier.
fn end_with(maker: Pid) {
    set_signal_at_makers_end(libc::SIGKILL);
    if getppid() != maker {
        // SAFETY: _exit(2) ends this process. What it traces goes on as it is.
        unsafe { libc::_exit(0) };
    }
}

/// For [`doze`]. The child has signal handlers and a mask of its own.
fn let_tracees_report() {
    // SAFETY: no handler is installed. Who started the forwarder may have had it ignored: then none would come.
    let _ = unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) };
    let _ = SigSet::from(Signal::SIGCHLD).thread_block();
}

/// Sleep for so long, or, in a child, until a thread that it traces has stopped since it dozed last.
pub fn doze(time: Duration) {
    let reports = SigSet::from(Signal::SIGCHLD);
    let time = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
    // SAFETY: sigtimedwait(2) reads a set and a time, and is asked for no more about the signal than its number.
    unsafe { libc::sigtimedwait(reports.as_ref(), std::ptr::null_mut(), &time) };
}

fn set_signal_at_makers_end(signal: libc::c_int) {
    // SAFETY: PR_SET_PDEATHSIG takes an integer. It tells of the end of the thread that made this process.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, signal as libc::c_ulong) };
}

/// A mapping for a stack, with a guard at its lower end.
struct Stack(*mut libc::c_void);

impl Stack {
    fn new() -> io::Result<Stack> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choosing.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), STACK, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Stack(at);
        // SAFETY: all but the guard of the mapping that was just made.
        let opened =
            unsafe { libc::mprotect(at.byte_add(GUARD), STACK - GUARD, libc::PROT_READ | libc::PROT_WRITE) };
        if opened < 0 { Err(io::Error::last_os_error()) } else { Ok(stack) }
    }

    fn top(&self) -> *mut libc::c_void {
        // SAFETY: one past the end of the mapping, which is aligned to pages.
        unsafe { self.0.byte_add(STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody runs on it: the child has ended.
        unsafe { libc::munmap(self.0, STACK) };
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nix::{
        sys::{
            signal::{Signal, kill},
            wait::waitpid,
        },
        unistd::{ForkResult, fork, pipe, read, write},
    };

    use super::*;

    #[test]
    fn what_is_done_in_a_child_is_done_in_our_memory() {
        let mut seen = Vec::new();
        let pid = run(|| {
            seen.push(7);
            let _outliving = outlive();
            seen.extend(0..100_000);
            std::process::id()
        });
        assert_eq!(seen.len(), 100_001);
        assert_ne!(pid.unwrap(), std::process::id());
    }

    #[test]
    fn a_panic_in_a_child_is_one_of_ours() {
        let panic = std::panic::catch_unwind(|| run(|| panic!("in a child")));
        assert_eq!(panic.unwrap_err().downcast_ref::<&str>(), Some(&"in a child"));
    }

    /// A forwarder that runs `work` in a child and is killed as soon as a byte comes from there: how long after its start
    /// did the last process that has the pipe end, and what had it written by then?
    fn killed_amid(work: impl FnOnce(&dyn Fn(&[u8]))) -> (Vec<u8>, Duration) {
        let (reader, writer) = pipe().unwrap();
        let began = Instant::now();
        // SAFETY: this test's program has other threads: what the child does (mappings, system calls, memory by way of the C
        // library, which sees to forks) is no matter of theirs.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                drop(reader);
                let _ = run(|| work(&|bytes| assert!(write(&writer, bytes).is_ok())));
                // SAFETY: ends the process, which was not killed.
                unsafe { libc::_exit(1) };
            }
            ForkResult::Parent { child } => {
                drop(writer);
                let mut bytes = [0; 64];
                let count = read(&reader, &mut bytes).unwrap();
                let mut all = bytes[..count].to_vec();
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
                loop {
                    match read(&reader, &mut bytes).unwrap() {
                        0 => return (all, began.elapsed()),
                        count => all.extend_from_slice(&bytes[..count]),
                    }
                }
            }
        }
    }

    const LONG: Duration = Duration::from_millis(300);

    #[test]
    fn a_child_ends_with_the_forwarder() {
        let (said, after) = killed_amid(|say| {
            say(b"a");
            std::thread::sleep(100 * LONG);
            say(b"b");
        });
        assert_eq!(said, b"a");
        assert!(after < 100 * LONG, "{after:?}");
    }

    #[test]
    fn a_child_that_outlives_the_forwarder_comes_to_an_end_with_what_it_does() {
        let (said, after) = killed_amid(|say| {
            let outliving = outlive();
            say(b"a");
            std::thread::sleep(LONG);
            say(&[b'b'; 10]);
            drop(outliving);
            say(b"c");
        });
        assert_eq!(said, b"abbbbbbbbbb");
        assert!(after >= LONG, "{after:?}");
    }
}
