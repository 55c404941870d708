// SPDX-License-Identifier: Apache-2.0
//! The command line and the environment. Each setting is a flag and a variable of the same name; the flag wins.

use std::{
    ffi::OsStr,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand, builder::Resettable};
use forwarder_api::ConnId;
use log::LevelFilter;

use crate::{
    cluster::ClusterSettings,
    commands::Asked,
    encryption::EncryptionSettings,
    seccomp::SeccompSettings,
    trust::{TrustSettings, pki::PkiCommand},
    workload::WorkloadSettings,
};

/// Moves live TCP connections of containers off the overlay network and onto the hosts' own network.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub run: Settings,
}

#[derive(Subcommand)]
pub enum Command {
    /// Run the router (the default).
    Run(Settings),
    /// Is the router up, are its forwarder and its peers reached, how many connections are swapped, how many refused and why.
    Status(Question),
    /// The connections that the router knows: path, age, bytes, pause of the swap, reason if refused.
    Flows {
        #[command(flatten)]
        question: Question,
        /// Show them on the terminal as they change.
        #[arg(long, conflicts_with = "json")]
        watch: bool,
    },
    /// Why a connection is where it is, step by step; of a process, all its connections.
    Explain {
        /// As `router flows` names it, its addresses as LOCAL-REMOTE, or a process id.
        #[arg(value_name = "CONN|LOCAL-REMOTE|PID")]
        what: Asked,
        #[command(flatten)]
        question: Question,
    },
    /// The hosts of other ends: address, how it was found, whether its router is reached and since when, connections.
    Peers(Question),
    /// Move one connection onto the host network now.
    Swap {
        /// As `router flows` names it.
        conn: Conn,
        #[command(flatten)]
        control: Control,
    },
    /// Move a connection, or all, back to the overlay, and leave it there until `router swap`.
    SwapBack {
        /// As `router flows` names it.
        #[arg(required_unless_present = "all")]
        conn: Option<Conn>,
        /// All connections that are swapped.
        #[arg(long, conflicts_with = "conn")]
        all: bool,
        #[command(flatten)]
        control: Control,
    },
    /// Let a stop within the next minute leave connections on the host network: another router takes them over.
    Leave(Control),
    /// Does this host have what the router needs? Each line says ok, or what to do.
    Check(Settings),
    /// Make certificates with which routers know each other.
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Print the connections that containers make and accept, until interrupted. Nothing is swapped.
    Trace(Settings),
}

#[derive(Args)]
pub struct Question {
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub control: Control,
}

#[derive(Args)]
pub struct Control {
    /// Unix socket of the running router.
    #[arg(long = "control", env = "ROUTER_CONTROL", default_value = CONTROL, value_name = "PATH")]
    pub path: PathBuf,
}

const CONTROL: &str = "/run/ebpf-router/router.sock";

