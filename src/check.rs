// SPDX-License-Identifier: Apache-2.0
//! Does this host have what the router needs? [`probe`] looks, [`judge`] decides, `router check` and the start of the
//! router show. What the start finds by itself, `router check` has from [`programs`].

use std::{
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
};

use tokio::sync::mpsc;

use crate::{
    cluster::{Access, CONFIG_MAP},
    conntrack::Conntrack,
    encryption, identity,
    peers::{Interfaces, PeerError, StaticPeers},
    process::Processes,
    rules::RuleSet,
    settings::Settings,
    stall,
    trace::{Scope, Telling, Tracer},
    trust::Tls,
    workload::{LabelsFile, Runtimes},
};

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// This host, as far as the router depends on it.
#[derive(Clone, Debug)]
pub struct Facts {
    pub kernel: String,
    pub has_btf: bool,
    /// Those that are missing, and what for.
    pub missing_capabilities: Vec<(String, &'static str)>,
    pub interfaces: Result<String, String>,
    /// Is connection tracking asked about translated addresses, or why not.
    pub conntrack: Result<(), String>,
    /// What encrypts the overlay, and whether that may be bypassed.
    pub encrypted_by: Option<String>,
    pub bypass_encryption: bool,
    /// The directory with this host's containers; whether it is a cgroup2 directory and holds this process.
    pub scope: Result<PathBuf, String>,
    pub scope_is_cgroup2: bool,
    pub scope_holds_us: bool,
    pub pins: PathBuf,
    pub pins_on_bpffs: bool,
    pub tls: Tls,
    /// Container runtimes that are here: the name of each, or why it does not answer.
    pub runtimes: Vec<Result<String, String>>,
    /// What ROUTER_LABELS and ROUTER_PEERS say; None: they are not given.
    pub labels: Option<Result<(), String>>,
    pub peers: Option<Result<(), String>>,
    /// How many, or where from.
    pub rules: Result<String, String>,
    /// The API server, and whether it answers; None: none is asked.
    pub kubernetes: Option<Kubernetes>,
    pub forwarder: PathBuf,
    pub forwarder_answers: bool,
}

#[derive(Clone, Debug)]
pub struct Kubernetes {
    pub server: String,
    pub answer: Result<(), String>,
}

/// One line of `router check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    pub what: &'static str,
    pub finding: Finding,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    Ok(String),
    /// The router runs, but nothing will be swapped.
    Waits(String),
    /// The router cannot run.
    Missing(String),
}

/// Look at this host.
pub async fn probe(settings: &Settings) -> Facts {
    let scope = settings.scope().map_err(|error| error.to_string());
    let missing_capabilities = privileges::missing(&privileges::ROUTER)
        .into_iter()
        .map(|need| (need.capability.to_string(), need.reason))
        .collect();
    let interfaces = interfaces(settings).await.map_err(|error| error.to_string());
    let (kubernetes, rules) = match Access::find(&settings.cluster).await {
        Ok(access) => {
            let rules = rules(settings, access.as_ref());
            let kubernetes = match access {
                Some(access) => Some(Kubernetes { server: access.server(), answer: access.probe().await }),
                None => None,
            };
            (kubernetes, rules)
        }
        Err(error) => (None, Err(error.to_string())),
    };
    let host_address = interfaces.as_ref().ok().map(|found| found.host_address);
    let kind_of = |path: &Path| nix::sys::statfs::statfs(path).map(|statfs| statfs.filesystem_type()).ok();
    let holds_us = |scope: &PathBuf| holds(scope, std::process::id());
    let existing = settings.pins.ancestors().find(|path| path.exists());
    Facts {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned(),
        has_btf: Path::new(BTF).exists(),
        missing_capabilities,
        encrypted_by: encrypted_by(interfaces.as_ref().ok()).await,
        interfaces: interfaces.map(|found| found.found),
        conntrack: Conntrack::open().map(drop).map_err(|error| error.to_string()),
        bypass_encryption: settings.encryption.bypass_encryption,
        scope_is_cgroup2: scope
            .as_deref()
            .is_ok_and(|scope| kind_of(scope) == Some(nix::sys::statfs::CGROUP2_SUPER_MAGIC)),
        scope_holds_us: scope.as_ref().is_ok_and(holds_us),
        scope,
        pins: settings.pins.clone(),
        pins_on_bpffs: existing.is_some_and(|path| kind_of(path) == Some(nix::sys::statfs::BPF_FS_MAGIC)),
        tls: Tls::look(&settings.trust, host_address),
        runtimes: runtimes(settings).await,
        labels: settings.workloads.labels.as_deref().map(|path| reads(LabelsFile::load(path))),
        peers: settings.peers.as_deref().map(|path| reads(StaticPeers::load(path))),
        rules,
        kubernetes,
        forwarder: settings.forwarder.clone(),
        forwarder_answers: UnixStream::connect(&settings.forwarder).is_ok(),
    }
}

