// SPDX-License-Identifier: Apache-2.0
//! The kernel's route to an overlay address: through OVERLAY_IF, its next hop is an address of the peer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::{
    RouteMessageBuilder,
    packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType, RouteVia},
};

use super::{PeerError, Route, netlink_error};

/// What routes the kernel would take, not what tables hold: RTM_GETROUTE of one address.
pub async fn to(netlink: &rtnetlink::Handle, of: IpAddr, overlay_index: u32) -> Result<Route, PeerError> {
    let mut request = match of {
        IpAddr::V4(v4) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4, 32).build(),
        IpAddr::V6(v6) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6, 128).build(),
    };
    request.header.scope = RouteScope::Universe;
    let mut routes = netlink.route().get(request).execute();
    match routes.try_next().await {
        Ok(Some(route)) => Ok(meaning(&route, overlay_index)),
        // No route at all is an answer, too.
        Ok(None) | Err(rtnetlink::Error::NetlinkError(_)) => Ok(Route::NotOnOverlay),
        Err(error) => Err(netlink_error(error)),
    }
}

fn meaning(route: &RouteMessage, overlay_index: u32) -> Route {
    if route.header.kind == RouteType::Local {
        return Route::Host;
    }
    if !route.attributes.contains(&RouteAttribute::Oif(overlay_index)) {
        return Route::NotOnOverlay;
    }
    match next_hop(route) {
        // Also where it is the peer's own tunnel address: containers there that are masqueraded have it.
        Some(next_hop) => Route::Peer(next_hop),
        None => Route::NotOnOverlay,
    }
}

pub fn next_hop(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Gateway(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        RouteAttribute::Via(RouteVia::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })
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

    fn check(route: &RouteMessage, expected: Route) {
        assert_eq!(meaning(route, 7), expected);
    }

    #[test]
    fn the_next_hop_through_the_overlay_is_the_peer() {
        let peer = Route::Peer("10.244.2.0".parse().unwrap());
        check(&route(RouteType::Unicast, 7, Some("10.244.2.0")), peer);
    }

    #[test]
    fn a_route_through_another_interface_is_not_the_overlay() {
        check(&route(RouteType::Unicast, 3, Some("192.0.2.1")), Route::NotOnOverlay);
        check(&route(RouteType::Unicast, 7, None), Route::NotOnOverlay);
    }

    #[test]
    fn an_address_of_this_host_is_known_as_such() {
        check(&route(RouteType::Local, 1, None), Route::Host);
    }
}
