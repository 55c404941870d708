// SPDX-License-Identifier: Apache-2.0
//! Every workload passes over the overlay with no router anywhere. Only then does its failure elsewhere mean us.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    DEADLINE, Family, Lab,
    measure::{RunningIperf3, ping_pong},
    program,
    workload::{Stream, StreamOptions},
};

fn check(test: &str, family: Family, arguments: &[&str]) -> Result<()> {
    let lab = Lab::new(test)?;
    let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
    for (port, arguments) in (7000..).zip(arguments) {
        let options = StreamOptions {
            family: Some(family),
            client: "--bytes 20000000".into(),
            ..StreamOptions::both(arguments)
        };
        Stream::start(&client, &server, port, &options)?.end()?;
    }
    Ok(())
}

#[test]
fn every_way_to_read_and_write_passes() -> Result<()> {
    check(
        "plain-io",
        Family::V4,
        &["--io blocking", "--io poll", "--io select", "--io epoll", "--io epoll-et", "--io epoll-oneshot"],
    )
}

#[test]
fn shared_sockets_pass() -> Result<()> {
    check(
        "plain-shared",
        Family::V4,
        &[
            "--threads 64",
            "--fork 4",
            "--fork 4 --fork-reader",
            "--dup 2",
            "--dup 2 --io epoll-oneshot --fork 2",
        ],
    )
}

#[test]
fn every_kind_of_address_passes() -> Result<()> {
    check("plain-v4", Family::V4, &["--names"])?;
    check("plain-v6", Family::V6, &["--names", "--names --io epoll"])?;
    check("plain-mapped", Family::Mapped, &["--names", "--names --io epoll"])
}

#[test]
fn either_side_may_speak_first() -> Result<()> {
    check("plain-first", Family::V4, &["--speak-first server", "--speak-first client --io epoll-et"])
}

#[test]
fn pings_and_a_late_server_pass() -> Result<()> {
    let lab = Lab::new("plain-pings")?;
    let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
    for (port, both, server_only, client_only) in [
        (7000, "--pings --names", "", "--bytes 1000"),
        (7001, "--idle", "", "--seconds 0.1"),
        (7002, "", "--accept-delay-ms 500", "--bytes 1000000"),
    ] {
        let mut options = StreamOptions::both(both);
        options.server = server_only.into();
        options.client = client_only.into();
        let stream = Stream::start(&client, &server, port, &options)?;
        if both == "--idle" {
            stream.finish()?
        } else {
            stream.end()?
        };
    }
    Ok(())
}

#[test]
fn a_program_that_connects_to_itself_passes() -> Result<()> {
    let lab = Lab::new("plain-self")?;
    let pod = lab.h1.pod("alone")?;
    let address = pod.address(Family::V4, 7000).to_string();
    let mut running = pod.spawn("selfconnect", Command::new(program("selfconnect")?).arg(address))?;
    running.wait_until_it_says("connected", DEADLINE)?;
    running.close_stdin();
    running.wait(Duration::from_secs(5))?.expect_success()?;
    Ok(())
}

#[test]
fn iperf3_and_sockperf_give_figures() -> Result<()> {
    let lab = Lab::new("plain-figures")?;
    let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
    let (client, server, address) = (client.place(), server.place(), server.v4.into());
    for arguments in [["-t", "1", "-O", "1"], ["-t", "1", "--bidir", "-4"]] {
        let iperf3 = RunningIperf3::start(client, server, address, &[&["--json"], &arguments[..]].concat())?;
        let figures = iperf3.finish()?;
        println!("{arguments:?}: {} Gbit/s, {} %", figures.gbps(), figures.cpu_percent());
        ensure!(figures.gbps() > 0.1 && figures.cpu_percent() > 1.0);
    }
    let (figures, ()) = ping_pong(client, server, address, Duration::from_secs(1), || Ok(()))?;
    println!("{figures:?}");
    ensure!(figures.mean_us > 1.0 && figures.p99_us >= figures.p50_us);
    Ok(())
}
