// SPDX-License-Identifier: Apache-2.0
//! Carries a transaction out, of one connection or of several together: one child from the first look to the thaw.
//!
//! Who freezes must be the one that thaws (ptrace(2)), and its end detaches whatever is left: so each transaction has a
//! process of its own ([`crate::child`]), and that does nothing else. [`Remote`] executes the actions of
//! [`crate::transaction::End`]; [`run_local`] moves both ends of connections within this host in one freeze, where no
//! protocol is needed.

mod calm;
mod line;
mod local;

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use forwarder_api::{Direction, MAX_UNREAD_BYTES, Manner, Moved, Refusal, Role, SocketInode};
use nix::{
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        eventfd::{EfdFlags, EventFd},
        socket::{setsockopt, sockopt::ReceiveTimeout},
        time::{TimeSpec, TimeVal, TimeValLike},
    },
};
use serde::{Deserialize, Serialize};

use calm::Shallows;
use line::Line;
pub use local::run_local;

use crate::{
    alarm::Alarms,
    exchange::{
        Armed, Deal, Gear, Load, SMALL_UNREAD, Substitution, discard, facts_while_frozen, look,
        wait_for_carried,
    },
    fault::{self, Point},
    freeze::{Frozen, next_nap},
    holders::has_fired_one_shot,
    inspect::{Inspector, SocketFacts, TCP_ESTABLISHED},
    options::{Given, Pushed, ReceiveRoom, acknowledge},
    process::{self, not_made},
    queue,
    site::{Parked, Prepared, PreparedEnd, Site, locked, report, reset, tgids_of},
    table::Silence,
    transaction::{Action, End, Event, Look, Message, Queue, Word},
};

/// Who has so many bytes on their way pours, and freezes before the peer does.
const POURING_BYTES: u32 = 16 << 10;
/// Between two looks at what is in flight, while frozen, at least.
const SETTLE_POLL: Duration = Duration::from_micros(30);
/// Between two looks at what nobody tells.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// How long a follower waits for its decider to freeze, and, promised, for its word; and how long the decider's blocks
/// wait, twice, for the follower's: longer together, so that a follower that gives up is heard.
const WAIT_FOR_FREEZE: Duration = Duration::from_secs(5);
const FOLLOWER_SILENCE: Duration = Duration::from_secs(1);
const WITNESS_MS: i64 = 1500;

/// An application that is handling a one-shot event is let go for so long, to come to its end with it. A decider does
/// so for a while; a follower longer, because it runs dry when its decider stands still.
const RECESS: Duration = Duration::from_micros(150);
const DECIDER_RECESSES: Duration = Duration::from_millis(20);

/// What the forwarder at the other end says, by way of the routers.
#[derive(Serialize, Deserialize)]
pub struct Said {
    pub message: Message,
    /// Looks: so many unread bytes of each come on the witness, and are not in it. None of any: all are in it.
    pub on_witness: Vec<u32>,
}

impl From<Message> for Said {
    fn from(message: Message) -> Said {
        Said { message, on_witness: Vec::new() }
    }
}

/// What a running transaction is told.
pub enum Told {
    FromPeer(Said),
    Cancel(Refusal),
}

/// Where others tell it.
pub struct Mailbox {
    told: Mutex<VecDeque<Told>>,
    bell: EventFd,
}

impl Mailbox {
    pub fn new() -> io::Result<Arc<Mailbox>> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Arc::new(Mailbox { told: Mutex::default(), bell }))
    }

    pub fn put(&self, told: Told) {
        locked(&self.told).push_back(told);
        // Full (EAGAIN) is rung, too.
        let _ = self.bell.write(1);
    }

    fn take_all(&self) -> VecDeque<Told> {
        let _ = self.bell.read();
        std::mem::take(&mut *locked(&self.told))
    }
}

/// Says it to the forwarder at the other end.
pub type Tell = Box<dyn Fn(Said) + Send>;

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

/// A connection that is to be moved.
pub struct Member {
    pub prepared: Prepared,
    /// For each end, the socket that takes its place, and the options that were given to it.
    pub new: Vec<OwnedFd>,
    pub given: Vec<Given>,
    /// The connection of the transaction itself, see [`crate::transaction`]: the first member's serves for all. None
    /// within a host.
    pub witness: Option<OwnedFd>,
}

