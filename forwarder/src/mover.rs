// SPDX-License-Identifier: Apache-2.0
//! Carries a transaction out: one plain thread from the first look to the thaw.
//!
//! The thread that freezes must be the one that thaws (ptrace(2)), and its end detaches whatever is left: so each
//! transaction has a thread of its own, and that thread does nothing else. [`Remote`] executes the actions of
//! [`crate::transaction::End`]; [`run_local`] moves both ends of a connection within this host in one freeze, where
//! no protocol is needed.

mod local;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use forwarder_api::{Direction, Manner, Moved, Outcome, Refusal, Role, SocketInode};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{
            MsgFlags, recv, setsockopt,
            sockopt::{Linger, ReceiveTimeout},
        },
        time::{TimeVal, TimeValLike},
    },
};

pub use local::run_local;

use crate::{
    alarm::Alarms,
    exchange::{Armed, Deal, Substitution, discard, facts_while_frozen, look},
    fault::{self, Point},
    freeze::Frozen,
    holders::has_fired_one_shot,
    inspect::{Inspector, SocketFacts, TCP_ESTABLISHED},
    options::{ReceiveRoom, Shallow},
    process::not_made,
    queue,
    site::{Parked, Prepared, PreparedEnd, Site, locked, report, reset},
    table::{COMMIT, Silence},
    transaction::{Action, End, Event, Look, Message, Queue},
};

/// A connection whose queues hold more than this is made shallow before it is frozen, in bytes.
const CALM_BYTES: u32 = 256 << 10;
/// How long a busy connection may take to become shallow (its application runs on), and how often that is looked at.
const CALM_TIME: Duration = Duration::from_millis(50);
const CALM_POLL: Duration = Duration::from_micros(500);
/// Between two looks at what is in flight, while frozen.
const SETTLE_POLL: Duration = Duration::from_micros(30);
/// How long a follower waits for its decider to freeze, and, promised, for its word; and how long the decider's blocks
/// wait, twice, for the follower's: longer together, so that a follower that gives up is heard.
const WAIT_FOR_FREEZE: Duration = Duration::from_secs(5);
const FOLLOWER_SILENCE: Duration = Duration::from_secs(1);
const WITNESS_MS: i64 = 1500;

/// An application that is handling a one-shot event is let go for so long, to come to its end with it. A decider does
/// so for a while; a follower longer, because it runs dry when its decider stands still.
const RECESS: Duration = Duration::from_micros(150);
const DECIDER_RECESSES: Duration = Duration::from_millis(20);

/// What others tell a running transaction.
pub struct Mailbox {
    letters: Mutex<VecDeque<Event>>,
    bell: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Arc<Mailbox>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Mailbox { letters: Mutex::default(), bell }))
    }

    pub fn put(&self, event: Event) {
        locked(&self.letters).push_back(event);
        // Full (EAGAIN) is rung, too.
        let _ = self.bell.write(1);
    }

    fn take_all(&self) -> VecDeque<Event> {
        let _ = self.bell.read();
        std::mem::take(&mut *locked(&self.letters))
    }
}

/// Sends a message to the forwarder at the other end.
pub type Tell = Box<dyn Fn(&Message) + Send>;

/// The times of a transaction.
#[derive(Default)]
struct Times {
    began: Option<Instant>,
    frozen: Option<Instant>,
    settled: Option<Instant>,
    installed: Option<Instant>,
    thawed: Option<Instant>,
}

impl Times {
    fn pause_us(&self) -> u64 {
        between(self.began, self.thawed)
    }

    fn moved(&self) -> Moved {
        Moved {
            pause_us: self.pause_us(),
            freeze_us: between(self.began, self.frozen),
            settle_us: between(self.frozen, self.settled),
            install_us: between(self.settled, self.installed),
            ..Moved::default()
        }
    }
}

fn between(from: Option<Instant>, to: Option<Instant>) -> u64 {
    match (from, to) {
        (Some(from), Some(to)) => to.saturating_duration_since(from).as_micros() as u64,
        _ => 0,
    }
}

/// What a mover leaves behind for the site, besides the outcome.
pub struct Finished {
    pub outcome: Outcome,
    /// The way back, if there is one now.
    pub parked: Option<Parked>,
}

