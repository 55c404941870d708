// SPDX-License-Identifier: Apache-2.0
//! The Debian package, on a clean Debian 12 that systemd has booted, in a container whose network is that of a host of the
//! lab. What is looked at are units and scripts.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use lab::{Debian, Lab, wait_for};

use crate::output;

const PATIENCE: Duration = Duration::from_secs(60);

fn pid(system: &Debian, unit: &str) -> Result<u32> {
    Ok(system.run(&format!("systemctl show --property MainPID --value {unit}"))?.trim().parse()?)
}

#[test]
fn the_package_installs_starts_upgrades_and_goes() -> Result<()> {
    let lab = Lab::new("package")?;
    let directory = &lab.h1.place().directory;
    let package = directory.join("ebpf-router.deb");
    let mut build = Command::new("cargo");
    build.args(["deb", "--no-build", "--strip", "--package", "ebpf-router", "--output"]).arg(&package);
    output(build.current_dir("../.."))?;
    let bpf = format!("--bind={}:/sys/fs/bpf", directory.join("bpf").display());
    let system = Debian::boot(lab.h1.place(), &[], &[bpf])?;

    let settings = "OVERLAY_IF=overlay0\\nHOST_IF=eth0\\nROUTER_RULES=/etc/ebpf-router/rules\\n";
    let said = system.run(&format!(
        "printf '{settings}' >/etc/default/ebpf-router; dpkg --force-confold --install {} 2>&1",
        package.display()
    ))?;
    ensure!(said.contains("ebpf-router pki"), "nothing is said of certificates: {said}");
    system.run(&format!(
        "ebpf-router pki init /root/pki; ebpf-router pki issue /root/pki node --address {}; \
         cp /root/pki/node/* /etc/ebpf-router/tls; systemctl restart ebpf-router",
        lab.h1.address
    ))?;
    let answers = || {
        let status = system.run("ebpf-router status").ok();
        Ok(status.filter(|status| !status.contains("not reached")))
    };
    wait_for("the router of the package to have reached its forwarder", PATIENCE, answers)?;
    let (router, forwarder) = (pid(&system, "ebpf-router")?, pid(&system, "ebpf-forwarder")?);

    // An upgrade, as far as the scripts can tell.
    system.run(&format!("dpkg --force-confold --install {}", package.display()))?;
    wait_for("the next router to answer", PATIENCE, answers)?;
    ensure!(pid(&system, "ebpf-router")? != router, "the upgrade has not restarted the router");
    ensure!(pid(&system, "ebpf-forwarder")? == forwarder, "the upgrade has restarted the forwarder");
    let log = system.run("journalctl --no-pager --unit ebpf-router 2>/dev/null || true")?;
    ensure!(log.is_empty() || log.contains("stay on the host network"), "{log}");

    system.run("systemctl stop ebpf-router")?;
    ensure!(pid(&system, "ebpf-forwarder")? == forwarder, "the forwarder has stopped with the router");
    // What others have put there stays where it is.
    // The certificates are not the package's.
    system.run("systemctl start ebpf-router; dpkg --purge ebpf-router")?;
    system.run("test \"$(ls /etc/ebpf-router)\" = tls; rm -r /etc/ebpf-router")?;
    let left = system.run("ls -d /usr/sbin/ebpf-* /etc/ebpf-router /etc/default/ebpf-router /run/ebpf-router 2>/dev/null || true; pgrep -l 'ebpf-' || true")?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    Ok(())
}