impl Member {
    /// `given`: what the router gave, the new sockets of a swap and then the witness.
    pub fn new(prepared: Prepared, mut given: Vec<OwnedFd>, with_witness: bool) -> Result<Member, Refusal> {
        let witness = if with_witness { given.pop() } else { None };
        let new = match prepared.direction {
            Direction::ToHost => given,
            Direction::ToOverlay => {
                let parked = prepared.parked.as_ref().ok_or(Refusal::NotParked)?;
                let copies: io::Result<Vec<_>> = parked.overlay.iter().map(OwnedFd::try_clone).collect();
                copies.map_err(not_made)?
            }
        };
        let complete = new.len() == prepared.ends.len() && witness.is_some() == with_witness;
        if !complete {
            return Err(Refusal::HostPathFailed);
        }
        Ok(Member { prepared, new, given: Vec::new(), witness })
    }

    fn give_options(&mut self, inspector: &Inspector) -> Result<(), Refusal> {
        let ends = self.prepared.ends.iter().zip(&self.new);
        let given = ends.map(|(end, new)| Given::from(end.old.as_fd(), end.v6, new.as_fd(), inspector));
        self.given = given.collect::<Result<_, Refusal>>()?;
        Ok(())
    }
}

/// Give each new socket the options of its old one, while the application runs: there are many.
fn give_options(site: &Site, members: &mut [Member]) -> Result<Inspector, Refusal> {
    let inspector = site.programs.inspector().map_err(report)?;
    members.iter_mut().try_for_each(|member| member.give_options(&inspector))?;
    Ok(inspector)
}

/// How a connection of a batch ended.
pub struct Over {
    /// Its ends are taken.
    pub prepared: Prepared,
    pub moved: Moved,
    /// The way back, if there is one now.
    pub parked: Option<Parked>,
}

/// How a transaction ended.
pub enum Finished {
    Moved(Vec<Over>),
    /// None has moved. `afresh`: nothing was done yet that could not be done once more.
    Aborted {
        members: Vec<Member>,
        reason: Refusal,
        pause_us: u64,
        afresh: bool,
    },
}

/// What the router wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Task {
    pub role: Role,
    pub manner: Manner,
    pub budget: Duration,
}

/// One end of a transaction between two hosts.
pub struct Remote {
    pub site: Arc<Site>,
    /// The same ones in the same order as at the other end. Not none, and all in the same direction.
    pub members: Vec<Member>,
    pub task: Task,
    pub mailbox: Arc<Mailbox>,
    pub tell: Tell,
}

impl Remote {
    /// Run to the end. To be called in a child of its own.
    pub fn run(mut self) -> Finished {
        let ends = || self.members.iter().flat_map(|member| &member.prepared.ends);
        let processes = tgids_of(ends()).len();
        let (site, direction) = (Arc::clone(&self.site), self.direction());
        let ends = ends().count();
        let members = &mut self.members;
        let readied = || -> Result<_, Refusal> {
            let inspector = give_options(&site, members)?;
            let room = site.rooms.promise(processes, ends)?;
            Ok((inspector, room, Gear::new()?))
        }();
        let ready = readied.and_then(|ready| match self.prepare_witness() {
            Ok(witness) => Ok((ready, witness)),
            Err(error) => {
                log::error!("{}: its witness cannot be used: {error}", self.members[0].prepared.conn);
                Err(Refusal::InjectionFailed)
            }
        });
        let ((inspector, _room, gear), witness) = match ready {
            Ok(ready) => ready,
            Err(reason) => {
                (self.tell)(Message::Abort { reason }.into());
                return self.aborted(reason, 0, true);
            }
        };
        let mut running = Running {
            frozen: None,
            gear: Some(gear),
            armed: None,
            pushed: Vec::new(),
            receive_rooms: Vec::new(),
            shallows: None,
            mover: &self,
            witness: &witness,
            line: Line::new(witness.as_fd()),
            told: VecDeque::new(),
            inspector,
            facts: Vec::new(),
            times: Times::default(),
            threads: 0,
            look_at: None,
            with_unread: false,
            calms: None,
            awaiting_word: false,
            promised: false,
            heard: true,
            new_is_closed: false,
            witness_is_closed: false,
            silence_ends: Some(Instant::now() + WAIT_FOR_FREEZE),
            ended: None,
        };
        let mut machine = End::new(self.task.role, direction, self.task.manner);
        running.run(&mut machine);
        let result = running.ended.take().unwrap_or(Err(Refusal::InjectionFailed));
        let times = std::mem::take(&mut running.times);
        let figures = Figures {
            common: Moved {
                together: self.members.len() as u32,
                threads: running.threads,
                processes: processes as u32,
                ..times.moved()
            },
            unread: running.facts.iter().map(SocketFacts::unread_bytes).collect(),
            heard: running.heard,
        };
        let new_is_closed = running.new_is_closed;
        let witness_is_closed = running.witness_is_closed || running.line.has_carried();
        drop(running);
        match result {
            Ok(()) => Finished::Moved(self.moved(figures)),
            Err(reason) => {
                if new_is_closed {
                    self.close_new();
                }
                if !witness_is_closed {
                    self.members[0].witness = Some(witness);
                }
                self.aborted(reason, times.pause_us(), !new_is_closed && !witness_is_closed)
            }
        }
    }

