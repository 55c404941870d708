// SPDX-License-Identifier: Apache-2.0
//! Two hosts, an overlay between them and pods on it, on one machine.
//!
//! A [`Lab`] is made of network and mount namespaces without names, one cgroup subtree and one directory. The
//! namespaces are held by file descriptors of the process that made the lab and end with it; everything else is
//! cleaned up by the lab's [`Keeper`](keeper), a process that notices when its owner ends, in whatever way. So two
//! labs can be up at once, with the same addresses, and nothing is left behind, even after SIGKILL.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use lab::{Lab, RouterOptions};
//! let lab = Lab::new("example")?;
//! lab.start_everything(&RouterOptions::default())?;
//! let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
//! # Ok(()) }
//! ```

mod api_server;
mod cgroup;
mod cluster;
mod control;
mod debian;
mod direct;
mod fault;
mod host;
mod http;
mod keeper;
mod namespace;
mod network;
mod pki;
mod pod;
mod process;
mod program;
mod scene;
mod wait;

pub mod containerd;
pub mod docker;
pub mod manifest;
pub mod measure;
pub mod podman;
pub mod programs;
pub mod transparency;
pub mod workload;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

pub use api_server::ApiServer;
pub use cgroup::Cgroup;
pub use cluster::{Cluster, PATIENCE};
pub use control::{Flow, Peer, Status};
pub use debian::{CONTAINERS, Debian};
pub use direct::Direct;
pub use fault::{Cut, leave_descriptors, limit_descriptors};
pub use host::{Host, RULE_FOR_ALL_PODS, RULE_FOR_ALL_PODS_V6, RULE_FOR_OTHERS, RouterOptions};
pub use http::Answer;
pub use namespace::Namespace;
pub use pki::{Authority, node_addresses};
pub use pod::{Family, Pod};
pub use process::{Finished, Place, Process};
pub use program::program;
pub use scene::Scene;
pub use wait::{DEADLINE, wait_for};

use keeper::Keeper;

/// Two hosts and the overlay between them.
pub struct Lab {
    pub h1: Host,
    pub h2: Host,
    pub name: String,
    pub authority: Authority,
    directory: PathBuf,
    /// Last, so that it is dropped last: it ends what the fields above have left running.
    _keeper: Keeper,
}

impl Lab {
    /// A lab for the test of this name. Names must differ between the labs that one process has at a time.
    pub fn new(name: &str) -> Result<Lab> {
        keeper::sweep();
        let name = format!("{name}-{}", std::process::id());
        let cgroup = Cgroup::root()?.child(&format!("{}{name}", keeper::PREFIX));
        let directory = keeper::directory().join(&name);
        let keeper = Keeper::start(&cgroup, &directory)?;
        let build = || -> Result<(Host, Host, Authority)> {
            std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
            let h1 = Host::new(1, &cgroup, &directory)?;
            let h2 = Host::new(2, &cgroup, &directory)?;
            network::connect(&h1, &h2)?;
            let authority = Authority::new(&directory.join("pki"))?;
            for host in [&h1, &h2] {
                let issued = authority.issue(&host.name, &node_addresses(host.index))?;
                std::fs::rename(issued, host.tls())?;
            }
            Ok((h1, h2, authority))
        };
        let (h1, h2, authority) = build().with_context(|| format!("building the lab {name}"))?;
        let lab = Lab { h1, h2, name, authority, directory, _keeper: keeper };
        if std::env::var_os("LAB_QUIET").is_none() {
            for host in lab.hosts() {
                eprintln!("{} {}: {}", lab.name, host.name, host.place().line_to_enter());
            }
        }
        Ok(lab)
    }

    pub fn hosts(&self) -> [&Host; 2] {
        [&self.h1, &self.h2]
    }

    /// Where sockets, logs and the output of programs are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Forwarder and router on both hosts, ready.
    pub fn start_everything(&self, options: &RouterOptions) -> Result<()> {
        for host in self.hosts() {
            host.start_forwarder()?;
        }
        self.start_routers(options)
    }

    /// A router on each host, ready.
    pub fn start_routers(&self, options: &RouterOptions) -> Result<()> {
        self.hosts().into_iter().try_for_each(|host| host.start_router(options))
    }

    /// Stops both routers with SIGTERM.
    pub fn stop_routers(&self) -> Result<()> {
        // At the same time: a connection that goes back needs both.
        for host in self.hosts() {
            host.terminate_router()?;
        }
        for host in self.hosts() {
            let end = host.wait_for_router()?;
            anyhow::ensure!(end.success(), "the router of {} ended with {}", host.name, end.status);
        }
        Ok(())
    }

    /// Stops both forwarders with SIGTERM.
    pub fn stop_forwarders(&self) -> Result<()> {
        for host in self.hosts() {
            let end = host.stop_forwarder()?;
            anyhow::ensure!(end.success(), "the forwarder of {} ended with {}", host.name, end.status);
        }
        Ok(())
    }

    /// Stops routers, then forwarders.
    pub fn stop_everything(&self) -> Result<()> {
        self.stop_routers()?;
        self.stop_forwarders()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // For whoever looks into one run: what all programs printed.
        if let Some(logs) = std::env::var_os("LAB_LOGS") {
            let _ = std::process::Command::new("cp").arg("-r").arg(&self.directory).arg(logs).status();
        }
        if std::thread::panicking() {
            for host in self.hosts() {
                host.show_logs();
            }
        }
    }
}
