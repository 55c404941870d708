// SPDX-License-Identifier: Apache-2.0
//! What `router flows --watch` shows, and what keys do. Pure.

use std::{cmp::Reverse, time::Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use crate::{
    coordinator::{FlowView, OtherHost},
    live::{Group, Live, Sampler, Sum, groups},
};

#[derive(Debug, Default)]
pub struct Model {
    sampler: Sampler,
    lives: Vec<Live>,
    pub by: By,
    pub order: Order,
    pub filter: String,
    /// Keys are letters of the filter.
    pub is_typing: bool,
    /// The first row that is shown.
    pub top: usize,
    /// Why what is shown is old.
    pub error: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum By {
    #[default]
    Workload,
    Connection,
}

/// What comes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    #[default]
    Rate,
    Bytes,
    Name,
    Path,
    Pause,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Then {
    GoOn,
    Quit,
}

impl Order {
    pub const ALL: [Order; 5] = [Order::Rate, Order::Bytes, Order::Name, Order::Path, Order::Pause];

    pub fn key(self) -> char {
        match self {
            Order::Rate => 'r',
            Order::Bytes => 'b',
            Order::Name => 'n',
            Order::Path => 'p',
            Order::Pause => 's',
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Order::Rate => "rate",
            Order::Bytes => "bytes",
            Order::Name => "name",
            Order::Path => "path",
            Order::Pause => "pause",
        }
    }
}

impl Model {
    pub fn take(&mut self, now: Instant, flows: Vec<FlowView>) {
        self.lives = self.sampler.look(now, flows);
        self.error = None;
    }

    pub fn fail(&mut self, error: String) {
        self.error = Some(error);
    }

    /// Of all connections, whatever the filter says.
    pub fn sum(&self) -> Sum {
        Sum::of(&self.lives)
    }

    /// Connections that the filter lets through, in order.
    pub fn connections(&self) -> Vec<&Live> {
        let mut lives: Vec<&Live> = self.lives.iter().filter(|live| self.lets_through(live)).collect();
        let bytes = |live: &Live| live.flow.overlay_bytes + live.flow.host_bytes;
        let name = |live: &Live| (live.flow.workload.clone(), live.flow.local, live.flow.remote);
        match self.order {
            Order::Rate => lives.sort_by_cached_key(|l| (Reverse((l.bytes_per_second(), bytes(l))), name(l))),
            Order::Bytes => lives.sort_by_cached_key(|l| (Reverse(bytes(l)), name(l))),
            Order::Name => lives.sort_by_cached_key(|l| name(l)),
            Order::Path => lives.sort_by_cached_key(|l| (l.flow.path as u8, name(l))),
            Order::Pause => lives.sort_by_cached_key(|l| (Reverse(l.flow.pause_us), name(l))),
        }
        lives
    }

    /// The same by workload and other host. A group has no pause: it goes by name then.
    pub fn groups(&self) -> Vec<Group> {
        let lives: Vec<Live> = self.lives.iter().filter(|live| self.lets_through(live)).cloned().collect();
        let mut groups = groups(&lives);
        match self.order {
            Order::Rate => groups.sort_by_key(|g| Reverse((g.sum.bytes_per_second(), g.sum.connections()))),
            Order::Bytes => groups.sort_by_key(|g| Reverse(g.sum.overlay_bytes + g.sum.host_bytes)),
            Order::Path => groups.sort_by_key(|g| Reverse(g.sum.on_overlay)),
            Order::Name | Order::Pause => {}
        }
        groups
    }

    fn lets_through(&self, live: &Live) -> bool {
        let flow = &live.flow;
        let filter = self.filter.to_lowercase();
        let holds = |text: &str| text.to_lowercase().contains(&filter);
        filter.is_empty()
            || holds(&flow.workload)
            || holds(&flow.conn)
            || holds(&flow.local.to_string())
            || holds(&flow.remote.to_string())
            || holds(&other_host(flow.other_host))
            || holds(&format!("{:?}", flow.path))
            || flow.reason.as_deref().is_some_and(holds)
    }

    pub fn rows(&self) -> usize {
        match self.by {
            By::Connection => self.lives.iter().filter(|live| self.lets_through(live)).count(),
            By::Workload => self.groups().len(),
        }
    }

    pub fn press(&mut self, key: KeyEvent) -> Then {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return Then::Quit;
        }
        if self.is_typing {
            match key.code {
                KeyCode::Enter => self.is_typing = false,
                KeyCode::Esc => (self.is_typing, self.filter) = (false, String::new()),
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(letter) => self.filter.push(letter),
                _ => {}
            }
            self.top = 0;
            return Then::GoOn;
        }
        let last = self.rows().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') => return Then::Quit,
            KeyCode::Char('/') => self.is_typing = true,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Tab | KeyCode::Enter => {
                self.by = if self.by == By::Workload { By::Connection } else { By::Workload };
                self.top = 0;
            }
            KeyCode::Down | KeyCode::Char('j') => self.top = (self.top + 1).min(last),
            KeyCode::Up | KeyCode::Char('k') => self.top = self.top.saturating_sub(1),
            KeyCode::PageDown => self.top = (self.top + 20).min(last),
            KeyCode::PageUp => self.top = self.top.saturating_sub(20),
            KeyCode::Home => self.top = 0,
            KeyCode::End => self.top = last,
            KeyCode::Char(letter) => {
                if let Some(order) = Order::ALL.into_iter().find(|order| order.key() == letter) {
                    self.order = order;
                }
            }
            _ => {}
        }
        Then::GoOn
    }
}

