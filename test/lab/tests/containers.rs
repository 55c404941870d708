// SPDX-License-Identifier: Apache-2.0
//! Real containers, made over CRI by a real containerd: rules find their labels, and what becomes of containers and
//! runtimes disturbs nobody.

#[path = "containers/nested.rs"]
mod nested;
#[path = "containers/shop.rs"]
mod shop;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE, Host, Lab, Pod, Process, RouterOptions,
    containerd::{ContainerSpec, Containerd, PodSpec, RunningContainer, RunningPod},
    wait_for,
};
use nix::sys::signal::Signal;

use shop::{RULE_FOR_SHOP, connect, expect_refused, start_routers};

const RULE_FOR_WEB: &str = "type=containerLabel\nname=tier\nvalue=web\n";

fn server(name: &str, port: u16) -> ContainerSpec {
    ContainerSpec::new(name, &format!("/bin/stream --server 0.0.0.0:{port} --pings"))
}

fn shop(port: u16) -> PodSpec {
    PodSpec::new("shop").label("app", "shop").container(server("web", port))
}

fn connect_to(client: &Pod, pod: &RunningPod, container: usize, port: u16) -> Result<Process> {
    pod.containers[container].wait_until_it_says("listening")?;
    connect(client, pod.address, port)
}

/// Both ends are content.
fn finish(containerd: &Containerd, client: Process, server: &RunningContainer) -> Result<()> {
    finish_client(client)?;
    let code = wait_for("the end of the server", DEADLINE, || containerd.exit_code(server))?;
    ensure!(code == 0, "the server ended with {code}: {}", server.log());
    Ok(())
}

fn finish_client(mut client: Process) -> Result<()> {
    client.close_stdin();
    client.wait(DEADLINE)?.expect_success().map(drop)
}

/// With [`RULE_FOR_SHOP`] at h2: of two pods there, one with the label. `while_swapped` is given that one.
fn expect_that_pod_only(
    lab: &Lab,
    containerd: &Containerd,
    while_swapped: impl FnOnce(&RunningPod) -> Result<()>,
) -> Result<()> {
    let client = lab.h1.pod("client")?;
    let shop = containerd.run_pod(&shop(7000))?;
    let mail = containerd.run_pod(
        &PodSpec::new("mail").label("app", "mail").container(server("web", 7001).label("app", "shop")),
    )?;
    let to_shop = connect_to(&client, &shop, 0, 7000)?;
    let to_mail = connect_to(&client, &mail, 0, 7001)?;
    let flow = lab.h2.wait_until_on_host(7000)?;
    ensure!(flow.workload == "default/shop/web", "{flow:?}");
    expect_refused(&lab.h2, 7001)?;
    while_swapped(&shop)?;
    finish(containerd, to_shop, &shop.containers[0])?;
    finish(containerd, to_mail, &mail.containers[0])
}

/// With [`RULE_FOR_WEB`] at h2: of two containers of a pod there, one with the label.
fn expect_that_container_only(lab: &Lab, containerd: &Containerd) -> Result<()> {
    let client = lab.h1.pod("client")?;
    let pod = PodSpec::new("shop")
        .label("tier", "web")
        .container(server("web", 7000).label("tier", "web"))
        .container(server("db", 7001).label("tier", "db"));
    let pod = containerd.run_pod(&pod)?;
    let to_web = connect_to(&client, &pod, 0, 7000)?;
    let to_db = connect_to(&client, &pod, 1, 7001)?;
    lab.h2.wait_until_on_host(7000)?;
    expect_refused(&lab.h2, 7001)?;
    finish(containerd, to_web, &pod.containers[0])?;
    finish(containerd, to_db, &pod.containers[1])
}

fn wait_until_logged(host: &Host, text: &str) -> Result<()> {
    wait_for(&format!("\"{text}\" in the router's log"), DEADLINE, || {
        Ok(host.router_log().contains(text).then_some(()))
    })
}

#[test]
fn check_names_the_runtime_that_it_has_found() -> Result<()> {
    let lab = Lab::new("check-runtime")?;
    let _containerd = Containerd::start(&lab.h1)?;
    lab.h1.start_forwarder()?;
    let lines = lab.h1.ask(&["check"])?;
    ensure!(lines.contains("containerd 1.") || lines.contains("containerd v"), "{lines}");
    Ok(())
}

#[test]
fn a_rule_for_a_pods_label_swaps_the_connections_of_that_pod_only() -> Result<()> {
    let lab = Lab::new("pod-label")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    expect_that_pod_only(&lab, &containerd, |_| Ok(()))
}

#[test]
fn a_rule_for_a_containers_label_swaps_the_connections_of_that_container_only() -> Result<()> {
    let lab = Lab::new("container-label")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_WEB, "auto")?;
    expect_that_container_only(&lab, &containerd)
}

