// SPDX-License-Identifier: Apache-2.0
//! The Kustomize overlays and the Helm chart against `deploy/simple-ds.yaml`, which is what they are made of or must equal.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_yaml::Value;

use crate::{DEPLOY, documents, manifest, output};

const NAMESPACE: &str = "kube-system";

/// The chart with these values beside its own, by `test/deploy/render`.
fn rendered(values: Option<&str>) -> Result<Vec<Value>> {
    let mut command = Command::new("go");
    command.args(["run", "main.go", "../../../deploy/helm/ebpf-router", NAMESPACE]);
    let file = std::env::temp_dir().join(format!("ebpf-router-values-{}.yaml", std::process::id()));
    if let Some(values) = values {
        std::fs::write(&file, values)?;
        command.arg(&file);
    }
    command.current_dir("../deploy/render").env("GO111MODULE", "off").env("GOPATH", "/usr/share/gocode");
    let text = output(&mut command);
    if values.is_some() {
        std::fs::remove_file(&file)?;
    }
    documents(&text?)
}

fn find<'a>(all: &'a [Value], kind: &str, name: &str) -> Result<&'a Value> {
    let found = all.iter().find(|one| one["kind"] == kind && one["metadata"]["name"] == name);
    found.with_context(|| format!("no {kind} {name}"))
}

/// Does `values.schema.json` take these values, merged over the chart's own?
fn accepted(values: &str) -> Result<bool> {
    const CHECK: &str = r#"
import json, sys, yaml, jsonschema
chart = sys.argv[1]
values = yaml.safe_load(open(chart + "/values.yaml"))
for key, value in (yaml.safe_load(sys.argv[2]) or {}).items():
    if isinstance(value, dict) and isinstance(values.get(key), dict):
        values[key].update(value)
    else:
        values[key] = value
schema = json.load(open(chart + "/values.schema.json"))
jsonschema.Draft7Validator.check_schema(schema)
print(jsonschema.Draft7Validator(schema).is_valid(values))
"#;
    let chart = format!("{DEPLOY}/helm/ebpf-router");
    Ok(output(Command::new("python3").args(["-c", CHECK, &chart, values]))?.trim() == "True")
}

#[test]
fn the_chart_with_its_own_values_is_the_manifest() -> Result<()> {
    let chart = rendered(None)?;
    for expected in manifest()? {
        let (kind, name) = (expected["kind"].as_str(), expected["metadata"]["name"].as_str());
        let found = find(&chart, kind.unwrap_or_default(), name.unwrap_or_default())?;
        ensure!(*found == expected, "the chart:\n{found:#?}\nsimple-ds.yaml:\n{expected:#?}");
    }
    Ok(())
}

#[test]
fn values_of_the_chart_arrive() -> Result<()> {
    let values = "image: { repository: registry.example/er, tag: v7 }\nruntimeDirectory: ''\nsettings: { ROUTER_PORT: 4321 }\n";
    let chart = rendered(Some(values))?;
    let pod = &find(&chart, "DaemonSet", "ebpf-router")?["spec"]["template"]["spec"];
    ensure!(pod["containers"][0]["image"] == "registry.example/er:v7", "{pod:?}");
    ensure!(!serde_yaml::to_string(pod)?.contains("containerd"), "{pod:?}");
    ensure!(find(&chart, "ConfigMap", "ebpf-router")?["data"]["ROUTER_PORT"] == "4321");
    Ok(())
}

#[test]
fn wrong_values_of_the_chart_are_refused() -> Result<()> {
    ensure!(accepted("{}")?);
    for wrong in
        ["updateStrategy: Recreate", "metrics: { port: 0 }", "imagee: {}", "rules: { all: everything }"]
    {
        ensure!(!accepted(wrong)?, "{wrong} was accepted");
    }
    Ok(())
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
