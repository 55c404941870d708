// SPDX-License-Identifier: Apache-2.0
//! Podman's containers on a host of the lab, in the networks of its pods, and Podman's API on a socket of its own.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{
    DEADLINE, Host, Namespace, Pod, Process,
    containerd::{Image, LAB_IMAGE},
    wait_for,
};

pub struct Podman<'lab> {
    host: &'lab Host,
    directory: PathBuf,
    _service: Process,
}

impl<'lab> Podman<'lab> {
    /// Starts the API, with [`LAB_IMAGE`] loaded.
    pub fn start(host: &'lab Host) -> Result<Podman<'lab>> {
        let directory = host.place().directory.join("podman");
        std::fs::create_dir_all(&directory)?;
        // What no setting can move.
        let places = "/run/libpod /run/runc /run/containers /var/lib/containers";
        host.place().run_script(
            &["sh", "-e"],
            &format!("for place in {places}; do mkdir -p $place; mount -t tmpfs none $place; done\n"),
        )?;
        let socket = directory.join("podman.sock");
        let url = format!("unix://{}", socket.display());
        let mut command = command(&directory, &["system", "service", "--time", "0", &url]);
        let mut service = host.place().spawn("podman", &mut command)?;
        wait_for("Podman to listen", DEADLINE, || {
            service.fail_if_ended()?;
            Ok(socket.exists().then_some(()))
        })?;
        let podman = Podman { host, directory, _service: service };
        let image = Image::of_lab(&podman.directory)?;
        podman.run(&["load", "--input", &image.to_string_lossy()])?;
        Ok(podman)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("podman.sock")
    }

    pub fn create_pod(&self, name: &str, label: &str) -> Result<()> {
        let options = ["--infra=false", "--share", "", "--name", name, "--label", label];
        self.run(&[&["pod", "create"], options.as_slice()].concat()).map(drop)
    }

    /// Starts a container in a pod's network; in a pod of Podman's too, if `options` say so.
    pub fn run_container(&self, network: &Pod, options: &[&str], program: &str) -> Result<()> {
        let network = format!("ns:{}", Namespace::path(&network.place().network));
        let cgroup = format!("{}/podman", self.host.cgroup().relative()?.display());
        // The limits: a root without CAP_SYS_RESOURCE cannot give the usual ones.
        let words = "run --detach --ulimit nofile=1000:1000 --ulimit nproc=1000:1000 --cgroup-parent";
        let mut arguments: Vec<&str> = words.split(' ').collect();
        arguments.extend([cgroup.as_str(), "--network", &network, "--entrypoint", ""]);
        arguments.extend(options);
        arguments.push(LAB_IMAGE);
        arguments.extend(program.split(' '));
        self.run(&arguments).map(drop)
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        self.host.place().run(&mut command(&self.directory, arguments))
    }
}

fn command(directory: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("podman");
    for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "tmp")] {
        command.arg(option).arg(directory.join(name));
    }
    command.args(
        "--cgroup-manager cgroupfs --storage-driver vfs --events-backend file --runtime runc".split(' '),
    );
    command.args(arguments);
    command
}
