// SPDX-License-Identifier: Apache-2.0
//! What a certificate says of its node. Pure; whether that is true is for TLS to find out.

use std::{
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::CertificateDer;
use x509_cert::{
    Certificate,
    der::{Decode, Error},
    ext::pkix::{SubjectAltName, name::GeneralName},
    time::Time,
};

/// The addresses of a node, and when its certificate is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pub addresses: Vec<IpAddr>,
    not_before: Time,
    not_after: Time,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Season {
    NotYetValid,
    Valid,
    Expired,
}

impl Holder {
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Holder, Error> {
        let certificate = Certificate::from_der(certificate)?;
        let said = certificate.tbs_certificate();
        let names = said.get_extension::<SubjectAltName>()?.map_or_else(Vec::new, |(_, names)| names.0);
        let validity = said.validity();
        Ok(Holder {
            addresses: names.iter().filter_map(address).collect(),
            not_before: validity.not_before,
            not_after: validity.not_after,
        })
    }

    pub fn season(&self, now: SystemTime) -> Season {
        if now < UNIX_EPOCH + self.not_before.to_unix_duration() {
            Season::NotYetValid
        } else if now > self.end() {
            Season::Expired
        } else {
            Season::Valid
        }
    }

    pub fn end(&self) -> SystemTime {
        UNIX_EPOCH + self.not_after.to_unix_duration()
    }

    /// As people read them, UTC.
    pub fn dates(&self) -> [String; 2] {
        [self.not_before, self.not_after].map(|time| time.to_date_time().to_string())
    }
}

fn address(name: &GeneralName) -> Option<IpAddr> {
    let GeneralName::IpAddress(octets) = name else { return None };
    let octets = octets.as_bytes();
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_| v6()).ok().map(|address| address.to_canonical())
}
