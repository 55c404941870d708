// SPDX-License-Identifier: Apache-2.0
//! A report as a picture: for each quantity its cases, with a bar for each way.

use super::{
    Report, Way,
    figure::{Outcome, Quantity, Row, digits},
    live::Live,
    svg::{Anchor, Svg, Type},
    table,
};

const WIDTH: f64 = 960.0;
const MARGIN: f64 = 24.0;
/// Where bars begin and where the longest ends; beyond that are its value, and the ratios.
const BARS: f64 = 230.0;
const BARS_END: f64 = 620.0;
const RATIOS: f64 = 700.0;
const BAR: f64 = 15.0;

const HEADING: Type = Type { size: 18.0, bold: true, colour: "#111", anchor: Anchor::Start };
const SUBHEADING: Type = Type { size: 14.0, bold: true, colour: "#111", anchor: Anchor::Start };
const PLAIN: Type = Type { size: 13.0, bold: false, colour: "#333", anchor: Anchor::Start };
const SMALL: Type = Type { size: 11.5, bold: false, colour: "#555", anchor: Anchor::Start };
const MET: &str = "#1a7f37";
const MISSED: &str = "#c62828";
const RANGE: &str = "#444";

fn colour(way: Way) -> &'static str {
    match way {
        Way::Overlay => "#b9c0c8",
        Way::Router => "#1f6fb4",
        Way::Host => "#9ecae1",
    }
}

fn words(way: Way) -> &'static str {
    match way {
        Way::Overlay => "overlay (VXLAN), no router",
        Way::Router => "overlay with ebpf-router",
        Way::Host => "host network",
    }
}

pub fn draw(report: &Report) -> String {
    let mut svg = Svg::default();
    let mut y = 34.0;
    svg.text((MARGIN, y), HEADING, &format!("{}: {}", report.key.name, report.key.title));
    y += 28.0;
    legend(&mut svg, y, &report.ways());
    y += 20.0;
    for (quantity, rows) in report.by_quantity() {
        y = panel(&mut svg, y, quantity, &rows);
    }
    if let Some(live) = &report.live {
        y = seconds(&mut svg, y + 14.0, live);
    }
    y += 20.0;
    for line in wrapped(&table::what_routers_did(report)).iter().chain([&report.machine.words()]) {
        svg.text((MARGIN, y), SMALL, line);
        y += 17.0;
    }
    svg.finish(WIDTH, y)
}

