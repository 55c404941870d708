// SPDX-License-Identifier: Apache-2.0
//! Sees the TCP connections that this host's containers make and accept, and the end of host sockets.
//!
//! fexit programs where the kernel allows them: they cost nothing elsewhere. Otherwise syscall tracepoints, which put
//! every system call of the host on the slow path. Connections older than the programs are found by scanning.

#[cfg(test)]
mod tests;

use std::{
    io,
    mem::MaybeUninit,
    net::SocketAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use forwarder_api::SocketInode;
use libbpf_rs::{
    Link, MapCore, MapFlags, MapHandle, RingBuffer, RingBufferBuilder,
    skel::{OpenSkel, SkelBuilder},
};
use tokio::sync::mpsc;

use crate::{
    bytes::{Plain, from_bytes, unmapped},
    identity::Identity,
};

#[allow(
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::expect_used,
    dead_code
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/connect.skel.rs"));
}
use skeleton::{ConnectSkel, ConnectSkelBuilder, OpenConnectSkel, types};

/// `bpf/event.h`
const EVENT_CONNECTION: u32 = 1;
const EVENT_HOST_SOCKET_CLOSED: u32 = 2;
const SIDE_CLIENT: u8 = 1;
const COUNTERS: u32 = 3;

/// How long the reader sleeps before it looks whether it is to stop.
const POLL: Duration = Duration::from_millis(200);

/// What the programs tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceEvent {
    Connection(Connection),
    /// The host socket that the swap of this number installed has left ESTABLISHED.
    HostSocketClosed(u64),
}

/// Which end of the connection this host's container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    Client,
    Server,
}

/// A connection that a container of this host has made or accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    pub side: Side,
    pub tgid: u32,
    pub tid: u32,
    pub fd: u32,
    pub socket: SocketInode,
    /// Of the task, in the v2 hierarchy.
    pub cgroup_id: u64,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// v4-mapped addresses already turned into v4.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// The socket's family is AF_INET6, also where the addresses are v4-mapped.
    pub v6: bool,
    pub comm: String,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("the tracing programs cannot be loaded: {0}")]
    Load(libbpf_rs::Error),
    #[error(
        "the tracing programs cannot be attached: {0}; where fexit programs are not allowed, tracefs must be mounted (mount -t tracefs nodev /sys/kernel/tracing) and the kernel have syscall tracepoints (CONFIG_FTRACE_SYSCALLS=y)"
    )]
    Attach(libbpf_rs::Error),
    #[error("the ring buffer of the tracing programs cannot be read: {0}")]
    Ring(libbpf_rs::Error),
    #[error("the thread that reads the ring buffer cannot be started: {0}")]
    Thread(io::Error),
    #[error("the cgroup {path}: {source}; give the directory of a cgroup2 mount with --cgroup", path = path.display())]
    Scope { path: PathBuf, source: io::Error },
}

/// A cgroup subtree, as BPF compares it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The inode number of its directory.
    pub cgroup_id: u64,
    /// Its depth below the root of the v2 hierarchy.
    pub level: u32,
}

impl Scope {
    /// The subtree whose top is the directory `path`.
    pub fn of(path: &Path) -> Result<Scope, TraceError> {
        let wrong = |source| TraceError::Scope { path: path.to_owned(), source };
        let path = path.canonicalize().map_err(wrong)?;
        let top = std::fs::metadata(&path).map_err(wrong)?;
        // Directories above on the same file system are those of the hierarchy; its root has a parent elsewhere.
        let mut level = 0;
        let mut above = path.parent();
        while let Some(directory) = above {
            if std::fs::metadata(directory).map_err(wrong)?.dev() != top.dev() {
                break;
            }
            level += 1;
            above = directory.parent();
        }
        Ok(Scope { cgroup_id: top.ino(), level })
    }
}

/// Which set of programs is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Fexit,
    Tracepoints,
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Fexit => "fexit",
            Mode::Tracepoints => "tracepoints",
        })
    }
}

/// The attached programs. Dropping it detaches them.
pub struct Tracer {
    mode: Mode,
    counters: MapHandle,
    lost_here: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    _links: Vec<Link>,
}

impl Tracer {
    /// Load, attach, and send what is seen. When `events` is full, what does not fit is lost and counted.
    pub fn start(
        scope: &Scope,
        identity: &Identity,
        events: mpsc::Sender<TraceEvent>,
    ) -> Result<Tracer, TraceError> {
        let mut object = MaybeUninit::uninit();
        if let Err(error) = load(scope, identity, Mode::Fexit, &mut object)
            .and_then(|skel| attach(&skel, Mode::Fexit).map_err(TraceError::Attach).map(drop))
        {
            log::debug!("fexit programs are not allowed here: {error}");
            object = MaybeUninit::uninit();
            let skel = load(scope, identity, Mode::Tracepoints, &mut object)?;
            return Tracer::read(&skel, Mode::Tracepoints, events);
        }
        object = MaybeUninit::uninit();
        let skel = load(scope, identity, Mode::Fexit, &mut object)?;
        Tracer::read(&skel, Mode::Fexit, events)
    }

