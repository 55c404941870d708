// SPDX-License-Identifier: Apache-2.0
//! TCP connections that notice everything: lost, repeated or changed bytes, short writes, EINTR, unexpected
//! EAGAIN, addresses or options that change.
//!
//! Server and client send each other frames of random sizes, as fast as they can, until the client has had enough.
//! The client then sends its last frame, the server answers with its own, and only when both have come do the two
//! sides shut the connection down: nothing is half closed while data flows. The last frame carries count and hash
//! of all that was sent. Whatever is not as it should be ends the program with exit code 1 and a line that says what.
//!
//! Standard output has one JSON object a line: `listening`, `connected` and, at the very end, `done`; the last two for
//! each connection.

mod company;
mod data;
mod pings;
mod socket;
mod transfer;

use std::{
    io::Read,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread::ScopedJoinHandle,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Ends the program: nothing can be trusted after a first wrong answer. In one write: child processes may fail as well,
/// and lines must not mix.
macro_rules! fail {
    ($($arg:tt)*) => {{
        use std::io::Write;
        let line = format!("stream: {}\n", format_args!($($arg)*));
        // Nothing can be done about a standard error that nobody reads.
        let _ = std::io::stderr().write_all(line.as_bytes());
        std::process::exit(1)
    }};
}
pub(crate) use fail;

/// Sends and receives checked data over TCP connections.
#[derive(Parser)]
pub struct Options {
    /// Listen here and serve.
    #[arg(long, required_unless_present = "client", conflicts_with = "client")]
    server: Option<SocketAddr>,
    /// Connect to this address; [::ffff:A.B.C.D]:PORT makes an IPv6 socket with mapped addresses.
    #[arg(long)]
    client: Option<SocketAddr>,
    /// End after so many seconds (client).
    #[arg(long, default_value_t = 1e9)]
    seconds: f64,
    /// End after so many bytes of payload sent, or so many pings (client).
    #[arg(long, default_value_t = u64::MAX)]
    bytes: u64,
    /// End when standard input is closed (client).
    #[arg(long)]
    until_eof: bool,
    /// How the socket is read and written. All but `blocking` use a non-blocking socket and one thread.
    #[arg(long, value_enum, default_value_t = Io::Blocking)]
    io: Io,
    /// Threads in the process; those that do not use the socket sleep, wait and compute.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// None of these threads computes: for many processes on few CPUs.
    #[arg(long)]
    idle_threads: bool,
    /// Child processes that inherit the socket.
    #[arg(long, default_value_t = 0)]
    fork: usize,
    /// One more child process does the reading (with `--io blocking`).
    #[arg(long)]
    fork_reader: bool,
    /// Duplicates of the socket's descriptor; input and output alternate over all of them.
    #[arg(long, default_value_t = 0)]
    dup: usize,
    /// Connections at the same time, each as all other options say.
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// A pause between two frames of a stream.
    #[arg(long, default_value_t = 0)]
    pause_ms: u64,
    /// Fail when nothing has been received for so long (not with `--idle`).
    #[arg(long, value_name = "SECONDS")]
    stuck_after: Option<u64>,
    /// The other side stays silent until it has received something.
    #[arg(long, value_enum)]
    speak_first: Option<Side>,
    /// The server waits so long before it accepts.
    #[arg(long, default_value_t = 0)]
    accept_delay_ms: u64,
    /// Ping-pong of 64 bytes instead of a stream; round trips are reported.
    #[arg(long)]
    pings: bool,
    /// With `--pings`: a pause between two pings.
    #[arg(long, default_value_t = 0)]
    interval_us: u64,
    /// One ping at the start, nothing, one ping at the end.
    #[arg(long)]
    idle: bool,
    /// Look every 10 ms whether addresses, flags and options of the socket are what they were.
    #[arg(long)]
    names: bool,
    /// Something about the socket that must keep it where it is.
    #[arg(long, value_enum)]
    odd: Option<Odd>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Odd {
    /// A reference to it is on its way through a Unix socket.
    InFlight,
    /// A BPF filter is attached to it.
    Filter,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Io {
    Blocking,
    Poll,
    Select,
    Epoll,
    EpollEt,
    EpollOneshot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Side {
    Server,
    Client,
}

/// What threads and child processes have in common; lives in memory shared between the processes.
#[derive(Default)]
pub struct Shared {
    /// No more new frames: send the last one.
    pub ending: AtomicBool,
    /// Both last frames have gone their way.
    pub finished: AtomicBool,
    pub received: AtomicU64,
    pub received_digest: AtomicU64,
    pub names_checked: AtomicU64,
}

/// When this side ends by itself: only the client does, the server follows it.
pub struct End {
    at: Option<Instant>,
    pub bytes: u64,
}

impl End {
    pub fn reached(&self, bytes: u64) -> bool {
        bytes >= self.bytes || self.at.is_some_and(|at| Instant::now() >= at)
    }
}

/// One connection, ready to talk.
struct Connection {
    fds: Fds,
    before: socket::Looks,
    shared: &'static Shared,
    /// The child process that does the reading.
    reader: Option<Pid>,
    /// What makes it odd, open to the end.
    _odd: Option<Option<(UnixStream, UnixStream)>>,
}

fn main() {
    let options = Options::parse();
    let (side, sockets) = match (options.server, options.client) {
        (Some(address), _) => {
            let delay = Duration::from_millis(options.accept_delay_ms);
            let listening = || say(json!({"event": "listening"}));
            (Side::Server, socket::accept(address, options.connections, delay, listening))
        }
        (_, Some(address)) => {
            let connect = |_| socket::connect(address, options.io != Io::Blocking);
            (Side::Client, (0..options.connections).map(connect).collect())
        }
        (None, None) => unreachable!("clap asks for one of the two"),
    };
    let started = Instant::now();
    let mut connections: Vec<Connection> = sockets.into_iter().map(|fd| prepare(&options, fd)).collect();
    // Processes first: a child of a process with threads would have to be careful.
    let holders = company::fork_holders(options.fork);
    if options.fork_reader {
        for connection in &mut connections {
            let reader = company::fork_reader(&connection.fds, side == Side::Server, connection.shared);
            connection.reader = Some(reader);
        }
    }
    let in_use = threads_in_use(options.io) * connections.len();
    let everything = company::shared_memory();
    let others = options.threads.saturating_sub(in_use);
    let company = company::Threads::start(others, options.idle_threads, everything);
    if options.until_eof && side == Side::Client && !options.idle {
        let all: Vec<_> = connections.iter().map(|connection| connection.shared).collect();
        std::thread::spawn(move || {
            wait_for_eof();
            all.into_iter().for_each(|shared| shared.ending.store(true, Ordering::Relaxed));
        });
    }
    let outcomes: Vec<Value> = std::thread::scope(|scope| {
        let talk = |connection| {
            let options = &options;
            scope.spawn(move || talk(options, side, connection, started))
        };
        let talking: Vec<_> = connections.iter().map(talk).collect();
        let joined = |thread: ScopedJoinHandle<Value>| thread.join().unwrap_or_else(|_| fail!("a panic"));
        talking.into_iter().map(joined).collect()
    });
    everything.finished.store(true, Ordering::Relaxed);
    company.join();
    company::release(holders);

    for (mut outcome, connection) in outcomes.into_iter().zip(&connections) {
        outcome["event"] = "done".into();
        outcome["seconds"] = started.elapsed().as_secs_f64().into();
        outcome["names_checked"] = connection.shared.names_checked.load(Ordering::Relaxed).into();
        say(outcome);
    }
}

fn prepare(options: &Options, fd: OwnedFd) -> Connection {
    if options.io != Io::Blocking {
        socket::set_nonblocking(&fd);
    }
    if options.names {
        socket::set_options(&fd);
    }
    let odd = options.odd.map(|odd| socket::make_odd(&fd, odd));
    let before = socket::Looks::of(&fd);
    say(
        json!({"event": "connected", "local": before.local.to_string(), "remote": before.remote.to_string()}),
    );
    let fds = socket::duplicates(fd, options.dup);
    Connection { fds, before, shared: company::shared_memory(), reader: None, _odd: odd }
}

/// All that is said on a connection.
fn talk(options: &Options, side: Side, connection: &Connection, started: Instant) -> Value {
    let Connection { fds, before, shared, .. } = connection;
    let last = Duration::try_from_secs_f64(options.seconds).ok().and_then(|last| started.checked_add(last));
    let end = match side {
        Side::Client => End { at: last, bytes: options.bytes },
        Side::Server => End { at: None, bytes: u64::MAX },
    };
    let outcome = std::thread::scope(|scope| {
        if options.names {
            scope.spawn(|| socket::watch(&fds[0], before, shared));
        }
        if let Some(limit) = options.stuck_after.filter(|_| !options.idle) {
            scope.spawn(move || watch_progress(Duration::from_secs(limit), shared));
        }
        let outcome = if options.idle {
            pings::idle(fds, side == Side::Client, options.until_eof, &end, shared)
        } else if options.pings {
            pings::run(fds, side == Side::Client, &end, options.interval_us, shared)
        } else {
            let silent = options.speak_first.is_some_and(|first| first != side);
            let job = transfer::Job {
                fds,
                server: side == Side::Server,
                end,
                silent_until_spoken_to: silent,
                pause: Duration::from_millis(options.pause_ms),
                shared,
            };
            transfer::run(job, options.io, connection.reader)
        };
        shared.finished.store(true, Ordering::Relaxed);
        outcome
    });
    socket::part(&fds[0]);
    outcome
}

/// Fails when nothing comes for so long. Counted in looks, not by the clock: while the machine stands still, nobody
/// looks.
fn watch_progress(limit: Duration, shared: &Shared) {
    const LOOK: Duration = Duration::from_millis(100);
    let (mut seen, mut looks) = (0, 0);
    while !shared.finished.load(Ordering::Relaxed) {
        let received = shared.received.load(Ordering::Relaxed);
        looks = if received == seen { looks + 1 } else { 0 };
        seen = received;
        if LOOK * looks > limit {
            fail!("stuck: nothing received for {limit:?} after {seen} bytes");
        }
        company::nanosleep(LOOK);
    }
}

fn threads_in_use(io: Io) -> usize {
    if io == Io::Blocking { 2 } else { 1 }
}

/// Standard input is a pipe that nobody writes to: a blocking read that ends when the other end is closed.
pub fn wait_for_eof() {
    let mut byte = [0];
    match std::io::stdin().lock().read(&mut byte) {
        Ok(0) => (),
        other => fail!("the end of standard input expected, {other:?} received"),
    }
}

fn say(line: serde_json::Value) {
    println!("{line}");
}

/// The descriptors of the one socket; input and output take them in turn.
pub type Fds = Vec<OwnedFd>;
