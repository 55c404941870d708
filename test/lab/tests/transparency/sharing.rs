// SPDX-License-Identifier: Apache-2.0
//! A socket of several threads, descriptors or processes is replaced everywhere at once, or not at all.

use std::{
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use lab::{DEADLINE, program, wait_for};
use nix::sys::signal::Signal;

use crate::matrix::{Case, Connection, Group, Row};

const SHARING: Group = Group("Sharing");

/// Ignored below, with this reason.
const IN_A_PIPE: &str = "all but one wait in a read of a pipe; no call ends before its time";

#[test]
fn sixty_four_threads_go_on() -> Result<()> {
    SHARING.row("64 threads", IN_A_PIPE).kept("threads-64")
}

#[test]
fn a_thousand_threads_go_on() -> Result<()> {
    SHARING.row("1,000 threads", IN_A_PIPE).kept("threads-1000")
}

#[test]
fn parent_and_children_go_on() -> Result<()> {
    SHARING.row("inherited by 4 children", "one of them reads, the others only have it").kept("fork")
}

#[test]
fn a_child_that_accepted_goes_on() -> Result<()> {
    SHARING
        .row(
            "prefork: accepted by one of 4 children",
            "the children share the listener; the others go on accepting",
        )
        .kept("prefork")
}

#[test]
fn duplicates_go_on() -> Result<()> {
    SHARING
        .row("duplicates, with and without FD_CLOEXEC", "each keeps its flag, and each reads a part")
        .kept("dup")
}

#[test]
fn a_socket_in_flight_stays() -> Result<()> {
    SHARING
        .row("SCM_RIGHTS, in flight", "received after the moves")
        .refused("unseen_reference", "scm-in-flight")
}

#[test]
fn a_socket_that_was_delivered_goes_on() -> Result<()> {
    SHARING.row("SCM_RIGHTS, delivered", "only the receiver has it").kept("scm-delivered")
}

#[test]
fn a_shared_table_goes_on() -> Result<()> {
    SHARING
        .row("CLONE_FILES without CLONE_VM", "one process waits for the other, which reads")
        .kept("clone-files")
}

#[test]
fn shared_memory_stays() -> Result<()> {
    SHARING
        .row("CLONE_VM without CLONE_FILES", "both hold the socket; one process reads, the other waits")
        .refused("shared_memory", "clone-vm")
}

#[test]
fn a_vfork_in_progress_is_not_disturbed() -> Result<()> {
    SHARING
        .row("vfork in progress", "the parent stands still until its child ends, after the moves")
        .refused("shared_memory", "vfork")
}

const VFORK_BESIDE_EPOLL: Row =
    SHARING.row("vfork in progress, another thread in `epoll_wait`", "the call of the other goes on");

#[test]
fn a_vfork_in_progress_beside_epoll_wait_is_not_disturbed() -> Result<()> {
    VFORK_BESIDE_EPOLL.refused("shared_memory", "vfork-epoll")
}

#[test]
fn a_traced_process_stays() -> Result<()> {
    SHARING
        .row("a holder is being traced", "by a child that lets go after the moves")
        .refused("holder_traced", "traced")
}

const TRACED_CHILD: Row =
    SHARING.row("a holder is being traced, another in `epoll_wait`", "the call of the other goes on");

#[test]
fn a_traced_child_keeps_its_parent_undisturbed() -> Result<()> {
    TRACED_CHILD.refused("holder_traced", "traced-child")
}

#[test]
fn a_zombie_leader_stays() -> Result<()> {
    SHARING
        .row("zombie leader", "the first thread has ended; another one waits in a read")
        .refused("holder_vanished", "zombie-leader")
}

fn state_of(pid: u32) -> Result<String> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(stat.rsplit_once(')').context("a name in parentheses")?.1.trim_start()[..1].to_owned())
}

