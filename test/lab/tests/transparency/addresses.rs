// SPDX-License-Identifier: Apache-2.0
//! Whatever addresses a connection has, the programs see the same ones all the time.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Family, Flow, Host, Pod, wait_for};

use crate::matrix::{Case, Connection, Group, new_port, scene};

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

/// How a connection is translated on the way. PORT and SERVER stand for those of the connection.
struct Translation {
    family: Family,
    /// nftables' chains in the client's host, and in the server's.
    chains: [&'static str; 2],
    /// What the client connects to, if not the server.
    service: Option<&'static str>,
}

const SERVICE: &str = "10.244.99.10";
const TO_SERVER: &str = "chain to { type nat hook prerouting priority -100\n\
                         ip daddr 10.244.99.10 tcp dport PORT dnat to SERVER:PORT\n}\n";
const MASQUERADED_TO_SERVER: &str = "chain to { type nat hook prerouting priority -100\n\
                                     ip daddr 10.244.99.10 tcp dport PORT dnat to SERVER:PORT\n}\n\
                                     chain from { type nat hook postrouting priority 100\n\
                                     tcp dport PORT masquerade\n}\n";

impl Translation {
    fn of_v4(chains: &'static str, service: Option<&'static str>) -> Translation {
        Translation { family: Family::V4, chains: [chains, ""], service }
    }

    /// Runs `check` with a connection of this behaviour between the client and `server`.
    fn with(
        &self,
        server: &Pod,
        behaviour: &'static str,
        check: impl FnOnce(Connection) -> Result<()>,
    ) -> Result<()> {
        let (scene, port) = (scene()?, new_port());
        let address = server.address(self.family, port);
        let family = if address.is_ipv6() { "ip6" } else { "ip" };
        let feed = |script: &str| {
            let hosts = scene.lab.hosts().into_iter().zip(self.chains);
            hosts.filter(|(_, chains)| !chains.is_empty()).try_for_each(|(host, chains)| {
                let chains = chains.replace("SERVER:PORT", &address.to_string());
                let script = script.replace("CHAINS", &chains).replace("PORT", &port.to_string());
                host.place().run_script(&["nft", "-f", "-"], &script)
            })
        };
        feed(&format!("table {family} translated {{\nCHAINS}}\n"))?;
        let connect_to = self.service.map(|service| format!("{service}:{port}"));
        let case = Case { family: self.family, connect_to, ..Case::from(behaviour) };
        let started = Connection::start_on(port, scene.client.place(), server, &case);
        let checked = started.and_then(|mut connection| {
            connection.begin()?;
            check(connection)
        });
        feed(&format!("delete table {family} translated\n"))?;
        checked
    }

