// SPDX-License-Identifier: Apache-2.0
//! Many connections of all kinds, moved to and fro at random, while routers and forwarders are killed, applications
//! end or are killed, and rules change. Every byte is checked.
//!
//! A run has three acts, and all applications end after each, so that what is left can be counted: a first minute;
//! the kills; and time for what was started last to leak.
//!
//! ```text
//!   plan (pure, from the seed) ──┬─▶ crowd      applications come and go
//!                                ├─▶ trouble    moves, kills, rules
//!                                └─▶ census     after each act ──▶ report
//! ```

mod census;
mod crowd;
mod plan;
mod report;
mod tally;
mod trouble;

use std::{
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Pod, RouterOptions};

use census::{Census, Figure};
use crowd::Crowd;
use plan::{Fate, Mover, PODS_OF_A_HOST, Slot};
use report::Report;
use tally::{Moves, Tally};
use trouble::View;

#[derive(clap::Args)]
pub struct Options {
    #[arg(long, default_value_t = 10.0)]
    minutes: f64,
    /// Makes the decisions of a run; another one each time unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Connections at the same time.
    #[arg(long, default_value_t = 200)]
    connections: usize,
    /// Where torture.json goes.
    #[arg(long, default_value = "test/results", value_name = "DIRECTORY")]
    results: PathBuf,
}

const MOVERS: usize = 8;
/// Between two orders of a mover, on average.
const BETWEEN_ORDERS: Duration = Duration::from_millis(150);
/// How long routers may take to see that all connections are over, and what belongs to them to go.
const REST: Duration = Duration::from_secs(45);
const PROGRESS: Duration = Duration::from_secs(30);

/// How long a part of a run lasts, and for how long of it processes are killed.
struct Act {
    lasts: Duration,
    kills: Duration,
}

/// A minute, the kills and a minute after them, and the rest: of short runs, the same shares.
fn acts(total: Duration) -> [Act; 3] {
    let minute = (total / 5).min(Duration::from_secs(60));
    let second = (total - minute) * 3 / 5;
    [
        Act { lasts: minute, kills: Duration::ZERO },
        Act { lasts: second, kills: second - minute },
        Act { lasts: total - minute - second, kills: Duration::ZERO },
    ]
}

pub fn run(options: &Options) -> Result<()> {
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..1 << 32));
    println!("seed {seed}");
    let stage = Stage::new()?;
    let mut fate = Fate::new(seed);
    let mut movers = Mover::all(seed, MOVERS, BETWEEN_ORDERS);
    let mut crowd = Crowd::new(&stage.pods, Slot::all(seed, options.connections), &stage.tally);
    let mut censuses = Vec::new();
    for act in acts(Duration::from_secs_f64(options.minutes * 60.0)) {
        stage.play(&act, &mut crowd, &mut movers, &mut fate);
        censuses.push(stage.rest()?);
    }
    let report = Report {
        seed,
        minutes: options.minutes,
        connections_at_once: options.connections,
        counts: stage.tally.counts().clone(),
        moves: stage.moves()?,
        growth: census::compare(&censuses),
    };
    print!("{}", report.table());
    std::fs::create_dir_all(&options.results)?;
    let path = options.results.join("torture.json");
    std::fs::write(&path, format!("{:#}\n", report.json()))
        .with_context(|| format!("writing {}", path.display()))?;
    let (errors, leaks) = (report.counts.errors, report.leaks());
    ensure!(errors == 0 && leaks == 0, "{errors} errors, {leaks} leaks; the seed was {seed}");
    ensure!(report.moves.swaps > 0 && report.moves.swap_backs > 0, "nothing was moved; the seed was {seed}");
    Ok(())
}

/// What everything happens on.
struct Stage {
    pods: Vec<Pod>,
    tally: Tally,
    lab: Lab,
}

impl Stage {
    fn new() -> Result<Stage> {
        let lab = Lab::new("torture")?;
        let mut pods = Vec::new();
        for host in lab.hosts() {
            for number in 0..PODS_OF_A_HOST {
                pods.push(host.pod(&format!("h{}-pod{number}", host.index))?);
            }
        }
        lab.start_everything(&RouterOptions::default())?;
        Ok(Stage { pods, tally: Tally::new(), lab })
    }

    /// Applications and trouble for a while; at the end, the applications have ended.
    fn play(&self, act: &Act, crowd: &mut Crowd<'_>, movers: &mut [Mover], fate: &mut Fate) {
        let (lab, tally) = (&self.lab, &self.tally);
        let (over, closing) = (&AtomicBool::new(false), &AtomicBool::new(false));
        let views = &lab.hosts().map(View::of);
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| crowd.run(closing));
            std::thread::scope(|scope| {
                for mover in movers {
                    scope.spawn(|| trouble::order_moves(mover, views, tally, over));
                }
                scope.spawn(|| trouble::deal_blows(fate, lab, tally, began + act.kills, over));
                let mut shown = Instant::now();
                while began.elapsed() < act.lasts {
                    std::thread::sleep(Duration::from_millis(500));
                    lab.hosts().into_iter().for_each(|host| tally.look_at(host));
                    if shown.elapsed() > PROGRESS {
                        shown = Instant::now();
                        self.show_progress();
                    }
                }
                over.store(true, Ordering::Relaxed);
            });
            closing.store(true, Ordering::Relaxed);
        });
        lab.hosts().into_iter().for_each(|host| tally.look_at(host));
    }

    fn moves(&self) -> Result<Moves> {
        Moves::read(&self.lab.hosts().map(|host| host.place().directory.as_path()))
    }

    fn show_progress(&self) {
        let moves = self.moves().unwrap_or_default();
        let counts = self.tally.counts();
        println!(
            "{:.0} s: {} connections ended, {} swaps, {} swap backs, {} kills, {} errors",
            self.tally.age().as_secs_f64(),
            counts.connections,
            moves.swaps,
            moves.swap_backs,
            counts.kills,
            counts.errors
        );
    }

    /// Waits until nothing moves any more, and counts what is there.
    fn rest(&self) -> Result<Census> {
        let age = self.tally.age();
        let until = Instant::now() + REST;
        for host in self.lab.hosts() {
            loop {
                let flows = host.direct().flows()?.unwrap_or_default();
                if flows.is_empty() {
                    break;
                }
                if Instant::now() > until {
                    let flow = &flows[0];
                    let count = flows.len();
                    self.tally.error(&format!("{} still shows {count} connections, as {flow:?}", host.name));
                    break;
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        let steady = |figures: &[Figure]| -> Vec<u64> {
            figures.iter().filter(|figure| figure.kind.is_steady()).map(|figure| figure.value).collect()
        };
        let mut figures = census::take(&self.lab.hosts(), &self.pods)?;
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let now = census::take(&self.lab.hosts(), &self.pods)?;
            let same = steady(&now) == steady(&figures);
            figures = now;
            if same || Instant::now() > until {
                return Ok(Census { age, figures });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_acts_fill_the_time_and_leave_a_minute_between_the_last_kill_and_the_next_count() {
        for minutes in [0.5, 2.0, 10.0, 60.0] {
            let total = Duration::from_secs_f64(minutes * 60.0);
            let acts = acts(total);
            assert_eq!(acts.iter().map(|act| act.lasts).sum::<Duration>(), total);
            assert!(acts[1].kills > Duration::ZERO);
            assert_eq!(acts[1].lasts - acts[1].kills, acts[0].lasts);
        }
        assert_eq!(acts(Duration::from_secs(600))[0].lasts, Duration::from_secs(60));
    }
}
