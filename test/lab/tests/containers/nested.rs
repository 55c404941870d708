// SPDX-License-Identifier: Apache-2.0
//! Nodes that are containers themselves, as those of `kind`: a booted system with process ids, cgroups (version 2 alone,
//! systemd's driver) and a containerd of its own. What its router sees, and what that of the machine outside does.

use std::{collections::BTreeMap, ffi::OsString, path::Path, process::Command};

use cri::Mount;
use lab::{CONTAINERS, Debian, Place, RULE_FOR_ALL_PODS, containerd::ROUTER_IMAGE, program};
use privileges::Need;

use super::*;

fn boot(place: &Place) -> Result<Debian> {
    Debian::boot(place, &CONTAINERS, &[])
}

/// Router and forwarder of a host as pods of its node, as the DaemonSet has them.
fn run_daemon_set(containerd: &Containerd, host: &Host, rule: &str, cgroup: &str) -> Result<()> {
    let directory = host.place().directory.display().to_string();
    let rules = host.write_rules("node", rule)?;
    let container = |name: &str, arguments: &[&str], needs: &[Need]| {
        let same = |path: &str, readonly| Mount {
            container_path: path.to_owned(),
            host_path: path.to_owned(),
            readonly,
            ..Mount::default()
        };
        let capability = |need: &Need| need.capability.to_string().trim_start_matches("CAP_").to_owned();
        let own = [("ROUTER_CGROUP", cgroup.into()), ("ROUTER_RULES", rules.clone().into_os_string())];
        let mut environment: BTreeMap<String, OsString> = host.environment().into_iter().collect();
        environment.extend(own.map(|(name, value)| (name.to_owned(), value)));
        ContainerSpec {
            image: ROUTER_IMAGE.to_owned(),
            arguments: arguments.iter().map(|&word| word.to_owned()).collect(),
            environment: environment
                .into_iter()
                .map(|(name, value)| (name, value.to_string_lossy().into_owned()))
                .collect(),
            mounts: vec![
                same(&directory, false),
                same("/sys/fs/cgroup", true),
                same("/run/containerd", true),
            ],
            add_capabilities: needs.iter().map(capability).collect(),
            drop_capabilities: vec!["ALL".to_owned()],
            no_new_privileges: true,
            read_only_root: true,
            ..ContainerSpec::new(name, &format!("/bin/{name}"))
        }
    };
    containerd.import_router()?;
    let socket = Path::new(&directory).join("forwarder.sock").display().to_string();
    let pod = PodSpec { host_network: true, host_pid: true, ..PodSpec::new("ebpf-router") }
        .container(container("forwarder", &["--socket", &socket], &privileges::FORWARDER))
        .container(container("router", &["run"], &privileges::ROUTER));
    let pod = containerd.run_pod(&pod)?;
    wait_for("the node's router to have reached its forwarder", DEADLINE, || {
        Ok(host.status().is_ok_and(|status| status.forwarder.is_some()).then_some(()))
    })
    .with_context(|| pod.containers.iter().map(RunningContainer::log).collect::<String>())
}

fn start_on(host: &Host) -> Result<()> {
    host.start_forwarder()?;
    host.start_router(&RouterOptions::default())
}

