// SPDX-License-Identifier: Apache-2.0
//! One end of a connection in no more room than it needs: a router keeps several for each.

use std::{
    fmt,
    net::{AddrParseError, IpAddr, SocketAddr},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

use crate::bytes::{mapped, unmapped};

/// An address and a port in 18 bytes, where `SocketAddr` takes 32. It is told to peers and people as that.
///
/// An IPv4-mapped address (RFC 4291, 2.5.5.2) is the IPv4 address; neither overlays nor pods have scopes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "SocketAddr", into = "SocketAddr")]
pub struct Endpoint {
    /// IPv4 as mapped.
    ip: [u8; 16],
    port: u16,
}

impl Endpoint {
    pub fn new(ip: IpAddr, port: u16) -> Endpoint {
        Endpoint { ip: mapped(ip), port }
    }

    pub fn ip(self) -> IpAddr {
        unmapped(self.ip)
    }

    pub fn port(self) -> u16 {
        self.port
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Endpoint {
        Endpoint::new(address.ip(), address.port())
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> SocketAddr {
        SocketAddr::new(endpoint.ip(), endpoint.port)
    }
}

impl FromStr for Endpoint {
    type Err = AddrParseError;

    fn from_str(text: &str) -> Result<Endpoint, AddrParseError> {
        text.parse().map(SocketAddr::into)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        SocketAddr::from(*self).fmt(f)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_the_address_that_it_was_made_of() {
        for text in ["10.244.1.9:40000", "[fd00::2]:80", "0.0.0.0:0"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(SocketAddr::from(Endpoint::from(address)), address);
            assert_eq!(Endpoint::from(address).to_string(), text);
        }
    }

    #[test]
    fn a_mapped_address_is_the_ipv4_address() {
        let mapped: Endpoint = "[::ffff:10.0.0.1]:80".parse().unwrap();
        assert_eq!(mapped, "10.0.0.1:80".parse().unwrap());
        assert_eq!(mapped.ip(), IpAddr::from([10, 0, 0, 1]));
    }

    #[test]
    fn peers_are_told_a_socket_address() {
        let endpoint: Endpoint = "10.0.0.1:80".parse().unwrap();
        let told = postcard::to_stdvec(&endpoint).unwrap();
        assert_eq!(told, postcard::to_stdvec(&SocketAddr::from(endpoint)).unwrap());
        assert_eq!(postcard::from_bytes::<Endpoint>(&told).unwrap(), endpoint);
    }
}
