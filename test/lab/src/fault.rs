// SPDX-License-Identifier: Apache-2.0
//! Faults of the hosts' own network. The overlay and the routers' connections have a cable of their own and go on.

use std::process::Command;

use anyhow::{Context, Result};

use crate::{
    Host, Process,
    network::{self, HOST_IF},
};

/// What a firewall at HOST_IF drops, as the host sees it that the firewall is on.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    Everything,
    Outgoing,
    Incoming,
    /// Both directions of the connection with this port at this host.
    Connection(u16),
}

impl Host {
    /// Lets a firewall drop what passes HOST_IF, until [`Host::heal`].
    pub fn cut(&self, cut: Cut) -> Result<()> {
        let (outgoing, incoming) = match cut {
            Cut::Everything => ("drop".into(), "drop".into()),
            Cut::Outgoing => ("drop".into(), "accept".into()),
            Cut::Incoming => ("accept".into(), "drop".into()),
            Cut::Connection(port) => (format!("tcp sport {port} drop"), format!("tcp dport {port} drop")),
        };
        self.place().run_script(
            &["nft", "-f", "-"],
            &format!(
                "table inet cut {{\n\
                 chain outgoing {{ type filter hook output priority 0; oifname {HOST_IF} {outgoing}; }}\n\
                 chain incoming {{ type filter hook input priority 0; iifname {HOST_IF} {incoming}; }}\n\
                 }}\n"
            ),
        )
    }

    pub fn heal(&self) -> Result<()> {
        self.place().run_script(&["nft", "-f", "-"], "delete table inet cut\n")
    }

    pub fn take_host_if_down(&self) -> Result<()> {
        network::ip(self.place(), &format!("link set {HOST_IF} down\n"))
    }

    pub fn bring_host_if_up(&self) -> Result<()> {
        network::ip(self.place(), &format!("link set {HOST_IF} up\n"))
    }

    /// The port on HOST_IF of a program's swapped connection, for [`Cut::Connection`].
    pub fn host_port_of(&self, program: &Process) -> Result<u16> {
        let sockets = self.place().run(Command::new("ss").args(["-Htne", "state", "established"]))?;
        let links = std::fs::read_dir(format!("/proc/{}/fd", program.pid()))?;
        let held: Vec<String> = links
            .filter_map(|entry| {
                let link = std::fs::read_link(entry.ok()?.path()).ok()?;
                let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
                Some(format!("ino:{inode}"))
            })
            .collect();
        let of_program = |line: &&str| line.split_whitespace().any(|word| held.iter().any(|ino| ino == word));
        let line = sockets.lines().find(of_program);
        let line = line.with_context(|| format!("{} has no host socket: {sockets}", program.name))?;
        // Receive queue, send queue, local address.
        let local = line.split_whitespace().nth(2).context("a socket without an address")?;
        let (_, port) = local.rsplit_once(':').context("an address without a port")?;
        Ok(port.parse()?)
    }
}
