// SPDX-License-Identifier: Apache-2.0
//! Whatever addresses a connection has, the programs see the same ones all the time.

use anyhow::{Result, ensure};
use lab::{DEADLINE, Family, Flow, Host, wait_for};

use crate::matrix::{Case, Connection, Group, Row, new_port, scene};

const ADDRESSES: Group = Group("Addresses");

/// Ignored below, with this reason.
const NAMES: &str = "getsockname and getpeername, asked for all the time";

fn with(family: Family) -> Case {
    Case { family, ..Case::from("options-unset") }
}

#[test]
fn an_ipv4_connection_keeps_its_addresses() -> Result<()> {
    ADDRESSES.row("IPv4", NAMES).kept(with(Family::V4))
}

#[test]
fn an_ipv6_connection_keeps_its_addresses() -> Result<()> {
    ADDRESSES.row("IPv6 overlay", NAMES).kept(with(Family::V6))
}

#[test]
fn a_connection_with_mapped_addresses_keeps_them() -> Result<()> {
    ADDRESSES.row("IPv4-mapped IPv6", NAMES).kept(with(Family::Mapped))
}

fn flows_of(host: &Host, port: u16) -> Result<Vec<Flow>> {
    Ok(host.flows()?.into_iter().filter(|flow| flow.has_port(port)).collect())
}

#[test]
fn pods_with_the_same_port_are_told_apart() -> Result<()> {
    let row = ADDRESSES
        .row("several pods with the same port", "two servers, requests and answers with both all the time");
    let (scene, port) = (scene()?, new_port());
    let second = scene.lab.h2.pod("second")?;
    let host = &scene.lab.h1;
    let start = |server| Connection::start_on(port, scene.client.place(), server, &"pings".into());
    let mut connections = [start(&scene.server)?, start(&second)?];
    connections.iter_mut().try_for_each(Connection::begin)?;
    let move_both = |path: &str| {
        wait_for(&format!("both to be on {path}"), DEADLINE, || {
            let flows = flows_of(host, port)?;
            let elsewhere = flows.iter().filter(|flow| flow.path != path);
            for conn in elsewhere.clone().filter_map(|flow| flow.conn.as_ref()) {
                // Refused in passing, perhaps: asked again.
                let _ = if path == "host" { host.swap(conn) } else { host.swap_back(conn) };
            }
            Ok((flows.len() == 2 && elsewhere.count() == 0).then_some(()))
        })
    };
    let moved = ["host", "overlay", "host", "overlay", "host"].into_iter().try_for_each(move_both);
    for connection in connections {
        connection.leave()?;
    }
    moved?;
    row.is_kept()
}

#[test]
fn an_address_is_free_when_its_connection_has_ended() -> Result<()> {
    let row = ADDRESSES.row(
        "the same four addresses again",
        "three connections one after the other, each ended on the host network, between the same ports",
    );
    let (scene, port) = (scene()?, new_port());
    let mut case = Case::from("read");
    case.environment =
        vec![("BEHAVIOUR_BIND".to_owned(), scene.client.address(Family::V4, 40_000).to_string())];
    for _ in 0..3 {
        let mut connection = Connection::start_on(port, scene.client.place(), &scene.server, &case)?;
        connection.hold()?;
        connection.begin()?;
        let moved = connection.move_to("host");
        connection.leave_after(moved)?;
        wait_for("the flow to go", DEADLINE, || Ok(flows_of(&scene.lab.h1, port)?.is_empty().then_some(())))?;
    }
    row.is_kept()
}

