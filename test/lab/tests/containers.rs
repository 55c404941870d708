// SPDX-License-Identifier: Apache-2.0
//! Real containers, made over CRI by a real containerd, and with Podman: rules find their labels, and what becomes of
//! containers and runtimes disturbs nobody.

use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE, Host, Lab, Place, Pod, Process, RouterOptions,
    containerd::{ContainerSpec, Containerd, PodSpec, RunningContainer, RunningPod},
    docker::Docker,
    podman::Podman,
    program, wait_for,
};
use nix::sys::signal::Signal;

const RULE_FOR_SHOP: &str = "type=podLabel\nname=app\nvalue=shop\n";
const RULE_FOR_WEB: &str = "type=containerLabel\nname=tier\nvalue=web\n";

/// Routers on both hosts; that of h2, where the containers are, asks for a label.
fn start_routers(lab: &Lab, rule: &str, runtime: &str) -> Result<()> {
    lab.hosts().into_iter().try_for_each(Host::start_forwarder)?;
    lab.h1.start_router(&RouterOptions::default())?;
    let rules = lab.h2.write_rules("label", rule)?;
    lab.h2.start_router(&RouterOptions::with_rules(&rules).with("ROUTER_RUNTIME", runtime))
}

fn server(name: &str, port: u16) -> ContainerSpec {
    ContainerSpec::new(name, &format!("/bin/stream --server 0.0.0.0:{port} --pings"))
}

fn shop(port: u16) -> PodSpec {
    PodSpec::new("shop").label("app", "shop").container(server("web", port))
}

/// A client in a pod of the other host, connected.
fn connect(client: &Pod, server: Ipv4Addr, port: u16) -> Result<Process> {
    let mut command = Command::new(program("stream")?);
    command.args(["--client", &SocketAddr::new(server.into(), port).to_string(), "--pings", "--until-eof"]);
    let mut client = client.spawn(&format!("client-{port}"), &mut command)?;
    client.wait_until_it_says("connected", DEADLINE)?;
    Ok(client)
}

fn connect_to(client: &Pod, pod: &RunningPod, container: usize, port: u16) -> Result<Process> {
    pod.containers[container].wait_until_it_says("listening")?;
    connect(client, pod.address, port)
}

/// Both ends are content.
fn finish(containerd: &Containerd, mut client: Process, server: &RunningContainer) -> Result<()> {
    client.close_stdin();
    client.wait(DEADLINE)?.expect_success()?;
    let code = wait_for("the end of the server", DEADLINE, || containerd.exit_code(server))?;
    ensure!(code == 0, "the server ended with {code}: {}", server.log());
    Ok(())
}

fn expect_refused(host: &Host, port: u16) -> Result<()> {
    let reason = host.wait_until_refused(port)?;
    ensure!(reason == "no_rule_matches", "{reason}");
    Ok(())
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
    finish(&containerd, to_shop, &shop.containers[0])?;
    finish(&containerd, to_mail, &mail.containers[0])
}

#[test]
fn a_rule_for_a_containers_label_swaps_the_connections_of_that_container_only() -> Result<()> {
    let lab = Lab::new("container-label")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_WEB, "auto")?;
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
    finish(&containerd, to_web, &pod.containers[0])?;
    finish(&containerd, to_db, &pod.containers[1])
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
    let lab = Lab::new("runtime-restarts")?;
    let containerd = Containerd::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, "auto")?;
    let client = lab.h1.pod("client")?;
    let [before, unknown, after] =
        [7000, 7001, 7002].map(|port| PodSpec { name: format!("shop-{port}"), ..shop(port) });
    let (before, unknown) = (containerd.run_pod(&before)?, containerd.run_pod(&unknown)?);
    let to_before = connect_to(&client, &before, 0, 7000)?;
    lab.h2.wait_until_on_host(7000)?;
    containerd.stop()?;
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

#[test]
fn containers_of_podman_are_swapped_by_their_own_labels_or_their_pods() -> Result<()> {
    let lab = Lab::new("podman")?;
    let podman = Podman::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, &podman.socket().to_string_lossy())?;
    let client = lab.h1.pod("client")?;
    podman.create_pod("shop", "app=shop")?;
    podman.create_pod("mail", "app=mail")?;
    let mut clients = Vec::new();
    for (port, options) in [
        (7000, vec!["--name", "alone", "--label", "app=shop"]),
        (7001, vec!["--name", "in-shop", "--pod", "shop"]),
        (7002, vec!["--name", "in-mail", "--pod", "mail", "--label", "app=shop"]),
    ] {
        let network = lab.h2.pod(&format!("network-{port}"))?;
        podman.run_container(&network, &options, &format!("/bin/stream --server 0.0.0.0:{port} --pings"))?;
        wait_for("the server to listen", DEADLINE, || Ok(listens(network.place(), port).then_some(())))?;
        clients.push(connect(&client, network.v4, port)?);
    }
    ensure!(lab.h2.wait_until_on_host(7000)?.workload == "alone");
    ensure!(lab.h2.wait_until_on_host(7001)?.workload == "shop/in-shop");
    expect_refused(&lab.h2, 7002)?;
    for mut client in clients {
        client.close_stdin();
        client.wait(DEADLINE)?.expect_success()?;
    }
    Ok(())
}

#[test]
fn containers_of_docker_are_swapped_by_their_own_labels() -> Result<()> {
    let lab = Lab::new("docker")?;
    let docker = Docker::start(&lab.h2)?;
    start_routers(&lab, RULE_FOR_SHOP, &docker.socket().to_string_lossy())?;
    let client = lab.h1.pod("client")?;
    let mut clients = Vec::new();
    for (port, name, label) in [(7000, "web", "app=shop"), (7001, "mail", "app=mail")] {
        let program = format!("/bin/stream --server 0.0.0.0:{port} --pings");
        let address = docker.run_container(name, label, &program)?;
        docker.wait_until_it_says(name, "listening")?;
        clients.push(connect(&client, address, port)?);
    }
    ensure!(lab.h2.wait_until_on_host(7000)?.workload == "web");
    expect_refused(&lab.h2, 7001)?;
    for mut client in clients {
        client.close_stdin();
        client.wait(DEADLINE)?.expect_success()?;
    }
    Ok(())
}

/// Does anything in this network?
fn listens(place: &Place, port: u16) -> bool {
    let listening = place.run(Command::new("ss").args(["-Htln", &format!("sport = :{port}")]));
    listening.is_ok_and(|sockets| !sockets.is_empty())
}
