// SPDX-License-Identifier: Apache-2.0
//! HOST_IF and OVERLAY_IF: as given, or found. [`look`] asks the kernel, [`overlay`] and [`host`] decide.

use std::{collections::BTreeMap, net::IpAddr};

use futures_util::TryStreamExt;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoIpTunnel, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage},
        route::{RouteAttribute, RouteMessage, RouteType},
    },
};

use super::{PeerError, bridged, netlink_error, route};

/// HOST_IF and OVERLAY_IF as the kernel knows them.
#[derive(Clone, Debug)]
pub struct Interfaces {
    pub overlay_if: String,
    pub host_if: String,
    pub overlay_index: u32,
    /// The bridge that OVERLAY_IF is a port of.
    pub overlay_bridge: Option<u32>,
    /// HOST_IF's IPv4 address.
    pub host_address: IpAddr,
    /// All addresses of this host, on any interface.
    pub addresses: Vec<IpAddr>,
    /// What was found, and how, in words.
    pub found: String,
}

/// An interface, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Link {
    index: u32,
    name: String,
    tunnel: Option<&'static str>,
    /// Of a tunnel: the address, or the interface, that it sends from.
    local: Option<IpAddr>,
    parent: Option<u32>,
    bridge: Option<u32>,
    addresses: Vec<IpAddr>,
}

/// The network of this host.
#[derive(Clone, Debug, Default)]
struct Network {
    links: Vec<Link>,
    /// By interface: routes with a next hop, the default route left out; and forwarding entries to other hosts.
    next_hops: BTreeMap<u32, usize>,
    forwarding: BTreeMap<u32, usize>,
    /// Interface and metric.
    default_routes: Vec<(u32, u32)>,
}

impl Interfaces {
    /// An empty name means: find it.
    pub async fn find(
        netlink: &rtnetlink::Handle,
        overlay_if: &str,
        host_if: &str,
    ) -> Result<Interfaces, PeerError> {
        let network = look(netlink, overlay_if.is_empty() || host_if.is_empty()).await?;
        let (overlay, how_overlay) = overlay(&network, overlay_if)?;
        let (host, how_host) = host(&network, host_if, overlay)?;
        let host_address = address_of(host, overlay)?;
        let found =
            format!("{} ({how_overlay}) and {} with {host_address} ({how_host})", overlay.name, host.name);
        Ok(Interfaces {
            overlay_if: overlay.name.clone(),
            host_if: host.name.clone(),
            overlay_index: overlay.index,
            overlay_bridge: overlay.bridge,
            host_address,
            addresses: network.links.iter().flat_map(|link| link.addresses.iter().copied()).collect(),
            found,
        })
    }
}

/// Where swapped connections come and go.
fn address_of(host: &Link, overlay: &Link) -> Result<IpAddr, PeerError> {
    let wrong = |what: &str| PeerError::Interface {
        variable: "HOST_IF",
        name: host.name.clone(),
        reason: format!("{what}; name the interface of the hosts' own network"),
    };
    if host.index == overlay.index {
        return Err(wrong("is the overlay's own interface"));
    }
    match ipv4(host) {
        None => Err(wrong("has no IPv4 address")),
        Some(address) if address.is_loopback() => Err(wrong("leads to no other host")),
        Some(address) => Ok(address),
    }
}

fn ipv4(link: &Link) -> Option<IpAddr> {
    link.addresses.iter().copied().find(IpAddr::is_ipv4)
}

/// The overlay interface, and how it was found.
fn overlay<'a>(network: &'a Network, given: &str) -> Result<(&'a Link, String), PeerError> {
    if !given.is_empty() {
        return network.named("OVERLAY_IF", given).map(|link| (link, "given".into()));
    }
    let count = |of: &BTreeMap<u32, usize>, link: &Link| of.get(&link.index).copied().unwrap_or(0);
    let candidates: Vec<(&Link, String)> = network
        .links
        .iter()
        .filter_map(|link| {
            let (kind, hops) = (link.tunnel?, count(&network.next_hops, link));
            let entries = if link.bridge.is_some() { count(&network.forwarding, link) } else { 0 };
            let how = match (hops, entries) {
                (0, 0) => return None,
                (0, entries) => format!("{kind} in a bridge, forwarding entries to other hosts: {entries}"),
                (hops, _) => format!("{kind}, routes with a next hop: {hops}"),
            };
            Some((link, how))
        })
        .collect();
    let none = "no VXLAN or IPIP interface has routes with a next hop, or forwarding entries in a bridge";
    only(candidates, "OVERLAY_IF", none, "flannel.1, vxlan.calico, tunl0")
}

