// SPDX-License-Identifier: Apache-2.0
//! Real containers on a host of the lab: a containerd of its own, which is spoken to over CRI, as kubelet does.
//!
//! In the host's mount namespace it has the usual places (`/run/containerd/containerd.sock`), so that a router there
//! finds it by itself. Pods are on the lab's overlay, by CNI's bridge plugin. It ends with the lab: all of its processes
//! are in the lab's cgroup, and its mounts in the lab's namespaces.

mod image;

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use anyhow::{Context, Result, ensure};
use cri::{
    Capability, Client, ContainerConfig, ContainerMetadata, ContainerStatusRequest, CreateContainerRequest,
    ImageSpec, KeyValue, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxStatusRequest, ProfileType, Question, RemovePodSandboxRequest, RunPodSandboxRequest,
    SecurityProfile, StartContainerRequest, StopPodSandboxRequest, VersionRequest,
};
use nix::sys::signal::Signal;

use crate::{Cgroup, DEADLINE, Debian, Host, Place, Process, network, wait_for};

pub use image::{Image, LAB_IMAGE, ROUTER_IMAGE};

pub(crate) const SOCKET: &str = "/run/containerd/containerd.sock";

/// A pod as kubelet would have it made.
#[derive(Clone, Debug, Default)]
pub struct PodSpec {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub host_network: bool,
    pub host_pid: bool,
    /// One of its containers is.
    pub privileged: bool,
    /// As a path below the roots of all cgroup hierarchies, or a slice; by default below the host's, named as kubelet does.
    pub cgroup_parent: Option<String>,
    pub containers: Vec<ContainerSpec>,
}

#[derive(Clone, Debug, Default)]
pub struct ContainerSpec {
    pub name: String,
    /// [`LAB_IMAGE`] if empty.
    pub image: String,
    /// The image's own if empty.
    pub command: Vec<String>,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
    pub labels: BTreeMap<String, String>,
    pub mounts: Vec<Mount>,
    /// Beside, or instead of, those that a container has by default; without `CAP_`.
    pub add_capabilities: Vec<String>,
    pub drop_capabilities: Vec<String>,
    pub privileged: bool,
    pub no_new_privileges: bool,
    pub read_only_root: bool,
    /// `Unconfined` if not given, as in Kubernetes.
    pub seccomp: Option<ProfileType>,
}

impl PodSpec {
    pub fn new(name: &str) -> PodSpec {
        PodSpec { name: name.to_owned(), ..PodSpec::default() }
    }

    pub fn label(mut self, name: &str, value: &str) -> PodSpec {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn container(mut self, container: ContainerSpec) -> PodSpec {
        self.containers.push(container);
        self
    }
}

impl ContainerSpec {
    /// A program of [`LAB_IMAGE`], with its arguments.
    pub fn new(name: &str, command: &str) -> ContainerSpec {
        let command = command.split_whitespace().map(str::to_owned).collect();
        ContainerSpec { name: name.to_owned(), command, ..ContainerSpec::default() }
    }

    pub fn label(mut self, name: &str, value: &str) -> ContainerSpec {
        self.labels.insert(name.to_owned(), value.to_owned());
        self
    }
}

/// A pod that runs.
#[derive(Clone, Debug)]
pub struct RunningPod {
    pub sandbox: String,
    /// Unspecified with the host's network.
    pub address: Ipv4Addr,
    pub containers: Vec<RunningContainer>,
}

#[derive(Clone, Debug)]
pub struct RunningContainer {
    pub name: String,
    pub id: String,
    log: PathBuf,
}

impl RunningContainer {
    /// What it has printed, each line with the time and the name of the stream in front.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn wait_until_it_says(&self, text: &str) -> Result<()> {
        wait_for(&format!("\"{text}\" from {}", self.name), DEADLINE, || {
            Ok(self.log().contains(text).then_some(()))
        })
        .with_context(|| self.log())
    }
}

