// SPDX-License-Identifier: Apache-2.0
use std::{
    ffi::OsString,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex, MutexGuard},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::{
    Cgroup, DEADLINE, Finished, Namespace, Place, Pod, Process,
    network::{HOST_IF, OVERLAY_IF, host_address, plug_number},
    process, program, wait_for,
};

/// One of the two hosts, with what runs on it.
pub struct Host {
    /// 1 or 2; part of every address.
    pub index: u8,
    pub name: String,
    pub address: Ipv4Addr,
    cgroup: Cgroup,
    place: Place,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    pods: u8,
    starts: u32,
    router: Option<Process>,
    forwarder: Option<Process>,
    /// Where both have their sockets, if not in the host's directory.
    sockets: Option<PathBuf>,
    logs: Logs,
}

/// What becomes of what router and forwarder log.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Logs {
    #[default]
    Kept,
    /// It finds no room.
    Lost,
    /// Nobody reads it.
    Blocked,
}

/// How a router is started.
#[derive(Clone, Default)]
pub struct RouterOptions {
    /// Rules; without them, a rule that matches every pair of pods.
    pub rules: Option<PathBuf>,
    /// Leave connections on the host network when stopped.
    pub leave: bool,
    /// More arguments and variables, which win over the lab's own.
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

impl RouterOptions {
    pub fn with_rules(rules: &Path) -> RouterOptions {
        RouterOptions { rules: Some(rules.to_owned()), ..RouterOptions::default() }
    }

    pub fn with(mut self, name: &str, value: &str) -> RouterOptions {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// What the files `pods` and `pods6` of a host's rules say at first.
pub const RULE_FOR_ALL_PODS: &str =
    "type=cidr\nname=pods\nfrom=10.244.0.0/16\nto=10.244.0.0/16\nreverse=false\n";
/// Instead of it: no pod of the lab is there.
pub const RULE_FOR_OTHERS: &str = "type=cidr\nname=others\nfrom=198.51.100.0/24\n";
pub const RULE_FOR_ALL_PODS_V6: &str =
    "type=cidr\nname=pods6\nfrom=fd00:10:244::/48\nto=fd00:10:244::/48\nreverse=false\n";

impl Host {
    pub(crate) fn new(index: u8, lab: &Cgroup, directory: &Path) -> Result<Host> {
        let name = format!("h{index}");
        let directory = directory.join(&name);
        let bpffs = directory.join("bpf");
        std::fs::create_dir_all(&bpffs)?;
        let cgroup = lab.child(&name);
        let system = cgroup.child("system");
        system.make()?;
        let rules = directory.join("rules");
        std::fs::create_dir_all(&rules)?;
        std::fs::write(rules.join("pods"), RULE_FOR_ALL_PODS)?;
        std::fs::write(rules.join("pods6"), RULE_FOR_ALL_PODS_V6)?;
        let place = Place {
            network: Arc::new(Namespace::network()?),
            mounts: Some(Arc::new(Namespace::mounts_with_bpffs(&bpffs)?)),
            cgroup: system,
            directory,
        };
        Ok(Host { index, name, address: host_address(index), cgroup, place, state: Mutex::default() })
    }

    /// Where the host's own programs run.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The cgroup of this host's containers and programs.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A new pod on this host.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let index = {
            let mut state = self.state();
            state.pods += 1;
            plug_number(state.pods)
        };
        Pod::new(self, index, name, &self.cgroup).with_context(|| format!("pod {name} on {}", self.name))
    }

    /// Where this host's certificate is.
    pub fn tls(&self) -> PathBuf {
        self.place.directory.join("tls")
    }

    /// The settings of this host's router.
    pub fn environment(&self) -> Vec<(String, OsString)> {
        let file = |name: &str| self.place.directory.join(name).into_os_string();
        let socket = |name: &str| self.socket(name).into_os_string();
        let pins = self.place.directory.join("bpf/ebpf-router").into_os_string();
        let log_level = std::env::var_os("LAB_LOGLEVEL").unwrap_or_else(|| "INFO".into());
        [
            ("OVERLAY_IF", OVERLAY_IF.into()),
            ("HOST_IF", HOST_IF.into()),
            ("ROUTER_LOGLEVEL", log_level.clone()),
            ("ROUTER_RULES", file("rules")),
            ("ROUTER_TLS", self.tls().into_os_string()),
            ("ROUTER_FORWARDER", socket("forwarder.sock")),
            ("ROUTER_CONTROL", socket("router.sock")),
            ("ROUTER_CGROUP", self.cgroup.path().into()),
            ("ROUTER_PINS", pins),
            ("FORWARDER_LOGLEVEL", log_level),
        ]
        .map(|(name, value): (&str, OsString)| (name.to_owned(), value))
        .into()
    }

