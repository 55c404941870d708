// SPDX-License-Identifier: Apache-2.0
//! Quantities, and their figures by way.

use lab::measure::{interval_of_median, median};

use super::Way;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Better {
    More,
    Less,
}

impl Better {
    pub fn words(self) -> &'static str {
        match self {
            Better::More => "more is better",
            Better::Less => "less is better",
        }
    }
}

/// What the figure with the router is to reach.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Target {
    OfHost(f64),
    OfOverlay(f64),
    Value(f64),
}

/// Something that is measured; all cases of it can be drawn on one scale.
#[derive(PartialEq, Debug)]
pub struct Quantity {
    pub name: &'static str,
    pub unit: &'static str,
    pub better: Better,
    pub target: Option<Target>,
}

impl Quantity {
    pub const fn more(name: &'static str, unit: &'static str) -> Quantity {
        Quantity { name, unit, better: Better::More, target: None }
    }

    pub const fn less(name: &'static str, unit: &'static str) -> Quantity {
        Quantity { name, unit, better: Better::Less, target: None }
    }

    pub const fn target(mut self, target: Target) -> Quantity {
        self.target = Some(target);
        self
    }

    pub fn of(&'static self, case: impl Into<String>, value: f64) -> Figure {
        Figure { quantity: self, case: case.into(), value }
    }
}

/// What one run gave.
pub struct Figure {
    pub quantity: &'static Quantity,
    pub case: String,
    pub value: f64,
}

/// The figures of one case, from all rounds.
pub struct Row {
    pub quantity: &'static Quantity,
    pub case: String,
    values: [Vec<f64>; Way::ALL.len()],
}

pub struct Verdict {
    pub target: String,
    /// Where what is compared with the target lies: `interval_of_median`.
    pub between: (f64, f64),
    pub outcome: Outcome,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    Met,
    Missed,
    /// The target is among what was reached: the rounds differ by more than what is missing or left.
    Undecided,
}

impl Outcome {
    pub fn words(self) -> &'static str {
        match self {
            Outcome::Met => "met",
            Outcome::Missed => "not met",
            Outcome::Undecided => "not decided",
        }
    }
}

impl Row {
    pub fn new(quantity: &'static Quantity, case: &str) -> Row {
        Row { quantity, case: case.to_owned(), values: Default::default() }
    }

    pub fn is_of(&self, figure: &Figure) -> bool {
        self.quantity == figure.quantity && self.case == figure.case
    }

    pub fn add(&mut self, way: Way, value: f64) {
        self.values[way as usize].push(value);
    }

    pub fn values(&self, way: Way) -> &[f64] {
        &self.values[way as usize]
    }

    pub fn median(&self, way: Way) -> Option<f64> {
        median(self.values(way))
    }

    /// With the router, in parts of another way: of each round, in which both had the machine as it was then.
    pub fn ratios(&self, to: Way) -> Vec<f64> {
        self.values(Way::Router).iter().zip(self.values(to)).map(|(router, other)| router / other).collect()
    }

    pub fn ratio(&self, to: Way) -> Option<f64> {
        median(&self.ratios(to))
    }

    pub fn verdict(&self) -> Option<Verdict> {
        let (limit, of, reached) = match self.quantity.target? {
            Target::OfHost(limit) => (limit, " of host", self.ratios(Way::Host)),
            Target::OfOverlay(limit) => (limit, " of overlay", self.ratios(Way::Overlay)),
            Target::Value(limit) => (limit, "", self.values(Way::Router).to_vec()),
        };
        let (low, high) = interval_of_median(&reached)?;
        let (sign, worst, best) = match self.quantity.better {
            Better::More => ("≥", low - limit, high - limit),
            Better::Less => ("≤", limit - high, limit - low),
        };
        let outcome = match (worst >= 0.0, best >= 0.0) {
            (true, _) => Outcome::Met,
            (_, false) => Outcome::Missed,
            _ => Outcome::Undecided,
        };
        Some(Verdict { target: format!("{sign} {limit}{of}"), between: (low, high), outcome })
    }

    /// Is the target about this way?
    pub fn compares(&self, way: Way) -> bool {
        match (self.quantity.target, way) {
            (Some(_), Way::Router) | (Some(Target::OfHost(_)), Way::Host) => true,
            (Some(Target::OfOverlay(_)), Way::Overlay) => true,
            (Some(_) | None, _) => false,
        }
    }

    pub fn is_undecided(&self) -> bool {
        self.verdict().is_some_and(|verdict| verdict.outcome == Outcome::Undecided)
    }
}

/// Three digits that count.
pub fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => thousands(value),
        size if size >= 100.0 || size == 0.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(value: f64) -> String {
    let whole = format!("{value:.0}");
    let groups: Vec<&str> =
        whole.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    static RATE: Quantity = Quantity::more("rate", "1/s").target(Target::OfHost(0.98));
    static DELAY: Quantity = Quantity::less("delay", "µs").target(Target::OfHost(1.02));

    fn row(quantity: &'static Quantity, router: &[f64], host: &[f64]) -> Row {
        let mut row = Row::new(quantity, "case");
        router.iter().for_each(|value| row.add(Way::Router, *value));
        host.iter().for_each(|value| row.add(Way::Host, *value));
        row
    }

    #[test]
    fn a_target_for_more_is_met_from_above_and_one_for_less_from_below() {
        let outcome = |row: Row| row.verdict().map(|verdict| verdict.outcome);
        assert_eq!(outcome(row(&RATE, &[99.0], &[100.0])), Some(Outcome::Met));
        assert_eq!(outcome(row(&RATE, &[97.0], &[100.0])), Some(Outcome::Missed));
        assert_eq!(outcome(row(&DELAY, &[101.0], &[100.0])), Some(Outcome::Met));
        assert_eq!(outcome(row(&DELAY, &[103.0], &[100.0])), Some(Outcome::Missed));
        assert_eq!(outcome(row(&RATE, &[99.0], &[])), None);
    }

    #[test]
    fn a_target_that_is_reached_in_some_rounds_only_is_not_decided() {
        assert!(row(&RATE, &[97.0, 99.0], &[100.0, 100.0]).is_undecided());
        assert!(row(&DELAY, &[101.0, 103.0], &[100.0, 100.0]).is_undecided());
        // One round of nine is chance.
        let rounds = [99.0, 99.0, 99.0, 99.0, 80.0, 99.0, 99.0, 99.0, 99.0];
        assert!(!row(&RATE, &rounds, &[100.0; 9]).is_undecided());
    }

    #[test]
    fn a_target_is_about_the_router_and_what_it_is_compared_with() {
        let row = row(&RATE, &[97.0], &[100.0]);
        assert_eq!(Way::ALL.map(|way| row.compares(way)), [false, true, true]);
    }

    #[test]
    fn figures_are_short() {
        assert_eq!([0.12345, 1.2345, 12.345, 123.45].map(digits), ["0.123", "1.23", "12.3", "123"]);
        assert_eq!([1234.5, 1_234_567.0].map(digits), ["1,234", "1,234,567"]);
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        assert_eq!(row(&RATE, &[10.0, 50.0, 30.0], &[10.0, 100.0, 30.0]).ratio(Way::Host), Some(1.0));
    }
}
