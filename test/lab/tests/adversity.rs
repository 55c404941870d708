// SPDX-License-Identifier: Apache-2.0
//! What router and forwarder need gives out while connections move: the routers' own connection, the host path, room on
//! the disk, descriptors. The streams saturate both directions and check every byte.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{
    Cut, DEADLINE, Host, RouterOptions, Scene, leave_descriptors, limit_descriptors, wait_for,
    workload::Stream,
};

const PORTS: [u16; 2] = [7000, 7001];
const KINDS: [&str; 2] = ["--io epoll --threads 4 --stuck-after 20", "--fork 1 --dup 1 --stuck-after 20"];

/// More than any program here has.
const ENOUGH: u64 = 4096;
/// No number is left above the standard descriptors.
const NONE: u64 = 3;

/// Streams of several kinds that are swapped, and moved again and again.
struct Busy {
    scene: Scene,
    streams: Vec<Stream>,
    rounds: u32,
}

impl Busy {
    fn new(test: &str) -> Result<Busy> {
        Busy::in_scene(Scene::with_routers(test)?)
    }

    fn in_scene(scene: Scene) -> Result<Busy> {
        let streams = PORTS.into_iter().zip(KINDS).map(|(port, kind)| scene.swapped_stream(port, kind));
        let streams = streams.collect::<Result<_>>()?;
        Ok(Busy { scene, streams, rounds: 0 })
    }

    /// Has the router of `host` move all streams to where they are not, and gets into `trouble` at another moment of that each
    /// time.
    fn move_amid(&mut self, host: usize, trouble: impl FnOnce(&Scene) -> Result<()>) -> Result<()> {
        self.rounds += 1;
        let router = self.scene.lab.hosts()[host].direct();
        let flows = router.flows()?.context("no router answers")?;
        std::thread::scope(|scope| {
            for flow in flows.iter().filter(|flow| PORTS.iter().any(|port| flow.has_port(*port))) {
                let (router, conn) = (router.clone(), flow.conn.clone().unwrap_or_default());
                // Refused is well, too.
                scope.spawn(move || router.order(&conn, !flow.on_host()));
            }
            std::thread::sleep(Duration::from_micros(u64::from(self.rounds * 7919 % 40_000)));
            trouble(&self.scene)
        })?;
        self.check_whole()
    }

    /// Every connection is on one network at both ends, and its programs have seen nothing.
    fn check_whole(&mut self) -> Result<()> {
        for stream in &mut self.streams {
            let path = |host: &Host| -> Result<Option<String>> {
                let flow = host.flows()?.into_iter().find(|flow| flow.has_port(stream.port));
                Ok(flow.map(|flow| flow.path).filter(|path| path != "moving"))
            };
            let mut paths = [None, None];
            wait_for("both ends on one network", DEADLINE, || {
                paths = [path(&self.scene.lab.h1)?, path(&self.scene.lab.h2)?];
                Ok((paths[0].is_some() && paths[0] == paths[1]).then_some(()))
            })
            .with_context(|| format!("round {}, port {}: {paths:?}", self.rounds, stream.port))?;
            stream.expect_running().with_context(|| format!("round {}", self.rounds))?;
        }
        Ok(())
    }

    fn move_all(&self, path: &str) -> Result<()> {
        PORTS.into_iter().try_for_each(|port| {
            self.scene.lab.h1.move_to(port, path)?;
            match path {
                "host" => self.scene.wait_until_on_host(port),
                _ => self.scene.wait_until_on_overlay(port),
            }
        })
    }

    /// All is well again: every connection moves both ways, and every byte has arrived.
    fn end(mut self) -> Result<()> {
        self.check_whole()?;
        for path in ["overlay", "host"] {
            self.move_all(path).context("when all is well again")?;
        }
        self.finish()
    }

    fn finish(self) -> Result<()> {
        self.streams.into_iter().try_for_each(|stream| stream.finish().map(drop))
    }
}