    /// Starts the forwarder and waits until it listens.
    pub fn start_forwarder(&self) -> Result<()> {
        self.start_forwarder_as(Command::new(program("forwarder")?))
    }

    /// As [`Host::start_forwarder`], with one that kills itself at a point of a move: see `forwarder/src/fault.rs`.
    pub fn start_forwarder_with_fault(&self, fault: &str) -> Result<()> {
        let mut command = Command::new(program("forwarder-with-faults")?);
        command.env("FORWARDER_FAULT", fault);
        self.start_forwarder_as(command)
    }

    /// Starts a forwarder that is not expected to stay.
    pub fn spawn_forwarder(&self) -> Result<Process> {
        self.spawn_forwarder_as(Command::new(program("forwarder")?))
    }

    fn spawn_forwarder_as(&self, mut command: Command) -> Result<Process> {
        command.arg("--socket").arg(self.socket("forwarder.sock")).envs(self.environment());
        self.start("forwarder", &mut command)
    }

    fn start_forwarder_as(&self, command: Command) -> Result<()> {
        let mut forwarder = self.spawn_forwarder_as(command)?;
        let socket = self.socket("forwarder.sock");
        wait_for(&format!("the forwarder of {} to listen", self.name), DEADLINE, || {
            forwarder.fail_if_ended()?;
            Ok(is_listening(&forwarder, &socket).then_some(()))
        })?;
        self.state().forwarder = Some(forwarder);
        Ok(())
    }

    /// Starts the router and waits until it answers.
    pub fn start_router(&self, options: &RouterOptions) -> Result<()> {
        let mut router = self.spawn_router(options)?;
        let what = format!("the router of {} to answer `router status`", self.name);
        wait_for(&what, DEADLINE, || {
            router.fail_if_ended()?;
            Ok(self.status().ok())
        })
        .with_context(|| router.stderr())?;
        self.state().router = Some(router);
        Ok(())
    }

    /// Starts a router that is not expected to stay.
    pub fn spawn_router(&self, options: &RouterOptions) -> Result<Process> {
        let mut command = Command::new(program("router")?);
        command.arg("run").args(&options.arguments).envs(self.environment());
        if let Some(rules) = &options.rules {
            command.env("ROUTER_RULES", rules);
        }
        if options.leave {
            command.arg("--leave");
        }
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        self.start("router", &mut command)
    }

    /// SIGTERM, and the router's end.
    pub fn stop_router(&self) -> Result<Finished> {
        self.terminate_router()?;
        self.wait_for_router()
    }

    pub fn terminate_router(&self) -> Result<()> {
        self.state().router.as_ref().context("no router is running")?.signal(Signal::SIGTERM)
    }

    pub fn wait_for_router(&self) -> Result<Finished> {
        let router = self.state().router.take().context("no router is running")?;
        // It takes every connection back first.
        router.wait(DEADLINE * 4)
    }

    /// SIGKILL.
    pub fn kill_router(&self) -> Result<()> {
        let router = self.state().router.take().context("no router is running")?;
        router.kill()
    }

    pub fn stop_forwarder(&self) -> Result<Finished> {
        self.terminate_forwarder()?;
        self.wait_for_forwarder()
    }

    pub fn terminate_forwarder(&self) -> Result<()> {
        self.state().forwarder.as_ref().context("no forwarder is running")?.signal(Signal::SIGTERM)
    }

    pub fn wait_for_forwarder(&self) -> Result<Finished> {
        let forwarder = self.state().forwarder.take().context("no forwarder is running")?;
        // It waits for a router that takes connections back.
        forwarder.wait(DEADLINE * 4)
    }

    /// Did the forwarder that was started end without us?
    pub fn forwarder_has_ended(&self) -> bool {
        self.state().forwarder.as_mut().is_some_and(|forwarder| forwarder.fail_if_ended().is_err())
    }

    /// SIGKILL.
    pub fn kill_forwarder(&self) -> Result<()> {
        let forwarder = self.state().forwarder.take().context("no forwarder is running")?;
        forwarder.kill()
    }

    pub fn router_pid(&self) -> Option<u32> {
        self.state().router.as_ref().map(Process::pid)
    }

