// SPDX-License-Identifier: Apache-2.0
//! What came of a run, as a table and as JSON.

use std::fmt::Write;

use serde_json::{Value, json};

use super::{
    census::Growth,
    tally::{Counts, Moves},
};

pub struct Report {
    pub seed: u64,
    pub minutes: f64,
    pub connections_at_once: usize,
    pub counts: Counts,
    pub moves: Moves,
    pub growth: Vec<Growth>,
}

impl Report {
    pub fn leaks(&self) -> usize {
        self.growth.iter().filter(|growth| growth.is_leak()).count()
    }

    fn pause_us(&self, part: f64) -> u64 {
        let pauses = &self.moves.pauses_us;
        let index = (pauses.len() as f64 * part) as usize;
        pauses.get(index.min(pauses.len().saturating_sub(1))).copied().unwrap_or_default()
    }

    pub fn table(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            // Writing to a String does not fail.
            let _ = writeln!(text, "{name:<32} {value}");
        };
        let counts = &self.counts;
        line("seed", self.seed.to_string());
        line("minutes", format!("{:.1}", self.minutes));
        line("connections at once", self.connections_at_once.to_string());
        line("connections checked to their end", counts.connections.to_string());
        line("applications killed", counts.applications_killed.to_string());
        line("swaps", self.moves.swaps.to_string());
        line("swap backs", self.moves.swap_backs.to_string());
        line("routers and forwarders killed", counts.kills.to_string());
        line("routers restarted", counts.restarts.to_string());
        line("rule changes", counts.rule_changes.to_string());
        for (reason, count) in &counts.refusals {
            line("refused", format!("{count} {reason}"));
        }
        let ms = |part| format!("{:.1}", self.pause_us(part) as f64 / 1000.0);
        line("pause p50, p99, max, ms", [ms(0.5), ms(0.99), ms(1.0)].join(", "));
        line("errors", counts.errors.to_string());
        let _ =
            writeln!(text, "\n{:<32} {:>14} {:>10}", "with no connection", "after a minute", "at the end");
        for growth in &self.growth {
            let fresh = if growth.fresh { "*" } else { " " };
            let verdict = if growth.is_leak() { "LEAK" } else { "same" };
            let _ = writeln!(
                text,
                "{:<32} {:>13}{fresh} {:>10} {verdict}",
                growth.name, growth.before, growth.after
            );
        }
        if self.growth.iter().any(|growth| growth.fresh) {
            let _ = writeln!(text, "* of the process that was started last, after its first minute");
        }
        text
    }

    pub fn json(&self) -> Value {
        let growth = |growth: &Growth| {
            json!({
                "name": growth.name,
                "after_first_minute": growth.before,
                "at_end": growth.after,
                "restarted": growth.fresh,
                "leak": growth.is_leak(),
            })
        };
        let counts = &self.counts;
        json!({
            "seed": self.seed,
            "minutes": self.minutes,
            "connections_at_once": self.connections_at_once,
            "connections": counts.connections,
            "applications_killed": counts.applications_killed,
            "swaps": self.moves.swaps,
            "swap_backs": self.moves.swap_backs,
            "kills": counts.kills,
            "restarts": counts.restarts,
            "rule_changes": counts.rule_changes,
            "refusals": counts.refusals,
            "pauses_us": { "p50": self.pause_us(0.5), "p99": self.pause_us(0.99), "max": self.pause_us(1.0) },
            "errors": counts.errors,
            "first_errors": counts.first_errors,
            "leaks": self.leaks(),
            "figures": self.growth.iter().map(growth).collect::<Vec<_>>(),
        })
    }
}
