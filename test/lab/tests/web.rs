// SPDX-License-Identifier: Apache-2.0
//! The page in a browser, and the metrics before Prometheus' own judge: `test/run.sh --web`, which installs both.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Host, RouterOptions, Scene, wait_for};

const PORT: u16 = 7000;
const BOTH: &str = "127.0.0.1:9464";

/// A pod whose name is markup.
const LABELS: &str = "containers: [{ cgroup: podclient/client, pod: '<b id=evil>shop</b>', container: web }]";

fn scene(test: &str) -> Result<Scene> {
    let scene = Scene::without_routers(test)?;
    let labels = scene.lab.directory().join("labels.yaml");
    std::fs::write(&labels, LABELS)?;
    let options = RouterOptions::default()
        .with("ROUTER_METRICS", BOTH)
        .with("ROUTER_WEB", BOTH)
        .with("ROUTER_LABELS", &labels.to_string_lossy());
    scene.lab.start_everything(&options)?;
    Ok(scene)
}

/// Headless Chromium on the page of this host, told so.
fn browse(host: &Host, profile: &Path, arguments: &[&str]) -> Result<String> {
    let mut chromium = Command::new("chromium");
    chromium.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]);
    chromium.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
    chromium.arg(format!("--user-data-dir={}", profile.display())).arg("--virtual-time-budget=3000");
    chromium.args(arguments).arg(format!("http://{BOTH}/")).stderr(Stdio::null());
    host.place().run(&mut chromium)
}

#[test]
fn promtool_finds_nothing_wrong() -> Result<()> {
    let scene = scene("web-promtool")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let metrics = scene.lab.h1.get(BOTH, "/metrics")?.body;
    let file = scene.lab.directory().join("metrics");
    std::fs::write(&file, metrics)?;
    let mut judge = Command::new("promtool");
    let said = judge.args(["check", "metrics"]).stdin(std::fs::File::open(&file)?).output()?;
    ensure!(said.status.success() && said.stderr.is_empty(), "{said:?}");
    let alerts = concat!(env!("CARGO_MANIFEST_DIR"), "/../../deploy/monitoring/alerts.yaml");
    let said = Command::new("promtool").args(["check", "rules", alerts]).output()?;
    ensure!(said.status.success(), "{said:?}");
    stream.finish()?;
    Ok(())
}

#[test]
fn a_browser_shows_hosts_paths_and_flows_and_takes_no_name_for_markup() -> Result<()> {
    let scene = scene("web-page")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let host = &scene.lab.h1;
    let page = wait_for("the page to show the flow", DEADLINE, || {
        let page = browse(host, &scene.lab.directory().join("profile"), &["--dump-dom"])?;
        Ok(page.contains("&lt;b id=evil&gt;").then_some(page))
    })?;
    ensure!(!page.contains("<b id=\"evil\">"), "{page}");
    let map = page.split_once("id=\"map\"").context("a map")?.1;
    ensure!(map.contains("class=\"host\"") && map.contains("10.244.2.0"), "{map}");
    ensure!(page.contains(&format!(":{PORT}")) && page.contains("1 of 1"), "{page}");
    stream.finish()?;
    Ok(())
}
