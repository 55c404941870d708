// SPDX-License-Identifier: Apache-2.0
//! The router: sees the connections of this host's containers, agrees with the peer routers on which of them move
//! off the overlay, and tells the forwarder to move them. It faces the network, so it never touches a process.

mod attachment;
mod bpf;
mod bytes;
mod check;
mod cluster;
mod commands;
mod conntrack;
mod control;
mod coordinator;
mod encryption;
mod endpoint;
mod forwarder;
mod identity;
mod lanes;
mod live;
mod metrics;
mod peers;
mod process;
mod rules;
mod saving;
mod seccomp;
mod settings;
mod stall;
mod terminal;
#[cfg(test)]
mod testing;
mod trace;
mod trust;
mod units;
pub mod untrusted;
mod web;
mod workload;

use std::{
    io::{self, Write},
    net::IpAddr,
    os::fd::AsFd,
    process::ExitCode,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::{mpsc, watch};

pub use coordinator::wire;

use cluster::{Access, Cluster, Pods};
use control::ControlSocket;
use coordinator::{Inlets, Lookup, Parts};
use identity::Identity;
use peers::{Interfaces, Peers};
use process::Processes;
use rules::RuleSet;
use settings::{Arguments, Command, Settings};
use stall::Watch;
use trace::{Scope, Side, Telling, TraceEvent, Tracer};
use trust::Trust;
use workload::{Runtimes, Told, Workloads};

/// Events of tracing that may wait; more are lost, counted.
const TRACED: usize = 16384;
const WISHES: usize = 64;
/// So many tasks run between two looks at what has come: in a burst, hundreds are ready.
const TASKS_AT_ONCE: u32 = 4;
/// Rules that were read and not taken yet: who reads them waits.
const READINGS: usize = 4;

/// The program, from its command line to its end.
pub fn main() -> ExitCode {
    let arguments = match settings::parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match obey(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_end_of_reader(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Not to panic where nobody takes it, as on a full disk.
            let _ = writeln!(std::io::stderr(), "error: {}", in_one_line(&error));
            ExitCode::FAILURE
        }
    }
}

/// As of `router flows | head`: it has read what it wanted.
fn is_end_of_reader(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// Many errors tell their cause by themselves: it is said once.
fn in_one_line(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .reduce(|said, cause| if said.contains(&cause) { said } else { format!("{said}: {cause}") })
        .unwrap_or_default()
}

fn obey(arguments: Arguments) -> Result<()> {
    match arguments.command.unwrap_or(Command::Run(arguments.run)) {
        Command::Run(settings) => start(settings, run),
        Command::Check(settings) => start(settings, check),
        Command::Trace(settings) => start(settings, print_traced),
        Command::Status(question) => commands::status(&question),
        Command::Flows { question, watch: true } => terminal::run(&question.control.path),
        Command::Flows { question, watch: false } => commands::flows(&question),
        Command::Explain { what, question } => commands::explain(what, question.json, &question.control.path),
        Command::Peers(question) => commands::peers(&question),
        Command::Leave(control) => commands::leave(&control.path),
        Command::Swap { conn, control } => commands::swap(conn.0, &control.path),
        Command::Pki(command) => Ok(commands::show(&format!("{}\n", trust::pki::obey(&command)?))?),
        Command::SwapBack { conn, control, .. } => commands::swap_back(conn, &control.path),
    }
}

/// Memory that is kept between bursts.
const KEPT_BYTES: usize = 128 << 10;

fn start<F: Future<Output = Result<()>>>(settings: Settings, what: impl FnOnce(Settings) -> F) -> Result<()> {
    let kept = memory::keep(KEPT_BYTES);
    raise_descriptor_limit().context("raising RLIMIT_NOFILE")?;
    // Before the first thread, which inherits it, and before anything of the network is read.
    privileges::keep_only(&privileges::ROUTER)?;
    seccomp::confine(settings.confinement.seccomp)?;
    // Of an API server that is away `cluster::Reach` tells, once.
    let silent = ["netlink", "kube_client"];
    let _log = logging::start(settings.log_level, settings.log_format, &silent);
    if let Err(error) = kept {
        log::warn!("{error}");
    }
    // What libbpf prints explains our own errors.
    libbpf_rs::set_print(Some((libbpf_rs::PrintLevel::Debug, |_, text| log::debug!("{}", text.trim_end()))));
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().event_interval(TASKS_AT_ONCE).build()?;
    runtime.block_on(what(settings))
}

/// Each move needs connections of its own for a while. The usual limit is for programs that use select(2).
fn raise_descriptor_limit() -> nix::Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)
}

