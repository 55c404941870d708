// SPDX-License-Identifier: Apache-2.0
//! Is the overlay encrypted? Then a connection between the hosts would carry in the clear what the cluster's owner wants
//! hidden, and the router does not start unless it is told to bypass that.
//!
//! Looked for: interfaces that encrypt (WireGuard, IPsec by an xfrm interface, MACsec), as the overlay itself, below it, or
//! made by a CNI beside it. IPsec by policies alone has no interface and is not seen.

use clap::Args;
use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

#[derive(Args, Clone, Debug)]
pub struct EncryptionSettings {
    /// Move connections off an overlay that is encrypted (WireGuard), too: between the hosts they are in the clear.
    #[arg(long, env = "ROUTER_BYPASS_ENCRYPTION", num_args = 0..=1, default_missing_value = "true",
          default_value = "false", value_name = "true|false", action = clap::ArgAction::Set)]
    pub bypass_encryption: bool,
}

/// What CNIs call theirs: they encrypt what goes between pods, beside whatever overlay there is.
const OF_CNIS: [(&str, &str); 5] = [
    ("wireguard.cali", "Calico"),
    ("wg-v6.cali", "Calico"),
    ("cilium_wg0", "Cilium"),
    ("flannel-wg", "Flannel"),
    ("flannel-wg-v6", "Flannel"),
];

/// An interface of this host, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    pub index: u32,
    pub name: String,
    /// What it encrypts with.
    pub cipher: Option<&'static str>,
    /// The interface below it.
    pub lower: Option<u32>,
}

pub async fn interfaces(netlink: &rtnetlink::Handle) -> Result<Vec<Interface>, rtnetlink::Error> {
    netlink.link().get().execute().map_ok(|link| interface(&link)).try_collect().await
}

/// What encrypts the traffic between pods: a sentence, or `None`. Where the hosts' own network is encrypted in the same
/// way, a connection on it is not in the clear.
pub fn encrypted_by(interfaces: &[Interface], overlay_if: &str, host_if: &str) -> Option<String> {
    let named = |name: &str| interfaces.iter().find(|interface| interface.name == name);
    if named(host_if).is_some_and(|host| host.cipher.is_some()) {
        return None;
    }
    let overlay = named(overlay_if);
    let below = overlay
        .and_then(|overlay| overlay.lower)
        .and_then(|lower| interfaces.iter().find(|interface| interface.index == lower));
    if let Some((interface, cipher)) =
        [overlay, below].into_iter().flatten().find_map(|found| Some((found, found.cipher?)))
    {
        return Some(format!("{} encrypts with {cipher}", interface.name));
    }
    let (name, cni) = OF_CNIS.into_iter().find(|(name, _)| named(name).is_some())?;
    Some(format!("{name} is there: {cni} encrypts with WireGuard"))
}

fn interface(link: &LinkMessage) -> Interface {
    let mut found = Interface { index: link.header.index, ..Interface::default() };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Link(lower) => found.lower = Some(*lower),
            LinkAttribute::LinkInfo(infos) => {
                found.cipher = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Wireguard) => Some("WireGuard"),
                    LinkInfo::Kind(InfoKind::Xfrm) => Some("IPsec"),
                    LinkInfo::Kind(InfoKind::MacSec) => Some("MACsec"),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain(index: u32, name: &str) -> Interface {
        Interface { index, name: name.into(), ..Interface::default() }
    }

    fn wireguard(index: u32, name: &str) -> Interface {
        Interface { cipher: Some("WireGuard"), ..plain(index, name) }
    }

    fn check(interfaces: &[Interface], expected: Option<&str>) {
        let found = encrypted_by(interfaces, "overlay", "eth0");
        match expected {
            Some(words) => assert!(found.as_deref().is_some_and(|found| found.contains(words)), "{found:?}"),
            None => assert_eq!(found, None),
        }
    }

    #[test]
    fn an_overlay_of_wireguard_is_encrypted() {
        check(&[plain(1, "eth0"), wireguard(2, "overlay")], Some("overlay encrypts with WireGuard"));
    }

    #[test]
    fn a_vxlan_over_wireguard_is_encrypted() {
        let overlay = Interface { lower: Some(2), ..plain(3, "overlay") };
        check(&[plain(1, "eth0"), wireguard(2, "wg0"), overlay], Some("wg0 encrypts"));
    }

    #[test]
    fn a_cni_that_encrypts_beside_its_overlay_is_noticed() {
        check(&[plain(1, "eth0"), plain(2, "overlay"), wireguard(3, "wireguard.cali")], Some("Calico"));
        check(&[plain(1, "eth0"), plain(2, "overlay"), wireguard(3, "cilium_wg0")], Some("Cilium"));
    }

    #[test]
    fn a_tunnel_of_the_host_to_elsewhere_does_not_matter() {
        check(&[plain(1, "eth0"), plain(2, "overlay"), wireguard(3, "wg0")], None);
    }

    #[test]
    fn where_the_hosts_network_is_encrypted_too_nothing_is_lost() {
        check(&[wireguard(1, "eth0"), wireguard(2, "overlay")], None);
    }

    #[test]
    fn the_kind_of_an_interface_tells_what_it_encrypts_with() {
        let mut link = LinkMessage::default();
        link.header.index = 7;
        link.attributes = vec![
            LinkAttribute::IfName("wg0".into()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
        ];
        assert_eq!(interface(&link), wireguard(7, "wg0"));
    }
}
