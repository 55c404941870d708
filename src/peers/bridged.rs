// SPDX-License-Identifier: Apache-2.0
//! An overlay that is one bridged segment: the neighbour entry of an overlay address has its MAC address,
//! the VXLAN device's forwarding entry (FDB) of that has the peer's underlay address. Only what this network namespace
//! shows is found. Docker's overlay is such a segment, but in a namespace of its own, made when a network's first container
//! comes to this host: to enter it, or to open a netlink socket there, is for CAP_SYS_ADMIN, which this program does not have.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::{
    AddressFamily,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
};

use super::{PeerAddress, PeerError, netlink_error};

type Mac = Vec<u8>;

/// An entry of the neighbour table, or of a bridge's or VXLAN device's forwarding table, where `address` is the remote
/// underlay address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub interface: u32,
    pub address: Option<IpAddr>,
    pub mac: Option<Mac>,
}

pub async fn host_of(
    netlink: &rtnetlink::Handle,
    of: IpAddr,
    overlay_index: u32,
    bridge: u32,
) -> Result<Option<PeerAddress>, PeerError> {
    let family = if of.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let neighbours = dump(netlink, family).await?;
    let Some(mac) = mac_of(&neighbours, of, [overlay_index, bridge]) else { return Ok(None) };
    Ok(destination(&forwarding(netlink).await?, mac, overlay_index))
}

/// The forwarding entries of all bridges and VXLAN devices.
pub async fn forwarding(netlink: &rtnetlink::Handle) -> Result<Vec<Entry>, PeerError> {
    dump(netlink, AddressFamily::Bridge).await
}

async fn dump(netlink: &rtnetlink::Handle, family: AddressFamily) -> Result<Vec<Entry>, PeerError> {
    let mut found = netlink.neighbours().get().set_address_family(family).execute();
    let mut entries = Vec::new();
    while let Some(message) = found.try_next().await.map_err(netlink_error)? {
        entries.push(entry(message));
    }
    Ok(entries)
}

fn entry(message: NeighbourMessage) -> Entry {
    let mut entry = Entry { interface: message.header.ifindex, address: None, mac: None };
    for attribute in message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(mac) => entry.mac = Some(mac),
            NeighbourAttribute::Destination(address) => entry.address = ip(address),
            _ => {}
        }
    }
    entry
}

fn ip(address: NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(v4) => Some(v4.into()),
        NeighbourAddress::Inet6(v6) => Some(v6.into()),
        // In an entry of family AF_BRIDGE.
        NeighbourAddress::Other(bytes) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|v4| Ipv4Addr::from(v4).into());
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(|v6| Ipv6Addr::from(v6).into())).ok()
        }
        _ => None,
    }
}

fn mac_of(neighbours: &[Entry], of: IpAddr, interfaces: [u32; 2]) -> Option<&Mac> {
    let is_it = |entry: &&Entry| interfaces.contains(&entry.interface) && entry.address == Some(of);
    neighbours.iter().filter(is_it).find_map(|entry| entry.mac.as_ref())
}

fn destination(forwarding: &[Entry], mac: &Mac, overlay_index: u32) -> Option<PeerAddress> {
    let is_it = |entry: &&Entry| entry.interface == overlay_index && entry.mac.as_ref() == Some(mac);
    forwarding.iter().filter(is_it).find_map(|entry| entry.address)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OVERLAY: u32 = 7;
    const BRIDGE: u32 = 8;

    fn entry(interface: u32, address: Option<&str>, mac: u8) -> Entry {
        Entry {
            interface,
            address: address.map(|text| text.parse().unwrap()),
            mac: Some(vec![2, 0, 0, 0, 0, mac]),
        }
    }

    fn check(neighbours: &[Entry], forwarding: &[Entry], expected: Option<&str>) {
        let mac = mac_of(neighbours, "10.0.0.9".parse().unwrap(), [OVERLAY, BRIDGE]);
        let found = mac.and_then(|mac| destination(forwarding, mac, OVERLAY));
        assert_eq!(found, expected.map(|text| text.parse().unwrap()));
    }

    #[test]
    fn the_forwarding_entry_of_a_neighbours_mac_address_names_its_host() {
        let forwarding = [entry(OVERLAY, Some("192.0.2.3"), 3), entry(OVERLAY, Some("192.0.2.2"), 9)];
        for interface in [OVERLAY, BRIDGE] {
            check(&[entry(interface, Some("10.0.0.9"), 9)], &forwarding, Some("192.0.2.2"));
        }
    }

    #[test]
    fn a_neighbour_behind_a_port_of_the_bridge_is_on_this_host() {
        check(&[entry(BRIDGE, Some("10.0.0.9"), 9)], &[entry(12, None, 9)], None);
    }

    #[test]
    fn a_neighbour_of_another_interface_tells_nothing() {
        check(&[entry(3, Some("10.0.0.9"), 9)], &[entry(OVERLAY, Some("192.0.2.2"), 9)], None);
    }
}
