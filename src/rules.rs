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
mod judged;
pub(crate) mod parse;
pub(crate) mod source;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

pub use after::After;
pub use in_force::{InForce, Origin, Outcome, Reading};
use ipnetwork::IpNetwork;
pub use judged::Judged;
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
    #[error(
        "{path}: cannot be read: {source}; expected a directory with one file a rule, or a ConfigMap's manifest: give it with \
         --rules (ROUTER_RULES)",
        path = path.display()
    )]
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

    pub fn are_awaited(&self) -> bool {
        self.awaited
    }

    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Of each kind of rule that there is, one must hold.
    pub fn decide(&self, candidate: &Candidate<'_>) -> Verdict {
        if self.awaited {
            return Verdict::Leave { why: "no rules are known yet".into() };
        }
        for kind in Kind::is_of_each_kind() {
            let mut rules = self.rules.iter().filter(|rule| kind(&rule.kind)).peekable();
            if rules.peek().is_some() && !rules.any(|rule| rule.kind.holds(candidate)) {
                return Verdict::Leave { why: self.why_none_holds(kind, candidate) };
            }
        }
        Verdict::Swap
    }

    /// When a connection between these addresses is old enough to be swapped: as the cidr rules that hold it say, by
    /// default where there is none.
    pub fn after(&self, server: IpAddr, client: IpAddr) -> After {
        let matching = self.rules.iter().filter(|rule| rule.kind.is_cidr_that_holds(server, client));
        matching.map(|rule| rule.kind.after()).reduce(After::or).unwrap_or(After::DEFAULT)
    }

    /// Before this no connection is old enough.
    pub fn least_after(&self) -> After {
        self.rules.iter().map(|rule| rule.kind.after()).fold(After::DEFAULT, After::or)
    }

    fn why_none_holds(&self, kind: fn(&Kind) -> bool, candidate: &Candidate<'_>) -> String {
        let (mut whose, mut wanted) = ("", Vec::new());
        for rule in self.rules.iter().filter(|rule| kind(&rule.kind)) {
            let (of, name, value) = match &rule.kind {
                Kind::PodLabel { name, value } => ("pod", name, value),
                Kind::ContainerLabel { name, value } => ("container", name, value),
                Kind::Cidr { .. } => {
                    let Candidate { server, client, .. } = candidate;
                    return format!("no cidr rule has server {server} and client {client}");
                }
            };
            whose = of;
            wanted.push(format!("{name}={value}"));
        }
        format!("the {whose} carries none of: {}", wanted.join(", "))
    }
}

impl Kind {
    /// Filters by labels come first.
    fn is_of_each_kind() -> [fn(&Kind) -> bool; 3] {
        [
            |kind| matches!(kind, Kind::PodLabel { .. }),
            |kind| matches!(kind, Kind::ContainerLabel { .. }),
            |kind| matches!(kind, Kind::Cidr { .. }),
        ]
    }

    fn holds(&self, candidate: &Candidate<'_>) -> bool {
        match self {
            Kind::PodLabel { name, value } => candidate.pod_labels.get(name) == Some(value),
            Kind::ContainerLabel { name, value } => candidate.container_labels.get(name) == Some(value),
            Kind::Cidr { .. } => self.is_cidr_that_holds(candidate.server, candidate.client),
        }
    }

    fn is_cidr_that_holds(&self, server: IpAddr, client: IpAddr) -> bool {
        let Kind::Cidr { reverse, .. } = self else { return false };
        self.holds_between(server, client, false) || (*reverse && self.holds_between(server, client, true))
    }

    /// Does this cidr rule hold, or its reverse?
    fn holds_between(&self, server: IpAddr, client: IpAddr, reversed: bool) -> bool {
        let Kind::Cidr { from, to, .. } = self else { return false };
        let is_in =
            |network: &Option<IpNetwork>, address| network.is_none_or(|network| network.contains(address));
        let (of_from, of_to) = if reversed { (client, server) } else { (server, client) };
        is_in(from, of_from) && is_in(to, of_to)
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
