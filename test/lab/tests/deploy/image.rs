// SPDX-License-Identifier: Apache-2.0
//! The image, run by containerd as the DaemonSet has it run: what `deploy/simple-ds.yaml` says of mounts, capabilities and
//! namespaces is read from there.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{Cgroup, DEADLINE, Host, Process, Scene, wait_for};
use serde_yaml::Value;

use crate::{DEPLOY, manifest, output};

const PORT: u16 = 7000;
const IMAGE: &str = "docker.io/library/ebpf-router:0.1.0";

/// What containerd's own client gives a container without being asked.
const USUAL: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

fn pod_spec() -> Result<Value> {
    let daemon_set = manifest()?.into_iter().find(|document| document["kind"] == "DaemonSet");
    Ok(daemon_set.context("the manifest has no DaemonSet")?["spec"]["template"]["spec"].clone())
}

fn text(value: &Value) -> Result<&str> {
    value.as_str().with_context(|| format!("{value:?} is no text"))
}

fn list(value: &Value) -> &[Value] {
    value.as_sequence().map(Vec::as_slice).unwrap_or_default()
}

/// containerd on one host of the lab. It and its containers end with the lab.
struct Containerd<'a> {
    host: &'a Host,
    directory: PathBuf,
    _daemon: Process,
}

impl Containerd<'_> {
    fn start(host: &Host) -> Result<Containerd<'_>> {
        let directory = host.place().directory.join("containerd");
        std::fs::create_dir_all(&directory)?;
        let config = directory.join("config.toml");
        let path = |name: &str| directory.join(name).display().to_string();
        std::fs::write(
            &config,
            format!(
                "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{}\"\n",
                path("root"),
                path("state"),
                path("sock")
            ),
        )?;
        let daemon =
            host.place().spawn("containerd", Command::new("containerd").arg("--config").arg(&config))?;
        let containerd = Containerd { host, directory, _daemon: daemon };
        wait_for(&format!("containerd of {}", host.name), DEADLINE, || {
            Ok(containerd.ctr(&["version"]).ok())
        })?;
        Ok(containerd)
    }

    /// Ids of containers are runc's as well, which knows no daemon, only namespaces.
    fn namespace(&self) -> String {
        let cgroup = self.host.cgroup().path().display().to_string();
        cgroup.trim_start_matches('/').replace('/', ".")
    }

    fn ctr<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Result<String> {
        let mut command = Command::new("ctr");
        command.arg("--namespace").arg(self.namespace());
        command.arg("--address").arg(self.directory.join("sock")).args(arguments);
        self.host.place().run(&mut command)
    }

    /// Where a volume of the pod is on this host of the lab.
    fn source(&self, volume: &Value) -> Result<PathBuf> {
        let directory = &self.host.place().directory;
        let source = match text(&volume["name"])? {
            "run" => directory.clone(),
            "rules" => directory.join("rules"),
            "bpf" => directory.join("bpf"),
            "tls" | "containerd" => directory.join(text(&volume["name"])?),
            _ => PathBuf::from(text(&volume["hostPath"]["path"])?),
        };
        std::fs::create_dir_all(&source)?;
        Ok(source)
    }

    /// As kubelet would, from the pod's spec.
    fn run(&self, pod: &Value, name: &str) -> Result<()> {
        let container = list(&pod["containers"]).iter().find(|container| container["name"] == name);
        let container = container.with_context(|| format!("no container {name}"))?;
        let mut words: Vec<String> = ["run", "--detach", "--snapshotter", "native"].map(String::from).into();
        ensure!(pod["hostNetwork"] == true && pod["hostPID"] == true);
        words.extend(["--net-host".into(), "--with-ns".into(), "pid:/proc/self/ns/pid".into()]);
        // Below the host's, as kubelet's are below the node's.
        let above =
            self.host.place().cgroup.path().strip_prefix(Cgroup::root()?.path())?.display().to_string();
        words.extend(["--cgroup".into(), format!("/{above}/{name}")]);
        let log = self.host.place().directory.join(format!("{name}.log"));
        words.extend(["--log-uri".into(), format!("file://{}", log.display())]);
        let context = &container["securityContext"];
        ensure!(context["capabilities"]["drop"] == Value::from(vec![Value::from("ALL")]));
        ensure!(context["readOnlyRootFilesystem"] == true && context["allowPrivilegeEscalation"] == false);
        words.push("--read-only".into());
        let added: Vec<&str> =
            list(&context["capabilities"]["add"]).iter().map(text).collect::<Result<_>>()?;
        for usual in USUAL.iter().filter(|usual| !added.contains(usual)) {
            words.extend(["--cap-drop".into(), format!("CAP_{usual}")]);
        }
        for capability in added.iter().filter(|capability| !USUAL.contains(capability)) {
            // Nobody can give what he does not have.
            if lab_has(capability)? {
                words.extend(["--cap-add".into(), format!("CAP_{capability}")]);
            }
        }
        for mount in list(&container["volumeMounts"]) {
            let volume = list(&pod["volumes"]).iter().find(|volume| volume["name"] == mount["name"]);
            let volume = volume.with_context(|| format!("no volume for {mount:?}"))?;
            let mode = if mount["readOnly"] == true { "ro" } else { "rw" };
            words.extend([
                "--mount".into(),
                format!(
                    "type=bind,src={},dst={},options=rbind:{mode}",
                    self.source(volume)?.display(),
                    text(&mount["mountPath"])?
                ),
            ]);
        }
        for variable in list(&container["env"]) {
            words.extend([
                "--env".into(),
                format!("{}={}", text(&variable["name"])?, text(&variable["value"])?),
            ]);
        }
        // Paths are the DaemonSet's own; the rest is what the ConfigMap `ebpf-router` would hold here.
        let paths = ["ROUTER_RULES", "ROUTER_TLS", "ROUTER_FORWARDER", "ROUTER_CONTROL", "ROUTER_PINS"];
        for (name, value) in self.host.environment() {
            if !paths.contains(&name.as_str()) {
                words.extend(["--env".into(), format!("{name}={}", value.to_string_lossy())]);
            }
        }
        words.extend([IMAGE.into(), name.into()]);
        words.extend(
            list(&container["command"])
                .iter()
                .map(|word| Ok(text(word)?.into()))
                .collect::<Result<Vec<_>>>()?,
        );
        self.ctr(&words).map(drop)
    }

    /// SIGTERM to both at once, as kubelet does when the pod is deleted.
    fn stop(&self) -> Result<()> {
        for name in ["forwarder", "router"] {
            self.ctr(&["task", "kill", "--signal", "SIGTERM", name])?;
        }
        Ok(())
    }

    fn wait_for_end(&self) -> Result<()> {
        wait_for(&format!("the containers of {} to end", self.host.name), Duration::from_secs(60), || {
            Ok((!self.ctr(&["task", "list"])?.contains("RUNNING")).then_some(()))
        })?;
        // Takes their cgroups away.
        self.ctr(&["task", "delete", "forwarder", "router"]).map(drop)
    }
}

