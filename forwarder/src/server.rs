// SPDX-License-Identifier: Apache-2.0
//! The unix socket: takes the router's requests, starts what they ask for, and reports what came of it.
//!
//! One router at a time; a new one takes the place of the old one, whose prepared connections are given up and whose
//! running transactions are cancelled (those past the point of no return go on to their end). What is parked stays.
//!
//! Nothing that takes time runs on the thread that reads requests: a relayed message may be what a frozen process
//! is waiting for.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    io::{self, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use forwarder_api::{
    ConnId, Direction, Event, Frame, FrameError, Outcome, Refusal, Request, SocketInode, SocketRecord,
    VERSION,
};
use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    inspect::{Descriptor, Kind, TCP_LISTEN},
    mover::{Finished, Mailbox, Remote, Task, new_sockets, run_local},
    process::Tgid,
    receive::receive,
    site::{Prepared, Site, locked},
    transaction,
};

/// Why a router's session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("reading from the router: {0}")]
    Read(#[from] io::Error),
    #[error("the router sent something else than a frame: {0}")]
    Frame(#[from] FrameError),
    #[error(
        "the router speaks version {received} of the forwarder's protocol, version {VERSION} expected: use a router and a forwarder of the same release"
    )]
    Version { received: u32 },
    #[error("the router said {received} before it said Hello")]
    NoHello { received: &'static str },
    #[error("the other end of the socket is user {received}, user {expected} expected")]
    User { received: u32, expected: u32 },
    #[error("no thread for its requests: {0}")]
    NoThread(#[source] io::Error),
}

/// A router that is connected.
struct Session {
    /// Its router has not gone yet.
    open: AtomicBool,
    site: Arc<Site>,
    stream: Mutex<UnixStream>,
    connections: Mutex<HashMap<ConnId, Connection>>,
}

/// A connection that the router has asked to prepare, until its transaction is over.
struct Connection {
    direction: Direction,
    mailbox: Arc<Mailbox>,
    /// Taken when its transaction starts.
    prepared: Option<Prepared>,
    cancelled: bool,
}

/// After a router could not be let in. Out of descriptors, most likely: the backlog waits.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serve routers on `listener`, for ever.
pub fn serve(site: &Arc<Site>, listener: &UnixListener) -> io::Result<()> {
    let current: Arc<Mutex<Option<Arc<Session>>>> = Arc::default();
    watch_parked(site, &current)?;
    loop {
        let admitted = listener.accept().map_err(SessionError::from).and_then(|(stream, _)| {
            may_connect(&stream)?;
            admit(site, &current, stream)
        });
        // Whatever it is, what is parked here needs a forwarder.
        if let Err(error) = admitted {
            log::warn!("a router could not be let in: {error}");
            thread::sleep(ACCEPT_AGAIN);
        }
    }
}

/// In the place of whoever was there.
fn admit(
    site: &Arc<Site>,
    current: &Mutex<Option<Arc<Session>>>,
    stream: UnixStream,
) -> Result<(), SessionError> {
    let session = Arc::new(Session {
        open: AtomicBool::new(true),
        site: Arc::clone(site),
        stream: Mutex::new(stream.try_clone()?),
        connections: Mutex::default(),
    });
    if let Some(previous) = locked(current).replace(Arc::clone(&session)) {
        previous.end();
    }
    let reader = Arc::clone(&session);
    let reading = thread::Builder::new().name("session".into()).spawn(move || {
        log::info!("a router is connected");
        match reader.read_requests(&stream) {
            Ok(()) => log::info!("the router is gone"),
            Err(error) => log::warn!("the router's session is over: {error}"),
        }
        reader.end();
    });
    reading.map(drop).map_err(|error| {
        session.end();
        SessionError::NoThread(error)
    })
}

/// Only a process of our own user may tell us what to do.
fn may_connect(stream: &UnixStream) -> Result<(), SessionError> {
    let credentials: UnixCredentials = getsockopt(stream, PeerCredentials).map_err(io::Error::from)?;
    let (received, expected) = (credentials.uid(), nix::unistd::geteuid().as_raw());
    if received == expected { Ok(()) } else { Err(SessionError::User { received, expected }) }
}

/// Release parked sockets whose connection has ended, and tell the router.
fn watch_parked(site: &Arc<Site>, current: &Arc<Mutex<Option<Arc<Session>>>>) -> io::Result<()> {
    let (site, current) = (Arc::clone(site), Arc::clone(current));
    thread::Builder::new().name("parked".into()).spawn(move || {
        loop {
            match site.next_ended() {
                Ok(ended) => {
                    let session = locked(&current).clone().filter(|session| session.is_open());
                    if session.is_none() && ended.is_empty() {
                        site.release_forsaken();
                    }
                    for conn in ended {
                        log::debug!("{conn}: its overlay connection has ended");
                        if let Some(session) = &session {
                            session.send(&Event::ParkedEnded { conn });
                        }
                    }
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    log::error!("parked connections are not watched any more: {error}");
                    return;
                }
            }
        }
    })?;
    Ok(())
}

impl Session {
    fn read_requests(self: &Arc<Self>, stream: &UnixStream) -> Result<(), SessionError> {
        let mut reader = Reader { stream, bytes: Vec::new(), fds: VecDeque::new(), lost_fds: false };
        match reader.next::<Request>()? {
            Some(Request::Hello { version: VERSION }) => {}
            Some(Request::Hello { version }) => return Err(SessionError::Version { received: version }),
            Some(_) => return Err(SessionError::NoHello { received: "something else" }),
            None => return Ok(()),
        }
        self.send(&Event::Hello { version: VERSION, pid: std::process::id() });
        while let Some(request) = reader.next::<Request>()? {
            let direction = self.direction_of(&request);
            let count = request.fds(direction);
            match reader.take_fds(count) {
                Some(fds) => self.handle(request, fds),
                None => self.no_room_for(&request),
            }
        }
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    fn direction_of(&self, request: &Request) -> Option<Direction> {
        let conn = conn_to_move(request)?;
        locked(&self.connections).get(&conn).map(|connection| connection.direction)
    }

    fn handle(self: &Arc<Self>, request: Request, fds: Vec<OwnedFd>) {
        match request {
            Request::Hello { .. } => {}
            Request::Scan { seq, cgroup_id } => {
                let session = Arc::clone(self);
                self.spawn("scan", None, move || session.scan(seq, cgroup_id));
            }
            Request::Prepare { conn, direction, target } => {
                let mailbox = match Mailbox::new() {
                    Ok(mailbox) => mailbox,
                    Err(error) => {
                        log::error!("{conn}: {error}");
                        return self.send(&Event::Refused { conn, reason: Refusal::Exhausted });
                    }
                };
                let connection = Connection { direction, mailbox, prepared: None, cancelled: false };
                match locked(&self.connections).entry(conn) {
                    Entry::Vacant(entry) => drop(entry.insert(connection)),
                    // An earlier attempt is not over yet.
                    Entry::Occupied(_) => {
                        return self.send(&Event::Refused { conn, reason: Refusal::HolderBusy });
                    }
                }
                let session = Arc::clone(self);
                self.spawn("prepare", Some(conn), move || {
                    let result = session.site.prepare(conn, direction, target);
                    session.prepared(conn, result);
                });
            }
            Request::Move { conn, role, manner, budget_us } => {
                let budget = Duration::from_micros(u64::from(budget_us));
                self.start_remote(conn, Task { role, manner, budget }, fds);
            }
            Request::MoveLocal { conn, budget_us } => self.start_local(conn, budget_us, fds),
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

    fn prepared(&self, conn: ConnId, result: Result<Prepared, Refusal>) {
        let event = match result {
            Ok(prepared) => match locked(&self.connections).get_mut(&conn) {
                Some(connection) if !connection.cancelled => {
                    connection.prepared = Some(prepared);
                    Event::Prepared { conn }
                }
                // Cancelled in the meantime: whoever asks again hears of it, too.
                Some(_) | None => Event::Refused { conn, reason: Refusal::HolderBusy },
            },
            Err(reason) => Event::Refused { conn, reason },
        };
        if matches!(event, Event::Refused { .. }) {
            locked(&self.connections).remove(&conn);
        }
        self.send(&event);
    }

    /// The prepared connection for its transaction, and its new sockets.
    fn take(
        &self,
        conn: ConnId,
        fds: Vec<OwnedFd>,
    ) -> Result<(Prepared, Vec<OwnedFd>, Arc<Mailbox>), Refusal> {
        let mut connections = locked(&self.connections);
        let connection = connections.get_mut(&conn).ok_or(Refusal::NotParked)?;
        let mut prepared = connection.prepared.take().ok_or(Refusal::NotParked)?;
        let sockets = new_sockets(&mut prepared, fds)?;
        Ok((prepared, sockets, Arc::clone(&connection.mailbox)))
    }

    fn start_remote(self: &Arc<Self>, conn: ConnId, task: Task, mut fds: Vec<OwnedFd>) {
        let witness = fds.pop();
        let (prepared, mut sockets, mailbox) = match self.take(conn, fds) {
            Ok(taken) => taken,
            Err(reason) => return self.not_started(conn, reason),
        };
        let (Some(socket), Some(witness)) = (sockets.pop(), witness) else {
            return self.not_started(conn, Refusal::HostPathFailed);
        };
        let session = Arc::clone(self);
        let tell = Box::new(move |message: &transaction::Message| session.tell(conn, message));
        let remote = Remote::new(&self.site, prepared, [socket, witness], task, mailbox, tell);
        let session = Arc::clone(self);
        self.spawn("move", Some(conn), move || session.finished(conn, remote.run()));
    }

    fn start_local(self: &Arc<Self>, conn: ConnId, budget_us: u32, fds: Vec<OwnedFd>) {
        let (prepared, sockets, _) = match self.take(conn, fds) {
            Ok(taken) => taken,
            Err(reason) => return self.not_started(conn, reason),
        };
        let session = Arc::clone(self);
        let budget = Duration::from_micros(u64::from(budget_us));
        self.spawn("move", Some(conn), move || {
            let finished = run_local(&session.site, prepared, sockets, budget);
            session.finished(conn, finished);
        });
    }

    /// The peer's forwarder may have begun.
    fn not_started(&self, conn: ConnId, reason: Refusal) {
        self.tell(conn, &transaction::Message::Abort { reason });
        self.ended(conn, Outcome::Aborted { reason, pause_us: 0 });
    }

    /// Descriptors that the router has sent with it did not find room here.
    fn no_room_for(&self, request: &Request) {
        match conn_to_move(request) {
            Some(conn) => self.not_started(conn, Refusal::Exhausted),
            None => log::error!("the router sent descriptors where there are none"),
        }
    }

    fn finished(&self, conn: ConnId, finished: Finished) {
        if let Some(parked) = finished.parked {
            self.site.park(conn, parked);
        }
        match &finished.outcome {
            Outcome::Moved(moved) => log::info!(
                "{conn}: moved, pause {} us (freeze {}, settle {}, install {}), {} bytes unread, {} threads",
                moved.pause_us,
                moved.freeze_us,
                moved.settle_us,
                moved.install_us,
                moved.unread_bytes,
                moved.threads
            ),
            Outcome::Aborted { reason, pause_us } => {
                log::info!("{conn}: not moved: {reason} ({}), pause {pause_us} us", reason.label());
            }
        }
        self.ended(conn, finished.outcome);
    }

    fn ended(&self, conn: ConnId, outcome: Outcome) {
        locked(&self.connections).remove(&conn);
        self.send(&Event::Ended { conn, outcome });
    }

    fn tell(&self, conn: ConnId, message: &transaction::Message) {
        if let Ok(message) = Frame::encode(message) {
            self.send(&Event::ToPeer { conn, message });
        }
    }

    fn hear_peer(&self, conn: ConnId, message: &[u8]) {
        // A message is framed like everything else: four bytes of length first.
        let Some(message) =
            message.get(4..).and_then(|body| Frame::decode::<transaction::Message>(body).ok())
        else {
            log::warn!("{conn}: its peer said something that is no message");
            return self.cancel(conn, Refusal::PeerAborted);
        };
        if let Some(connection) = locked(&self.connections).get(&conn) {
            connection.mailbox.put(transaction::Event::Peer(message));
        }
    }

    fn cancel(&self, conn: ConnId, reason: Refusal) {
        let mut connections = locked(&self.connections);
        let Some(connection) = connections.get_mut(&conn) else { return };
        connection.cancelled = true;
        connection.mailbox.put(transaction::Event::Cancel(reason));
        if connection.prepared.is_some() {
            // Not started: this ends its reservation.
            connections.remove(&conn);
        }
    }

    fn scan(&self, seq: u64, cgroup_id: u64) {
        let listed = match self.site.programs.descriptors() {
            Ok(listed) => listed,
            // No answer: an empty one would say that all connections are over.
            Err(error) => return log::error!("sockets cannot be listed: {error}"),
        };
        self.send(&Event::Sockets { seq, sockets: sockets_in(&listed, cgroup_id, self.site.own) });
    }

    /// Give up all that this router has begun.
    fn end(&self) {
        self.open.store(false, Ordering::Relaxed);
        let _ = locked(&self.stream).shutdown(Shutdown::Both);
        let mut connections = locked(&self.connections);
        for connection in connections.values_mut() {
            connection.cancelled = true;
            connection.mailbox.put(transaction::Event::Cancel(Refusal::PeerGone));
        }
        connections.retain(|_, connection| connection.prepared.is_none());
    }

    fn send<T: Serialize>(&self, event: &T) {
        match Frame::encode(event) {
            // An error: the router is gone, and the reading thread sees that too.
            Ok(frame) => drop(locked(&self.stream).write_all(&frame)),
            Err(error) => log::error!("{error}"),
        }
    }

    fn spawn(self: &Arc<Self>, name: &str, conn: Option<ConnId>, work: impl FnOnce() + Send + 'static) {
        if let Err(error) = thread::Builder::new().name(name.into()).spawn(work) {
            log::error!("no thread to {name}: {error}");
            if let Some(conn) = conn {
                self.not_started(conn, Refusal::Exhausted);
            }
        }
    }
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

fn sockets_in(listed: &[Descriptor], cgroup_id: u64, own: Tgid) -> Vec<SocketRecord> {
    let tcp = || listed.iter().filter(|d| d.kind == Kind::Tcp);
    let listening: std::collections::HashSet<(u32, u16)> =
        tcp().filter(|d| d.state == TCP_LISTEN).map(|d| (d.netns, d.local.port())).collect();
    let mut seen = std::collections::HashSet::new();
    tcp()
        .filter(|d| d.state != TCP_LISTEN && d.tgid != own.0 && d.cgroups.contains(&cgroup_id))
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

/// Frames and descriptors from the socket.
struct Reader<'a> {
    stream: &'a UnixStream,
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    /// Some did not find room here.
    lost_fds: bool,
}

impl Reader<'_> {
    /// The next message; `None` at the end.
    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, SessionError> {
        loop {
            if let Some((head, rest)) = self.bytes.split_first_chunk::<4>() {
                let length = Frame::body_length(*head)?;
                if let Some(body) = rest.get(..length) {
                    let message = Frame::decode(body)?;
                    self.bytes.drain(..4 + length);
                    return Ok(Some(message));
                }
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        let received = match receive(self.stream, &mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error),
        };
        self.fds.extend(received.fds);
        self.lost_fds |= received.lost_fds;
        self.bytes.extend_from_slice(&buffer[..received.length]);
        Ok(received.length > 0)
    }

    /// The descriptors that came with the message just read; `None` if some are lost: whose, nobody can tell.
    fn take_fds(&mut self, count: usize) -> Option<Vec<OwnedFd>> {
        if count > 0 && std::mem::take(&mut self.lost_fds) {
            self.fds.clear();
            return None;
        }
        let count = count.min(self.fds.len());
        Some(self.fds.drain(..count).collect())
    }
}
