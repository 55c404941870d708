// SPDX-License-Identifier: Apache-2.0
//! SIGKILL while connections move. The streams saturate both directions and check every byte.
//!
//! LAB_KILLS sets how often each test with kills at random moments kills; the default is short enough for every run.
//! With LAB_THOROUGH, the tests with chosen points try all kinds of holders at each of them, not one in turn.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use lab::{Host, RULE_FOR_ALL_PODS, RouterOptions, Scene};

/// Among them those that see a stop of which nobody takes care: a blocking write that ends short, EINTR from epoll_wait(2)
/// (signal(7)).
const KINDS: [&str; 5] = ["", "--io epoll --threads 8", "--fork 2 --dup 1", "--pings", "--io poll"];

/// All of `forwarder/src/fault.rs`.
const POINTS: [&str; 16] = [
    "seizing",
    "stopped",
    "frozen",
    "started",
    "lent",
    "holding",
    "armed",
    "promised",
    "opening",
    "opened",
    "finishing",
    "restoring",
    "releasing",
    "installed",
    "thawing",
    "parking",
];

fn kills() -> u32 {
    std::env::var("LAB_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(4)
}

/// Each time a new stream, which moves to and fro as fast as it can, and a kill in the middle of that.
fn check(test: &str, kill: impl Fn(&Scene, &Host, &RouterOptions) -> Result<()>) -> Result<()> {
    let scene = Scene::without_routers(test)?;
    // However young.
    let rules = scene.lab.h1.write_rules("at-once", &format!("{RULE_FOR_ALL_PODS}after=0\n"))?;
    let options = RouterOptions::with_rules(&rules);
    scene.lab.start_everything(&options)?;
    let mut orders = 0;
    for number in 0..kills() {
        let kind = KINDS[number as usize % KINDS.len()];
        let port = 7000 + number as u16;
        let hosts = scene.lab.hosts();
        let (killed, other) = (hosts[number as usize / 2 % 2], hosts[1 - number as usize / 2 % 2]);
        let context = || format!("kill {} ({}), {kind}", number + 1, killed.name);
        let mut stream = scene.swapped_stream(port, kind).with_context(context)?;
        let conn = other.wait_until_on_host(port)?.conn.context("a swapped connection has a name")?;
        let (router, is_over) = (other.direct(), AtomicBool::new(false));
        orders += std::thread::scope(|scope| -> Result<u32> {
            let moves = scope.spawn(|| -> Result<u32> {
                let mut orders = 0;
                while !is_over.load(Ordering::Relaxed) {
                    // Refused is well, too.
                    router.order(&conn, orders % 2 == 1)?;
                    orders += 1;
                    // There may be no router that answers.
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(orders)
            });
            std::thread::sleep(Duration::from_micros(u64::from(number * 7919 % 40_000)));
            let killed = kill(&scene, killed, &options);
            is_over.store(true, Ordering::Relaxed);
            let orders = moves.join().map_err(|_| anyhow!("the thread that moves has panicked"))?;
            killed.and(orders)
        })
        .with_context(context)?;
        stream.expect_running().with_context(context)?;
        stream.finish().with_context(context)?;
    }
    // And it still works.
    scene.swapped_stream(6999, "--pings")?.finish()?;
    eprintln!("{} kills survived, amid {orders} orders to move", kills());
    Ok(())
}

#[test]
fn forwarders_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-forwarders", |_, host, _| {
        host.kill_forwarder()?;
        host.start_forwarder()
    })
}

#[test]
fn routers_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-routers", |_, host, options| {
        host.kill_router()?;
        host.start_router(options)
    })
}

#[test]
fn everything_may_be_killed_while_connections_move() -> Result<()> {
    check("kill-everything", |scene, _, options| {
        for host in scene.lab.hosts() {
            host.kill_router()?;
            host.kill_forwarder()?;
        }
        scene.lab.start_everything(options)
    })
}

/// A move during which forwarders die.
struct Fatal {
    scene: Scene,
    port: u16,
    deaths: u32,
}

impl Fatal {
    fn new(test: &str) -> Result<Fatal> {
        Ok(Fatal { scene: Scene::with_routers(test)?, port: 7000, deaths: 0 })
    }

