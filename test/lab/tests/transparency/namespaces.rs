// SPDX-License-Identifier: Apache-2.0
//! A connection that a container could not have made to the other host by itself is not given a way around that.

use std::sync::Arc;

use anyhow::{Result, ensure};
use lab::{Namespace, Place};

use crate::matrix::{Case, Connection, Group, scene};

const NAMESPACES: Group = Group("Namespaces");

#[test]
fn a_namespace_in_a_container_stays() -> Result<()> {
    let row = NAMESPACES.row(
        "a network namespace nested in a container",
        "with an overlay address of its own, routed by the container; requests and answers go on",
    );
    let scene = scene()?;
    let container = scene.lab.h1.pod("outer")?;
    let nested = Place { network: Arc::new(Namespace::network()?), ..container.place().clone() };
    container.place().run_script(
        &["sh", "-e"],
        &format!(
            "ip link add inner0 type veth peer name eth0 netns {}\n\
             ip link set inner0 up\n\
             ip route add 10.244.1.200 dev inner0\n\
             for file in ip_forward conf/all/proxy_arp; do echo 1 >/proc/sys/net/ipv4/$file; done\n",
            nested.network.path()
        ),
    )?;
    let lines =
        "link set lo up\nlink set eth0 up\naddr add 10.244.1.200/32 dev eth0\nroute add default dev eth0\n";
    nested.run_script(&["ip", "-batch", "-"], lines)?;
    let mut connection = Connection::start(&nested, &scene.server, &"pings".into())?;
    connection.begin()?;
    let refused = connection.expect_refused("foreign_namespace");
    connection.leave_after(refused)?;
    row.is_refused("foreign_namespace")
}

#[test]
fn a_socket_of_another_namespace_stays() -> Result<()> {
    let row = NAMESPACES.row("a socket made in another network namespace", "requests and answers go on");
    let scene = scene()?;
    let other = scene.lab.h1.pod("other")?;
    let mut case = Case::from("pings");
    case.environment = vec![("BEHAVIOUR_NETWORK".to_owned(), other.place().network.path())];
    let mut connection = Connection::start(scene.client.place(), &scene.server, &case)?;
    connection.begin()?;
    let refused = connection.expect_refused("foreign_namespace");
    connection.leave_after(refused)?;
    row.is_refused("foreign_namespace")
}

#[test]
fn a_pod_on_the_hosts_network_is_left_alone() -> Result<()> {
    let row = NAMESPACES.row("a container on the host's network", "requests and answers go on");
    let scene = scene()?;
    let host = Place { network: Arc::clone(&scene.lab.h1.place().network), ..scene.client.place().clone() };
    let mut connection = Connection::start(&host, &scene.server, &"pings".into())?;
    connection.begin()?;
    // Its own router does not even know it.
    let port = connection.port;
    let left = scene.lab.h2.wait_until_refused(port).and_then(|reason| {
        ensure!(reason == "host_address", "refused with {reason}");
        ensure!(!scene.lab.h1.flows()?.iter().any(|flow| flow.has_port(port)), "h1 shows it");
        Ok(())
    });
    connection.leave_after(left)?;
    row.is_refused("host_address")
}
