// SPDX-License-Identifier: Apache-2.0
//! Both directions at once, by two blocking threads or by one loop over readiness.

use std::{
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
        select::{FdSet, select},
        time::{TimeVal, TimeValLike},
    },
    unistd::Pid,
};
use serde_json::{Value, json};

use crate::{
    End, Fds, Io, Shared,
    company::{expect_success, nanosleep},
    data::{LONGEST, Random, Sink, Source},
    fail,
    socket::{read, read_blocking, write, write_all_at_once},
};

pub struct Job<'a> {
    pub fds: &'a Fds,
    pub server: bool,
    pub end: End,
    pub silent_until_spoken_to: bool,
    /// Between two frames.
    pub pause: Duration,
    pub shared: &'static Shared,
}

impl Job<'_> {
    fn ending(&self, sent: u64) -> bool {
        self.shared.ending.load(Ordering::Relaxed) || self.end.reached(sent)
    }

    fn may_speak(&self, receiver: &Receiver<'_>) -> bool {
        !self.silent_until_spoken_to || receiver.sink.total > 0
    }
}

/// Runs to the last frame of both directions.
pub fn run(job: Job<'_>, io: Io, reader: Option<Pid>) -> Value {
    let mut source = Source::new(job.server);
    match io {
        Io::Blocking => blocking(&job, &mut source, reader),
        _ => by_readiness(&job, &mut source, io),
    }
    json!({
        "sent": source.total,
        "sent_digest": format!("{:016x}", source.digest()),
        "received": job.shared.received.load(Ordering::Relaxed),
        "received_digest": format!("{:016x}", job.shared.received_digest.load(Ordering::Relaxed)),
    })
}

fn blocking(job: &Job<'_>, source: &mut Source, reader: Option<Pid>) {
    std::thread::scope(|scope| {
        if reader.is_none() {
            scope.spawn(|| read_to_the_end(job.fds, job.server, job.shared));
        }
        while job.silent_until_spoken_to && job.shared.received.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        let mut turn = Turn::default();
        loop {
            let ending = job.ending(source.total);
            let Some(bytes) = source.pending(ending) else { break };
            write_all_at_once(turn.next(job.fds), bytes);
            let n = bytes.len();
            source.wrote(n);
            if !job.pause.is_zero() {
                nanosleep(job.pause);
            }
        }
    });
    if let Some(reader) = reader {
        expect_success(reader);
    }
}

/// Blocking reads of random sizes until the last frame has come.
pub fn read_to_the_end(fds: &Fds, server: bool, shared: &Shared) {
    let mut receiver = Receiver::new(server, shared);
    let mut turn = Turn::default();
    while !receiver.sink.ended {
        let buffer = receiver.buffer();
        let n = read_blocking(turn.next(fds), buffer);
        receiver.got(n);
    }
}

fn by_readiness(job: &Job<'_>, source: &mut Source, io: Io) {
    let mut receiver = Receiver::new(job.server, job.shared);
    let (mut reads, mut writes) = (Turn::default(), Turn::default());
    let mut waiter = Waiter::new(io, job.fds);
    let mut sent_all = false;
    // When the next frame is due.
    let mut pause_until: Option<Instant> = None;
    while !(sent_all && receiver.sink.ended) {
        let rest = pause_until.map(|until| until.saturating_duration_since(Instant::now()));
        let may_speak = !sent_all && rest.is_none() && job.may_speak(&receiver);
        let ready = waiter.wait(!receiver.sink.ended, may_speak, rest);
        if pause_until.is_some_and(|until| Instant::now() >= until) {
            pause_until = None;
        }
        loop {
            let mut progress = false;
            if ready.read && !receiver.sink.ended {
                let buffer = receiver.buffer();
                if let Some(n) = read(reads.next(job.fds), buffer) {
                    receiver.got(n);
                    progress = true;
                }
            }
            if ready.write && !sent_all && pause_until.is_none() && job.may_speak(&receiver) {
                let ending = job.ending(source.total);
                match source.pending(ending) {
                    None => sent_all = true,
                    Some(bytes) => {
                        if let Some(n) = write(writes.next(job.fds), bytes) {
                            source.wrote(n);
                            progress = true;
                            if !job.pause.is_zero() && source.is_between_frames() {
                                pause_until = Some(Instant::now() + job.pause);
                            }
                        }
                    }
                }
            }
            // An edge is told once: whoever asked for edges goes on until nothing moves.
            if !(progress && io == Io::EpollEt) {
                break;
            }
        }
    }
}

/// Takes the descriptors one after the other.
#[derive(Default)]
struct Turn(usize);

impl Turn {
    fn next<'a>(&mut self, fds: &'a Fds) -> BorrowedFd<'a> {
        self.0 = (self.0 + 1) % fds.len();
        fds[self.0].as_fd()
    }
}

/// A sink with its buffer, which tells the others how far it is.
struct Receiver<'a> {
    sink: Sink,
    buffer: Vec<u8>,
    random: Random,
    shared: &'a Shared,
    server: bool,
}

impl<'a> Receiver<'a> {
    fn new(server: bool, shared: &'a Shared) -> Self {
        let random = Random::new(u64::from(std::process::id()) ^ 0xb0f);
        Receiver { sink: Sink::new(server), buffer: vec![0; LONGEST], random, shared, server }
    }

    fn buffer(&mut self) -> &mut [u8] {
        let size = self.random.size();
        &mut self.buffer[..size]
    }

