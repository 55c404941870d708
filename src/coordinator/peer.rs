// SPDX-License-Identifier: Apache-2.0
//! The hosts of other ends: how each was found, and what `router peers` shows of it.

use std::{
    collections::HashMap,
    net::IpAddr,
    os::fd::{AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

use forwarder_api::ConnId;
use nix::sys::socket::{SockaddrStorage, getpeername};
use serde::{Deserialize, Serialize};

use super::{
    Coordinator,
    flow::{Flow, Home},
    ledger::Event,
    wire::Tuple,
};
use crate::peers::{PeerAddress, Source};

/// One line of `router peers`, and one object of its JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerView {
    /// At which its router is spoken to.
    pub address: PeerAddress,
    /// Not known of a peer from before this router started.
    pub found_by: Option<Source>,
    pub reached: bool,
    /// How long it has been reached, or not.
    pub since_ms: u64,
    /// Where its host connections come and go, once there was one.
    pub host_address: Option<IpAddr>,
    /// Connections whose other end is there, and those of them on the host network.
    pub connections: usize,
    pub swapped: usize,
}

/// What is remembered of the peers beside the ledger.
#[derive(Debug, Default)]
pub struct Contacts {
    contacts: HashMap<PeerAddress, Contact>,
}

#[derive(Clone, Copy, Debug)]
struct Contact {
    reached: bool,
    since: Instant,
    host_address: Option<IpAddr>,
}

impl Contacts {
    /// Told again and again, it is the first time that counts.
    pub fn note(&mut self, peer: PeerAddress, reached: bool, now: Instant) {
        let contact = self.contact(peer, now);
        if contact.reached != reached {
            (contact.reached, contact.since) = (reached, now);
        }
    }

    pub fn note_host(&mut self, peer: PeerAddress, host_address: IpAddr, now: Instant) {
        self.contact(peer, now).host_address = Some(host_address);
    }

    fn contact(&mut self, peer: PeerAddress, now: Instant) -> &mut Contact {
        self.contacts.entry(peer).or_insert(Contact { reached: false, since: now, host_address: None })
    }
}

impl Coordinator {
    pub(super) fn peer_views(&self) -> Vec<PeerView> {
        let mut connections: HashMap<PeerAddress, (usize, usize)> = HashMap::new();
        for flow in self.ledger.flows() {
            if let Home::Peer(peer) = flow.home {
                let (all, swapped) = connections.entry(peer).or_default();
                *all += 1;
                *swapped += usize::from(flow.on_host().is_some());
            }
        }
        let view = |(address, reached): (&PeerAddress, &bool)| {
            let contact = self.contacts.contacts.get(address);
            let (connections, swapped) = connections.get(address).copied().unwrap_or_default();
            PeerView {
                address: *address,
                found_by: self.parts.lookup.source_of(*address),
                reached: *reached,
                since_ms: contact.map_or(Duration::ZERO, |contact| contact.since.elapsed()).as_millis()
                    as u64,
                host_address: contact.and_then(|contact| contact.host_address),
                connections,
                swapped,
            }
        };
        self.ledger.peers().iter().map(view).collect()
    }

    /// The follower sees where a host connection comes from; the decider is told where to connect to.
    pub(super) fn note_host_of(&mut self, conn: ConnId, socket: &OwnedFd) {
        let Some(peer) = self.ledger.peer_of(conn) else { return };
        let Ok(from) = getpeername::<SockaddrStorage>(socket.as_raw_fd()) else { return };
        let v4 = from.as_sockaddr_in().map(|from| IpAddr::V4(from.ip()));
        let v6 = from.as_sockaddr_in6().map(|from| IpAddr::V6(from.ip()).to_canonical());
        if let Some(address) = v4.or(v6) {
            self.contacts.note_host(peer, address, Instant::now());
        }
    }

    /// A peer tells of a connection. Where it speaks from another address of its host than the one at which we found it,
    /// because it has not heard as much as we have, that is where it is spoken to.
    pub(super) async fn make_way(&mut self, peer: PeerAddress, name: Tuple) {
        let named = self.ledger.named(name).and_then(|tuple| self.ledger.flow(tuple));
        let Some((tuple, Home::Peer(home))) = named.map(|flow| (flow.tuple, flow.home)) else { return };
        if home != peer && self.parts.lookup.makes_way(name.remote.ip(), home, peer).await {
            self.handle(Event::Relocated(tuple, peer)).await;
        }
    }

    /// The API server may tell of a pod after its first connections were seen.
    pub(super) async fn look_for_pods(&mut self) {
        if !self.parts.lookup.knows_more_pods() {
            return;
        }
        let waits = |flow: &&Flow| flow.lacks_a_peer();
        let of = |flow: &Flow| (flow.tuple, flow.ends().remote.ip());
        let waiting: Vec<(Tuple, IpAddr)> = self.ledger.flows().filter(waits).map(of).collect();
        for (tuple, pod) in waiting {
            if let Some(host) = self.parts.lookup.host_of_pod(pod) {
                self.handle(Event::Relocated(tuple, host)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_lost_since_the_first_time_that_it_was_not_reached() {
        let (peer, start) = ("192.0.2.2".parse().unwrap(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut contacts = Contacts::default();
        contacts.note(peer, true, at(0));
        contacts.note(peer, false, at(1));
        contacts.note(peer, false, at(2));
        assert_eq!(contacts.contacts[&peer].since, at(1));
    }
}