#[test]
fn containers_on_both_hosts_are_swapped_as_their_labels_say() -> Result<()> {
    let lab = Lab::new("containers")?;
    let containerds = [Containerd::start(&lab.h1)?, Containerd::start(&lab.h2)?];
    lab.hosts().into_iter().try_for_each(Host::start_forwarder)?;
    for host in lab.hosts() {
        host.start_router(&RouterOptions::with_rules(&host.write_rules("label", RULE_FOR_SHOP)?))?;
    }
    let server = containerds[1].run_pod(&shop(7000))?;
    server.containers[0].wait_until_it_says("listening")?;
    let command = format!("/bin/stream --client {}:7000 --pings --seconds 3", server.address);
    let client =
        PodSpec::new("client").label("app", "shop").container(ContainerSpec::new("client", &command));
    let client = containerds[0].run_pod(&client)?;
    lab.hosts().into_iter().try_for_each(|host| host.wait_until_on_host(7000).map(drop))?;
    for (containerd, pod) in containerds.iter().zip([&client, &server]) {
        let container = &pod.containers[0];
        let code = wait_for("its end", DEADLINE, || containerd.exit_code(container))?;
        ensure!(code == 0, "{}: {}", container.name, container.log());
    }
    Ok(())
}

#[test]
fn containers_that_come_and_go_amid_moves_disturb_nobody() -> Result<()> {
    let lab = Lab::new("come-and-go")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    let client = lab.h1.pod("client")?;
    let steady = containerd.run_pod(&PodSpec { name: "steady".into(), ..shop(7000) })?;
    let to_steady = connect_to(&client, &steady, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    for port in 7001..7005 {
        let pod = containerd.run_pod(&PodSpec { name: format!("shop-{port}"), ..shop(port) })?;
        let _to_pod = connect_to(&client, &pod, 0, port)?;
        lab.h2.wait_until_on_host(port)?;
        // It ends while it is moved, or just before or after.
        let conn = lab.h1.wait_until_on_host(port)?.conn.context("a connection without a name")?;
        std::thread::scope(|scope| {
            let moves = scope.spawn(|| lab.h1.swap_back(&conn));
            containerd.remove_pod(&pod)?;
            // Refused if the connection was over before.
            let _ = moves.join();
            anyhow::Ok(())
        })?;
        lab.h1.move_to(7000, if port % 2 == 0 { "host" } else { "overlay" })?;
    }
    finish(&containerd, to_steady, &steady.containers[0])
}

#[test]
fn a_runtime_that_hangs_stalls_nothing_and_is_asked_again() -> Result<()> {
    let lab = Lab::new("runtime-hangs")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    let client = lab.h1.pod("client")?;
    let [known, unknown] = [7000, 7001].map(|port| PodSpec { name: format!("shop-{port}"), ..shop(port) });
    let (known, unknown) = (containerd.run_pod(&known)?, containerd.run_pod(&unknown)?);
    let to_known = connect_to(&client, &known, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    containerd.signal(Signal::SIGSTOP)?;
    let to_unknown = connect_to(&client, &unknown, 0, 7001)?;
    expect_refused(&lab.h2, 7001)?;
    wait_until_logged(&lab.h2, "the container runtime does not answer")?;
    lab.h1.move_to(7000, "overlay")?;
    lab.h1.move_to(7000, "host")?;
    // A loop that waited for the runtime would take 2 s for each.
    let asked = Instant::now();
    for _ in 0..10 {
        lab.h2.status()?;
    }
    ensure!(asked.elapsed() < Duration::from_secs(4), "it took {:?}", asked.elapsed());
    containerd.signal(Signal::SIGCONT)?;
    lab.h2.wait_until_on_host(7001)?;
    finish(&containerd, to_known, &known.containers[0])?;
    finish(&containerd, to_unknown, &unknown.containers[0])
}

#[test]
fn a_runtime_that_was_killed_and_started_again_is_asked_again() -> Result<()> {
    check_restart("runtime-killed", Signal::SIGKILL)
}

/// It takes its socket with it.
#[test]
fn a_runtime_that_was_stopped_and_started_again_is_asked_again() -> Result<()> {
    check_restart("runtime-stopped", Signal::SIGTERM)
}

fn check_restart(name: &str, signal: Signal) -> Result<()> {
    let lab = Lab::new(name)?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    let client = lab.h1.pod("client")?;
    let [before, unknown, after] =
        [7000, 7001, 7002].map(|port| PodSpec { name: format!("shop-{port}"), ..shop(port) });
    let (before, unknown) = (containerd.run_pod(&before)?, containerd.run_pod(&unknown)?);
    let to_before = connect_to(&client, &before, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    containerd.stop(signal)?;
    let to_unknown = connect_to(&client, &unknown, 0, 7001)?;
    expect_refused(&lab.h2, 7001)?;
    wait_until_logged(&lab.h2, "the container runtime does not answer")?;
    lab.h1.move_to(7000, "overlay")?;
    lab.h1.move_to(7000, "host")?;
    containerd.start_again()?;
    lab.h2.wait_until_on_host(7001)?;
    let after = containerd.run_pod(&after)?;
    let to_after = connect_to(&client, &after, 0, 7002)?;
    lab.h2.wait_until_on_host(7002)?;
    for (client, pod) in [(to_before, &before), (to_unknown, &unknown), (to_after, &after)] {
        finish(&containerd, client, &pod.containers[0])?;
    }
    Ok(())
}

#[test]
fn a_router_that_was_there_before_the_runtime_learns_of_its_containers() -> Result<()> {
    let lab = Lab::new("router-first")?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    let client = lab.h1.pod("client")?;
    let containerd = Containerd::start(&lab.h2)?;
    let pod = containerd.run_pod(&shop(7000))?;
    let client = connect_to(&client, &pod, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    finish(&containerd, client, &pod.containers[0])
}
