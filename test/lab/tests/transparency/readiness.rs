// SPDX-License-Identifier: Apache-2.0
//! Whoever is told that a socket is ready is told so after a move: as often, with the same words.

use anyhow::Result;

use crate::matrix::Group;

const READINESS: Group = Group("Readiness");

/// Ignored below, with this reason.
const ONE_EVENT: &str = "no event during the moves; one afterwards, with its data, when bytes come";

#[test]
fn a_level_triggered_registration_lives_on() -> Result<()> {
    READINESS.row("epoll, level triggered", ONE_EVENT).kept("epoll-level")
}

#[test]
fn an_edge_triggered_registration_lives_on() -> Result<()> {
    READINESS.row("epoll, edge triggered", ONE_EVENT).kept("epoll-edge")
}

#[test]
fn an_edge_comes_again_when_there_is_more() -> Result<()> {
    READINESS
        .row(
            "epoll, edge triggered, bytes left unread",
            "more bytes come after the moves; all are read with one wait for each edge",
        )
        .kept("epoll-edge-unread")
}

#[test]
fn an_armed_one_shot_registration_lives_on() -> Result<()> {
    READINESS.row("epoll, one-shot, armed", ONE_EVENT).kept("epoll-oneshot-armed")
}

#[test]
fn a_fired_one_shot_registration_stays_silent() -> Result<()> {
    READINESS
        .row("epoll, one-shot, fired", "no event until it is armed again; tried again later")
        .refused("oneshot_fired", "epoll-oneshot-fired")
}

#[test]
fn an_exclusive_registration_lives_on() -> Result<()> {
    READINESS.row("epoll, EPOLLEXCLUSIVE", "as above; it is still exclusive").kept("epoll-exclusive")
}

#[test]
fn a_nested_set_lives_on() -> Result<()> {
    READINESS.row("epoll set in an epoll set", "the outer set tells of the inner one").kept("epoll-nested")
}

#[test]
fn a_set_shared_over_fork_lives_on() -> Result<()> {
    READINESS
        .row("epoll set shared over fork", "parent and child wait in it; both are told")
        .kept("epoll-forked")
}

#[test]
fn a_socket_in_five_sets_is_told_in_all() -> Result<()> {
    READINESS.row("one socket in 5 epoll sets", "each tells of the bytes").kept("epoll-several")
}

#[test]
fn a_socket_in_more_sets_than_can_be_seen_stays() -> Result<()> {
    READINESS
        .row("one socket in 17 epoll sets", "each tells of the bytes")
        .refused("epoll_unreachable", "epoll-many")
}

#[test]
fn a_duplicate_in_a_set_of_its_own_lives_on() -> Result<()> {
    READINESS
        .row("socket and duplicate in an epoll set each", "each tells of the bytes, under its own descriptor")
        .kept("epoll-duplicate")
}

#[test]
fn a_registration_whose_descriptor_is_closed_stays() -> Result<()> {
    READINESS
        .row("registered descriptor closed, a duplicate open", "the registration still tells of the bytes")
        .refused("epoll_unreachable", "epoll-orphan")
}

#[test]
fn a_set_that_only_a_stranger_has_stays() -> Result<()> {
    READINESS
        .row("epoll set held by a process without the socket", "it is told of the bytes")
        .refused("epoll_unreachable", "epoll-elsewhere")
}

#[test]
fn sigio_comes_once() -> Result<()> {
    READINESS
        .row("O_ASYNC: SIGIO", "no signal during the moves; one afterwards when bytes come")
        .refused("signal_driven", "sigio")
}

#[test]
fn a_chosen_signal_tells_the_descriptor() -> Result<()> {
    READINESS
        .row("O_ASYNC with F_SETSIG", "the same, with the right `si_fd`")
        .refused("signal_driven", "sigio-descriptor")
}