#[test]
fn a_stopped_process_stays_stopped() -> Result<()> {
    let row = SHARING.row("a holder is stopped (SIGSTOP)", "it stays stopped; continued, its read goes on");
    let connection = Connection::enter(&"read".into())?;
    connection.subject.signal(Signal::SIGSTOP)?;
    let pid = connection.subject.pid();
    let stopped = || Ok((state_of(pid)? == "T").then_some(()));
    wait_for("the subject to stop", DEADLINE, stopped)?;
    let refused = connection.expect_refused("holder_stopped");
    let still = wait_for("the subject to be stopped as before", DEADLINE, stopped);
    connection.subject.signal(Signal::SIGCONT)?;
    connection.leave_after(refused.and(still))?;
    row.is_refused("holder_stopped")
}

const STOPPED_AND_CONTINUED: Row = SHARING.row(
    "SIGSTOP and SIGCONT every two milliseconds",
    "at any moment of the moves; nobody stands still for longer because of it",
);

/// They cannot be blocked, so that they also meet a thread that is replacing its sockets.
#[test]
fn a_process_that_is_stopped_and_continued_again_and_again_goes_on() -> Result<()> {
    const TURNS: u32 = 100;
    let connection = Connection::enter(&"read".into())?;
    let (subject, over) = (&connection.subject, AtomicBool::new(false));
    let moved = std::thread::scope(|scope| {
        let signals = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                subject.signal(Signal::SIGSTOP)?;
                subject.signal(Signal::SIGCONT)?;
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        let moved = (0..TURNS).try_for_each(|_| {
            let pause_us = connection.scene.lab.h1.move_to(connection.port, "host")?.pause_us;
            let pause = Duration::from_micros(pause_us.context("a swapped connection has a pause")?);
            ensure!(pause < Duration::from_secs(1), "a pause of {pause:?}");
            connection.move_to("overlay")
        });
        over.store(true, Ordering::Relaxed);
        signals.join().map_err(|_| anyhow!("the thread that signals has panicked"))?.and(moved)
    });
    connection.leave_after(moved)?;
    STOPPED_AND_CONTINUED.is_kept()
}

#[test]
fn a_process_in_the_freezer_stays_there() -> Result<()> {
    let row =
        SHARING.row("a holder is in the freezer (cgroup v2)", "it stays there; thawed, its read goes on");
    let connection = Connection::enter(&"read".into())?;
    let cgroup = connection.scene.client.place().cgroup.path();
    std::fs::write(cgroup.join("cgroup.freeze"), "1")?;
    let frozen = || -> Result<Option<()>> {
        let events = std::fs::read_to_string(cgroup.join("cgroup.events"))?;
        Ok(events.lines().any(|line| line == "frozen 1").then_some(()))
    };
    let refused = wait_for("the cgroup to freeze", DEADLINE, frozen)
        .and_then(|()| connection.expect_refused("holder_busy"))
        .and_then(|()| wait_for("the cgroup to be frozen as before", DEADLINE, frozen));
    std::fs::write(cgroup.join("cgroup.freeze"), "0")?;
    connection.leave_after(refused)?;
    row.is_refused("holder_busy")
}

#[test]
fn a_holder_in_another_container_goes_on() -> Result<()> {
    let row = SHARING.row("a holder in another container", "it was given the socket by SCM_RIGHTS");
    let scene = crate::matrix::scene()?;
    let neighbour = scene.lab.h1.pod("holder")?;
    let place = scene.lab.directory().join("passed-on");
    let mut case = Case::from("passed-on");
    case.environment = vec![("BEHAVIOUR_SOCKET".to_owned(), place.to_string_lossy().into_owned())];
    let mut connection = Connection::start(scene.client.place(), &scene.server, &case)?;
    connection.hold()?;
    connection.partner.tell("enter")?;
    connection.subject.tell("enter")?;
    connection.subject.wait_until_it_says("waiting", DEADLINE)?;
    let mut command = Command::new(program("behaviour")?);
    command.args(["passed-on", "holder", "0.0.0.0:0"]).env("BEHAVIOUR_SOCKET", &place);
    let mut holder = neighbour.spawn("holder", &mut command)?;
    connection.subject.wait_until_it_says("ready", DEADLINE)?;
    holder.wait_until_it_says("ready", DEADLINE)?;
    let moved = connection.move_about();
    holder.tell("leave")?;
    ensure!(holder.wait(DEADLINE)?.expect_success().is_ok());
    connection.leave_after(moved)?;
    row.is_kept()
}
