// SPDX-License-Identifier: Apache-2.0
//! A setting that cannot work ends the router with exit code 1 and one clear line.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Finished, Host, Lab, RouterOptions, program, wait_for};

/// Starts a router on h1 that must not stay, and looks for `words` in its one line.
fn check(test: &str, options: impl FnOnce(&Lab) -> Result<RouterOptions>, words: &[&str]) -> Result<()> {
    let lab = Lab::new(test)?;
    lab.h1.start_forwarder()?;
    let router = lab.h1.spawn_router(&options(&lab)?)?;
    check_one_error(&router.wait(Duration::from_secs(15))?, words)
}

fn check_one_error(end: &Finished, words: &[&str]) -> Result<()> {
    ensure!(end.status.code() == Some(1), "{end:?}");
    let errors: Vec<_> = end.stderr.lines().filter(|line| line.to_lowercase().contains("error")).collect();
    ensure!(errors.len() == 1, "one line with an error expected: {}", end.stderr);
    for word in words {
        ensure!(errors[0].contains(word), "\"{word}\" expected in: {}", errors[0]);
    }
    Ok(())
}

#[test]
fn an_overlay_interface_that_does_not_exist_is_named() -> Result<()> {
    check("no-overlay-if", |_| Ok(RouterOptions::default().with("OVERLAY_IF", "vxlan77")), &["vxlan77"])
}

#[test]
fn a_host_interface_that_does_not_exist_is_named() -> Result<()> {
    check("no-host-if", |_| Ok(RouterOptions::default().with("HOST_IF", "eth77")), &["eth77"])
}

#[test]
fn a_bad_rule_is_named_with_file_and_line() -> Result<()> {
    let rules = |lab: &Lab| {
        let bad = "type=cidr\nname=broken\nfrom=10.244.0.0/99\nto=10.244.0.0/16\n";
        Ok(RouterOptions::with_rules(&lab.h1.write_rules("broken", bad)?))
    };
    check("bad-rule", rules, &["broken:3", "10.244.0.0/99"])
}

#[test]
fn a_wrong_age_of_a_rule_is_named_with_what_is_expected() -> Result<()> {
    let rules =
        |lab: &Lab| Ok(RouterOptions::with_rules(&lab.h1.write_rules("fast", "type=cidr\nafter=fast\n")?));
    check("bad-after", rules, &["fast:2", "after=fast", "expected 0, a time such as 20ms"])
}

#[test]
fn rules_that_do_not_exist_are_named() -> Result<()> {
    check("no-rules", |_| Ok(RouterOptions::with_rules("/does/not/exist".as_ref())), &["/does/not/exist"])
}

#[test]
fn a_node_without_certificates_is_told_where_they_are_expected() -> Result<()> {
    let words = ["/does/not/exist/tls.crt", "ROUTER_TLS", "router pki", "--insecure"];
    check("no-tls", |_| Ok(RouterOptions::default().with("ROUTER_TLS", "/does/not/exist")), &words)
}

/// As those of EKS and GKE have it: the filter of system calls would kill whoever starts a program.
#[test]
fn a_kubeconfig_that_would_start_a_program_is_refused() -> Result<()> {
    const KUBECONFIG: &str = r#"{ apiVersion: v1, kind: Config, current-context: it,
        clusters: [{ name: it, cluster: { server: "https://192.0.2.1:6443" } }],
        contexts: [{ name: it, context: { cluster: it, user: it } }],
        users: [{ name: it, user: { exec: { apiVersion: client.authentication.k8s.io/v1, command: aws } } }] }"#;
    let options = |lab: &Lab| {
        let path = lab.directory().join("kubeconfig");
        std::fs::write(&path, KUBECONFIG)?;
        Ok(RouterOptions::default().with("KUBECONFIG", &path.to_string_lossy()))
    };
    check("kubeconfig-exec", options, &["program aws", "token"])
}

#[test]
fn a_port_in_use_is_named() -> Result<()> {
    let lab = Lab::new("port-in-use")?;
    lab.h1.start_forwarder()?;
    lab.h1.start_router(&RouterOptions::default())?;
    let control = lab.h1.place().directory.join("second.sock");
    let second = RouterOptions::default().with("ROUTER_CONTROL", &control.to_string_lossy());
    check_one_error(&lab.h1.spawn_router(&second)?.wait(Duration::from_secs(15))?, &["1234"])
}

/// Starts a program of h1 without a capability; `sys_admin` stands for many and would stand in for it.
fn without_capability(lab: &Lab, capability: &str, name: &str, arguments: &[&str]) -> Result<Finished> {
    let mut command = Command::new("setpriv");
    let lost = format!("-{capability},-sys_admin");
    command.args(["--bounding-set", &lost, "--inh-caps", &lost]);
    command.arg(program(name)?).args(arguments).envs(lab.h1.environment());
    lab.h1.place().spawn(&format!("{name}-without-{capability}"), &mut command)?.wait(Duration::from_secs(15))
}