    fn direction(&self) -> Direction {
        self.members[0].prepared.direction
    }

    /// The decider's end of it resets, and those of the others that were made for nothing: a host that remembers them for a
    /// minute (TIME_WAIT) has no port left for the next ones after some ten thousand moves.
    fn prepare_witness(&mut self) -> nix::Result<OwnedFd> {
        let witness = self.members[0].witness.take().ok_or(nix::errno::Errno::EBADF)?;
        if self.task.role == Role::Decider {
            let others = self.members.iter().filter_map(|member| member.witness.as_ref());
            others.chain([&witness]).for_each(reset);
            setsockopt(&witness, ReceiveTimeout, &TimeVal::milliseconds(WITNESS_MS))?;
        }
        Ok(witness)
    }

    fn silence(&self) -> Silence {
        match (self.task.manner, self.direction()) {
            (Manner::Settle, Direction::ToHost) => Silence::AskNew,
            (Manner::Settle, Direction::ToOverlay) => Silence::AskOld,
            (Manner::Salvage, _) => Silence::Keep,
        }
    }

    fn deal<'a>(&self, witness: &'a OwnedFd) -> Deal<'a> {
        match self.task.role {
            Role::Decider => Deal::Decides(witness.as_fd(), self.silence()),
            Role::Follower => Deal::Follows(witness.as_fd()),
        }
    }

    fn aborted(self, reason: Refusal, pause_us: u64, afresh: bool) -> Finished {
        Finished::Aborted { members: self.members, reason, pause_us, afresh }
    }

    /// By a reset, so that a peer that hears nothing else knows: see [`Silence`].
    fn close_new(&mut self) {
        for member in &mut self.members {
            member.new.iter().for_each(reset);
            member.new.clear();
            if member.prepared.direction == Direction::ToOverlay {
                // The overlay connection was given up: there is no way back any more.
                member.prepared.parked = None;
            }
        }
    }

    fn moved(self, figures: Figures) -> Vec<Over> {
        if self.direction() == Direction::ToOverlay {
            // Where its path is dead, nobody acknowledges what is in it, nor its end: it would be sent again and again
            // for a quarter of an hour. Where it is not, this tells a peer that hears nothing else: see `Silence`. A
            // reset that arrives otherwise finds the peer's socket out of use, too.
            self.members.iter().flat_map(|member| &member.prepared.ends).for_each(|end| reset(&end.old));
        }
        let members = self.members.into_iter().zip(&figures.unread);
        // A peer that was not heard may need what is unread here: then there is no way back.
        let over =
            |(member, unread): (Member, &u64)| over(member, &[*unread], figures.heard, &figures.common);
        members.map(over).collect()
    }
}