/// How the router is to run.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Interface of the overlay network, such as flannel.1 or tunl0: routes through it tell where a peer is. Without it, the
    /// VXLAN or IPIP interface that has routes to other hosts.
    #[arg(long, env = "OVERLAY_IF", value_name = "NAME", default_value = "", hide_default_value = true)]
    pub overlay_if: String,

    /// Interface of the hosts' own network: its IPv4 address is where swapped connections come and go. Without it, the one
    /// that carries the overlay, or has the default route.
    #[arg(long, env = "HOST_IF", value_name = "NAME", default_value = "", hide_default_value = true)]
    pub host_if: String,

    /// TCP port on which routers speak to each other, the same on all hosts.
    #[arg(long, env = "ROUTER_PORT", default_value_t = 1234, value_name = "PORT", value_parser = port)]
    pub router_port: u16,

    /// How much to log: ERROR, WARNING, INFO or DEBUG.
    #[arg(long = "loglevel", env = "ROUTER_LOGLEVEL", default_value = "INFO", value_name = "LEVEL", value_parser = log_level)]
    pub log_level: LevelFilter,

    /// How lines of the log look: text, or json (one object a line).
    #[arg(long, env = "ROUTER_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    pub log_format: logging::Format,

    /// Rules: a directory with one file a rule (a mounted ConfigMap) or a ConfigMap's manifest. With Kubernetes, only until its
    /// ConfigMap was read.
    #[arg(long, env = "ROUTER_RULES", default_value = "/etc/rules", value_name = "PATH")]
    pub rules: PathBuf,

    #[command(flatten)]
    pub workloads: WorkloadSettings,

    /// YAML file that says which host holds which overlay addresses; asked after Kubernetes, before the routes of OVERLAY_IF.
    #[arg(long, env = "ROUTER_PEERS", value_name = "FILE")]
    pub peers: Option<PathBuf>,

    /// Unix socket of this host's forwarder.
    #[arg(
        long,
        env = "ROUTER_FORWARDER",
        default_value = "/run/ebpf-router/forwarder.sock",
        value_name = "PATH"
    )]
    pub forwarder: PathBuf,

    /// Unix socket on which `router status` and the other commands find this router; made with mode 0600.
    #[arg(long, env = "ROUTER_CONTROL", default_value = CONTROL, value_name = "PATH")]
    pub control: PathBuf,

    /// Directory of the cgroup (v2) that holds this host's containers and this router; without it, the whole host.
    #[arg(long, env = "ROUTER_CGROUP", value_name = "PATH")]
    pub cgroup: Option<PathBuf>,

    /// Directory on a bpf file system for what must outlive the router: the addresses that swapped sockets show.
    #[arg(long, env = "ROUTER_PINS", default_value = "/sys/fs/bpf/ebpf-router", value_name = "PATH")]
    pub pins: PathBuf,

    /// When stopped, leave connections on the host network. Without it, all go back to the overlay.
    #[arg(long, env = "ROUTER_LEAVE", num_args = 0..=1, default_missing_value = "true", default_value = "false",
          value_name = "true|false", action = clap::ArgAction::Set)]
    pub leave: bool,

    /// How long an application may stand still in one swap, milliseconds.
    #[arg(long, env = "FREEZE_BUDGET_MS", default_value_t = 100, value_name = "MS", value_parser = freeze_budget)]
    pub freeze_budget_ms: u32,

    #[command(flatten)]
    pub trust: TrustSettings,
    #[command(flatten)]
    pub see: See,
    #[command(flatten)]
    pub cluster: ClusterSettings,
    #[command(flatten)]
    pub confinement: SeccompSettings,
    #[command(flatten)]
    pub encryption: EncryptionSettings,
}

/// The command line and the environment of this process.
pub fn parse() -> Result<Arguments, clap::Error> {
    let mut matches = without_empty_variables(Arguments::command()).try_get_matches()?;
    Arguments::from_arg_matches_mut(&mut matches)
}

