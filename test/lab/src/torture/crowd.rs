// SPDX-License-Identifier: Apache-2.0
//! The applications: pairs of streams that come and go, each checked to its end.

use std::{
    os::unix::process::CommandExt,
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Finished, Pod, Process, program};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::{
    plan::{End, Pair, Slot},
    tally::Tally,
};

/// Without a byte for so long, an application says that it is stuck.
const STUCK_S: u64 = 10;
/// How long beginning and end may take.
const LIMIT: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_millis(20);
/// The most that begin in a tick.
const STARTS: usize = 4;
/// Servers listen here, one after the other; below what the kernel gives to clients.
const PORTS: std::ops::Range<u16> = 10_000..30_000;

/// What may be said by an application whose other end was killed.
const BEREAVED: [&str; 7] = [
    "the stream ended",
    "ECONNRESET",
    "EPIPE",
    "ENOTCONN",
    "endpoint is not connected",
    "short write",
    "child process",
];

pub struct Crowd<'a> {
    pods: &'a [Pod],
    places: Vec<Place>,
    tally: &'a Tally,
    port: u16,
}

struct Place {
    slot: Slot,
    name: String,
    /// Of the present pair.
    port: u16,
    state: State,
}

enum State {
    Empty,
    Listens { pair: Pair, server: Process, by: Instant },
    Connects { pair: Pair, server: Process, client: Process, by: Instant },
    Talks { pair: Pair, server: Process, client: Process, until: Instant },
    Ends { pair: Pair, server: Process, client: Process, by: Instant },
}

