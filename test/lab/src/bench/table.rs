// SPDX-License-Identifier: Apache-2.0
//! Reports for a terminal.

use lab::measure::median;

use super::{
    Report, Way,
    figure::{Quantity, Row, digits},
};

/// A heading and its columns; then the rows below it.
pub struct Section {
    pub heading: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
}

/// A section for each quantity; only the columns that it has figures for.
pub fn sections(report: &Report) -> Vec<Section> {
    report.by_quantity().into_iter().map(|(quantity, rows)| section(quantity, &rows)).collect()
}

fn section(quantity: &Quantity, rows: &[&Row]) -> Section {
    let measured = |way: &Way| rows.iter().any(|row| !row.values(*way).is_empty());
    let ways: Vec<Way> = Way::ALL.into_iter().filter(measured).collect();
    let others: Vec<Way> = [Way::Host, Way::Overlay].into_iter().filter(|way| ways.contains(way)).collect();
    let judged = rows.iter().any(|row| row.verdict().is_some());

    let mut columns: Vec<String> = ways.iter().map(|way| way.name().to_owned()).collect();
    columns.extend(others.iter().map(|way| format!("of {}", way.name())));
    if judged {
        columns.push("target".into());
    }
    let cells = |row: &&Row| {
        let mut cells = vec![row.case.clone()];
        cells.extend(ways.iter().map(|way| row.median(*way).map_or("-".into(), digits)));
        cells.extend(
            others.iter().map(|way| row.ratio(*way).map_or("-".into(), |ratio| format!("{ratio:.3}"))),
        );
        if let Some(verdict) = row.verdict() {
            let (low, high) = verdict.between;
            let outcome = verdict.outcome.words();
            cells.push(format!("{}: {outcome} ({} to {})", verdict.target, digits(low), digits(high)));
        }
        cells
    };
    let heading = format!("{}, {} ({})", quantity.name, quantity.unit, quantity.better.words());
    Section { heading, columns, rows: rows.iter().map(cells).collect() }
}

pub fn text(report: &Report) -> String {
    let mut lines = vec![format!("{}: {}", report.key.name, report.key.title), report.machine.words()];
    let sections = sections(report);
    let width = sections.iter().map(|section| section.heading.chars().count()).max().unwrap_or_default();
    for Section { heading, columns, rows } in sections {
        lines.push(String::new());
        lines.push(line(width, &heading, &columns));
        lines.extend(rows.iter().map(|cells| line(width, &format!("  {}", cells[0]), &cells[1..])));
    }
    lines.push(String::new());
    lines.push(what_routers_did(report));
    if let Some(live) = &report.live {
        lines.push(live.text());
    }
    lines.join("\n")
}

pub fn what_routers_did(report: &Report) -> String {
    let tally = &report.tally;
    let pause =
        median(&tally.pauses_us).map_or(String::new(), |us| format!(", median pause {:.2} ms", us / 1000.0));
    let refused: Vec<String> =
        tally.refused.iter().map(|(reason, count)| format!("{count} {reason}")).collect();
    let refused = if refused.is_empty() { "none".into() } else { refused.join(", ") };
    format!(
        "medians of at least {} rounds of {} s; {} swaps{pause}; refused: {refused}",
        report.rounds, report.seconds, tally.swaps
    )
}

fn line(width: usize, first: &str, cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| format!("  {cell:>10}")).collect();
    format!("{first:<width$}{}", cells.concat())
}
