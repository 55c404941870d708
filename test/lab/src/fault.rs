// SPDX-License-Identifier: Apache-2.0
//! Faults of the hosts' own network, of what the routers say to each other, of disks, and descriptors that run out. The
//! overlay and the routers' connections have a cable of their own: they go on when HOST_IF does not.

use std::{
    fs::File,
    io::{ErrorKind, Write},
    path::PathBuf,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::{
    Host, Process,
    network::{self, HOST_IF},
};

/// The default of ROUTER_PORT.
const ROUTER_PORT: u16 = 1234;
/// Files that a small disk has room for.
const SMALL_DISK: &str = "size=256k,nr_inodes=16";

/// What a firewall stops, as the host sees it that the firewall is on.
#[derive(Clone, Copy, Debug)]
pub enum Cut {
    Everything,
    Outgoing,
    Incoming,
    /// Both directions of the connection with this port at this host.
    Connection(u16),
    /// What the routers say to each other, and witnesses: dropped, or answered by a reset.
    Routers,
    RoutersByReset,
    /// As `Routers`, from the word on a witness that a decider on this host says, a segment of one byte.
    RoutersFromDecision,
}

impl Host {
    /// Lets a firewall stop what passes, until [`Host::heal`].
    pub fn cut(&self, cut: Cut) -> Result<()> {
        let out = |what: &str| format!("oifname {HOST_IF} {what}");
        let into = |what: &str| format!("iifname {HOST_IF} {what}");
        let of_routers = |what: &str| {
            let rule = format!("tcp dport {ROUTER_PORT} {what}; tcp sport {ROUTER_PORT} {what}");
            (rule.clone(), rule)
        };
        let (outgoing, incoming) = match cut {
            Cut::Everything => (out("drop"), into("drop")),
            Cut::Outgoing => (out("drop"), into("accept")),
            Cut::Incoming => (out("accept"), into("drop")),
            Cut::Connection(port) => {
                (out(&format!("tcp sport {port} drop")), into(&format!("tcp dport {port} drop")))
            }
            Cut::Routers => of_routers("drop"),
            Cut::RoutersByReset => of_routers("reject with tcp reset"),
            Cut::RoutersFromDecision => {
                let lost = |end: &str| {
                    let of = |port: &str| format!("ip {end} @lost tcp {port} {ROUTER_PORT} drop");
                    format!("{}; {}", of("dport"), of("sport"))
                };
                let word = format!("tcp dport {ROUTER_PORT} ip length 53 add @lost {{ ip daddr }} drop");
                (format!("{}; {word}", lost("daddr")), lost("saddr"))
            }
        };
        self.place().run_script(
            &["nft", "-f", "-"],
            &format!(
                "table inet cut {{\n\
                 set lost {{ type ipv4_addr; flags dynamic; size 16; }}\n\
                 chain outgoing {{ type filter hook output priority 0; {outgoing}; }}\n\
                 chain incoming {{ type filter hook input priority 0; {incoming}; }}\n\
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

    /// Gives this host a small disk, and router and forwarder their sockets there from now on.
    pub fn use_small_disk(&self) -> Result<()> {
        let disk = self.place().directory.join("disk");
        std::fs::create_dir(&disk)?;
        self.mounts()?.run(|| {
            let (kind, none) = (Some("tmpfs"), MsFlags::empty());
            mount(kind, &disk, kind, none, Some(SMALL_DISK)).context("mounting a small disk")
        })?;
        self.put_sockets(disk);
        Ok(())
    }

    /// Neither a byte nor a file more.
    pub fn fill_small_disk(&self) -> Result<()> {
        let file = |number: u32| self.filler(number);
        self.mounts()?.run(|| {
            for number in 0.. {
                let full = |error: &std::io::Error| error.kind() == ErrorKind::StorageFull;
                match File::options().append(true).create(true).open(file(number)) {
                    Ok(mut filler) => while filler.write_all(&[0; 4096]).is_ok() {},
                    Err(error) if full(&error) => return Ok(()),
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        })
    }

    pub fn clear_small_disk(&self) -> Result<()> {
        let file = |number: u32| self.filler(number);
        self.mounts()?.run(|| {
            for number in 0.. {
                match std::fs::remove_file(file(number)) {
                    Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                    removed => removed?,
                }
            }
            Ok(())
        })
    }

    fn filler(&self, number: u32) -> PathBuf {
        self.place().directory.join(format!("disk/filler-{number}"))
    }
}

/// Lets a running program have so many descriptors more than it has now.
pub fn leave_descriptors(pid: u32, more: usize) -> Result<()> {
    let open = |fd: &u64| std::fs::symlink_metadata(format!("/proc/{pid}/fd/{fd}")).is_ok();
    let limit = (0..).filter(|fd| !open(fd)).nth(more).context("numbers do not end")?;
    limit_descriptors(pid, limit)
}

/// Lets a running program make descriptors below this number only.
pub fn limit_descriptors(pid: u32, limit: u64) -> Result<()> {
    let set =
        Command::new("prlimit").args([format!("--pid={pid}"), format!("--nofile={limit}:")]).status()?;
    ensure!(set.success(), "prlimit: {set}");
    Ok(())
}
