// SPDX-License-Identifier: Apache-2.0
//! The benchmark: iperf3 and sockperf over the overlay, with the router, and on the host network, interleaved in one
//! run; then a connection that is older than the routers.

mod chart;
mod latency;
mod live;
mod pauses;
mod report;
mod throughput;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{Family, Lab, Pod, RouterOptions, measure::RunningIperf3};

#[derive(clap::Args)]
pub struct Options {
    /// Only run iperf3 over the overlay, with no router, and show what it prints.
    #[arg(long)]
    without_router: bool,
    /// Where iperf3.json, iperf3.svg and iperf3.log go.
    #[arg(long, default_value = "test/results", value_name = "DIRECTORY")]
    results: PathBuf,
    /// Rules for the routers.
    #[arg(long, default_value = "rules/iperf3.yaml", value_name = "FILE")]
    rules: PathBuf,
    /// Seconds that count in each run; two more come before.
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Runs of each kind; medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Swaps of a connection of each kind whose pauses are measured.
    #[arg(long, default_value_t = 25)]
    samples: u32,
}

/// The three ways between the two programs, in the order of the tables.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    Overlay,
    Router,
    Host,
}

impl Way {
    pub const ALL: [Way; 3] = [Way::Overlay, Way::Router, Way::Host];

    pub fn name(self) -> &'static str {
        match self {
            Way::Overlay => "overlay",
            Way::Router => "router",
            Way::Host => "host",
        }
    }
}

/// The labels that rules/iperf3.yaml asks for.
const LABELS: &str = "
containers:
  - { cgroup: podclient/client, pod: client, container: client, podLabels: { app: iperf3 } }
  - { cgroup: podserver/server, pod: server, container: server, podLabels: { app: iperf3 } }
";

/// A lab with a pod on each host and forwarders, the routers off.
pub struct Setting {
    pub lab: Lab,
    pub client: Pod,
    pub server: Pod,
    pub routers: RouterOptions,
}

impl Setting {
    fn new(rules: &Path) -> Result<Setting> {
        let rules = rules.canonicalize().with_context(|| format!("the rules {}", rules.display()))?;
        let lab = Lab::new("bench")?;
        let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
        for host in lab.hosts() {
            host.start_forwarder()?;
        }
        let labels = lab.directory().join("labels.yaml");
        std::fs::write(&labels, LABELS)?;
        let routers = RouterOptions::with_rules(&rules).with("ROUTER_LABELS", &labels.to_string_lossy());
        Ok(Setting { lab, client, server, routers })
    }

    /// Runs `what` between client and server this way, with routers only where they belong.
    fn by<T>(&self, way: Way, what: impl FnOnce(&Run<'_>) -> Result<T>) -> Result<T> {
        let (client, server, address) = match way {
            Way::Overlay | Way::Router => {
                (self.client.place(), self.server.place(), self.server.address(Family::V4, 0).ip())
            }
            Way::Host => (self.lab.h1.place(), self.lab.h2.place(), self.lab.h2.address.into()),
        };
        if way == Way::Router {
            self.lab.start_routers(&self.routers)?;
        }
        let result = what(&Run { setting: self, way, client, server, address });
        if way == Way::Router {
            self.lab.stop_routers()?;
        }
        result
    }
}

/// One run of two programs.
pub struct Run<'a> {
    pub setting: &'a Setting,
    pub way: Way,
    pub client: &'a lab::Place,
    pub server: &'a lab::Place,
    pub address: std::net::IpAddr,
}

impl Run<'_> {
    /// Pauses of the connections of this port that are on the host network at the client's host.
    fn pauses_us(&self, port: u16) -> Result<Vec<f64>> {
        let flows = self.setting.lab.h1.flows()?;
        let swapped = flows.iter().filter(|flow| flow.has_port(port) && flow.on_host());
        Ok(swapped.map(|flow| flow.pause_us.unwrap_or(0) as f64).collect())
    }

    /// Looks until so many connections of this port are swapped, at most for `limit`.
    fn watch_swaps(&self, port: u16, wanted: usize, limit: Duration) -> Result<Vec<f64>> {
        if self.way != Way::Router {
            return Ok(Vec::new());
        }
        let mut last = Vec::new();
        let _ = lab::wait_for("swaps", limit, || {
            last = self.pauses_us(port)?;
            Ok((last.len() >= wanted).then_some(()))
        });
        Ok(last)
    }
}

pub fn run(options: &Options) -> Result<()> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("making {}", options.results.display()))?;
    if options.without_router {
        return without_router(&options.results);
    }
    let setting = Setting::new(&options.rules)?;
    let throughput = throughput::measure(&setting, options.rounds, options.seconds)?;
    let latency = latency::measure(&setting, options.rounds)?;
    let pauses = pauses::measure(&setting, options.samples)?;
    let live = live::measure(&setting, &options.results.join("iperf3.log"))?;
    let report = report::Report { throughput, latency, pauses, live };

    println!("\n{}", report.table());
    let json = options.results.join("iperf3.json");
    std::fs::write(&json, format!("{:#}\n", report.json(options.rounds, options.seconds)))?;
    let svg = options.results.join("iperf3.svg");
    std::fs::write(&svg, chart::draw(&report))?;
    println!("written: {}, {}", json.display(), svg.display());
    setting.lab.stop_forwarders()?;
    ensure!(report.swaps() > 0, "no connection was swapped");
    ensure!(
        report.live.swapped_at_s.is_some(),
        "the connection that was older than the routers was not swapped"
    );
    Ok(())
}

fn without_router(results: &Path) -> Result<()> {
    let lab = Lab::new("plain")?;
    let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
    let running = RunningIperf3::start(client.place(), server.place(), server.v4.into(), &["-t", "10"])?;
    let log = running.finish_text()?;
    std::fs::write(results.join("iperf3.log"), &log)?;
    print!("{log}");
    Ok(())
}
