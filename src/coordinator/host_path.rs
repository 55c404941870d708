// SPDX-License-Identifier: Apache-2.0
//! The connections between hosts that take the overlay's place: one for each swap, opened with a token that is good
//! for one, and consumed to the last byte before the connection is given away. The witness of each transaction has a
//! token of the same kind, and comes to ROUTER_PORT: it must be there when the host path is not.
//!
//! Two listeners on HOST_IF's address, because the application's socket must keep its family: an AF_INET6 socket
//! with v4-mapped addresses gets an AF_INET6 host socket, and so does one of an IPv6 overlay.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use forwarder_api::ConnId;
use nix::sys::socket::{setsockopt, sockopt::Ipv6V6Only};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{Semaphore, mpsc},
    time::timeout,
};

use super::wire::{Rendezvous, TOKEN, Token};

/// Of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// How long a peer may take to send its token, and to be connected to.
const PATIENCE: Duration = Duration::from_secs(2);
/// Connections to one of our listeners whose peer is not known yet. More are closed at once. A peer that moves many makes one for
/// each of them at the same time (`ledger::MAX_ATTEMPTS`).
pub const MAX_STRANGERS: usize = 4096;

/// What a connection is to be for a transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line {
    Host,
    Witness,
}

/// A connection that the peer has opened.
pub type Arrived = (ConnId, Line, OwnedFd);

/// The tokens of what peers have not opened yet.
#[derive(Clone, Default)]
pub struct Expected(Arc<Mutex<HashMap<Token, (ConnId, Line)>>>);

impl Expected {
    /// Whose connection this token opens; it opens no other.
    pub fn take(&self, line: Line, token: Token) -> Option<ConnId> {
        let mut all = self.all();
        let (conn, _) = *all.get(&token).filter(|(_, of)| *of == line)?;
        all.remove(&token);
        Some(conn)
    }

