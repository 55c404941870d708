// SPDX-License-Identifier: Apache-2.0
//! The benchmarks. Each key is a module that says what to run and how to read what it prints; here it is run over the
//! overlay, with the router and on the host network, interleaved. Table, JSON, chart and page are the same for all.

mod chart;
mod figure;
mod json;
mod machine;
mod page;
mod setting;
mod svg;
mod table;

mod cost;
mod iperf3;
mod latency;
mod live;
mod memcached;
mod mpi;
mod pause;
mod postgres;
mod rate;
mod redis;
mod scale;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use figure::{Figure, Quantity, Row};
use live::Live;
use machine::Machine;
use setting::{Run, Server, Setting, Tally, Way};

#[derive(clap::Args)]
pub struct Options {
    /// What to measure: a key of test/BENCHMARKS.md, or `all`.
    key: String,
    /// Only run the programs over the overlay, with no router, and show what they print.
    #[arg(long)]
    without_router: bool,
    /// Where KEY.json, KEY.svg, KEY.log and report.html go.
    #[arg(long, default_value = "test/results", value_name = "DIRECTORY")]
    results: PathBuf,
    /// Rules for the routers, instead of the key's own.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
    /// Seconds of each run.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Runs of each kind; medians are shown. Without it as many as the key asks for, and more of what has a target, until it
    /// is decided whether that is met.
    #[arg(long)]
    rounds: Option<u32>,
}

/// A benchmark.
pub struct Key {
    pub name: &'static str,
    /// What it shows, for a heading.
    pub title: &'static str,
    pub rules: Rules,
    pub rounds: u32,
    /// So many, at most, of what has a target, until it is decided whether that is met. Six are the least that can decide
    /// with 95 % confidence.
    pub most_rounds: u32,
    /// What is run, after whatever must be prepared.
    pub parts: fn(&Setting) -> Result<Vec<Part>>,
    /// A connection that is older than the routers, second by second.
    pub live: Option<fn(&Setting) -> Result<Live>>,
}

pub enum Rules {
    File(&'static str),
    /// They match no connection.
    ForNobody,
}

const ALL_PODS: Rules = Rules::File("rules/all-pods.yaml");

type Runner = dyn Fn(&Run<'_>) -> Result<Vec<Figure>>;

/// What is run once in each round and each way, one way right after the other.
pub struct Part {
    pub name: &'static str,
    pub ways: &'static [Way],
    run: Box<Runner>,
    server: Server,
    own_routers: bool,
}

impl Part {
    pub fn new(name: &'static str, run: impl Fn(&Run<'_>) -> Result<Vec<Figure>> + 'static) -> Part {
        Part { name, ways: &Way::ALL, run: Box::new(run), server: Server::OnOtherHost, own_routers: false }
    }

    pub fn by(mut self, ways: &'static [Way]) -> Part {
        self.ways = ways;
        self
    }

    /// Between two pods of one host.
    pub fn on_one_host(mut self) -> Part {
        self.server = Server::OnSameHost;
        self
    }

    /// It starts and stops the routers by itself.
    pub fn with_own_routers(mut self) -> Part {
        self.own_routers = true;
        self
    }

    /// With routers only where they belong.
    fn once(&self, setting: &Setting, way: Way, seconds: u32) -> Result<Vec<Figure>> {
        let with_routers = way == Way::Router && !self.own_routers;
        if with_routers {
            setting.start_routers()?;
        }
        let figures = (self.run)(&setting.run(way, self.server, seconds))?;
        if with_routers {
            setting.stop_routers()?;
        }
        Ok(figures)
    }
}

static KEYS: [&Key; 12] = [
    &iperf3::KEY,
    &latency::KEY,
    &rate::KEY,
    &memcached::KEY,
    &redis::KEY,
    &postgres::KEY,
    &mpi::LATENCY,
    &mpi::BANDWIDTH,
    &mpi::ALL_TO_ALL,
    &pause::KEY,
    &scale::KEY,
    &cost::KEY,
];

/// All that a key gave.
pub struct Report {
    pub key: &'static Key,
    pub machine: Machine,
    pub seconds: u32,
    pub rounds: u32,
    pub rows: Vec<Row>,
    pub tally: Tally,
    pub live: Option<Live>,
}

impl Report {
    /// The rows of each quantity.
    pub fn by_quantity(&self) -> Vec<(&'static Quantity, Vec<&Row>)> {
        let mut groups: Vec<(&'static Quantity, Vec<&Row>)> = Vec::new();
        for row in &self.rows {
            match groups.iter_mut().find(|(quantity, _)| *quantity == row.quantity) {
                Some((_, rows)) => rows.push(row),
                None => groups.push((row.quantity, vec![row])),
            }
        }
        groups
    }

    /// The ways that anything was measured by.
    pub fn ways(&self) -> Vec<Way> {
        let measured = |way: &Way| self.rows.iter().any(|row| !row.values(*way).is_empty());
        Way::ALL.into_iter().filter(measured).collect()
    }
}

pub fn run(options: &Options) -> Result<()> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("making {}", options.results.display()))?;
    let keys: Vec<&Key> = KEYS.into_iter().filter(|key| ["all", key.name].contains(&&*options.key)).collect();
    match keys[..] {
        [] => bail!("{}: expected all, {}", options.key, KEYS.map(|key| key.name).join(", ")),
        _ if options.without_router => keys.into_iter().try_for_each(|key| show(key, options)),
        [key] => measure(key, options).map(drop),
        _ => all(options),
    }
}