fn reads<T, E: ToString>(file: Result<T, E>) -> Result<(), String> {
    file.map(drop).map_err(|error| error.to_string())
}

async fn interfaces(settings: &Settings) -> Result<Interfaces, PeerError> {
    Interfaces::find(&crate::peers::netlink()?, &settings.overlay_if, &settings.host_if).await
}

async fn runtimes(settings: &Settings) -> Vec<Result<String, String>> {
    let runtimes = match Runtimes::new(&settings.workloads.runtime) {
        Ok(runtimes) => runtimes,
        Err(error) => return vec![Err(error.to_string())],
    };
    let found = runtimes.probe().await.into_iter().map(|(socket, answer)| {
        let socket = socket.display();
        answer.map(|name| format!("{name} at {socket}")).map_err(|error| format!("{socket}: {error}"))
    });
    found.collect()
}

fn rules(settings: &Settings, access: Option<&Access>) -> Result<String, String> {
    let config_map = access.map(|access| format!("ConfigMap {}/{CONFIG_MAP}", access.namespace));
    match config_map {
        Some(config_map) if !settings.rules.exists() => Ok(config_map),
        config_map => {
            let count = RuleSet::load(&settings.rules).map_err(|error| error.to_string())?.len();
            let until = config_map.map(|map| format!(", until {map} was read")).unwrap_or_default();
            Ok(format!("{count} in {}{until}", settings.rules.display()))
        }
    }
}

/// An error is told by the interfaces' own line.
async fn encrypted_by(found: Option<&Interfaces>) -> Option<String> {
    let netlink = crate::peers::netlink().ok()?;
    let interfaces = encryption::interfaces(&netlink).await.ok()?;
    let found = found?;
    encryption::encrypted_by(&interfaces, &found.overlay_if, &found.host_if)
}

/// Is this process in this cgroup, or below? The kernel's lists tell: by path nobody knows where he is who has a cgroup
/// namespace of his own, as a container.
fn holds(cgroup: &Path, pid: u32) -> bool {
    let listed = std::fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let below = || {
        let entries = std::fs::read_dir(cgroup).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    };
    listed.lines().any(|line| line.parse() == Ok(pid)) || below().any(|entry| holds(&entry.path(), pid))
}