/// The hosts' own interface, and how it was found.
fn host<'a>(network: &'a Network, given: &str, overlay: &Link) -> Result<(&'a Link, String), PeerError> {
    if !given.is_empty() {
        return network.named("HOST_IF", given).map(|link| (link, "given".into()));
    }
    let carries = |link: &&Link| {
        let has_local = overlay.local.is_some_and(|local| link.addresses.contains(&local));
        has_local || (overlay.local.is_none() && overlay.parent == Some(link.index))
    };
    if let Some(link) = network.links.iter().find(|link| carries(link) && ipv4(link).is_some()) {
        return Ok((link, format!("found: carries the tunnel of {}", overlay.name)));
    }
    let least = network.default_routes.iter().map(|(_, metric)| *metric).min();
    let is_default = |link: &Link| {
        network.default_routes.iter().any(|(index, metric)| *index == link.index && Some(*metric) == least)
    };
    let of_default = network.links.iter().filter(|link| is_default(link));
    let candidates = of_default.map(|link| (link, "has the default route".to_owned())).collect();
    let none = "no interface carries the tunnel of OVERLAY_IF or has a default route";
    only(candidates, "HOST_IF", none, "eth0, ens5")
}

fn only<'a>(
    mut candidates: Vec<(&'a Link, String)>,
    variable: &'static str,
    none: &str,
    example: &'static str,
) -> Result<(&'a Link, String), PeerError> {
    if candidates.len() == 1
        && let Some((link, how)) = candidates.pop()
    {
        return Ok((link, format!("found: {how}")));
    }
    let names: Vec<String> = candidates.iter().map(|(link, how)| format!("{} ({how})", link.name)).collect();
    let reason = match names.len() {
        0 => none.to_owned(),
        _ => format!("more than one could be it: {}", names.join(", ")),
    };
    Err(PeerError::NotFound { variable, reason, example })
}

impl Network {
    fn named(&self, variable: &'static str, name: &str) -> Result<&Link, PeerError> {
        self.links.iter().find(|link| link.name == name).ok_or_else(|| {
            let names: Vec<&str> = self.links.iter().map(|link| link.name.as_str()).collect();
            let reason = format!("no such interface; this host has {}", names.join(", "));
            PeerError::Interface { variable, name: name.to_owned(), reason }
        })
    }

    fn add_route(&mut self, route: &RouteMessage) {
        let mut interface = None;
        let mut metric = 0;
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Oif(index) => interface = Some(*index),
                RouteAttribute::Priority(priority) => metric = *priority,
                _ => {}
            }
        }
        let Some(interface) = interface.filter(|_| route.header.kind == RouteType::Unicast) else { return };
        if route.header.destination_prefix_length == 0 {
            self.default_routes.push((interface, metric));
        } else if route::next_hop(route).is_some() {
            *self.next_hops.entry(interface).or_default() += 1;
        }
    }
}

/// `all`: routes and forwarding entries too, which only the search needs.
async fn look(netlink: &rtnetlink::Handle, all: bool) -> Result<Network, PeerError> {
    let mut network = Network::default();
    let mut links = netlink.link().get().execute();
    while let Some(message) = links.try_next().await.map_err(netlink_error)? {
        network.links.push(link(message));
    }
    let mut addresses = netlink.address().get().execute();
    while let Some(message) = addresses.try_next().await.map_err(netlink_error)? {
        let mut links = network.links.iter_mut();
        let Some(link) = links.find(|link| link.index == message.header.index) else { continue };
        link.addresses.extend(message.attributes.iter().filter_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        }));
    }
    if all {
        let mut routes =
            netlink.route().get(RouteMessageBuilder::<std::net::Ipv4Addr>::new().build()).execute();
        while let Some(message) = routes.try_next().await.map_err(netlink_error)? {
            network.add_route(&message);
        }
        for entry in bridged::forwarding(netlink).await? {
            if entry.address.is_some() {
                *network.forwarding.entry(entry.interface).or_default() += 1;
            }
        }
    }
    Ok(network)
}

fn link(message: LinkMessage) -> Link {
    let mut link = Link { index: message.header.index, ..Link::default() };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Controller(bridge) => link.bridge = Some(bridge),
            LinkAttribute::LinkInfo(infos) => infos.into_iter().for_each(|info| link.learn(info)),
            _ => {}
        }
    }
    link
}

