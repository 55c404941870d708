// SPDX-License-Identifier: Apache-2.0
//! With a real Kubernetes API server: the rules are a ConfigMap's, and the pods' status tells where a peer is.
//!
//! Run by `test/run.sh --cluster`, which builds the server.

use anyhow::{Result, ensure};
use lab::{ApiServer, DEADLINE, RULE_FOR_ALL_PODS, RULE_FOR_OTHERS, RouterOptions, Scene, wait_for};

const PORT: u16 = 7000;
const BROKEN_RULE: &str = "type=cidr\nname=pods\nfrom=10.244.0.0/99\n";

/// Routers that have read a rule for all pods from the ConfigMap.
fn with_rule(test: &str) -> Result<(Scene, ApiServer)> {
    let scene = Scene::without_routers(test)?;
    let server = ApiServer::start(&scene.lab.h1)?;
    server.apply_rule("pods", RULE_FOR_ALL_PODS)?;
    scene.lab.start_everything(&server.router_options())?;
    Ok((scene, server))
}

#[test]
fn rules_of_a_config_map_take_effect_live() -> Result<()> {
    let scene = Scene::without_routers("cluster-rules")?;
    let server = ApiServer::start(&scene.lab.h1)?;
    scene.lab.start_everything(&server.router_options())?;
    let missing = |status: &lab::Status| {
        status.rules_error.as_ref().is_some_and(|error| error.contains("no ConfigMap"))
    };
    scene.lab.h1.wait_for_status("there is no ConfigMap", missing)?;
    let stream = scene.stream(PORT, "--pings")?;
    for host in scene.lab.hosts() {
        ensure!(
            host.wait_until_refused(PORT)? == "no_rule_matches",
            "before there are rules, nothing is swapped"
        );
    }
    server.apply_rule("pods", RULE_FOR_ALL_PODS)?;
    scene.wait_until_on_host(PORT)?;
    server.apply_rule("pods", RULE_FOR_OTHERS)?;
    scene.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_broken_rule_is_named_in_status_and_one_event_and_the_last_good_rules_stay() -> Result<()> {
    let (scene, server) = with_rule("cluster-broken")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    server.apply_rule("pods", BROKEN_RULE)?;
    for host in scene.lab.hosts() {
        let status = host.wait_for_status("a rule is wrong", |status| status.rules_error.is_some())?;
        let error = status.rules_error.unwrap_or_default();
        ensure!(
            error.contains("ConfigMap kube-system/ebpf-router-rules, key pods:3") && status.rules_errors == 1,
            "{error}"
        );
    }
    let broken = || {
        let mut events = server.list("kube-system", "events")?;
        events.retain(|event| event["reason"] == "BrokenRule");
        anyhow::Ok(events)
    };
    wait_for("an Event", DEADLINE, || Ok((!broken()?.is_empty()).then_some(())))?;
    let events = broken()?;
    ensure!(events.len() == 1, "two routers have seen one change: {events:#?}");
    let message = events[0]["message"].as_str().unwrap_or_default();
    ensure!(
        message.contains("10.244.0.0/99") && events[0]["involvedObject"]["name"] == "ebpf-router-rules",
        "{events:#?}"
    );
    scene.wait_until_on_host(PORT)?;
    scene.swapped_stream(PORT + 1, "--pings")?.finish()?;
    server.apply_rule("pods", RULE_FOR_ALL_PODS)?;
    scene.lab.h1.wait_for_status("the rules are right", |status| status.rules_error.is_none())?;
    stream.finish()?;
    Ok(())
}

#[test]
fn the_status_of_pods_tells_where_the_peer_is() -> Result<()> {
    let (scene, server) = with_rule("cluster-pods")?;
    server.put_pod(&scene.client, &scene.lab.h1)?;
    server.put_pod(&scene.server, &scene.lab.h2)?;
    // Of a pod that is only just told of, the route may be known first.
    wait_for("a peer found by Kubernetes on both hosts", DEADLINE, || {
        scene.swapped_stream(PORT, "--pings")?.finish()?;
        let hosts = [&scene.lab.h1, &scene.lab.h2];
        let mut found = 0;
        for (host, other) in hosts.into_iter().zip(hosts.into_iter().rev()) {
            let other = other.address.to_string();
            let by_kubernetes =
                host.peers()?.into_iter().find(|peer| peer.found_by.as_deref() == Some("kubernetes"));
            found += usize::from(by_kubernetes.is_some_and(|peer| {
                peer.address == other && peer.reached && peer.host_address == Some(other)
            }));
        }
        Ok((found == 2).then_some(()))
    })
}

#[test]
fn a_router_that_knows_more_pods_goes_by_what_its_peer_knows() -> Result<()> {
    let scene = Scene::without_routers("cluster-mixed")?;
    let server = ApiServer::start(&scene.lab.h1)?;
    server.apply_rule("pods", RULE_FOR_ALL_PODS)?;
    for (pod, host) in [(&scene.client, &scene.lab.h1), (&scene.server, &scene.lab.h2)] {
        server.put_pod(pod, host)?;
    }
    scene.lab.hosts().into_iter().try_for_each(lab::Host::start_forwarder)?;
    scene.lab.h1.start_router(&server.router_options())?;
    scene.lab.h2.start_router(&RouterOptions::default())?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    ensure!(scene.lab.h2.peers()?.iter().all(|peer| peer.found_by.as_deref() == Some("route")));
    Ok(())
}

#[test]
fn while_the_api_server_is_away_the_router_goes_on_with_what_it_knows() -> Result<()> {
    let (scene, mut server) = with_rule("cluster-away")?;
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    h1.wait_for_status("the API server is reached", |status| status.kubernetes == Some(true))?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    server.stop()?;
    for host in [h1, h2] {
        host.wait_for_status("the API server is away", |status| status.kubernetes == Some(false))?;
        ensure!(host.status()?.rules_error.is_none());
    }
    scene.swapped_stream(PORT + 1, "--pings")?.finish()?;
    let log = h1.router_log();
    let complaints =
        log.lines().filter(|line| line.contains("WARN") && line.contains("is not reached")).count();
    ensure!(complaints == 1, "said once: {log}");
    server.start_again()?;
    h1.wait_for_status("the API server is reached again", |status| status.kubernetes == Some(true))?;
    server.apply_rule("pods", RULE_FOR_OTHERS)?;
    scene.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}

#[test]
fn a_router_starts_without_the_api_server_and_hears_of_it_later() -> Result<()> {
    let scene = Scene::without_routers("cluster-later")?;
    let mut server = ApiServer::start(&scene.lab.h1)?;
    server.apply_rule("pods", RULE_FOR_OTHERS)?;
    server.stop()?;
    // A mounted ConfigMap serves until then.
    let mut options = server.router_options();
    options.rules = None;
    scene.lab.start_everything(&options)?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    server.start_again()?;
    scene.wait_until_on_overlay(PORT)?;
    stream.finish()?;
    Ok(())
}