/// A variable that is set to nothing counts as not set: manifests and files of units have such.
fn without_empty_variables(command: clap::Command) -> clap::Command {
    let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
    command
        .mut_args(|arg| if arg.get_env().is_some_and(is_empty) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(without_empty_variables)
}

fn port(text: &str) -> Result<u16, String> {
    let port = text.parse().ok().filter(|port| *port > 0);
    port.ok_or_else(|| "expected a port, 1 to 65535".into())
}

fn freeze_budget(text: &str) -> Result<u32, String> {
    let budget = text.parse().ok().filter(|budget| (1..=1000).contains(budget));
    budget.ok_or_else(|| "expected a number of milliseconds, 1 to 1000".into())
}

/// Where the router shows what it does.
#[derive(Args, Clone, Debug)]
pub struct See {
    /// Address of the Prometheus metrics, such as 127.0.0.1:9464; without it, there are none.
    #[arg(long, env = "ROUTER_METRICS", value_name = "ADDRESS:PORT", value_parser = address)]
    pub metrics: Option<SocketAddr>,

    /// Address of the web page, such as 127.0.0.1:9465; without it, there is none. It only shows, but to everybody who
    /// reaches it.
    #[arg(long, env = "ROUTER_WEB", value_name = "ADDRESS:PORT", value_parser = address)]
    pub web: Option<SocketAddr>,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    // A manifest's `$(POD_IP):9464` has no brackets where the node's address is IPv6.
    let bare = || {
        let (address, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(IpAddr::V6(address.parse().ok()?), port.parse().ok()?))
    };
    let expected = "expected an address and a port, such as 127.0.0.1:9464 or [::1]:9464";
    text.parse().ok().or_else(bare).ok_or_else(|| expected.into())
}

/// A connection's name on the command line.
#[derive(Clone, Copy)]
pub struct Conn(pub ConnId);

impl std::str::FromStr for Conn {
    type Err = String;

    fn from_str(text: &str) -> Result<Conn, String> {
        let digits = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = if digits { u64::from_str_radix(text, 16).ok() } else { None };
        number
            .map(|number| Conn(ConnId(number)))
            .ok_or_else(|| "expected 16 hexadecimal digits, as in the column CONN of `router flows`".into())
    }
}

fn log_level(text: &str) -> Result<LevelFilter, String> {
    match text {
        "ERROR" => Ok(LevelFilter::Error),
        "WARNING" => Ok(LevelFilter::Warn),
        "INFO" => Ok(LevelFilter::Info),
        "DEBUG" => Ok(LevelFilter::Debug),
        _ => Err("expected ERROR, WARNING, INFO or DEBUG".into()),
    }
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingError {
    #[error(
        "no cgroup2 is mounted: mount it (mount -t cgroup2 none /sys/fs/cgroup/unified), or give --cgroup"
    )]
    NoCgroup2,
}

impl Settings {
    pub fn scope(&self) -> Result<PathBuf, SettingError> {
        self.cgroup.clone().or_else(cgroup2_mount).ok_or(SettingError::NoCgroup2)
    }
}

/// Where the version 2 hierarchy is mounted: alone, or beside version 1.
pub fn cgroup2_mount() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn run_is_the_default_command() {
        let parsed = Arguments::try_parse_from(["router", "--overlay-if", "flannel.1"]).unwrap();
        assert!(parsed.command.is_none());
        assert_eq!(parsed.run.overlay_if, "flannel.1");
    }

    #[test]
    fn a_flag_without_a_value_leaves_connections() {
        assert!(Arguments::try_parse_from(["router", "--leave"]).unwrap().run.leave);
        assert!(!Arguments::try_parse_from(["router"]).unwrap().run.leave);
    }

    #[test]
    fn a_connection_is_named_by_sixteen_digits() {
        assert_eq!("00000000000000ff".parse::<Conn>().map(|conn| conn.0), Ok(ConnId(255)));
        assert!("ff".parse::<Conn>().is_err());
        assert!("+0000000000000ff".parse::<Conn>().is_err());
    }

    #[test]
    fn an_address_to_listen_at_is_one_with_a_port() {
        for (text, expected) in [
            ("192.0.2.1:9464", "192.0.2.1:9464"),
            ("[2001:db8::1]:9464", "[2001:db8::1]:9464"),
            ("2001:db8::1:9464", "[2001:db8::1]:9464"),
        ] {
            assert_eq!(address(text), Ok(expected.parse().unwrap()), "{text}");
        }
        for wrong in ["192.0.2.1", "9464", ":9464", "::1", "node:9464", "192.0.2.1:"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_wrong_value_is_named_with_what_is_expected() {
        for (flag, value, expected) in [
            ("--loglevel", "LOUD", "expected ERROR"),
            ("--router-port", "http", "expected a port, 1 to 65535"),
            ("--router-port", "0", "expected a port, 1 to 65535"),
            ("--freeze-budget-ms", "100ms", "expected a number of milliseconds, 1 to 1000"),
            ("--freeze-budget-ms", "5000", "expected a number of milliseconds, 1 to 1000"),
        ] {
            let Err(error) = Arguments::try_parse_from(["router", flag, value]) else { panic!("{value}") };
            let error = error.to_string();
            assert!([flag, value, expected].iter().all(|word| error.contains(word)), "{error}");
        }
    }
}
