// SPDX-License-Identifier: Apache-2.0
//! Each rule's word on a connection, for people. Pure. The decision is made of the same words, so they cannot differ.

use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use super::{Candidate, Kind, RuleSet};

/// What a rule says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Judged {
    /// The rule's key.
    pub rule: String,
    pub holds: bool,
    /// The facts that it was held against.
    pub why: String,
}

impl RuleSet {
    /// What each rule says, in the order of the set.
    pub fn judge(&self, candidate: &Candidate<'_>) -> Vec<Judged> {
        let judged = |rule: &super::Rule| Judged {
            rule: rule.key.clone(),
            holds: rule.kind.holds(candidate),
            why: rule.kind.why(candidate),
        };
        self.rules.iter().map(judged).collect()
    }
}

impl Kind {
    fn why(&self, candidate: &Candidate<'_>) -> String {
        let Candidate { server, client, pod_labels, container_labels } = *candidate;
        match self {
            Kind::PodLabel { name, value } => label("pod", name, value, pod_labels),
            Kind::ContainerLabel { name, value } => label("container", name, value, container_labels),
            Kind::Cidr { from, to, reverse, .. } => {
                let both = [place("server", server, from), place("client", client, to)].join(", ");
                if !reverse || self.holds_between(server, client, false) {
                    return both;
                }
                let reversed = [place("client", client, from), place("server", server, to)].join(", ");
                format!("{both}; reverse: {reversed}")
            }
        }
    }
}

fn label(what: &str, name: &str, value: &str, labels: &BTreeMap<String, String>) -> String {
    match labels.get(name) {
        None => format!("the {what} has no label {name}, {name}={value} expected"),
        Some(found) if found == value => format!("the {what} has {name}={value}"),
        Some(found) => format!("the {what} has {name}={found}, {name}={value} expected"),
    }
}

fn place(what: &str, address: IpAddr, network: &Option<IpNetwork>) -> String {
    match network {
        None => format!("{what} {address} is anywhere"),
        Some(network) if network.contains(address) => format!("{what} {address} is in {network}"),
        Some(network) => format!("{what} {address} is not in {network}"),
    }
}
