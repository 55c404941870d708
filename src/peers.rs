// SPDX-License-Identifier: Apache-2.0
//! Which host holds an overlay address: what a static file says, then the kernel's route through OVERLAY_IF, whose
//! next hop is the address at which the peer's router can be reached.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        link::LinkAttribute,
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteType, RouteVia},
    },
};
use serde::Deserialize;

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: {source}; expected a list `peers` of entries with overlay (an address range) and host (an address)", path = path.display())]
    Malformed { path: PathBuf, source: serde_yaml::Error },
    #[error("routes cannot be asked for: {0}")]
    Netlink(std::io::Error),
    #[error("{variable}={name}: {reason}")]
    Interface { variable: &'static str, name: String, reason: String },
}

/// Where a peer's router listens (on ROUTER_PORT).
pub type PeerAddress = IpAddr;

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StaticPeers {
    peers: Vec<StaticPeer>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StaticPeer {
    overlay: IpNetwork,
    host: PeerAddress,
}

/// A peer, or why there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    Peer(PeerAddress),
    /// The address belongs to a host.
    Host,
    /// No route to it leads through OVERLAY_IF: it may be a container of this host.
    NotOnOverlay,
}

pub struct Peers {
    fixed: StaticPeers,
    netlink: rtnetlink::Handle,
    overlay_index: u32,
}

/// HOST_IF and OVERLAY_IF as the kernel knows them.
#[derive(Clone, Debug)]
pub struct Interfaces {
    pub overlay_index: u32,
    /// HOST_IF's IPv4 address.
    pub host_address: IpAddr,
    /// All addresses of this host, on any interface.
    pub addresses: Vec<IpAddr>,
}

/// A netlink socket, served by a task of its own.
pub fn netlink() -> Result<rtnetlink::Handle, PeerError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(PeerError::Netlink)?;
    tokio::spawn(connection);
    Ok(handle)
}

impl Interfaces {
    pub async fn find(
        netlink: &rtnetlink::Handle,
        overlay_if: &str,
        host_if: &str,
    ) -> Result<Interfaces, PeerError> {
        let overlay_index = index_of(netlink, "OVERLAY_IF", overlay_if).await?;
        let host_index = index_of(netlink, "HOST_IF", host_if).await?;
        let mut addresses = Vec::new();
        let mut host_address = None;
        let mut found = netlink.address().get().execute();
        while let Some(message) = found.try_next().await.map_err(netlink_error)? {
            for attribute in &message.attributes {
                let AddressAttribute::Address(address) = attribute else { continue };
                addresses.push(*address);
                if message.header.index == host_index && address.is_ipv4() {
                    host_address.get_or_insert(*address);
                }
            }
        }
        let host_address = host_address.ok_or_else(|| PeerError::Interface {
            variable: "HOST_IF",
            name: host_if.into(),
            reason: "has no IPv4 address; name the interface of the hosts' own network".into(),
        })?;
        Ok(Interfaces { overlay_index, host_address, addresses })
    }
}

