// SPDX-License-Identifier: Apache-2.0
//! Which host holds an overlay address. Four sources are asked, and the first that knows is believed: Kubernetes, a
//! static file, the kernel's route through OVERLAY_IF, whose next hop is an address of the peer, and, for an overlay
//! that is one bridged segment, neighbour and forwarding entries.
//!
//! [`Peers::facts`] asks, [`Facts::whereabouts`] decides.

mod bridged;
mod file;
mod interfaces;
mod route;

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use interfaces::Interfaces;

use crate::cluster::Pods;
pub use file::StaticPeers;

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("ROUTER_PEERS={path}: cannot be read: {source}; give the path of a file that says which host holds what", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}; expected a list `peers` of entries with overlay (an address range) and host (an address)", path = path.display())]
    Malformed { path: PathBuf, source: serde_yaml::Error },
    #[error("the kernel cannot be asked over netlink: {0}")]
    Netlink(std::io::Error),
    #[error("{variable}={name}: {reason}")]
    Interface { variable: &'static str, name: String, reason: String },
    #[error("{variable} is not set, and {reason}: give the name of an interface ({example})")]
    NotFound { variable: &'static str, reason: String, example: &'static str },
}

/// Where a peer's router listens (on ROUTER_PORT).
pub type PeerAddress = IpAddr;

/// Who can tell where a peer is, in the order in which they are believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    Kubernetes,
    File,
    Route,
    Fdb,
}

/// A peer, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    Peer(PeerAddress, Source),
    /// The address belongs to a host.
    Host,
    /// Nobody knows of another host that has it: it may be a container of this host.
    NotOnOverlay,
}

/// What the route to an overlay address tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Route {
    Peer(PeerAddress),
    Host,
    #[default]
    NotOnOverlay,
}

/// What each source says of one overlay address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub kubernetes: Option<PeerAddress>,
    pub file: Option<PeerAddress>,
    pub route: Route,
    pub fdb: Option<PeerAddress>,
}

impl Facts {
    /// Who answers first. `own` are the addresses of this host.
    pub fn whereabouts(&self, own: &[IpAddr]) -> Whereabouts {
        match self.answers().next() {
            Some((_, address)) if own.contains(&address) => Whereabouts::NotOnOverlay,
            Some((source, address)) => Whereabouts::Peer(address, source),
            None if self.route == Route::Host => Whereabouts::Host,
            None => Whereabouts::NotOnOverlay,
        }
    }

    /// Two routers may not have found each other by the same source: one may not have heard of a pod yet. The one that
    /// knows more goes by what the other knows: is `heard`, from where the peer speaks, what a later source says than the
    /// one that named it `home`?
    pub fn makes_way(&self, home: PeerAddress, heard: PeerAddress) -> Option<Source> {
        let source_of =
            |address| self.answers().find(|(_, answer)| *answer == address).map(|(source, _)| source);
        source_of(heard).filter(|heard| source_of(home).is_none_or(|home| home < *heard))
    }

    fn answers(&self) -> impl Iterator<Item = (Source, PeerAddress)> {
        let (route, fdb) = match self.route {
            Route::Peer(address) => (Some(address), self.fdb),
            Route::NotOnOverlay => (None, self.fdb),
            Route::Host => (None, None),
        };
        [
            (Source::Kubernetes, self.kubernetes),
            (Source::File, self.file),
            (Source::Route, route),
            (Source::Fdb, fdb),
        ]
        .into_iter()
        .filter_map(|(source, answer)| Some((source, answer?)))
    }
}

impl Source {
    pub fn name(self) -> &'static str {
        match self {
            Source::Kubernetes => "kubernetes",
            Source::File => "file",
            Source::Route => "route",
            Source::Fdb => "fdb",
        }
    }

    /// By what, for people.
    pub fn sentence(self) -> &'static str {
        match self {
            Source::Kubernetes => "by the pod's status in Kubernetes",
            Source::File => "in the list of peers (ROUTER_PEERS)",
            Source::Route => "by the route through OVERLAY_IF",
            Source::Fdb => "by the forwarding entries of the overlay's bridge",
        }
    }
}

/// All sources.
pub struct Peers {
    pods: Pods,
    file: StaticPeers,
    netlink: rtnetlink::Handle,
}

impl Peers {
    pub fn load(file: Option<&Path>, pods: Pods, netlink: rtnetlink::Handle) -> Result<Peers, PeerError> {
        Ok(Peers { pods, file: file.map(StaticPeers::load).transpose()?.unwrap_or_default(), netlink })
    }

    /// What is known of the overlay address `of`.
    pub async fn facts(&self, of: IpAddr, interfaces: &Interfaces) -> Result<Facts, PeerError> {
        let fdb = match interfaces.overlay_bridge {
            Some(bridge) => bridged::host_of(&self.netlink, of, interfaces.overlay_index, bridge).await?,
            None => None,
        };
        Ok(Facts {
            kubernetes: self.pods.host_of(of),
            file: self.file.host_of(of),
            route: route::to(&self.netlink, of, interfaces.overlay_index).await?,
            fdb,
        })
    }

    pub fn pods(&self) -> &Pods {
        &self.pods
    }
}

/// A netlink socket, served by a task of its own.
pub fn netlink() -> Result<rtnetlink::Handle, PeerError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(PeerError::Netlink)?;
    tokio::spawn(connection);
    Ok(handle)
}

fn netlink_error(error: rtnetlink::Error) -> PeerError {
    PeerError::Netlink(std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = "192.0.2.1";

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn all() -> Facts {
        Facts {
            kubernetes: Some(address("192.0.2.2")),
            file: Some(address("192.0.2.3")),
            route: Route::Peer(address("10.244.2.0")),
            fdb: Some(address("192.0.2.5")),
        }
    }

    fn check(facts: Facts, expected: Whereabouts) {
        assert_eq!(facts.whereabouts(&[address(OWN)]), expected);
    }

    #[test]
    fn the_first_that_knows_is_believed() {
        let mut facts = all();
        check(facts, Whereabouts::Peer(address("192.0.2.2"), Source::Kubernetes));
        facts.kubernetes = None;
        check(facts, Whereabouts::Peer(address("192.0.2.3"), Source::File));
        facts.file = None;
        check(facts, Whereabouts::Peer(address("10.244.2.0"), Source::Route));
        facts.route = Route::NotOnOverlay;
        check(facts, Whereabouts::Peer(address("192.0.2.5"), Source::Fdb));
        facts.fdb = None;
        check(facts, Whereabouts::NotOnOverlay);
    }

    #[test]
    fn what_this_host_holds_is_no_peers() {
        check(Facts { kubernetes: Some(address(OWN)), ..all() }, Whereabouts::NotOnOverlay);
    }

    #[test]
    fn an_address_that_the_route_knows_as_a_hosts_is_one() {
        check(
            Facts { route: Route::Host, fdb: Some(address("192.0.2.5")), ..Facts::default() },
            Whereabouts::Host,
        );
    }

    #[test]
    fn a_peer_that_speaks_from_where_a_later_source_finds_it_is_followed() {
        let (by_kubernetes, by_route) = (address("192.0.2.2"), address("10.244.2.0"));
        assert_eq!(all().makes_way(by_kubernetes, by_route), Some(Source::Route));
        assert_eq!(all().makes_way(by_route, by_kubernetes), None);
        assert_eq!(all().makes_way(by_kubernetes, address("192.0.2.99")), None);
        let since_then = Facts { kubernetes: None, ..all() };
        assert_eq!(since_then.makes_way(by_kubernetes, by_route), Some(Source::Route));
    }
}
