// SPDX-License-Identifier: Apache-2.0
//! What a router finds by itself: its interfaces, its peers, and rules that change while it runs.

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE, Host, Lab, Namespace, Pod, RULE_FOR_ALL_PODS, RULE_FOR_OTHERS, RouterOptions, Scene, wait_for,
};

const PORT: u16 = 7000;

fn the_peer(host: &Host) -> Result<lab::Peer> {
    let peers = host.peers()?;
    ensure!(peers.len() == 1, "one peer expected: {peers:#?}");
    peers.into_iter().next().context("one peer")
}

#[test]
fn peers_shows_how_a_peer_was_found_and_what_goes_there() -> Result<()> {
    let scene = Scene::with_routers("discovery-peers")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    for (host, other) in [(&scene.lab.h1, &scene.lab.h2), (&scene.lab.h2, &scene.lab.h1)] {
        let peer = the_peer(host)?;
        ensure!(peer.found_by.as_deref() == Some("route") && peer.reached, "{peer:#?}");
        ensure!(peer.address == format!("10.244.{}.0", other.index), "{peer:#?}");
        ensure!(peer.host_address == Some(other.address.to_string()), "{peer:#?}");
        ensure!((peer.connections, peer.swapped) == (1, 1), "{peer:#?}");
    }
    let table = scene.lab.h1.ask(&["peers"])?;
    ensure!(table.starts_with("ADDRESS") && table.contains("route"), "{table}");
    stream.finish()?;
    Ok(())
}

#[test]
fn a_file_of_peers_goes_before_routes() -> Result<()> {
    let scene = Scene::without_routers("discovery-file")?;
    let file = scene.lab.directory().join("peers.yaml");
    let entry = |host: &Host| format!("- {{overlay: 10.244.{}.0/24, host: {}}}\n", host.index, host.address);
    std::fs::write(&file, format!("peers:\n{}{}", entry(&scene.lab.h1), entry(&scene.lab.h2)))?;
    scene.lab.start_everything(&RouterOptions::default().with("ROUTER_PEERS", &file.to_string_lossy()))?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    let peer = the_peer(&scene.lab.h1)?;
    ensure!(peer.found_by.as_deref() == Some("file"), "{peer:#?}");
    ensure!(peer.address == scene.lab.h2.address.to_string(), "{peer:#?}");
    Ok(())
}

#[test]
fn interfaces_that_are_not_given_are_found() -> Result<()> {
    let scene = Scene::without_routers("discovery-interfaces")?;
    let options = RouterOptions::default().with("OVERLAY_IF", "").with("HOST_IF", "");
    scene.lab.start_everything(&options)?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    let log = scene.lab.h1.router_log();
    ensure!(log.contains("overlay0 (found: vxlan") && log.contains("eth1 with 192.168.78.1"), "{log}");
    Ok(())
}

#[test]
fn overlay_interfaces_of_which_none_is_better_are_named_in_one_error() -> Result<()> {
    let lab = Lab::new("discovery-ambiguous")?;
    lab.h1.place().run_script(
        &["ip", "-batch", "-"],
        "link add tunnel7 type vxlan id 7 dstport 4790 local 192.168.77.1 dev eth0\n\
         link set tunnel7 up\n\
         route add 10.77.0.0/24 via 192.168.77.2 dev tunnel7 onlink\n",
    )?;
    let end = lab.h1.spawn_router(&RouterOptions::default().with("OVERLAY_IF", ""))?.wait(DEADLINE)?;
    let errors: Vec<&str> = end.stderr.lines().filter(|line| line.contains("error")).collect();
    ensure!(end.status.code() == Some(1) && errors.len() == 1, "{end:?}");
    for word in ["OVERLAY_IF is not set", "overlay0", "tunnel7", "give the name"] {
        ensure!(errors[0].contains(word), "{word} expected in {}", errors[0]);
    }
    Ok(())
}

