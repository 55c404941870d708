// SPDX-License-Identifier: Apache-2.0
//! What the router counts, as Prometheus reads it. Pure: each answer is made anew of [`Figures`].

use std::fmt::{Debug, Error};

use forwarder_api::Refusal;
use prometheus_client::{
    encoding::{EncodeMetric, MetricEncoder, NoLabelSet, text::encode},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge, info::Info},
    registry::{Registry, Unit},
};

use crate::{
    coordinator::{Figures, Histogram},
    saving::encapsulation_bytes,
};

pub const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
pub const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Names and their values.
type Labels = Vec<(&'static str, String)>;

/// One metric with different labels.
#[derive(Debug)]
struct Family<M>(Vec<(Labels, M)>);

impl<M: EncodeMetric> EncodeMetric for Family<M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        self.0.iter().try_for_each(|(labels, metric)| metric.encode(encoder.encode_family(labels)?))
    }

    fn metric_type(&self) -> MetricType {
        self.0.first().map_or(MetricType::Unknown, |(_, metric)| metric.metric_type())
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        let seconds = |us: u64| us as f64 / 1e6;
        let buckets: Vec<(f64, u64)> =
            self.buckets().map(|(bound, count)| (bound.map_or(f64::INFINITY, seconds), count)).collect();
        encoder.encode_histogram::<NoLabelSet>(seconds(self.sum_us), self.count(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

fn family<const N: usize, M>(name: &'static str, of: [(&str, M); N]) -> Family<M> {
    Family(of.map(|(value, metric)| (vec![(name, value.to_owned())], metric)).into())
}

/// The OpenMetrics text.
pub fn open_metrics(figures: &Figures, lost_log_lines: u64) -> String {
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut text, &registry(figures, lost_log_lines));
    text
}

/// The same in the older text format, for those who do not ask for OpenMetrics: there a counter's `_total` and an info's
/// `_info` are part of its name also where it is described.
pub fn prometheus(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 256);
    let mut help = None;
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), said) => help = Some((name, said.unwrap_or_default())),
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", "counter"),
                    "info" => ("_info", "gauge"),
                    other => ("", other),
                };
                if let Some((_, said)) = help.take_if(|(described, _)| *described == name) {
                    text += &format!("# HELP {name}{suffix} {said}\n");
                }
                text += &format!("# TYPE {name}{suffix} {kind}\n");
            }
            // UNIT, EOF
            (Some("#"), ..) => {}
            _ => {
                text += line;
                text.push('\n');
            }
        }
    }
    text
}

