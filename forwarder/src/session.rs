// SPDX-License-Identifier: Apache-2.0
//! What one router has asked for: starts it, several connections together where it can, and reports what came of it.
//!
//! A connection is asked about, prepared, and then waits for its turn: a process takes part in one transaction at a time.
//! The decider's forwarder says who goes together, and the follower's does the same as soon as it can:
//! ```text
//!   decider                                       follower
//!   Move: in line                                 Move: waits
//!   its processes are free: batch of all
//!   that wait for the same  --- Join: these --->  their processes are free
//!   transaction             <=================>   transaction
//! ```
//! If a batch fails, its connections go on in smaller ones, down to one: that tells what is the matter with which.

mod batches;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io::{self, Write},
    net::Shutdown,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use forwarder_api::{
    ConnId, Direction, Event, Frame, Holder, OtherEnd, Outcome, PrepareTarget, Refusal, Request, Role,
    SocketInode, SocketRecord,
};
use serde::{Deserialize, Serialize};

use crate::{
    inspect::{Descriptor, Kind, TCP_LISTEN},
    mover::{Mailbox, Member, Said, Task, Told},
    process::{self, Tgid},
    site::{Prepared, Site, locked, tgids_of},
    turns::{MAX_BATCH, Pace},
};

use batches::Join;

/// A router that is connected.
pub struct Session {
    /// Its router has not gone yet.
    open: AtomicBool,
    site: Arc<Site>,
    stream: Mutex<UnixStream>,
    book: Mutex<Book>,
}

/// The connections that the router has asked about, until their transactions are over.
#[derive(Default)]
struct Book {
    connections: HashMap<ConnId, Connection>,
    /// Asked about, and not looked at yet. `preparing`: somebody does.
    asked: Vec<(ConnId, Direction, PrepareTarget)>,
    preparing: bool,
    /// Those of ours that wait for their turn.
    line: VecDeque<ConnId>,
    pace: Pace,
    /// Transactions of ours that are under way.
    led: usize,
    /// Batches of others that wait for theirs.
    joins: Vec<Join>,
}

struct Connection {
    direction: Direction,
    stage: Stage,
    cancelled: Option<Refusal>,
}

enum Stage {
    Asked,
    Prepared(Box<Prepared>),
    Waiting(Box<Waiter>),
    /// In the transaction of this batch.
    Moving {
        batch: u64,
        mailbox: Arc<Mailbox>,
    },
}

/// A connection that waits for its turn.
struct Waiter {
    member: Member,
    tgids: Vec<Tgid>,
    job: Job,
    /// See [`crate::turns::Waiting`].
    most: usize,
    since: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Job {
    Remote(Task, Option<OtherEnd>),
    Local { budget: Duration },
}

impl Waiter {
    fn new(member: Member, job: Job, most: usize, since: Instant) -> Waiter {
        Waiter { tgids: tgids_of(&member.prepared.ends), member, job, most, since }
    }
}

impl Job {
    fn follows(self) -> bool {
        matches!(self, Job::Remote(Task { role: Role::Follower, .. }, _))
    }
}

/// From forwarder to forwarder, about a batch, by way of its first connection.
#[derive(Serialize, Deserialize)]
struct Letter {
    /// Given by the decider, another one each time.
    batch: u64,
    word: Word,
}

impl Letter {
    /// As it comes: framed like everything else, four bytes of length first.
    fn parse(message: &[u8]) -> Option<Letter> {
        message.get(4..).and_then(|body| Frame::decode(body).ok())
    }
}

/// For the fuzz targets (`test/fuzz`): is this what another forwarder may say?
pub fn is_letter(message: &[u8]) -> bool {
    Letter::parse(message).is_some()
}

#[derive(Serialize, Deserialize)]
enum Word {
    /// These go together, in this order.
    Join(Vec<ConnId>),
    Said(Said),
    /// The connection that this comes by will not be moved.
    Leave,
}

impl Session {
    pub fn start(site: &Arc<Site>, stream: UnixStream) -> io::Result<Arc<Session>> {
        let session = Arc::new(Session {
            open: AtomicBool::new(true),
            site: Arc::clone(site),
            stream: Mutex::new(stream),
            book: Mutex::default(),
        });
        let turns = Arc::clone(&session);
        thread::Builder::new().name("turns".into()).spawn(move || turns.give_turns())?;
        Ok(session)
    }

    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    pub fn direction_of(&self, request: &Request) -> Option<Direction> {
        let conn = conn_to_move(request)?;
        locked(&self.book).connections.get(&conn).map(|connection| connection.direction)
    }