/// What the facts mean, one line each.
pub fn judge(facts: &Facts) -> Vec<Line> {
    let line = |what, finding| Line { what, finding };
    let of = |result: &Result<String, String>| match result {
        Ok(text) => Finding::Ok(text.clone()),
        Err(error) => Finding::Missing(error.clone()),
    };
    let needs = |there, text: String, otherwise: String| {
        if there { Finding::Ok(text) } else { Finding::Missing(otherwise) }
    };
    let missing: Vec<String> = facts
        .missing_capabilities
        .iter()
        .map(|(name, what_for)| format!("{name} is missing, which is needed {what_for}"))
        .collect();
    vec![
        line("kernel", Finding::Ok(facts.kernel.clone())),
        line(
            "BTF",
            needs(
                facts.has_btf,
                BTF.into(),
                format!("{BTF} does not exist: run a kernel built with CONFIG_DEBUG_INFO_BTF=y"),
            ),
        ),
        line(
            "capabilities",
            needs(
                missing.is_empty(),
                "CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN".into(),
                format!("{}: run as root, or with these capabilities added", missing.join("; ")),
            ),
        ),
        line("interfaces", of(&facts.interfaces)),
        line(
            "conntrack",
            match &facts.conntrack {
                Ok(()) => Finding::Ok("it tells what becomes of translated addresses (Services)".into()),
                Err(error) => Finding::Waits(format!(
                    "{error}: connections through a Service stay on the overlay; load nf_conntrack_netlink"
                )),
            },
        ),
        line(
            "encryption",
            match (&facts.encrypted_by, facts.bypass_encryption) {
                (None, _) => Finding::Ok("the overlay is not encrypted".into()),
                (Some(why), true) => Finding::Ok(format!("{why}; bypassed, as --bypass-encryption says")),
                (Some(why), false) => Finding::Missing(format!(
                    "the overlay is encrypted ({why}), and connections between the hosts would not be: do without the router, or accept that with --bypass-encryption (ROUTER_BYPASS_ENCRYPTION=true)"
                )),
            },
        ),
        line(
            "cgroup",
            match &facts.scope {
                Err(error) => Finding::Missing(error.clone()),
                Ok(scope) if !facts.scope_is_cgroup2 => Finding::Missing(format!(
                    "{} is no directory of a cgroup2 mount: give one with --cgroup",
                    scope.display()
                )),
                Ok(scope) if !facts.scope_holds_us => Finding::Missing(format!(
                    "{} does not hold the router itself: give a cgroup above both it and the containers",
                    scope.display()
                )),
                Ok(scope) => Finding::Ok(scope.display().to_string()),
            },
        ),
        line(
            "pins",
            needs(
                facts.pins_on_bpffs,
                facts.pins.display().to_string(),
                format!(
                    "{} is not on a bpf file system: mount one (mount -t bpf bpf /sys/fs/bpf), or give another --pins",
                    facts.pins.display()
                ),
            ),
        ),
        line("runtime", runtime(&facts.runtimes)),
        line("labels", file(&facts.labels, "the runtime alone has labels")),
        line("peers", file(&facts.peers, "Kubernetes, routes and forwarding entries tell where they are")),
        line(
            "tls",
            match &facts.tls {
                Tls::Insecure => Finding::Waits("INSECURE: --insecure believes whoever connects".into()),
                Tls::Unusable(error) => Finding::Missing(error.clone()),
                Tls::Worrying(concern) => Finding::Waits(format!("this node's certificate {concern}")),
                Tls::Good(certificate) => Finding::Ok(certificate.clone()),
            },
        ),
        line("rules", of(&facts.rules)),
        line(
            "kubernetes",
            match &facts.kubernetes {
                None => Finding::Ok("not asked".into()),
                Some(Kubernetes { server, answer: Ok(()) }) => Finding::Ok(server.clone()),
                Some(Kubernetes { server, answer: Err(error) }) => Finding::Waits(format!(
                    "{server} does not answer: {error}: the router goes on without it, and tries again"
                )),
            },
        ),
        line(
            "forwarder",
            if facts.forwarder_answers {
                Finding::Ok(facts.forwarder.display().to_string())
            } else {
                Finding::Waits(format!(
                    "none answers at {}: start `forwarder --socket PATH` on this host",
                    facts.forwarder.display()
                ))
            },
        ),
    ]
}

/// Does this kernel take the programs of a router? They are loaded, and tracing is attached, for a moment, beside those of a
/// router that may be running.
pub fn programs(settings: &Settings) -> Line {
    let finding = match load(settings) {
        Ok(found) => Finding::Ok(found),
        Err(error) => Finding::Missing(format!("{error:#}")),
    };
    Line { what: "programs", finding }
}

fn load(settings: &Settings) -> anyhow::Result<String> {
    let scope = Scope::of(&settings.scope()?)?;
    let nobody = identity::nobody()?;
    Processes::load(&scope)?;
    let (events, _) = mpsc::channel(1);
    Tracer::start(&scope, nobody.as_fd(), Telling::AtOnce, events)?;
    let watch = stall::Watch::start(nobody.as_fd())?;
    Ok(format!("the kernel takes them; swapped connections are watched {}", watch.way()))
}

fn file(found: &Option<Result<(), String>>, otherwise: &str) -> Finding {
    match found {
        None => Finding::Ok(format!("no file given: {otherwise}")),
        Some(Ok(())) => Finding::Ok("the file can be read".into()),
        Some(Err(error)) => Finding::Missing(error.clone()),
    }
}

/// Rules without labels need none.
fn runtime(found: &[Result<String, String>]) -> Finding {
    if let Some(Err(error)) = found.iter().find(|found| found.is_err()) {
        return Finding::Waits(format!(
            "{error}: start the container runtime, or give its socket with --runtime, or --runtime none"
        ));
    }
    let names: Vec<&str> = found.iter().flatten().map(String::as_str).collect();
    match names.as_slice() {
        [] => {
            Finding::Ok("none found: only ROUTER_LABELS has labels; if there is one, give --runtime".into())
        }
        names => Finding::Ok(names.join(", ")),
    }
}

/// The first thing without which the router cannot run.
pub fn obstacle(lines: &[Line]) -> Option<String> {
    lines.iter().find_map(|line| match &line.finding {
        Finding::Missing(text) => Some(text.clone()),
        Finding::Ok(_) | Finding::Waits(_) => None,
    })
}

