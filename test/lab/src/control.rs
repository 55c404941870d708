// SPDX-License-Identifier: Apache-2.0
//! What a router says about itself: the commands that a user has, and their JSON.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::{DEADLINE, Host, program, wait_for};

/// A connection in `router flows --json`. What the lab does not look at is left out.
#[derive(Clone, Debug, Deserialize)]
pub struct Flow {
    #[serde(default)]
    pub conn: Option<String>,
    pub local: String,
    pub remote: String,
    pub path: String,
    #[serde(default)]
    pub workload: String,
    #[serde(default)]
    pub pause_us: Option<u64>,
    /// How many connections moved in the same freeze.
    #[serde(default)]
    pub together: Option<u32>,
    #[serde(default)]
    pub reason: Option<String>,
    #[serde(default)]
    pub reason_text: Option<String>,
    #[serde(default)]
    pub way_back: Option<bool>,
    #[serde(default)]
    pub bytes_sent: Option<u64>,
    #[serde(default)]
    pub bytes_received: Option<u64>,
}

impl Flow {
    pub fn on_host(&self) -> bool {
        self.path == "host"
    }

    /// Is this the connection to or from this port?
    pub fn has_port(&self, port: u16) -> bool {
        let suffix = format!(":{port}");
        self.local.ends_with(&suffix) || self.remote.ends_with(&suffix)
    }
}

/// `router status --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// Its process id, if it is reached.
    #[serde(default)]
    pub forwarder: Option<u32>,
    /// Connections that are known.
    pub flows: u64,
    pub swapped: u64,
    /// Since this router started.
    #[serde(default)]
    pub swaps: u64,
    #[serde(default)]
    pub refused: BTreeMap<String, u64>,
    /// Who connected as a peer and was not let in, and what peers said about connections that they do not hold.
    #[serde(default)]
    pub turned_away: u64,
    #[serde(default)]
    pub false_claims: u64,
    #[serde(default)]
    pub drops: u64,
    /// What is wrong with the rules that were read last.
    #[serde(default)]
    pub rules_error: Option<String>,
    #[serde(default)]
    pub rules_errors: u64,
    /// Is the API server reached?
    #[serde(default)]
    pub kubernetes: Option<bool>,
}

/// A host of other ends in `router peers --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    pub address: String,
    pub found_by: Option<String>,
    pub reached: bool,
    pub host_address: Option<String>,
    pub connections: u64,
    pub swapped: u64,
}

impl Host {
    /// Runs `router` with these arguments against this host's router and returns what it printed.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program("router")?);
        command.args(arguments).envs(self.environment()).stdin(Stdio::null());
        self.place().run(&mut command).with_context(|| format!("on {}", self.name))
    }

    fn ask_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.ask(arguments)?;
        serde_json::from_str(&text).with_context(|| format!("router {} printed {text}", arguments.join(" ")))
    }

    pub fn status(&self) -> Result<Status> {
        let value = self.ask_json(&["status", "--json"])?;
        serde_json::from_value(value.clone()).with_context(|| format!("status {value}"))
    }

    pub fn flows(&self) -> Result<Vec<Flow>> {
        let value = self.ask_json(&["flows", "--json"])?;
        // A list, or an object with a list in it.
        let list = value.get("flows").cloned().unwrap_or_else(|| value.clone());
        serde_json::from_value(list).with_context(|| format!("flows {value}"))
    }

    pub fn peers(&self) -> Result<Vec<Peer>> {
        let value = self.ask_json(&["peers", "--json"])?;
        serde_json::from_value(value.clone()).with_context(|| format!("peers {value}"))
    }

    /// Waits until the router's status is as `wanted` says.
    pub fn wait_for_status(&self, what: &str, wanted: impl Fn(&Status) -> bool) -> Result<Status> {
        let mut last = None;
        wait_for(&format!("the status of {} to say: {what}", self.name), DEADLINE, || {
            let status = self.status()?;
            last = Some(status.clone());
            Ok(wanted(&status).then_some(status))
        })
        .with_context(|| format!("the status at that time: {last:#?}"))
    }

    pub fn swap_back_all(&self) -> Result<()> {
        self.ask(&["swap-back", "--all"]).map(drop)
    }

    pub fn swap_back(&self, conn: &str) -> Result<()> {
        self.ask(&["swap-back", conn]).map(drop)
    }

    pub fn swap(&self, conn: &str) -> Result<()> {
        self.ask(&["swap", conn]).map(drop)
    }

    /// Waits until this host's router shows the connection of this port as `wanted` says.
    pub fn wait_for_flow(&self, port: u16, what: &str, wanted: impl Fn(&Flow) -> bool) -> Result<Flow> {
        let mut last = Vec::new();
        let what = format!("port {port} on {} to be {what}", self.name);
        wait_for(&what, DEADLINE, || {
            last = self.flows()?;
            Ok(last.iter().find(|flow| flow.has_port(port) && wanted(flow)).cloned())
        })
        .with_context(|| format!("the flows at that time: {last:#?}"))
    }

    pub fn wait_until_on_host(&self, port: u16) -> Result<Flow> {
        self.wait_for_flow(port, "on the host network", Flow::on_host)
    }

    pub fn wait_until_on_overlay(&self, port: u16) -> Result<Flow> {
        self.wait_for_flow(port, "on the overlay", |flow| flow.path == "overlay")
    }

    /// Waits for a connection that was refused, and says why.
    pub fn wait_until_refused(&self, port: u16) -> Result<String> {
        let refused = |flow: &Flow| flow.path == "overlay" && flow.reason.is_some();
        let flow = self.wait_for_flow(port, "refused", refused)?;
        flow.reason.context("a refused connection has a reason")
    }

    /// Orders a move and waits until the connection is there. A passing refusal is asked again, as a person would; and one
    /// that is there already is ordered to stay: the rules may be about to move it.
    pub fn move_to(&self, port: u16, path: &str) -> Result<Flow> {
        let mut last = None;
        wait_for(&format!("port {port} on {} to move to {path}", self.name), DEADLINE, || {
            let Some(flow) = self.flows()?.into_iter().find(|flow| flow.has_port(port)) else {
                // Too young to be known.
                return Ok(None);
            };
            let conn = flow.conn.clone().context("a connection without a name")?;
            let answer = if path == "host" { self.swap(&conn) } else { self.swap_back(&conn) };
            last = answer.err();
            // The order may be carried out a moment after its answer.
            let arrived = |flow: &Flow| flow.path == path;
            Ok(wait_for("", Duration::from_millis(500), || {
                Ok(self.flows()?.into_iter().find(|flow| flow.has_port(port) && arrived(flow)))
            })
            .ok())
        })
        .with_context(|| format!("the last answer: {last:?}"))
    }
}
