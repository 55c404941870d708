// SPDX-License-Identifier: Apache-2.0
//! The thread that has loaded the programs, reads what they tell and looks at young connections.

use std::{
    cell::RefCell,
    fs::File,
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::SyncSender,
    },
    time::{Duration, Instant},
};

use forwarder_api::SocketInode;
use libbpf_rs::{
    Link, MapCore, MapFlags, MapHandle, ProgramMut, RingBuffer, RingBufferBuilder,
    skel::{OpenSkel, SkelBuilder},
};
use mio::{Interest, Poll, Token, unix::SourceFd};
use tokio::sync::{mpsc, watch};

use super::{
    Connection, Scope, Side, Telling, TraceError, TraceEvent,
    young::{Verdict, Young, judge},
};
use crate::{
    bpf::run,
    bytes::{Plain, from_bytes, unmapped},
    identity::Names,
    rules::{After, RuleSet},
};

crate::bpf::skeleton!("connect");
pub(super) use skeleton::types;
use skeleton::{ConnectSkel, ConnectSkelBuilder};

/// `bpf/event.h`
pub(super) const EVENT_CONNECTION: u32 = 1;
pub(super) const EVENT_HOST_SOCKET_CLOSED: u32 = 2;
pub(super) const EVENT_BIRTH: u32 = 3;
pub(super) const EVENT_HOST_SOCKET_WAITS: u32 = 4;
pub(super) const SIDE_CLIENT: u64 = 1;
/// `bpf/connect.bpf.c`
const LOOK: u32 = 512;

/// What wakes the thread.
pub(super) const STOP: Token = Token(0);
const RING: Token = Token(1);
/// Between two looks at births: a quarter of the time after which the first are told, within these.
const SHORTEST_PERIOD: Duration = Duration::from_millis(1);
const LONGEST_PERIOD: Duration = Duration::from_millis(25);

/// What the thread is given.
pub struct Task {
    pub scope: Scope,
    /// The map of `bpf/identity.bpf.c`.
    pub identities: OwnedFd,
    pub telling: Telling,
    pub events: mpsc::Sender<TraceEvent>,
    pub wake: Poll,
    /// Records lost here.
    pub lost: Arc<AtomicU64>,
}

/// A record of the ring.
pub(super) enum Record {
    Connection(types::connection_event),
    HostSocketClosed(Names),
    HostSocketWaits,
    Birth,
    Odd,
}

impl Task {
    /// Until it is to stop. Says on `ready` whether the programs are attached, with the map of what they have lost.
    pub fn run(self, ready: &SyncSender<Result<MapHandle, TraceError>>) {
        let mut object = MaybeUninit::uninit();
        let loaded = self.load(&mut object).and_then(|skel| {
            let cgroup = File::open(&self.scope.path)
                .map_err(|source| TraceError::Scope { path: self.scope.path.clone(), source })?;
            let events = &skel.progs.socket_events;
            let link = events.attach_cgroup(cgroup.as_raw_fd()).map_err(TraceError::Attach)?;
            let counters = MapHandle::try_from(&skel.maps.counters).map_err(TraceError::Map)?;
            Ok((skel, link, counters))
        });
        let (skel, link, counters) = match loaded {
            Ok(loaded) => loaded,
            Err(error) => return drop(ready.send(Err(error))),
        };
        if ready.send(Ok(counters)).is_ok()
            && let Err(error) = self.read(skel, link)
        {
            log::error!("new connections are not seen any more: {error}");
        }
    }

