// SPDX-License-Identifier: Apache-2.0
//! Which connections are to be swapped: the rules, read from a ConfigMap, and how a connection is held against them.
//!
//! Label rules are filters and come first: a container passes if its pod carries any of the `podLabel`s, and itself
//! any of the `containerLabel`s, asked for; a kind without a rule lets all through. Then the `cidr` rules: any that
//! has the server's address in `from` and the client's in `to` lets the connection be swapped; no cidr rule lets all
//! through. Both routers of a connection must say yes.
//!
//! They are read from a path, or by watch from the ConfigMap itself ([`crate::cluster`]): either way a [`Reading`] comes,
//! and [`InForce`] says what becomes of it. Pure but for [`RuleSet::load`] and [`watch_path`].

mod after;
mod in_force;
mod parse;
mod source;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

pub use after::After;
pub use in_force::{InForce, Origin, Outcome, Reading};
use ipnetwork::IpNetwork;
pub use source::watch_path;

/// One rule, as a key of the ConfigMap holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The key.
    pub key: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Server in `from`, client in `to`; no network means any address. `reverse`: also the other way round. `after`:
    /// when a connection is old enough.
    Cidr {
        from: Option<IpNetwork>,
        to: Option<IpNetwork>,
        reverse: bool,
        after: Option<After>,
    },
    PodLabel {
        name: String,
        value: String,
    },
    ContainerLabel {
        name: String,
        value: String,
    },
}

/// Why rules could not be read. The message is one line, for the operator.
#[derive(Debug, thiserror::Error)]
pub enum RuleError {
    #[error("{path}: cannot be read: {source}", path = path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path}: not a ConfigMap manifest: {reason}", path = path.display())]
    Manifest { path: PathBuf, reason: String },
    /// `place`: a file, or a key of a ConfigMap.
    #[error("{place}:{line}: rule {key}: {reason}")]
    Rule { place: String, line: usize, key: String, reason: String },
    #[error(
        "there is no ConfigMap {namespace}/{name}: make one (kubectl apply -n {namespace} -f rules/all-pods.yaml)"
    )]
    NoConfigMap { namespace: String, name: &'static str },
}

/// A connection to be held against the rules, as one end sees it.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    pub server: IpAddr,
    pub client: IpAddr,
    /// Of the container at this end.
    pub pod_labels: &'a BTreeMap<String, String>,
    pub container_labels: &'a BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Swap,
    /// Leave it where it is, because.
    Leave {
        why: String,
    },
}

/// All rules in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    rules: Vec<Rule>,
    /// None have been read yet: nothing may be swapped.
    awaited: bool,
}

impl RuleSet {
    pub fn awaited() -> RuleSet {
        RuleSet { rules: Vec::new(), awaited: true }
    }

    pub fn len(&self) -> usize {
        self.rules.len()
    }

    pub fn decide(&self, candidate: &Candidate<'_>) -> Verdict {
        if self.awaited {
            return Verdict::Leave { why: "no rules are known yet".into() };
        }
        let pod_labels = self.rules.iter().filter_map(|rule| match &rule.kind {
            Kind::PodLabel { name, value } => Some((name, value)),
            Kind::Cidr { .. } | Kind::ContainerLabel { .. } => None,
        });
        let container_labels = self.rules.iter().filter_map(|rule| match &rule.kind {
            Kind::ContainerLabel { name, value } => Some((name, value)),
            Kind::Cidr { .. } | Kind::PodLabel { .. } => None,
        });
        let filters = [
            ("pod", pod_labels.collect::<Vec<_>>(), candidate.pod_labels),
            ("container", container_labels.collect(), candidate.container_labels),
        ];
        for (what, wanted, labels) in filters {
            if !wanted.is_empty() && !wanted.iter().any(|(name, value)| labels.get(*name) == Some(*value)) {
                let wanted: Vec<String> =
                    wanted.iter().map(|(name, value)| format!("{name}={value}")).collect();
                return Verdict::Leave { why: format!("the {what} carries none of: {}", wanted.join(", ")) };
            }
        }
        self.decide_by_address(candidate)
    }

    /// When a connection between these addresses is old enough to be swapped: as the cidr rules that hold it say, by
    /// default where there is none.
    pub fn after(&self, server: IpAddr, client: IpAddr) -> After {
        let matching = self.rules.iter().filter(|rule| rule.kind.holds(server, client) == Some(true));
        matching.map(|rule| rule.kind.after()).reduce(After::or).unwrap_or(After::DEFAULT)
    }

    /// Before this no connection is old enough.
    pub fn least_after(&self) -> After {
        self.rules.iter().map(|rule| rule.kind.after()).fold(After::DEFAULT, After::or)
    }

    fn decide_by_address(&self, candidate: &Candidate<'_>) -> Verdict {
        let Candidate { server, client, .. } = candidate;
        let mut verdicts = self.rules.iter().filter_map(|rule| rule.kind.holds(*server, *client)).peekable();
        if verdicts.peek().is_none() || verdicts.any(|holds| holds) {
            return Verdict::Swap;
        }
        Verdict::Leave { why: format!("no cidr rule has server {server} and client {client}") }
    }
}

impl Kind {
    /// Does this cidr rule hold for a connection between these addresses? `None`: it is of another type.
    fn holds(&self, server: IpAddr, client: IpAddr) -> Option<bool> {
        let Kind::Cidr { from, to, reverse, .. } = self else { return None };
        let is_in =
            |network: &Option<IpNetwork>, address| network.is_none_or(|network| network.contains(address));
        let holds = |server, client| is_in(from, server) && is_in(to, client);
        Some(holds(server, client) || (*reverse && holds(client, server)))
    }

    fn after(&self) -> After {
        match self {
            Kind::Cidr { after: Some(after), .. } => *after,
            Kind::Cidr { after: None, .. } | Kind::PodLabel { .. } | Kind::ContainerLabel { .. } => {
                After::DEFAULT
            }
        }
    }
}

/// Loopback, link-local and unspecified addresses, and those of the host itself, are never swapped, whatever the
/// rules say.
pub fn is_never_swapped(address: IpAddr, host_addresses: &[IpAddr]) -> bool {
    let special = match address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_link_local() || v4.is_unspecified() || v4.is_multicast(),
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast()
        }
    };
    special || host_addresses.contains(&address)
}
