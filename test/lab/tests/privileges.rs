// SPDX-License-Identifier: Apache-2.0
//! What router and forwarder may do once they run, as the kernel tells it.

use std::{collections::HashSet, process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Lab, RouterOptions};
use privileges::{Capability, Need};

fn status(pid: Option<u32>, name: &str) -> Result<String> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", pid.context("it does not run")?))?;
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    Ok(value.with_context(|| format!("no {name} in {status}"))?.trim().to_owned())
}

fn capabilities(pid: Option<u32>, set: &str) -> Result<HashSet<Capability>> {
    let bits = u64::from_str_radix(&status(pid, set)?, 16)?;
    Ok(privileges::all().filter(|capability| bits & capability.bitmask() != 0).collect())
}

fn check(pid: Option<u32>, needs: &[Need]) -> Result<()> {
    let most: HashSet<Capability> = needs.iter().map(|need| need.capability).collect();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let held = capabilities(pid, set)?;
        ensure!(held.is_subset(&most), "{set}: {held:?}, at most expected: {most:?}");
    }
    let essential = needs.iter().filter(|need| need.essential);
    let held = capabilities(pid, "CapEff")?;
    ensure!(essential.clone().all(|need| held.contains(&need.capability)), "{held:?}");
    ensure!(status(pid, "NoNewPrivs")? == "1");
    Ok(())
}

#[test]
fn router_and_forwarder_keep_only_the_capabilities_that_they_need() -> Result<()> {
    let lab = Lab::new("capabilities")?;
    lab.h1.start_forwarder()?;
    lab.h1.start_router(&RouterOptions::default())?;
    check(lab.h1.router_pid(), &privileges::ROUTER)?;
    check(lab.h1.forwarder_pid(), &privileges::FORWARDER)
}

#[test]
fn the_router_runs_under_a_filter_of_system_calls() -> Result<()> {
    let lab = Lab::new("seccomp")?;
    lab.h1.start_forwarder()?;
    lab.h1.start_router(&RouterOptions::default())?;
    let filtered = "2";
    ensure!(status(lab.h1.router_pid(), "Seccomp")? == filtered);
    Ok(())
}

/// No kernel module for WireGuard is needed: a CNI's interface is known by its name.
#[test]
fn an_encrypted_overlay_is_not_bypassed_unless_told_to() -> Result<()> {
    let lab = Lab::new("encrypted")?;
    lab.h1.start_forwarder()?;
    lab.h1.place().run(Command::new("ip").args(["link", "add", "cilium_wg0", "type", "bridge"]))?;
    let end = lab.h1.spawn_router(&RouterOptions::default())?.wait(Duration::from_secs(15))?;
    ensure!(end.status.code() == Some(1) && end.stderr.contains("--bypass-encryption"), "{end:?}");
    lab.h1.start_router(&RouterOptions::default().with("ROUTER_BYPASS_ENCRYPTION", "true"))
}

/// What follows `name` in a unit, split at blanks.
fn unit(path: &str, name: &str) -> Result<HashSet<String>> {
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    let value = text.lines().find_map(|line| line.strip_prefix(name));
    Ok(value.with_context(|| format!("no {name} in {path}"))?.split_whitespace().map(Into::into).collect())
}

/// What a container of the DaemonSet may do.
fn daemon_set(container: &str) -> Result<HashSet<String>> {
    let text = std::fs::read_to_string("../../deploy/simple-ds.yaml")?;
    for document in serde_yaml::Deserializer::from_str(&text) {
        let document: serde_yaml::Value = serde::Deserialize::deserialize(document)?;
        let mut containers =
            document["spec"]["template"]["spec"]["containers"].as_sequence().into_iter().flatten();
        if let Some(found) = containers.find(|found| found["name"] == container) {
            let added = found["securityContext"]["capabilities"]["add"].as_sequence();
            let added = added.with_context(|| format!("{container} has no capabilities"))?;
            return Ok(added.iter().filter_map(|name| Some(format!("CAP_{}", name.as_str()?))).collect());
        }
    }
    anyhow::bail!("no container {container}")
}

#[test]
fn manifest_and_units_give_the_capabilities_that_the_programs_keep() -> Result<()> {
    for (program, needs) in [("router", &privileges::ROUTER[..]), ("forwarder", &privileges::FORWARDER[..])] {
        let kept: HashSet<String> = needs.iter().map(|need| need.capability.to_string()).collect();
        ensure!(daemon_set(program)? == kept, "{program} in deploy/simple-ds.yaml");
        let path = format!("../../deploy/systemd/ebpf-{program}.service");
        ensure!(unit(&path, "CapabilityBoundingSet=")? == kept, "{path}");
    }
    Ok(())
}