    fn got(&mut self, n: usize) {
        if n == 0 {
            fail!("the stream ended after {} bytes, without its last frame", self.sink.total);
        }
        if let Err(what) = self.sink.take(&self.buffer[..n]) {
            fail!("{what}");
        }
        self.shared.received.store(self.sink.total, Ordering::Relaxed);
        if self.sink.ended {
            self.shared.received_digest.store(self.sink.digest(), Ordering::Relaxed);
            if self.server {
                self.shared.ending.store(true, Ordering::Relaxed);
            }
        }
    }
}

#[derive(Clone, Copy)]
struct Ready {
    read: bool,
    write: bool,
}

/// The ways to wait for readiness.
enum Waiter<'a> {
    Poll(&'a Fds),
    Select(&'a Fds),
    /// Every descriptor is in the set, each with data of its own.
    Epoll {
        epoll: Epoll,
        fds: &'a Fds,
        io: Io,
        asked: EpollFlags,
    },
}

impl<'a> Waiter<'a> {
    fn new(io: Io, fds: &'a Fds) -> Self {
        match io {
            Io::Blocking => unreachable!("blocking sockets are not waited for"),
            Io::Poll => Waiter::Poll(fds),
            Io::Select => Waiter::Select(fds),
            Io::Epoll | Io::EpollEt | Io::EpollOneshot => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
                    .unwrap_or_else(|error| fail!("epoll_create1: {error}"));
                let asked = match io {
                    Io::EpollEt => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET,
                    _ => EpollFlags::EPOLLONESHOT,
                };
                for (index, fd) in fds.iter().enumerate() {
                    epoll
                        .add(fd.as_fd(), EpollEvent::new(asked, data(index)))
                        .unwrap_or_else(|error| fail!("EPOLL_CTL_ADD: {error}"));
                }
                Waiter::Epoll { epoll, fds, io, asked }
            }
        }
    }

    /// Nothing is ready when the time is over; without one, it waits for ever.
    fn wait(&mut self, read: bool, write: bool, limit: Option<Duration>) -> Ready {
        // Rounded up, so that the time is over afterwards.
        let limit_ms = limit.map(|limit| u16::try_from(limit.as_millis() + 1).unwrap_or(u16::MAX));
        match self {
            Waiter::Poll(fds) => {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, read);
                flags.set(PollFlags::POLLOUT, write);
                let mut list: Vec<PollFd> = fds.iter().map(|fd| PollFd::new(fd.as_fd(), flags)).collect();
                match poll(&mut list, limit_ms.map_or(PollTimeout::NONE, PollTimeout::from)) {
                    Ok(n) if n > 0 || limit.is_some() => (),
                    other => fail!("poll: {other:?}"),
                }
                let any = |flag| list.iter().any(|fd| fd.revents().is_some_and(|got| got.intersects(flag)));
                let over = PollFlags::POLLHUP | PollFlags::POLLERR;
                Ready { read: any(PollFlags::POLLIN | over), write: any(PollFlags::POLLOUT | over) }
            }
            Waiter::Select(fds) => {
                let (mut reads, mut writes) = (FdSet::new(), FdSet::new());
                for fd in fds.iter() {
                    if read {
                        reads.insert(fd.as_fd());
                    }
                    if write {
                        writes.insert(fd.as_fd());
                    }
                }
                let highest = fds.iter().map(|fd| fd.as_raw_fd()).max().unwrap_or(0) + 1;
                let mut time = limit_ms.map(|ms| TimeVal::milliseconds(ms.into()));
                match select(highest, &mut reads, &mut writes, None, time.as_mut()) {
                    Ok(n) if n > 0 || limit.is_some() => (),
                    other => fail!("select: {other:?}"),
                }
                let any = |set: &FdSet| fds.iter().any(|fd| set.contains(fd.as_fd()));
                Ready { read: any(&reads), write: any(&writes) }
            }
            Waiter::Epoll { epoll, fds, io, asked } => {
                let mut now = EpollFlags::empty();
                now.set(EpollFlags::EPOLLIN, read);
                now.set(EpollFlags::EPOLLOUT, write);
                now.set(EpollFlags::EPOLLONESHOT, *io == Io::EpollOneshot);
                // A one-shot is armed anew each time, a level only when what we want to know has changed.
                if *io == Io::EpollOneshot || (*io == Io::Epoll && now != *asked) {
                    for (index, fd) in fds.iter().enumerate() {
                        epoll
                            .modify(fd, &mut EpollEvent::new(now, data(index)))
                            .unwrap_or_else(|error| fail!("EPOLL_CTL_MOD: {error}"));
                    }
                    *asked = now;
                }
                let mut events = [EpollEvent::empty(); 16];
                let time = limit_ms.map_or(EpollTimeout::NONE, EpollTimeout::from);
                let n = match epoll.wait(&mut events, time) {
                    Ok(n) if n > 0 || limit.is_some() => n,
                    other => fail!("epoll_wait: {other:?}"),
                };
                let mut ready = Ready { read: false, write: false };
                for event in &events[..n] {
                    if !(0..fds.len()).any(|index| data(index) == event.data()) {
                        fail!("epoll_wait returned the data {:x}, which is not ours", event.data());
                    }
                    let over = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
                    ready.read |= event.events().intersects(EpollFlags::EPOLLIN | over);
                    ready.write |= event.events().intersects(EpollFlags::EPOLLOUT | over);
                }
                if *io == Io::EpollEt {
                    // One edge may stand for both: try both.
                    ready = Ready { read: true, write: true };
                }
                ready
            }
        }
    }
}

/// What the kernel keeps for us with a descriptor in an epoll set.
fn data(index: usize) -> u64 {
    0xe901_1000_0000_0000 | index as u64
}
