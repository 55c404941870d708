// SPDX-License-Identifier: Apache-2.0
//! When a connection is old enough to be swapped: `after=` of a rule, and its default.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    DEADLINE, RULE_FOR_ALL_PODS, RouterOptions, Scene,
    programs::{command, compile},
    wait_for,
    workload::StreamOptions,
};

const PORT: u16 = 7000;

/// Routers whose rule for all pods has this `after`.
fn scene(test: &str, after: &str) -> Result<Scene> {
    let scene = Scene::without_routers(test)?;
    let rules = scene.lab.h1.write_rules("after", &format!("{RULE_FOR_ALL_PODS}after={after}\n"))?;
    scene.lab.start_everything(&RouterOptions::with_rules(&rules))?;
    Ok(scene)
}

/// How many connections each router knows. `router flows` would scan, and find those that nobody has told of.
fn known(scene: &Scene) -> Result<[u64; 2]> {
    Ok([scene.lab.h1.status()?.flows, scene.lab.h2.status()?.flows])
}

#[test]
fn a_connection_that_ends_young_is_never_reported() -> Result<()> {
    let scene = scene("young-ends", "3s")?;
    // Thousands, so that some are made and end at any moment of a look.
    let calls = compile(&scene.lab, "cc", "calls")?.display().to_string();
    let _server = scene.server.serve("serve", &mut command(&format!("{calls} serve {PORT}")), PORT)?;
    let mut client = command(&format!("{calls} connect {} {PORT} 2", scene.server.v4));
    scene.client.exec("connect", &mut client, DEADLINE)?.expect_success()?;
    ensure!(known(&scene)? == [0, 0], "{:?}", known(&scene)?);
    // Others are.
    let begin = Instant::now();
    let stream = scene.stream(PORT + 1, "--pings")?;
    wait_for("both routers to know it", DEADLINE, || Ok((known(&scene)? == [1, 1]).then_some(())))
        .with_context(|| format!("{:?}", known(&scene)))?;
    ensure!(begin.elapsed() >= Duration::from_secs(3), "known after {:?}", begin.elapsed());
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_is_swapped_after_it_has_carried_enough() -> Result<()> {
    let scene = scene("young-carries", "20MiB")?;
    let (idle, busy) = (scene.stream(PORT, "--idle")?, scene.stream(PORT + 1, "")?);
    wait_for("a swap at both ends", DEADLINE, || {
        let swapped = [scene.lab.h1.status()?.swapped, scene.lab.h2.status()?.swapped];
        Ok((swapped == [1, 1]).then_some(()))
    })?;
    scene.wait_until_on_host(PORT + 1)?;
    for host in scene.lab.hosts() {
        let flows = host.flows()?;
        ensure!(!flows.iter().any(|flow| flow.has_port(PORT)), "an idle one is known: {flows:?}");
    }
    busy.finish()?;
    idle.finish()?;
    Ok(())
}

#[test]
fn after_zero_connections_are_reported_that_others_would_never_see() -> Result<()> {
    let scene = scene("young-zero", "0")?;
    // Young by default, all of them.
    let options = StreamOptions { client: "--seconds 0.05".into(), ..StreamOptions::both("--pings") };
    for _ in 0..10 {
        scene.stream_with(PORT, &options)?.end()?;
    }
    let status = scene.lab.h1.status()?;
    // Who was swapped is forgotten when it ends.
    ensure!(status.flows + status.swaps >= 5, "of 10 were seen: {status:?}");
    Ok(())
}

#[test]
fn after_zero_swaps_at_once() -> Result<()> {
    let scene = scene("young-at-once", "0")?;
    let stream = scene.stream(PORT, "--pings")?;
    let begin = Instant::now();
    wait_for("a swap at both ends", DEADLINE, || {
        Ok((scene.lab.h1.status()?.swaps == 1 && scene.lab.h2.status()?.swaps == 1).then_some(()))
    })?;
    // Before a scan, which comes every 30 s, was likely to show it.
    ensure!(begin.elapsed() < Duration::from_secs(10), "swapped after {:?}", begin.elapsed());
    stream.finish()?;
    Ok(())
}

#[test]
fn a_connection_that_is_accepted_late_is_swapped_then() -> Result<()> {
    let scene = scene("young-late", "0")?;
    let options = StreamOptions { server: "--accept-delay-ms 1500".into(), ..StreamOptions::both("--pings") };
    let stream = scene.stream_with(PORT, &options)?;
    wait_for("a swap at both ends", DEADLINE, || {
        Ok((scene.lab.h1.status()?.swaps == 1 && scene.lab.h2.status()?.swaps == 1).then_some(()))
    })?;
    stream.finish()?;
    Ok(())
}

#[test]
fn rules_that_are_changed_hold_for_connections_that_are_young() -> Result<()> {
    let scene = scene("young-changed", "3600s")?;
    let stream = scene.stream(PORT, "--pings")?;
    for host in scene.lab.hosts() {
        ensure!(!host.flows()?.iter().any(|flow| flow.has_port(PORT)), "it is known");
    }
    // Both routers read the same file.
    scene.lab.h1.write_rules("after", RULE_FOR_ALL_PODS)?;
    wait_for("a swap at both ends", DEADLINE, || {
        Ok((scene.lab.h1.status()?.swaps == 1 && scene.lab.h2.status()?.swaps == 1).then_some(()))
    })?;
    stream.finish()?;
    Ok(())
}