    fn load<'obj>(
        &self,
        object: &'obj mut MaybeUninit<libbpf_rs::OpenObject>,
    ) -> Result<ConnectSkel<'obj>, TraceError> {
        let mut open = ConnectSkelBuilder::default().open(object).map_err(TraceError::Load)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.own_netns = self.scope.own_netns;
            rodata.tell_at_once = u32::from(matches!(self.telling, Telling::AtOnce));
        }
        open.maps.identities.reuse_fd(self.identities.as_fd()).map_err(TraceError::Load)?;
        open.load().map_err(TraceError::Load)
    }

    fn read(self, mut skel: ConnectSkel<'_>, _link: Link) -> Result<(), libbpf_rs::Error> {
        let records = RefCell::new(Vec::new());
        let mut builder = RingBufferBuilder::new();
        builder.add(&skel.maps.events, |bytes| {
            records.borrow_mut().push(decode(bytes));
            0
        })?;
        let rules = match self.telling {
            Telling::AtOnce => None,
            Telling::WhenOldEnough(rules) => Some(rules),
        };
        let ring = builder.build()?;
        self.wake.registry().register(&mut SourceFd(&ring.epoll_fd()), RING, Interest::READABLE)?;
        let mut reader = Reader {
            ring,
            wake: self.wake,
            woken: mio::Events::with_capacity(2),
            records: &records,
            asleep: &skel.maps.asleep,
            look_at_births: &mut skel.progs.look_at_births,
            look_at_one: &mut skel.progs.look_at_one,
            rules,
            events: self.events,
            lost: self.lost,
            looked: Instant::now(),
            over: 0,
            births_due: Some(Instant::now()),
            young: Young::new(),
        };
        while !reader.wait()? {
            reader.look()?;
        }
        Ok(())
    }
}

struct Reader<'a, 'obj> {
    ring: RingBuffer<'a>,
    wake: Poll,
    woken: mio::Events,
    records: &'a RefCell<Vec<Record>>,
    asleep: &'a dyn MapCore,
    look_at_births: &'a mut ProgramMut<'obj>,
    look_at_one: &'a mut ProgramMut<'obj>,
    rules: Option<watch::Receiver<RuleSet>>,
    events: mpsc::Sender<TraceEvent>,
    lost: Arc<AtomicU64>,
    /// When the last look began.
    looked: Instant,
    /// Births before those that are to be looked at again.
    over: u64,
    /// When to do so. None: the next one wakes us.
    births_due: Option<Instant>,
    young: Young<types::birth>,
}

impl Reader<'_, '_> {
    /// For the next look, a record, or the end: true.
    fn wait(&mut self) -> Result<bool, libbpf_rs::Error> {
        let next = self.births_due.into_iter().chain(self.young.next()).min();
        let left = next.map(|at| at.saturating_duration_since(Instant::now()));
        match self.wake.poll(&mut self.woken, left) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        match self.ring.poll(Duration::ZERO) {
            Err(error) if error.kind() != libbpf_rs::ErrorKind::Interrupted => return Err(error),
            Ok(()) | Err(_) => self.take_in(),
        }
        Ok(self.woken.iter().any(|event| event.token() == STOP))
    }

    fn period(&self) -> Duration {
        let quarter = self.least_after().time.map_or(LONGEST_PERIOD, |time| time / 4);
        quarter.clamp(SHORTEST_PERIOD, LONGEST_PERIOD)
    }

    fn least_after(&self) -> After {
        self.rules.as_ref().map_or(After::DEFAULT, |rules| rules.borrow().least_after())
    }

    /// At what is due.
    fn look(&mut self) -> Result<(), libbpf_rs::Error> {
        let now = Instant::now();
        if self.births_due.is_some_and(|due| due <= now) {
            self.births_due = None;
            let mut left = self.look_at_births()?;
            if !left {
                // From now on births wake us. One may have come before.
                self.asleep.update(&[0; 4], &1u64.to_ne_bytes(), MapFlags::ANY)?;
                left = self.look_at_births()?;
            }
            if left {
                self.births_due = Some(now + self.period());
            }
        }
        while let Some(birth) = self.young.due(now) {
            self.look_at_one(&birth)?;
        }
        Ok(())
    }