impl<'a> Crowd<'a> {
    pub fn new(pods: &'a [Pod], slots: Vec<Slot>, tally: &'a Tally) -> Crowd<'a> {
        let place =
            |(index, slot)| Place { slot, name: format!("slot-{index}"), port: 0, state: State::Empty };
        let places = slots.into_iter().enumerate().map(place).collect();
        Crowd { pods, places, tally, port: PORTS.start }
    }

    /// Keeps every slot filled until `closing`, then lets all come to their end.
    pub fn run(&mut self, closing: &AtomicBool) {
        loop {
            let open = !closing.load(Ordering::Relaxed);
            let mut starts = if open { STARTS } else { 0 };
            for index in 0..self.places.len() {
                let state = std::mem::replace(&mut self.places[index].state, State::Empty);
                let may_start = matches!(state, State::Empty) && starts > 0;
                starts -= usize::from(may_start);
                self.places[index].state = self.step(index, state, may_start, open).unwrap_or_else(|error| {
                    self.tally.error(&format!("{}: {error:#}", self.places[index].name));
                    State::Empty
                });
            }
            if !open && self.places.iter().all(|place| matches!(place.state, State::Empty)) {
                return;
            }
            std::thread::sleep(TICK);
        }
    }

    fn step(&mut self, index: usize, state: State, may_start: bool, open: bool) -> Result<State> {
        let now = Instant::now();
        Ok(match state {
            State::Empty if may_start => self.listen(index)?,
            State::Empty => State::Empty,
            State::Listens { pair, mut server, by } => {
                server.fail_if_ended()?;
                if server.stdout().contains("listening") {
                    let client = self.start(index, &pair, "client")?;
                    State::Connects { pair, server, client, by }
                } else {
                    ensure!(now < by, "the server of {pair:?} did not listen within {LIMIT:?}");
                    State::Listens { pair, server, by }
                }
            }
            State::Connects { pair, mut server, mut client, by } => {
                server.fail_if_ended()?;
                client.fail_if_ended()?;
                let all = |process: &Process| {
                    process.stdout().matches("connected").count() >= self.places[index].slot.connections()
                };
                if all(&server) && all(&client) {
                    let until = now + pair.life;
                    State::Talks { pair, server, client, until }
                } else {
                    ensure!(now < by, "{pair:?} did not connect within {LIMIT:?}");
                    State::Connects { pair, server, client, by }
                }
            }
            State::Talks { pair, mut server, mut client, until } => {
                server.fail_if_ended()?;
                client.fail_if_ended()?;
                if now < until && open {
                    return Ok(State::Talks { pair, server, client, until });
                }
                match pair.end {
                    End::Finish => (),
                    End::ClientKilled => kill(&client)?,
                    End::ServerKilled => kill(&server)?,
                }
                client.close_stdin();
                State::Ends { pair, server, client, by: now + LIMIT }
            }
            State::Ends { pair, mut server, mut client, by } => {
                if server.ended()?.is_none() || client.ended()?.is_none() {
                    ensure!(
                        now < by,
                        "{pair:?} did not end within {LIMIT:?}: server {}, client {}",
                        what_it_does(&mut server),
                        what_it_does(&mut client)
                    );
                    return Ok(State::Ends { pair, server, client, by });
                }
                self.judge(index, &pair, server.wait(LIMIT)?, client.wait(LIMIT)?)?;
                State::Empty
            }
        })
    }

    fn listen(&mut self, index: usize) -> Result<State> {
        let pair = self.places[index].slot.next_pair();
        self.port = if self.port + 1 < PORTS.end { self.port + 1 } else { PORTS.start };
        self.places[index].port = self.port;
        let server = self.start(index, &pair, "server")?;
        Ok(State::Listens { pair, server, by: Instant::now() + LIMIT })
    }

    fn start(&self, index: usize, pair: &Pair, role: &str) -> Result<Process> {
        let Place { name, port, .. } = &self.places[index];
        let address = self.pods[pair.server].address(pair.family, *port).to_string();
        let mut command = Command::new(program("stream")?);
        command
            .args([&format!("--{role}"), &address])
            .args(pair.arguments.split_whitespace())
            .args(["--stuck-after", &STUCK_S.to_string()])
            // With its children, to be killed together.
            .process_group(0);
        if role == "client" {
            command.arg("--until-eof");
        }
        let pod = if role == "client" { pair.client } else { pair.server };
        self.pods[pod].spawn(&format!("{name}-{role}"), &mut command)
    }

    fn judge(&self, index: usize, pair: &Pair, server: Finished, client: Finished) -> Result<()> {
        match pair.end {
            End::Finish => {
                server.expect_success()?;
                client.expect_success()?;
            }
            End::ClientKilled => bereaved(server)?,
            End::ServerKilled => bereaved(client)?,
        }
        let mut counts = self.tally.counts();
        counts.connections += self.places[index].slot.connections() as u64;
        counts.applications_killed += u64::from(pair.end != End::Finish);
        Ok(())
    }
}

/// SIGKILL, to its children as well.
fn kill(process: &Process) -> Result<()> {
    Ok(killpg(Pid::from_raw(process.pid() as i32), Signal::SIGKILL)?)
}

/// It may have noticed that the other end is gone, and nothing else.
fn bereaved(survivor: Finished) -> Result<()> {
    if survivor.success() {
        return Ok(());
    }
    let expected = |line: &str| BEREAVED.iter().any(|words| line.contains(words));
    if !survivor.stderr.is_empty() && survivor.stderr.lines().all(expected) {
        return Ok(());
    }
    survivor.expect_success().context("its other end was killed").map(drop)
}

/// For an application that does not end: has it ended, is it stopped, where does it wait?
fn what_it_does(process: &mut Process) -> String {
    if let Ok(Some(status)) = process.ended() {
        return format!("has ended ({status})");
    }
    let of =
        |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", process.pid())).unwrap_or_default();
    let status = of("status");
    let about = status.lines().filter(|line| line.starts_with("State:") || line.starts_with("TracerPid:"));
    format!(
        "({}, in {}, process {}): {}",
        about.collect::<Vec<_>>().join(", "),
        of("wchan"),
        process.pid(),
        process.stderr()
    )
}