impl Link {
    fn learn(&mut self, info: LinkInfo) {
        match info {
            LinkInfo::Kind(InfoKind::Vxlan) => self.tunnel = Some("vxlan"),
            LinkInfo::Kind(InfoKind::IpIp) => self.tunnel = Some("ipip"),
            LinkInfo::Data(InfoData::Vxlan(data)) => {
                for datum in data {
                    match datum {
                        InfoVxlan::Local(v4) => self.local = Some(v4.into()),
                        InfoVxlan::Local6(v6) => self.local = Some(v6.into()),
                        InfoVxlan::Link(parent) => self.parent = Some(parent),
                        _ => {}
                    }
                }
            }
            LinkInfo::Data(InfoData::IpTunnel(data)) => {
                for datum in data {
                    match datum {
                        InfoIpTunnel::Local(local) => self.local = Some(local),
                        InfoIpTunnel::Link(parent) => self.parent = Some(parent),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
        // An address of zeroes is any, as interface 0 is none.
        self.local = self.local.filter(|local| !local.is_unspecified());
        self.parent = self.parent.filter(|parent| *parent != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
        Link { index, name: name.into(), addresses, ..Link::default() }
    }

    fn tunnel(index: u32, name: &str, kind: &'static str) -> Link {
        Link { tunnel: Some(kind), ..link(index, name, &[]) }
    }

    /// Flannel's host: tunl0 is there because its module is loaded, and does nothing.
    fn flannel() -> Network {
        let flannel = Link { local: Some("192.0.2.1".parse().unwrap()), ..tunnel(3, "flannel.1", "vxlan") };
        Network {
            links: vec![
                link(1, "lo", &["127.0.0.1"]),
                link(2, "eth0", &["192.0.2.1"]),
                flannel,
                tunnel(4, "tunl0", "ipip"),
                link(5, "eth1", &["198.51.100.1"]),
            ],
            next_hops: [(3, 2)].into(),
            default_routes: vec![(5, 100)],
            ..Network::default()
        }
    }

    fn check(network: &Network, overlay_if: &str, host_if: &str, expected: (&str, &str)) {
        let overlay = overlay(network, overlay_if).unwrap().0;
        let host = host(network, host_if, overlay).unwrap().0;
        assert_eq!((overlay.name.as_str(), host.name.as_str()), expected);
    }

    #[test]
    fn swapped_connections_need_an_address_that_leads_to_other_hosts() {
        let network = flannel();
        let [lo, eth0, overlay, tunl0] = [0, 1, 2, 3].map(|index| &network.links[index]);
        assert_eq!(address_of(eth0, overlay).ok(), Some("192.0.2.1".parse().unwrap()));
        for (wrong, reason) in [(lo, "other host"), (overlay, "overlay's own"), (tunl0, "no IPv4 address")] {
            let error = address_of(wrong, overlay).unwrap_err().to_string();
            assert!(error.contains(&wrong.name) && error.contains(reason), "{error}");
        }
    }

    #[test]
    fn what_is_given_is_taken() {
        check(&flannel(), "tunl0", "eth1", ("tunl0", "eth1"));
    }

    #[test]
    fn a_tunnel_with_routes_and_the_interface_that_carries_it_are_found() {
        check(&flannel(), "", "", ("flannel.1", "eth0"));
    }

    #[test]
    fn a_tunnel_that_says_nothing_is_carried_by_the_interface_of_the_default_route() {
        let mut network = flannel();
        network.next_hops = [(4, 2)].into();
        network.default_routes = vec![(2, 200), (5, 100)];
        check(&network, "", "", ("tunl0", "eth1"));
    }

    #[test]
    fn a_vxlan_device_in_a_bridge_is_known_by_its_forwarding_entries() {
        let mut network = flannel();
        network.next_hops.clear();
        network.forwarding = [(3, 1)].into();
        assert!(overlay(&network, "").is_err());
        network.links[2].bridge = Some(9);
        check(&network, "", "", ("flannel.1", "eth0"));
    }

    #[test]
    fn candidates_of_which_none_is_better_are_all_named() {
        let mut network = flannel();
        network.next_hops = [(3, 2), (4, 1)].into();
        let error = overlay(&network, "").unwrap_err().to_string();
        for words in [
            "OVERLAY_IF is not set",
            "flannel.1 (vxlan, routes with a next hop: 2",
            "tunl0 (ipip,",
            "give the name",
        ] {
            assert!(error.contains(words), "{error}");
        }
        network.default_routes = vec![(2, 0), (5, 0)];
        let error = host(&network, "", &network.links[3]).unwrap_err().to_string();
        assert!(error.contains("eth0") && error.contains("eth1"), "{error}");
    }

    #[test]
    fn a_host_without_an_overlay_is_told_what_was_looked_for() {
        let error = overlay(&Network::default(), "").unwrap_err().to_string();
        assert!(error.contains("no VXLAN or IPIP interface"), "{error}");
    }
}