/// Where a containerd runs, and with which driver of cgroups.
enum Ground<'lab> {
    /// cgroupfs.
    Host(&'lab Host),
    /// systemd's, with systemd.
    Node(&'lab Debian),
}

impl Ground<'_> {
    fn place(&self) -> &Place {
        match self {
            Ground::Host(host) => host.place(),
            Ground::Node(node) => node.place(),
        }
    }

    fn command(&self, program: &str) -> Command {
        match self {
            Ground::Host(_) => Command::new(program),
            Ground::Node(node) => node.command(program),
        }
    }

    /// The cgroup of a pod, in the words of the driver.
    fn cgroup_of(&self, pod: &str) -> Result<String> {
        Ok(match self {
            Ground::Host(host) => {
                format!("{}/kubepods/burstable/pod{pod}", host.cgroup().relative()?.display())
            }
            // A dash is a step in the names of slices.
            Ground::Node(_) => format!("kubepods-burstable-pod{}.slice", pod.replace('-', "_")),
        })
    }
}

/// A containerd, running.
pub struct Containerd<'lab> {
    ground: Ground<'lab>,
    directory: PathBuf,
    snapshotter: String,
    tokio: tokio::runtime::Runtime,
    state: Mutex<Option<(Process, Client)>>,
}

impl<'lab> Containerd<'lab> {
    /// Starts it, with [`LAB_IMAGE`] imported.
    pub fn start(host: &'lab Host) -> Result<Containerd<'lab>> {
        Containerd::start_with(host, "native")
    }

    /// With this snapshotter: `overlayfs` copies no image, and is not possible everywhere.
    pub(crate) fn start_with(host: &'lab Host, snapshotter: &str) -> Result<Containerd<'lab>> {
        // What no setting can move.
        host.place().run_script(
            &["sh", "-e"],
            "for place in /run/containerd /var/lib/cni; do mkdir -p $place; mount -t tmpfs none $place; done\n",
        )?;
        Containerd::start_on(Ground::Host(host), host.index, snapshotter)
    }

    /// In a system of its own, which has [`crate::CONTAINERS`], and whose pods are on the overlay of this host.
    pub fn start_in(node: &'lab Debian, host: &Host) -> Result<Containerd<'lab>> {
        Containerd::start_on(Ground::Node(node), host.index, "native")
    }

    fn start_on(ground: Ground<'lab>, host: u8, snapshotter: &str) -> Result<Containerd<'lab>> {
        let directory = ground.place().directory.join("containerd");
        std::fs::create_dir_all(directory.join("cni"))?;
        let configuration = configuration(&directory, snapshotter, matches!(ground, Ground::Node(_)));
        std::fs::write(directory.join("config.toml"), configuration)?;
        write_runc(&directory.join("runc"))?;
        std::fs::write(directory.join("cni/10-lab.conflist"), network(host))?;
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let containerd = Containerd {
            ground,
            directory,
            snapshotter: snapshotter.to_owned(),
            tokio,
            state: Mutex::default(),
        };
        containerd.start_again()?;
        containerd.import(&Image::of_lab(&containerd.directory)?)?;
        Ok(containerd)
    }

    /// After [`Containerd::stop`].
    pub fn start_again(&self) -> Result<()> {
        let mut command = self.ground.command("containerd");
        command.arg("--config").arg(self.directory.join("config.toml"));
        let mut process = self.ground.place().spawn("containerd", &mut command)?;
        // Seen from here: its mounts are not ours.
        let socket = PathBuf::from(format!("/proc/{}/root{SOCKET}", process.pid()));
        let client = {
            let _inside = self.tokio.enter();
            Client::new(&socket, DEADLINE)?
        };
        wait_for("containerd to answer", DEADLINE, || {
            process.fail_if_ended()?;
            Ok(self.tokio.block_on(client.ask(VersionRequest {})).ok())
        })
        .with_context(|| process.stderr())?;
        *self.lock() = Some((process, client));
        Ok(())
    }

    /// What it has started runs on.
    pub fn stop(&self, signal: Signal) -> Result<()> {
        let (process, _) = self.lock().take().context("no containerd is running")?;
        process.signal(signal)?;
        process.wait(DEADLINE).map(drop)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        let state = self.lock();
        let (process, _) = state.as_ref().context("no containerd is running")?;
        process.signal(signal)
    }

    /// Makes an image known, which is a tar as `docker save` or an OCI layout has it.
    pub fn import(&self, image: &Path) -> Result<()> {
        let mut command = self.ground.command("ctr");
        command
            .args(["--namespace", "k8s.io", "images", "import", "--snapshotter", &self.snapshotter])
            .arg(image);
        self.ground.place().run(&mut command).map(drop)
    }

    /// Imports [`ROUTER_IMAGE`].
    pub fn import_router(&self) -> Result<()> {
        self.import(&Image::of_router(&self.directory)?)
    }

    /// Makes a pod with all of its containers, started.
    pub fn run_pod(&self, pod: &PodSpec) -> Result<RunningPod> {
        let config = self.sandbox_config(pod)?;
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let sandbox = self.ask(request).with_context(|| format!("pod {}", pod.name))?.pod_sandbox_id;
        let mut containers = Vec::new();
        for container in &pod.containers {
            let request = CreateContainerRequest {
                pod_sandbox_id: sandbox.clone(),
                config: Some(container_config(pod, container)),
                sandbox_config: Some(config.clone()),
            };
            let id = self.ask(request).with_context(|| format!("container {}", container.name))?.container_id;
            self.ask(StartContainerRequest { container_id: id.clone() })?;
            let log = Path::new(&config.log_directory).join(log_name(container));
            containers.push(RunningContainer { name: container.name.clone(), id, log });
        }
        let status = self.ask(PodSandboxStatusRequest { pod_sandbox_id: sandbox.clone() })?.status;
        let address = status.and_then(|status| status.network).map(|network| network.ip).unwrap_or_default();
        let address = if address.is_empty() { Ipv4Addr::UNSPECIFIED } else { address.parse()? };
        Ok(RunningPod { sandbox, address, containers })
    }

    /// Ends a pod's containers with SIGKILL, and removes it.
    pub fn remove_pod(&self, pod: &RunningPod) -> Result<()> {
        self.ask(StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() })?;
        self.ask(RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() }).map(drop)
    }

    /// The process that a container began with.
    pub fn pid(&self, container: &RunningContainer) -> Result<u32> {
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: true };
        let info = self.ask(request)?.info;
        let info: serde_json::Value =
            serde_json::from_str(info.get("info").context("a status without info")?)?;
        let pid = info["pid"].as_u64().with_context(|| format!("no pid in {info}"))?;
        Ok(pid.try_into()?)
    }

    /// Did a container end, and with which exit code?
    pub fn exit_code(&self, container: &RunningContainer) -> Result<Option<i32>> {
        const EXITED: i32 = 2;
        let request = ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        let status = self.ask(request)?.status.context("an answer without a status")?;
        Ok((status.state == EXITED).then_some(status.exit_code))
    }

    pub fn ask<Q: Question>(&self, question: Q) -> Result<Q::Answer> {
        let client = self.lock().as_ref().map(|(_, client)| client.clone());
        let client = client.context("no containerd is running")?;
        let answer = self.tokio.block_on(client.ask(question));
        answer.map_err(|error| anyhow::anyhow!("{}: {}", Q::METHOD, error.message()))
    }

    fn sandbox_config(&self, pod: &PodSpec) -> Result<PodSandboxConfig> {
        ensure!(!pod.name.is_empty(), "a pod needs a name");
        let logs = self.directory.join("logs").join(&pod.name);
        std::fs::create_dir_all(&logs)?;
        let cgroup_parent = match &pod.cgroup_parent {
            Some(given) => given.clone(),
            None => self.ground.cgroup_of(&pod.name)?,
        };
        Ok(PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: pod.name.clone(),
                uid: format!("uid-of-{}", pod.name),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: if pod.host_network { String::new() } else { pod.name.clone() },
            log_directory: logs.to_string_lossy().into_owned(),
            labels: pod.labels.clone(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent,
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces(pod)),
                    privileged: pod.privileged,
                }),
            }),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Process, Client)>> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some((process, _)) = self.lock().as_ref()
        {
            process.show();
        }
    }
}

