// SPDX-License-Identifier: Apache-2.0
//! From a TCP connection to a channel whose other end is known: preamble, TLS handshake, welcome.
//!
//! ```text
//!   connects                          was connected to
//!   preamble (8 bytes)  ------------>
//!                       <------------ preamble              from here on TLS, both show their certificates
//!   handshake           <----------->
//!                       <------------ welcome (1 byte)      or why not: only now the certificate was looked at
//! ```
//!
//! The preambles are all that is read of a peer before it is authenticated. A change of them on the way can end a
//! session, and nothing else: each side knows from its own settings whether TLS follows.

use std::{fmt::Display, io, net::IpAddr, sync::Arc};

use rustls::{AlertDescription, CertificateError, Error as TlsError, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    coordinator::wire::{self, Purpose, WireError},
    trust::{Node, Trust, addresses_of},
};

/// What messages go over.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}
pub type Channel = Box<dyn Duplex>;

const WELCOME: u8 = 1;
const OTHER_NODE: u8 = 2;

/// Why a peer is not believed, or does not believe us.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    #[error("{0}")]
    Io(io::Error),
    #[error("{0}")]
    Wire(#[from] WireError),
    #[error("it has no certificate: give it one of our authority (ROUTER_TLS)")]
    NoCertificate,
    #[error("its certificate is not of an authority that we know (ca.crt)")]
    OtherAuthority,
    #[error("its certificate has expired")]
    Expired,
    #[error("its certificate is not valid yet: does its clock agree with ours?")]
    NotYetValid,
    #[error("its certificate is of another node: {address} expected, it holds {held}", held = list(.held))]
    OtherNode { address: IpAddr, held: Vec<String> },
    #[error("it refuses our certificate ({reason}): its log says more")]
    Refused { reason: String },
    #[error("TLS: {0}")]
    Tls(TlsError),
}

impl From<io::Error> for ChannelError {
    /// What TLS has to say comes in an I/O error.
    fn from(error: io::Error) -> ChannelError {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) {
            Some(tls) => ChannelError::of_tls(tls.clone()),
            None => ChannelError::Io(error),
        }
    }
}

impl ChannelError {
    fn of_tls(error: TlsError) -> ChannelError {
        match error {
            TlsError::NoCertificatesPresented => ChannelError::NoCertificate,
            TlsError::InvalidCertificate(
                CertificateError::UnknownIssuer | CertificateError::BadSignature,
            ) => ChannelError::OtherAuthority,
            TlsError::InvalidCertificate(
                CertificateError::Expired | CertificateError::ExpiredContext { .. },
            ) => ChannelError::Expired,
            TlsError::InvalidCertificate(
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
            ) => ChannelError::NotYetValid,
            TlsError::AlertReceived(
                alert @ (AlertDescription::UnknownCA
                | AlertDescription::BadCertificate
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateRequired
                | AlertDescription::CertificateUnknown
                | AlertDescription::DecryptError
                | AlertDescription::UnsupportedCertificate),
            ) => ChannelError::Refused { reason: format!("{alert:?}") },
            other => ChannelError::Tls(other),
        }
    }
}

fn list(names: &[impl Display]) -> String {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    if names.is_empty() { "no address".into() } else { names.join(", ") }
}

/// What we want of connections for messages.
pub fn purpose(trust: &Trust) -> Purpose {
    match trust {
        Trust::Insecure => Purpose::Plain,
        Trust::Certified(_) => Purpose::Secure,
    }
}

/// The side that connects, to the router at `to`.
pub async fn connect(mut stream: TcpStream, to: IpAddr, trust: &Trust) -> Result<Channel, ChannelError> {
    let own = purpose(trust);
    stream.write_all(&wire::preamble(own)).await?;
    let mut preamble = [0; wire::PREAMBLE];
    stream.read_exact(&mut preamble).await?;
    wire::agree(own, wire::check_preamble(preamble)?)?;
    let Trust::Certified(credentials) = trust else { return Ok(Box::new(stream)) };
    let connector = TlsConnector::from(Arc::clone(&credentials.borrow().client));
    let handshake = connector.connect(ServerName::from(to), stream).await;
    let mut stream = handshake.map_err(|error| match ChannelError::from(error) {
        ChannelError::Tls(TlsError::InvalidCertificate(CertificateError::NotValidForNameContext {
            presented,
            ..
        })) => ChannelError::OtherNode { address: to, held: presented },
        other => other,
    })?;
    let mut welcome = [0; 1];
    stream.read_exact(&mut welcome).await?;
    match welcome {
        [WELCOME] => Ok(Box::new(stream)),
        _ => Err(ChannelError::Refused { reason: "it does not hold the address that we come from".into() }),
    }
}

/// The side that was connected to, after both preambles.
pub async fn accept(stream: TcpStream, from: IpAddr, trust: &Trust) -> Result<(Channel, Node), ChannelError> {
    let Trust::Certified(credentials) = trust else {
        return Ok((Box::new(stream), Node::uncertified(from)));
    };
    let acceptor = TlsAcceptor::from(Arc::clone(&credentials.borrow().server));
    let mut stream = acceptor.accept(stream).await?;
    let held = addresses_of(stream.get_ref().1.peer_certificates());
    let known = held.contains(&from);
    stream.write_all(&[if known { WELCOME } else { OTHER_NODE }]).await?;
    stream.flush().await?;
    if known {
        Ok((Box::new(stream), Node::certified(from, held)))
    } else {
        let _ = stream.shutdown().await;
        let held = held.iter().map(ToString::to_string).collect();
        Err(ChannelError::OtherNode { address: from, held })
    }
}
