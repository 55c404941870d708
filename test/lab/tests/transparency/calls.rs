// SPDX-License-Identifier: Apache-2.0
//! Calls that are in progress when a connection moves: none ends early, late, short or with EINTR.

use anyhow::Result;

use crate::matrix::{Case, Group, Row};

const CALLS: Group = Group("Calls in progress");

/// Ignored below, with this reason.
const THEN_BYTES: &str = "one call waits through all moves; bytes that are sent afterwards end it";
const SLOW_READER: &str = "one call lasts through all moves: the reader is slow";
const TWO_SECONDS: &str =
    "a time-out of two seconds passes during the moves; the call ends after two seconds";
const AFTERWARDS: &str = "one call waits through all moves; what it waits for comes afterwards";

#[test]
fn a_blocking_read_waits_on() -> Result<()> {
    CALLS.row("`read`, blocking", THEN_BYTES).kept("read")
}

#[test]
fn a_blocking_recv_with_msg_peek_waits_on() -> Result<()> {
    CALLS.row("`recv` with MSG_PEEK, blocking", THEN_BYTES).kept("peek-waits")
}

#[test]
fn a_recv_with_msg_waitall_gets_everything() -> Result<()> {
    CALLS
        .row("`recv` with MSG_WAITALL", "half of a megabyte is there before the moves, half comes afterwards")
        .kept("recv-waitall")
}

const RECVMSG_WAITALL: Row = CALLS.row(
    "`recvmsg` with MSG_WAITALL",
    "into eight buffers; half of a megabyte is there before the moves, half comes afterwards",
);

#[test]
fn a_recvmsg_with_msg_waitall_gets_everything() -> Result<()> {
    RECVMSG_WAITALL.kept("recvmsg-waitall")
}

#[test]
fn a_write_of_64_megabytes_is_not_short() -> Result<()> {
    CALLS.row("`write` of 64 MB, blocking", SLOW_READER).kept("write")
}

#[test]
fn a_send_of_64_megabytes_is_not_short() -> Result<()> {
    CALLS.row("`send` of 64 MB, blocking", SLOW_READER).kept("send")
}

#[test]
fn a_sendfile_of_64_megabytes_is_not_short() -> Result<()> {
    CALLS.row("`sendfile` of 64 MB, blocking", SLOW_READER).kept("sendfile")
}

#[test]
fn a_splice_into_the_socket_loses_nothing() -> Result<()> {
    CALLS
        .row("`splice` from a pipe to the socket", "32 MB in as many calls as it takes; the reader is slow")
        .kept("splice-out")
}

#[test]
fn a_splice_out_of_the_socket_waits_on() -> Result<()> {
    CALLS.row("`splice` from the socket to a pipe", THEN_BYTES).kept("splice-in")
}

#[test]
fn a_sendmsg_of_many_parts_is_not_short() -> Result<()> {
    CALLS.row("`sendmsg` with 1,024 parts, 32 MB, blocking", SLOW_READER).kept("sendmsg")
}

#[test]
fn a_writev_of_many_parts_is_not_short() -> Result<()> {
    CALLS.row("`writev` with 1,024 parts, 32 MB, blocking", SLOW_READER).kept("writev")
}

#[test]
fn a_sendmmsg_of_large_messages_is_not_short() -> Result<()> {
    CALLS.row("`sendmmsg` of four messages of 8 MB, blocking", SLOW_READER).kept("sendmmsg")
}

#[test]
fn poll_waits_on() -> Result<()> {
    CALLS.row("`poll`", THEN_BYTES).kept("poll")
}

#[test]
fn ppoll_waits_on() -> Result<()> {
    CALLS.row("`ppoll`", THEN_BYTES).kept("ppoll")
}

#[test]
fn select_waits_on() -> Result<()> {
    CALLS.row("`select`", THEN_BYTES).kept("select")
}

#[test]
fn pselect_waits_on() -> Result<()> {
    CALLS.row("`pselect`", THEN_BYTES).kept("pselect")
}

#[test]
fn epoll_wait_waits_on() -> Result<()> {
    CALLS.row("`epoll_wait`", THEN_BYTES).kept("epoll-wait")
}

#[test]
fn epoll_pwait2_waits_on() -> Result<()> {
    CALLS.row("`epoll_pwait2`", THEN_BYTES).kept("epoll-pwait2")
}

#[test]
fn poll_ends_in_time() -> Result<()> {
    CALLS.row("time-out of `poll`", TWO_SECONDS).kept(Case::while_it_lasts("poll-time"))
}

#[test]
fn ppoll_ends_in_time() -> Result<()> {
    CALLS.row("time-out of `ppoll`", TWO_SECONDS).kept(Case::while_it_lasts("ppoll-time"))
}

#[test]
fn select_ends_in_time() -> Result<()> {
    CALLS.row("time-out of `select`", TWO_SECONDS).kept(Case::while_it_lasts("select-time"))
}

#[test]
fn pselect_ends_in_time() -> Result<()> {
    CALLS.row("time-out of `pselect`", TWO_SECONDS).kept(Case::while_it_lasts("pselect-time"))
}

