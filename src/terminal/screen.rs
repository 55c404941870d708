// SPDX-License-Identifier: Apache-2.0
//! Draws the model. The terminal's own colours, so that it fits dark and light ones.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Style, Stylize},
    text::{Line, Span},
    widgets::{Cell, Paragraph, Row, Table},
};

use super::model::{By, Model, Order, other_host};
use crate::{
    coordinator::Shown,
    live::{Group, Live, Sum},
    units::{age, bytes, rate},
};

const HOST: Color = Color::Green;
const OVERLAY: Color = Color::Yellow;
const MOVING: Color = Color::Magenta;
/// Cells of the bar that shows which part is on the host network.
const BAR: u64 = 10;

pub fn draw(frame: &mut Frame<'_>, model: &Model) {
    let [head, table, foot] =
        Layout::vertical([Constraint::Length(4), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    frame.render_widget(summary(&model.sum()), head);
    match model.by {
        By::Workload => draw_groups(frame, table, model),
        By::Connection => draw_connections(frame, table, model),
    }
    frame.render_widget(footer(model), foot);
}

fn summary(sum: &Sum) -> Paragraph<'static> {
    let number = |count: u64| Span::from(count.to_string()).bold();
    Paragraph::new(vec![
        Line::from(vec![
            Span::from("ebpf-router  ").bold(),
            number(sum.connections()),
            " connections: ".into(),
            number(sum.on_host).fg(HOST),
            " host, ".into(),
            number(sum.on_overlay).fg(OVERLAY),
            " overlay, ".into(),
            number(sum.moving).fg(MOVING),
            " moving".into(),
        ]),
        Line::from(vec![
            "rate   host ".into(),
            Span::from(rate(sum.host_bytes_per_second)).fg(HOST).bold(),
            "   overlay ".into(),
            Span::from(rate(sum.overlay_bytes_per_second)).fg(OVERLAY).bold(),
        ]),
        Line::from(vec![
            "saved  ".into(),
            Span::from(bytes(sum.host_bytes)).bold(),
            " went over the host network, without ".into(),
            Span::from(bytes(sum.saved_bytes())).bold(),
            " of VXLAN headers at least".into(),
        ]),
    ])
}

fn draw_groups(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let head = ["WORKLOAD", "WITH HOST", "CONNS", "ON HOST", "HOST/s", "OVERLAY/s", "HOST", "OVERLAY"];
    let row = |group: &Group| {
        let sum = group.sum;
        Row::new([
            Cell::from(group.workload.clone()),
            Cell::from(other_host(group.other_host)),
            Cell::from(sum.connections().to_string()),
            Cell::from(bar(&sum)),
            Cell::from(rate(sum.host_bytes_per_second)),
            Cell::from(rate(sum.overlay_bytes_per_second)),
            Cell::from(bytes(sum.host_bytes)),
            Cell::from(bytes(sum.overlay_bytes)),
        ])
    };
    let widths = [
        Constraint::Fill(1),
        Constraint::Length(15),
        Constraint::Length(6),
        Constraint::Length(BAR as u16 + 6),
        Constraint::Length(12),
        Constraint::Length(12),
        Constraint::Length(10),
        Constraint::Length(10),
    ];
    let rows: Vec<Row<'_>> =
        model.groups().iter().skip(model.top).take(area.height.into()).map(row).collect();
    frame.render_widget(table(head, rows, widths), area);
}

fn draw_connections(frame: &mut Frame<'_>, area: Rect, model: &Model) {
    let head = ["CONN", "WORKLOAD", "LOCAL", "REMOTE", "PATH", "RATE", "CARRIED", "AGE", "PAUSE", "REASON"];
    let row = |live: &&Live| {
        let flow = &live.flow;
        let (path, color) = match flow.path {
            Shown::Host => ("host", HOST),
            Shown::Overlay => ("overlay", OVERLAY),
            Shown::Moving => ("moving", MOVING),
        };
        Row::new([
            Cell::from(flow.conn.clone()),
            Cell::from(flow.workload.clone()),
            Cell::from(flow.local.to_string()),
            Cell::from(flow.remote.to_string()),
            Cell::from(path).fg(color),
            Cell::from(rate(live.bytes_per_second())),
            Cell::from(bytes(flow.overlay_bytes + flow.host_bytes)),
            Cell::from(age(flow.age_ms)),
            Cell::from(flow.pause_us.map_or("-".into(), |us| format!("{us} us"))),
            Cell::from(flow.reason.clone().unwrap_or("-".into())),
        ])
    };
    let widths = [
        Constraint::Length(16),
        Constraint::Min(18),
        Constraint::Length(21),
        Constraint::Length(21),
        Constraint::Length(7),
        Constraint::Length(12),
        Constraint::Length(10),
        Constraint::Length(6),
        Constraint::Length(10),
        Constraint::Fill(1),
    ];
    let connections = model.connections();
    let rows: Vec<Row<'_>> = connections.iter().skip(model.top).take(area.height.into()).map(row).collect();
    frame.render_widget(table(head, rows, widths), area);
}

fn table<'a, const N: usize>(
    head: [&'static str; N],
    rows: Vec<Row<'a>>,
    widths: [Constraint; N],
) -> Table<'a> {
    Table::new(rows, widths).header(Row::new(head).style(Style::new().reversed())).column_spacing(1)
}

fn bar(sum: &Sum) -> Line<'static> {
    let all = sum.connections().max(1);
    let full = (sum.on_host * BAR).div_ceil(all).min(BAR);
    Line::from(vec![
        Span::from("\u{2588}".repeat(full as usize)).fg(HOST),
        Span::from("\u{2591}".repeat((BAR - full) as usize)).dim(),
        Span::from(format!(" {} %", sum.on_host * 100 / all)),
    ])
}

fn footer(model: &Model) -> Line<'static> {
    if let Some(error) = &model.error {
        return Line::from(format!("what is shown is old: {error}")).fg(Color::Red);
    }
    if model.is_typing {
        return Line::from(vec![
            Span::from(format!("/{}", model.filter)).bold(),
            "\u{2588}  Enter keeps the filter, Esc clears it".into(),
        ]);
    }
    let mut words = vec![Span::from("q quit  Tab workloads/connections  / filter  sort: ")];
    for order in Order::ALL {
        let word = Span::from(format!("{} {}  ", order.key(), order.name()));
        words.push(if order == model.order { word.reversed() } else { word });
    }
    if !model.filter.is_empty() {
        words.push(Span::from(format!("/{}", model.filter)).bold());
    }
    Line::from(words)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::live::tests::flow;

    fn drawn(width: u16, height: u16) -> String {
        let mut model = Model::default();
        model.take(Instant::now(), vec![flow("0123456789abcdef", "shop/web", Shown::Host, 13_980)]);
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, &model)).unwrap();
        let buffer = terminal.backend().buffer();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
        (0..height).map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_head_says_what_is_saved_and_the_table_who_saves_it() {
        let text = drawn(120, 10);
        assert!(
            text.contains("13.7 KiB went over the host network, without 500 B of VXLAN headers"),
            "{text}"
        );
        assert!(text.contains("shop/web") && text.contains("100 %"), "{text}");
    }

    #[test]
    fn a_tiny_terminal_is_drawn_as_well() {
        for (width, height) in [(1, 1), (10, 3), (20, 5)] {
            drawn(width, height);
        }
    }
}