/// runc leaves the directories above its own: in the hierarchies of version 1, and among its states.
impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(Path::new("/run/containerd/runc").join(self.namespace()));
        let Ok(root) = Cgroup::root() else { return };
        let Ok(above) = self.host.place().cgroup.path().strip_prefix(root.path()) else { return };
        let hierarchies = Path::new("/sys/fs/cgroup").read_dir().into_iter().flatten().flatten();
        for hierarchy in hierarchies.map(|entry| entry.path()).filter(|path| path != root.path()) {
            let own = above.ancestors().take_while(|path| !path.as_os_str().is_empty());
            own.for_each(|path| drop(std::fs::remove_dir(hierarchy.join(path))));
        }
    }
}

/// Of the machine that the tests run on.
fn lab_has(capability: &str) -> Result<bool> {
    let capability = format!("CAP_{capability}").parse()?;
    Ok(privileges::held().contains(&capability))
}

#[test]
fn the_image_runs_as_the_daemonset_runs_it() -> Result<()> {
    let pod = pod_spec()?;
    let scene = Scene::without_routers("image")?;
    let archive = scene.lab.directory().join("image.tar");
    output(Command::new(format!("{DEPLOY}/image.sh")).arg(&archive))?;
    let bytes = std::fs::metadata(&archive)?.len();
    ensure!(bytes < 12 << 20, "the image has grown to {bytes} bytes");
    let hosts = scene.lab.hosts().map(|host| -> Result<Containerd<'_>> {
        let containerd = Containerd::start(host)?;
        containerd.ctr(&[
            Path::new("image"),
            "import".as_ref(),
            "--snapshotter".as_ref(),
            "native".as_ref(),
            &archive,
        ])?;
        containerd.run(&pod, "forwarder")?;
        containerd.run(&pod, "router")?;
        Ok(containerd)
    });
    let hosts: Vec<Containerd<'_>> = hosts.into_iter().collect::<Result<_>>()?;
    for Containerd { host, .. } in &hosts {
        wait_for(&format!("the router of {} to answer", host.name), DEADLINE, || Ok(host.status().ok()))?;
    }
    let stream = scene.swapped_stream(PORT, "--names")?;
    hosts.iter().try_for_each(Containerd::stop)?;
    hosts.iter().try_for_each(Containerd::wait_for_end)?;
    for host in scene.lab.hosts() {
        let pins = host.pins()?;
        ensure!(pins.is_empty(), "the connection was not taken back: {pins:?} on {}", host.name);
    }
    stream.finish()?;
    Ok(())
}
