// SPDX-License-Identifier: Apache-2.0
//! Connections between routers. Each router speaks on the connection that it made and listens on those made to it, so
//! that there is no question of whose connection counts.

mod channel;

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpUserTimeout},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, split},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};

use super::{
    host_path::{Arrived, Expected, Line, MAX_STRANGERS, into_fd},
    wire::{self, Message, Purpose, TOKEN, Token, WireError},
};
use crate::{
    lanes::{self, Urgent},
    peers::PeerAddress,
    trust::{Node, Trust},
};
use channel::{Channel, ChannelError};

/// For the preamble, and for connecting.
const GREETING: Duration = Duration::from_secs(2);
/// For a TLS handshake that has its turn, and for that turn to come.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The most handshakes under way at once with those who connect: each costs time that moves are waiting for.
const MAX_HANDSHAKES: usize = 16;
/// For the rest of a frame that has begun.
const FRAME: Duration = Duration::from_secs(10);
/// A peer that acknowledges nothing for so long is gone.
const SILENCE_S: u32 = 5;
/// Between two tries to reach a peer.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// Connections of peers that are known. More are dropped.
const MAX_SESSIONS: usize = 1024;
/// Messages on their way to a peer. A peer that takes no more is lost, so that nothing is dropped from between.
const QUEUE: usize = 1 << 18;
/// Of these, so many go at once: each write costs a record of TLS and a way through the kernel.
const AT_ONCE: usize = 64;

/// What comes from the sessions.
pub enum SessionEvent {
    /// We may speak to this peer.
    Up(PeerAddress, mpsc::Sender<Message>),
    Down(PeerAddress),
    Heard(Node, Message),
}

impl Urgent for SessionEvent {
    /// A follower says Begin, and then its forwarder may speak; a decider's forwarder may when its router has heard that. What
    /// must have come before, both have answered by then.
    fn is_urgent(&self) -> bool {
        matches!(self, SessionEvent::Heard(_, Message::Begin { .. } | Message::Relay { .. }))
    }
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("{0}")]
    Channel(#[from] ChannelError),
    #[error("there are {MAX_SESSIONS} already")]
    TooMany,
    #[error("other authorities are in force (ca.crt): it is to show its certificate again")]
    OtherAuthorities,
    #[error("it sent no more for {} s in the middle of {what}", limit.as_secs())]
    Stalled { what: &'static str, limit: Duration },
    #[error("it spoke on the connection that we made")]
    Spoke,
    #[error("it brought a token that opens nothing")]
    Stranger,
}

/// Take ROUTER_PORT, on all addresses of both families.
pub fn listen(port: u16) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v6()?;
    setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &false)?;
    socket.set_reuseaddr(true)?;
    socket.bind(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port))?;
    socket.listen(MAX_STRANGERS as u32)
}

/// Where those who connect are led.
#[derive(Clone)]
pub struct Doors {
    pub events: lanes::Sender<SessionEvent>,
    pub expected: Expected,
    pub arrived: mpsc::Sender<Arrived>,
    pub trust: Trust,
    /// Those who were not let in, since the router started.
    pub turned_away: Arc<AtomicU64>,
}

/// How many are at a door.
#[derive(Clone)]
struct Places {
    strangers: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    sessions: Arc<Semaphore>,
}

/// Hear everybody who connects, for ever.
pub async fn hear(listener: TcpListener, doors: Doors) {
    let places = Places {
        strangers: Arc::new(Semaphore::new(MAX_STRANGERS)),
        handshakes: Arc::new(Semaphore::new(MAX_HANDSHAKES)),
        sessions: Arc::new(Semaphore::new(MAX_SESSIONS)),
    };
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                log::warn!("a peer could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let from = SocketAddr::new(from.ip().to_canonical(), from.port());
        let Ok(stranger) = Arc::clone(&places.strangers).try_acquire_owned() else {
            log::warn!(
                "peer {from} dropped: there are {MAX_STRANGERS} before it that have not said who they are"
            );
            continue;
        };
        let (doors, places) = (doors.clone(), places.clone());
        tokio::spawn(async move {
            let welcomed = timeout(GREETING + HANDSHAKE, welcome(stream, from.ip(), &doors, &places)).await;
            drop(stranger);
            let stalled = Err(SessionError::Stalled { what: "a TLS handshake", limit: GREETING + HANDSHAKE });
            let ended = match welcomed.unwrap_or(stalled) {
                Ok(None) => return,
                Ok(Some((channel, node, _session))) => hear_messages(channel, node, &doors).await,
                Err(error) => {
                    doors.turned_away.fetch_add(1, Relaxed);
                    Err(error)
                }
            };
            match ended {
                Ok(()) => log::debug!("peer {from} is gone"),
                Err(error) => log::warn!("peer {from} dropped: {error}"),
            }
        });
    }
}

/// A peer that is known now; `None`: it was a witness.
async fn welcome(
    mut stream: TcpStream,
    from: IpAddr,
    doors: &Doors,
    places: &Places,
) -> Result<Option<(Channel, Node, OwnedSemaphorePermit)>, SessionError> {
    let mut preamble = [0; wire::PREAMBLE];
    match timeout(GREETING, stream.read_exact(&mut preamble)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(SessionError::Stalled { what: "its greeting", limit: GREETING }),
    }
    let wanted = wire::check_preamble(preamble);
    if matches!(wanted, Ok(Purpose::Witness)) {
        return take_witness(stream, doors).await.map(|()| None);
    }
    // One that speaks another version, or not as we do, shall know.
    let own = channel::purpose(&doors.trust);
    stream.write_all(&wire::preamble(own)).await?;
    wire::agree(own, wanted?)?;
    notice_silence(&stream)?;
    let _turn = places.handshakes.acquire().await;
    let (channel, node) = channel::accept(stream, from, &doors.trust).await?;
    let session = Arc::clone(&places.sessions).try_acquire_owned().map_err(|_| SessionError::TooMany)?;
    Ok(Some((channel, node, session)))
}

