// SPDX-License-Identifier: Apache-2.0
//! What the lab itself promises.

use std::{
    net::{TcpListener, TcpStream},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use lab::{Cgroup, DEADLINE, Family, Lab, wait_for};

fn connect_both_families(lab: &Lab) -> Result<()> {
    let (here, there) = (lab.h1.pod("here")?, lab.h2.pod("there")?);
    for family in [Family::V4, Family::V6] {
        let listening = there.address(family, 9000);
        let listener = there.place().network.run(|| Ok(TcpListener::bind(listening)?))?;
        let stream = here.place().network.run(|| Ok(TcpStream::connect_timeout(&listening, DEADLINE)?))?;
        let (_, from) = listener.accept()?;
        ensure!(from == stream.local_addr()?);
    }
    Ok(())
}

#[test]
fn two_labs_with_the_same_addresses_are_up_at_once() -> Result<()> {
    let (one, other) = (Lab::new("one")?, Lab::new("other")?);
    connect_both_families(&one)?;
    connect_both_families(&other)
}

#[test]
fn a_dropped_lab_leaves_no_process_cgroup_or_directory() -> Result<()> {
    let lab = Lab::new("dropped")?;
    let pod = lab.h1.pod("pod")?;
    // The shell's child outlives the shell.
    pod.place().run(Command::new("sh").args(["-c", "sleep 1000 >/dev/null 2>&1 &"]))?;
    let (cgroup, directory) = (lab.h1.cgroup().clone(), lab.directory().to_owned());
    ensure!(cgroup.processes().len() == 1);
    drop(lab);
    ensure!(cgroup.processes().is_empty());
    ensure!(!cgroup.path().exists(), "{} is left", cgroup.path().display());
    ensure!(!directory.exists(), "{} is left", directory.display());
    Ok(())
}

#[test]
fn a_lab_whose_owner_is_killed_leaves_no_process_cgroup_or_directory() -> Result<()> {
    let mut owner = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args(["hold", "orphan"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .context("starting the owner")?;
    let name = format!("lab-orphan-{}", owner.id());
    let cgroup = Cgroup::root()?.child(&name);
    let mut line = String::new();
    let stdout = owner.stdout.take().context("its output")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    ensure!(cgroup.path().exists(), "the owner said {line}");
    owner.kill()?;
    owner.wait()?;
    let directory = format!("/run/ebpf-router-lab/orphan-{}", owner.id());
    wait_for("the keeper to clean up", DEADLINE, || {
        Ok((!cgroup.path().exists() && !Path::new(&directory).exists()).then_some(()))
    })
}