/// A rule in the client's host, for a connection to this service address.
fn check_translated(row: &Row, rules: &str, service: Option<&str>, expected: &str) -> Result<()> {
    let (scene, port) = (scene()?, new_port());
    let host = &scene.lab.h1;
    let rules = rules.replace("PORT", &port.to_string()).replace("SERVER", &scene.server.v4.to_string());
    host.place().run_script(&["nft", "-f", "-"], &rules)?;
    let started = match service {
        None => Connection::start_on(port, scene.client.place(), &scene.server, &"pings".into()),
        Some(service) => {
            let mut case = Case::from("pings");
            case.connect_to = Some(format!("{service}:{port}"));
            Connection::start_on(port, scene.client.place(), &scene.server, &case)
        }
    };
    let checked = started.and_then(|mut connection| {
        connection.begin()?;
        let refused = host.wait_until_refused(port).and_then(|reason| {
            ensure!(reason == expected, "refused with {reason}, {expected} expected");
            Ok(())
        });
        connection.leave_after(refused)
    });
    host.place().run_script(&["nft", "-f", "-"], "delete table ip translated\n")?;
    checked?;
    row.is_refused(expected)
}

#[test]
fn a_connection_to_a_service_address_stays() -> Result<()> {
    let row =
        ADDRESSES.row("DNAT", "nftables in the client's host makes the server's address of a Service's");
    let rules = "table ip translated { chain nat { type nat hook prerouting priority -100\n\
                 ip daddr 10.244.99.10 tcp dport PORT dnat to SERVER:PORT\n}\n}\n";
    check_translated(&row, rules, Some("10.244.99.10"), "no_peer_host")
}

#[test]
fn a_connection_with_a_translated_source_stays() -> Result<()> {
    let row = ADDRESSES.row("SNAT", "nftables in the client's host changes the client's address");
    let rules = "table ip translated { chain nat { type nat hook postrouting priority 100\n\
                 tcp dport PORT snat to 10.244.1.77\n}\n}\n";
    check_translated(&row, rules, None, "peer_unknown")
}

#[test]
fn a_connection_that_another_one_is_named_after_at_the_other_host_stays() -> Result<()> {
    let row = ADDRESSES.row(
        "names crossed by NAT",
        "nftables in the server's pod: there another connection has the addresses that this one has at the client",
    );
    let (scene, dialled, taken, other) = (scene()?, new_port(), new_port(), new_port());
    let rules = format!(
        "table ip crossed {{\n\
         chain first {{ type nat hook prerouting priority -100\n\
         tcp sport 40001 tcp dport {dialled} redirect to :{taken}\n\
         tcp sport 40002 tcp dport {other} redirect to :{dialled}\n}}\n\
         chain last {{ type nat hook input priority 100\n\
         tcp sport 40002 tcp dport {dialled} snat to {}:40001\n}}\n}}\n",
        scene.client.v4
    );
    scene.server.place().run_script(&["nft", "-f", "-"], &rules)?;
    let start = |from: u16, dial: u16, listen: u16| {
        let mut case = Case::from("pings");
        let own = scene.client.address(Family::V4, from).to_string();
        case.environment = vec![("BEHAVIOUR_BIND".to_owned(), own)];
        case.connect_to = Some(scene.server.address(Family::V4, dial).to_string());
        let mut connection = Connection::start_on(listen, scene.client.place(), &scene.server, &case)?;
        connection.begin()?;
        Ok::<_, anyhow::Error>(connection)
    };
    let mut connections = vec![start(40_001, dialled, taken)?];
    connections.push(start(40_002, other, dialled)?);
    // Each forwarder has a socket of these names, and their sequence numbers are of two connections.
    let refused = scene.lab.h1.wait_until_refused(dialled).and_then(|reason| {
        ensure!(reason == "not_the_same_connection", "refused with {reason}");
        let counted = scene.lab.h1.status()?.refused;
        ensure!(counted.contains_key("not_the_same_connection"), "{counted:?}");
        Ok(())
    });
    connections.into_iter().try_for_each(Connection::leave)?;
    scene.server.place().run_script(&["nft", "-f", "-"], "delete table ip crossed\n")?;
    refused?;
    row.is_refused("not_the_same_connection")
}