/// `unread`: bytes that the application of each of its ends had not read. `common`: the figures of all that moved with it.
fn over(mut member: Member, unread: &[u64], may_return: bool, common: &Moved) -> Over {
    let ends = std::mem::take(&mut member.prepared.ends);
    let moved = Moved {
        unread_bytes: unread.iter().sum(),
        fds: ends.iter().map(|end| end.holders.fds() as u32).sum(),
        sockets: member.new.iter().filter_map(socket_inode).collect(),
        ..common.clone()
    };
    let parked = match member.prepared.direction {
        Direction::ToHost => (may_return
            && ends.iter().zip(unread).all(|(end, unread)| discard(end.old.as_fd(), *unread as usize)))
        .then(|| Parked {
            overlay: ends.into_iter().map(|end| end.old).collect(),
            note: std::mem::take(&mut member.prepared.note),
            moved: moved.clone(),
        }),
        Direction::ToOverlay => {
            member.prepared.parked = None;
            None
        }
    };
    Over { prepared: member.prepared, moved, parked }
}

/// What the facts of these ends say, with the unread bytes if they are few or wanted.
fn looks<'a>(
    ends: impl Iterator<Item = &'a PreparedEnd>,
    facts: &[SocketFacts],
    with_unread: bool,
) -> Result<Vec<Look>, Refusal> {
    let unread: u64 = facts.iter().map(SocketFacts::unread_bytes).sum();
    if unread > MAX_UNREAD_BYTES as u64 {
        return Err(Refusal::TooManyUnreadBytes);
    }
    let most = if with_unread { MAX_UNREAD_BYTES } else { SMALL_UNREAD / facts.len().max(1) };
    ends.zip(facts).map(|(end, facts)| look(end.old.as_fd(), facts, most)).collect()
}

/// For all ends of these connections, with what the facts say of each.
fn substitutions<'a>(members: &'a [Member], facts: &[SocketFacts]) -> Vec<Substitution<'a>> {
    let places =
        members.iter().flat_map(|member| member.prepared.ends.iter().zip(&member.new).zip(&member.given));
    let substitutions = places.zip(facts).map(|(((end, new), given), facts)| Substitution {
        old: end.old.as_fd(),
        new: new.as_fd(),
        facts: facts.clone(),
        holders: &end.holders,
        given,
    });
    substitutions.collect()
}

/// What is known of a transaction when it is over.
struct Figures {
    /// What all connections have in common.
    common: Moved,
    /// Bytes that the application had not read, of each.
    unread: Vec<u64>,
    /// See [`exchange::Installed`](crate::exchange::Installed).
    heard: bool,
}

fn socket_inode(socket: &OwnedFd) -> Option<SocketInode> {
    nix::sys::stat::fstat(socket).ok().map(|stat| SocketInode(stat.st_ino))
}

/// The state of a [`Remote`] while it runs. Field order is drop order: thaw first, and undo last what was done first.
struct Running<'a> {
    frozen: Option<Frozen>,
    gear: Option<Gear>,
    armed: Option<Armed>,
    pushed: Vec<Pushed<'a>>,
    receive_rooms: Vec<ReceiveRoom<'a>>,
    shallows: Option<Shallows<'a>>,
    mover: &'a Remote,
    witness: &'a OwnedFd,
    line: Line<'a>,
    /// That were not looked at yet.
    told: VecDeque<Told>,
    inspector: Inspector,
    /// Of each connection, when it was looked at last.
    facts: Vec<SocketFacts>,
    times: Times,
    threads: u32,
    look_at: Option<Instant>,
    with_unread: bool,
    /// When to look next whether they are calm.
    calms: Option<Instant>,
    awaiting_word: bool,
    promised: bool,
    heard: bool,
    /// To be closed when this is over, which is at once.
    new_is_closed: bool,
    witness_is_closed: bool,
    silence_ends: Option<Instant>,
    ended: Option<Result<(), Refusal>>,
}

impl<'a> Running<'a> {
    fn ends(&self) -> impl Iterator<Item = &'a PreparedEnd> + Clone + use<'a> {
        let mover = self.mover;
        mover.members.iter().flat_map(|member| &member.prepared.ends)
    }