/// Each of the times below, or, with LAB_THOROUGH, each on both hosts and more than once.
fn rounds() -> u32 {
    if std::env::var_os("LAB_THOROUGH").is_some() { 20 } else { 4 }
}

/// Short enough for nobody to be given up, and long enough for that.
fn some_time(number: u32) -> Duration {
    Duration::from_millis([20, 150, 400, 900][number as usize % 4])
}

fn cut_routers(test: &str, cut: Cut) -> Result<()> {
    let mut busy = Busy::new(test)?;
    for number in 0..rounds() {
        busy.move_amid(number as usize / 2 % 2, |scene| {
            let host = scene.lab.hosts()[number as usize % 2];
            host.cut(cut)?;
            std::thread::sleep(some_time(number));
            host.heal()
        })?;
    }
    busy.end()
}

#[test]
fn what_routers_say_to_each_other_may_be_lost_while_connections_move() -> Result<()> {
    cut_routers("routers-drop", Cut::Routers)
}

#[test]
fn the_connection_of_the_routers_may_be_reset_while_connections_move() -> Result<()> {
    cut_routers("routers-reset", Cut::RoutersByReset)
}

#[test]
fn a_router_that_is_silent_for_longer_than_its_peer_waits_is_reached_again() -> Result<()> {
    let mut busy = Busy::new("routers-silent")?;
    busy.move_amid(0, |scene| {
        scene.lab.h1.cut(Cut::Routers)?;
        for host in scene.lab.hosts() {
            let is_lost = || Ok(host.router_log().contains("is lost").then_some(()));
            wait_for("a router to give its peer up", DEADLINE, is_lost)?;
        }
        scene.lab.h1.heal()
    })?;
    busy.end()
}

#[test]
fn a_host_path_may_fail_for_a_while_in_mid_move() -> Result<()> {
    let mut busy = Busy::new("path-fails")?;
    for number in 0..rounds() {
        busy.move_amid(number as usize / 2 % 2, |scene| {
            let host = scene.lab.hosts()[number as usize % 2];
            host.cut(Cut::Everything)?;
            std::thread::sleep(some_time(number));
            host.heal()
        })?;
    }
    busy.end()
}

#[test]
fn a_connection_whose_host_path_fails_for_good_in_mid_move_ends_on_the_overlay() -> Result<()> {
    let mut busy = Busy::new("path-ends")?;
    for (number, from) in ["overlay", "host"].into_iter().enumerate() {
        busy.move_all(from)?;
        busy.move_amid(0, |scene| {
            let host = scene.lab.hosts()[number];
            host.cut(Cut::Everything)?;
            let began = Instant::now();
            PORTS.into_iter().try_for_each(|port| scene.wait_until_on_overlay(port))?;
            eprintln!("all on the overlay after {:?}", began.elapsed());
            std::thread::sleep(Duration::from_secs(3).saturating_sub(began.elapsed()));
            host.heal()
        })?;
    }
    busy.end()
}

#[test]
fn logs_that_find_no_room_change_nothing() -> Result<()> {
    let scene = Scene::without_routers("lost-logs")?;
    scene.lab.hosts().into_iter().for_each(Host::lose_logs);
    scene.lab.start_everything(&RouterOptions::default())?;
    let mut busy = Busy::in_scene(scene)?;
    busy.move_amid(0, |scene| {
        scene.lab.h1.kill_router()?;
        scene.lab.h1.start_router(&RouterOptions::default())
    })?;
    busy.end()
}

