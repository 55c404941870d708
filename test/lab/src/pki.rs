// SPDX-License-Identifier: Apache-2.0
//! The lab's own authority, made by `router pki` as an operator would.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::{network, program};

/// Makes certificates for nodes.
pub struct Authority {
    directory: PathBuf,
}

impl Authority {
    pub fn new(directory: &Path) -> Result<Authority> {
        let authority = Authority { directory: directory.to_owned() };
        authority.pki("init", &[])?;
        Ok(authority)
    }

    /// The directory with the node's certificate, its key, and that of the authority.
    pub fn issue(&self, node: &str, addresses: &[IpAddr]) -> Result<PathBuf> {
        let mut arguments = vec![node.to_owned(), "--address".to_owned()];
        arguments.extend(addresses.iter().map(IpAddr::to_string));
        self.pki("issue", &arguments)?;
        Ok(self.directory.join(node))
    }

    fn pki(&self, what: &str, arguments: &[String]) -> Result<()> {
        let mut command = Command::new(program("router")?);
        command.args(["pki", what]).arg(&self.directory).args(arguments);
        let output = command.stdin(Stdio::null()).output().context("starting router pki")?;
        ensure!(output.status.success(), "router pki {what}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

/// All addresses at which a host of the lab is known to others.
pub fn node_addresses(host: u8) -> [IpAddr; 4] {
    [
        network::host_address(host).into(),
        network::underlay_address(host).into(),
        network::overlay_v4(host, 0).into(),
        network::overlay_v6(host, 0).into(),
    ]
}
