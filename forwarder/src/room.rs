// SPDX-License-Identifier: Apache-2.0
//! Room in our descriptor table for the transactions under way. What a stop does to a call cannot be undone without
//! descriptors, so they are counted before anything is stopped; counted, not taken for a try, because another transaction
//! may need them at that moment.

use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
};

use forwarder_api::Refusal;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a transaction opens at most while processes stand still: its own, those for each process, and for each end of a
/// connection.
const OWN: usize = 12;
const OF_PROCESS: usize = 4;
const OF_END: usize = 1;
/// For everything else that goes on meanwhile.
const OTHERS: usize = 32;

/// Descriptors promised to transactions, used by now or not.
#[derive(Default)]
pub struct Rooms(AtomicUsize);

/// A promise, as long as it is there.
pub struct Room<'a> {
    rooms: &'a Rooms,
    descriptors: usize,
}

impl Rooms {
    pub fn promise(&self, processes: usize, ends: usize) -> Result<Room<'_>, Refusal> {
        let room = Room { rooms: self, descriptors: OWN + OF_PROCESS * processes + OF_END * ends };
        let promised = self.0.fetch_add(room.descriptors, Ordering::Relaxed) + room.descriptors;
        match free_descriptors() {
            Ok(free) if free >= promised + OTHERS => Ok(room),
            Ok(_) | Err(_) => Err(Refusal::Exhausted),
        }
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.rooms.0.fetch_sub(self.descriptors, Ordering::Relaxed);
    }
}

fn free_descriptors() -> io::Result<usize> {
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Since Linux 6.2 the directory's size is their number; before, it is zero. Each parked socket is an entry.
    let open = match std::fs::metadata("/proc/self/fd")?.len() {
        0 => std::fs::read_dir("/proc/self/fd")?.count(),
        open => open as usize,
    };
    Ok((limit as usize).saturating_sub(open))
}

/// Every parked socket is a descriptor: take as many as we may have. The usual limit is for programs that use select(2).
pub fn raise_limit() -> io::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}