const EPOLL_WAIT_TIME: Row = CALLS.row("time-out of `epoll_wait`", TWO_SECONDS);

#[test]
fn epoll_wait_ends_in_time() -> Result<()> {
    EPOLL_WAIT_TIME.kept(Case::while_it_lasts("epoll-wait-time"))
}

const EPOLL_PWAIT2_TIME: Row = CALLS.row("time-out of `epoll_pwait2`", TWO_SECONDS);

#[test]
fn epoll_pwait2_ends_in_time() -> Result<()> {
    EPOLL_PWAIT2_TIME.kept(Case::while_it_lasts("epoll-pwait2-time"))
}

const RECV_TIME: Row = CALLS.row("`recv` with SO_RCVTIMEO", TWO_SECONDS);

#[test]
fn recv_with_so_rcvtimeo_ends_in_time() -> Result<()> {
    RECV_TIME.kept(Case::while_it_lasts("recv-time"))
}

#[test]
fn nanosleep_ends_in_time() -> Result<()> {
    CALLS.row("`nanosleep`", TWO_SECONDS).kept(Case::while_it_lasts("nanosleep"))
}

#[test]
fn clock_nanosleep_ends_in_time() -> Result<()> {
    CALLS
        .row("`clock_nanosleep` until a point in time", TWO_SECONDS)
        .kept(Case::while_it_lasts("clock-nanosleep"))
}

#[test]
fn futex_ends_in_time() -> Result<()> {
    CALLS.row("`futex` with a time-out", TWO_SECONDS).kept(Case::while_it_lasts("futex-time"))
}

const SIGTIMEDWAIT: Row = CALLS.row("`sigtimedwait`", TWO_SECONDS);

#[test]
fn sigtimedwait_ends_in_time() -> Result<()> {
    SIGTIMEDWAIT.kept(Case::while_it_lasts("sigtimedwait"))
}

const SEMTIMEDOP: Row = CALLS.row("`semtimedop`", TWO_SECONDS);

#[test]
fn semtimedop_ends_in_time() -> Result<()> {
    SEMTIMEDOP.kept(Case::while_it_lasts("semtimedop"))
}

#[test]
fn futex_waits_on() -> Result<()> {
    CALLS.row("`futex` without time-out", AFTERWARDS).kept("futex")
}

#[test]
fn accept_on_another_socket_waits_on() -> Result<()> {
    CALLS.row("`accept` on another socket", AFTERWARDS).kept("accept")
}

#[test]
fn connect_on_another_socket_waits_on() -> Result<()> {
    CALLS
        .row("`connect` on another socket", "the listener's queue is full until the moves are over")
        .kept("connect")
}

const CONNECT_TIME: Row = CALLS.row(
    "`connect` with SO_SNDTIMEO on another socket",
    "the listener's queue is full until the moves are over",
);

#[test]
fn connect_with_so_sndtimeo_on_another_socket_waits_on() -> Result<()> {
    CONNECT_TIME.kept("connect-time")
}

#[test]
fn waitpid_waits_on() -> Result<()> {
    CALLS.row("`waitpid`", AFTERWARDS).kept("waitpid")
}

#[test]
fn flock_waits_on() -> Result<()> {
    CALLS.row("`flock`", AFTERWARDS).kept("flock")
}

#[test]
fn sigwait_waits_on() -> Result<()> {
    CALLS.row("`sigwait`", AFTERWARDS).kept("sigwait")
}

#[test]
fn pause_waits_on() -> Result<()> {
    CALLS
        .row("`pause`", "one call waits through all moves; a handled signal ends it afterwards")
        .kept("pause")
}

const SEMOP: Row = CALLS.row("`semop`", AFTERWARDS);

#[test]
fn semop_waits_on() -> Result<()> {
    SEMOP.kept("semop")
}

#[test]
fn msgrcv_waits_on() -> Result<()> {
    CALLS.row("`msgrcv`", AFTERWARDS).kept("msgrcv")
}

#[test]
fn a_read_of_an_inotify_descriptor_waits_on() -> Result<()> {
    CALLS.row("`read` of an inotify descriptor", AFTERWARDS).kept("inotify")
}

#[test]
fn a_write_to_a_full_pipe_is_not_short() -> Result<()> {
    CALLS
        .row("`write` of 1 MB to a pipe, blocking", "the pipe is full until the moves are over")
        .kept("pipe-write")
}

#[test]
fn an_idle_io_uring_does_not_matter() -> Result<()> {
    CALLS
        .row("io_uring, nothing pending", "the process has a ring, and uses the socket by system calls")
        .kept("io-uring-idle")
}

#[test]
fn a_pending_recv_in_an_io_uring_is_not_disturbed() -> Result<()> {
    CALLS.row("io_uring, `recv` pending", THEN_BYTES).refused("unseen_reference", "io-uring-recv")
}

#[test]
fn a_socket_registered_with_an_io_uring_is_not_disturbed() -> Result<()> {
    CALLS
        .row("io_uring, registered descriptor", THEN_BYTES)
        .refused("unseen_reference", "io-uring-registered")
}