    pub fn handle(self: &Arc<Self>, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Hello { .. } => {}
            Request::Scan { seq, cgroup_id } => {
                let session = Arc::clone(self);
                if let Err(error) = spawn("scan", move || session.scan(seq, cgroup_id)) {
                    log::error!("no thread to scan: {error}");
                }
            }
            Request::Prepare { conn, direction, target } => self.asked(conn, direction, target),
            Request::Move { conn, role, manner, budget_us, with } => {
                let budget = Duration::from_micros(u64::from(budget_us));
                let alone = role == Role::Decider && with.is_none();
                self.in_line(conn, Job::Remote(Task { role, manner, budget }, with), alone, fds);
            }
            Request::MoveLocal { conn, budget_us, alone } => {
                let budget = Duration::from_micros(u64::from(budget_us));
                self.in_line(conn, Job::Local { budget }, alone, fds);
            }
            Request::FromPeer { conn, message } => self.hear_peer(conn, &message),
            Request::Cancel { conn, reason } => self.cancel(conn, reason),
            Request::Release { conn } => {
                if self.site.release(conn) {
                    log::debug!("{conn}: its parked sockets are closed");
                }
            }
            Request::List { seq } => self.send(&Event::Parked { seq, parked: self.site.list_parked() }),
        }
    }

    fn asked(self: &Arc<Self>, conn: ConnId, direction: Direction, target: PrepareTarget) {
        let mut book = locked(&self.book);
        // An earlier attempt is not over yet.
        if book.connections.contains_key(&conn) {
            drop(book);
            return self.send(&Event::Refused { conn, reason: Refusal::HolderBusy });
        }
        book.connections.insert(conn, Connection { direction, stage: Stage::Asked, cancelled: None });
        book.asked.push((conn, direction, target));
        if std::mem::replace(&mut book.preparing, true) {
            return;
        }
        drop(book);
        let session = Arc::clone(self);
        if let Err(error) = spawn("prepare", move || session.prepare_all()) {
            log::error!("no thread to prepare: {error}");
            self.refuse_asked(Refusal::Exhausted);
        }
    }

    /// One listing for all that are asked about meanwhile: on a host with many descriptors it takes milliseconds.
    fn prepare_all(&self) {
        let mut took = Duration::ZERO;
        loop {
            // Not more than a third of the time.
            thread::sleep(2 * took);
            let asked = {
                let mut book = locked(&self.book);
                if book.asked.is_empty() {
                    book.preparing = false;
                    return;
                }
                std::mem::take(&mut book.asked)
            };
            let began = Instant::now();
            let listing = self.site.listing();
            took = began.elapsed();
            match listing {
                Ok(listing) => {
                    for (conn, direction, target) in asked {
                        self.prepared(conn, self.site.prepare(conn, direction, target, &listing));
                    }
                }
                Err(reason) => asked.into_iter().for_each(|(conn, ..)| self.prepared(conn, Err(reason))),
            }
        }
    }

    fn refuse_asked(&self, reason: Refusal) {
        let asked = {
            let mut book = locked(&self.book);
            book.preparing = false;
            std::mem::take(&mut book.asked)
        };
        asked.into_iter().for_each(|(conn, ..)| self.prepared(conn, Err(reason)));
    }

    fn prepared(&self, conn: ConnId, result: Result<Prepared, Refusal>) {
        let result = result.map(|prepared| (holder_of(&prepared), prepared));
        let event = match result {
            Ok((holder, prepared)) => match locked(&self.book).connections.get_mut(&conn) {
                Some(connection) if connection.cancelled.is_none() => {
                    connection.stage = Stage::Prepared(Box::new(prepared));
                    Event::Prepared { conn, holder }
                }
                // Cancelled in the meantime: whoever asks again hears of it, too.
                Some(_) | None => Event::Refused { conn, reason: Refusal::HolderBusy },
            },
            Err(reason) => Event::Refused { conn, reason },
        };
        if matches!(event, Event::Refused { .. }) {
            self.forget(conn);
        }
        self.send(&event);
    }

    fn forget(&self, conn: ConnId) {
        let forgotten = locked(&self.book).connections.remove(&conn);
        // What it held is given back without the lock.
        drop(forgotten);
    }

    fn in_line(&self, conn: ConnId, job: Job, alone: bool, fds: Vec<OwnedFd>) {
        let mut book = locked(&self.book);
        let taken = book
            .connections
            .get_mut(&conn)
            .map(|connection| (connection.cancelled, std::mem::replace(&mut connection.stage, Stage::Asked)));
        let prepared = match taken {
            Some((None, Stage::Prepared(prepared))) => Ok(prepared),
            Some((cancelled, _)) => Err(cancelled.unwrap_or(Refusal::NotParked)),
            None => Err(Refusal::NotParked),
        };
        let with_witness = matches!(job, Job::Remote(..));
        let member = match prepared.and_then(|prepared| Member::new(*prepared, fds, with_witness)) {
            Ok(member) => member,
            Err(reason) => {
                drop(book);
                return self.not_started(conn, reason);
            }
        };
        let most = if alone { 1 } else { MAX_BATCH };
        book.wait(conn, Waiter::new(member, job, most, Instant::now()));
        drop(book);
        self.site.bell.ring();
    }

    /// The peer's forwarder may have begun.
    fn not_started(&self, conn: ConnId, reason: Refusal) {
        self.write(conn, &Letter { batch: 0, word: Word::Leave });
        self.ended(conn, Outcome::Aborted { reason, pause_us: 0 });
    }