fn namespaces(pod: &PodSpec) -> NamespaceOption {
    let mode = |of_host| if of_host { NamespaceMode::Node } else { NamespaceMode::Pod } as i32;
    let pid = if pod.host_pid { NamespaceMode::Node } else { NamespaceMode::Container } as i32;
    NamespaceOption { network: mode(pod.host_network), pid, ipc: mode(false) }
}

fn container_config(pod: &PodSpec, container: &ContainerSpec) -> ContainerConfig {
    let image = if container.image.is_empty() { LAB_IMAGE } else { &container.image };
    let environment = container.environment.iter().cloned();
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: container.name.clone(), attempt: 0 }),
        image: Some(ImageSpec { image: image.to_owned() }),
        command: container.command.clone(),
        args: container.arguments.clone(),
        envs: environment.map(|(key, value)| KeyValue { key, value }).collect(),
        mounts: container.mounts.clone(),
        labels: container.labels.clone(),
        log_path: log_name(container),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                capabilities: Some(Capability {
                    add_capabilities: container.add_capabilities.clone(),
                    drop_capabilities: container.drop_capabilities.clone(),
                }),
                privileged: container.privileged,
                namespace_options: Some(namespaces(pod)),
                readonly_rootfs: container.read_only_root,
                no_new_privs: container.no_new_privileges,
                seccomp: Some(SecurityProfile {
                    profile_type: container.seccomp.unwrap_or(ProfileType::Unconfined) as i32,
                }),
            }),
        }),
    }
}