    /// A new stream, of each kind or of one in turn, and `faults` for the forwarders of h1 and h2. `begin` makes it move
    /// so that they die; then the stream must go on, with new forwarders.
    fn check(
        &mut self,
        faults: [Option<String>; 2],
        begin: impl Fn(&Scene, u16) -> Result<()> + Sync,
    ) -> Result<()> {
        let thorough = std::env::var_os("LAB_THOROUGH").is_some();
        let in_turn = usize::from(self.port) % KINDS.len();
        for kind in if thorough { &KINDS[..] } else { &KINDS[in_turn..=in_turn] } {
            self.port += 1;
            self.check_kind(&faults, kind, &begin).with_context(|| format!("{faults:?}, {kind}"))?;
        }
        Ok(())
    }

    fn check_kind(
        &mut self,
        faults: &[Option<String>; 2],
        kind: &str,
        begin: impl Fn(&Scene, u16) -> Result<()> + Sync,
    ) -> Result<()> {
        let dying: Vec<(&Host, &String)> = self
            .scene
            .lab
            .hosts()
            .into_iter()
            .zip(faults)
            .filter_map(|(host, fault)| Some((host, fault.as_ref()?)))
            .collect();
        for (host, fault) in &dying {
            host.kill_forwarder()?;
            host.start_forwarder_with_fault(fault)?;
        }
        let mut stream = self.scene.stream(self.port, kind)?;
        let (scene, port) = (&self.scene, self.port);
        let died = std::thread::scope(|scope| -> Result<u32> {
            // Its answer comes when there is a forwarder again.
            let begun = scope.spawn(|| begin(scene, port));
            let died = wait_for_deaths(&dying);
            for (host, _) in &dying {
                host.kill_forwarder()?;
            }
            stream.expect_running()?;
            for (host, _) in &dying {
                host.start_forwarder()?;
            }
            let _ = begun.join();
            Ok(died)
        })?;
        self.deaths += died;
        // A stream whose ends are on different paths never comes to its end.
        stream.finish().map(drop)
    }

    fn end(self, expected: u32) -> Result<()> {
        eprintln!("{} forwarders died at their points, and nobody noticed", self.deaths);
        ensure!(self.deaths >= expected, "only {} forwarders died, {expected} expected", self.deaths);
        Ok(())
    }
}

/// How many have died at their points. Not every kind of holder passes every point: one thread needs no hold.
fn wait_for_deaths(dying: &[(&Host, &String)]) -> u32 {
    let died = || dying.iter().filter(|(host, _)| host.forwarder_has_ended()).count();
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until && died() < dying.len() {
        std::thread::sleep(Duration::from_millis(5));
    }
    died() as u32
}

#[test]
fn a_forwarder_may_die_at_every_point_of_a_swap() -> Result<()> {
    let mut fatal = Fatal::new("die-swap")?;
    for point in POINTS {
        fatal.check([Some(point.to_owned()), None], |_, _| Ok(()))?;
        fatal.check([None, Some(point.to_owned())], |_, _| Ok(()))?;
    }
    fatal.end(24)
}

#[test]
fn a_forwarder_may_die_at_every_point_of_a_swap_back() -> Result<()> {
    let mut fatal = Fatal::new("die-back")?;
    // Those that are passed once in each move: the second time is that of the way back.
    let many = [
        "seizing",
        "holding",
        "restoring",
        "releasing",
        "finishing",
        "started",
        "lent",
        "thawing",
        "parking",
    ];
    for point in POINTS.into_iter().filter(|point| !many.contains(point)) {
        let back = |scene: &Scene, port: u16| -> Result<()> {
            scene.wait_until_on_host(port)?;
            scene.lab.h1.swap_back_all()
        };
        let second = Some(format!("{point}:2"));
        fatal.check([second.clone(), None], back)?;
        fatal.check([None, second], back)?;
    }
    fatal.end(12)
}

#[test]
fn the_forwarders_of_both_hosts_may_die_within_one_install() -> Result<()> {
    let mut fatal = Fatal::new("die-both")?;
    for decider in ["armed", "opening", "opened", "finishing"] {
        for follower in ["armed", "promised", "opening", "opened", "finishing"] {
            // Whichever has the smaller address decides: the pod of h1.
            fatal.check([Some(decider.to_owned()), Some(follower.to_owned())], |_, _| Ok(()))?;
        }
    }
    fatal.end(20)
}
