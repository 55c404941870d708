// SPDX-License-Identifier: Apache-2.0
//! The commands that ask a running router, and what they print.

mod explain;

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    path::Path,
};

pub use explain::{Asked, explain};

use anyhow::{Result, bail};
use forwarder_api::ConnId;
use serde::Serialize;

use crate::{
    control::{self, ControlError, Moved, Question},
    coordinator::{FlowView, PeerView, Shown, Status},
    peers::Source,
    settings::{self, Conn},
    units::{age, bytes},
};

/// On standard output. Nobody may take it: that ends the program, and is no panic.
pub fn show(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

fn show_json(value: &impl Serialize) -> Result<()> {
    Ok(show(&format!("{}\n", serde_json::to_string_pretty(value)?))?)
}

pub fn status(question: &settings::Question) -> Result<()> {
    let status: Status = control::ask(&question.control.path, &Question::Status)?;
    if question.json { show_json(&status) } else { Ok(show(&status_text(&status))?) }
}

pub fn flows(question: &settings::Question) -> Result<()> {
    let flows = ask_flows(&question.control.path)?;
    if question.json { show_json(&flows) } else { Ok(show(&flows_text(&flows))?) }
}

pub fn peers(question: &settings::Question) -> Result<()> {
    let peers: Vec<PeerView> = control::ask(&question.control.path, &Question::Peers)?;
    if question.json { show_json(&peers) } else { Ok(show(&peers_text(&peers))?) }
}

pub fn leave(control: &Path) -> Result<()> {
    let seconds: u64 = control::ask(control, &Question::Leave)?;
    Ok(show(&format!("a stop within {seconds} s leaves connections on the host network\n"))?)
}

pub fn swap(conn: ConnId, control: &Path) -> Result<()> {
    report(conn, "the host network", &control::ask(control, &Question::Swap(conn))?)
}

pub fn swap_back(conn: Option<Conn>, control: &Path) -> Result<()> {
    if let Some(Conn(conn)) = conn {
        return report(conn, "the overlay", &control::ask(control, &Question::SwapBack(conn))?);
    }
    let swapped = ask_flows(control)?.into_iter().filter(|flow| flow.path != Shown::Overlay);
    let mut conns: Vec<String> = swapped.map(|flow| flow.conn).collect();
    conns.sort();
    conns.dedup();
    if conns.is_empty() {
        return Ok(show("no connection is on the host network\n")?);
    }
    // All at once: each waits for its peer, not for the others.
    let results: Vec<Result<()>> = std::thread::scope(|scope| {
        let ask = |name: String| {
            scope.spawn(move || {
                let Ok(Conn(conn)) = name.parse() else { bail!("{name}: the router's name for it is odd") };
                report(conn, "the overlay", &control::ask(control, &Question::SwapBack(conn))?)
            })
        };
        let asking: Vec<_> = conns.into_iter().map(ask).collect();
        asking
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
            .collect()
    });
    let failed = results.iter().filter(|result| result.is_err()).count();
    for error in results.into_iter().filter_map(Result::err) {
        eprintln!("{error:#}");
    }
    if failed > 0 { bail!("{failed} connections were not moved") } else { Ok(()) }
}

fn ask_flows(control: &Path) -> Result<Vec<FlowView>, ControlError> {
    control::ask(control, &Question::Flows)
}

fn report(conn: ConnId, to: &str, moved: &Moved) -> Result<()> {
    match moved {
        Moved::Done { pause_us } => {
            // Nothing stood still, or it was not measured here: on a way back, and where it was there already.
            let pause = if *pause_us == 0 { String::new() } else { format!(", pause {pause_us} us") };
            Ok(show(&format!("{conn} is on {to}{pause}\n"))?)
        }
        Moved::Refused(reason) => bail!("{conn} was not moved to {to}: {reason} ({})", reason.label()),
        Moved::Unknown => bail!(unknown(conn)),
    }
}

fn unknown(conn: ConnId) -> String {
    format!("{conn}: the router knows no such connection: it may be over; see `router flows`")
}

fn status_text(status: &Status) -> String {
    let mut text = String::new();
    let forwarder = status.forwarder.map_or("not reached".into(), |pid| format!("process {pid}"));
    let mut line = |name: &str, value: String| {
        // Writing to a String does not fail.
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("router", format!("{} (process {})", status.version, status.pid));
    line("forwarder", forwarder);
    line("rules", status.rules.to_string());
    if let Some(error) = &status.rules_error {
        line("rules error", format!("{error}; those of before stay in force"));
    }
    if let Some(reached) = status.kubernetes {
        line("kubernetes", if reached { "reached".into() } else { "not reached".into() });
    }
    for (peer, reached) in &status.peers {
        line("peer", format!("{peer} {}", if *reached { "reached" } else { "not reached" }));
    }
    line("connections", format!("{}, {} on the host network", status.flows, status.swapped));
    line("swaps", format!("{} to the host network, {} back", status.swaps, status.swap_backs));
    for (reason, count) in &status.refused {
        line("refused", format!("{count} {reason}"));
    }
    if status.turned_away > 0 {
        line("turned away", format!("{} who connected as a peer, see the log", status.turned_away));
    }
    if status.false_claims > 0 {
        line(
            "not believed",
            format!("{} messages of peers about connections of others, see the log", status.false_claims),
        );
    }
    if status.drops > 0 {
        line("not seen", format!("{} connections, for want of room", status.drops));
    }
    text
}

fn flows_text(flows: &[FlowView]) -> String {
    let head =
        ["CONN", "WORKLOAD", "LOCAL", "REMOTE", "SIDE", "PATH", "AGE", "SENT", "RECEIVED", "PAUSE", "REASON"];
    let rows = flows.iter().map(|flow| {
        [
            flow.conn.clone(),
            flow.workload.clone(),
            flow.local.to_string(),
            flow.remote.to_string(),
            format!("{:?}", flow.side).to_lowercase(),
            format!("{:?}", flow.path).to_lowercase(),
            age(flow.age_ms),
            bytes(flow.bytes_sent),
            bytes(flow.bytes_received),
            flow.pause_us.map_or("-".into(), |pause| format!("{pause} us")),
            flow.reason_text.clone().unwrap_or_else(|| {
                if flow.way_back == Some(false) {
                    "no way back: the forwarder that kept the overlay socket is gone".into()
                } else {
                    "-".into()
                }
            }),
        ]
    });
    table(std::iter::once(head.map(str::to_owned)).chain(rows))
}

fn peers_text(peers: &[PeerView]) -> String {
    let head = ["ADDRESS", "FOUND BY", "REACHED", "SINCE", "HOST ADDRESS", "CONNECTIONS", "SWAPPED"];
    let rows = peers.iter().map(|peer| {
        [
            peer.address.to_string(),
            peer.found_by.map_or("-", Source::name).into(),
            if peer.reached { "yes".into() } else { "no".into() },
            age(peer.since_ms),
            peer.host_address.map_or("-".into(), |address| address.to_string()),
            peer.connections.to_string(),
            peer.swapped.to_string(),
        ]
    });
    table(std::iter::once(head.map(str::to_owned)).chain(rows))
}

fn table<const N: usize>(rows: impl Iterator<Item = [String; N]>) -> String {
    let table: Vec<[String; N]> = rows.collect();
    let width = |column: usize| table.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..N).map(width).collect();
    let mut text = String::new();
    for row in &table {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_without_connections_has_a_head() {
        assert!(flows_text(&[]).starts_with("CONN"));
        assert!(peers_text(&[]).starts_with("ADDRESS"));
    }
}
