// SPDX-License-Identifier: Apache-2.0
//! `lab up`, `lab shell`, `lab down`: a process in the background owns the lab, a file says where it is.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use lab::{DEADLINE, Host, Lab, Place, RouterOptions, program, wait_for};
use nix::{
    sys::signal::{SigSet, Signal, kill},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

const STATE: &str = "/run/ebpf-router-lab/up.json";
const LOG: &str = "/run/ebpf-router-lab/up.log";

#[derive(Serialize, Deserialize)]
struct State {
    pid: u32,
    places: BTreeMap<String, Door>,
}

/// What it takes to enter a place.
#[derive(Serialize, Deserialize)]
struct Door {
    network: String,
    mounts: Option<String>,
    cgroup: PathBuf,
    environment: Vec<(String, String)>,
}

impl Door {
    fn to(place: &Place, host: &Host) -> Door {
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        Door {
            network: place.network.path(),
            mounts: place.mounts.as_ref().map(|mounts| mounts.path()),
            cgroup: place.cgroup.path().to_owned(),
            environment: host.environment().into_iter().map(|(name, value)| (name, text(value))).collect(),
        }
    }
}

pub fn up(with_router: bool) -> Result<()> {
    if let Some(state) = running() {
        bail!("a lab is up already (process {}); end it with `lab down`", state.pid);
    }
    std::fs::create_dir_all("/run/ebpf-router-lab").context("making /run/ebpf-router-lab; are you root?")?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["hold", "up", "--state", STATE]).args(with_router.then_some("--with-router"));
    let mut owner = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(LOG)?)
        .process_group(0)
        .spawn()
        .context("starting the lab's owner")?;
    let mut said = String::new();
    let stdout = owner.stdout.take().context("the owner's output")?;
    BufReader::new(stdout).read_line(&mut said)?;
    if said.trim() != "ready" {
        let status = owner.wait()?;
        let log = std::fs::read_to_string(LOG).unwrap_or_default();
        let _ = std::fs::remove_file(LOG);
        bail!("the lab could not be raised ({status})\n{log}");
    }
    println!("{}", std::fs::read_to_string(LOG).unwrap_or_default().trim_end());
    println!("enter with: test/script.sh lab shell h1|h2|client|server");
    Ok(())
}

pub fn down() -> Result<()> {
    let Some(state) = running() else {
        println!("no lab is up");
        return Ok(());
    };
    kill(Pid::from_raw(state.pid as i32), Signal::SIGTERM).context("SIGTERM to the lab's owner")?;
    wait_for("the lab to end", DEADLINE, || Ok(running().is_none().then_some(())))
}

pub fn shell(place: &str, command: &[String]) -> Result<()> {
    let state = running().context("no lab is up; raise one with `lab up`")?;
    let Some(door) = state.places.get(place) else {
        let known: Vec<_> = state.places.keys().map(String::as_str).collect();
        bail!("no place {place} in the lab, only {}", known.join(", "));
    };
    let mut entrance = OpenOptions::new()
        .write(true)
        .open(door.cgroup.join("cgroup.procs"))
        .context("the place's cgroup")?;
    entrance.write_all(b"0").context("moving into the place's cgroup")?;
    let mut nsenter = Command::new("nsenter");
    nsenter.arg(format!("--net={}", door.network));
    nsenter.args(door.mounts.as_ref().map(|mounts| format!("--mount={mounts}")));
    nsenter.envs(door.environment.iter().map(|(name, value)| (name, value)));
    if let Ok(router) = program("router") {
        let directory = router.parent().unwrap_or(Path::new("/")).to_owned();
        let path = std::env::var("PATH").unwrap_or_default();
        nsenter.env("PATH", format!("{}:{path}", directory.display()));
    }
    if command.is_empty() {
        nsenter.arg(std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".into()));
    } else {
        nsenter.arg("--").args(command);
    }
    Err(nsenter.exec()).context("starting nsenter")
}

/// Owns a lab until it is told to end.
pub fn hold(name: &str, state: Option<&Path>, with_router: bool) -> Result<()> {
    let lab = Lab::new(name)?;
    let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
    for pod in [&client, &server] {
        eprintln!("{} {}: {} {} {}", lab.name, pod.name, pod.v4, pod.v6, pod.place().line_to_enter());
    }
    if with_router {
        lab.start_everything(&RouterOptions::default())?;
    }
    let places = [
        (lab.h1.name.clone(), Door::to(lab.h1.place(), &lab.h1)),
        (lab.h2.name.clone(), Door::to(lab.h2.place(), &lab.h2)),
        (client.name.clone(), Door::to(client.place(), &lab.h1)),
        (server.name.clone(), Door::to(server.place(), &lab.h2)),
    ];
    if let Some(path) = state {
        let state = State { pid: std::process::id(), places: places.into() };
        std::fs::write(path, serde_json::to_vec_pretty(&state)?)?;
    }
    // After everything is started: programs inherit the mask.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    println!("ready");
    signals.wait()?;
    if with_router {
        lab.stop_everything()?;
    }
    if let Some(path) = state {
        let _ = std::fs::remove_file(path);
        let _ = std::fs::remove_file(LOG);
    }
    drop((client, server));
    drop(lab);
    Ok(())
}

/// The state of the lab that is up; a file whose owner is gone counts for nothing.
fn running() -> Option<State> {
    let state: State = serde_json::from_slice(&std::fs::read(STATE).ok()?).ok()?;
    let words = std::fs::read(format!("/proc/{}/cmdline", state.pid)).ok()?;
    words.windows(4).any(|window| window == b"hold").then_some(state)
}
