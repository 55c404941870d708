// SPDX-License-Identifier: Apache-2.0
use std::{path::Path, time::Duration};

use super::{Kind::*, *};

fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn rules(texts: &[&str]) -> RuleSet {
    let rule = |text: &&str| Rule { key: "r".into(), kind: parse::rule(text).unwrap() };
    RuleSet { rules: texts.iter().map(rule).collect(), awaited: false }
}

/// Does the connection from `client` to `server`, of a container with these pod labels, get swapped?
fn check(texts: &[&str], client: &str, server: &str, pod: &[(&str, &str)], expected: bool) {
    let (pod_labels, container_labels) = (labels(pod), labels(&[("tier", "db")]));
    let candidate = Candidate {
        server: server.parse().unwrap(),
        client: client.parse().unwrap(),
        pod_labels: &pod_labels,
        container_labels: &container_labels,
    };
    let verdict = rules(texts).decide(&candidate);
    assert_eq!(verdict == Verdict::Swap, expected, "{texts:?} {client} -> {server}: {verdict:?}");
}

fn check_wrong(text: &str, line: usize, reason: &str) {
    let wrong = parse::rule(text).unwrap_err();
    assert_eq!((wrong.line, wrong.reason.contains(reason)), (line, true), "{text:?}: {wrong:?}");
}

#[test]
fn without_rules_every_connection_may_be_swapped() {
    check(&[], "10.0.0.1", "10.0.0.2", &[], true);
}

#[test]
fn before_rules_are_known_nothing_is_swapped() {
    let none = BTreeMap::new();
    let (server, client) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
    let candidate = Candidate { server, client, pod_labels: &none, container_labels: &none };
    assert!(matches!(RuleSet::awaited().decide(&candidate), Verdict::Leave { .. }));
}

#[test]
fn from_is_the_server_and_to_is_the_client() {
    let rule = &["type=cidr\nfrom=10.1.0.0/16\nto=10.2.0.0/16"];
    check(rule, "10.2.0.1", "10.1.0.1", &[], true);
    check(rule, "10.1.0.1", "10.2.0.1", &[], false);
}

#[test]
fn a_reverse_rule_holds_in_both_directions() {
    let rule = &["type=cidr\nfrom=10.1.0.0/16\nto=10.2.0.0/16\nreverse=True"];
    check(rule, "10.2.0.1", "10.1.0.1", &[], true);
    check(rule, "10.1.0.1", "10.2.0.1", &[], true);
    check(rule, "10.1.0.1", "10.3.0.1", &[], false);
}

#[test]
fn a_range_that_is_left_out_is_every_address() {
    check(&["type=cidr\nfrom=10.1.0.0/16"], "192.0.2.1", "10.1.0.1", &[], true);
    check(&["type=cidr"], "fd00::1", "fd00::2", &[], true);
}

#[test]
fn ranges_of_one_family_hold_no_address_of_the_other() {
    check(&["type=cidr\nfrom=0.0.0.0/0"], "fd00::1", "fd00::2", &[], false);
    check(&["type=cidr\nfrom=fd00::/8\nto=fd00::/8"], "fd00::1", "fd00::2", &[], true);
}

const MS: Duration = Duration::from_millis(1);

/// When is the connection from 10.0.0.1 to 10.0.0.2 old enough?
fn check_after(texts: &[&str], time: Option<Duration>, bytes: Option<u64>) {
    let after = rules(texts).after("10.0.0.2".parse().unwrap(), "10.0.0.1".parse().unwrap());
    assert_eq!(after, After { time, bytes }, "{texts:?}");
}

#[test]
fn a_rule_says_when_a_connection_is_old_enough() {
    check_after(&["type=cidr\nafter=0"], Some(Duration::ZERO), None);
    check_after(&["type=cidr\nafter=20ms"], Some(20 * MS), None);
    check_after(&["type=cidr\nafter='5s'"], Some(5000 * MS), None);
    check_after(&["type=cidr\nafter=64KiB"], None, Some(65536));
}

#[test]
fn of_the_rules_that_hold_a_connection_the_first_that_is_reached_counts() {
    let slow = "type=cidr\nfrom=10.0.0.2/32\nafter=9s";
    check_after(&[slow, "type=cidr\nafter=1s"], Some(1000 * MS), None);
    check_after(&[slow, "type=cidr\nafter=1MiB"], Some(9000 * MS), Some(1 << 20));
    check_after(&[slow, "type=cidr\nfrom=10.9.0.0/16\nafter=0"], Some(9000 * MS), None);
}

