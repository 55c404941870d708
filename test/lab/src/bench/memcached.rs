// SPDX-License-Identifier: Apache-2.0
//! memcached and memcaslap: nine gets to a set, 16 connections.

use anyhow::{Context, Result};
use lab::programs::{MEMCACHED_PORT, memcached};

use super::{ALL_PODS, Key, Part, Quantity, Setting};

pub static KEY: Key = Key {
    name: "memcached",
    title: "gets and sets of 16 connections (90 % and 10 %, values of 1 KiB)",
    rules: ALL_PODS,
    rounds: 3,
    most_rounds: 3,
    parts,
    live: None,
};

static OPERATIONS: Quantity = Quantity::more("operations", "1/s");
static P50: Quantity = Quantity::less("median", "µs");
static P99: Quantity = Quantity::less("99th percentile", "µs");
static P999: Quantity = Quantity::less("99.9th percentile", "µs");

fn parts(_: &Setting) -> Result<Vec<Part>> {
    let case = "memcaslap";
    let part = Part::new("gets and sets", move |run| {
        let _memcached = run.serve(&memcached(run.address), MEMCACHED_PORT)?;
        let server = format!("{}:{MEMCACHED_PORT}", run.address);
        let got =
            parse(&run.client(&format!("memcaslap -s {server} -T 1 -c 16 -t {}s -S {0}s", run.seconds))?)?;
        Ok(vec![
            OPERATIONS.of(case, got.operations_per_s),
            P50.of(case, got.percentile_us(0.5)),
            P99.of(case, got.percentile_us(0.99)),
            P999.of(case, got.percentile_us(0.999)),
        ])
    });
    Ok(vec![part])
}

struct Memcaslap {
    operations_per_s: f64,
    /// How many took from 1 to 2 µs, from 2 to 4, and so on.
    counts: Vec<f64>,
}

impl Memcaslap {
    /// Within a class, which reaches up to twice its beginning, all are taken to be spread evenly (on a logarithmic scale).
    fn percentile_us(&self, part: f64) -> f64 {
        let mut left = self.counts.iter().sum::<f64>() * part;
        for (class, count) in (0..).zip(&self.counts) {
            if left <= *count {
                return 2_f64.powf(f64::from(class) + left / count.max(1.0));
            }
            left -= count;
        }
        2_f64.powi(self.counts.len() as i32)
    }
}

fn parse(output: &str) -> Result<Memcaslap> {
    let found = || {
        let rate = output.rsplit_once("TPS: ")?.1.split_whitespace().next()?.parse().ok()?;
        let total = output.rsplit_once("Total Statistics (")?.1;
        let lines = total.split_once("Log2 Dist:")?.1.lines().skip(1);
        let classes = lines.take_while(|line| line.contains(':')).filter_map(|line| line.split_once(':'));
        let counts: Vec<f64> = classes
            .flat_map(|(_, counts)| counts.split_whitespace())
            .filter_map(|count| count.parse().ok())
            .collect();
        (!counts.is_empty()).then_some(Memcaslap { operations_per_s: rate, counts })
    };
    found().with_context(|| format!("memcaslap printed:\n{output}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Total Statistics (400 events)\n   Min:         8\n   Log2 Dist:\n\
                          \x20      0:        0        0        0      100\n       4:      100      200\n\n\
                          cmd_get: 47558\n\nRun time: 2.0s Ops: 52850 TPS: 26420 Net_rate: 29.6M/s\n";

    #[test]
    fn figures_are_found_in_what_memcaslap_prints() {
        let got = parse(OUTPUT).unwrap();
        assert_eq!(got.operations_per_s, 26420.0);
        assert_eq!(got.counts, [0.0, 0.0, 0.0, 100.0, 100.0, 200.0]);
        assert!(parse("connection refused").is_err());
    }

    #[test]
    fn a_percentile_lies_in_the_class_that_holds_it() {
        let got = parse(OUTPUT).unwrap();
        assert_eq!(got.percentile_us(0.25), 16.0);
        assert_eq!(got.percentile_us(0.5), 32.0);
        assert!((32.0..64.0).contains(&got.percentile_us(0.99)));
    }
}
