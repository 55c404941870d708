// SPDX-License-Identifier: Apache-2.0
//! The Debian package, on a clean Debian 12 that systemd has booted, in a container whose network is that of a host of the
//! lab. Its processes have ids of their own, so nothing is swapped in it: what is looked at are units and scripts.

use std::{
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, wait_for};

use crate::output;

const BOOTED: Duration = Duration::from_secs(60);

/// Beside what cargo builds: it takes minutes to make, and is never written to.
fn clean_debian() -> Result<PathBuf> {
    let root = PathBuf::from(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "../../target".into()))
        .join("debian-12");
    if !root.join("made").exists() {
        let _ = std::fs::remove_dir_all(&root);
        let packages = "--include=systemd,systemd-sysv,libelf1,zlib1g,iproute2";
        output(Command::new("debootstrap").args(["--variant=minbase", packages, "bookworm"]).arg(&root))?;
        std::fs::write(root.join("made"), "")?;
    }
    Ok(root)
}

/// A booted system, a copy of the clean one.
struct System<'a> {
    lab: &'a Lab,
    init: u32,
}

impl System<'_> {
    fn boot<'a>(lab: &'a Lab, package: &Path) -> Result<System<'a>> {
        let root = lab.directory().join("debian");
        output(Command::new("cp").args(["-a", "--reflink=auto"]).arg(clean_debian()?).arg(&root))?;
        std::fs::copy(package, root.join("ebpf-router.deb"))?;
        std::fs::create_dir(root.join("tls"))?;
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            std::fs::copy(lab.h1.tls().join(name), root.join("tls").join(name))?;
        }
        // Where version 1 of cgroups is mounted too, systemd takes neither.
        let mut command = Command::new("unshare");
        command.args([
            "--mount",
            "sh",
            "-ec",
            "mount -t cgroup2 none /sys/fs/cgroup; exec systemd-nspawn \"$@\"",
            "sh",
        ]);
        command.arg("--directory").arg(&root);
        command.args(["--boot", "--register=no", "--keep-unit", "--capability=all", "--private-users=no"]);
        command.args(["--system-call-filter=bpf", "--console=pipe"]);
        command.arg(format!("--bind={}:/sys/fs/bpf", lab.h1.place().directory.join("bpf").display()));
        command.env("SYSTEMD_NSPAWN_API_VFS_WRITABLE", "1");
        let mut nspawn = lab.h1.place().spawn("debian", &mut command)?;
        // unshare, sh and nspawn are one process.
        let init = wait_for("systemd to be started in the container", BOOTED, || {
            nspawn.fail_if_ended()?;
            Ok(systemd_of(nspawn.pid()))
        })?;
        // It ends with the lab.
        std::mem::forget(nspawn);
        let system = System { lab, init };
        wait_for("Debian to be up", BOOTED, || {
            let state = system.run("systemctl is-system-running 2>&1 || true")?;
            Ok(["running", "degraded"].contains(&state.trim()).then_some(()))
        })?;
        Ok(system)
    }

    fn run(&self, script: &str) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string(), "--all", "sh", "-ec", script]);
        output(&mut command).with_context(|| self.lab.name.clone())
    }

    fn pid(&self, unit: &str) -> Result<u32> {
        Ok(self.run(&format!("systemctl show --property MainPID --value {unit}"))?.trim().parse()?)
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

#[test]
fn the_package_installs_starts_upgrades_and_goes() -> Result<()> {
    let lab = Lab::new("package")?;
    let package = lab.directory().join("ebpf-router.deb");
    let mut build = Command::new("cargo");
    build.args(["deb", "--no-build", "--strip", "--package", "ebpf-router", "--output"]).arg(&package);
    output(build.current_dir("../.."))?;
    let system = System::boot(&lab, &package)?;

    let settings = "OVERLAY_IF=overlay0\\nHOST_IF=eth0\\nROUTER_RULES=/etc/ebpf-router/rules\\n";
    // An operator's, not the package's: neither brought nor taken away by it.
    system.run("mkdir -p /etc/ebpf-router && cp -a /tls /etc/ebpf-router")?;
    system.run(&format!(
        "printf '{settings}' >/etc/default/ebpf-router; dpkg --force-confold --install /ebpf-router.deb"
    ))?;
    let answers = || {
        let status = system.run("ebpf-router status").ok();
        Ok(status.filter(|status| !status.contains("not reached")))
    };
    wait_for("the router of the package to have reached its forwarder", BOOTED, answers)?;
    let (router, forwarder) = (system.pid("ebpf-router")?, system.pid("ebpf-forwarder")?);

    // An upgrade, as far as the scripts can tell.
    system.run("dpkg --force-confold --install /ebpf-router.deb")?;
    wait_for("the next router to answer", BOOTED, answers)?;
    ensure!(system.pid("ebpf-router")? != router, "the upgrade has not restarted the router");
    ensure!(system.pid("ebpf-forwarder")? == forwarder, "the upgrade has restarted the forwarder");
    let log = system.run("journalctl --no-pager --unit ebpf-router 2>/dev/null || true")?;
    ensure!(log.is_empty() || log.contains("stay on the host network"), "{log}");

    system.run("systemctl stop ebpf-router")?;
    ensure!(system.pid("ebpf-forwarder")? == forwarder, "the forwarder has stopped with the router");
    system.run("systemctl start ebpf-router; dpkg --purge ebpf-router")?;
    let left = system.run("ls -d /usr/sbin/ebpf-* /etc/ebpf-router/rules /etc/default/ebpf-router /run/ebpf-router 2>/dev/null || true; pgrep -l 'ebpf-' || true")?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    let own = system.run("ls /etc/ebpf-router")?;
    ensure!(own.trim() == "tls", "in /etc/ebpf-router: {own}");
    Ok(())
}