/// The new sockets of a transaction: given by the router, or what was parked.
pub fn new_sockets(prepared: &mut Prepared, given: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Refusal> {
    let sockets = match prepared.direction {
        Direction::ToHost => given,
        Direction::ToOverlay => {
            let parked = prepared.parked.as_ref().ok_or(Refusal::NotParked)?;
            let copies: io::Result<Vec<_>> = parked.overlay.iter().map(OwnedFd::try_clone).collect();
            copies.map_err(not_made)?
        }
    };
    if sockets.len() == prepared.ends.len() { Ok(sockets) } else { Err(Refusal::HostPathFailed) }
}

/// What the router wants.
pub struct Task {
    pub role: Role,
    pub manner: Manner,
    pub budget: Duration,
}

/// One end of a transaction between two hosts.
pub struct Remote {
    site: Arc<Site>,
    prepared: Prepared,
    new: Option<OwnedFd>,
    /// The connection of the transaction itself, see [`crate::transaction`].
    witness: OwnedFd,
    role: Role,
    manner: Manner,
    budget: Duration,
    mailbox: Arc<Mailbox>,
    tell: Tell,
}

impl Remote {
    pub fn new(
        site: &Arc<Site>,
        prepared: Prepared,
        [new, witness]: [OwnedFd; 2],
        Task { role, manner, budget }: Task,
        mailbox: Arc<Mailbox>,
        tell: Tell,
    ) -> Remote {
        let site = Arc::clone(site);
        Remote { site, prepared, new: Some(new), witness, role, manner, budget, mailbox, tell }
    }

    /// Run to the end. To be called on a thread of its own.
    pub fn run(mut self) -> Finished {
        let inspector = match self.site.programs.inspector() {
            Ok(inspector) => inspector,
            Err(error) => {
                (self.tell)(&Message::Abort { reason: Refusal::InjectionFailed });
                return Finished { outcome: aborted(report(error), 0), parked: None };
            }
        };
        if let Err(error) = self.prepare_witness() {
            log::error!("{}: its witness cannot be used: {error}", self.prepared.conn);
            (self.tell)(&Message::Abort { reason: Refusal::InjectionFailed });
            return Finished { outcome: aborted(Refusal::InjectionFailed, 0), parked: None };
        }
        let direction = self.prepared.direction;
        let Some(end) = self.prepared.ends.pop() else {
            return Finished { outcome: aborted(Refusal::NotEstablished, 0), parked: None };
        };
        let site = Arc::clone(&self.site);
        let _room = match site.rooms.promise(end.holders.tgids.len()) {
            Ok(room) => room,
            Err(reason) => {
                (self.tell)(&Message::Abort { reason });
                return Finished { outcome: aborted(reason, 0), parked: None };
            }
        };
        let mut running = Running {
            mover: &mut self,
            end: &end,
            inspector,
            frozen: None,
            facts: None,
            armed: None,
            shallow: None,
            receive_room: None,
            times: Times::default(),
            unread_bytes: 0,
            threads: 0,
            look_at: None,
            with_unread: false,
            calm_by: None,
            awaiting_commit: false,
            heard: true,
            silence_ends: Some(Instant::now() + WAIT_FOR_FREEZE),
            ended: None,
        };
        let mut machine = End::new(running.mover.role, direction, running.mover.manner);
        running.run(&mut machine);
        let result = running.ended.take().unwrap_or(Err(Refusal::InjectionFailed));
        let figures = Figures {
            times: std::mem::take(&mut running.times),
            unread_bytes: running.unread_bytes,
            threads: running.threads,
            heard: running.heard,
        };
        drop(running);
        self.finish(end, result, figures)
    }

    /// The decider's end of it resets: neither host is to remember it (TIME_WAIT) for a minute.
    fn prepare_witness(&self) -> nix::Result<()> {
        if self.role == Role::Decider {
            setsockopt(&self.witness, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
            setsockopt(&self.witness, ReceiveTimeout, &TimeVal::milliseconds(WITNESS_MS))?;
        }
        Ok(())
    }

    fn silence(&self) -> Silence {
        match (self.manner, self.prepared.direction) {
            (Manner::Settle, Direction::ToHost) => Silence::AskNew,
            (Manner::Settle, Direction::ToOverlay) => Silence::AskOld,
            (Manner::Salvage, _) => Silence::Keep,
        }
    }

    fn deal(&self) -> Deal<'_> {
        match self.role {
            Role::Decider => Deal::Decides(self.witness.as_fd(), self.silence()),
            Role::Follower => Deal::Follows(self.witness.as_fd()),
        }
    }

    fn finish(mut self, end: PreparedEnd, result: Result<(), Refusal>, figures: Figures) -> Finished {
        let Figures { times, unread_bytes, threads, heard } = figures;
        if let Err(reason) = result {
            if self.new.is_none() && self.prepared.direction == Direction::ToOverlay {
                // The overlay connection was given up: there is no way back any more.
                self.prepared.parked = None;
            }
            return Finished { outcome: aborted(reason, times.pause_us()), parked: None };
        }
        let mut moved = Moved {
            unread_bytes,
            threads,
            processes: end.holders.tgids.len() as u32,
            fds: end.holders.fds() as u32,
            ..times.moved()
        };
        moved.sockets = self.new.iter().filter_map(socket_inode).collect();
        let parked = match self.prepared.direction {
            // A peer that was not heard may need what is unread here: then there is no way back.
            Direction::ToHost => {
                (heard && discard(end.old.as_fd(), unread_bytes as usize)).then_some(Parked {
                    overlay: vec![end.old],
                    host: moved.sockets.clone(),
                    note: std::mem::take(&mut self.prepared.note),
                    moved: moved.clone(),
                })
            }
            Direction::ToOverlay => {
                self.prepared.parked = None;
                // Where its path is dead, nobody acknowledges what is in it, nor its end: it would be sent again and again
                // for a quarter of an hour. Where it is not, this tells a peer that hears nothing else: see `Silence`. A
                // reset that arrives otherwise finds the peer's socket out of use, too.
                reset(&end.old);
                None
            }
        };
        Finished { outcome: Outcome::Moved(moved), parked }
    }
}

/// What is known of a transaction when it is over.
struct Figures {
    times: Times,
    unread_bytes: u64,
    threads: u32,
    /// See [`exchange::Installed`](crate::exchange::Installed).
    heard: bool,
}

fn aborted(reason: Refusal, pause_us: u64) -> Outcome {
    Outcome::Aborted { reason, pause_us }
}

fn socket_inode(socket: &OwnedFd) -> Option<SocketInode> {
    nix::sys::stat::fstat(socket).ok().map(|stat| SocketInode(stat.st_ino))
}

/// The state of a [`Remote`] while it runs. Field order is drop order: thaw first.
struct Running<'a> {
    frozen: Option<Frozen>,
    armed: Option<Armed>,
    shallow: Option<Shallow<'a>>,
    receive_room: Option<ReceiveRoom<'a>>,
    mover: &'a mut Remote,
    end: &'a PreparedEnd,
    inspector: Inspector,
    facts: Option<SocketFacts>,
    times: Times,
    unread_bytes: u64,
    threads: u32,
    look_at: Option<Instant>,
    with_unread: bool,
    calm_by: Option<Instant>,
    awaiting_commit: bool,
    heard: bool,
    silence_ends: Option<Instant>,
    ended: Option<Result<(), Refusal>>,
}