#[test]
fn connections_move_while_the_disk_is_full_and_programs_that_find_no_room_say_so() -> Result<()> {
    let scene = Scene::without_routers("full-disk")?;
    scene.lab.h1.use_small_disk()?;
    scene.lab.start_everything(&RouterOptions::default())?;
    let busy = Busy::in_scene(scene)?;
    let host = &busy.scene.lab.h1;
    host.fill_small_disk()?;
    for path in ["overlay", "host"] {
        busy.move_all(path)?;
    }
    host.stop_router()?;
    host.stop_forwarder()?;
    host.fill_small_disk()?;
    for program in [host.spawn_forwarder()?, host.spawn_router(&RouterOptions::default())?] {
        let end = program.wait(DEADLINE)?;
        ensure!(end.status.code() == Some(1), "{end:?}");
        let errors: Vec<&str> = end.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        ensure!(errors.len() == 1, "one error expected: {}", end.stderr);
        ensure!(errors[0].matches("No space left on device").count() == 1, "{}", end.stderr);
    }
    host.clear_small_disk()?;
    host.start_forwarder()?;
    host.start_router(&RouterOptions::default())?;
    busy.end()
}

/// Moves while a program of one host has so many descriptors left, of either host in turn, and enough again a moment later.
fn take_descriptors(test: &str, left: &[usize], pid: impl Fn(&Host) -> Option<u32>) -> Result<Busy> {
    let mut busy = Busy::new(test)?;
    for (round, left) in left.iter().enumerate() {
        let poor = round % 2;
        let pid = pid(busy.scene.lab.hosts()[poor]).context("it does not run")?;
        leave_descriptors(pid, *left)?;
        // The other host's router is asked: this one may not be able to answer.
        busy.move_amid(1 - poor, |_| {
            std::thread::sleep(Duration::from_millis(150));
            limit_descriptors(pid, ENOUGH)
        })?;
    }
    Ok(busy)
}

#[test]
fn a_forwarder_that_runs_out_of_descriptors_refuses_and_says_why() -> Result<()> {
    // One transaction takes about 50, spare ones among them.
    let left = [200, 100, 90, 80, 70, 60, 55, 50, 45, 40, 20, 10, 3, 2, 1, 0, 0];
    let busy = take_descriptors("poor-forwarder", &left, Host::forwarder_pid)?;
    for host in busy.scene.lab.hosts() {
        let status = host.status()?;
        ensure!(status.refused.contains_key("exhausted"), "{}: {status:?}", host.name);
    }
    busy.end()
}

#[test]
fn a_router_that_runs_out_of_descriptors_refuses_and_goes_on_later() -> Result<()> {
    take_descriptors("poor-router", &[4, 4, 3, 3, 2, 2, 1, 1, 0, 0], Host::router_pid)?.end()
}

#[test]
fn a_forwarder_that_cannot_let_a_router_in_waits_and_keeps_the_ways_back() -> Result<()> {
    let busy = Busy::new("no-session")?;
    let host = &busy.scene.lab.h1;
    let forwarder = host.forwarder_pid().context("no forwarder runs")?;
    limit_descriptors(forwarder, NONE)?;
    host.kill_router()?;
    host.start_router(&RouterOptions::default())?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(!host.forwarder_has_ended());
    limit_descriptors(forwarder, ENOUGH)?;
    busy.scene.wait_until_on_host(PORTS[0])?;
    busy.end()
}

/// Longer than anybody waits for a word.
fn cut_at_the_decision(test: &str, from: &str) -> Result<Busy> {
    let mut busy = Busy::new(test)?;
    busy.move_all(from)?;
    busy.scene.lab.h1.cut(Cut::RoutersFromDecision)?;
    busy.move_amid(0, |scene| {
        std::thread::sleep(Duration::from_secs(6));
        scene.lab.h1.heal()
    })?;
    Ok(busy)
}

#[test]
fn routers_may_lose_each_other_at_the_decision_of_a_swap() -> Result<()> {
    cut_at_the_decision("decision", "overlay")?.end()
}

#[test]
fn routers_may_lose_each_other_at_the_decision_of_a_swap_back() -> Result<()> {
    // Bytes were carried into the overlay connection in vain: there may be no way back any more.
    cut_at_the_decision("decision-back", "host")?.finish()
}
