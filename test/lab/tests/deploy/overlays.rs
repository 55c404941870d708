// SPDX-License-Identifier: Apache-2.0
//! The Kustomize overlays against `deploy/simple-ds.yaml`, which they are made of. The Helm chart needs a server: see
//! test/lab/tests/kubernetes.

use std::process::Command;

use anyhow::{Result, ensure};
use lab::manifest::{documents, find};

use crate::{DEPLOY, manifest, output};

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