    fn add(&self, conn: ConnId, line: Line) -> io::Result<Token> {
        let mut token = Token([0; TOKEN]);
        getrandom::fill(&mut token.0).map_err(io::Error::other)?;
        self.all().insert(token, (conn, line));
        Ok(token)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<Token, (ConnId, Line)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct HostPath {
    address: Ipv4Addr,
    v4: SocketAddr,
    v6: SocketAddr,
    pub expected: Expected,
}

impl HostPath {
    /// Listen on HOST_IF's address, on ports of the kernel's choice.
    pub fn open(address: Ipv4Addr, arrived: mpsc::Sender<Arrived>) -> io::Result<HostPath> {
        let expected = Expected::default();
        let listen = |v6| -> io::Result<SocketAddr> {
            let listener = bound(address, v6)?.listen(MAX_STRANGERS as u32)?;
            let at = listener.local_addr()?;
            log::info!("host connections are taken on {at}");
            tokio::spawn(serve(listener, expected.clone(), arrived.clone()));
            Ok(at)
        };
        Ok(HostPath { address, v4: listen(false)?, v6: listen(true)?, expected })
    }

    /// Let the peer open the connections of a transaction of `conn`: its witness and, if there is to be one, the host
    /// connection.
    pub fn expect(&self, conn: ConnId, host: Option<Family>) -> io::Result<Rendezvous> {
        self.forget(conn);
        let at = |family| match family {
            Family::V4 => self.v4.port(),
            Family::V6 => self.v6.port(),
        };
        let host = match host {
            Some(family) => {
                let to = SocketAddr::new(self.address.into(), at(family));
                Some((to, self.expected.add(conn, Line::Host)?))
            }
            None => None,
        };
        Ok(Rendezvous { host, witness: self.expected.add(conn, Line::Witness)? })
    }

    pub fn forget(&self, conn: ConnId) {
        self.expected.all().retain(|_, (of, _)| *of != conn);
    }

    /// Open a host connection to a peer that expects it.
    pub async fn connect(address: Ipv4Addr, v6: bool, to: SocketAddr, token: Token) -> io::Result<OwnedFd> {
        let socket = bound(address, v6)?;
        let connected = timeout(PATIENCE, async {
            let mut stream = socket.connect(in_family(to, v6)).await?;
            stream.write_all(&token.0).await?;
            Ok::<_, io::Error>(stream)
        });
        into_fd(connected.await.map_err(|_| io::ErrorKind::TimedOut)??)
    }

    /// A connection over loopback, its ends of these families.
    pub async fn within_host(v6: [bool; 2]) -> io::Result<[OwnedFd; 2]> {
        let made = timeout(PATIENCE, async {
            let listener = bound(Ipv4Addr::LOCALHOST, v6[1])?.listen(1)?;
            let socket = bound(Ipv4Addr::LOCALHOST, v6[0])?;
            let near = socket.connect(in_family(canonical(listener.local_addr()?), v6[0])).await?;
            let own = canonical(near.local_addr()?);
            loop {
                // Anybody on this host could connect in between.
                let (far, from) = listener.accept().await?;
                if canonical(from) == own {
                    return Ok::<_, io::Error>([near, far]);
                }
            }
        });
        let [near, far] = made.await.map_err(|_| io::ErrorKind::TimedOut)??;
        Ok([into_fd(near)?, into_fd(far)?])
    }
}

async fn serve(listener: TcpListener, expected: Expected, arrived: mpsc::Sender<Arrived>) {
    let strangers = Arc::new(Semaphore::new(MAX_STRANGERS));
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: the backlog waits.
                log::warn!("a host connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(permit) = Arc::clone(&strangers).try_acquire_owned() else {
            log::warn!("{from} dropped: too many host connections wait for their token");
            continue;
        };
        let (expected, arrived) = (expected.clone(), arrived.clone());
        tokio::spawn(async move {
            match welcome(stream, &expected).await {
                Ok(connection) => drop(arrived.send(connection).await),
                Err(error) => log::warn!("{from} dropped: it opened a host connection and {error}"),
            }
            drop(permit);
        });
    }
}

async fn welcome(mut stream: TcpStream, expected: &Expected) -> io::Result<Arrived> {
    let mut token = Token([0; TOKEN]);
    timeout(PATIENCE, stream.read_exact(&mut token.0))
        .await
        .map_err(|_| io::Error::other("sent no token in time"))?
        .map_err(|error| io::Error::other(format!("sent no whole token: {error}")))?;
    let conn = expected.take(Line::Host, token);
    let conn = conn.ok_or_else(|| io::Error::other("its token opens nothing"))?;
    Ok((conn, Line::Host, into_fd(stream)?))
}

fn bound(address: Ipv4Addr, v6: bool) -> io::Result<TcpSocket> {
    let socket = if v6 { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    if v6 {
        setsockopt(&socket, Ipv6V6Only, &false)?;
    }
    socket.bind(in_family(SocketAddr::new(address.into(), 0), v6))?;
    Ok(socket)
}

/// The address as a socket of this family takes it.
fn in_family(address: SocketAddr, v6: bool) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(v4) if v6 => SocketAddr::new(v4.to_ipv6_mapped().into(), address.port()),
        IpAddr::V4(_) | IpAddr::V6(_) => address,
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

pub fn into_fd(stream: TcpStream) -> io::Result<OwnedFd> {
    let stream = stream.into_std()?;
    stream.set_nonblocking(false)?;
    Ok(stream.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open() -> (HostPath, mpsc::Receiver<Arrived>) {
        let (sender, receiver) = mpsc::channel(4);
        (HostPath::open(Ipv4Addr::LOCALHOST, sender).unwrap(), receiver)
    }

    #[tokio::test]
    async fn a_token_opens_one_connection_of_the_family_asked_for() {
        let (path, mut arrived) = open().await;
        for v6 in [false, true] {
            let family = if v6 { Family::V6 } else { Family::V4 };
            let (to, token) = path.expect(ConnId(7), Some(family)).unwrap().host.unwrap();
            HostPath::connect(Ipv4Addr::LOCALHOST, !v6, to, token).await.unwrap();
            let (conn, _, fd) = arrived.recv().await.unwrap();
            let local = std::net::TcpStream::from(fd).local_addr().unwrap();
            assert_eq!((conn, local.is_ipv6()), (ConnId(7), v6));
        }
    }

    #[tokio::test]
    async fn a_token_cannot_be_used_twice_nor_after_it_was_forgotten() {
        let (path, mut arrived) = open().await;
        let rendezvous = path.expect(ConnId(7), Some(Family::V4)).unwrap();
        let (to, token) = rendezvous.host.unwrap();
        let (_, forgotten) = path.expect(ConnId(8), Some(Family::V4)).unwrap().host.unwrap();
        path.forget(ConnId(8));
        // Nor one that is for something else.
        for token in [forgotten, rendezvous.witness, token, token] {
            HostPath::connect(Ipv4Addr::LOCALHOST, false, to, token).await.unwrap();
        }
        assert_eq!(arrived.recv().await.unwrap().0, ConnId(7));
        assert!(timeout(Duration::from_millis(200), arrived.recv()).await.is_err());
    }

    #[tokio::test]
    async fn ends_within_a_host_are_of_the_families_asked_for() {
        for v6 in [[false, false], [false, true], [true, false], [true, true]] {
            let ends = HostPath::within_host(v6).await.unwrap().map(std::net::TcpStream::from);
            let families = ends.map(|end| end.local_addr().unwrap().is_ipv6());
            assert_eq!(families, v6);
        }
    }
}
