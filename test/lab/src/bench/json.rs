// SPDX-License-Identifier: Apache-2.0
//! Reports for programs. test/BENCHMARKS.md says what the fields are: change both.

use lab::measure::median;
use serde_json::{Map, Value, json};

use super::{
    Report, Way,
    figure::{Better, Outcome, Row},
};

pub fn of(report: &Report) -> Value {
    let mut all = json!({
        "key": report.key.name,
        "title": report.key.title,
        "machine": report.machine,
        "seconds": report.seconds,
        "rounds": report.rounds,
        "swaps": report.tally.swaps,
        "refused": report.tally.refused,
        "pause_us_p50": median(&report.tally.pauses_us),
        "figures": report.rows.iter().map(figure).collect::<Vec<_>>(),
    });
    if let Some(live) = &report.live {
        all["live"] = live.json();
    }
    if report.key.name == "iperf3"
        && let Some(first) = report.rows.first()
    {
        // The one figure that most ask for, where they find it.
        for way in Way::ALL {
            all[format!("{}_gbps", way.name())] = json!(first.median(way).map(round));
        }
    }
    all
}

fn figure(row: &Row) -> Value {
    let by_way = |value: &dyn Fn(Way) -> Value| -> Map<String, Value> {
        let measured = Way::ALL.into_iter().filter(|way| !row.values(*way).is_empty());
        measured.map(|way| (way.name().to_owned(), value(way))).collect()
    };
    let verdict = row.verdict();
    json!({
        "quantity": row.quantity.name,
        "case": row.case,
        "unit": row.quantity.unit,
        "better": match row.quantity.better { Better::More => "more", Better::Less => "less" },
        "median": by_way(&|way| json!(row.median(way).map(round))),
        "values": by_way(&|way| row.values(way).iter().copied().map(round).collect()),
        "of_host": row.ratio(Way::Host).map(round),
        "of_overlay": row.ratio(Way::Overlay).map(round),
        "target": verdict.as_ref().map(|verdict| &verdict.target),
        "between": verdict.as_ref().map(|verdict| [round(verdict.between.0), round(verdict.between.1)]),
        "met": verdict.and_then(|verdict| match verdict.outcome {
            Outcome::Met => Some(true),
            Outcome::Missed => Some(false),
            Outcome::Undecided => None,
        }),
    })
}

fn round(value: f64) -> f64 {
    (value * 10_000.0).round() / 10_000.0
}
