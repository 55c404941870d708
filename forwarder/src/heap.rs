// SPDX-License-Identifier: Apache-2.0
//! Memory for who outlives this process: waits for nobody's lock.
//!
//! The C library's memory is behind one lock. A child that goes on after a SIGKILL of this process (see [`crate::child`])
//! would wait for ever if somebody had it who is gone. So each child takes a region beforehand, and while it may have to go
//! on alone, all that it is given comes from there, one piece after the other; what it gives back of the library's is kept
//! until it is over. A region that is full (a process of several thousand threads) leaves the library, and the risk.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    ptr,
    sync::{
        OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

/// As many as transactions that can look at sockets at once.
const REGIONS: usize = 64;
/// Address space, of which only what is used becomes memory: 1,000 threads that are stopped take some hundred KiB.
const REGION: usize = 4 << 20;
/// What stays with a region that nobody uses.
const STAYS: usize = 64 << 10;

static REGIONS_AT: OnceLock<Option<usize>> = OnceLock::new();
static TAKEN: AtomicU64 = AtomicU64::new(0);
static USES: [Use; REGIONS] = [const { Use::new() }; REGIONS];

struct Use {
    /// Bytes given so far.
    used: AtomicUsize,
    /// The most that it was.
    most: AtomicUsize,
    /// Pieces that are in use, and one for who has taken the region.
    pieces: AtomicUsize,
}

impl Use {
    const fn new() -> Use {
        Use { used: AtomicUsize::new(0), most: AtomicUsize::new(0), pieces: AtomicUsize::new(0) }
    }
}

thread_local! {
    /// The region of the calling child.
    static OWN: Cell<Option<usize>> = const { Cell::new(None) };
    /// Does memory come from there?
    static IS_IN: Cell<bool> = const { Cell::new(false) };
    /// The library's memory that is to be given back to it.
    static KEPT_BACK: Cell<*mut KeptBack> = const { Cell::new(ptr::null_mut()) };
}

struct KeptBack {
    next: *mut KeptBack,
    at: *mut u8,
    layout: Layout,
}

/// Address space for one child; free for others when it was dropped and all that came from it was given back.
pub struct Region(usize);

impl Region {
    /// None: all are taken, or there is no address space for them.
    pub fn take() -> Option<Region> {
        REGIONS_AT.get_or_init(reserve).as_ref()?;
        loop {
            let taken = TAKEN.load(Ordering::Relaxed);
            let free = (!taken).trailing_zeros();
            if free as usize >= REGIONS {
                return None;
            }
            if TAKEN.compare_exchange(taken, taken | 1 << free, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                let region = free as usize;
                USES[region].pieces.store(1, Ordering::Relaxed);
                return Some(Region(region));
            }
        }
    }

    /// The calling child is the one that it was taken for.
    pub fn use_here(&self) {
        OWN.set(Some(self.0));
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let_go_of(self.0);
    }
}

pub fn use_no_region() {
    OWN.set(None);
}

/// From now on all memory of the calling child comes from its region.
pub fn enter_region() {
    if let Some(region) = OWN.get() {
        let of = &USES[region];
        if of.pieces.load(Ordering::Acquire) == 1 {
            of.used.store(0, Ordering::Relaxed);
        }
        IS_IN.set(true);
    }
}

/// From now on it comes from the library again.
pub fn leave_region() {
    IS_IN.set(false);
    let mut next = KEPT_BACK.replace(ptr::null_mut());
    while !next.is_null() {
        // SAFETY: written by `keep_back` in a piece that is given back below only; `at` came from `System` with this layout,
        // and whoever had it has given it back.
        unsafe {
            let kept = next.read();
            System.dealloc(kept.at, kept.layout);
            Heap.dealloc(next.cast(), Layout::new::<KeptBack>());
            next = kept.next;
        }
    }
}

fn reserve() -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let length = REGIONS * REGION;
    // SAFETY: a new mapping at a place of the kernel's choosing.
    let at = unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    (at != libc::MAP_FAILED).then_some(at as usize)
}

fn start_of(region: usize) -> usize {
    REGIONS_AT.get().copied().flatten().map_or(0, |at| at + region * REGION)
}

/// The region that a piece came from.
fn region_of(piece: *mut u8) -> Option<usize> {
    let offset = (piece as usize).checked_sub(REGIONS_AT.get().copied().flatten()?)?;
    (offset < REGIONS * REGION).then_some(offset / REGION)
}

fn let_go_of(region: usize) {
    let of = &USES[region];
    if of.pieces.fetch_sub(1, Ordering::AcqRel) > 1 {
        return;
    }
    if of.most.swap(0, Ordering::Relaxed) > STAYS {
        // SAFETY: the region's own pages, of which no piece is in use.
        unsafe { libc::madvise(start_of(region) as *mut libc::c_void, REGION, libc::MADV_DONTNEED) };
    }
    of.used.store(0, Ordering::Relaxed);
    TAKEN.fetch_and(!(1 << region), Ordering::AcqRel);
}

