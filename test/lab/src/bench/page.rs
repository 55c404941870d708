// SPDX-License-Identifier: Apache-2.0
//! All reports on one page that needs no other file.

use super::{
    Key, Report, chart,
    figure::{Outcome, Row, digits},
    svg::escape,
    table::{self, Section},
};

const STYLE: &str = "
body { font: 15px/1.5 sans-serif; color: #222; max-width: 1000px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 0.5em 0 1.5em }
th, td { padding: 3px 12px; border-bottom: 1px solid #ddd; text-align: right }
th:first-child, td:first-child { text-align: left; min-width: 16em }
svg { max-width: 100%; height: auto; border: 1px solid #eee }
.met { color: #1a7f37 } .missed { color: #c62828; font-weight: bold }
.small { color: #666; font-size: 13px }
";

const INTRODUCTION: &str = "Two hosts on one machine (network namespaces), a VXLAN overlay between them and a pod on \
each. Every program ran over the overlay without the router, over the overlay with it, and on the hosts' own network, \
one right after the other in each round. Figures are medians of the rounds; a ratio is the median of the ratios within \
each round. Made by <code>./test/script.sh test all</code>.";

pub fn write(reports: &[Report], failures: &[(&Key, String)]) -> String {
    let mut page = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    page += &format!("<title>ebpf-router, measured</title><style>{STYLE}</style></head>\n<body>");
    page += "<h1>ebpf-router, measured</h1>";
    if let Some(report) = reports.last() {
        page += &format!("<p><b>{}</b></p>", escape(&report.machine.words()));
    }
    page += &format!("<p>{INTRODUCTION}</p>\n");
    page += &targets(reports);
    for (key, error) in failures {
        page += &format!("<h2>{}: {}</h2>", key.name, escape(key.title));
        page += &format!("<p class=\"missed\">Failed: {}</p>\n", escape(error));
    }
    for report in reports {
        page += &format!("<h2 id=\"{0}\">{0}: {1}</h2>\n", report.key.name, escape(report.key.title));
        page += &chart::draw(report);
        page += &tables(report);
        page += &format!("<p class=\"small\">{}</p>\n", escape(&table::what_routers_did(report)));
    }
    page + "</body></html>\n"
}

/// Everything that has a target, met or not.
fn targets(reports: &[Report]) -> String {
    let mut rows = String::new();
    for report in reports {
        let judged = |row: &Row| {
            let verdict = row.verdict()?;
            let class = match verdict.outcome {
                Outcome::Met => "met",
                Outcome::Missed => "missed",
                Outcome::Undecided => "",
            };
            let (low, high) = verdict.between;
            Some(format!(
                "<tr><td><a href=\"#{0}\">{0}</a>: {1}, {2}</td><td>{3}</td><td>{4} to {5}</td>\
                 <td class=\"{class}\">{6}</td></tr>\n",
                report.key.name,
                escape(row.quantity.name),
                escape(&row.case),
                escape(&verdict.target),
                digits(low),
                digits(high),
                verdict.outcome.words()
            ))
        };
        rows.extend(report.rows.iter().filter_map(judged));
    }
    format!(
        "<h2>Targets</h2>\n<table><tr><th>with the router</th><th>target</th><th>reached, with 95 % confidence</th><th></th></tr>\n{rows}</table>\n"
    )
}

fn tables(report: &Report) -> String {
    let mut all = String::new();
    for Section { heading, columns, rows } in table::sections(report) {
        let cells = |tag: &str, cells: &[String]| -> String {
            cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escape(cell))).collect()
        };
        all += &format!("<table><tr><th>{}</th>{}</tr>\n", escape(&heading), cells("th", &columns));
        for row in &rows {
            all += &format!("<tr>{}</tr>\n", cells("td", row));
        }
        all += "</table>\n";
    }
    all
}