    /// Is any birth left to be looked at again?
    fn look_at_births(&mut self) -> Result<bool, libbpf_rs::Error> {
        let After { time, bytes } = self.least_after();
        let after_ns = time.map_or(u64::MAX, |time| time.as_nanos() as u64);
        let (mut from, mut left) = (self.over, false);
        loop {
            self.looked = Instant::now();
            let counts = run(self.look_at_births, &[from, after_ns, bytes.unwrap_or(u64::MAX)])?;
            let (over, looked) = (counts >> 16, counts & 0xffff);
            self.take_in_told()?;
            if !left {
                self.over += u64::from(over);
            }
            left |= over < looked;
            from += u64::from(looked);
            if looked < LOOK {
                return Ok(left);
            }
        }
    }

    fn look_at_one(&mut self, birth: &types::birth) -> Result<(), libbpf_rs::Error> {
        self.looked = Instant::now();
        run(self.look_at_one, &[birth.cookie, birth.sock, birth.born_ns, birth.side])?;
        self.take_in_told()
    }

    /// The ages that are told count from the look that was made just now.
    fn take_in_told(&mut self) -> Result<(), libbpf_rs::Error> {
        self.ring.consume()?;
        self.take_in();
        Ok(())
    }

    fn take_in(&mut self) {
        for record in self.records.take() {
            match record {
                Record::Birth => self.births_due = Some(Instant::now() + self.period()),
                Record::HostSocketClosed(names) => self.send(TraceEvent::HostSocketClosed(names)),
                Record::HostSocketWaits => self.send(TraceEvent::HostSocketWaits),
                Record::Connection(event) => self.judge(&event),
                Record::Odd => self.lose(),
            }
        }
    }

    fn judge(&mut self, event: &types::connection_event) {
        let age = Duration::from_nanos(event.age_ns);
        let seen = connection(event, self.looked.checked_sub(age).unwrap_or(self.looked));
        let (server, client) = seen.server_and_client();
        let verdict = match &self.rules {
            None => Verdict::Tell,
            Some(rules) => {
                let after = rules.borrow().after(server, client);
                judge(after, age, event.bytes, event.socket != 0)
            }
        };
        match verdict {
            Verdict::Tell => self.send(TraceEvent::Connection(seen)),
            Verdict::LookAgain(after) => {
                self.young.add(self.looked + after, event.birth.cookie, event.birth);
            }
            Verdict::LeaveToScans => {}
        }
    }

    fn send(&self, event: TraceEvent) {
        if self.events.try_send(event).is_err() {
            self.lose();
        }
    }

    fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: of `bpf/event.h`: integers and arrays of bytes, padding explicit.
unsafe impl Plain for types::connection_event {}
// SAFETY: as above.
unsafe impl Plain for types::closed_event {}

pub(super) fn decode(bytes: &[u8]) -> Record {
    let decoded = bytes.first_chunk().and_then(|kind| match u32::from_ne_bytes(*kind) {
        EVENT_CONNECTION => from_bytes(bytes).map(Record::Connection),
        EVENT_HOST_SOCKET_CLOSED => from_bytes(bytes).map(|types::closed_event { identity: of, .. }| {
            let names = Names::read(of.swap, (of.local, of.local_port), (of.remote, of.remote_port));
            Record::HostSocketClosed(names)
        }),
        EVENT_BIRTH => Some(Record::Birth),
        EVENT_HOST_SOCKET_WAITS => Some(Record::HostSocketWaits),
        _ => None,
    });
    decoded.unwrap_or(Record::Odd)
}

pub(super) fn connection(event: &types::connection_event, born: Instant) -> Connection {
    let address = |ip, port| SocketAddr::new(unmapped(ip), port);
    Connection {
        side: if event.birth.side == SIDE_CLIENT { Side::Client } else { Side::Server },
        socket: SocketInode(event.socket),
        cgroup_id: event.cgroup_id,
        netns: event.netns,
        local: address(event.local, event.local_port),
        remote: address(event.remote, event.remote_port),
        v6: event.v6 != 0,
        born,
    }
}