#[test]
fn a_router_without_cap_bpf_says_so() -> Result<()> {
    let lab = Lab::new("no-cap-bpf")?;
    lab.h1.start_forwarder()?;
    check_one_error(&without_capability(&lab, "bpf", "router", &["run"])?, &["CAP_BPF"])
}

#[test]
fn a_forwarder_without_cap_sys_ptrace_says_so() -> Result<()> {
    let lab = Lab::new("no-cap-ptrace")?;
    let socket = lab.h1.place().directory.join("forwarder.sock");
    let end = without_capability(&lab, "sys_ptrace", "forwarder", &["--socket", &socket.to_string_lossy()])?;
    check_one_error(&end, &["CAP_SYS_PTRACE"])
}

#[test]
fn check_finds_a_good_host_good() -> Result<()> {
    let lab = Lab::new("check")?;
    lab.h1.start_forwarder()?;
    let lines = lab.h1.ask(&["check"])?;
    ensure!(lines.lines().all(|line| line.contains(" ok ")), "{lines}");
    ensure!(lines.contains("the kernel takes them"), "{lines}");
    Ok(())
}

#[test]
fn a_command_without_a_running_router_says_so() -> Result<()> {
    let lab = Lab::new("no-router")?;
    let Err(error) = lab.h1.ask(&["status"]) else { anyhow::bail!("status succeeded without a router") };
    ensure!(format!("{error:#}").contains("router.sock"), "{error:#}");
    Ok(())
}

fn start_with_forwarder(host: &Host) -> Result<()> {
    host.start_forwarder()?;
    host.start_router(&RouterOptions::default())?;
    host.wait_for_status("the forwarder is reached", |status| status.forwarder.is_some()).map(drop)
}

/// The router has its forwarder still.
fn expect_undisturbed(host: &Host) -> Result<()> {
    // The answer to a question asked later shows that it had time to notice.
    host.ask(&["flows"])?;
    ensure!(!host.router_log().contains("the forwarder is lost"), "{}", host.router_log());
    Ok(())
}

#[test]
fn a_look_at_the_host_does_not_disturb_a_router_that_runs() -> Result<()> {
    let lab = Lab::new("check-beside")?;
    start_with_forwarder(&lab.h1)?;
    lab.h1.ask(&["check"])?;
    expect_undisturbed(&lab.h1)
}

#[test]
fn a_second_forwarder_is_refused_and_does_not_disturb_the_router() -> Result<()> {
    let lab = Lab::new("second-forwarder")?;
    start_with_forwarder(&lab.h1)?;
    let second = lab.h1.spawn_forwarder()?.wait(Duration::from_secs(15))?;
    check_one_error(&second, &["another forwarder listens on", "forwarder.sock", "--socket"])?;
    expect_undisturbed(&lab.h1)
}

#[test]
fn routers_that_take_a_forwarder_from_each_other_are_told_so() -> Result<()> {
    let lab = Lab::new("two-routers")?;
    start_with_forwarder(&lab.h1)?;
    let own = |name: &str| lab.h1.place().directory.join(name).to_string_lossy().into_owned();
    let second = RouterOptions::default()
        .with("ROUTER_PORT", "1235")
        .with("ROUTER_CONTROL", &own("second.sock"))
        .with("ROUTER_PINS", &own("bpf/second"));
    let second = lab.h1.spawn_router(&second)?;
    wait_for("both to be told", DEADLINE, || {
        let told = lab.h1.router_log().contains("another router has taken this one's place")
            && lab.h1.forwarder_log().contains(&format!("process {} takes the place", second.pid()));
        Ok(told.then_some(()))
    })
    .with_context(|| lab.h1.forwarder_log())
}

#[test]
fn a_variable_that_is_empty_counts_as_not_set() -> Result<()> {
    let lab = Lab::new("empty-variables")?;
    lab.h1.start_forwarder()?;
    let empty =
        ["ROUTER_PORT", "ROUTER_METRICS", "ROUTER_LABELS", "ROUTER_PEERS", "KUBECONFIG", "FREEZE_BUDGET_MS"];
    let options = empty.iter().fold(RouterOptions::default(), |options, name| options.with(name, ""));
    lab.h1.start_router(&options)
}

#[test]
fn what_cannot_be_printed_is_an_error_and_no_panic() -> Result<()> {
    let lab = Lab::new("full-disk")?;
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" check >/dev/full"]).arg(program("router")?).envs(lab.h1.environment());
    let end = lab.h1.place().spawn("full", &mut command)?.wait(Duration::from_secs(15))?;
    check_one_error(&end, &["No space left on device"])?;
    ensure!(!end.stderr.contains("panicked"), "{end:?}");
    Ok(())
}