impl Peers {
    pub fn load(
        fixed: Option<&Path>,
        netlink: rtnetlink::Handle,
        overlay_index: u32,
    ) -> Result<Peers, PeerError> {
        let fixed = match fixed {
            None => StaticPeers::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| PeerError::Unreadable { path: path.to_owned(), source })?;
                serde_yaml::from_str(&text)
                    .map_err(|source| PeerError::Malformed { path: path.to_owned(), source })?
            }
        };
        Ok(Peers { fixed, netlink, overlay_index })
    }

    /// Who holds the overlay address `of`.
    pub async fn find(&self, of: IpAddr) -> Result<Whereabouts, PeerError> {
        if let Some(peer) = self.fixed.peers.iter().find(|peer| peer.overlay.contains(of)) {
            return Ok(Whereabouts::Peer(peer.host));
        }
        let mut request = match of {
            IpAddr::V4(v4) => {
                RouteMessageBuilder::<std::net::Ipv4Addr>::new().destination_prefix(v4, 32).build()
            }
            IpAddr::V6(v6) => {
                RouteMessageBuilder::<std::net::Ipv6Addr>::new().destination_prefix(v6, 128).build()
            }
        };
        // What routes the kernel would take, not what tables hold: RTM_GETROUTE of one address.
        request.header.scope = rtnetlink::packet_route::route::RouteScope::Universe;
        let mut routes = self.netlink.route().get(request).execute();
        match routes.try_next().await {
            Ok(Some(route)) => Ok(whereabouts(&route, self.overlay_index, of)),
            // No route at all is an answer, too.
            Ok(None) => Ok(Whereabouts::NotOnOverlay),
            Err(rtnetlink::Error::NetlinkError(_)) => Ok(Whereabouts::NotOnOverlay),
            Err(error) => Err(netlink_error(error)),
        }
    }
}

fn whereabouts(route: &RouteMessage, overlay_index: u32, of: IpAddr) -> Whereabouts {
    if route.header.kind == RouteType::Local {
        return Whereabouts::Host;
    }
    let through = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(index) if *index == overlay_index);
    if !route.attributes.iter().any(through) {
        return Whereabouts::NotOnOverlay;
    }
    let next_hop = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Gateway(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        RouteAttribute::Via(RouteVia::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    });
    match next_hop {
        // The peer's own tunnel address.
        Some(next_hop) if next_hop == of => Whereabouts::Host,
        Some(next_hop) => Whereabouts::Peer(next_hop),
        None => Whereabouts::NotOnOverlay,
    }
}

async fn index_of(netlink: &rtnetlink::Handle, variable: &'static str, name: &str) -> Result<u32, PeerError> {
    let wrong = |reason: String| PeerError::Interface { variable, name: name.to_owned(), reason };
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => Ok(link.header.index),
        Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => {
            let mut all = netlink.link().get().execute();
            let mut names = Vec::new();
            while let Some(link) = all.try_next().await.map_err(netlink_error)? {
                names.extend(link.attributes.into_iter().filter_map(|attribute| match attribute {
                    LinkAttribute::IfName(name) => Some(name),
                    _ => None,
                }));
            }
            Err(wrong(format!("no such interface; this host has {}", names.join(", "))))
        }
        Err(error) => Err(netlink_error(error)),
    }
}

fn netlink_error(error: rtnetlink::Error) -> PeerError {
    PeerError::Netlink(std::io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rtnetlink::packet_route::AddressFamily;

    fn route(kind: RouteType, oif: u32, gateway: Option<&str>) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = AddressFamily::Inet;
        route.header.kind = kind;
        route.attributes.push(RouteAttribute::Oif(oif));
        if let Some(gateway) = gateway {
            route.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet(gateway.parse().unwrap())));
        }
        route
    }

    fn check(route: &RouteMessage, expected: Whereabouts) {
        assert_eq!(whereabouts(route, 7, "10.244.2.9".parse().unwrap()), expected);
    }

    #[test]
    fn the_next_hop_through_the_overlay_is_the_peer() {
        let peer = Whereabouts::Peer("10.244.2.0".parse().unwrap());
        check(&route(RouteType::Unicast, 7, Some("10.244.2.0")), peer);
    }

    #[test]
    fn a_route_through_another_interface_is_not_the_overlay() {
        check(&route(RouteType::Unicast, 3, Some("192.0.2.1")), Whereabouts::NotOnOverlay);
        check(&route(RouteType::Unicast, 7, None), Whereabouts::NotOnOverlay);
    }

    #[test]
    fn an_address_of_a_host_is_known_as_such() {
        check(&route(RouteType::Local, 1, None), Whereabouts::Host);
        check(&route(RouteType::Unicast, 7, Some("10.244.2.9")), Whereabouts::Host);
    }
}
