// SPDX-License-Identifier: Apache-2.0
//! The report as a picture (SVG): rates of the three ways side by side, and a connection swapped while it runs.

use std::fmt::Write;

use lab::measure::median;

use super::{Way, report::Report};

const WIDTH: f64 = 920.0;
const HEIGHT: f64 = 860.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;

/// A plotting area: where it is on the page, and the value at its top.
struct Area {
    top: f64,
    height: f64,
    max: f64,
}

impl Area {
    fn y(&self, value: f64) -> f64 {
        self.top + self.height * (1.0 - value / self.max)
    }

    /// Horizontal lines with their values.
    fn grid(&self, out: &mut String) -> std::fmt::Result {
        let step = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]
            .into_iter()
            .find(|step| self.max / step <= 6.0)
            .unwrap_or(200.0);
        let mut value = 0.0;
        while value <= self.max {
            let y = self.y(value);
            writeln!(
                out,
                r##"<line x1="{LEFT}" y1="{y:.1}" x2="{}" y2="{y:.1}" stroke="#ddd"/>"##,
                WIDTH - RIGHT
            )?;
            writeln!(out, r#"<text x="{}" y="{:.1}" text-anchor="end">{value}</text>"#, LEFT - 8.0, y + 4.0)?;
            value += step;
        }
        let middle = self.top + self.height / 2.0;
        writeln!(
            out,
            r#"<text transform="translate(20 {middle:.1}) rotate(-90)" text-anchor="middle">Gbit/s</text>"#
        )
    }
}

fn colour(way: Way) -> &'static str {
    match way {
        Way::Overlay => "#b0b7bf",
        Way::Router => "#1f77b4",
        Way::Host => "#9ecae1",
    }
}

fn words(way: Way) -> &'static str {
    match way {
        Way::Overlay => "overlay (VXLAN)",
        Way::Router => "overlay with ebpf-router",
        Way::Host => "host network",
    }
}

pub fn draw(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = page(report, &mut out);
    out
}

fn page(report: &Report, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="13" fill="black">"#
    )?;
    writeln!(out, r#"<rect width="100%" height="100%" fill="white"/>"#)?;
    title(out, 30.0, "iperf3 between two pods on two hosts: throughput (median, higher is better)")?;
    bars(report, out)?;
    title(out, 440.0, "One iperf3 connection, second by second; the routers start at 3 s")?;
    line(report, out)?;
    figures(report, out)?;
    writeln!(out, "</svg>")
}

fn title(out: &mut String, y: f64, text: &str) -> std::fmt::Result {
    writeln!(out, r#"<text x="{LEFT}" y="{y}" font-size="17" font-weight="bold">{text}</text>"#)
}

fn bars(report: &Report, out: &mut String) -> std::fmt::Result {
    let highest = report.throughput.iter().map(|row| row.gbps).fold(1.0, f64::max);
    let area = Area { top: 80.0, height: 280.0, max: highest * 1.1 };
    for (index, way) in Way::ALL.into_iter().enumerate() {
        let x = LEFT + index as f64 * 200.0;
        writeln!(out, r#"<rect x="{x}" y="45" width="14" height="14" fill="{}"/>"#, colour(way))?;
        writeln!(out, r#"<text x="{}" y="57">{}</text>"#, x + 20.0, words(way))?;
    }
    area.grid(out)?;
    let kinds = report.kinds();
    let group = (WIDTH - LEFT - RIGHT) / kinds.len().max(1) as f64;
    let bar = group * 0.26;
    for (index, kind) in kinds.iter().enumerate() {
        let start = LEFT + index as f64 * group;
        for (place, way) in Way::ALL.into_iter().enumerate() {
            let gbps = report.gbps(kind, way);
            let (x, y) = (start + group * 0.11 + place as f64 * bar, area.y(gbps));
            writeln!(
                out,
                r#"<rect x="{x:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" fill="{}"/>"#,
                bar - 3.0,
                area.top + area.height - y,
                colour(way)
            )?;
            let (x, y) = (x + (bar - 3.0) / 2.0, y - 5.0);
            writeln!(
                out,
                r#"<text x="{x:.1}" y="{y:.1}" text-anchor="middle" font-size="12">{gbps:.1}</text>"#
            )?;
        }
        let (x, y) = (start + group / 2.0, area.top + area.height + 20.0);
        writeln!(out, r#"<text x="{x:.1}" y="{y:.1}" text-anchor="middle">{kind}</text>"#)?;
    }
    Ok(())
}

fn line(report: &Report, out: &mut String) -> std::fmt::Result {
    let live = &report.live;
    let highest = live.gbps.iter().copied().fold(1.0, f64::max);
    let area = Area { top: 470.0, height: 220.0, max: highest * 1.15 };
    area.grid(out)?;
    let second = (WIDTH - LEFT - RIGHT) / live.gbps.len().max(1) as f64;
    let mut points = String::new();
    for (index, gbps) in live.gbps.iter().enumerate() {
        // A rate is about a second: draw it as a step.
        let (x, y) = (LEFT + index as f64 * second, area.y(*gbps));
        write!(points, "{x:.1},{y:.1} {:.1},{y:.1} ", x + second)?;
        let centre = x + second / 2.0;
        writeln!(
            out,
            r#"<text x="{centre:.1}" y="{:.1}" text-anchor="middle" font-size="12">{gbps:.1}</text>"#,
            y - 6.0
        )?;
        let bottom = area.top + area.height + 18.0;
        writeln!(out, r#"<text x="{x:.1}" y="{bottom:.1}" text-anchor="middle">{index} s</text>"#)?;
    }
    writeln!(
        out,
        r#"<polyline points="{points}" fill="none" stroke="{}" stroke-width="2.5"/>"#,
        colour(Way::Router)
    )?;
    if let Some(at) = live.swapped_at_s {
        let x = LEFT + at * second;
        let (top, bottom) = (area.top, area.top + area.height);
        writeln!(
            out,
            r##"<line x1="{x:.1}" y1="{top}" x2="{x:.1}" y2="{bottom}" stroke="#d62728" stroke-dasharray="5 4"/>"##
        )?;
        let pause = live.pause_us.map_or(String::new(), |us| format!(" (pause {:.1} ms)", us / 1000.0));
        writeln!(
            out,
            r##"<text x="{:.1}" y="{:.1}" fill="#d62728">swapped onto the host network{pause}</text>"##,
            x + 6.0,
            bottom - 8.0
        )?;
    }
    Ok(())
}

fn figures(report: &Report, out: &mut String) -> std::fmt::Result {
    title(out, 750.0, "Latency and pauses")?;
    let latency: Vec<String> = report
        .latency
        .iter()
        .map(|row| format!("{} {:.1} µs", words(row.way), row.figures.mean_us))
        .collect();
    let pauses: Vec<String> = report
        .pauses
        .iter()
        .filter_map(|row| Some(format!("{} {:.2} ms", row.kind, median(&row.pauses_us)? / 1000.0)))
        .collect();
    let lines = [
        format!("Ping-pong of 64 bytes (sockperf), mean, one way: {}.", latency.join(", ")),
        format!("Median time that the programs stand still for a swap: {}.", pauses.join(", ")),
        format!("{} connections swapped in this run.", report.swaps()),
    ];
    for (index, text) in lines.iter().enumerate() {
        writeln!(out, r#"<text x="{LEFT}" y="{}">{text}</text>"#, 778 + index * 22)?;
    }
    Ok(())
}
