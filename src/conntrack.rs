// SPDX-License-Identifier: Apache-2.0
//! What this host's address translation (kube-proxy's, masquerade) makes of a connection, as the connection tracking of the
//! router's own network namespace knows it: the default zone, by ctnetlink.
//!
//! Each question is answered by the kernel before it has been sent, so that nobody waits.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
};

use netlink_packet_core::{
    DecodeError, NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
    conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple as TuplePart},
};
use netlink_sys::{Socket, protocols::NETLINK_NETFILTER};
use nix::libc;

use crate::{coordinator::wire::Tuple, endpoint::Endpoint};

/// What an entry lives for once it is kept, if no packet comes: what the kernel gives one that is established.
const KEPT_S: u32 = 5 * 24 * 3600;
/// An entry takes a tenth of it.
const MAX_ANSWER: usize = 8192;

#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    #[error("connection tracking cannot be asked over netlink: {0}")]
    Netlink(#[from] io::Error),
    #[error("connection tracking gave an answer that cannot be decoded: {0}")]
    Malformed(#[from] DecodeError),
}

/// One direction of a tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Direction {
    source: Endpoint,
    destination: Endpoint,
}

/// A tracked connection: what its first packet had, and what the answers to it have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    original: Direction,
    reply: Direction,
}

impl Entry {
    /// The connection of the socket with `own` addresses, beyond the translation: as the next host has it, seen from this
    /// end. None: nothing is translated.
    fn beyond(&self, own: Tuple) -> Option<Tuple> {
        let sent = Direction { source: own.local, destination: own.remote };
        let received = match sent {
            sent if sent == self.original => self.reply,
            sent if sent == self.reply => self.original,
            _ => return None,
        };
        let beyond = Tuple { local: received.destination, remote: received.source };
        (beyond != own).then_some(beyond)
    }
}

/// A netlink socket.
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
}

impl Conntrack {
    /// One that answers.
    pub fn open() -> Result<Conntrack, ConntrackError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        // From now on only the kernel can write to it.
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        let mut conntrack = Conntrack { socket, sequence: 0 };
        let nobody = Endpoint::new(Ipv4Addr::UNSPECIFIED.into(), 0);
        conntrack.translation(Tuple { local: nobody, remote: nobody })?;
        Ok(conntrack)
    }

    /// The connection of a socket with these addresses beyond this host's translation, seen from this end. None: nothing is
    /// translated, or known.
    pub fn translation(&mut self, own: Tuple) -> Result<Option<Tuple>, ConntrackError> {
        let asked = ConntrackMessage::Get(vec![attribute(own)]);
        let Some(attributes) = self.ask(own, asked, NLM_F_REQUEST)? else { return Ok(None) };
        Ok(entry(&attributes).and_then(|entry| entry.beyond(own)))
    }

    /// Let the entry live on although no packet comes. False: there is none.
    pub fn keep(&mut self, own: Tuple) -> Result<bool, ConntrackError> {
        let changed = vec![attribute(own), ConntrackAttribute::CtaTimeout(KEPT_S)];
        // No NLM_F_CREATE: only one that is there is changed.
        let answer = self.ask(own, ConntrackMessage::New(changed), NLM_F_REQUEST | NLM_F_ACK)?;
        Ok(answer.is_some())
    }

    /// The attributes of the entry, none after a mere acknowledgement; `None` if there is no such entry.
    fn ask(
        &mut self,
        own: Tuple,
        message: ConntrackMessage,
        flags: u16,
    ) -> Result<Option<Vec<ConntrackAttribute>>, ConntrackError> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request(own, message, flags, self.sequence), 0)?;
        let mut answer = [0; MAX_ANSWER];
        loop {
            let length = self.socket.recv(&mut &mut answer[..], 0)?;
            let answer = NetlinkMessage::<NetfilterMessage>::deserialize(&answer[..length])?;
            // One that came too late for an earlier question, if there can be such.
            if answer.header.sequence_number != self.sequence {
                continue;
            }
            return match answer.payload {
                NetlinkPayload::InnerMessage(NetfilterMessage {
                    inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                    ..
                }) => Ok(Some(attributes)),
                NetlinkPayload::Error(error) => match error.code {
                    None => Ok(Some(vec![])),
                    Some(code) if code.get() == -libc::ENOENT => Ok(None),
                    Some(_) => Err(error.to_io().into()),
                },
                _ => Err(DecodeError::from("neither an entry nor an error").into()),
            };
        }
    }
}

fn request(own: Tuple, message: ConntrackMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let family = match own.local.ip() {
        IpAddr::V4(_) => NetfilterProtoFamily::IPv4,
        IpAddr::V6(_) => NetfilterProtoFamily::IPv6,
    };
    let mut header = NetlinkHeader::default();
    (header.flags, header.sequence_number) = (flags, sequence);
    let message = NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

/// What a socket with these addresses sends. It names an entry, in whichever of its directions.
fn attribute(own: Tuple) -> ConntrackAttribute {
    let addresses =
        vec![IPTuple::SourceAddress(own.local.ip()), IPTuple::DestinationAddress(own.remote.ip())];
    let ports = vec![
        ProtoTuple::Protocol(Protocol::Tcp),
        ProtoTuple::SourcePort(own.local.port()),
        ProtoTuple::DestinationPort(own.remote.port()),
    ];
    ConntrackAttribute::CtaTupleOrig(vec![TuplePart::Ip(addresses), TuplePart::Proto(ports)])
}

fn entry(attributes: &[ConntrackAttribute]) -> Option<Entry> {
    let (mut original, mut reply) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(parts) => original = direction(parts),
            ConntrackAttribute::CtaTupleReply(parts) => reply = direction(parts),
            _ => {}
        }
    }
    Some(Entry { original: original?, reply: reply? })
}

