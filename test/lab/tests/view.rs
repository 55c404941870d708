// SPDX-License-Identifier: Apache-2.0
//! What people and programs see of the router: metrics, explanations, logs, the page, the terminal.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Host, RouterOptions, Scene, program, wait_for};
use nix::sys::signal::Signal;
use serde_json::Value;

const PORT: u16 = 7000;
const METRICS: &str = "127.0.0.1:9464";
const WEB: &str = "127.0.0.1:9465";

fn scene(test: &str, options: &RouterOptions) -> Result<Scene> {
    let scene = Scene::without_routers(test)?;
    scene.lab.start_everything(options)?;
    Ok(scene)
}

/// The value of this series.
fn metric(host: &Host, series: &str) -> Result<f64> {
    let answer = host.get(METRICS, "/metrics")?;
    ensure!(answer.status == 200, "{answer:?}");
    let value = answer.body.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
    value.with_context(|| format!("{series} expected in\n{}", answer.body))
}

#[test]
fn metrics_count_a_swap_its_pause_and_its_bytes() -> Result<()> {
    let scene = scene("view-metrics", &RouterOptions::default().with("ROUTER_METRICS", METRICS))?;
    let host = &scene.lab.h1;
    let swaps = "ebpf_router_swaps_total";
    ensure!(metric(host, swaps)? == 0.0);
    ensure!(metric(host, "ebpf_router_forwarder_up")? == 1.0);
    let stream = scene.swapped_stream(PORT, "--pings")?;
    ensure!(metric(host, swaps)? == 1.0);
    let pauses = "ebpf_router_pause_seconds_count{direction=\"to_host\",result=\"moved\"}";
    ensure!(metric(host, pauses)? == 1.0);
    ensure!(metric(host, "ebpf_router_connections{path=\"host\"}")? == 1.0);
    ensure!(metric(host, "ebpf_router_peer_up{peer=\"10.244.2.0\"}")? == 1.0, "the peer is reached");
    wait_for("bytes on the host path", DEADLINE, || {
        // Who looks at flows has a scan made.
        host.flows()?;
        let sent = metric(host, "ebpf_router_carried_bytes_total{path=\"host\",direction=\"sent\"}")?;
        Ok((sent > 0.0).then_some(()))
    })?;
    stream.finish()?;
    Ok(())
}

#[test]
fn whoever_asks_for_open_metrics_gets_them() -> Result<()> {
    let scene = scene("view-open", &RouterOptions::default().with("ROUTER_METRICS", METRICS))?;
    let head =
        format!("GET /metrics HTTP/1.1\r\nHost: {METRICS}\r\nAccept: application/openmetrics-text\r\n");
    let answer = scene.lab.h1.request(METRICS, &head)?;
    ensure!(answer.head.contains("application/openmetrics-text"), "{answer:?}");
    ensure!(answer.body.ends_with("# EOF\n"), "{answer:?}");
    Ok(())
}

#[test]
fn wrong_rules_are_a_metric() -> Result<()> {
    let scene = scene("view-rules", &RouterOptions::default().with("ROUTER_METRICS", METRICS))?;
    let host = &scene.lab.h1;
    ensure!(metric(host, "ebpf_router_rules_wrong")? == 0.0);
    host.replace_rule("pods", "type=cidr\nfrom=nowhere\n")?;
    wait_for("the wrong rule to be noticed", DEADLINE, || {
        Ok((metric(host, "ebpf_router_rules_wrong")? == 1.0).then_some(()))
    })?;
    ensure!(metric(host, "ebpf_router_rule_errors_total")? == 1.0);
    Ok(())
}

/// `router explain`, as JSON: what it says in short, and of each step its name and reason.
fn explained(host: &Host, what: &str) -> Result<(String, Vec<(String, String)>)> {
    let text = host.ask(&["explain", what, "--json"])?;
    let value: Value = serde_json::from_str(&text)?;
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let steps = value[0]["steps"].as_array().with_context(|| text.clone())?;
    let steps = steps.iter().map(|step| (word(&step["step"]), word(&step["because"]))).collect();
    Ok((word(&value[0]["conclusion"]), steps))
}

