// SPDX-License-Identifier: Apache-2.0
//! Kubernetes manifests: YAML documents, and the one that is meant.

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_yaml::Value;

/// The documents of a YAML text, the empty ones left out.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let all = serde_yaml::Deserializer::from_str(text).map(Value::deserialize);
    Ok(all.collect::<Result<Vec<_>, _>>()?.into_iter().filter(|document| !document.is_null()).collect())
}

/// The object of this kind and name.
pub fn find<'a>(all: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let found = all.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.with_context(|| format!("no {kind} {name}"))
}