#[test]
fn a_rule_for_a_pods_label_holds_in_a_node_within_a_container() -> Result<()> {
    let lab = Lab::new("nested-pod-label")?;
    let node = boot(lab.h2.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    start_on(&lab.h1)?;
    run_daemon_set(&containerd, &lab.h2, RULE_FOR_SHOP, "/sys/fs/cgroup")?;
    expect_that_pod_only(&lab, &containerd, |shop| {
        lab.h2.move_to(7000, "overlay")?;
        lab.h2.move_to(7000, "host")?;
        // As it was meant to be.
        let cgroup = node.run(&format!("cat /proc/{}/cgroup", containerd.pid(&shop.containers[0])?))?;
        let end = format!("podshop.slice/cri-containerd-{}.scope", shop.containers[0].id);
        let is_meant = |line: &str| line.starts_with("0::/kubepods.slice/") && line.ends_with(&end);
        ensure!(cgroup.lines().any(is_meant), "{cgroup}");
        Ok(())
    })
}

#[test]
fn a_rule_for_a_containers_label_holds_in_a_node_within_a_container() -> Result<()> {
    let lab = Lab::new("nested-container-label")?;
    let node = boot(lab.h2.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    start_on(&lab.h1)?;
    run_daemon_set(&containerd, &lab.h2, RULE_FOR_WEB, "/sys/fs/cgroup")?;
    expect_that_container_only(&lab, &containerd)
}

#[test]
fn a_router_in_a_node_sees_the_containers_of_that_node_only() -> Result<()> {
    let lab = Lab::new("nested-scope")?;
    let node = boot(lab.h2.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    start_on(&lab.h1)?;
    run_daemon_set(&containerd, &lab.h2, RULE_FOR_ALL_PODS, "/sys/fs/cgroup")?;
    let (client, outside) = (lab.h1.pod("client")?, lab.h2.pod("outside")?);
    let _server = outside.serve(
        "server",
        Command::new(program("stream")?).args(["--server", "0.0.0.0:7001", "--pings"]),
        7001,
    )?;
    let to_outside = connect(&client, outside.v4, 7001)?;
    let inside = containerd.run_pod(&shop(7000))?;
    let to_inside = connect_to(&client, &inside, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    let reason = lab.h1.wait_until_refused(7001)?;
    ensure!(reason == "peer_unknown", "{reason}");
    let flows = lab.h2.flows()?;
    ensure!(!flows.iter().any(|flow| flow.has_port(7001)), "{flows:?}");
    finish(&containerd, to_inside, &inside.containers[0])?;
    finish_client(to_outside)
}

#[test]
fn a_router_in_a_node_may_be_given_a_part_of_the_nodes_cgroups() -> Result<()> {
    let lab = Lab::new("nested-part")?;
    let node = boot(lab.h2.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    start_on(&lab.h1)?;
    run_daemon_set(&containerd, &lab.h2, RULE_FOR_ALL_PODS, "/sys/fs/cgroup/kubepods.slice")?;
    let client = lab.h1.pod("client")?;
    let shop = containerd.run_pod(&shop(7000))?;
    let to_shop = connect_to(&client, &shop, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    finish(&containerd, to_shop, &shop.containers[0])
}

/// It is attached to the host's network as the host's own are: only who knows its labels is missing.
#[test]
fn the_router_outside_of_a_node_moves_what_is_in_it_by_addresses_only() -> Result<()> {
    let lab = Lab::new("nested-outside")?;
    let node = boot(lab.h2.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    start_on(&lab.h1)?;
    let rules = lab.h2.write_rules("outside", RULE_FOR_SHOP)?;
    lab.h2.start_forwarder()?;
    lab.h2.start_router(&RouterOptions::with_rules(&rules))?;
    let client = lab.h1.pod("client")?;
    let shop = containerd.run_pod(&shop(7000))?;
    let to_shop = connect_to(&client, &shop, 0, 7000)?;
    expect_refused(&lab.h2, 7000)?;
    lab.h2.write_rules("outside", RULE_FOR_ALL_PODS)?;
    lab.h2.wait_until_on_host(7000)?;
    finish(&containerd, to_shop, &shop.containers[0])
}

#[test]
fn the_router_outside_leaves_the_pods_of_a_node_with_a_network_of_its_own() -> Result<()> {
    let lab = Lab::new("nested-network")?;
    lab.start_everything(&RouterOptions::default())?;
    let (client, outer) = (lab.h1.pod("client")?, lab.h2.pod("node")?);
    // Its pods are on the host's segment as it is itself, by a bridge of its own.
    let address = outer.v4;
    outer.place().run_script(
        &["ip", "-batch", "-"],
        &format!(
            "link add cni0 type bridge\nlink set eth0 master cni0\nlink set cni0 mtu 1450 up\n\
             addr flush dev eth0\naddr add {address}/24 dev cni0\n"
        ),
    )?;
    let node = boot(outer.place())?;
    let containerd = Containerd::start_in(&node, &lab.h2)?;
    let shop = containerd.run_pod(&shop(7000))?;
    let to_shop = connect_to(&client, &shop, 0, 7000)?;
    let reason = lab.h2.wait_until_refused(7000)?;
    ensure!(reason == "foreign_namespace", "{reason}");
    finish(&containerd, to_shop, &shop.containers[0])
}