/// Every key, and a page with all of them. A key that fails does not keep the others from being measured.
fn all(options: &Options) -> Result<()> {
    let (mut reports, mut failures) = (Vec::new(), Vec::new());
    let path = options.results.join("report.html");
    for key in KEYS {
        match measure(key, options) {
            Ok(report) => reports.push(report),
            Err(error) => {
                eprintln!("error: {}: {error:#}", key.name);
                failures.push((key, format!("{error:#}")));
            }
        }
        // Each time, so that a run that is broken off leaves what it has.
        std::fs::write(&path, page::write(&reports, &failures))?;
    }
    println!("written: {}", path.display());
    if !failures.is_empty() {
        bail!("failed: {}", failures.iter().map(|(key, _)| key.name).collect::<Vec<_>>().join(", "));
    }
    Ok(())
}

fn measure(key: &'static Key, options: &Options) -> Result<Report> {
    let file = |suffix: &str| options.results.join(format!("{}.{suffix}", key.name));
    let setting = Setting::new(key, options.rules.as_deref(), &file("log"), false)?;
    let rounds = options.rounds.unwrap_or(key.rounds);
    let most = options.rounds.unwrap_or(key.most_rounds);
    let mut rows: Vec<Row> = Vec::new();
    for part in (key.parts)(&setting)? {
        let first = rows.len();
        for round in 1..=most {
            let wanted = |way: &Way| {
                round <= rounds || rows[first..].iter().any(|row| row.is_undecided() && row.compares(*way))
            };
            let ways: Vec<Way> = part.ways.iter().copied().filter(wanted).collect();
            once(&setting, key, &part, &ways, round, options.seconds, &mut rows)?;
        }
    }
    let live = key.live.map(|live| live(&setting)).transpose()?;
    setting.lab.stop_forwarders()?;
    let (machine, tally) = (Machine::look(), setting.tally());
    let report = Report { key, machine, seconds: options.seconds, rounds, rows, tally, live };

    println!("\n{}", table::text(&report));
    std::fs::write(file("json"), format!("{:#}\n", json::of(&report)))?;
    std::fs::write(file("svg"), chart::draw(&report))?;
    println!("written: {}, {}", file("json").display(), file("svg").display());
    report.tally.check(key)?;
    Ok(report)
}

/// One round of a part, these ways. Each round begins with another way, so that none has the first place for itself.
fn once(
    setting: &Setting,
    key: &Key,
    part: &Part,
    ways: &[Way],
    round: u32,
    seconds: u32,
    rows: &mut Vec<Row>,
) -> Result<()> {
    let (last, first) = ways.split_at(round as usize % ways.len().max(1));
    for way in first.iter().chain(last) {
        let heading = format!("{} {}, round {round}, {}", key.name, part.name, way.name());
        setting.log(&format!("== {heading}\n"))?;
        let figures = part.once(setting, *way, seconds).context(heading.clone())?;
        let said: Vec<String> = figures.iter().map(|figure| figure::digits(figure.value)).collect();
        eprintln!("{heading}: {}", said.join(", "));
        for figure in figures {
            let place = rows.iter().position(|row| row.is_of(&figure)).unwrap_or_else(|| {
                rows.push(Row::new(figure.quantity, &figure.case));
                rows.len() - 1
            });
            rows[place].add(*way, figure.value);
        }
    }
    Ok(())
}

/// Runs each part once over the overlay.
fn show(key: &'static Key, options: &Options) -> Result<()> {
    let log: &Path = &options.results.join(format!("{}.log", key.name));
    let setting = Setting::new(key, None, log, true)?;
    for part in (key.parts)(&setting)? {
        if part.ways.contains(&Way::Overlay) {
            part.once(&setting, Way::Overlay, options.seconds).context(part.name)?;
        }
    }
    setting.lab.stop_forwarders()
}