pub fn other_host(host: OtherHost) -> String {
    match host {
        OtherHost::Unknown => "unknown".into(),
        OtherHost::Same => "this host".into(),
        OtherHost::Peer(peer) => peer.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{coordinator::Shown, live::tests::flow};

    fn model() -> Model {
        let (mut model, now) = (Model::default(), Instant::now());
        let flows = |bytes| {
            vec![
                flow("a", "shop/web", Shown::Overlay, 0),
                flow("b", "shop/db", Shown::Host, bytes),
                flow("c", "shop/db", Shown::Host, 5),
            ]
        };
        model.take(now, flows(0));
        model.take(now + Duration::from_secs(1), flows(1000));
        model
    }

    fn press(model: &mut Model, keys: &str) {
        for key in keys.chars() {
            let code = match key {
                '\n' => KeyCode::Enter,
                '\t' => KeyCode::Tab,
                '\x1b' => KeyCode::Esc,
                letter => KeyCode::Char(letter),
            };
            assert_eq!(model.press(code.into()), Then::GoOn);
        }
    }

    /// The connections that are shown after these keys.
    fn check(keys: &str, expected: &[&str]) {
        let mut model = model();
        press(&mut model, keys);
        let shown: Vec<_> = model.connections().iter().map(|live| live.flow.conn.clone()).collect();
        assert_eq!(shown, expected, "{keys:?}");
    }

    #[test]
    fn the_fastest_comes_first() {
        check("", &["b", "c", "a"]);
    }

    #[test]
    fn a_key_changes_the_order() {
        check("n", &["b", "c", "a"]);
        check("p", &["a", "b", "c"]);
    }

    #[test]
    fn a_filter_keeps_what_holds_its_letters() {
        check("/WEB\n", &["a"]);
        check("/overlay\n", &["a"]);
        check("/nothing\n", &[]);
        check("/web\x1b", &["b", "c", "a"]);
    }

    #[test]
    fn letters_of_a_filter_are_no_commands() {
        let mut model = model();
        press(&mut model, "/q");
        assert_eq!((model.filter.as_str(), model.is_typing), ("q", true));
    }

    #[test]
    fn q_quits() {
        assert_eq!(model().press(KeyCode::Char('q').into()), Then::Quit);
    }

    #[test]
    fn workloads_are_summed_up() {
        let groups = model().groups();
        let shown: Vec<_> = groups.iter().map(|g| (g.workload.as_str(), g.sum.connections())).collect();
        assert_eq!(shown, [("shop/db", 2), ("shop/web", 1)]);
    }

    #[test]
    fn one_cannot_scroll_past_the_end() {
        let mut model = model();
        press(&mut model, "\tjjjjjjjj");
        assert_eq!(model.top, 2);
    }
}