#[test]
fn by_default_a_connection_is_old_enough_where_no_rule_says_when() {
    let After { time, bytes } = After::DEFAULT;
    check_after(&[], time, bytes);
    check_after(&["type=cidr"], time, bytes);
    check_after(&["type=podLabel\nname=a\nvalue=b"], time, bytes);
    check_after(&["type=cidr\nfrom=10.9.0.0/16\nafter=0"], time, bytes);
}

#[test]
fn before_the_least_of_all_rules_nobody_needs_to_look() {
    let least = |texts: &[&str]| rules(texts).least_after();
    assert_eq!(least(&["type=cidr\nafter=9s"]), After::DEFAULT);
    let both = ["type=cidr\nafter=5ms", "type=cidr\nafter=1KiB"];
    assert_eq!(least(&both), After { time: Some(5 * MS), bytes: Some(1024) });
}

#[test]
fn time_or_bytes_suffice() {
    let after = After { time: Some(20 * MS), bytes: Some(100) };
    assert!(after.is_reached(20 * MS, 0) && after.is_reached(MS, 100) && !after.is_reached(19 * MS, 99));
    assert!(!After { time: None, ..after }.is_reached(Duration::MAX, 99));
}

#[test]
fn any_cidr_rule_suffices() {
    let two = &["type=cidr\nfrom=10.1.0.0/16", "type=cidr\nfrom=10.2.0.0/16"];
    check(two, "10.9.0.1", "10.2.0.1", &[], true);
}

#[test]
fn label_rules_filter_before_addresses_are_looked_at() {
    let rule = &["type=podLabel\nname=app\nvalue=shop", "type=cidr\nfrom=10.0.0.0/8"];
    check(rule, "10.0.0.1", "10.0.0.2", &[("app", "shop")], true);
    check(rule, "10.0.0.1", "10.0.0.2", &[("app", "mail")], false);
    check(rule, "10.0.0.1", "192.0.2.1", &[("app", "shop")], false);
}

#[test]
fn of_one_kind_any_label_suffices_and_both_kinds_must_be_met() {
    let pods = ["type=podLabel\nname=app\nvalue=shop", "type=podLabel\nname=app\nvalue=mail"];
    check(&pods, "10.0.0.1", "10.0.0.2", &[("app", "mail")], true);
    let both = [pods[0], "type=containerLabel\nname=tier\nvalue=web"];
    check(&both, "10.0.0.1", "10.0.0.2", &[("app", "shop")], false);
    let both = [pods[0], "type=containerLabel\nname=tier\nvalue=db"];
    check(&both, "10.0.0.1", "10.0.0.2", &[("app", "shop")], true);
}

#[test]
fn values_may_be_quoted() {
    let expected = Cidr { from: Some("10.0.0.0/8".parse().unwrap()), to: None, reverse: false, after: None };
    for text in [
        "type=cidr\nfrom=10.0.0.0/8",
        "type=\"cidr\"\nfrom=\"10.0.0.0/8\"",
        "type='cidr'\n\n# c\nfrom = '10.0.0.0/8'",
    ] {
        assert_eq!(parse::rule(text), Ok(expected.clone()), "{text:?}");
    }
}

#[test]
fn what_is_wrong_with_a_rule_is_named_with_its_line() {
    check_wrong("from=10.0.0.0/8", 0, "has no `type`");
    check_wrong("type=nodeLabel", 1, "type `nodeLabel` is not known");
    check_wrong("type=cidr\nfrom=10.0.0/8", 2, "from=10.0.0/8");
    check_wrong("type=cidr\nreverse=maybe", 2, "expected true or false");
    check_wrong("type=cidr\nvalue=app", 2, "does not belong to type=cidr");
    check_wrong("type=cidr\nfrmo=10.0.0.0/8", 2, "`frmo` is no key");
    check_wrong("type=cidr\ntype=cidr", 2, "given twice");
    check_wrong("type=cidr\nafter=20", 2, "after=20: expected 0, a time such as 20ms");
    check_wrong("type=cidr\nafter=64kb", 2, "or a size such as 64KiB");
    check_wrong("type=cidr\nafter=-1ms", 2, "after=-1ms");
    check_wrong("type=podLabel\nname=app\nvalue=x\nafter=0", 4, "`after` does not belong to type=podLabel");
    check_wrong("type=podLabel\nname=app", 0, "has no `value`");
    check_wrong("type=podLabel\nname=\nvalue=x", 2, "`name` is empty");
    check_wrong("hello", 1, "expected a line like key=value");
}

