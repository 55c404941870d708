// SPDX-License-Identifier: Apache-2.0
//! Those who order moves, and what befalls routers, forwarders and rules.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::{Direct, Flow, Host, Lab, RULE_FOR_ALL_PODS, RULE_FOR_ALL_PODS_V6, RouterOptions};

use super::{
    plan::{Blow, Fate, Move, Mover, Rules, What},
    tally::Tally,
};

/// How old a list of connections may be. To make one, the forwarder looks at every descriptor of the host.
const FRESH: Duration = Duration::from_secs(1);

/// Orders moves until `over`.
pub fn order_moves(mover: &mut Mover, views: &[View<'_>; 2], tally: &Tally, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let Move { pause, host, what } = mover.next_move();
        std::thread::sleep(pause);
        if let Err(error) = views[host].carry_out(what) {
            tally.error(&format!("the router of {}: {error:#}", views[host].host.name));
        }
    }
}

/// A host's connections that may be moved, as its router showed them a moment ago.
pub struct View<'a> {
    host: &'a Host,
    direct: Direct,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    flows: Vec<Flow>,
    seen: Option<Instant>,
}

impl View<'_> {
    pub fn of(host: &Host) -> View<'_> {
        View { host, direct: host.direct(), list: Mutex::default() }
    }

    fn carry_out(&self, what: What) -> Result<()> {
        let place = match what {
            What::AllBack => {
                // Some are refused, or have ended: the command says so, and ends with an error.
                let _ = self.host.swap_back_all();
                return Ok(());
            }
            What::One(place) => place,
        };
        let Some(flow) = self.take(place)? else { return Ok(()) };
        let conn = flow.conn.as_deref().context("a connection without a name")?;
        // Refused, or nobody there: the routers count that.
        self.direct.order(conn, !flow.on_host()).with_context(|| format!("{flow:?}"))
    }

    /// Each is moved once a list.
    fn take(&self, place: usize) -> Result<Option<Flow>> {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if list.flows.is_empty() || list.seen.is_none_or(|seen| seen.elapsed() > FRESH) {
            list.flows = self.direct.flows()?.unwrap_or_default();
            list.flows.retain(|flow| flow.path == "overlay" || flow.way_back == Some(true));
            list.seen = Some(Instant::now());
        }
        let count = list.flows.len();
        Ok((count > 0).then(|| list.flows.swap_remove(place % count)))
    }
}

/// Deals blows until `over`. Those that end a process stop at `last_kill`.
pub fn deal_blows(fate: &mut Fate, lab: &Lab, tally: &Tally, last_kill: Instant, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        let (pause, blow) = if Instant::now() < last_kill { fate.next_blow() } else { fate.next_rules() };
        let until = Instant::now() + pause;
        while Instant::now() < until && !over.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50).min(pause));
        }
        if let Err(error) = deal(blow, lab, tally) {
            tally.error(&format!("{blow:?}: {error:#}"));
            // Nothing works without them: what cannot be started is told once.
            return;
        }
    }
}

fn deal(blow: Blow, lab: &Lab, tally: &Tally) -> Result<()> {
    let hosts = lab.hosts();
    match blow {
        Blow::KillRouter(host) => kill(&hosts[host..=host], true, false, tally),
        Blow::KillForwarder(host) => kill(&hosts[host..=host], false, true, tally),
        Blow::KillBoth(host) => kill(&hosts[host..=host], true, true, tally),
        Blow::KillEverything => kill(&hosts, true, true, tally),
        Blow::RestartRouter(host) => {
            let host = hosts[host];
            host.terminate_router()?;
            tally.look_at(host);
            host.wait_for_router()?.expect_success()?;
            tally.router_ended(host);
            tally.counts().restarts += 1;
            host.start_router(&RouterOptions::default())
        }
        Blow::Rules(host, rules) => {
            tally.counts().rule_changes += 1;
            set_rules(hosts[host], rules)
        }
    }
}

fn kill(hosts: &[&Host], router: bool, forwarder: bool, tally: &Tally) -> Result<()> {
    for host in hosts {
        if router {
            tally.look_at(host);
            host.kill_router()?;
            tally.router_ended(host);
        }
        if forwarder {
            host.kill_forwarder()?;
        }
        tally.counts().kills += u64::from(router) + u64::from(forwarder);
    }
    for host in hosts {
        if forwarder {
            host.start_forwarder()?;
        }
        if router {
            host.start_router(&RouterOptions::default())?;
        }
    }
    Ok(())
}

fn set_rules(host: &Host, rules: Rules) -> Result<()> {
    const NOBODY: &str = "type=cidr\nname=nobody\nfrom=192.0.2.0/24\nto=192.0.2.0/24\nreverse=false\n";
    const ONE_CLIENT: &str = "type=cidr\nname=few\nfrom=10.244.0.0/16\nto=10.244.1.10/32\nreverse=false\n";
    let (v4, v6) = match rules {
        Rules::AllPods => (RULE_FOR_ALL_PODS, RULE_FOR_ALL_PODS_V6),
        Rules::Few => (ONE_CLIENT, NOBODY),
        Rules::Nothing => (NOBODY, NOBODY),
    };
    host.replace_rule("pods", v4)?;
    host.replace_rule("pods6", v6)
}