impl Running<'_> {
    fn run(&mut self, machine: &mut End) {
        let mut events = VecDeque::from([Event::Start]);
        while !machine.is_over() {
            while let Some(event) = events.pop_front() {
                for action in machine.step(event) {
                    if let Some(event) = self.act(action) {
                        events.push_back(event);
                    }
                }
            }
            if !machine.is_over() {
                self.wait(&mut events);
            }
        }
    }

    /// Do it, and say what came of it.
    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Tell(message) => {
                (self.mover.tell)(&message);
                if message == Message::Armed {
                    fault::point(Point::Promised);
                }
                None
            }
            Action::MakeShallow => self.make_shallow(),
            Action::Freeze => Some(self.freeze().map_or_else(Event::FreezeFailed, Event::Frozen)),
            Action::FreezeAndSave => {
                Some(self.freeze_and_save().map_or_else(Event::FreezeFailed, Event::Saved))
            }
            Action::LookAgain { with_unread } => {
                self.with_unread = with_unread;
                self.look_at = Some(if with_unread { Instant::now() } else { Instant::now() + SETTLE_POLL });
                None
            }
            Action::Arm { carry } => Some(self.arm(carry).map_or_else(Event::ArmFailed, |()| Event::Armed)),
            Action::OpenGate => Some(self.install().map_or_else(Event::InstallFailed, |()| Event::Installed)),
            Action::CloseGate => {
                if let (Some(armed), Some(frozen)) = (self.armed.take(), &mut self.frozen) {
                    armed.turn_back(frozen);
                }
                None
            }
            Action::AwaitCommit => {
                self.awaiting_commit = true;
                self.silence_ends = Some(Instant::now() + FOLLOWER_SILENCE);
                None
            }
            Action::CloseNew => {
                // So that a peer that hears nothing else knows: see `Silence`.
                self.mover.new.take().iter().for_each(reset);
                None
            }
            Action::Thaw => {
                self.receive_room = None;
                if let Some(frozen) = self.frozen.take() {
                    self.times.thawed = Some(frozen.thaw());
                }
                self.shallow = None;
                None
            }
            Action::End(result) => {
                self.ended = Some(result);
                None
            }
        }
    }

    fn queued_bytes(&self) -> u32 {
        match self.inspector.socket(self.end.old.as_fd()) {
            Ok(Some(facts)) => {
                let sending = facts.write_seq.wrapping_sub(facts.snd_una);
                let unread = facts.rcv_nxt.wrapping_sub(facts.copied_seq);
                sending.max(unread)
            }
            Ok(None) | Err(_) => 0,
        }
    }

    fn make_shallow(&mut self) -> Option<Event> {
        if self.queued_bytes() > CALM_BYTES / 4 {
            match Shallow::make(self.end.old.as_fd()) {
                Ok(shallow) => self.shallow = Some(shallow),
                Err(reason) => return Some(Event::Cancel(reason)),
            }
        }
        let Some(_) = &self.shallow else { return Some(Event::Calm) };
        self.calm_by = Some(Instant::now() + CALM_TIME);
        None
    }

    fn freeze(&mut self) -> Result<Look, Refusal> {
        self.silence_ends = None;
        let tgids = &self.end.holders.tgids;
        let patience = match self.mover.role {
            Role::Decider => DECIDER_RECESSES,
            Role::Follower => self.mover.budget / 2,
        };
        let deadline = Instant::now() + patience;
        let facts = loop {
            let alarms = Alarms::look(&self.inspector, tgids);
            self.times.began = Some(Instant::now());
            let frozen = Frozen::freeze(tgids, &alarms, Instant::now() + self.mover.budget);
            self.times.thawed = Some(Instant::now());
            let frozen = frozen?;
            self.times.frozen = Some(Instant::now());
            self.threads = frozen.threads() as u32;
            let facts = facts_while_frozen(self.end, &frozen, &self.inspector);
            if facts.as_ref().is_ok_and(has_fired_one_shot) && Instant::now() + RECESS < deadline {
                self.times.thawed = Some(frozen.thaw());
                std::thread::sleep(RECESS);
                continue;
            }
            self.frozen = Some(frozen);
            break facts?;
        };
        let look = look(self.end.old.as_fd(), &facts, false)?;
        self.facts = Some(facts);
        Ok(look)
    }

    fn freeze_and_save(&mut self) -> Result<Queue, Refusal> {
        self.freeze()?;
        let facts = self.facts.as_ref().ok_or(Refusal::HolderVanished)?;
        let unacknowledged = facts.write_seq.wrapping_sub(facts.snd_una) as usize;
        let bytes = queue::peek(self.end.old.as_fd(), unacknowledged)?;
        Ok(Queue { write_seq: facts.write_seq, bytes })
    }

    fn look(&mut self) -> Event {
        let looked = || -> Result<(SocketFacts, Look), Refusal> {
            let facts = self
                .inspector
                .socket(self.end.old.as_fd())
                .map_err(|_| Refusal::InjectionFailed)?
                .ok_or(Refusal::HolderVanished)?;
            crate::site::may_be_moved(&facts)?;
            let look = look(self.end.old.as_fd(), &facts, self.with_unread)?;
            Ok((facts, look))
        }();
        match looked {
            Ok((facts, look)) => {
                self.facts = Some(facts);
                if self.receive_room.is_none() && self.mover.manner == Manner::Settle {
                    // Something is on its way, and nobody reads: make room for it to land.
                    let room = forwarder_api::MAX_UNREAD_BYTES;
                    self.receive_room = ReceiveRoom::make(self.end.old.as_fd(), room).ok();
                }
                Event::Looked(look)
            }
            Err(reason) => Event::Cancel(reason),
        }
    }

    fn substitution<'b>(
        end: &'b PreparedEnd,
        new: &'b OwnedFd,
        facts: &SocketFacts,
        carry: Vec<u8>,
    ) -> Substitution<'b> {
        Substitution {
            old: end.old.as_fd(),
            new: new.as_fd(),
            facts: facts.clone(),
            holders: &end.holders,
            v6: end.v6,
            carry,
        }
    }

    fn arm(&mut self, carry: Vec<u8>) -> Result<(), Refusal> {
        self.times.settled = Some(Instant::now());
        let (Some(frozen), Some(new), Some(facts)) = (&mut self.frozen, &self.mover.new, &self.facts) else {
            return Err(Refusal::HostPathFailed);
        };
        self.unread_bytes = u64::from(facts.rcv_nxt.wrapping_sub(facts.copied_seq));
        let pair = Self::substitution(self.end, new, facts, carry);
        let deadline = Instant::now() + self.mover.budget;
        self.armed = Some(Armed::arm(frozen, &[pair], self.mover.deal(), deadline)?);
        Ok(())
    }

    fn install(&mut self) -> Result<(), Refusal> {
        let new_has_ended = self.new_has_ended();
        let (Some(frozen), Some(new), Some(facts), Some(armed)) =
            (&mut self.frozen, &self.mover.new, &self.facts, self.armed.take())
        else {
            return Err(Refusal::HostPathFailed);
        };
        if new_has_ended {
            armed.turn_back(frozen);
            return Err(Refusal::HostPathFailed);
        }
        let pair = Self::substitution(self.end, new, facts, Vec::new());
        let result = armed.install(frozen, &[pair]);
        self.times.installed = Some(Instant::now());
        self.heard = result?.heard;
        Ok(())
    }

    /// Until something happens that the machine must know.
    fn wait(&mut self, events: &mut VecDeque<Event>) {
        let now = Instant::now();
        if let Some(by) = self.calm_by
            && (now >= by || self.queued_bytes() <= CALM_BYTES)
        {
            self.calm_by = None;
            return events.push_back(Event::Calm);
        }
        if self.look_at.is_some_and(|at| now >= at) {
            self.look_at = None;
            return events.push_back(self.look());
        }
        let budget_ends =
            self.times.began.filter(|_| !self.awaiting_commit).map(|began| began + self.mover.budget);
        if budget_ends.is_some_and(|at| now >= at) {
            return events.push_back(Event::BudgetOver);
        }
        if self.silence_ends.is_some_and(|at| now >= at) {
            self.silence_ends = None;
            return events.push_back(Event::SilenceOver);
        }
        if self.awaiting_commit
            && let Some(event) = self.read_commit()
        {
            self.awaiting_commit = false;
            return events.push_back(event);
        }
        let soon = self.calm_by.map(|_| now + CALM_POLL);
        let until = [soon, self.look_at, budget_ends, self.silence_ends].into_iter().flatten().min();
        self.sleep(until.map_or(Duration::from_secs(1), |until| until - now));
        events.extend(self.mover.mailbox.take_all());
    }

    fn sleep(&self, time: Duration) {
        if time < Duration::from_millis(1) && !self.awaiting_commit {
            // Shorter than poll(2) can tell: only the mailbox may have news, and it is looked at right after.
            if locked(&self.mover.mailbox.letters).is_empty() {
                std::thread::sleep(time.min(SETTLE_POLL));
            }
            return;
        }
        let mut fds = vec![PollFd::new(self.mover.mailbox.bell.as_fd(), PollFlags::POLLIN)];
        if self.awaiting_commit {
            fds.push(PollFd::new(self.mover.witness.as_fd(), PollFlags::POLLIN));
        }
        let _ = poll(&mut fds, PollTimeout::from(time.as_millis().clamp(1, 1000) as u16));
    }

    /// The peer's forwarder, or its application, has closed the new connection.
    fn new_has_ended(&self) -> bool {
        let Some(new) = &self.mover.new else { return true };
        match self.inspector.socket(new.as_fd()) {
            Ok(Some(facts)) => facts.state != TCP_ESTABLISHED || facts.shutdown != 0,
            Ok(None) | Err(_) => true,
        }
    }

    fn read_commit(&self) -> Option<Event> {
        let mut byte = [0];
        match recv(self.mover.witness.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(1) if byte == *COMMIT => Some(Event::Commit),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => None,
            Ok(_) | Err(_) => Some(Event::WitnessEnded),
        }
    }
}
