// SPDX-License-Identifier: Apache-2.0
//! Which rules are in force. Rules that are wrong are named, and change nothing. Those of a path count until the ConfigMap
//! itself has been read once. Pure.

use std::collections::BTreeMap;

use super::{RuleError, RuleSet};

/// Where rules were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    ConfigMap,
    Path,
}

/// Rules that were read, or why not.
#[derive(Debug)]
pub struct Reading {
    pub origin: Origin,
    pub rules: Result<RuleSet, RuleError>,
}

/// What becomes of a reading.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// These are in force now.
    Changed(RuleSet),
    /// What is wrong, for the first time.
    Wrong(String),
    Same,
}

/// What has come of the readings so far.
#[derive(Debug)]
pub struct InForce {
    rules: RuleSet,
    config_map_was_read: bool,
    wrong: BTreeMap<Origin, String>,
    errors: u64,
}

impl InForce {
    pub fn new(rules: RuleSet) -> InForce {
        InForce { rules, config_map_was_read: false, wrong: BTreeMap::new(), errors: 0 }
    }

    pub fn take(&mut self, reading: Reading) -> Outcome {
        if self.config_map_was_read && reading.origin == Origin::Path {
            return Outcome::Same;
        }
        match reading.rules {
            Ok(rules) => {
                self.wrong.remove(&reading.origin);
                if reading.origin == Origin::ConfigMap {
                    self.config_map_was_read = true;
                    self.wrong.clear();
                }
                if self.rules == rules {
                    return Outcome::Same;
                }
                self.rules = rules.clone();
                Outcome::Changed(rules)
            }
            Err(error) => {
                let error = error.to_string();
                if self.wrong.get(&reading.origin) == Some(&error) {
                    return Outcome::Same;
                }
                self.errors += 1;
                self.wrong.insert(reading.origin, error.clone());
                Outcome::Wrong(error)
            }
        }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// What is wrong with the rules that were read last; those before are in force.
    pub fn error(&self) -> Option<&str> {
        self.wrong.values().next().map(String::as_str)
    }

    /// How often rules were wrong.
    pub fn errors(&self) -> u64 {
        self.errors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(range: &str) -> Result<RuleSet, RuleError> {
        let text = format!("type=cidr\nfrom={range}\n");
        RuleSet::of_config_map("map", [("rule", text.as_str())].into_iter())
    }

    fn take(in_force: &mut InForce, origin: Origin, range: &str) -> Outcome {
        in_force.take(Reading { origin, rules: rules(range) })
    }

    #[test]
    fn wrong_rules_are_named_once_and_change_nothing() {
        let mut in_force = InForce::new(rules("10.0.0.0/8").unwrap());
        let Outcome::Wrong(error) = take(&mut in_force, Origin::Path, "10.0.0.0/99") else { panic!() };
        assert!(error.contains("10.0.0.0/99"));
        assert_eq!(take(&mut in_force, Origin::Path, "10.0.0.0/99"), Outcome::Same);
        assert_eq!((in_force.len(), in_force.errors(), in_force.error()), (1, 1, Some(error.as_str())));
        assert_eq!(take(&mut in_force, Origin::Path, "10.0.0.0/8"), Outcome::Same);
        assert_eq!((in_force.errors(), in_force.error()), (1, None));
    }

    #[test]
    fn rules_of_a_path_count_until_the_config_map_was_read() {
        let mut in_force = InForce::new(RuleSet::awaited());
        assert!(matches!(take(&mut in_force, Origin::Path, "10.0.0.0/8"), Outcome::Changed(_)));
        assert!(matches!(take(&mut in_force, Origin::ConfigMap, "10.0.0.0/99"), Outcome::Wrong(_)));
        assert!(matches!(take(&mut in_force, Origin::Path, "10.0.0.0/9"), Outcome::Changed(_)));
        assert!(in_force.error().is_some());
        assert!(matches!(take(&mut in_force, Origin::ConfigMap, "10.0.0.0/10"), Outcome::Changed(_)));
        assert_eq!(take(&mut in_force, Origin::Path, "10.0.0.0/9"), Outcome::Same);
    }

    #[test]
    fn a_config_map_that_goes_leaves_its_rules_in_force() {
        let mut in_force = InForce::new(RuleSet::awaited());
        take(&mut in_force, Origin::ConfigMap, "10.0.0.0/8");
        let gone = RuleError::NoConfigMap { namespace: "kube-system".into(), name: "ebpf-router-rules" };
        let outcome = in_force.take(Reading { origin: Origin::ConfigMap, rules: Err(gone) });
        assert!(matches!(outcome, Outcome::Wrong(_)));
        assert_eq!(in_force.len(), 1);
    }
}
