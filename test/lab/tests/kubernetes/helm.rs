// SPDX-License-Identifier: Apache-2.0
//! The chart, as Helm itself installs it: Helm 4, by `test/helm.py`.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    ApiServer, Lab,
    manifest::{documents, find},
};
use serde_json::json;
use serde_yaml::Value;

use crate::{
    PORT, empty_server,
    installed::{Installed, deploy},
};

const RELEASE: &str = "ebpf-router";

/// What Helm printed, as an administrator of this cluster.
fn helm(server: &ApiServer, arguments: &[&str]) -> Result<String> {
    let home = std::env::var("HOME").context("HOME is not set")?;
    let mut command = Command::new(format!("{home}/.cache/ebpf-router/helm/bin/python"));
    command.arg(deploy("../test/helm.py")).args(arguments);
    let finished = server.run(&mut command, Duration::from_secs(300))?;
    Ok(finished.expect_success()?.stdout)
}

fn chart() -> String {
    deploy("helm/ebpf-router")
}

/// The manifests that Helm made of the chart with these values. Nothing is waited for: there are no nodes.
fn installed(server: &ApiServer, values: &serde_json::Value) -> Result<Vec<Value>> {
    let manifests = helm(server, &["install", RELEASE, &chart(), &values.to_string()])?;
    documents(&manifests)
}

fn named<'a>(all: &'a [Value], kind: &str) -> Result<&'a Value> {
    find(all, kind, RELEASE)
}

#[test]
fn helm_has_no_complaint_about_the_chart() -> Result<()> {
    let lab = Lab::new("helm-lint")?;
    helm(&empty_server(&lab)?, &["lint", &chart()]).map(drop)
}

#[test]
fn the_chart_with_its_own_values_is_the_manifest() -> Result<()> {
    let lab = Lab::new("helm-values")?;
    let chart = installed(&empty_server(&lab)?, &json!({}))?;
    let manifest = documents(&std::fs::read_to_string(deploy("simple-ds.yaml"))?)?;
    ensure!(!manifest.is_empty());
    for expected in manifest {
        let (kind, name) = (expected["kind"].as_str(), expected["metadata"]["name"].as_str());
        let found = find(&chart, kind.unwrap_or_default(), name.unwrap_or_default())?;
        ensure!(*found == expected, "the chart:\n{found:#?}\nsimple-ds.yaml:\n{expected:#?}");
    }
    Ok(())
}

#[test]
fn values_of_the_chart_arrive() -> Result<()> {
    let lab = Lab::new("helm-arrive")?;
    let chart = installed(
        &empty_server(&lab)?,
        &json!({
            "image": { "repository": "registry.example/er", "tag": "v7" },
            "runtimeDirectory": "", "settings": { "ROUTER_PORT": 4321 },
        }),
    )?;
    let pod = &named(&chart, "DaemonSet")?["spec"]["template"]["spec"];
    ensure!(pod["containers"][0]["image"] == "registry.example/er:v7", "{pod:?}");
    ensure!(!serde_yaml::to_string(pod)?.contains("containerd"), "{pod:?}");
    ensure!(named(&chart, "ConfigMap")?["data"]["ROUTER_PORT"] == "4321");
    Ok(())
}

#[test]
fn wrong_values_of_the_chart_are_refused_by_name() -> Result<()> {
    let lab = Lab::new("helm-wrong")?;
    let server = empty_server(&lab)?;
    for (key, wrong) in [
        ("updateStrategy", json!({ "updateStrategy": "Recreate" })),
        ("port", json!({ "metrics": { "port": 0 } })),
        ("imagee", json!({ "imagee": {} })),
        ("rules", json!({ "rules": { "all": "everything" } })),
    ] {
        let Err(error) = installed(&server, &wrong) else { bail!("{wrong} was accepted") };
        ensure!(format!("{error:#}").contains(key), "{wrong}: {error:#}");
    }
    Ok(())
}

#[test]
fn helm_installs_upgrades_and_uninstalls_and_a_connection_goes_through_it_all() -> Result<()> {
    let lab = Lab::new("helm-install")?;
    let installed = Installed::not_yet(&lab)?;
    let helm = |arguments: &[&str]| {
        let all = [&["--wait"], arguments].concat();
        helm(installed.cluster.server(), &all).with_context(|| installed.told())
    };
    helm(&["install", RELEASE, &chart(), "{}"])?;
    let stream = installed.stream(PORT)?;
    installed.wait_until_on("host", PORT)?;

    // The pods stay as they are, and the rules are read anew.
    let upgrade = |servers: &str| {
        let v4 = format!("type=cidr\nfrom={servers}\n");
        let values = json!({ "rules": { "v4": v4, "v6": null, "services": null } });
        helm(&["upgrade", RELEASE, &chart(), &values.to_string()])
    };
    upgrade("10.1.2.3/32")?;
    installed.wait_until_on("overlay", PORT)?;
    upgrade("10.244.0.0/16")?;
    installed.wait_until_on("host", PORT)?;

    helm(&["uninstall", RELEASE])?;
    // Helm is done when the DaemonSet is; its pods are about to end.
    installed
        .cluster
        .wait("delete", &["--namespace", "kube-system", "pods", "--selector", "app=ebpf-router"])?;
    installed.expect_nothing_left()?;
    stream.finish()
}