async fn take_witness(mut stream: TcpStream, doors: &Doors) -> Result<(), SessionError> {
    let mut token = Token([0; TOKEN]);
    match timeout(GREETING, stream.read_exact(&mut token.0)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(SessionError::Stalled { what: "its token", limit: GREETING }),
    }
    let conn = doors.expected.take(Line::Witness, token).ok_or(SessionError::Stranger)?;
    stream.set_nodelay(true)?;
    let _ = doors.arrived.send((conn, Line::Witness, into_fd(stream)?)).await;
    Ok(())
}

async fn hear_messages(mut stream: Channel, node: Node, doors: &Doors) -> Result<(), SessionError> {
    let mut trust = doors.trust.clone();
    loop {
        let mut head = [0; 4];
        let begun = tokio::select! {
            begun = stream.read_exact(&mut head[..1]) => begun,
            () = trust.other_authorities() => return Err(SessionError::OtherAuthorities),
        };
        match begun {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let rest = timeout(FRAME, async {
            stream.read_exact(&mut head[1..]).await?;
            let length = wire::body_length(head)?;
            // Grows with what comes, not with what is announced.
            let mut body = Vec::new();
            (&mut stream).take(length as u64).read_to_end(&mut body).await?;
            if body.len() < length {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            Ok::<_, SessionError>(wire::decode(&body)?)
        });
        let message = rest.await.map_err(|_| SessionError::Stalled { what: "a frame", limit: FRAME })??;
        if doors.events.send(SessionEvent::Heard(node.clone(), message)).await.is_err() {
            return Ok(());
        }
    }
}

/// Keep in touch with the router at `to`, for ever.
pub async fn reach(to: SocketAddr, trust: Trust, events: lanes::Sender<SessionEvent>) {
    let peer = to.ip();
    let mut retry = FIRST_RETRY;
    let mut complained = false;
    loop {
        match connect(to, &trust).await {
            Ok(stream) => {
                let (sender, receiver) = mpsc::channel(QUEUE);
                if events.send(SessionEvent::Up(peer, sender)).await.is_err() {
                    return;
                }
                log::info!("peer {to} is reached");
                (retry, complained) = (FIRST_RETRY, false);
                match speak(stream, receiver, trust.clone()).await {
                    Ok(()) => log::info!("peer {to} is gone"),
                    Err(error) => log::info!("peer {to} is lost: {error}"),
                }
            }
            Err(error) => {
                let level = if complained { log::Level::Debug } else { log::Level::Warn };
                log::log!(level, "peer {to} cannot be reached: {error}");
                complained = true;
            }
        }
        if events.send(SessionEvent::Down(peer)).await.is_err() {
            return;
        }
        tokio::time::sleep(retry).await;
        retry = (retry * 2).min(LAST_RETRY);
    }
}

async fn connect(to: SocketAddr, trust: &Trust) -> Result<Channel, SessionError> {
    let connecting = timeout(GREETING, TcpStream::connect(to)).await;
    let stream =
        connecting.map_err(|_| SessionError::Stalled { what: "its greeting", limit: GREETING })??;
    stream.set_nodelay(true)?;
    notice_silence(&stream)?;
    // At the other end it may have to wait for its turn.
    let limit = GREETING + HANDSHAKE;
    let known = timeout(limit, channel::connect(stream, to.ip(), trust)).await;
    Ok(known.map_err(|_| SessionError::Stalled { what: "its greeting", limit })??)
}

/// Make the witness of a transaction with the router at `to`.
pub async fn open_witness(to: SocketAddr, token: Token) -> io::Result<OwnedFd> {
    let made = timeout(GREETING, async {
        let mut stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        stream.write_all(&[&wire::preamble(Purpose::Witness)[..], &token.0].concat()).await?;
        into_fd(stream)
    });
    made.await.map_err(|_| io::ErrorKind::TimedOut)?
}

/// Until the connection or the queue ends.
async fn speak(
    stream: Channel,
    mut queue: mpsc::Receiver<Message>,
    mut trust: Trust,
) -> Result<(), SessionError> {
    let (mut reader, mut writer) = split(stream);
    let mut said = [0; 1];
    let mut messages = Vec::new();
    loop {
        tokio::select! {
            count = queue.recv_many(&mut messages, AT_ONCE) => {
                if count == 0 {
                    // All that was said arrives.
                    let _ = writer.shutdown().await;
                    return Ok(());
                }
                let frames: Result<Vec<Vec<u8>>, WireError> =
                    messages.drain(..).map(|message| wire::encode(&message)).collect();
                writer.write_all(&frames?.concat()).await?;
                writer.flush().await?;
            },
            read = reader.read(&mut said) => match read {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(SessionError::Spoke),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error.into()),
            },
            () = trust.other_authorities() => return Err(SessionError::OtherAuthorities),
        }
    }
}

fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    setsockopt(stream, KeepAlive, &true)?;
    setsockopt(stream, TcpKeepIdle, &2)?;
    setsockopt(stream, TcpKeepInterval, &1)?;
    setsockopt(stream, TcpKeepCount, &(SILENCE_S - 2))?;
    setsockopt(stream, TcpUserTimeout, &(SILENCE_S * 1000))?;
    Ok(())
}
