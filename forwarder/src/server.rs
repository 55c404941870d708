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
    io::{self, IoSliceMut, Write},
    net::Shutdown,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
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
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, getsockopt, recvmsg, sockopt::PeerCredentials,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    inspect::{Descriptor, Kind, TCP_LISTEN},
    mover::{Finished, Mailbox, Remote, Task, new_sockets, run_local},
    process::Tgid,
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

/// Serve routers on `listener`, for ever.
pub fn serve(site: &Arc<Site>, listener: &UnixListener) -> io::Result<()> {
    let current: Arc<Mutex<Option<Arc<Session>>>> = Arc::default();
    watch_parked(site, &current)?;
    loop {
        let (stream, _) = listener.accept()?;
        if let Err(error) = may_connect(&stream) {
            log::warn!("{error}");
            continue;
        }
        let session = Arc::new(Session {
            open: AtomicBool::new(true),
            site: Arc::clone(site),
            stream: Mutex::new(stream.try_clone()?),
            connections: Mutex::default(),
        });
        if let Some(previous) = locked(&current).replace(Arc::clone(&session)) {
            previous.end();
        }
        thread::Builder::new().name("session".into()).spawn(move || {
            log::info!("a router is connected");
            match session.read_requests(&stream) {
                Ok(()) => log::info!("the router is gone"),
                Err(error) => log::warn!("the router's session is over: {error}"),
            }
            session.end();
        })?;
    }
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
        let mut reader = Reader { stream, bytes: Vec::new(), fds: VecDeque::new() };
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
            let fds = reader.take_fds(count);
            self.handle(request, fds);
        }
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    fn direction_of(&self, request: &Request) -> Option<Direction> {
        match request {
            Request::Move { conn, .. } | Request::MoveLocal { conn, .. } => {
                locked(&self.connections).get(conn).map(|connection| connection.direction)
            }
            Request::Hello { .. }
            | Request::Scan { .. }
            | Request::Prepare { .. }
            | Request::FromPeer { .. }
            | Request::Cancel { .. }
            | Request::Release { .. }
            | Request::List { .. } => None,
        }
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
                        return self.send(&Event::Refused { conn, reason: Refusal::InjectionFailed });
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
            Err(reason) => return self.ended(conn, Outcome::Aborted { reason, pause_us: 0 }),
        };
        let (Some(socket), Some(witness)) = (sockets.pop(), witness) else {
            return self.ended(conn, Outcome::Aborted { reason: Refusal::HostPathFailed, pause_us: 0 });
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
            Err(reason) => return self.ended(conn, Outcome::Aborted { reason, pause_us: 0 }),
        };
        let session = Arc::clone(self);
        let budget = Duration::from_micros(u64::from(budget_us));
        self.spawn("move", Some(conn), move || {
            let finished = run_local(&session.site, prepared, sockets, budget);
            session.finished(conn, finished);
        });
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
                self.ended(conn, Outcome::Aborted { reason: Refusal::InjectionFailed, pause_us: 0 });
            }
        }
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
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let mut buffers = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(self.stream.as_raw_fd(), &mut buffers, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::errno::Errno::EINTR) => return Ok(true),
            Err(nix::errno::Errno::ECONNRESET) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel has just installed these descriptors for us; nobody else owns them.
                self.fds.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        let length = message.bytes;
        self.bytes.extend_from_slice(&buffer[..length]);
        Ok(length > 0)
    }

    /// The descriptors that came with the message just read. More than announced are closed.
    fn take_fds(&mut self, count: usize) -> Vec<OwnedFd> {
        let count = count.min(self.fds.len());
        self.fds.drain(..count).collect()
    }
}