#[test]
fn explain_names_the_rule_that_does_not_hold() -> Result<()> {
    let scene = Scene::without_routers("view-rule")?;
    let rules = scene.lab.h1.write_rules("shop", "type=podLabel\nname=app\nvalue=shop\n")?;
    scene.lab.start_everything(&RouterOptions::with_rules(&rules))?;
    let stream = scene.stream(PORT, "--pings")?;
    let host = &scene.lab.h1;
    ensure!(host.wait_until_refused(PORT)? == "no_rule_matches");
    let flow = host.wait_until_on_overlay(PORT)?;
    let by_addresses = format!("{}-{}", flow.local, flow.remote);
    for what in [flow.conn.context("a name")?, by_addresses, stream.client.pid().to_string()] {
        let (conclusion, steps) = explained(host, &what)?;
        ensure!(conclusion.contains("no rule asks for this connection"), "{what}: {conclusion}");
        let rule = ("rule shop", "does not hold: the pod has no label app, app=shop expected");
        let is_said = steps.iter().any(|(step, because)| (step.as_str(), because.as_str()) == rule);
        ensure!(is_said, "{what}: {steps:#?}");
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn explain_says_who_holds_a_connection_back_and_how_its_swap_went() -> Result<()> {
    let scene = Scene::with_routers("view-held")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let host = &scene.lab.h1;
    let conn = host.wait_until_on_host(PORT)?.conn.context("a name")?;
    let (conclusion, steps) = explained(host, &conn)?;
    ensure!(conclusion.starts_with("swapped"), "{conclusion}");
    let path = steps.iter().find(|(step, _)| step == "path").context("a step `path`")?;
    ensure!(path.1.contains("the swap's pause"), "{path:?}");
    host.move_to(PORT, "overlay")?;
    let (conclusion, _) = explained(host, &conn)?;
    ensure!(conclusion.contains("sent back to the overlay by command"), "{conclusion}");
    stream.finish()?;
    Ok(())
}

#[test]
fn explain_tells_what_is_known_of_a_process_without_connections() -> Result<()> {
    let scene = Scene::with_routers("view-process")?;
    let sleeper = scene.client.spawn("sleeper", Command::new("sleep").arg("100"))?;
    let (conclusion, steps) = explained(&scene.lab.h1, &sleeper.pid().to_string())?;
    ensure!(conclusion == "it has no TCP socket", "{conclusion}");
    ensure!(
        steps.iter().any(|(step, because)| step == "cgroup" && because.contains("podclient")),
        "{steps:#?}"
    );
    let (conclusion, _) = explained(&scene.lab.h1, "1")?;
    ensure!(conclusion == "the router does not look at it", "{conclusion}");
    sleeper.kill()
}

#[test]
fn explain_of_what_is_not_there_is_one_line() -> Result<()> {
    let scene = Scene::with_routers("view-nothing")?;
    for (what, words) in [
        ("0123456789abcdef", "the router knows no such connection"),
        ("10.244.1.99:1-10.244.2.99:2", "no container of this host has such a connection"),
        ("web", "expected a connection as `router flows` names it"),
    ] {
        let Err(error) = scene.lab.h1.ask(&["explain", what]) else { anyhow::bail!("{what} was explained") };
        ensure!(format!("{error:#}").contains(words), "{error:#}");
    }
    Ok(())
}

#[test]
fn a_json_log_is_json_line_by_line_and_has_one_line_for_a_decision() -> Result<()> {
    let scene = scene("view-log", &RouterOptions::default().with("ROUTER_LOG_FORMAT", "json"))?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let host = &scene.lab.h1;
    host.move_to(PORT, "overlay")?;
    stream.finish()?;
    let end = host.stop_router()?;
    let lines: Vec<Value> = end
        .stderr
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect::<Result<_>>()?;
    for decision in ["swapped", "swapped back"] {
        let of_decision: Vec<_> = lines.iter().filter(|line| line["decision"] == decision).collect();
        let [line] = of_decision[..] else {
            anyhow::bail!("one line with {decision} expected: {}", end.stderr)
        };
        ensure!(line["workload"] == "podclient/client" && line["level"] == "INFO", "{line}");
        ensure!(line["pause_us"].is_u64() && line["conn"].is_string() && line["time"].is_string(), "{line}");
    }
    Ok(())
}

#[test]
fn a_router_whose_log_nobody_reads_goes_on() -> Result<()> {
    let scene = Scene::without_routers("view-blocked")?;
    for host in scene.lab.hosts() {
        host.block_logs();
    }
    scene.lab.start_everything(&RouterOptions::default().with("ROUTER_LOGLEVEL", "DEBUG"))?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    scene.lab.h1.move_to(PORT, "overlay")?;
    stream.finish()?;
    scene.lab.stop_everything()
}

#[test]
fn the_page_shows_flows_and_only_shows() -> Result<()> {
    let scene = scene("view-page", &RouterOptions::default().with("ROUTER_WEB", WEB))?;
    let host = &scene.lab.h1;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    for path in ["/", "/page.js", "/page.css"] {
        let answer = host.get(WEB, path)?;
        ensure!(answer.status == 200 && answer.head.contains("default-src 'none'"), "{path}: {answer:?}");
    }
    let flows: Value = serde_json::from_str(&host.get(WEB, "/flows.json")?.body)?;
    ensure!(flows["sum"]["on_host"] == 1 && flows["groups"][0]["workload"] == "podclient/client", "{flows}");
    for (head, status) in [
        (format!("POST / HTTP/1.1\r\nHost: {WEB}\r\nContent-Length: 0\r\n"), 405),
        (format!("DELETE /flows.json HTTP/1.1\r\nHost: {WEB}\r\n"), 405),
        ("GET /flows.json HTTP/1.1\r\nHost: evil.example\r\n".to_owned(), 403),
        (format!("GET /metrics HTTP/1.1\r\nHost: {WEB}\r\n"), 404),
        (format!("GET /../settings HTTP/1.1\r\nHost: {WEB}\r\n"), 404),
    ] {
        let answer = host.request(WEB, &head)?;
        ensure!(answer.status == status, "{head}: {answer:?}");
    }
    stream.finish()?;
    Ok(())
}

#[test]
fn without_an_address_nothing_is_served() -> Result<()> {
    let scene = Scene::with_routers("view-off")?;
    for address in [METRICS, WEB] {
        ensure!(scene.lab.h1.get(address, "/").is_err(), "{address} answers");
    }
    Ok(())
}

#[test]
fn an_address_in_use_is_named() -> Result<()> {
    let scene = scene("view-used", &RouterOptions::default().with("ROUTER_WEB", WEB))?;
    let directory = scene.lab.directory().join("second.sock");
    let second = RouterOptions::default()
        .with("ROUTER_WEB", WEB)
        .with("ROUTER_PORT", "1235")
        .with("ROUTER_CONTROL", &directory.to_string_lossy());
    let end = scene.lab.h1.spawn_router(&second)?.wait(DEADLINE)?;
    ensure!(end.status.code() == Some(1), "{end:?}");
    ensure!(end.stderr.contains("ROUTER_WEB=127.0.0.1:9465: cannot be listened on"), "{}", end.stderr);
    Ok(())
}

/// The terminal view on h1, on a terminal of its own.
fn watch(host: &Host) -> Result<lab::Process> {
    let mut command = Command::new("script");
    let router = program("router")?;
    command.args([
        "-qec",
        &format!("stty cols 120 rows 30; {} flows --watch", router.display()),
        "/dev/null",
    ]);
    command.envs(host.environment()).env("TERM", "xterm-256color");
    host.place().spawn("watch", &mut command)
}

const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

#[test]
fn the_terminal_view_shows_workloads_and_gives_the_terminal_back() -> Result<()> {
    let scene = Scene::with_routers("view-watch")?;
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let mut view = watch(&scene.lab.h1)?;
    view.wait_until_it_says("podclient/client", DEADLINE)?;
    ensure!(view.stdout().contains(TAKEN), "{:?}", view.stdout());
    view.tell("q")?;
    let end = view.wait(DEADLINE)?.expect_success()?;
    ensure!(end.stdout.contains(GIVEN_BACK), "{:?}", end.stdout);
    stream.finish()?;
    Ok(())
}

#[test]
fn the_terminal_view_gives_the_terminal_back_when_it_is_ended_by_a_signal() -> Result<()> {
    let scene = Scene::with_routers("view-signal")?;
    let mut view = watch(&scene.lab.h1)?;
    view.wait_until_it_says("WORKLOAD", DEADLINE)?;
    let pid = viewer_of(view.pid())?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM)?;
    let end = view.wait(DEADLINE)?.expect_success()?;
    ensure!(end.stdout.contains(GIVEN_BACK), "{:?}", end.stdout);
    Ok(())
}

/// The process that has the terminal: `script`, its shell, and what that runs.
fn viewer_of(mut pid: u32) -> Result<i32> {
    loop {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        match children.split_whitespace().next() {
            Some(child) => pid = child.parse()?,
            None => return Ok(pid as i32),
        }
    }
}
