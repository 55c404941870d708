// SPDX-License-Identifier: Apache-2.0
//! Connections between routers. Each router speaks on the connection that it made and listens on those made to it, so
//! that there is no question of whose connection counts.

use std::{
    io,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};

use nix::sys::socket::{
    setsockopt,
    sockopt::{KeepAlive, TcpKeepCount, TcpKeepIdle, TcpKeepInterval, TcpUserTimeout},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::{
    host_path::{Arrived, Expected, Line, into_fd},
    wire::{self, Message, Purpose, TOKEN, Token, WireError},
};
use crate::peers::PeerAddress;

/// For the preamble, and for connecting.
const GREETING: Duration = Duration::from_secs(2);
/// For the rest of a frame that has begun.
const FRAME: Duration = Duration::from_secs(10);
/// A peer that acknowledges nothing for so long is gone.
const SILENCE_S: u32 = 5;
/// Between two tries to reach a peer.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(2);
/// Connections made to us. More are dropped.
const MAX_SESSIONS: usize = 1024;
/// Messages on their way to a peer. A peer that takes no more is lost, so that nothing is dropped from between.
const QUEUE: usize = 1 << 18;

/// What comes from the sessions.
pub enum SessionEvent {
    /// We may speak to this peer.
    Up(PeerAddress, mpsc::Sender<Message>),
    Down(PeerAddress),
    Heard(PeerAddress, Message),
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
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
    socket.listen(1024)
}

/// Where those who connect are led.
#[derive(Clone)]
pub struct Doors {
    pub events: mpsc::Sender<SessionEvent>,
    pub expected: Expected,
    pub arrived: mpsc::Sender<Arrived>,
}

/// Hear everybody who connects, for ever.
pub async fn hear(listener: TcpListener, doors: Doors) {
    let sessions = Arc::new(Semaphore::new(MAX_SESSIONS));
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
        let Ok(permit) = Arc::clone(&sessions).try_acquire_owned() else {
            log::warn!("peer {from} dropped: there are {MAX_SESSIONS} already");
            continue;
        };
        let doors = doors.clone();
        tokio::spawn(async move {
            match hear_one(stream, from.ip(), &doors).await {
                Ok(()) => log::debug!("peer {from} is gone"),
                Err(error) => log::warn!("peer {from} dropped: {error}"),
            }
            drop(permit);
        });
    }
}

async fn hear_one(mut stream: TcpStream, from: IpAddr, doors: &Doors) -> Result<(), SessionError> {
    let mut preamble = [0; wire::PREAMBLE];
    match timeout(GREETING, stream.read_exact(&mut preamble)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(SessionError::Stalled { what: "its greeting", limit: GREETING }),
    }
    // One that speaks another version shall know ours; but nothing is written on a witness.
    let purpose = wire::check_preamble(preamble);
    if !matches!(purpose, Ok(Purpose::Witness)) {
        stream.write_all(&wire::preamble(Purpose::Control)).await?;
    }
    match purpose? {
        Purpose::Witness => take_witness(stream, doors).await,
        Purpose::Control => hear_messages(stream, from, &doors.events).await,
    }
}

async fn take_witness(mut stream: TcpStream, doors: &Doors) -> Result<(), SessionError> {
    let mut token = Token([0; TOKEN]);
    match timeout(GREETING, stream.read_exact(&mut token.0)).await {
        Ok(read) => drop(read?),
        Err(_) => return Err(SessionError::Stalled { what: "its token", limit: GREETING }),
    }
    let conn = doors.expected.take(Line::Witness, token).ok_or(SessionError::Stranger)?;
    let _ = doors.arrived.send((conn, Line::Witness, into_fd(stream)?)).await;
    Ok(())
}

async fn hear_messages(
    mut stream: TcpStream,
    from: IpAddr,
    events: &mpsc::Sender<SessionEvent>,
) -> Result<(), SessionError> {
    notice_silence(&stream)?;
    loop {
        let mut head = [0; 4];
        match stream.read_exact(&mut head[..1]).await {
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
        if events.send(SessionEvent::Heard(from, message)).await.is_err() {
            return Ok(());
        }
    }
}

/// Keep in touch with the router at `to`, for ever.
pub async fn reach(to: SocketAddr, events: mpsc::Sender<SessionEvent>) {
    let peer = to.ip();
    let mut retry = FIRST_RETRY;
    let mut complained = false;
    loop {
        match connect(to).await {
            Ok(stream) => {
                let (sender, receiver) = mpsc::channel(QUEUE);
                if events.send(SessionEvent::Up(peer, sender)).await.is_err() {
                    return;
                }
                log::info!("peer {to} is reached");
                (retry, complained) = (FIRST_RETRY, false);
                match speak(stream, receiver).await {
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

async fn connect(to: SocketAddr) -> Result<TcpStream, SessionError> {
    let greeting = timeout(GREETING, async {
        let mut stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        notice_silence(&stream)?;
        stream.write_all(&wire::preamble(Purpose::Control)).await?;
        let mut preamble = [0; wire::PREAMBLE];
        stream.read_exact(&mut preamble).await?;
        wire::check_preamble(preamble)?;
        Ok(stream)
    });
    greeting.await.map_err(|_| SessionError::Stalled { what: "its greeting", limit: GREETING })?
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
async fn speak(stream: TcpStream, mut queue: mpsc::Receiver<Message>) -> Result<(), SessionError> {
    let (mut reader, mut writer) = stream.into_split();
    let mut said = [0; 1];
    loop {
        tokio::select! {
            message = queue.recv() => match message {
                Some(message) => writer.write_all(&wire::encode(&message)?).await?,
                None => return Ok(()),
            },
            read = reader.read(&mut said) => match read? {
                0 => return Ok(()),
                _ => return Err(SessionError::Spoke),
            },
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
