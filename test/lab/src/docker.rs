// SPDX-License-Identifier: Apache-2.0
//! Docker's containers on a host of the lab, by a dockerd of its own, on the overlay's bridge.

use std::{net::Ipv4Addr, path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    DEADLINE, Host, Process,
    containerd::{Image, LAB_IMAGE},
    network, wait_for,
};

pub struct Docker<'lab> {
    host: &'lab Host,
    directory: PathBuf,
    _daemon: Process,
}

impl<'lab> Docker<'lab> {
    /// Starts it, with [`LAB_IMAGE`] loaded.
    pub fn start(host: &'lab Host) -> Result<Docker<'lab>> {
        let directory = host.place().directory.join("docker");
        std::fs::create_dir_all(&directory)?;
        // What no setting can move.
        host.place().run_script(
            &["sh", "-e"],
            "for place in /run/containerd /etc/docker; do mkdir -p $place; mount -t tmpfs none $place; done\n",
        )?;
        let mut command = Command::new("dockerd");
        for (option, name) in [("--data-root", "root"), ("--exec-root", "exec"), ("--pidfile", "pid")] {
            command.arg(option).arg(directory.join(name));
        }
        command.arg("--host").arg(format!("unix://{}", directory.join("docker.sock").display()));
        command.args("--storage-driver vfs --iptables=false --ip6tables=false --ip-forward=false".split(' '));
        // Addresses of the second half: those of the first are of the lab's pods.
        let addresses = format!("{}/25", network::overlay_v4(host.index, 128));
        command.args(["--bridge", "cni0", "--fixed-cidr", &addresses, "--mtu", &network::MTU.to_string()]);
        let mut daemon = host.place().spawn("dockerd", &mut command)?;
        wait_for("dockerd to answer", DEADLINE, || {
            daemon.fail_if_ended()?;
            Ok(daemon.stderr().contains("API listen on").then_some(()))
        })?;
        let docker = Docker { host, directory, _daemon: daemon };
        let image = Image::of_lab(&docker.directory)?;
        docker.run(&["load", "--input", &image.to_string_lossy()])?;
        Ok(docker)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("docker.sock")
    }

    /// Starts a container and returns its address.
    pub fn run_container(&self, name: &str, label: &str, program: &str) -> Result<Ipv4Addr> {
        let cgroup = format!("{}/docker", self.host.cgroup().relative()?.display());
        // The limit: a root without CAP_SYS_RESOURCE cannot give the usual one.
        let options = ["run", "--detach", "--ulimit", "nofile=1000:1000", "--cgroup-parent", &cgroup];
        let more = ["--name", name, "--label", label, "--entrypoint", "", LAB_IMAGE];
        let program: Vec<&str> = program.split(' ').collect();
        self.run(&[&options[..], &more, &program].concat())?;
        let address = self.run(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", name])?;
        Ok(address.trim().parse()?)
    }

    pub fn wait_until_it_says(&self, name: &str, text: &str) -> Result<()> {
        wait_for(&format!("\"{text}\" from {name}"), DEADLINE, || {
            Ok(self.run(&["logs", name])?.contains(text).then_some(()))
        })
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("docker");
        command.arg("--host").arg(format!("unix://{}", self.socket().display())).args(arguments);
        self.host.place().run(&mut command)
    }
}
