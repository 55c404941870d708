// SPDX-License-Identifier: Apache-2.0
//! The lab that a benchmark runs in, and one run of it over the overlay, with the router, or on the host network.

use std::{
    cell::RefCell, collections::BTreeMap, fs::File, io::Write, net::IpAddr, path::Path, time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Finished, Lab, Place, Pod, Process, RouterOptions, programs::command};

use super::{Key, Rules};

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
  - { cgroup: podneighbour/neighbour, pod: neighbour, container: neighbour, podLabels: { app: iperf3 } }
";

pub const RULE_FOR_NOBODY: &str = "type=cidr\nfrom=10.99.0.0/16\nto=10.99.0.0/16\n";

/// Where the server of a run is, as its client sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Server {
    OnOtherHost,
    OnSameHost,
}

/// A lab with a client on one host, a server on each, and forwarders, the routers off.
pub struct Setting {
    pub lab: Lab,
    pub client: Pod,
    pub server: Pod,
    /// The server on the client's host.
    pub neighbour: Pod,
    pub routers: RouterOptions,
    log: RefCell<File>,
    /// Whether what is logged is shown at once.
    shown: bool,
    tally: RefCell<Tally>,
}

/// What the routers of all runs did, as the client's host saw it.
#[derive(Clone, Default)]
pub struct Tally {
    pub swaps: u64,
    pub refused: BTreeMap<String, u64>,
    pub pauses_us: Vec<f64>,
}

impl Setting {
    pub fn new(key: &Key, rules: Option<&Path>, log: &Path, shown: bool) -> Result<Setting> {
        let lab = Lab::new(&format!("bench-{}", key.name))?;
        let (client, server) = (lab.h1.pod("client")?, lab.h2.pod("server")?);
        let neighbour = lab.h1.pod("neighbour")?;
        for host in lab.hosts() {
            host.start_forwarder()?;
        }
        let labels = lab.directory().join("labels.yaml");
        std::fs::write(&labels, LABELS)?;
        let rules = match (rules, &key.rules) {
            (Some(path), _) => path.to_owned(),
            (None, Rules::File(path)) => Path::new(path).to_owned(),
            (None, Rules::ForNobody) => lab.h1.write_rules("nobody", RULE_FOR_NOBODY)?,
        };
        let rules = rules.canonicalize().with_context(|| format!("the rules {}", rules.display()))?;
        let routers = RouterOptions::with_rules(&rules).with("ROUTER_LABELS", &labels.to_string_lossy());
        let log = File::create(log).with_context(|| format!("making {}", log.display()))?;
        let (log, tally) = (RefCell::new(log), RefCell::default());
        Ok(Setting { lab, client, server, neighbour, routers, log, shown, tally })
    }

    /// Where this way's client and server are. The routers are the caller's.
    pub fn run(&self, way: Way, server: Server, seconds: u32) -> Run<'_> {
        let (pod, host) = match server {
            Server::OnOtherHost => (&self.server, &self.lab.h2),
            Server::OnSameHost => (&self.neighbour, &self.lab.h1),
        };
        let (client, server, from, to) = match way {
            Way::Overlay | Way::Router => (self.client.place(), pod.place(), self.client.v4, pod.v4),
            Way::Host => (self.lab.h1.place(), host.place(), self.lab.h1.address, host.address),
        };
        Run { setting: self, way, client, server, from: from.into(), address: to.into(), seconds }
    }

    pub fn start_routers(&self) -> Result<()> {
        self.lab.start_routers(&self.routers)
    }

    /// Stops them, and counts what they did.
    pub fn stop_routers(&self) -> Result<()> {
        let status = self.lab.h1.status()?;
        let mut tally = self.tally.borrow_mut();
        tally.swaps += status.swaps;
        for (reason, count) in status.refused {
            *tally.refused.entry(reason).or_default() += count;
        }
        self.lab.stop_routers()
    }

    pub fn restart_forwarders(&self) -> Result<()> {
        self.lab.stop_forwarders()?;
        self.lab.hosts().into_iter().try_for_each(|host| host.start_forwarder())
    }

    pub fn tally(&self) -> Tally {
        self.tally.borrow().clone()
    }

    pub fn log(&self, text: &str) -> Result<()> {
        if self.shown {
            print!("{text}");
        }
        self.log.borrow_mut().write_all(text.as_bytes()).context("writing the log")
    }
}

/// One run of two programs.
pub struct Run<'a> {
    pub setting: &'a Setting,
    pub way: Way,
    pub client: &'a Place,
    pub server: &'a Place,
    /// The client's address, and the server's.
    pub from: IpAddr,
    pub address: IpAddr,
    pub seconds: u32,
}

impl Run<'_> {
    /// A server, listening.
    pub fn serve(&self, words: &str, port: u16) -> Result<Process> {
        self.server.serve(&format!("server-{port}"), &mut command(words), port)
    }

    /// A client's success, and all that it printed.
    pub fn client(&self, words: &str) -> Result<String> {
        self.finish(self.client.spawn("client", &mut command(words))?)
    }

    /// As [`Run::client`], for one that runs already.
    pub fn finish(&self, client: Process) -> Result<String> {
        let finished = client.wait(DEADLINE * 4)?.expect_success()?;
        let Finished { words, stdout, stderr, .. } = finished;
        self.setting.log(&format!("$ {words}\n{stdout}{stderr}\n"))?;
        Ok(stdout + &stderr)
    }

    /// With a router: looks until so many connections of this port are swapped, at most for `limit`.
    pub fn watch_swaps(&self, port: u16, wanted: usize, limit: Duration) -> Result<()> {
        if self.way != Way::Router {
            return Ok(());
        }
        let mut pauses = Vec::new();
        let seen = lab::wait_for("swaps", limit, || {
            let flows = self.setting.lab.h1.flows()?;
            let swapped = flows.iter().filter(|flow| flow.has_port(port) && flow.on_host());
            pauses = swapped.filter_map(|flow| flow.pause_us.map(|us| us as f64)).collect();
            Ok((pauses.len() >= wanted).then_some(()))
        });
        if seen.is_err() {
            eprintln!("port {port}: {} of {wanted} connections swapped within {limit:?}", pauses.len());
        }
        self.setting.tally.borrow_mut().pauses_us.append(&mut pauses);
        Ok(())
    }
}

impl Tally {
    /// A benchmark of the router is none if it did nothing, nor is one of its absence if it did something.
    pub fn check(&self, key: &Key) -> Result<()> {
        match key.rules {
            Rules::File(_) => ensure!(self.swaps > 0, "no connection was swapped"),
            Rules::ForNobody => ensure!(self.swaps == 0, "{} connections were swapped", self.swaps),
        }
        Ok(())
    }
}