/// The interface address that a pod's packets come from.
fn mac_of(pod: &Pod) -> Result<String> {
    let text = pod.place().network.run(|| {
        let mut command = std::process::Command::new("ip");
        let output = command.args(["-o", "link", "show", "dev", "eth0"]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    words.nth(1).map(str::to_owned).with_context(|| format!("no MAC address in {text}"))
}

/// All pods in one segment, neighbour and forwarding entries instead of routes.
fn bridge_the_overlay(scene: &Scene) -> Result<()> {
    let ends = [(&scene.lab.h1, &scene.client), (&scene.lab.h2, &scene.server)];
    for ((host, pod), (other, other_pod)) in ends.into_iter().zip(ends.into_iter().rev()) {
        let (mac, address) = (mac_of(other_pod)?, other_pod.v4);
        host.place().run_script(
            &["sh", "-e"],
            &format!(
                "ip route del 10.244.{m}.0/24\n\
                 ip link set overlay0 master cni0\n\
                 ip neigh add {address} lladdr {mac} dev overlay0 nud permanent\n\
                 bridge fdb add {mac} dev overlay0 dst 192.168.78.{m} self permanent\n\
                 bridge fdb append 00:00:00:00:00:00 dev overlay0 dst 192.168.78.{m} self permanent\n",
                m = other.index
            ),
        )?;
        pod.place().run_script(&["sh", "-e"], "ip route add 10.244.0.0/16 dev eth0\n")?;
    }
    Ok(())
}

#[test]
fn in_a_bridged_overlay_forwarding_entries_tell_where_the_peer_is() -> Result<()> {
    let scene = Scene::without_routers("discovery-bridged")?;
    bridge_the_overlay(&scene)?;
    scene.lab.start_everything(&RouterOptions::default())?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    let peer = the_peer(&scene.lab.h1)?;
    ensure!(peer.found_by.as_deref() == Some("fdb") && peer.address == "192.168.78.2", "{peer:#?}");
    Ok(())
}

/// As Docker's overlay is: its VXLAN device is in a namespace of its own, in which the pods have an interface each. Their
/// other one, of before, leads to the host.
fn hide_the_overlay(scene: &mut Scene) -> Result<Vec<Namespace>> {
    let mut namespaces = Vec::new();
    let ends = [(&scene.lab.h1, &mut scene.client), (&scene.lab.h2, &mut scene.server)];
    for (host, pod) in ends {
        let (n, m) = (host.index, 3 - host.index);
        let hidden = Namespace::network()?;
        host.place().run_script(
            &["sh", "-e"],
            &format!(
                "ip link add vxlan9 type vxlan id 9 dstport 4789 local 192.168.78.{n} remote 192.168.78.{m}\n\
                 ip link add port9 mtu 1450 type veth peer name eth9 mtu 1450\n\
                 for port in vxlan9 port9; do ip link set $port netns {hidden}; done\n\
                 ip link set eth9 netns {pod}\n\
                 nsenter --net={hidden} sh -ec 'ip link add br0 up type bridge
                     for port in vxlan9 port9; do ip link set $port up master br0; done'\n",
                hidden = hidden.path(),
                pod = pod.place().network.path(),
            ),
        )?;
        pod.place().run_script(
            &["sh", "-e"],
            &format!("ip address add 10.0.9.{n}/24 dev eth9\nip link set eth9 up\n"),
        )?;
        pod.v4 = format!("10.0.9.{n}").parse()?;
        namespaces.push(hidden);
    }
    Ok(namespaces)
}

#[test]
fn an_overlay_in_a_namespace_of_its_own_needs_a_file_of_peers() -> Result<()> {
    let mut scene = Scene::without_routers("discovery-hidden")?;
    let _namespaces = hide_the_overlay(&mut scene)?;
    let file = scene.lab.directory().join("peers.yaml");
    let entry = |host: &Host| format!("- {{overlay: 10.0.9.{}/32, host: {}}}\n", host.index, host.address);
    std::fs::write(&file, format!("peers:\n{}{}", entry(&scene.lab.h1), entry(&scene.lab.h2)))?;
    for host in scene.lab.hosts() {
        host.replace_rule("pods", "type=cidr\nfrom=10.0.9.0/24\nto=10.0.9.0/24\n")?;
    }
    let options = RouterOptions::default().with("OVERLAY_IF", "cni0");
    scene.lab.start_everything(&options)?;
    let stream = scene.stream(PORT, "--pings")?;
    ensure!(scene.lab.h1.wait_until_refused(PORT)? == "no_peer_host");
    for host in scene.lab.hosts() {
        host.stop_router()?;
        host.start_router(&options.clone().with("ROUTER_PEERS", &file.to_string_lossy()))?;
    }
    scene.wait_until_on_host(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_wrong_rule_in_a_mounted_directory_is_named_and_the_last_good_rules_stay() -> Result<()> {
    let scene = Scene::with_routers("discovery-wrong-rule")?;
    let h1 = &scene.lab.h1;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    h1.replace_rule("pods", "type=cidr\nfrom=10.244.0.0/99\n")?;
    let status = h1.wait_for_status("a rule is wrong", |status| status.rules_error.is_some())?;
    let error = status.rules_error.unwrap_or_default();
    ensure!(
        error.contains("pods:2") && error.contains("10.244.0.0/99") && status.rules_errors == 1,
        "{error}"
    );
    ensure!(h1.ask(&["status"])?.contains("10.244.0.0/99"));
    ensure!(h1.router_log().contains("the rules stay as they were"));
    h1.wait_until_on_host(PORT)?;
    h1.replace_rule("pods", RULE_FOR_ALL_PODS)?;
    h1.wait_for_status("the rules are right", |status| status.rules_error.is_none())?;
    stream.finish()?;
    Ok(())
}

#[test]
fn connections_follow_rules_that_change_while_they_run() -> Result<()> {
    let scene = Scene::with_routers("discovery-reload")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    scene.lab.h1.replace_rule("pods", RULE_FOR_OTHERS)?;
    scene.wait_until_on_overlay(PORT)?;
    scene.lab.h1.replace_rule("pods", RULE_FOR_ALL_PODS)?;
    scene.wait_until_on_host(PORT)?;
    // The rules of either host suffice to leave it on the overlay.
    scene.lab.h2.replace_rule("pods", RULE_FOR_OTHERS)?;
    scene.wait_until_on_overlay(PORT)?;
    wait_for("the peer's no as the reason", DEADLINE, || {
        Ok((scene.lab.h1.wait_until_refused(PORT)? == "peer_says_no").then_some(()))
    })?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_follows_rules_that_changed_while_its_router_was_away() -> Result<()> {
    let scene = Scene::with_routers("discovery-restart")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    scene.lab.h1.kill_router()?;
    scene.lab.h1.replace_rule("pods", RULE_FOR_OTHERS)?;
    scene.lab.h1.start_router(&RouterOptions::default())?;
    scene.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_follows_rules_that_changed_while_its_peers_router_was_away() -> Result<()> {
    let scene = Scene::with_routers("discovery-peer-away")?;
    let mut stream = scene.swapped_stream(PORT, "--pings")?;
    scene.lab.h2.kill_router()?;
    scene.lab.h1.replace_rule("pods", RULE_FOR_OTHERS)?;
    scene.lab.h1.wait_for_flow(PORT, "held by the peer's absence", |flow| {
        flow.on_host() && flow.reason.as_deref() == Some("peer_unreachable")
    })?;
    stream.expect_running()?;
    scene.lab.h2.start_router(&RouterOptions::default())?;
    scene.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}