    pub fn forwarder_pid(&self) -> Option<u32> {
        self.state().forwarder.as_ref().map(Process::pid)
    }

    /// What the router has logged since it was started.
    pub fn router_log(&self) -> String {
        self.state().router.as_ref().map(Process::stderr).unwrap_or_default()
    }

    /// What the forwarder has logged since it was started.
    pub fn forwarder_log(&self) -> String {
        self.state().forwarder.as_ref().map(Process::stderr).unwrap_or_default()
    }

    /// The mount namespace in which the host's programs run.
    pub(crate) fn mounts(&self) -> Result<&Namespace> {
        self.place.mounts.as_deref().context("a host has mounts of its own")
    }

    pub(crate) fn put_sockets(&self, directory: PathBuf) {
        self.state().sockets = Some(directory);
    }

    /// From now on, what router and forwarder log goes to a device that is full.
    pub fn lose_logs(&self) {
        self.state().logs = Logs::Lost;
    }

    /// From now on, what router and forwarder log goes to a pipe that is full and that nobody reads.
    pub fn block_logs(&self) {
        self.state().logs = Logs::Blocked;
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.state().sockets.as_ref().unwrap_or(&self.place.directory).join(name)
    }

    /// The files that programs have pinned in this host's bpf file system.
    pub fn pins(&self) -> Result<Vec<PathBuf>> {
        let mounts = self.mounts()?;
        let root = self.place.directory.join("bpf");
        mounts.run(|| {
            let mut pins = Vec::new();
            let mut left = vec![root];
            while let Some(directory) = left.pop() {
                for entry in std::fs::read_dir(&directory)? {
                    let entry = entry?;
                    if entry.file_type()?.is_dir() {
                        left.push(entry.path());
                    } else if !entry.file_name().to_string_lossy().ends_with(".debug") {
                        pins.push(entry.path());
                    }
                }
            }
            Ok(pins)
        })
    }

    /// Puts a rule into the directory that routers read by default, in place of the one of this name, while they run.
    pub fn replace_rule(&self, name: &str, text: &str) -> Result<()> {
        // At once: a router that reads in between must not see half a rule.
        let new = self.place.directory.join(format!("{name}.new"));
        std::fs::write(&new, text)?;
        std::fs::rename(&new, self.place.directory.join("rules").join(name))
            .with_context(|| format!("replacing the rule {name} of {}", self.name))
    }

    /// A directory with one rule in it, for [`RouterOptions::with_rules`].
    pub fn write_rules(&self, name: &str, text: &str) -> Result<PathBuf> {
        let directory = self.place.directory.join(format!("rules-{name}"));
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join(name), text)?;
        Ok(directory)
    }

    pub fn show_logs(&self) {
        let state = self.state();
        for process in [&state.router, &state.forwarder].into_iter().flatten() {
            process.show();
        }
    }

    fn start(&self, name: &str, command: &mut Command) -> Result<Process> {
        let (number, logs) = {
            let mut state = self.state();
            state.starts += 1;
            (state.starts, state.logs)
        };
        let name_of_logs = format!("{name}-{number}");
        let process = match logs {
            Logs::Kept => self.place.spawn(&name_of_logs, command)?,
            Logs::Lost => self
                .place
                .spawn(&name_of_logs, &mut through_shell(command, "exec \"$0\" \"$@\" 2>/dev/full"))?,
            Logs::Blocked => {
                let pipe = self.place.directory.join(format!("{name_of_logs}.pipe"));
                let pipe = pipe.display();
                let script =
                    format!("mkfifo {pipe}; exec 2<>{pipe}; head -c 65536 /dev/zero >&2; exec \"$0\" \"$@\"");
                self.place.spawn(&name_of_logs, &mut through_shell(command, &script))?
            }
        };
        ensure!(Path::new(&format!("/proc/{}", process.pid())).exists(), "{name} did not start");
        Ok(process)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The same command, started by a script.
fn through_shell(command: &Command, script: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).arg(command.get_program()).args(command.get_args());
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell
}

/// As the kernel lists it: flag 00010000 is `__SO_ACCEPTCON`.
fn is_listening(process: &process::Process, socket: &Path) -> bool {
    let sockets = std::fs::read_to_string(format!("/proc/{}/net/unix", process.pid())).unwrap_or_default();
    let path = socket.to_string_lossy();
    sockets.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(3) == Some(&"00010000") && fields.get(7) == Some(&path.as_ref())
    })
}