async fn run(settings: Settings) -> Result<()> {
    if let Some(obstacle) = check::obstacle(&check::judge(&check::probe(&settings).await)) {
        bail!("{obstacle}");
    }
    let (readings, rules_read) = mpsc::channel(READINGS);
    let access = Access::find(&settings.cluster).await?;
    // With Kubernetes they may come from the ConfigMap alone.
    let rules = match &access {
        Some(_) if !settings.rules.exists() => RuleSet::awaited(),
        Some(_) | None => {
            let rules = RuleSet::load(&settings.rules)?;
            tokio::spawn(rules::watch_path(settings.rules.clone(), readings.clone()));
            rules
        }
    };
    let netlink = peers::netlink()?;
    let interfaces = Interfaces::find(&netlink, &settings.overlay_if, &settings.host_if).await?;
    let cluster = match access {
        Some(access) => Some(Cluster::start(access, interfaces.addresses.clone(), readings).await?),
        None => None,
    };
    let pods = cluster.as_ref().map(|cluster| cluster.pods.clone()).unwrap_or_default();
    let (workloads, told) = workloads(&settings, pods.clone())?;
    let IpAddr::V4(host_address) = interfaces.host_address else { bail!("HOST_IF has no IPv4 address") };
    let trust = Trust::open(&settings.trust, interfaces.host_address)?;
    log::info!("interfaces: {}", interfaces.found);
    let peers = Peers::load(settings.peers.as_deref(), pods, netlink.clone())?;
    let listener = coordinator::listen(settings.router_port).map_err(|error| {
        anyhow!(
            "ROUTER_PORT={}: cannot be listened on: {error}; is another router running? If not, give all routers a port that is free",
            settings.router_port
        )
    })?;
    let control = ControlSocket::open(&settings.control)?;
    let (wishes, from_control) = mpsc::channel(WISHES);
    web::start(&settings.see, interfaces.host_address, wishes.clone())?;
    let scope_path = settings.scope()?;
    let scope = Scope::of(&scope_path)?;
    let identity = Identity::attach(&scope_path, &settings.pins)?;
    let (traced, from_trace) = mpsc::channel(TRACED);
    let number = rules.len();
    let (rules, rules_of_tracer) = watch::channel(rules);
    let tracer = Tracer::start(&scope, identity.map(), Telling::WhenOldEnough(rules_of_tracer), traced)?;
    let processes = Processes::load(&scope)?;
    let watch = Watch::start(identity.map())?;
    log::info!("swapped connections are watched {}", watch.way());
    log::info!(
        "tracing in {}, {} rules, routers on port {}, commands at {}",
        scope_path.display(),
        number,
        settings.router_port,
        settings.control.display()
    );
    let lookup = Lookup::new(netlink, interfaces, peers, workloads, processes, rules)?;
    let serving = tokio::spawn(control.serve(wishes));
    let kubernetes = cluster.map(|cluster| cluster.reach);
    let parts = Parts { settings, host_address, lookup, identity, scope, tracer, watch, trust, kubernetes };
    let inlets =
        Inlets { traced: from_trace, told, peers: listener, wishes: from_control, rules: rules_read };
    let result = coordinator::run(parts, inlets).await;
    // Its socket goes with it.
    serving.abort();
    let _ = serving.await;
    result
}

async fn check(settings: Settings) -> Result<()> {
    let mut lines = check::judge(&check::probe(&settings).await);
    if check::obstacle(&lines).is_none() {
        lines.push(check::programs(&settings));
    }
    for line in &lines {
        commands::show(&format!("{line}\n"))?;
    }
    match check::obstacle(&lines) {
        None => Ok(()),
        Some(_) => bail!("the router cannot run on this host as it is"),
    }
}

async fn print_traced(settings: Settings) -> Result<()> {
    let mut lines = check::judge(&check::probe(&settings).await);
    lines.retain(|line| ["BTF", "capabilities", "cgroup"].contains(&line.what));
    if let Some(obstacle) = check::obstacle(&lines) {
        bail!("{obstacle}");
    }
    let (mut workloads, mut told) = workloads(&settings, Pods::default())?;
    let scope_path = settings.scope()?;
    let scope = Scope::of(&scope_path)?;
    // What a router has attached and pinned is not touched.
    let nobody = identity::nobody()?;
    let mut processes = Processes::load(&scope)?;
    let (traced, mut from_trace) = mpsc::channel(TRACED);
    let _tracer = Tracer::start(&scope, nobody.as_fd(), Telling::AtOnce, traced)?;
    log::info!("tracing in {}", scope_path.display());
    let interrupted = tokio::signal::ctrl_c();
    tokio::pin!(interrupted);
    loop {
        tokio::select! {
            Some(event) = from_trace.recv() => if let TraceEvent::Connection(seen) = event {
                let verb = if seen.side == Side::Client { "connect" } else { "accept " };
                let process = processes.find(seen.cgroup_id, seen.netns)?;
                let workload = process.map(|tgid| workloads.of_process(tgid)).transpose()?.unwrap_or_default();
                commands::show(&format!("{verb} {} - {} by {}\n", seen.local, seen.remote, workload.name))?;
            },
            Some(said) = told.recv() => workloads.learn(said),
            _ = &mut interrupted => return Ok(()),
        }
    }
}

fn workloads(settings: &Settings, pods: Pods) -> Result<(Workloads, mpsc::Receiver<Told>)> {
    let settings = &settings.workloads;
    Ok(Workloads::open(settings.labels.as_deref(), Runtimes::new(&settings.runtime)?, pods)?)
}
