// SPDX-License-Identifier: Apache-2.0
//! This node's certificate, its key and the authorities, read from a directory and made ready for TLS.

use std::{
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::{
    CertificateError, ClientConfig, Error, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
    server::{WebPkiClientVerifier, danger::ClientCertVerifier},
    version::TLS13,
};

use super::certificate::{Holder, Season};

pub const CERTIFICATE: &str = "tls.crt";
pub const KEY: &str = "tls.key";
pub const AUTHORITY: &str = "ca.crt";

/// Before a certificate expires, that is said.
const NOTICE: Duration = Duration::from_secs(14 * 24 * 3600);

/// Why certificates cannot be used. One line, for the operator.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    #[error(
        "{path}: cannot be read: {source}; expected tls.crt, tls.key and ca.crt in ROUTER_TLS, as `router pki` or cert-manager makes them; --insecure does without",
        path = path.display()
    )]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("{path}: {reason}", path = path.display())]
    Malformed { path: PathBuf, reason: String },
    #[error("{path}: {source}; does tls.key belong to it?", path = path.display())]
    Rejected { path: PathBuf, source: Error },
    #[error("{path}: holds no IP address: expected those of this node as subject alternative names", path = path.display())]
    NoAddress { path: PathBuf },
    #[error("{path}: the authority in ca.crt does not vouch for it: {source}; peers would refuse it", path = path.display())]
    NotVouchedFor { path: PathBuf, source: Error },
}

/// The three files, as they were read together.
pub struct Files {
    directory: PathBuf,
    certificate: Vec<u8>,
    key: Vec<u8>,
    authority: Vec<u8>,
}

impl Files {
    pub fn read(directory: &Path) -> Result<Files, TrustError> {
        let read = |name| {
            let path = directory.join(name);
            std::fs::read(&path).map_err(|source| TrustError::Unreadable { path, source })
        };
        Ok(Files {
            certificate: read(CERTIFICATE)?,
            key: read(KEY)?,
            authority: read(AUTHORITY)?,
            directory: directory.to_owned(),
        })
    }

    /// Read again; `None` if they are the same.
    pub fn changed(&self) -> Result<Option<(Files, Credentials)>, TrustError> {
        let found = Files::read(&self.directory)?;
        let same = found.certificate == self.certificate
            && found.key == self.key
            && found.authority == self.authority;
        if same {
            return Ok(None);
        }
        let credentials = Credentials::new(&found)?;
        Ok(Some((found, credentials)))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// What this node shows to others, and whom it believes.
pub struct Credentials {
    pub server: Arc<ServerConfig>,
    pub client: Arc<ClientConfig>,
    holder: Holder,
    authority: Vec<u8>,
}

impl Credentials {
    /// They fit each other, and peers will take them when it is their time.
    pub fn new(files: &Files) -> Result<Credentials, TrustError> {
        let chain = certificates(files.path(CERTIFICATE), &files.certificate)?;
        let path = files.path(KEY);
        let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|error| {
            let reason = format!("{error}; expected a private key as PEM");
            TrustError::Malformed { path, reason }
        })?;
        let mut roots = RootCertStore::empty();
        for authority in certificates(files.path(AUTHORITY), &files.authority)? {
            roots.add(authority).map_err(|error| TrustError::Malformed {
                path: files.path(AUTHORITY),
                reason: format!("{error}; expected the certificate of an authority"),
            })?;
        }
        let holder = Holder::of(&chain[0]).map_err(|error| TrustError::Malformed {
            path: files.path(CERTIFICATE),
            reason: format!("{error}; expected a certificate of X.509 version 3"),
        })?;
        if holder.addresses.is_empty() {
            return Err(TrustError::NoAddress { path: files.path(CERTIFICATE) });
        }
        let rejected = |source| TrustError::Rejected { path: files.path(CERTIFICATE), source };
        let provider = Arc::new(ring::default_provider());
        let (client_verifier, server_verifier) = verifiers(roots, &provider).map_err(|error| {
            TrustError::Malformed { path: files.path(AUTHORITY), reason: error.to_string() }
        })?;
        vouched_for(&chain, &holder, client_verifier.as_ref(), server_verifier.as_ref())
            .map_err(|source| TrustError::NotVouchedFor { path: files.path(CERTIFICATE), source })?;
        let mut server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&TLS13])
            .map_err(rejected)?
            .with_client_cert_verifier(client_verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(rejected)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(rejected)?
            .with_webpki_verifier(server_verifier)
            .with_client_auth_cert(chain, key)
            .map_err(rejected)?;
        // Sessions last long, and each is to show its certificate.
        server.send_tls13_tickets = 0;
        client.resumption = Resumption::disabled();
        Ok(Credentials {
            server: Arc::new(server),
            client: Arc::new(client),
            holder,
            authority: files.authority.clone(),
        })
    }