#[test]
fn a_bad_rule_of_a_manifest_is_named_with_file_and_line() {
    let text = "kind: ConfigMap\ndata:\n  good: |\n    type=cidr\n  bad: |\n    type=cidr\n    to=nowhere\n";
    let error = source::manifest(Path::new("rules.yaml"), text).unwrap_err().to_string();
    assert!(error.starts_with("rules.yaml:7: rule bad: to=nowhere"), "{error}");
}

#[test]
fn a_mounted_config_map_is_read_one_file_a_rule() {
    let mount = tempfile::tempdir().unwrap();
    let version = mount.path().join("..2026_11_21");
    std::fs::create_dir(&version).unwrap();
    std::fs::write(version.join("r0"), "type=podLabel\nname=app\nvalue=iperf3\n").unwrap();
    std::os::unix::fs::symlink("..2026_11_21", mount.path().join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/r0", mount.path().join("r0")).unwrap();
    let loaded = RuleSet::load(mount.path()).unwrap();
    assert_eq!(
        loaded.rules,
        [Rule { key: "r0".into(), kind: PodLabel { name: "app".into(), value: "iperf3".into() } }]
    );
}

#[test]
fn the_rules_that_come_with_the_project_can_be_loaded() {
    for entry in std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/rules")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            RuleSet::load(&path).unwrap();
        }
    }
}

#[test]
fn loopback_and_host_addresses_are_never_swapped() {
    let host = ["192.0.2.7".parse().unwrap()];
    let check =
        |address: &str, expected| assert_eq!(is_never_swapped(address.parse().unwrap(), &host), expected);
    check("127.0.0.1", true);
    check("::1", true);
    check("fe80::1", true);
    check("192.0.2.7", true);
    check("10.244.1.10", false);
}

/// Each rule's word on a connection from 10.0.0.1 to 10.0.0.2, of a pod with app=shop.
fn check_judged(texts: &[&str], expected: &[(bool, &str)]) {
    let (pod_labels, container_labels) = (labels(&[("app", "shop")]), labels(&[]));
    let (server, client) = ("10.0.0.2".parse().unwrap(), "10.0.0.1".parse().unwrap());
    let candidate =
        Candidate { server, client, pod_labels: &pod_labels, container_labels: &container_labels };
    let rules = rules(texts);
    let judged = rules.judge(&candidate);
    let words: Vec<_> = judged.iter().map(|judged| (judged.holds, judged.why.as_str())).collect();
    assert_eq!(words, expected);
    let of_kind = |kind: fn(&Kind) -> bool| {
        let mut words = rules.rules.iter().zip(&judged).filter(|(rule, _)| kind(&rule.kind)).peekable();
        words.peek().is_none() || words.any(|(_, judged)| judged.holds)
    };
    assert_eq!(rules.decide(&candidate) == Verdict::Swap, Kind::is_of_each_kind().into_iter().all(of_kind));
}

#[test]
fn each_rule_says_whether_it_holds_and_why() {
    check_judged(
        &["type=podLabel\nname=app\nvalue=web", "type=podLabel\nname=app\nvalue=shop"],
        &[(false, "the pod has app=shop, app=web expected"), (true, "the pod has app=shop")],
    );
    check_judged(
        &["type=containerLabel\nname=tier\nvalue=db"],
        &[(false, "the container has no label tier, tier=db expected")],
    );
    check_judged(
        &["type=cidr\nfrom=10.0.0.0/24", "type=cidr\nfrom=10.9.0.0/16\nto=10.0.0.0/24"],
        &[
            (true, "server 10.0.0.2 is in 10.0.0.0/24, client 10.0.0.1 is anywhere"),
            (false, "server 10.0.0.2 is not in 10.9.0.0/16, client 10.0.0.1 is in 10.0.0.0/24"),
        ],
    );
}

#[test]
fn a_reverse_rule_that_holds_only_the_other_way_round_says_so() {
    check_judged(
        &["type=cidr\nfrom=10.0.0.1/32\nreverse=true"],
        &[(
            true,
            "server 10.0.0.2 is not in 10.0.0.1/32, client 10.0.0.1 is anywhere; \
             reverse: client 10.0.0.1 is in 10.0.0.1/32, server 10.0.0.2 is anywhere",
        )],
    );
}