    /// Descriptors that the router has sent with it did not find room here.
    pub fn no_room_for(&self, request: &Request) {
        match conn_to_move(request) {
            Some(conn) => self.not_started(conn, Refusal::Exhausted),
            None => log::error!("the router sent descriptors where there are none"),
        }
    }

    fn ended(&self, conn: ConnId, outcome: Outcome) {
        self.forget(conn);
        self.send(&Event::Ended { conn, outcome });
    }

    fn cancel(&self, conn: ConnId, reason: Refusal) {
        let mut book = locked(&self.book);
        let Some(connection) = book.connections.get_mut(&conn) else { return };
        connection.cancelled = Some(reason);
        match &connection.stage {
            Stage::Asked => {}
            Stage::Moving { mailbox, .. } => mailbox.put(Told::Cancel(reason)),
            Stage::Prepared(_) => {
                drop(book);
                self.forget(conn);
            }
            Stage::Waiting(_) => {
                drop(book);
                self.not_started(conn, reason);
            }
        }
    }

    fn scan(&self, seq: u64, cgroup_id: u64) {
        process::stand_back();
        let listed = match self.site.programs.descriptors() {
            Ok(listed) => listed,
            // No answer: an empty one would say that all connections are over.
            Err(error) => return log::error!("sockets cannot be listed: {error}"),
        };
        self.send(&Event::Sockets { seq, sockets: sockets_in(&listed, cgroup_id) });
        self.site.leave_untidy();
    }

    /// Give up all that this router has begun.
    pub fn end(&self) {
        self.open.store(false, Ordering::Relaxed);
        let _ = locked(&self.stream).shutdown(Shutdown::Both);
        let mut dropped = Vec::new();
        let mut book = locked(&self.book);
        book.joins.clear();
        for (conn, connection) in &mut book.connections {
            connection.cancelled = Some(Refusal::PeerGone);
            match &connection.stage {
                Stage::Moving { mailbox, .. } => mailbox.put(Told::Cancel(Refusal::PeerGone)),
                Stage::Asked | Stage::Prepared(_) | Stage::Waiting(_) => dropped.push(*conn),
            }
        }
        let dropped: Vec<_> = dropped.into_iter().map(|conn| book.connections.remove(&conn)).collect();
        drop(book);
        drop(dropped);
        self.site.bell.ring();
    }

    pub fn send<T: Serialize>(&self, event: &T) {
        match Frame::encode(event) {
            // An error: the router is gone, and the reading thread sees that too.
            Ok(frame) => drop(locked(&self.stream).write_all(&frame)),
            Err(error) => log::error!("{error}"),
        }
    }
}

impl Book {
    fn wait(&mut self, conn: ConnId, waiter: Waiter) {
        let Some(connection) = self.connections.get_mut(&conn) else { return };
        if !waiter.job.follows() {
            self.line.push_back(conn);
        }
        connection.stage = Stage::Waiting(Box::new(waiter));
    }

    fn waiter(&self, conn: ConnId) -> Option<&Waiter> {
        match &self.connections.get(&conn)?.stage {
            Stage::Waiting(waiter) => Some(waiter),
            Stage::Asked | Stage::Prepared(_) | Stage::Moving { .. } => None,
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

fn holder_of(prepared: &Prepared) -> Holder {
    Holder(tgids_of(&prepared.ends).first().map_or(0, |tgid| tgid.0 as u32))
}

/// The connection of a request that descriptors come with.
fn conn_to_move(request: &Request) -> Option<ConnId> {
    match request {
        Request::Move { conn, .. } | Request::MoveLocal { conn, .. } => Some(*conn),
        Request::Hello { .. }
        | Request::Scan { .. }
        | Request::Prepare { .. }
        | Request::FromPeer { .. }
        | Request::Cancel { .. }
        | Request::Release { .. }
        | Request::List { .. } => None,
    }
}

fn sockets_in(listed: &[Descriptor], cgroup_id: u64) -> Vec<SocketRecord> {
    let tcp = || listed.iter().filter(|d| d.kind == Kind::Tcp);
    let listening: HashSet<(u32, u16)> =
        tcp().filter(|d| d.state == TCP_LISTEN).map(|d| (d.netns, d.local.port())).collect();
    let mut seen = HashSet::new();
    tcp()
        .filter(|d| d.state != TCP_LISTEN && d.cgroups.contains(&cgroup_id))
        .filter(|d| seen.insert(d.inode))
        .map(|d| SocketRecord {
            socket: SocketInode(d.inode),
            tgid: d.tgid as u32,
            fd: d.fd as u32,
            cgroup_id: d.cgroups[0],
            netns: d.netns,
            local: d.local,
            remote: d.remote,
            v6: d.v6,
            accepted: listening.contains(&(d.netns, d.local.port())),
            state: d.state as u8,
            bytes_sent: d.bytes_sent,
            bytes_received: d.bytes_received,
        })
        .collect()
}
