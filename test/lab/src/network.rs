// SPDX-License-Identifier: Apache-2.0
//! Interfaces, addresses and routes, in the shape that Flannel gives a host: a bridge for the pods, a VXLAN device
//! with an address of its own, and a route to the other host's pods by that device's address there.
//!
//! Two cables join the hosts. One is the hosts' own network; the overlay, and with it what the routers say to each
//! other, runs over the second, so that either can fail alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;

use crate::{Host, Namespace, Place};

pub const OVERLAY_IF: &str = "overlay0";
pub const HOST_IF: &str = "eth0";
const UNDERLAY_IF: &str = "eth1";
pub const MTU: u32 = 1450;
/// The addresses of all pods.
pub const PODS: &str = "10.244.0.0/16";

pub fn host_address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, host)
}

pub fn underlay_address(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 78, host)
}

/// Address 0 is the tunnel's, 1 the bridge's; pods begin at 10.
pub fn overlay_v4(host: u8, index: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, host, index)
}

pub fn overlay_v6(host: u8, index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(host), 0, 0, 0, u16::from(index))
}

/// The address as a program must give it to get an IPv6 socket with mapped addresses.
pub fn mapped(address: Ipv4Addr) -> IpAddr {
    address.to_ipv6_mapped().into()
}

fn tunnel_mac(host: u8) -> String {
    format!("02:00:00:00:77:{host:02x}")
}

/// Wires the two hosts and raises the overlay.
pub fn connect(h1: &Host, h2: &Host) -> Result<()> {
    let peer = h2.place().network.path();
    for cable in [HOST_IF, UNDERLAY_IF] {
        ip(h1.place(), &format!("link add {cable} type veth peer name {cable} netns {peer}\n"))?;
    }
    for (host, other) in [(h1, h2), (h2, h1)] {
        raise(host.place(), host.index, other.index)?;
    }
    Ok(())
}

fn raise(place: &Place, n: u8, m: u8) -> Result<()> {
    let (host, underlay, peer) = (host_address(n), underlay_address(n), underlay_address(m));
    let (mac, peer_mac) = (tunnel_mac(n), tunnel_mac(m));
    // An address of its own: that of a port would change when pods come and go, and pods remember it.
    let bridge_mac = format!("02:00:00:00:99:{n:02x}");
    let (bridge4, bridge6) = (overlay_v4(n, 1), overlay_v6(n, 1));
    let (tunnel4, tunnel6) = (overlay_v4(n, 0), overlay_v6(n, 0));
    let (gate4, gate6) = (overlay_v4(m, 0), overlay_v6(m, 0));
    settle_addresses_at_once(place)?;
    place.run_script(
        &["sh", "-e"],
        "echo 1 >/proc/sys/net/ipv4/ip_forward\necho 1 >/proc/sys/net/ipv6/conf/all/forwarding\n",
    )?;
    ip(
        place,
        &format!(
            "link set lo up\n\
             addr add {host}/24 dev {HOST_IF}\n\
             link set {HOST_IF} up\n\
             addr add {underlay}/24 dev {UNDERLAY_IF}\n\
             link set {UNDERLAY_IF} up\n\
             link add cni0 address {bridge_mac} type bridge\n\
             link set cni0 mtu {MTU} up\n\
             addr add {bridge4}/24 dev cni0\n\
             addr add {bridge6}/64 dev cni0 nodad\n\
             link add {OVERLAY_IF} address {mac} type vxlan id 1 dstport 4789 local {underlay} dev {UNDERLAY_IF} nolearning\n\
             link set {OVERLAY_IF} mtu {MTU} up\n\
             addr add {tunnel4}/32 dev {OVERLAY_IF}\n\
             addr add {tunnel6}/128 dev {OVERLAY_IF} nodad\n\
             neigh add {gate4} lladdr {peer_mac} dev {OVERLAY_IF} nud permanent\n\
             neigh add {gate6} lladdr {peer_mac} dev {OVERLAY_IF} nud permanent\n\
             route add {gate4}/24 via {gate4} dev {OVERLAY_IF} onlink\n\
             route add {gate6}/64 via {gate6} dev {OVERLAY_IF} onlink\n"
        ),
    )?;
    place.run_script(
        &["bridge", "-batch", "-"],
        &format!("fdb add {peer_mac} dev {OVERLAY_IF} dst {peer} self permanent\n"),
    )
}

/// Plugs a pod's namespace into its host's bridge.
pub fn plug(host: &Place, host_index: u8, pod: &Place, pod_index: u8) -> Result<()> {
    settle_addresses_at_once(pod)?;
    let netns = Namespace::path(&pod.network);
    let cable = format!("veth{pod_index}");
    ip(
        host,
        &format!(
            "link add {cable} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {netns}\n\
             link set {cable} master cni0 up\n"
        ),
    )?;
    let (v4, v6) = (overlay_v4(host_index, pod_index), overlay_v6(host_index, pod_index));
    let (gate4, gate6) = (overlay_v4(host_index, 1), overlay_v6(host_index, 1));
    ip(
        pod,
        &format!(
            "link set lo up\n\
             link set eth0 up\n\
             addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             route add default via {gate4}\n\
             route add default via {gate6}\n"
        ),
    )
}

/// Without this, an interface's link-local address is tentative for up to 2 s. A host asks for its pods from that
/// address: the first packets to a pod wait as long, or are refused (EHOSTUNREACH) after three questions not asked.
fn settle_addresses_at_once(place: &Place) -> Result<()> {
    place.run_script(&["sh", "-e"], "echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad\n")
}

pub(crate) fn ip(place: &Place, lines: &str) -> Result<()> {
    place.run_script(&["ip", "-batch", "-"], lines)
}

/// The last number of the address of a host's first, second, ... pod.
pub fn plug_number(pod: u8) -> u8 {
    9 + pod
}