    /// Moves between two hosts; each program sees its own addresses, all the time and of whichever path.
    fn is_kept(&self) -> Result<()> {
        for behaviour in ["options-unset", "pings"] {
            self.with(&scene()?.server, behaviour, |connection| {
                let moved = ["host", "overlay", "host", "overlay", "host"]
                    .into_iter()
                    .try_for_each(|path| connection.move_to(path));
                connection.leave_after(moved)
            })?;
        }
        Ok(())
    }
}

#[test]
fn a_connection_to_a_service_address_keeps_it() -> Result<()> {
    let row =
        ADDRESSES.row("DNAT", "nftables in the client's host makes the server's address of a Service's");
    Translation::of_v4(TO_SERVER, Some(SERVICE)).is_kept()?;
    row.is_kept()
}

#[test]
fn an_ipv6_connection_to_a_service_address_keeps_it() -> Result<()> {
    let row = ADDRESSES.row("DNAT, IPv6", "likewise");
    let chains = "chain to { type nat hook prerouting priority -100\n\
                  ip6 daddr fd00:10:244:99::10 tcp dport PORT dnat to SERVER:PORT\n}\n";
    Translation { family: Family::V6, chains: [chains, ""], service: Some("[fd00:10:244:99::10]") }
        .is_kept()?;
    row.is_kept()
}

#[test]
fn a_connection_with_a_translated_source_keeps_its_addresses() -> Result<()> {
    let row = ADDRESSES.row("SNAT", "nftables in the client's host changes the client's address");
    let chains = "chain from { type nat hook postrouting priority 100\n\
                  tcp dport PORT snat to 10.244.1.77\n}\n";
    Translation::of_v4(chains, None).is_kept()?;
    row.is_kept()
}

#[test]
fn a_connection_to_a_service_address_from_a_masqueraded_client_keeps_its_addresses() -> Result<()> {
    let row = ADDRESSES.row(
        "DNAT and masquerade",
        "nftables in the client's host; the server sees the overlay address of the client's host",
    );
    Translation::of_v4(MASQUERADED_TO_SERVER, Some(SERVICE)).is_kept()?;
    row.is_kept()
}

const AT_SERVERS_HOST: &str = "chain to { type nat hook prerouting priority -100\n\
                               ip daddr 10.244.2.99 tcp dport PORT dnat to SERVER:PORT\n}\n";

#[test]
fn a_connection_that_the_servers_host_translates_keeps_its_addresses() -> Result<()> {
    let row = ADDRESSES.row("DNAT in the server's host", "the client's host knows of no translation");
    Translation { family: Family::V4, chains: ["", AT_SERVERS_HOST], service: Some("10.244.2.99") }
        .is_kept()?;
    row.is_kept()
}

#[test]
fn a_connection_that_both_hosts_translate_keeps_its_addresses() -> Result<()> {
    let row = ADDRESSES.row(
        "DNAT in both hosts",
        "and masquerade in the client's: neither end has an address that the other knows",
    );
    let chains = "chain to { type nat hook prerouting priority -100\n\
                  ip daddr 10.244.99.10 tcp dport PORT dnat to 10.244.2.99:PORT\n}\n\
                  chain from { type nat hook postrouting priority 100\n\
                  tcp dport PORT masquerade\n}\n";
    Translation { family: Family::V4, chains: [chains, AT_SERVERS_HOST], service: Some(SERVICE) }
        .is_kept()?;
    row.is_kept()
}

#[test]
fn a_connection_whose_source_becomes_an_address_outside_the_overlay_stays() -> Result<()> {
    let row = ADDRESSES.row(
        "SNAT to the host's own address",
        "nothing tells the server's router which peer may speak for it",
    );
    let chains = "chain from { type nat hook postrouting priority 100\n\
                  tcp dport PORT snat to 192.168.77.1\n}\n";
    Translation::of_v4(chains, None).with(&scene()?.server, "pings", |connection| {
        let refused = scene()?.lab.h1.wait_until_refused(connection.port).and_then(|reason| {
            ensure!(reason == "peer_unknown", "refused with {reason}");
            Ok(())
        });
        connection.leave_after(refused)
    })?;
    row.is_refused("peer_unknown")
}

#[test]
fn a_connection_to_a_service_of_its_own_host_keeps_its_addresses() -> Result<()> {
    let row = ADDRESSES.row(
        "DNAT and masquerade within one host",
        "the server is another pod of the client's host, and sees the address of the host's bridge",
    );
    let host = &scene()?.lab.h1;
    let server = host.pod("served")?;
    let is_on = |port, path: &str| {
        wait_for(&format!("both ends on {path}"), DEADLINE, || {
            let flows = flows_of(host, port)?;
            Ok((flows.len() == 2 && flows.iter().all(|flow| flow.path == path)).then_some(()))
        })
    };
    for behaviour in ["options-unset", "pings"] {
        Translation::of_v4(MASQUERADED_TO_SERVER, Some(SERVICE)).with(&server, behaviour, |connection| {
            let moved = ["host", "overlay", "host", "overlay", "host"].into_iter().try_for_each(|path| {
                host.move_to(connection.port, path)?;
                is_on(connection.port, path)
            });
            connection.leave_after(moved)
        })?;
    }
    row.is_kept()
}

fn conntrack(action: &str, port: u16) -> Command {
    let mut command = Command::new("conntrack");
    command.args([action, "-p", "tcp", "--orig-port-dst", &port.to_string()]);
    command
}

/// For how many seconds connection tracking in the client's host keeps the connection of this port, and its state there.
fn tracked(port: u16) -> Result<Option<(u32, String)>> {
    let listed = scene()?.lab.h1.place().run(&mut conntrack("-L", port))?;
    let mut words = listed.split_whitespace().skip(2);
    let Some((seconds, state)) = words.next().zip(words.next()) else { return Ok(None) };
    Ok(Some((seconds.parse()?, state.to_owned())))
}

#[test]
fn a_translation_lasts_while_no_packet_passes_it() -> Result<()> {
    let row = ADDRESSES.row(
        "a translation that would be forgotten",
        "connection tracking keeps what is idle for 10 minutes; on the host network it is made to keep it for days, until the end",
    );
    let host = scene()?.lab.h1.place();
    let set = |seconds: u32| {
        let file = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
        host.run_script(&["sh", "-e"], &format!("echo {seconds} >{file}\n"))
    };
    set(600)?;
    let server = &scene()?.server;
    let checked = Translation::of_v4(TO_SERVER, Some(SERVICE)).with(server, "pings", |connection| {
        let port = connection.port;
        let is_kept = || {
            wait_for("a translation that is kept for a day", DEADLINE, || {
                Ok(tracked(port)?.is_some_and(|(seconds, _)| seconds > 24 * 3600).then_some(()))
            })
        };
        let kept = ["host", "overlay", "host"].into_iter().try_for_each(|path| {
            connection.move_to(path)?;
            if path == "host" { is_kept() } else { Ok(()) }
        });
        connection.leave_after(kept)?;
        // Its sockets on the overlay tell that it is over.
        wait_for("the translation to end", DEADLINE, || {
            Ok(tracked(port)?.is_none_or(|(seconds, state)| state == "CLOSE" && seconds <= 10).then_some(()))
        })
    });
    set(432_000)?;
    checked?;
    row.is_kept()
}

#[test]
fn a_connection_whose_translation_is_lost_stays_on_the_host_network() -> Result<()> {
    let row = ADDRESSES.row(
        "a translation that is lost",
        "the entry of connection tracking is deleted while the connection is on the host network, and it shall go back",
    );
    let host = &scene()?.lab.h1;
    let stays = |connection: &Connection| {
        connection.move_to("host")?;
        host.place().run(&mut conntrack("-D", connection.port))?;
        let conn = connection.flow()?.conn.context("a connection without a name")?;
        let refused = host.swap_back(&conn);
        ensure!(refused.is_err_and(|error| format!("{error:#}").contains("not_parked")), "it went back");
        host.wait_for_flow(connection.port, "without a way back", |flow| flow.way_back == Some(false))?;
        ensure!(connection.flow()?.on_host(), "it is not on the host network");
        Ok(())
    };
    Translation::of_v4(TO_SERVER, Some(SERVICE)).with(&scene()?.server, "pings", |connection| {
        let stayed = stays(&connection);
        connection.leave_after(stayed)
    })?;
    row.is_refused("not_parked")
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
    let is_refused = |flow: &Flow| flow.reason.as_deref() == Some("not_the_same_connection");
    let refused = scene.lab.h1.wait_for_flow(dialled, "refused", is_refused).and_then(|flow| {
        ensure!(!flow.on_host(), "{flow:?}");
        let counted = scene.lab.h1.status()?.refused;
        ensure!(counted.contains_key("not_the_same_connection"), "{counted:?}");
        Ok(())
    });
    connections.into_iter().try_for_each(Connection::leave)?;
    scene.server.place().run_script(&["nft", "-f", "-"], "delete table ip crossed\n")?;
    refused?;
    row.is_refused("not_the_same_connection")
}
