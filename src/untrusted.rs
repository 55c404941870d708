// SPDX-License-Identifier: Apache-2.0
//! What this router reads of what others have written, by name: for the fuzz targets (`test/fuzz`). Messages of peers are
//! in [`crate::wire`].

use std::path::Path;

use crate::{peers::StaticPeers, rules, workload::LabelsFile};

/// The text of one rule.
pub fn is_rule(text: &str) -> bool {
    rules::parse::rule(text).is_ok()
}

/// A ConfigMap's manifest.
pub fn is_manifest(text: &str) -> bool {
    rules::source::manifest(Path::new("manifest"), text).is_ok()
}

/// ROUTER_LABELS
pub fn are_labels(text: &str) -> bool {
    serde_yaml::from_str::<LabelsFile>(text).is_ok()
}

/// ROUTER_PEERS
pub fn are_peers(text: &str) -> bool {
    serde_yaml::from_str::<StaticPeers>(text).is_ok()
}
