// SPDX-License-Identifier: Apache-2.0
//! `router pki`: an authority and certificates of nodes, for those who have no other.

use std::{
    fs::{DirBuilder, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use clap::Subcommand;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::{Duration, OffsetDateTime};

use super::credentials::{AUTHORITY, CERTIFICATE, Credentials, Files, KEY, TrustError};

const AUTHORITY_KEY: &str = "ca.key";
const AUTHORITY_NAME: &str = "ebpf-router authority";
const AUTHORITY_LASTS: Duration = Duration::days(10 * 365);
const NODE_LASTS: Duration = Duration::days(365);
/// Clocks of nodes differ.
const BACKDATED: Duration = Duration::hours(1);

#[derive(Subcommand)]
pub enum PkiCommand {
    /// Make an authority: DIR/ca.crt, and DIR/ca.key, which stays away from the nodes.
    Init {
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
    /// Make the certificate of a node: DIR/NODE, to be put where its router looks (ROUTER_TLS). Valid for a year.
    Issue {
        /// Where `router pki init` has made the authority.
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        #[arg(value_name = "NODE")]
        node: String,
        /// All addresses at which the node's router is reached or comes from: HOST_IF's and OVERLAY_IF's.
        #[arg(long = "address", value_name = "IP", required = true, num_args = 1..)]
        addresses: Vec<IpAddr>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    #[error("{path}: exists already, and is not overwritten: take it away, or give another name", path = path.display())]
    Exists { path: PathBuf },
    #[error("{path}: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{path}: {source}; was it made by `router pki init`?", path = path.display())]
    Authority { path: PathBuf, source: rcgen::Error },
    #[error("{path}: {source}; expected an authority there, as `router pki init` makes it", path = path.display())]
    NoAuthority { path: PathBuf, source: io::Error },
    #[error("node name `{name}`: expected letters, digits, dots and dashes, and a letter or digit first")]
    Name { name: String },
    #[error("the certificate cannot be made: {0}")]
    Making(#[from] rcgen::Error),
    #[error("what was made cannot be used: {0}")]
    Useless(#[from] TrustError),
}

/// Says what was made.
pub fn obey(command: &PkiCommand) -> Result<String, PkiError> {
    match command {
        PkiCommand::Init { directory } => {
            init(directory)?;
            Ok(format!("{}: issue certificates of nodes with `router pki issue`", directory.display()))
        }
        PkiCommand::Issue { directory, node, addresses } => issue(directory, node, addresses),
    }
}

fn init(directory: &Path) -> Result<(), PkiError> {
    let (path, key_path) = (directory.join(AUTHORITY), directory.join(AUTHORITY_KEY));
    for path in [&path, &key_path] {
        if path.exists() {
            return Err(PkiError::Exists { path: path.clone() });
        }
    }
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let certificate = authority().self_signed(&key)?;
    make_directory(directory, true)?;
    write(&key_path, 0o600, &key.serialize_pem())?;
    write(&path, 0o644, &certificate.pem())
}

/// Says what was made.
fn issue(directory: &Path, node: &str, addresses: &[IpAddr]) -> Result<String, PkiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
    if !node.starts_with(|c: char| c.is_ascii_alphanumeric()) || !node.chars().all(allowed) {
        return Err(PkiError::Name { name: node.into() });
    }
    let read = |name| {
        let path = directory.join(name);
        std::fs::read_to_string(&path).map_err(|source| PkiError::NoAuthority { path, source })
    };
    let (authority_pem, authority_key) = (read(AUTHORITY)?, read(AUTHORITY_KEY)?);
    let authority_key = KeyPair::from_pem(&authority_key)
        .map_err(|source| PkiError::Authority { path: directory.join(AUTHORITY_KEY), source })?;
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let issuer = Issuer::new(authority(), authority_key);
    let certificate = of_node(node, addresses).signed_by(&key, &issuer)?;
    let place = directory.join(node);
    make_directory(&place, false)?;
    let written = write(&place.join(KEY), 0o600, &key.serialize_pem())
        .and_then(|()| write(&place.join(CERTIFICATE), 0o644, &certificate.pem()))
        .and_then(|()| write(&place.join(AUTHORITY), 0o644, &authority_pem))
        .and_then(|()| Ok(Credentials::new(&Files::read(&place)?)?));
    match written {
        Ok(credentials) => Ok(format!("{}: {credentials}", place.display())),
        Err(error) => {
            // Nobody shall take half of it for the whole.
            let _ = std::fs::remove_dir_all(&place);
            Err(error)
        }
    }
}

fn authority() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(AUTHORITY_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    lasting(params, AUTHORITY_LASTS)
}

fn of_node(node: &str, addresses: &[IpAddr]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(node);
    params.subject_alt_names = addresses.iter().map(|ip| SanType::IpAddress(ip.to_canonical())).collect();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    lasting(params, NODE_LASTS)
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn lasting(mut params: CertificateParams, time: Duration) -> CertificateParams {
    let now = OffsetDateTime::now_utc();
    (params.not_before, params.not_after) = (now - BACKDATED, now + time);
    params
}

fn make_directory(path: &Path, may_exist: bool) -> Result<(), PkiError> {
    match DirBuilder::new().mode(0o700).recursive(may_exist).create(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Err(PkiError::Exists { path: path.to_owned() })
        }
        Err(source) => Err(PkiError::File { path: path.to_owned(), source }),
    }
}

fn write(path: &Path, mode: u32, text: &str) -> Result<(), PkiError> {
    let written = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path: path.to_owned() },
        _ => PkiError::File { path: path.to_owned(), source },
    })
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, time::SystemTime};

    use super::*;

    const ADDRESS: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn what_is_issued_is_ready_for_a_router_and_its_keys_are_readable_to_their_owner_only() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path()).unwrap();
        let said = issue(directory.path(), "n1", &[ADDRESS, "fd00::1".parse().unwrap()]).unwrap();
        assert!(said.contains("192.0.2.1, fd00::1 until 20"), "{said}");
        let place = directory.path().join("n1");
        let credentials = Credentials::new(&Files::read(&place).unwrap()).unwrap();
        assert_eq!(credentials.concern(SystemTime::now(), Some(ADDRESS)), None);
        for key in [directory.path().join(AUTHORITY_KEY), place.join(KEY)] {
            assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_certificate_is_worried_about_before_it_ends_and_when_it_lacks_an_address() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path()).unwrap();
        issue(directory.path(), "n1", &[ADDRESS]).unwrap();
        let credentials = Credentials::new(&Files::read(&directory.path().join("n1")).unwrap()).unwrap();
        let day = std::time::Duration::from_secs(24 * 3600);
        let check = |now, address, words: &str| {
            let concern = credentials.concern(now, address).unwrap();
            assert!(concern.contains(words), "{concern}");
        };
        let now = SystemTime::now();
        check(now, Some("192.0.2.9".parse().unwrap()), "does not hold 192.0.2.9 of HOST_IF");
        check(now + day * 360, Some(ADDRESS), "expires at");
        check(now + day * 366, Some(ADDRESS), "expired at");
        check(now - day, Some(ADDRESS), "is not valid before");
    }

    #[test]
    fn nothing_is_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path()).unwrap();
        assert!(matches!(init(directory.path()), Err(PkiError::Exists { .. })));
        issue(directory.path(), "n1", &[ADDRESS]).unwrap();
        let again = issue(directory.path(), "n1", &[ADDRESS]);
        assert!(matches!(again, Err(PkiError::Exists { .. })));
        assert!(directory.path().join("n1/tls.crt").exists());
    }

    #[test]
    fn a_node_is_no_path() {
        for name in ["", "..", "a/b", "-x", "a b"] {
            let issued = issue(Path::new("/nowhere"), name, &[ADDRESS]);
            assert!(matches!(issued, Err(PkiError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn a_key_of_another_certificate_and_an_authority_of_others_are_found() {
        let directory = tempfile::tempdir().unwrap();
        init(directory.path()).unwrap();
        for node in ["n1", "n2"] {
            issue(directory.path(), node, &[ADDRESS]).unwrap();
        }
        let place = directory.path().join("n1");
        std::fs::copy(directory.path().join("n2/tls.key"), place.join(KEY)).unwrap();
        let mixed = Credentials::new(&Files::read(&place).unwrap());
        assert!(matches!(mixed, Err(TrustError::Rejected { .. })));
        let other = tempfile::tempdir().unwrap();
        init(other.path()).unwrap();
        let place = directory.path().join("n2");
        std::fs::copy(other.path().join(AUTHORITY), place.join(AUTHORITY)).unwrap();
        let strange = Credentials::new(&Files::read(&place).unwrap());
        assert!(matches!(strange, Err(TrustError::NotVouchedFor { .. })));
    }
}
