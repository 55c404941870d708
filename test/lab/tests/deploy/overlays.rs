// SPDX-License-Identifier: Apache-2.0
//! The Kustomize overlays against `deploy/simple-ds.yaml`, which they are made of. The Helm chart needs a server: see
//! test/lab/tests/kubernetes.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_yaml::Value;

use crate::{DEPLOY, documents, manifest, output};

fn find<'a>(all: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let found = all.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.with_context(|| format!("no {kind} {name}"))
}

#[test]
fn overlays_change_settings_and_rules_alone() -> Result<()> {
    for (overlay, interface) in [("calico", "vxlan.calico"), ("flannel", "flannel.1")] {
        let directory = format!("{DEPLOY}/overlays/{overlay}");
        let all = documents(&output(Command::new("kubectl").args(["kustomize", &directory]))?)?;
        ensure!(find(&all, "ConfigMap", "ebpf-router")?["data"]["OVERLAY_IF"] == interface);
        for expected in manifest()? {
            ensure!(all.contains(&expected), "{overlay}: {expected:#?}");
        }
    }
    Ok(())
}
