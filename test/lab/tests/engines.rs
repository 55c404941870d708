// SPDX-License-Identifier: Apache-2.0
//! Containers of Podman and Docker, without Kubernetes: rules find their labels.

#[path = "containers/shop.rs"]
mod shop;

use std::process::Command;

use anyhow::{Result, ensure};
use lab::{DEADLINE, Lab, Place, docker::Docker, podman::Podman, wait_for};

use shop::{RULE_FOR_SHOP, connect, expect_refused, start_routers};

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