    fn new_sockets(&self) -> Vec<BorrowedFd<'a>> {
        let mover = self.mover;
        mover.members.iter().flat_map(|member| &member.new).map(OwnedFd::as_fd).collect()
    }

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
            Action::Tell(message) => self.tell(message),
            Action::MakeShallow => self.make_shallow(),
            Action::Weigh => self.is_pouring().then_some(Event::Pouring),
            Action::Freeze => Some(self.freeze().map_or_else(Event::FreezeFailed, Event::Frozen)),
            Action::FreezeAndSave => {
                Some(self.freeze_and_save().map_or_else(Event::FreezeFailed, Event::Saved))
            }
            Action::LookAgain { with_unread } => {
                self.with_unread = with_unread;
                let now = Instant::now();
                let pause = self.times.frozen.map_or(SETTLE_POLL, |frozen| next_nap(frozen).max(SETTLE_POLL));
                self.look_at = Some(if with_unread { now } else { now + pause });
                None
            }
            Action::Arm => Some(self.arm().map_or_else(Event::ArmFailed, |()| Event::Armed)),
            Action::Load { carry } => {
                Some(self.load(carry).map_or_else(Event::ArmFailed, |()| Event::Loaded))
            }
            Action::OpenGate => Some(self.install().map_or_else(Event::InstallFailed, |()| Event::Installed)),
            Action::CloseGate => {
                let new = self.new_sockets();
                if let (Some(armed), Some(frozen)) = (self.armed.take(), &mut self.frozen) {
                    armed.turn_back(frozen, &new);
                }
                None
            }
            Action::Say(word) => self.say(word),
            Action::AwaitWord => {
                self.awaiting_word = true;
                None
            }
            Action::CloseNew => {
                self.new_is_closed = true;
                None
            }
            Action::CloseWitness => {
                self.witness_is_closed = true;
                None
            }
            Action::Thaw => {
                self.pushed.clear();
                self.receive_rooms.clear();
                if let Some(frozen) = self.frozen.take() {
                    self.times.thawed = Some(frozen.thaw());
                }
                self.shallows = None;
                None
            }
            Action::End(result) => {
                self.ended = Some(result);
                None
            }
        }
    }

    fn tell(&mut self, mut message: Message) -> Option<Event> {
        let on_witness = match &mut message {
            Message::Looks(looks) => self.line.load(looks),
            Message::Calm | Message::Freeze | Message::Saved | Message::Abort { .. } => Vec::new(),
        };
        (self.mover.tell)(Said { message, on_witness });
        self.line.flush()
    }

    /// `None`: it cannot be looked at, which the freeze will say.
    fn seen(&self, socket: BorrowedFd<'_>) -> Option<SocketFacts> {
        self.inspector.socket(socket).ok().flatten()
    }

    fn is_pouring(&self) -> bool {
        let unacknowledged =
            |end: &PreparedEnd| self.seen(end.old.as_fd()).map_or(0, |facts| facts.unacknowledged_bytes());
        // What comes meanwhile would have to be carried as well.
        !self.shallows.as_ref().is_some_and(Shallows::receive)
            && self.ends().any(|end| unacknowledged(end) > POURING_BYTES)
    }

    fn make_shallow(&mut self) -> Option<Event> {
        match Shallows::make(self.ends(), &self.inspector) {
            Ok(shallows) => self.shallows = Some(shallows),
            Err(reason) => return Some(Event::Cancel(reason)),
        }
        self.calms = Some(Instant::now());
        None
    }

    fn freeze(&mut self) -> Result<Vec<Look>, Refusal> {
        self.silence_ends = None;
        self.awaiting_word = false;
        let tgids = tgids_of(self.ends());
        if process::any_share_memory(&tgids) {
            return Err(Refusal::SharedMemory);
        }
        let budget = self.mover.task.budget;
        let patience = match self.mover.task.role {
            Role::Decider => DECIDER_RECESSES,
            Role::Follower => budget / 2,
        };
        let deadline = Instant::now() + patience;
        let facts = loop {
            let alarms = Alarms::look(&self.inspector, &tgids);
            self.times.began = Some(Instant::now());
            let frozen = Frozen::freeze(&tgids, &alarms, Instant::now() + budget);
            self.times.thawed = Some(Instant::now());
            let frozen = frozen?;
            self.times.frozen = Some(Instant::now());
            self.threads = frozen.threads() as u32;
            let over = Instant::now() + budget;
            let facts = facts_while_frozen(self.ends(), &frozen, &self.inspector, over);
            let has_fired = facts.as_ref().is_ok_and(|facts| facts.iter().any(has_fired_one_shot));
            if has_fired && Instant::now() + RECESS < deadline {
                self.times.thawed = Some(frozen.thaw());
                std::thread::sleep(RECESS);
                continue;
            }
            self.frozen = Some(frozen);
            break facts?;
        };
        self.facts = facts;
        looks(self.ends(), &self.facts, false)
    }

    fn freeze_and_save(&mut self) -> Result<Vec<Queue>, Refusal> {
        self.freeze()?;
        let queues = self.ends().zip(&self.facts).map(|(end, facts)| {
            let bytes = queue::peek(end.old.as_fd(), facts.unacknowledged_bytes() as usize)?;
            Ok(Queue { write_seq: facts.write_seq, bytes })
        });
        queues.collect()
    }

    fn look(&mut self) -> Event {
        let looked = || -> Result<Vec<Look>, Refusal> {
            let old: Vec<_> = self.ends().map(|end| end.old.as_fd()).collect();
            old.iter().copied().for_each(acknowledge);
            let looked = self.inspector.sockets(&old).map_err(|_| Refusal::InjectionFailed)?;
            let facts = looked.into_iter().map(|facts| {
                let facts = facts.ok_or(Refusal::HolderVanished)?;
                crate::site::may_be_moved(&facts)?;
                Ok(facts)
            });
            self.facts = facts.collect::<Result<Vec<_>, Refusal>>()?;
            let looks = looks(self.ends(), &self.facts, self.with_unread)?;
            if self.receive_rooms.is_empty() && self.mover.task.manner == Manner::Settle {
                // Something may be on its way, and nobody reads: make room for it to land. Where all was read there is.
                let full = self.ends().zip(&self.facts).filter(|(_, facts)| facts.unread_bytes() > 0);
                let make = |end: &'a PreparedEnd| ReceiveRoom::make(end.old.as_fd(), MAX_UNREAD_BYTES).ok();
                self.receive_rooms = full.filter_map(|(end, _)| make(end)).collect();
            }
            Ok(looks)
        }();
        match looked {
            Ok(looks) => Event::Looked(looks),
            Err(reason) => Event::Cancel(reason),
        }
    }

    fn arm(&mut self) -> Result<(), Refusal> {
        let pairs = substitutions(&self.mover.members, &self.facts);
        let (Some(frozen), Some(gear)) = (&mut self.frozen, self.gear.take()) else {
            return Err(Refusal::HolderVanished);
        };
        let deadline = Instant::now() + self.mover.task.budget;
        let deal = self.mover.deal(self.witness);
        self.armed = Some(Armed::arm(frozen, gear, &self.inspector, &pairs, deal, deadline)?);
        // Not before: its options are compared with those that the new one has.
        let unacknowledged =
            self.ends().zip(&self.facts).filter(|(_, facts)| facts.unacknowledged_bytes() > 0);
        self.pushed = unacknowledged.filter_map(|(end, _)| Pushed::new(end.old.as_fd())).collect();
        Ok(())
    }

    fn load(&mut self, carry: Vec<Vec<u8>>) -> Result<(), Refusal> {
        self.times.settled = Some(Instant::now());
        let new = self.new_sockets();
        let arriving = self.facts.iter().map(SocketFacts::unread_bytes);
        let loads: Vec<Load> =
            carry.into_iter().zip(arriving).map(|(carry, arriving)| Load { carry, arriving }).collect();
        let (Some(frozen), Some(armed)) = (&mut self.frozen, &mut self.armed) else {
            return Err(Refusal::HolderVanished);
        };
        armed.load(frozen, &new, &loads, Instant::now() + self.mover.task.budget)
    }

    fn install(&mut self) -> Result<(), Refusal> {
        let new = self.new_sockets();
        let has_ended = self.any_has_ended(&new);
        let (Some(frozen), Some(armed)) = (&mut self.frozen, self.armed.take()) else {
            return Err(Refusal::HolderVanished);
        };
        if has_ended {
            armed.turn_back(frozen, &new);
            return Err(Refusal::HostPathFailed);
        }
        let result = armed.install(frozen, &new);
        self.times.installed = Some(Instant::now());
        self.heard = result?.heard;
        if self.heard {
            let unread = self.facts.iter().map(SocketFacts::unread_bytes);
            let budget_ends = self.times.began.unwrap_or_else(Instant::now) + self.mover.task.budget;
            wait_for_carried(new.into_iter().zip(unread), &self.inspector, budget_ends);
        }
        Ok(())
    }

    /// Until something happens that the machine must know.
    fn wait(&mut self, events: &mut VecDeque<Event>) {
        let now = Instant::now();
        if let (Some(at), Some(shallows)) = (self.calms, &self.shallows)
            && now >= at
        {
            let are_calm = shallows.are_calm(&self.inspector);
            self.calms = (!are_calm).then(|| shallows.next_look());
            if are_calm {
                return events.push_back(Event::Calm);
            }
        }
        if self.look_at.is_some_and(|at| now >= at) {
            self.look_at = None;
            return events.push_back(self.look());
        }
        let budget_ends =
            self.times.began.filter(|_| !self.promised).map(|began| began + self.mover.task.budget);
        if budget_ends.is_some_and(|at| now >= at) {
            return events.push_back(Event::BudgetOver);
        }
        if self.silence_ends.is_some_and(|at| now >= at) {
            self.silence_ends = None;
            return events.push_back(Event::SilenceOver);
        }
        if let Some(event) = self.on_the_line().or_else(|| self.next_told()) {
            return events.push_back(event);
        }
        let until = [self.calms, self.look_at, budget_ends, self.silence_ends].into_iter().flatten().min();
        self.sleep(until.map_or(LONGEST_SLEEP, |until| until - now));
        self.told.extend(self.mover.mailbox.take_all());
    }

    /// In their order, looks when they are complete.
    fn next_told(&mut self) -> Option<Event> {
        while !self.line.is_expecting() {
            match self.told.pop_front()? {
                Told::Cancel(reason) => return Some(Event::Cancel(reason)),
                Told::FromPeer(Said { message: Message::Looks(looks), on_witness })
                    if !on_witness.is_empty() =>
                {
                    if let Err(reason) = self.line.expect(looks, on_witness) {
                        return Some(Event::Cancel(reason));
                    }
                }
                Told::FromPeer(said) => return Some(Event::Peer(said.message)),
            }
        }
        self.on_the_line()
    }

    fn on_the_line(&mut self) -> Option<Event> {
        let event = self.line.go_on(self.awaiting_word);
        // One word at a time.
        self.awaiting_word &= !matches!(event, Some(Event::Heard(_) | Event::WitnessEnded));
        event
    }

    fn sleep(&self, time: Duration) {
        let mut fds = vec![PollFd::new(self.mover.mailbox.bell.as_fd(), PollFlags::POLLIN)];
        fds.extend(self.line.awaited(self.awaiting_word));
        let _ = ppoll(&mut fds, Some(TimeSpec::from(time.min(LONGEST_SLEEP))), None);
    }

    /// The peer's forwarder, or its application, has closed one of these new connections.
    fn any_has_ended(&self, new: &[BorrowedFd<'_>]) -> bool {
        let lives = |facts: &SocketFacts| facts.state == TCP_ESTABLISHED && facts.shutdown == 0;
        let looked = self.inspector.sockets(new);
        !looked.is_ok_and(|looked| looked.iter().all(|facts| facts.as_ref().is_some_and(lives)))
    }

    fn say(&mut self, word: Word) -> Option<Event> {
        if word == Word::Promise {
            self.promised = true;
            self.silence_ends = Some(Instant::now() + FOLLOWER_SILENCE);
        }
        let dead = self.line.say(word);
        if word == Word::Promise {
            fault::point(Point::Promised);
        }
        dead
    }
}