fn direction(parts: &[TuplePart]) -> Option<Direction> {
    let addresses = parts.iter().flat_map(|part| match part {
        TuplePart::Ip(addresses) => addresses.as_slice(),
        _ => &[],
    });
    let ports = parts.iter().flat_map(|part| match part {
        TuplePart::Proto(ports) => ports.as_slice(),
        _ => &[],
    });
    let (mut source, mut destination) = (None, None);
    for address in addresses {
        match address {
            IPTuple::SourceAddress(address) => source = Some(*address),
            IPTuple::DestinationAddress(address) => destination = Some(*address),
            _ => {}
        }
    }
    let (mut source_port, mut destination_port) = (None, None);
    for port in ports {
        match port {
            ProtoTuple::SourcePort(port) => source_port = Some(*port),
            ProtoTuple::DestinationPort(port) => destination_port = Some(*port),
            _ => {}
        }
    }
    Some(Direction {
        source: Endpoint::new(source?, source_port?),
        destination: Endpoint::new(destination?, destination_port?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(local: &str, remote: &str) -> Tuple {
        Tuple { local: local.parse().unwrap(), remote: remote.parse().unwrap() }
    }

    fn entry_of(original: [&str; 2], reply: [&str; 2]) -> Entry {
        let direction = |[source, destination]: [&str; 2]| Direction {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
        };
        Entry { original: direction(original), reply: direction(reply) }
    }

    const CLIENT: &str = "10.244.1.10:40000";
    const SERVICE: &str = "10.96.0.1:80";
    const SERVER: &str = "10.244.2.10:8080";
    const MASQUERADED: &str = "10.244.1.0:61000";

    fn check(entry: Entry, own: [&str; 2], expected: Option<[&str; 2]>) {
        let [local, remote] = own;
        let expected = expected.map(|[local, remote]| tuple(local, remote));
        assert_eq!(entry.beyond(tuple(local, remote)), expected);
    }

    #[test]
    fn what_is_not_translated_is_the_same_beyond() {
        let entry = entry_of([CLIENT, SERVER], [SERVER, CLIENT]);
        check(entry, [CLIENT, SERVER], None);
        check(entry, [SERVER, CLIENT], None);
    }

    #[test]
    fn the_client_of_a_service_is_told_the_server_and_what_it_looks_like_there() {
        check(entry_of([CLIENT, SERVICE], [SERVER, CLIENT]), [CLIENT, SERVICE], Some([CLIENT, SERVER]));
        let both = entry_of([CLIENT, SERVICE], [SERVER, MASQUERADED]);
        check(both, [CLIENT, SERVICE], Some([MASQUERADED, SERVER]));
        let source = entry_of([CLIENT, SERVER], [SERVER, MASQUERADED]);
        check(source, [CLIENT, SERVER], Some([MASQUERADED, SERVER]));
    }

    #[test]
    fn the_server_is_told_what_its_client_sees_where_its_own_host_translates() {
        let both = entry_of([CLIENT, SERVICE], [SERVER, MASQUERADED]);
        check(both, [SERVER, MASQUERADED], Some([SERVICE, CLIENT]));
    }

    #[test]
    fn an_entry_of_another_connection_tells_nothing() {
        check(entry_of([CLIENT, SERVICE], [SERVER, CLIENT]), [CLIENT, MASQUERADED], None);
    }

    #[test]
    fn what_is_asked_for_and_answered_is_read_as_it_was_written() {
        for own in [tuple(CLIENT, SERVICE), tuple("[fd00:10:244:1::a]:40000", "[fd00:10:96::1]:80")] {
            let bytes = request(own, ConntrackMessage::Get(vec![attribute(own)]), NLM_F_REQUEST, 7);
            let message = NetlinkMessage::<NetfilterMessage>::deserialize(&bytes).unwrap();
            let NetlinkPayload::InnerMessage(NetfilterMessage {
                inner: NetfilterMessageInner::Conntrack(ConntrackMessage::Get(attributes)),
                ..
            }) = message.payload
            else {
                panic!("{message:?}");
            };
            let [ConntrackAttribute::CtaTupleOrig(parts)] = attributes.as_slice() else {
                panic!("{attributes:?}");
            };
            let sent = Direction { source: own.local, destination: own.remote };
            assert_eq!(direction(parts), Some(sent));
            let reply = ConntrackAttribute::CtaTupleReply(parts.clone());
            assert_eq!(entry(&[attributes[0].clone(), reply]), Some(Entry { original: sent, reply: sent }));
            assert_eq!(entry(&attributes), None);
        }
    }
}
