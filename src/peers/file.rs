// SPDX-License-Identifier: Apache-2.0
//! A file that says which host holds which overlay addresses.

use std::{net::IpAddr, path::Path};

use ipnetwork::IpNetwork;
use serde::Deserialize;

use super::{PeerAddress, PeerError};

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StaticPeers {
    peers: Vec<StaticPeer>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StaticPeer {
    overlay: IpNetwork,
    host: PeerAddress,
}

impl StaticPeers {
    pub fn load(path: &Path) -> Result<StaticPeers, PeerError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| PeerError::Unreadable { path: path.to_owned(), source })?;
        serde_yaml::from_str(&text).map_err(|source| PeerError::Malformed { path: path.to_owned(), source })
    }

    pub fn host_of(&self, of: IpAddr) -> Option<PeerAddress> {
        self.peers.iter().find(|peer| peer.overlay.contains(of)).map(|peer| peer.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_range_that_holds_an_address_names_its_host() {
        let text =
            "peers: [{overlay: 10.0.2.0/24, host: 192.0.2.2}, {overlay: 10.0.0.0/16, host: 192.0.2.3}]";
        let peers: StaticPeers = serde_yaml::from_str(text).unwrap();
        let host_of = |of: &str| peers.host_of(of.parse().unwrap()).map(|host| host.to_string());
        assert_eq!(host_of("10.0.2.9").as_deref(), Some("192.0.2.2"));
        assert_eq!(host_of("10.0.3.9").as_deref(), Some("192.0.2.3"));
        assert_eq!(host_of("10.1.0.9"), None);
    }
}
