// SPDX-License-Identifier: Apache-2.0
//! Real processes, real ptrace: `cat` echoes what comes over a socket that is its standard input and output.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use nix::sys::socket::{getsockopt, setsockopt, sockopt::SndBuf};

use super::*;
use crate::{alarm::Alarms, holders::Listing, inspect::Programs};

struct Echo {
    child: Child,
    client: TcpStream,
    programs: Arc<Programs>,
    holders: Holders,
    given: Given,
    /// Our copy of the socket that `cat` has.
    old: OwnedFd,
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

impl Echo {
    fn start() -> Echo {
        let (client, server) = pair();
        let output = server.try_clone().unwrap();
        let child = Command::new("cat")
            .stdin(Stdio::from(OwnedFd::from(server)))
            .stdout(Stdio::from(OwnedFd::from(output)))
            .spawn()
            .unwrap();
        let tgid = Tgid(child.id() as i32);
        let old = process::copy_fd(&process::pidfd(tgid).unwrap(), RemoteFd(0)).unwrap();
        let programs = Programs::load().unwrap();
        let holders = Holders { tgids: vec![], tables: vec![] };
        let (elsewhere, _peer) = pair();
        let inspector = programs.inspector().unwrap();
        let given = Given::from(old.as_fd(), false, elsewhere.as_fd(), &inspector).unwrap();
        let mut echo = Echo { child, client, programs, holders, given, old };
        echo.says_back(b"before");
        let facts = echo.facts(echo.old.as_fd());
        echo.holders = Listing::new(echo.programs.descriptors().unwrap()).holders(facts.file);
        echo
    }

    fn says_back(&mut self, words: &[u8]) {
        says_back(&mut self.client, words);
    }

    fn inspector(&self) -> Inspector {
        self.programs.inspector().unwrap()
    }

    fn facts(&self, socket: BorrowedFd<'_>) -> SocketFacts {
        self.programs.inspector().unwrap().socket(socket).unwrap().unwrap()
    }

    fn substitution<'a>(&'a self, new: BorrowedFd<'a>) -> Substitution<'a> {
        Substitution {
            old: self.old.as_fd(),
            new,
            facts: self.facts(self.old.as_fd()),
            holders: &self.holders,
            given: &self.given,
        }
    }

    fn freeze(&self) -> Frozen {
        let inspector = self.inspector();
        Frozen::freeze(&self.holders.tgids, &Alarms::look(&inspector, &self.holders.tgids), soon()).unwrap()
    }
}

fn says_back(client: &mut TcpStream, words: &[u8]) {
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.write_all(words).unwrap();
    let mut answer = vec![0; words.len()];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, words);
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(2)
}

#[test]
fn a_process_goes_on_with_the_new_socket_under_all_its_descriptors() {
    let echo = Echo::start();
    let (mut client, server) = pair();
    let mut frozen = echo.freeze();
    let pairs = [echo.substitution(server.as_fd())];
    Armed::arm(&mut frozen, Gear::new().unwrap(), &echo.inspector(), &pairs, Deal::Within, soon())
        .unwrap()
        .install(&mut frozen, &[server.as_fd()])
        .unwrap();
    frozen.thaw();
    says_back(&mut client, b"after");
    // Standard input, standard output, and our own.
    assert_eq!(echo.facts(server.as_fd()).refs, 3);
    assert_eq!(echo.facts(echo.old.as_fd()).refs, 1);
}

#[test]
fn carried_bytes_are_the_first_on_the_new_socket() {
    let echo = Echo::start();
    let (mut client, server) = pair();
    let mut frozen = echo.freeze();
    let carry: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let pairs = [echo.substitution(server.as_fd())];
    let mut armed =
        Armed::arm(&mut frozen, Gear::new().unwrap(), &echo.inspector(), &pairs, Deal::Within, soon())
            .unwrap();
    let load = Load { carry: carry.clone(), arriving: 0 };
    armed.load(&mut frozen, &[server.as_fd()], &[load], soon()).unwrap();
    armed.install(&mut frozen, &[server.as_fd()]).unwrap();
    drop(frozen);
    let mut received = vec![0; carry.len()];
    client.read_exact(&mut received).unwrap();
    assert!(received == carry);
}

#[test]
fn turning_back_at_the_gate_leaves_the_process_as_it_was() {
    let mut echo = Echo::start();
    let (_client, server) = pair();
    let fds = |echo: &Echo| std::fs::read_dir(format!("/proc/{}/fd", echo.child.id())).unwrap().count();
    let before = fds(&echo);
    let mut frozen = echo.freeze();
    let pairs = [echo.substitution(server.as_fd())];
    let new = [server.as_fd()];
    Armed::arm(&mut frozen, Gear::new().unwrap(), &echo.inspector(), &pairs, Deal::Within, soon())
        .unwrap()
        .turn_back(&mut frozen, &new);
    drop(frozen);
    assert_eq!(fds(&echo), before);
    echo.says_back(b"still here");
}

#[test]
fn turning_back_takes_the_room_for_carried_bytes_from_the_new_socket_again() {
    let echo = Echo::start();
    let (_client, server) = pair();
    setsockopt(&server, SndBuf, &50_000).unwrap();
    let room = || getsockopt(&server, SndBuf).unwrap();
    let mut frozen = echo.freeze();
    let pairs = [echo.substitution(server.as_fd())];
    let mut armed =
        Armed::arm(&mut frozen, Gear::new().unwrap(), &echo.inspector(), &pairs, Deal::Within, soon())
            .unwrap();
    let before = room();
    let load = Load { carry: vec![0; 9_000_000], arriving: 0 };
    armed.load(&mut frozen, &[server.as_fd()], &[load], soon()).unwrap();
    assert!(room() > before);
    armed.turn_back(&mut frozen, &[server.as_fd()]);
    assert_eq!(room(), before);
}

#[test]
fn the_same_process_can_be_moved_many_times() {
    let mut echo = Echo::start();
    for round in 0..100 {
        let (client, server) = pair();
        let mut frozen = echo.freeze();
        let pairs = [echo.substitution(server.as_fd())];
        Armed::arm(&mut frozen, Gear::new().unwrap(), &echo.inspector(), &pairs, Deal::Within, soon())
            .unwrap()
            .install(&mut frozen, &[server.as_fd()])
            .unwrap();
        drop(frozen);
        echo.client = client;
        echo.old = server.into();
        echo.says_back(format!("round {round}").as_bytes());
    }
}

#[test]
fn a_tracer_that_dies_at_the_gate_leaves_the_process_working() {
    let mut echo = Echo::start();
    let (_client, server) = pair();
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                let mut frozen = echo.freeze();
                let pairs = [echo.substitution(server.as_fd())];
                let armed = Armed::arm(
                    &mut frozen,
                    Gear::new().unwrap(),
                    &echo.inspector(),
                    &pairs,
                    Deal::Within,
                    soon(),
                )
                .unwrap();
                // As after SIGKILL: no Drop runs; the end of this thread detaches, and the gate closes.
                std::mem::forget(frozen);
                drop(armed);
            })
            .join()
            .unwrap();
    });
    echo.says_back(b"nothing happened");
}
