// SPDX-License-Identifier: Apache-2.0
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::Result;

use crate::{Cgroup, Finished, Host, Namespace, Place, Process, network};

/// A network namespace on the overlay and a container's cgroup.
pub struct Pod {
    pub name: String,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    place: Place,
}

impl Pod {
    pub(crate) fn new(host: &Host, index: u8, name: &str, cgroup: &Cgroup) -> Result<Pod> {
        let cgroup = cgroup.child(&format!("kubepods/burstable/pod{name}/{name}"));
        cgroup.make()?;
        let directory = host.place().directory.join(name);
        std::fs::create_dir_all(&directory)?;
        let place = Place { network: Arc::new(Namespace::network()?), mounts: None, cgroup, directory };
        network::plug(host.place(), host.index, &place, index)?;
        let (v4, v6) = (network::overlay_v4(host.index, index), network::overlay_v6(host.index, index));
        Ok(Pod { name: name.to_owned(), v4, v6, place })
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The pod's address in the family that a test is about.
    pub fn address(&self, family: Family, port: u16) -> SocketAddr {
        let ip: IpAddr = match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
            Family::Mapped => network::mapped(self.v4),
        };
        SocketAddr::new(ip, port)
    }

    /// Starts a program in the pod's container.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        self.place.spawn(name, command)
    }

    /// Starts a server in the pod's container and waits until something listens on its port.
    pub fn serve(&self, name: &str, command: &mut Command, port: u16) -> Result<Process> {
        self.place.serve(name, command, port)
    }

    /// Runs a program in the pod's container to its end.
    pub fn exec(&self, name: &str, command: &mut Command, limit: Duration) -> Result<Finished> {
        self.spawn(name, command)?.wait(limit)
    }
}

/// Kinds of addresses that a connection can have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    V4,
    V6,
    /// IPv4 addresses on an IPv6 socket.
    Mapped,
}