/// The next piece; only the region's child asks. None: it is full.
fn piece_of(region: usize, layout: Layout) -> Option<*mut u8> {
    let of = &USES[region];
    let start = start_of(region);
    let at = (start + of.used.load(Ordering::Relaxed)).checked_next_multiple_of(layout.align())?;
    let end = at.checked_add(layout.size()).filter(|end| *end <= start + REGION)?;
    of.used.store(end - start, Ordering::Relaxed);
    of.most.fetch_max(end - start, Ordering::Relaxed);
    of.pieces.fetch_add(1, Ordering::Relaxed);
    Some(at as *mut u8)
}

/// The program's memory (`#[global_allocator]`): the C library's, but for children that may be alone.
pub struct Heap;

// SAFETY: what `System` gives is given back to `System` with the layout that it was given for. A piece of a region is aligned,
// lies within it, overlaps no other that is in use, and stays until it is given back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if IS_IN.get()
            && let Some(piece) = OWN.get().and_then(|region| piece_of(region, layout))
        {
            return piece;
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if let Some(region) = region_of(at) {
            let of = &USES[region];
            // The last one is given anew: a list that grows, or is made again and again, takes no more than it needs.
            let end = at as usize + layout.size() - start_of(region);
            if IS_IN.get() && OWN.get() == Some(region) && of.used.load(Ordering::Relaxed) == end {
                of.used.store(end - layout.size(), Ordering::Relaxed);
            }
            return let_go_of(region);
        }
        if IS_IN.get() && keep_back(at, layout) {
            return;
        }
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !IS_IN.get() && region_of(at).is_none() {
            // SAFETY: the caller's promise.
            return unsafe { System.realloc(at, layout, size) };
        }
        // SAFETY: the caller's promise: the size is not zero, and with this alignment does not overflow; both pieces have at
        // least as many bytes as are copied, and the new one is another.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                ptr::copy_nonoverlapping(at, new, layout.size().min(size));
                self.dealloc(at, layout);
            }
            new
        }
    }
}

/// False: there is no room to note it.
fn keep_back(at: *mut u8, layout: Layout) -> bool {
    let Some(note) = OWN.get().and_then(|region| piece_of(region, Layout::new::<KeptBack>())) else {
        return false;
    };
    let note = note.cast::<KeptBack>();
    // SAFETY: a new piece, aligned and large enough.
    unsafe { note.write(KeptBack { next: KEPT_BACK.get(), at, layout }) };
    KEPT_BACK.set(note);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static HEAP: Heap = Heap;

    fn lies_in_a_region<T>(list: &[T]) -> bool {
        region_of(list.as_ptr().cast_mut().cast()).is_some()
    }

    /// As a child does; a test has a thread of its own.
    fn within<T>(work: impl FnOnce(&Region) -> T) -> T {
        let region = Region::take().unwrap();
        region.use_here();
        enter_region();
        let result = work(&region);
        leave_region();
        use_no_region();
        result
    }

    #[test]
    fn memory_comes_from_the_region_only_within() {
        let before = Vec::from([1u8; 100]);
        let inside = within(|_| vec![2u8; 100]);
        let after = Vec::from([3u8; 100]);
        assert_eq!([&before[..], &inside, &after].map(lies_in_a_region), [false, true, false]);
        assert_eq!(inside, [2; 100]);
    }

    #[test]
    fn what_lists_outside_hold_is_kept_when_they_grow_within() {
        let mut list: Vec<u64> = (0..1000).collect();
        within(|_| {
            list.extend(1000..5000);
            assert!(lies_in_a_region(&list));
        });
        list.extend(5000..6000);
        assert!(!lies_in_a_region(&list));
        assert!(list.iter().copied().eq(0..6000));
    }

    #[test]
    fn a_list_that_is_made_again_and_again_takes_its_room_once() {
        within(|region| {
            for turn in 0..10_000 {
                let list: Vec<u32> = (turn..turn + 1000).collect();
                assert!(lies_in_a_region(&list));
            }
            assert!(USES[region.0].most.load(Ordering::Relaxed) < 100_000);
        });
    }

    #[test]
    fn a_region_that_is_full_is_no_end() {
        within(|_| {
            let lists: Vec<Vec<u8>> = (0..10).map(|_| vec![5; REGION / 4]).collect();
            assert!(lies_in_a_region(&lists[0]) && !lies_in_a_region(&lists[9]));
        });
    }

    #[test]
    fn a_region_is_taken_until_all_of_it_was_given_back() {
        let (number, list) = within(|region| (region.0, vec![1u8; 10]));
        let is_taken = || TAKEN.load(Ordering::Relaxed) & 1 << number != 0;
        assert!(is_taken());
        drop(list);
        // Another test may have taken it at once; not so with its pieces.
        assert!(!is_taken() || USES[number].pieces.load(Ordering::Relaxed) > 0);
    }
}