    fn read(
        skel: &ConnectSkel<'_>,
        mode: Mode,
        events: mpsc::Sender<TraceEvent>,
    ) -> Result<Tracer, TraceError> {
        let (stop, lost_here) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let map = MapHandle::try_from(&skel.maps.events).map_err(TraceError::Ring)?;
        let counters = MapHandle::try_from(&skel.maps.counters).map_err(TraceError::Ring)?;
        let links = attach(skel, mode).map_err(TraceError::Attach)?;
        let (stopped, lost) = (Arc::clone(&stop), Arc::clone(&lost_here));
        let reader = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || {
                if let Err(error) = read_until(&stopped, &map, &events, &lost) {
                    log::error!("new connections are not seen any more: {error}");
                }
            })
            .map_err(TraceError::Thread)?;
        Ok(Tracer { mode, counters, lost_here, stop, reader: Some(reader), _links: links })
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Records lost so far, for want of room in a map or in the channel.
    pub fn drops(&self) -> u64 {
        let in_kernel = |counter: u32| -> u64 {
            let values = self.counters.lookup_percpu(&counter.to_ne_bytes(), MapFlags::ANY);
            let of_cpu = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(0, u64::from_ne_bytes);
            values.ok().flatten().iter().flatten().map(of_cpu).sum()
        };
        self.lost_here.load(Ordering::Relaxed) + (0..COUNTERS).map(in_kernel).sum::<u64>()
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn load<'obj>(
    scope: &Scope,
    identity: &Identity,
    mode: Mode,
    object: &'obj mut MaybeUninit<libbpf_rs::OpenObject>,
) -> Result<ConnectSkel<'obj>, TraceError> {
    let mut open = ConnectSkelBuilder::default().open(object).map_err(TraceError::Load)?;
    if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
        rodata.scope_cgroup_id = scope.cgroup_id;
        rodata.scope_level = scope.level;
        rodata.own_tgid = std::process::id();
    }
    open.maps.identities.reuse_fd(identity.map()).map_err(TraceError::Load)?;
    choose(&mut open, mode);
    open.load().map_err(TraceError::Load)
}

fn choose(open: &mut OpenConnectSkel<'_>, mode: Mode) {
    let fexit = mode == Mode::Fexit;
    let programs = &mut open.progs;
    programs.connect_fexit.set_autoload(fexit);
    programs.accept_fexit.set_autoload(fexit);
    programs.connect_enter.set_autoload(!fexit);
    programs.connect_exit.set_autoload(!fexit);
    programs.accept_exit.set_autoload(!fexit);
    programs.accept4_exit.set_autoload(!fexit);
}

fn attach(skel: &ConnectSkel<'_>, mode: Mode) -> Result<Vec<Link>, libbpf_rs::Error> {
    let programs = &skel.progs;
    let of_calls = match mode {
        Mode::Fexit => vec![&programs.connect_fexit, &programs.accept_fexit],
        Mode::Tracepoints => {
            vec![
                &programs.connect_enter,
                &programs.connect_exit,
                &programs.accept_exit,
                &programs.accept4_exit,
            ]
        }
    };
    // The changes of state come first: a connect that begins in between is seen there, or not at all.
    [&programs.state_changes].into_iter().chain(of_calls).map(|program| program.attach()).collect()
}

fn read_until(
    stop: &AtomicBool,
    map: &MapHandle,
    events: &mpsc::Sender<TraceEvent>,
    lost: &AtomicU64,
) -> Result<(), libbpf_rs::Error> {
    let mut builder = RingBufferBuilder::new();
    builder.add(map, |bytes| {
        let sent = decode(bytes).is_some_and(|event| events.try_send(event).is_ok());
        if !sent {
            lost.fetch_add(1, Ordering::Relaxed);
        }
        0
    })?;
    let ring: RingBuffer<'_> = builder.build()?;
    while !stop.load(Ordering::Relaxed) {
        match ring.poll(POLL) {
            Err(error) if error.kind() != libbpf_rs::ErrorKind::Interrupted => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

// SAFETY: of `bpf/event.h`: integers and arrays of bytes, padding explicit.
unsafe impl Plain for types::connection_event {}
// SAFETY: as above.
unsafe impl Plain for types::closed_event {}

/// A record of the ring, unless it is odd.
fn decode(bytes: &[u8]) -> Option<TraceEvent> {
    match u32::from_ne_bytes(*bytes.first_chunk()?) {
        EVENT_CONNECTION => from_bytes(bytes).map(connection),
        EVENT_HOST_SOCKET_CLOSED => {
            from_bytes(bytes).map(|event: types::closed_event| TraceEvent::HostSocketClosed(event.swap))
        }
        _ => None,
    }
}

fn connection(event: types::connection_event) -> TraceEvent {
    let address = |ip, port| SocketAddr::new(unmapped(ip), port);
    let comm = event.comm.split(|byte| *byte == 0).next().unwrap_or_default();
    TraceEvent::Connection(Connection {
        side: if event.side == SIDE_CLIENT { Side::Client } else { Side::Server },
        tgid: event.tgid,
        tid: event.tid,
        fd: event.fd,
        socket: SocketInode(event.socket),
        cgroup_id: event.cgroup_id,
        netns: event.netns,
        local: address(event.local, event.local_port),
        remote: address(event.remote, event.remote_port),
        v6: event.v6 != 0,
        comm: String::from_utf8_lossy(comm).into_owned(),
    })
}
