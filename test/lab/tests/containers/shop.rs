// SPDX-License-Identifier: Apache-2.0
//! Routers that swap the connections of a shop only, and clients of it.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
};

use anyhow::{Result, ensure};
use lab::{DEADLINE, Host, Lab, Pod, Process, RouterOptions, program};

pub const RULE_FOR_SHOP: &str = "type=podLabel\nname=app\nvalue=shop\n";

/// Routers on both hosts; that of h2, where the containers are, asks for a label.
pub fn start_routers(lab: &Lab, rule: &str, runtime: &str) -> Result<()> {
    lab.hosts().into_iter().try_for_each(Host::start_forwarder)?;
    lab.h1.start_router(&RouterOptions::default())?;
    let rules = lab.h2.write_rules("label", rule)?;
    lab.h2.start_router(&RouterOptions::with_rules(&rules).with("ROUTER_RUNTIME", runtime))
}

/// A client in a pod of the other host, connected.
pub fn connect(client: &Pod, server: Ipv4Addr, port: u16) -> Result<Process> {
    let mut command = Command::new(program("stream")?);
    command.args(["--client", &SocketAddr::new(server.into(), port).to_string(), "--pings", "--until-eof"]);
    let mut client = client.spawn(&format!("client-{port}"), &mut command)?;
    client.wait_until_it_says("connected", DEADLINE)?;
    Ok(client)
}

pub fn expect_refused(host: &Host, port: u16) -> Result<()> {
    let reason = host.wait_until_refused(port)?;
    ensure!(reason == "no_rule_matches", "{reason}");
    Ok(())
}
