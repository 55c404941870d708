// SPDX-License-Identifier: Apache-2.0
//! The unix socket: lets routers in, and reads their requests.
//!
//! One router at a time; a new one that has said Hello takes the place of the old one, whose prepared connections are given
//! up and whose running transactions are cancelled (those past the point of no return go on to their end). What is parked
//! stays. Who only connects, to see whether somebody listens, takes nobody's place.
//!
//! Nothing that takes time runs on the thread that reads requests: a relayed message may be what a frozen process
//! is waiting for.

use std::{
    collections::VecDeque,
    io,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use forwarder_api::{Event, Frame, FrameError, Request, VERSION};
use nix::sys::socket::{UnixCredentials, getsockopt, sockopt::PeerCredentials};
use serde::de::DeserializeOwned;

use crate::{
    receive::receive,
    session::Session,
    site::{Site, locked},
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
    #[error("no thread for its requests: {0}")]
    NoThread(#[source] io::Error),
    #[error("the other end of the socket is user {received}, user 0 or {own} expected")]
    User { received: u32, own: u32 },
}

/// How long a router that is stopped takes at most to bring every connection back.
const TAKING_BACK: Duration = Duration::from_secs(25);
/// After that, how long it takes to ask what is left.
const LAST_QUESTION: Duration = Duration::from_secs(3);

/// After a router could not be let in. Out of descriptors, most likely: the backlog waits.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The router that is served now, if there is one.
pub type Current = Arc<Mutex<Option<Arc<Session>>>>;

/// Serve routers on `listener`, for ever.
pub fn serve(site: &Arc<Site>, current: &Current, listener: &UnixListener) -> io::Result<()> {
    watch_parked(site, current)?;
    loop {
        let admitted = listener.accept().map_err(SessionError::from).and_then(|(stream, _)| {
            let pid = may_connect(&stream)?;
            admit(site, current, stream, pid)
        });
        // Whatever it is, what is parked here needs a forwarder.
        if let Err(error) = admitted {
            log::warn!("a router could not be let in: {error}");
            thread::sleep(ACCEPT_AGAIN);
        }
    }
}

/// Wait until the router is gone, which takes what is parked back before it goes, if it is stopped as well; for no longer
/// than it may need.
pub fn wait_for_router(site: &Site, current: &Current) {
    let is_here = || locked(current).as_ref().is_some_and(|session| session.is_open());
    let began = Instant::now();
    let mut needed = began;
    while is_here() && began.elapsed() < TAKING_BACK && needed.elapsed() < LAST_QUESTION {
        if site.has_way_back_to_give() {
            needed = Instant::now();
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// On a thread of its own: until it has said Hello it is nobody.
fn admit(site: &Arc<Site>, current: &Current, stream: UnixStream, pid: i32) -> Result<(), SessionError> {
    let (site, current) = (Arc::clone(site), Arc::clone(current));
    let serving = thread::Builder::new().name("session".into()).spawn(move || {
        if let Err(error) = serve_router(&site, &current, &stream, pid) {
            log::warn!("the session of a router (process {pid}) is over: {error}");
        }
    });
    serving.map(drop).map_err(SessionError::NoThread)
}

fn serve_router(
    site: &Arc<Site>,
    current: &Current,
    stream: &UnixStream,
    pid: i32,
) -> Result<(), SessionError> {
    let mut reader = Reader::new(stream);
    match reader.next::<Request>()? {
        Some(Request::Hello { version: VERSION }) => {}
        Some(Request::Hello { version }) => return Err(SessionError::Version { received: version }),
        Some(_) => return Err(SessionError::NoHello { received: "something else" }),
        None => return Ok(()),
    }
    let session = Session::start(site, stream.try_clone()?)?;
    // In the place of whoever was there.
    if let Some(previous) = locked(current).replace(Arc::clone(&session)) {
        if previous.is_open() {
            log::warn!(
                "process {pid} takes the place of a router that is still connected: only one can be served"
            );
        }
        previous.end();
    }
    log::info!("a router (process {pid}) is connected");
    session.send(&Event::Hello { version: VERSION, pid: std::process::id() });
    let result = read_requests(&session, &mut reader);
    session.end();
    if result.is_ok() {
        log::info!("the router (process {pid}) is gone");
    }
    result
}

fn read_requests(session: &Arc<Session>, reader: &mut Reader<'_>) -> Result<(), SessionError> {
    while let Some(request) = reader.next::<Request>()? {
        let count = request.fds(session.direction_of(&request));
        match reader.take_fds(count) {
            Some(fds) => session.handle(request, fds),
            None => session.no_room_for(&request),
        }
    }
    Ok(())
}

/// Only root and our own user may tell us what to do: the effective user of the other end when it connected, as the
/// kernel noted it (SO_PEERCRED, unix(7)), in the terms of our user namespace. The root of another one is not root here.
/// Gives its process id, 0 where that is of another PID namespace.
fn may_connect(stream: &UnixStream) -> Result<i32, SessionError> {
    let credentials: UnixCredentials = getsockopt(stream, PeerCredentials).map_err(io::Error::from)?;
    let (received, own) = (credentials.uid(), nix::unistd::geteuid().as_raw());
    if received == 0 || received == own {
        Ok(credentials.pid())
    } else {
        Err(SessionError::User { received, own })
    }
}

/// Release parked sockets whose connection has ended, and tell the router.
fn watch_parked(site: &Arc<Site>, current: &Current) -> io::Result<()> {
    let (site, current) = (Arc::clone(site), Arc::clone(current));
    thread::Builder::new().name("parked".into()).spawn(move || {
        loop {
            match site.next_ended() {
                Ok(ended) => {
                    let session = locked(&current).clone().filter(|session| session.is_open());
                    if session.is_none() && ended.is_empty() {
                        site.release_forsaken();
                        // The turns of a session end with it.
                        site.tidy();
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

const READ_BYTES: usize = 64 << 10;

/// What a reader keeps of the memory for a message: only carried bytes are more.
const KEPT_BYTES: usize = 256 << 10;

/// Frames and descriptors from the socket.
struct Reader<'a> {
    stream: &'a UnixStream,
    /// For one read.
    buffer: Box<[u8]>,
    /// Read, and no message yet.
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    /// Some did not find room here.
    lost_fds: bool,
}

impl Reader<'_> {
    fn new(stream: &UnixStream) -> Reader<'_> {
        let buffer = vec![0; READ_BYTES].into();
        Reader { stream, buffer, bytes: Vec::new(), fds: VecDeque::new(), lost_fds: false }
    }

    /// The next message; `None` at the end.
    fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, SessionError> {
        loop {
            if let Some((head, rest)) = self.bytes.split_first_chunk::<4>() {
                let length = Frame::body_length(*head)?;
                if let Some(body) = rest.get(..length) {
                    let message = Frame::decode(body)?;
                    self.bytes.drain(..4 + length);
                    self.bytes.shrink_to(KEPT_BYTES);
                    return Ok(Some(message));
                }
            }
            if !self.fill()? {
                return Ok(None);
            }
        }
    }

    fn fill(&mut self) -> io::Result<bool> {
        let received = match receive(self.stream, &mut self.buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error),
        };
        self.fds.extend(received.fds);
        self.lost_fds |= received.lost_fds;
        self.bytes.extend_from_slice(&self.buffer[..received.length]);
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn megabytes_that_were_carried_once_take_no_memory_afterwards() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let sent = [vec![7u8; 8 << 20], vec![1, 2, 3]];
        let frames: Vec<u8> = sent.iter().flat_map(|message| Frame::encode(message).unwrap()).collect();
        let writing = thread::spawn(move || theirs.write_all(&frames));
        let mut reader = Reader::new(&ours);
        let mut received = || -> Option<Vec<u8>> { reader.next().unwrap() };
        assert_eq!(
            [received(), received(), received()],
            [Some(sent[0].clone()), Some(sent[1].clone()), None]
        );
        assert!(reader.bytes.capacity() <= KEPT_BYTES, "{} bytes are kept", reader.bytes.capacity());
        writing.join().unwrap().unwrap();
    }
}
