// SPDX-License-Identifier: Apache-2.0
//! Whatever state a socket is in, it is in it after a move, or is not moved.

use std::process::Command;

use anyhow::{Result, ensure};
use lab::DEADLINE;

use crate::matrix::{Case, Connection, Group, Row};

const STATE: Group = Group("Socket state");

/// Ignored below, with this reason.
#[test]
fn options_that_were_set_stay_set() -> Result<()> {
    STATE
        .row(
            "27 socket options, set",
            "keepalive, TCP_NODELAY, TCP_USER_TIMEOUT, buffers, linger, time-outs, pacing, congestion control and others, read back all the time",
        )
        .kept("options-set")
}

#[test]
fn options_that_were_not_set_stay_so() -> Result<()> {
    STATE.row("the same, not set", "read back all the time").kept("options-unset")
}

#[test]
fn a_connection_closed_at_this_end_stays() -> Result<()> {
    STATE
        .row("half closed by this end", "bytes still come the other way")
        .refused("half_closed", "half-closed")
}

#[test]
fn a_connection_closed_at_the_other_end_stays() -> Result<()> {
    STATE
        .row("half closed by the other end", "bytes still go the other way")
        .refused("half_closed", "peer-half-closed")
}

#[test]
fn an_urgent_byte_that_waits_is_not_disturbed() -> Result<()> {
    STATE.row("urgent byte, not read", "read with MSG_OOB after the moves").refused("urgent_data", "urgent")
}

#[test]
fn an_urgent_byte_that_was_read_is_not_disturbed() -> Result<()> {
    STATE.row("urgent byte, read", "ordinary bytes come after the moves").kept("urgent-read")
}

const READ_AFTERWARDS: &str = "sent before the moves, read afterwards";

#[test]
fn an_unread_byte_is_not_lost() -> Result<()> {
    STATE.row("1 unread byte", READ_AFTERWARDS).kept("unread-1")
}

#[test]
fn an_unread_kilobyte_is_not_lost() -> Result<()> {
    STATE.row("1 KB unread", READ_AFTERWARDS).kept("unread-1k")
}

#[test]
fn sixty_four_unread_kilobytes_are_not_lost() -> Result<()> {
    STATE.row("64 KB unread", READ_AFTERWARDS).kept("unread-64k")
}

#[test]
fn an_unread_megabyte_is_not_lost() -> Result<()> {
    STATE.row("1 MB unread", READ_AFTERWARDS).kept("unread-1m")
}

#[test]
fn eight_unread_megabytes_are_not_lost() -> Result<()> {
    STATE.row("8 MB unread", READ_AFTERWARDS).kept("unread-8m")
}

#[test]
fn unread_megabytes_both_ways_are_not_lost() -> Result<()> {
    STATE.row("4 MB unread each way", READ_AFTERWARDS).kept("unread-both")
}

#[test]
fn unread_bytes_are_there_at_any_time() -> Result<()> {
    STATE
        .row("FIONREAD of unread bytes", "a megabyte; asked for all the time, and never less")
        .kept("unread-counted")
}

#[test]
fn a_closed_window_opens_again() -> Result<()> {
    STATE
        .row("zero window", "the reader stops; the writer fills window and buffers before the moves")
        .kept("zero-window")
}

#[test]
fn a_connection_made_with_data_in_its_syn_goes_on() -> Result<()> {
    let row =
        STATE.row("TCP Fast Open", "a connection without connect(2): its first bytes came with the SYN");
    let scene = crate::matrix::scene()?;
    // Both directions, and without a cookie: net.ipv4.tcp_fastopen in the kernel's ip-sysctl.
    for pod in [&scene.client, &scene.server] {
        let set = "echo 519 >/proc/sys/net/ipv4/tcp_fastopen";
        pod.place().run(Command::new("sh").args(["-c", set]))?;
    }
    row.kept("fast-open")
}

#[test]
fn keepalive_probes_are_answered() -> Result<()> {
    STATE
        .row("keepalive probes, one a second", "idle for three seconds on the host network after the moves")
        .check_on_host("keepalive")
}

#[test]
fn a_reset_by_this_end_right_after_a_swap_arrives() -> Result<()> {
    STATE
        .row("reset (SO_LINGER 0) by this end right after the swap", "the other end's read sees ECONNRESET")
        .check_on_host("linger-reset")
}

#[test]
fn a_reset_by_the_other_end_right_after_a_swap_arrives() -> Result<()> {
    STATE
        .row("reset by the other end right after the swap", "this end's read sees ECONNRESET")
        .check_on_host("peer-reset")
}

#[test]
fn a_lingering_close_right_after_a_swap_loses_nothing() -> Result<()> {
    STATE
        .row(
            "SO_LINGER 9 s: 16 MB and close right after the swap",
            "all bytes arrive, and close waits for them",
        )
        .check_on_host("linger-close")
}

#[test]
fn a_close_with_unread_bytes_right_after_a_swap_resets() -> Result<()> {
    STATE
        .row(
            "close with unread bytes right after the swap",
            "the other end sees ECONNRESET, as without a swap",
        )
        .check_on_host("close-unread")
}

impl Row {
    /// As `kept`, and the state ends right after a swap to the host network.
    fn check_on_host(&self, case: impl Into<Case>) -> Result<()> {
        let mut connection = Connection::enter(&case.into())?;
        let moved = connection.move_about().and_then(|()| connection.move_to("host"));
        connection.leave_after(moved)?;
        self.is_kept()
    }
}

fn check_churn(row: &Row, behaviour: &'static str) -> Result<()> {
    const AT_LEAST: usize = 5;
    let scene = crate::matrix::scene()?;
    let mut connection = Connection::start(scene.client.place(), &scene.server, &behaviour.into())?;
    let suffix = format!(":{}:", connection.port);
    connection.begin()?;
    connection.subject.wait_until_it_says("ok", DEADLINE)?;
    connection.leave()?;
    let log = scene.lab.h1.router_log();
    let swapped =
        log.lines().filter(|line| line.contains(&suffix) && line.contains("moved to the host")).count();
    ensure!(swapped >= AT_LEAST, "only {swapped} connections lived to see the end of their swap");
    row.is_kept()
}

const SIXTY: &str = "60 connections that the routers swap at once, each ending at another moment";

#[test]
fn a_close_during_the_swap_loses_nothing() -> Result<()> {
    check_churn(&STATE.row("close by one end during the swap", SIXTY), "churn-close")
}

#[test]
fn an_exit_during_the_swap_is_seen() -> Result<()> {
    check_churn(&STATE.row("exit of an application during the swap", SIXTY), "churn-exit")
}

const CLIENT_KILLED: Row = STATE.row("SIGKILL of the client during the swap", SIXTY);

#[test]
fn a_kill_during_the_swap_is_seen() -> Result<()> {
    check_churn(&CLIENT_KILLED, "churn-kill")
}

const SERVER_KILLED: Row = STATE.row("SIGKILL of the server during the swap", SIXTY);

#[test]
fn a_kill_of_the_server_during_the_swap_is_seen() -> Result<()> {
    check_churn(&SERVER_KILLED, "churn-partner-killed")
}