/// In lines that find room.
fn wrapped(text: &str) -> Vec<String> {
    const MOST: usize = 150;
    let mut lines = vec![String::new()];
    for word in text.split_inclusive(' ') {
        match lines.last_mut() {
            Some(line) if line.len() + word.len() <= MOST => line.push_str(word),
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

fn legend(svg: &mut Svg, y: f64, ways: &[Way]) {
    let mut x = MARGIN;
    for way in ways {
        svg.rect((x, y - 11.0), (13.0, 13.0), colour(*way));
        svg.text((x + 19.0, y), PLAIN, words(*way));
        // About the width of the words.
        x += 44.0 + words(*way).len() as f64 * 6.6;
    }
    svg.line((x, y - 5.0), (x + 24.0, y - 5.0), RANGE, 1.5);
    svg.text((x + 30.0, y), PLAIN, "lowest to highest round; bars are medians");
}

/// Returns where the next begins.
fn panel(svg: &mut Svg, top: f64, quantity: &Quantity, rows: &[&Row]) -> f64 {
    let mut y = top + 24.0;
    let heading = format!("{}, {} ({})", quantity.name, quantity.unit, quantity.better.words());
    svg.text((MARGIN, y), SUBHEADING, &heading);
    svg.line((MARGIN, y + 7.0), (WIDTH - MARGIN, y + 7.0), "#ccc", 1.0);
    y += 16.0;
    let scale = rows.iter().flat_map(|row| Way::ALL.map(|way| highest(row.values(way)))).fold(0.0, f64::max);
    let length = |value: f64| (BARS_END - BARS) * value / scale.max(f64::MIN_POSITIVE);
    for row in rows {
        let ways: Vec<Way> = Way::ALL.into_iter().filter(|way| !row.values(*way).is_empty()).collect();
        let height = ways.len() as f64 * BAR;
        let middle = y + height / 2.0;
        svg.text((BARS - 12.0, middle + 4.0), Type { anchor: Anchor::End, ..PLAIN }, &row.case);
        for (way, bar) in ways.iter().zip(0..) {
            let at = y + f64::from(bar) * BAR;
            let value = row.median(*way).unwrap_or(0.0);
            svg.rect((BARS, at), (length(value).max(1.0), BAR - 2.0), colour(*way));
            let (low, high) = (lowest(row.values(*way)), highest(row.values(*way)));
            let centre = at + BAR / 2.0 - 1.0;
            if high > low {
                svg.line((BARS + length(low), centre), (BARS + length(high), centre), RANGE, 1.5);
            }
            let end = BARS + length(high) + 6.0;
            svg.text((end, centre + 4.5), Type { size: 12.0, ..PLAIN }, &digits(value));
        }
        ratios(svg, middle, row);
        y += height + 9.0;
    }
    y
}

/// Beside the bars of a row: what the router reaches, and whether that is enough.
fn ratios(svg: &mut Svg, middle: f64, row: &Row) {
    let of = |way: Way| row.ratio(way).map(|ratio| format!("{ratio:.2} of {}", way.name()));
    let ratios: Vec<String> = [Way::Host, Way::Overlay].into_iter().filter_map(of).collect();
    let verdict = row.verdict();
    let first = if verdict.is_some() && !ratios.is_empty() { middle - 4.0 } else { middle + 4.0 };
    svg.text((RATIOS, first), PLAIN, &ratios.join(", "));
    if let Some(verdict) = verdict {
        let said = verdict.outcome.words();
        let colour = match verdict.outcome {
            Outcome::Met => MET,
            Outcome::Missed => MISSED,
            Outcome::Undecided => PLAIN.colour,
        };
        let below = if ratios.is_empty() { middle + 4.0 } else { middle + 13.0 };
        svg.text((RATIOS, below), Type { colour, ..PLAIN }, &format!("target {}: {said}", verdict.target));
    }
}

/// A connection, second by second, and its swap. Returns where the next begins.
fn seconds(svg: &mut Svg, top: f64, live: &Live) -> f64 {
    let (left, right, height) = (MARGIN + 36.0, WIDTH - MARGIN, 190.0);
    let heading = "One iperf3 connection, Gbit/s second by second; the routers are started at 3 s";
    svg.text((MARGIN, top + 24.0), SUBHEADING, heading);
    let top = top + 44.0;
    let scale = highest(&live.gbps).max(1.0) * 1.15;
    let y = |gbps: f64| top + height * (1.0 - gbps / scale);
    let second = (right - left) / live.gbps.len().max(1) as f64;
    let step =
        [1.0, 2.0, 5.0, 10.0, 20.0, 50.0].into_iter().find(|step| scale / step <= 6.0).unwrap_or(100.0);
    for line in 0..=(scale / step) as u32 {
        let value = f64::from(line) * step;
        svg.line((left, y(value)), (right, y(value)), "#ddd", 1.0);
        svg.text((left - 6.0, y(value) + 4.0), Type { anchor: Anchor::End, ..SMALL }, &value.to_string());
    }
    let mut points = Vec::new();
    for (index, gbps) in live.gbps.iter().enumerate() {
        // A rate is about a whole second: drawn as a step.
        let x = left + index as f64 * second;
        points.extend([(x, y(*gbps)), (x + second, y(*gbps))]);
        let middle = Type { anchor: Anchor::Middle, ..SMALL };
        svg.text((x + second / 2.0, y(*gbps) - 6.0), middle, &format!("{gbps:.1}"));
        svg.text((x, top + height + 17.0), middle, &format!("{index} s"));
    }
    svg.polyline(&points, colour(Way::Router));
    let x = left + live.swapped_at_s * second;
    svg.line((x, top), (x, top + height), MISSED, 1.5);
    let pause = live.pause_us.map_or(String::new(), |us| format!(", pause {:.1} ms", us / 1000.0));
    let words = format!("swapped onto the host network{pause}");
    svg.text((x + 6.0, top + height - 8.0), Type { colour: MISSED, ..PLAIN }, &words);
    top + height + 26.0
}

fn highest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn lowest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}