fn registry(figures: &Figures, lost_log_lines: u64) -> Registry {
    let mut registry = Registry::with_prefix("ebpf_router");
    let tally = &figures.tally;
    let gauge = |value: usize| ConstGauge::new(value as i64);
    let truth = |value: bool| ConstGauge::new(i64::from(value));

    let build = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The router's release", build);
    registry.register("forwarder_up", "Is this host's forwarder reached", truth(figures.forwarder_is_up));
    registry.register("rules", "Rules in force", gauge(figures.rules));
    registry.register(
        "rules_wrong",
        "Are the rules as they stand wrong, so that older ones are in force",
        truth(figures.rules_are_wrong),
    );
    registry.register(
        "rule_errors",
        "Times that the rules were read and something new was wrong with them",
        ConstCounter::new(figures.rule_errors),
    );
    let peers = figures.peers.iter();
    let peers = peers.map(|(peer, up)| (vec![("peer", peer.to_string())], truth(*up))).collect();
    registry.register("peer_up", "Is this peer's router reached", Family(peers));

    let paths = [("overlay", gauge(figures.on_overlay)), ("host", gauge(figures.on_host))];
    registry.register(
        "connections",
        "Ends of connections that the router knows, by path; one within this host has two",
        family("path", paths),
    );
    registry.register(
        "connections_without_way_back",
        "Swapped connections that cannot go back to the overlay, because a forwarder was lost",
        gauge(figures.without_way_back),
    );
    registry.register(
        "connections_missed",
        "Connections that were left alone for want of room, by where: in the ring of tracing, or in the router",
        family(
            "room",
            [("tracing", ConstCounter::new(figures.not_traced)), ("router", ConstCounter::new(tally.overflow))],
        ),
    );

    registry.register("swaps", "Connections moved to the host network", ConstCounter::new(tally.swaps));
    registry.register(
        "swap_backs",
        "Connections moved back to the overlay",
        ConstCounter::new(tally.swap_backs),
    );
    let refusals = Refusal::ALL.into_iter().map(|reason| {
        let count = tally.refused.get(&reason).copied().unwrap_or_default();
        (vec![("reason", reason.label().to_owned())], ConstCounter::new(count))
    });
    registry.register(
        "refusals",
        "Times that a connection was left where it is, by reason",
        Family(refusals.collect()),
    );
    let pause = |direction: &str, result: &str, pauses: &Histogram| {
        (vec![("direction", direction.to_owned()), ("result", result.to_owned())], pauses.clone())
    };
    registry.register_with_unit(
        "pause",
        "How long an application stood still for a move, once for each connection that moved with it",
        Unit::Seconds,
        Family(vec![
            pause("to_host", "moved", &tally.pauses.to_host),
            pause("to_overlay", "moved", &tally.pauses.to_overlay),
            pause("to_host", "aborted", &tally.pauses.aborted_to_host),
            pause("to_overlay", "aborted", &tally.pauses.aborted_to_overlay),
        ]),
    );
    let carried = |path: &str, direction: &str, bytes| {
        (vec![("path", path.to_owned()), ("direction", direction.to_owned())], ConstCounter::new(bytes))
    };
    registry.register_with_unit(
        "carried",
        "Bytes of known connections, by path, as of the last scan (every 30 s); the last ones of a connection are missing",
        Unit::Bytes,
        Family(vec![
            carried("overlay", "sent", tally.on_overlay.sent),
            carried("overlay", "received", tally.on_overlay.received),
            carried("host", "sent", tally.on_host.sent),
            carried("host", "received", tally.on_host.received),
        ]),
    );
    registry.register_with_unit(
        "encapsulation_avoided",
        "Bytes of VXLAN headers that the host path did not need, at least: 50 for each full packet of 1398 bytes",
        Unit::Bytes,
        ConstCounter::new(encapsulation_bytes(tally.on_host.total())),
    );
    registry.register(
        "log_lines_lost",
        "Lines of the log that nobody read in time",
        ConstCounter::new(lost_log_lines),
    );
    registry
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn figures() -> Figures {
        let mut figures = Figures { peers: vec![("192.0.2.2".parse().unwrap(), true)], ..Figures::default() };
        figures.tally.swaps = 3;
        figures.tally.refused.insert(Refusal::IoUring, 2);
        for us in [900, 1_100, 2_000_000] {
            figures.tally.pauses.to_host.add(us);
        }
        figures.tally.on_host.sent = 13_980;
        figures
    }

    fn check(line: &str) {
        let text = prometheus(&open_metrics(&figures(), 0));
        assert!(text.lines().any(|found| found == line), "{line} expected in\n{text}");
    }

    #[test]
    fn counters_are_named_as_such_where_they_are_described_too() {
        check("# TYPE ebpf_router_swaps_total counter");
        check("ebpf_router_swaps_total 3");
        check("# HELP ebpf_router_swaps_total Connections moved to the host network.");
    }

    #[test]
    fn reasons_and_peers_are_labels() {
        check("ebpf_router_refusals_total{reason=\"io_uring\"} 2");
        check("ebpf_router_refusals_total{reason=\"stopping\"} 0");
        check("ebpf_router_peer_up{peer=\"192.0.2.2\"} 1");
    }

    #[test]
    fn pauses_are_a_histogram_in_seconds() {
        check("# TYPE ebpf_router_pause_seconds histogram");
        check("ebpf_router_pause_seconds_bucket{le=\"0.001\",direction=\"to_host\",result=\"moved\"} 1");
        check("ebpf_router_pause_seconds_bucket{le=\"+Inf\",direction=\"to_host\",result=\"moved\"} 3");
        check("ebpf_router_pause_seconds_count{direction=\"to_host\",result=\"moved\"} 3");
    }

    #[test]
    fn bytes_are_counted_by_path_and_what_they_save_is_said() {
        check("ebpf_router_carried_bytes_total{path=\"host\",direction=\"sent\"} 13980");
        check("ebpf_router_encapsulation_avoided_bytes_total 500");
    }

    /// Names of our metrics in a text, as they stand there.
    fn names(text: &str) -> BTreeSet<&str> {
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        text.split(|c| !is_of_name(c)).filter(|word| word.starts_with("ebpf_router_")).collect()
    }

    #[test]
    fn dashboard_and_alerts_name_only_metrics_that_there_are() {
        let text = prometheus(&open_metrics(&figures(), 0));
        let there = names(&text);
        for (file, text) in [
            ("dashboard.json", include_str!("../deploy/monitoring/dashboard.json")),
            ("alerts.yaml", include_str!("../deploy/monitoring/alerts.yaml")),
        ] {
            let named = names(text);
            assert!(named.len() > 5, "{file} names {named:?}");
            let missing: Vec<_> = named.difference(&there).collect();
            assert!(missing.is_empty(), "{file} names {missing:?}, which are no metrics");
        }
    }

    #[test]
    fn the_dashboard_is_json() {
        let text = include_str!("../deploy/monitoring/dashboard.json");
        let dashboard: serde_json::Value = serde_json::from_str(text).unwrap();
        assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 5));
    }
}