    pub fn has_authorities_of(&self, other: &Credentials) -> bool {
        self.authority == other.authority
    }

    /// What will keep peers from believing this node, or will soon. `host_address`: HOST_IF's.
    pub fn concern(&self, now: SystemTime, host_address: Option<IpAddr>) -> Option<String> {
        let [start, end] = self.holder.dates();
        let lacking = host_address.filter(|address| !self.holder.addresses.contains(address));
        match self.holder.season(now) {
            Season::Expired => Some(format!("expired at {end}: peers refuse it; put a new one in its place")),
            Season::NotYetValid => {
                Some(format!("is not valid before {start}: peers refuse it; is this host's clock right?"))
            }
            Season::Valid if now + NOTICE > self.holder.end() => {
                Some(format!("expires at {end}: put a new one in its place"))
            }
            Season::Valid => lacking.map(|address| {
                format!("does not hold {address} of HOST_IF: peers refuse it; issue one with all addresses of this node")
            }),
        }
    }
}

impl std::fmt::Display for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let addresses: Vec<String> = self.holder.addresses.iter().map(IpAddr::to_string).collect();
        let [_, end] = self.holder.dates();
        write!(f, "{} until {end}", addresses.join(", "))
    }
}

type Verifiers = (Arc<dyn ClientCertVerifier>, Arc<WebPkiServerVerifier>);

fn verifiers(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Verifiers, rustls::server::VerifierBuilderError> {
    let roots = Arc::new(roots);
    let of_clients =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(provider)).build()?;
    let of_servers = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(provider)).build()?;
    Ok((of_clients, of_servers))
}

/// In either role. When it is valid is another question.
fn vouched_for(
    chain: &[CertificateDer<'_>],
    holder: &Holder,
    of_clients: &dyn ClientCertVerifier,
    of_servers: &WebPkiServerVerifier,
) -> Result<(), Error> {
    let now = UnixTime::now();
    let (first, rest) = (&chain[0], &chain[1..]);
    let name = ServerName::from(holder.addresses[0]);
    let as_client = of_clients.verify_client_cert(first, rest, now).map(drop);
    let as_server = of_servers.verify_server_cert(first, rest, &name, &[], now).map(drop);
    for verdict in [as_client, as_server] {
        match verdict {
            Ok(())
            | Err(Error::InvalidCertificate(
                CertificateError::Expired
                | CertificateError::ExpiredContext { .. }
                | CertificateError::NotValidYet
                | CertificateError::NotValidYetContext { .. },
            )) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// At least one.
fn certificates(path: PathBuf, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let wrong = |reason| TrustError::Malformed { path: path.clone(), reason };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.map_err(|error| wrong(format!("{error}; expected certificates as PEM")))?;
    if found.is_empty() { Err(wrong("holds no certificate: expected one as PEM".into())) } else { Ok(found) }
}

/// The addresses in the certificate that a peer has shown, once TLS has found it to be true.
pub fn addresses_of(certificates: Option<&[CertificateDer<'_>]>) -> Vec<IpAddr> {
    let shown = certificates.and_then(<[_]>::first);
    shown.and_then(|shown| Holder::of(shown).ok()).map_or_else(Vec::new, |holder| holder.addresses)
}
