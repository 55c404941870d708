// SPDX-License-Identifier: Apache-2.0
//! Sees the TCP connections that this host's containers make and accept once they are old enough ([`After`]), the end of
//! host sockets, and that they time out.
//!
//! One thread reads what the programs tell. While connections are young it looks at them every few milliseconds, else
//! it sleeps; those that end young cost it nothing. Connections older than the programs are found by scanning.

mod reader;
#[cfg(test)]
mod tests;
mod young;

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::{fd::BorrowedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Instant,
};

use forwarder_api::SocketInode;
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use mio::{Poll, Waker};
use tokio::sync::{mpsc, watch};

use crate::{identity::Names, rules::RuleSet};

/// `bpf/event.h`
const COUNTERS: u32 = 2;

/// What the programs tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceEvent {
    Connection(Connection),
    /// The host socket with these names has left ESTABLISHED.
    HostSocketClosed(Names),
    /// A host socket has timed out for the second time in a row, and others may have in the 50 ms after it, of which nothing is
    /// told.
    HostSocketWaits,
}

/// Which end of the connection this host's container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    Client,
    Server,
}

impl Side {
    pub fn server_and_client(self, local: IpAddr, remote: IpAddr) -> (IpAddr, IpAddr) {
        match self {
            Side::Client => (remote, local),
            Side::Server => (local, remote),
        }
    }
}

/// A connection that a container of this host has made or accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    pub side: Side,
    /// Zero where nobody has accepted it yet.
    pub socket: SocketInode,
    /// Where the socket was made, or the one that listens, in the v2 hierarchy.
    pub cgroup_id: u64,
    /// Inode number of the socket's network namespace.
    pub netns: u32,
    /// v4-mapped addresses already turned into v4.
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// The socket's family is AF_INET6, also where the addresses are v4-mapped.
    pub v6: bool,
    /// When it was established, at the latest a moment earlier.
    pub born: Instant,
}

impl Connection {
    pub fn server_and_client(&self) -> (IpAddr, IpAddr) {
        self.side.server_and_client(self.local.ip(), self.remote.ip())
    }
}

/// When connections are told.
pub enum Telling {
    /// When they are established. A server's has no socket yet.
    AtOnce,
    /// When they are old enough by these rules, which may change.
    WhenOldEnough(watch::Receiver<RuleSet>),
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("the tracing programs cannot be loaded: {0}")]
    Load(libbpf_rs::Error),
    #[error(
        "the tracing program (sockops) cannot be attached to the cgroup: {0}; a program there without BPF_F_ALLOW_MULTI keeps others out"
    )]
    Attach(libbpf_rs::Error),
    #[error("the maps of the tracing programs cannot be read: {0}")]
    Map(libbpf_rs::Error),
    #[error("the thread that looks at connections cannot be started: {0}")]
    Thread(io::Error),
    #[error("the thread that looks at connections has ended")]
    ThreadEnded,
    #[error("this process's network namespace cannot be told: {0}")]
    OwnNetns(io::Error),
    #[error("the cgroup {path}: {source}; give the directory of a cgroup2 mount with --cgroup", path = path.display())]
    Scope { path: PathBuf, source: io::Error },
}

/// A cgroup subtree, as BPF compares it, without what lives in the host's own network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    pub path: PathBuf,
    /// The inode number of its directory.
    pub cgroup_id: u64,
    /// Inode number of the network namespace of this process, the host's.
    pub own_netns: u32,
}

impl Scope {
    /// The subtree whose top is the directory `path`.
    pub fn of(path: &Path) -> Result<Scope, TraceError> {
        let wrong = |source| TraceError::Scope { path: path.to_owned(), source };
        let path = path.canonicalize().map_err(wrong)?;
        let cgroup_id = std::fs::metadata(&path).map_err(wrong)?.ino();
        let own_netns = std::fs::metadata("/proc/self/ns/net").map_err(TraceError::OwnNetns)?.ino() as u32;
        Ok(Scope { path, cgroup_id, own_netns })
    }
}

/// The attached programs. Dropping it detaches them.
pub struct Tracer {
    counters: MapHandle,
    lost_here: Arc<AtomicU64>,
    stop: Waker,
    thread: Option<JoinHandle<()>>,
}

impl Tracer {
    /// Load, attach, and send what is seen; `identities` tells which sockets are host sockets. When `events` is full, what
    /// does not fit is lost and counted.
    pub fn start(
        scope: &Scope,
        identities: BorrowedFd<'_>,
        telling: Telling,
        events: mpsc::Sender<TraceEvent>,
    ) -> Result<Tracer, TraceError> {
        let lost_here = Arc::new(AtomicU64::new(0));
        let wake = Poll::new().map_err(TraceError::Thread)?;
        let stop = Waker::new(wake.registry(), reader::STOP).map_err(TraceError::Thread)?;
        let identities = identities.try_clone_to_owned().map_err(TraceError::Thread)?;
        let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
        let task = reader::Task {
            scope: scope.clone(),
            identities,
            telling,
            events,
            wake,
            lost: Arc::clone(&lost_here),
        };
        let thread = std::thread::Builder::new()
            .name("trace".into())
            .spawn(move || task.run(&ready))
            .map_err(TraceError::Thread)?;
        let counters = is_ready.recv().map_err(|_| TraceError::ThreadEnded)??;
        Ok(Tracer { counters, lost_here, stop, thread: Some(thread) })
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
        // An error: it sleeps on, and ends with the process.
        if self.stop.wake().is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
