// SPDX-License-Identifier: Apache-2.0
//! How long threads would sleep on, and what they are like once stopped, by `bpf/sleep.bpf.c`.

use std::{
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use libbpf_rs::{
    MapHandle,
    skel::{OpenSkel, SkelBuilder},
};
use nix::time::{ClockId, clock_getres};

use super::{InspectError, Inspector, Record};
use crate::process::Tid;

#[allow(
    clippy::all,
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    clippy::expect_used,
    unused_imports
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/sleep.skel.rs"));
}
use skeleton::types;

// SAFETY: integers and arrays of integers, padding explicit.
unsafe impl Record for types::sleepers {}
// SAFETY: as above.
unsafe impl Record for types::threads {}

/// A thread that sleeps for a time.
#[derive(Clone, Copy, Debug)]
pub struct Sleeper {
    pub tid: Tid,
    pub left: Duration,
    /// How often it has waited in the kernel, this time included.
    pub switches: u64,
}

/// A thread that stands still.
#[derive(Clone, Copy, Debug)]
pub struct Stopped {
    pub tid: Tid,
    /// How often it has waited in the kernel, its stop included.
    pub switches: u64,
    /// Does a seccomp filter, or the strict mode, stand between it and its system calls?
    pub is_filtered: bool,
}

/// The loaded programs.
pub struct Programs {
    find_sleepers: OwnedFd,
    look_at_threads: OwnedFd,
    sleeping: MapHandle,
    stopped: MapHandle,
    /// What the kernel's coarse timers count.
    tick: Duration,
}

impl Programs {
    pub fn load() -> Result<Programs, InspectError> {
        let mut object = MaybeUninit::uninit();
        let skel = skeleton::SleepSkelBuilder::default()
            .open(&mut object)
            .and_then(|open| open.load())
            .map_err(InspectError::Load)?;
        let keep =
            |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| InspectError::Load(error.into()));
        Ok(Programs {
            find_sleepers: keep(skel.progs.find_sleepers.as_fd())?,
            look_at_threads: keep(skel.progs.look_at_threads.as_fd())?,
            sleeping: MapHandle::try_from(&skel.maps.sleeping).map_err(InspectError::Load)?,
            stopped: MapHandle::try_from(&skel.maps.stopped).map_err(InspectError::Load)?,
            // This clock goes by ticks.
            tick: clock_getres(ClockId::CLOCK_MONOTONIC_COARSE)
                .map_err(|error| InspectError::Run(error.into()))?
                .into(),
        })
    }

    fn sleeper(&self, found: &types::sleeper) -> Sleeper {
        let ticks = u32::try_from(found.left_ticks.max(0)).unwrap_or(u32::MAX);
        Sleeper {
            tid: Tid(found.tid as i32),
            left: Duration::from_nanos(found.left_ns.max(0) as u64) + self.tick * ticks,
            switches: found.switches,
        }
    }
}

impl Inspector {
    /// The threads that sleep for a time, of the process behind `pidfd`.
    pub fn sleepers(&self, pidfd: BorrowedFd<'_>) -> Result<Vec<Sleeper>, InspectError> {
        let program = &self.programs.sleep;
        if !self.run(&program.find_sleepers, &self.process(pidfd))? {
            return Ok(vec![]);
        }
        let record: types::sleepers = self.result(&program.sleeping)?;
        let found = record.list.iter().take(record.count as usize);
        Ok(found.map(|found| program.sleeper(found)).collect())
    }

    /// The threads of the process behind `pidfd`, all of which stand still. Of very many, some are left out.
    pub fn stopped(&self, pidfd: BorrowedFd<'_>) -> Result<Vec<Stopped>, InspectError> {
        let program = &self.programs.sleep;
        if !self.run(&program.look_at_threads, &self.process(pidfd))? {
            return Ok(vec![]);
        }
        let record: types::threads = self.result(&program.stopped)?;
        let found = record.list.iter().take(record.count as usize);
        let stopped = |thread: &types::thread| Stopped {
            tid: Tid(thread.tid as i32),
            switches: thread.switches,
            is_filtered: thread.seccomp != 0,
        };
        Ok(found.map(stopped).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
        time::Instant,
    };

    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollTimeout};

    use super::*;
    use crate::{
        inspect::Programs,
        process::{self, Tgid},
    };

    const TIME: Duration = Duration::from_secs(2);

    /// What is found of a thread that does this, as soon as it sleeps.
    fn found_in(sleep: impl FnOnce() + Send + 'static) -> Sleeper {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let (tell, hear) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            tell.send(nix::unistd::gettid().as_raw()).unwrap();
            sleep();
        });
        let tid = Tid(hear.recv().unwrap());
        let pidfd = process::pidfd(Tgid(std::process::id() as i32)).unwrap();
        let deadline = Instant::now() + TIME / 2;
        loop {
            let found = inspector.sleepers(pidfd.as_fd()).unwrap();
            if let Some(sleeper) = found.into_iter().find(|sleeper| sleeper.tid == tid) {
                return sleeper;
            }
            assert!(Instant::now() < deadline, "the thread is not found");
        }
    }

    fn expect_about(sleeper: Sleeper, left: Duration) {
        assert!(sleeper.left <= left + Duration::from_millis(20), "{sleeper:?}");
        assert!(sleeper.left + TIME / 2 > left, "{sleeper:?}");
    }

    #[test]
    fn the_time_left_of_an_epoll_wait_is_found() {
        let sleeper = found_in(|| {
            let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
            let _ = epoll.wait(&mut [nix::sys::epoll::EpollEvent::empty()], EpollTimeout::from(2000u16));
        });
        expect_about(sleeper, TIME);
    }

    #[test]
    fn the_time_left_of_a_recv_is_found() {
        let sleeper = found_in(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            client.set_read_timeout(Some(TIME)).unwrap();
            let _ = client.read(&mut [0]);
        });
        expect_about(sleeper, TIME);
    }
}
