// SPDX-License-Identifier: Apache-2.0
//! Figures as people read them. Pure.

pub fn age(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds => format!("{} h", seconds / 3600),
    }
}

pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// In bits, as networks are measured.
pub fn rate(bytes_per_second: u64) -> String {
    let bits = bytes_per_second as f64 * 8.0;
    match bits {
        0.0 => "-".into(),
        bits if bits < 1e3 => format!("{bits:.0} bit/s"),
        bits if bits < 1e6 => format!("{:.1} kbit/s", bits / 1e3),
        bits if bits < 1e9 => format!("{:.1} Mbit/s", bits / 1e6),
        bits => format!("{:.1} Gbit/s", bits / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_ages_are_shown_in_the_unit_that_fits() {
        assert_eq!((bytes(1023).as_str(), bytes(1536).as_str()), ("1023 B", "1.5 KiB"));
        assert_eq!((age(5_300).as_str(), age(7_200_000).as_str()), ("5 s", "2 h"));
        assert_eq!((rate(0).as_str(), rate(125_000_000).as_str()), ("-", "1.0 Gbit/s"));
    }
}
