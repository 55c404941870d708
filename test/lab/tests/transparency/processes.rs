// SPDX-License-Identifier: Apache-2.0
//! Whatever a process is allowed, and however it was built, it does not notice that its connections move.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use lab::program;

use crate::matrix::{Case, Connection, Group, Row};

const PROCESSES: Group = Group("Processes");

/// Ignored below, with this reason.
const PINGS: &str = "requests and answers all the time";

/// The behaviour `pings`, through another program that starts it.
fn through(wrapper: &str) -> Case {
    let wrapper = wrapper.split(' ').map(str::to_owned).collect();
    Case { wrapper, ..Case::from("pings") }
}

/// The same program in C, built like this.
fn built(name: &str, compiler: &str) -> Result<Case> {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/workloads/pings.c");
    let out = program("behaviour")?.with_file_name(format!("pings-{name}"));
    let mut words = compiler.split(' ');
    let mut command = Command::new(words.next().context("a compiler")?);
    command.args(words).args(["-O2", "-Wall", "-o"]).arg(&out).arg(source);
    let output = command.output().with_context(|| format!("starting {compiler}"))?;
    ensure!(output.status.success(), "{compiler}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Case { program: Some(out), ..Case::from("pings-epoll") })
}

#[test]
fn a_static_program_goes_on() -> Result<()> {
    PROCESSES
        .row("static", "in C, waiting in `epoll_wait`, without shared libraries")
        .kept(built("static", "gcc -static")?)
}

#[test]
fn a_musl_program_goes_on() -> Result<()> {
    PROCESSES.row("musl", "in C, against musl").kept(built("musl", "musl-gcc")?)
}

#[test]
fn a_static_musl_program_goes_on() -> Result<()> {
    PROCESSES.row("musl, static", "in C, against musl").kept(built("musl-static", "musl-gcc -static")?)
}

/// The routers look at it once by themselves, and once more by order.
fn check_32_bit(row: &Row, behaviour: &'static str) -> Result<()> {
    let scene = crate::matrix::scene()?;
    let case = Case { behaviour, ..built("32", "gcc -m32")? };
    let mut connection = Connection::start(scene.client.place(), &scene.server, &case)?;
    connection.begin()?;
    let refused = connection.expect_refused("holder_32bit");
    connection.leave_after(refused)?;
    row.is_refused("holder_32bit")
}

#[test]
fn a_32_bit_program_stays() -> Result<()> {
    check_32_bit(&PROCESSES.row("32-bit", "in C; requests and answers all the time"), "pings")
}

const EPOLL_WAIT_32: Row =
    PROCESSES.row("32-bit, in `epoll_wait`", "in C; it waits for each answer in `epoll_wait`");

#[test]
fn a_32_bit_program_in_epoll_wait_stays() -> Result<()> {
    check_32_bit(&EPOLL_WAIT_32, "pings-epoll")
}

#[test]
fn another_user_goes_on() -> Result<()> {
    let as_user = "setpriv --reuid 12345 --regid 12345 --clear-groups";
    PROCESSES.row("non-root user", PINGS).kept(through(as_user))
}

#[test]
fn a_process_without_capabilities_goes_on() -> Result<()> {
    let dropped = "setpriv --bounding-set -all --inh-caps -all --ambient-caps -all";
    PROCESSES.row("root without capabilities", PINGS).kept(through(dropped))
}

#[test]
fn a_process_without_new_privileges_goes_on() -> Result<()> {
    PROCESSES.row("no_new_privs", PINGS).kept(through("setpriv --no-new-privs"))
}

#[test]
fn a_process_in_a_user_namespace_goes_on() -> Result<()> {
    PROCESSES.row("user namespace", PINGS).kept(through("unshare --user --map-root-user"))
}

#[test]
fn a_process_in_a_pid_namespace_goes_on() -> Result<()> {
    PROCESSES.row("PID namespace", PINGS).kept(through("unshare --pid --fork --kill-child"))
}

#[test]
fn a_process_with_a_read_only_root_goes_on() -> Result<()> {
    let mut case = through("unshare --mount sh -c");
    case.wrapper.push("mount -o remount,bind,ro / && ! touch /x 2>/dev/null && exec \"$@\"".to_owned());
    case.wrapper.push("sh".to_owned());
    PROCESSES.row("read-only root", PINGS).kept(case)
}

#[test]
fn a_process_without_free_descriptors_stays() -> Result<()> {
    PROCESSES
        .row("RLIMIT_NOFILE reached", "not one descriptor more can be made; a read goes on")
        .refused("no_free_descriptor", "no-descriptors")
}

#[test]
fn a_process_under_strict_seccomp_goes_on() -> Result<()> {
    PROCESSES
        .row("seccomp, strict mode", "any call but read and write would kill it; a read goes on")
        .kept("seccomp-strict")
}

#[test]
fn a_process_under_a_seccomp_filter_goes_on() -> Result<()> {
    PROCESSES
        .row(
            "seccomp, a filter",
            "any call that the program does not need itself would kill it; a read goes on",
        )
        .kept("seccomp-filter")
}

#[test]
fn a_signal_every_millisecond_is_handled() -> Result<()> {
    PROCESSES
        .row("SIGALRM every millisecond", "requests and answers all the time; SA_RESTART, and no call fails")
        .kept("alarms")
}

#[test]
fn signals_are_handled_on_their_own_stack() -> Result<()> {
    PROCESSES
        .row("SIGALRM every millisecond on an alternate signal stack", "the same; each on that stack")
        .kept("alternate-stack")
}