fn log_name(container: &ContainerSpec) -> String {
    format!("{}.log", container.name)
}

/// runc, but for a capability that root lacks on some machines: then nobody can be given it, and runc would fail. It would too
/// where version 2 of cgroups has no weights to give, because version 1 has all controllers.
const RUNC: &str = r#"#!/bin/sh
previous=
for word; do
    case $previous in
        --bundle) specification=$word/config.json ;;
        --process) specification=$word ;;
    esac
    previous=$word
done
if [ -n "$specification" ]; then
    jq -c 'del(.linux.resources.cpu) | walk(if type == "array" then map(select(. != "CAP_SYS_RESOURCE")) else . end)' "$specification" >"$specification.less"
    cat "$specification.less" >"$specification"
    rm "$specification.less"
fi
exec runc "$@"
"#;

fn write_runc(path: &Path) -> Result<()> {
    let controllers = std::fs::read_to_string(Cgroup::root()?.path().join("cgroup.controllers"))?;
    let has_weights = controllers.split_whitespace().any(|controller| controller == "cpu");
    let has_all = has_weights && privileges::held().contains(&"CAP_SYS_RESOURCE".parse()?);
    std::fs::write(path, if has_all { "#!/bin/sh\nexec runc \"$@\"\n" } else { RUNC })?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

fn configuration(directory: &Path, snapshotter: &str, systemd: bool) -> String {
    let directory = directory.display();
    format!(
        r#"version = 2
root = "{directory}/root"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{LAB_IMAGE}"
  # For machines whose root lacks CAP_SYS_RESOURCE.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "{directory}/runc"
        SystemdCgroup = {systemd}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "{directory}/cni"
"#
    )
}

/// Addresses from 100 on: those below are of pods without containers.
fn network(host: u8) -> String {
    let address = |index| network::overlay_v4(host, index);
    format!(
        r#"{{ "cniVersion": "0.4.0", "name": "lab", "plugins": [ {{
  "type": "bridge", "bridge": "cni0", "mtu": {}, "ipam": {{
    "type": "host-local", "routes": [{{ "dst": "0.0.0.0/0" }}],
    "ranges": [[{{ "subnet": "{}/24", "rangeStart": "{}", "rangeEnd": "{}", "gateway": "{}" }}]]
  }}
}} ] }}"#,
        network::MTU,
        address(0),
        address(100),
        address(250),
        address(1)
    )
}