impl std::fmt::Display for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (verdict, text) = match &self.finding {
            Finding::Ok(text) => ("ok", text),
            Finding::Waits(text) => ("wait", text),
            Finding::Missing(text) => ("MISSING", text),
        };
        write!(f, "{:<13} {verdict:<8} {text}", self.what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capable() -> Facts {
        Facts {
            kernel: "6.18.0".into(),
            has_btf: true,
            missing_capabilities: vec![],
            interfaces: Ok("flannel.1 and eth0 (192.0.2.1)".into()),
            conntrack: Ok(()),
            encrypted_by: None,
            bypass_encryption: false,
            scope: Ok("/sys/fs/cgroup".into()),
            scope_is_cgroup2: true,
            scope_holds_us: true,
            pins: "/sys/fs/bpf/ebpf-router".into(),
            pins_on_bpffs: true,
            tls: Tls::Good("192.0.2.1 until 2030-01-01T00:00:00Z".into()),
            runtimes: vec![Ok("containerd 1.6.20 at /run/containerd/containerd.sock".into())],
            labels: None,
            peers: Some(Ok(())),
            rules: Ok("2 in /etc/rules".into()),
            kubernetes: None,
            forwarder: "/run/ebpf-router/forwarder.sock".into(),
            forwarder_answers: true,
        }
    }

    fn check(change: impl FnOnce(&mut Facts), words: &str) {
        let mut facts = capable();
        change(&mut facts);
        let obstacle = obstacle(&judge(&facts)).unwrap();
        assert!(obstacle.contains(words), "{obstacle}");
    }

    #[test]
    fn a_capable_host_has_all_that_is_needed() {
        assert!(judge(&capable()).iter().all(|line| matches!(line.finding, Finding::Ok(_))));
    }

    #[test]
    fn what_is_missing_is_named_with_the_way_out() {
        check(|facts| facts.has_btf = false, "CONFIG_DEBUG_INFO_BTF");
        check(|facts| facts.missing_capabilities = vec![("CAP_BPF".into(), "to load")], "CAP_BPF is missing");
        check(|facts| facts.interfaces = Err("OVERLAY_IF=x: no such interface".into()), "OVERLAY_IF=x");
        check(|facts| facts.encrypted_by = Some("cilium_wg0".into()), "--bypass-encryption");
        check(|facts| facts.scope_is_cgroup2 = false, "--cgroup");
        check(|facts| facts.scope_holds_us = false, "does not hold the router");
        check(|facts| facts.pins_on_bpffs = false, "mount -t bpf");
        check(|facts| facts.labels = Some(Err("ROUTER_LABELS=x".into())), "ROUTER_LABELS=x");
        check(|facts| facts.peers = Some(Err("ROUTER_PEERS=x".into())), "ROUTER_PEERS=x");
        check(|facts| facts.rules = Err("rules:3: rule r".into()), "rules:3");
        check(|facts| facts.tls = Tls::Unusable("tls.crt: cannot be read".into()), "tls.crt");
    }

    #[test]
    fn a_runtime_that_does_not_answer_is_waited_for() {
        let facts = Facts { runtimes: vec![Err("/run/x.sock: no answer".into())], ..capable() };
        let lines = judge(&facts);
        assert_eq!(obstacle(&lines), None);
        assert!(
            lines
                .iter()
                .any(|line| matches!(&line.finding, Finding::Waits(text) if text.contains("--runtime")))
        );
    }

    #[test]
    fn connection_tracking_is_not_essential() {
        let facts = Facts { conntrack: Err("it cannot be asked".into()), ..capable() };
        let lines = judge(&facts);
        assert_eq!(obstacle(&lines), None);
        let says = |line: &Line| matches!(&line.finding, Finding::Waits(text) if text.contains("Service"));
        assert!(lines.iter().any(says), "{lines:?}");
    }

    #[test]
    fn an_encrypted_overlay_is_bypassed_when_told_to() {
        let facts = Facts { encrypted_by: Some("cilium_wg0".into()), bypass_encryption: true, ..capable() };
        assert_eq!(obstacle(&judge(&facts)), None);
    }

    #[test]
    fn a_missing_forwarder_is_waited_for() {
        let facts = Facts { forwarder_answers: false, ..capable() };
        assert_eq!(obstacle(&judge(&facts)), None);
        assert!(judge(&facts).iter().any(|line| matches!(line.finding, Finding::Waits(_))));
    }
}
