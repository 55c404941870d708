// SPDX-License-Identifier: Apache-2.0
//! A Debian 12 that systemd has booted, in a container whose network is that of a host or a pod of the lab. Processes, mounts
//! and cgroups are its own, with version 2 of cgroups alone: as in a node of `kind`.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::{Place, Process, wait_for};

const BOOTED: Duration = Duration::from_secs(60);

/// What a node needs to run containers.
pub const CONTAINERS: [&str; 4] = ["containerd", "containernetworking-plugins", "jq", "runc"];

/// $1: the clean system, $2: where the booted one is, with what it changes beside it; then nspawn's arguments.
/// Where version 1 of cgroups is mounted too, systemd takes neither. What is set in /proc/sys is set for the machine.
const BOOT: &str = r#"
clean=$1 root=$2
shift 2
mount -t cgroup2 none /sys/fs/cgroup
mkdir -p "$root" "$root.upper/etc/systemd/system" "$root.work"
for unit in containerd.service systemd-sysctl.service; do
    ln -s /dev/null "$root.upper/etc/systemd/system/$unit"
done
mount -t overlay none -o "lowerdir=$clean,upperdir=$root.upper,workdir=$root.work" "$root"
exec systemd-nspawn --directory "$root" "$@"
"#;

/// A booted system: a clean one, and what it has changed. It ends with its owner.
pub struct Debian {
    place: Place,
    init: u32,
    _nspawn: Process,
}

impl Debian {
    /// With the files of `place` at the same path, and its network. `arguments` are nspawn's.
    pub fn boot(place: &Place, packages: &[&str], arguments: &[String]) -> Result<Debian> {
        let root = place.directory.with_extension("debian");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", BOOT, "sh"]).arg(clean(packages)?).arg(&root);
        command.args(["--boot", "--register=no", "--keep-unit", "--capability=all", "--private-users=no"]);
        command.args(["--console=pipe", "--bind"]).arg(&place.directory).args(arguments);
        command.envs([("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "1"), ("SYSTEMD_SECCOMP", "0")]);
        let mut nspawn = place.spawn("debian", &mut command)?;
        // unshare, sh and nspawn are one process.
        let init = wait_for("systemd to be started in the container", BOOTED, || {
            nspawn.fail_if_ended()?;
            Ok(systemd_of(nspawn.pid()))
        })?;
        let cgroup = place.cgroup.child("payload").child("lab");
        let debian = Debian { place: Place { cgroup, ..place.clone() }, init, _nspawn: nspawn };
        wait_for("Debian to be up", BOOTED, || {
            let state = Command::new("nsenter")
                .args(["--target", &init.to_string(), "--all", "systemctl", "is-system-running"])
                .output()?;
            let state = String::from_utf8_lossy(&state.stdout).trim().to_owned();
            Ok(["running", "degraded"].contains(&state.as_str()).then_some(()))
        })?;
        debian.place.cgroup.make()?;
        Ok(debian)
    }

    /// Where what [`Debian::command`] has made is to be run: in the system's cgroup.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// A program of the system, in its namespaces.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--all", program]);
        command
    }

    /// Runs a script to its end, which must be a success, and returns what it printed.
    pub fn run(&self, script: &str) -> Result<String> {
        self.place.run(self.command("sh").args(["-ec", script]))
    }
}

/// The child that is systemd; before there is one, nspawn has others.
fn systemd_of(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    let is_systemd = |child: &&str| {
        std::fs::read_to_string(format!("/proc/{child}/comm")).is_ok_and(|name| name.trim() == "systemd")
    };
    children.split_whitespace().find(is_systemd)?.parse().ok()
}

/// Beside what cargo builds: it takes minutes to make, and is never written to.
fn clean(packages: &[&str]) -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "../../target".into());
    let name = [&["debian-12"], packages].concat().join("+");
    let root = std::path::absolute(Path::new(&target).join(name))?;
    let made = root.join("made");
    if !made.exists() {
        let _ = std::fs::remove_dir_all(&root);
        let all =
            [&["systemd", "systemd-sysv", "libelf1", "zlib1g", "iproute2"], packages].concat().join(",");
        let mut debootstrap = Command::new("debootstrap");
        debootstrap.args(["--variant=minbase", &format!("--include={all}"), "bookworm"]).arg(&root);
        let output = debootstrap.output().context("starting debootstrap")?;
        ensure!(output.status.success(), "{debootstrap:?}: {}", String::from_utf8_lossy(&output.stdout));
        std::fs::write(made, "")?;
    }
    Ok(root)
}
