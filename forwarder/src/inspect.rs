// SPDX-License-Identifier: Apache-2.0
//! Looks at sockets through `bpf/inspect.bpf.c`: what holds them and how far their sequence numbers are.
//!
//! Looking changes nothing. The programs are never attached to anything: each look, at a handful of sockets or descriptors, is
//! one `BPF_PROG_TEST_RUN`, a few microseconds, in the context of the calling thread, on descriptors of this process. The list
//! of all descriptors is a `task_file` iterator.

pub mod sleep;

use std::{
    io::{BufRead, BufReader, Read},
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroU64,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use libbpf_rs::{
    Iter, Link, MapCore, MapFlags, MapHandle, libbpf_sys,
    skel::{OpenSkel, SkelBuilder},
};

#[allow(
    clippy::all,
    clippy::unwrap_used,
    clippy::undocumented_unsafe_blocks,
    clippy::expect_used,
    unused_imports
)]
mod skeleton {
    include!(concat!(env!("OUT_DIR"), "/inspect.skel.rs"));
}
use skeleton::types;

use crate::process::RemoteFd;

/// Why a look failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    #[error(
        "the BPF programs that inspect sockets and threads cannot be loaded: {0} (CAP_BPF, CAP_PERFMON and a kernel with BTF are needed)"
    )]
    Load(#[source] libbpf_rs::Error),
    #[error("running a BPF program on a descriptor failed: {0}")]
    Run(#[source] std::io::Error),
    #[error("reading a BPF map failed: {0}")]
    Map(#[source] libbpf_rs::Error),
    #[error("listing descriptors by a BPF iterator failed: {0}")]
    List(#[source] std::io::Error),
    #[error("more than {SLOTS} transactions at once")]
    NoSlot,
    #[error("a record of {received} bytes came from a BPF program, {expected} expected")]
    ShortRecord { received: usize, expected: usize },
}

/// A registration of a socket in an epoll set, as given to epoll_ctl(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watcher {
    /// Which epoll set: the same number as in [`Descriptor::epoll`].
    pub epoll: u64,
    pub fd: u32,
    pub events: u32,
    pub data: u64,
}

/// Stands for all options of a socket but the sizes of its buffers: another for each other set of them (`bpf/options.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionsMark(NonZeroU64);

/// A TCP socket, seen at one moment.
#[derive(Clone, Debug)]
pub struct SocketFacts {
    /// Names the open file, for comparison only.
    pub file: u64,
    /// References to the open file, the descriptor used for looking included.
    pub refs: u64,
    pub inode: u64,
    /// None: this kernel keeps some of them where nobody looks.
    pub options: Option<OptionsMark>,
    pub netns: u32,
    pub v6: bool,
    pub state: u32,
    pub write_seq: u32,
    pub snd_una: u32,
    pub rcv_nxt: u32,
    pub copied_seq: u32,
    /// Bytes that the peer was told it may still send.
    pub receive_window: u32,
    /// RCV_SHUTDOWN | SEND_SHUTDOWN.
    pub shutdown: u32,
    pub urgent: bool,
    pub mptcp: bool,
    pub ulp: bool,
    pub filter: bool,
    pub signature: bool,
    pub repair: bool,
    pub watchers: Vec<Watcher>,
    /// More registrations than can be reported.
    pub watchers_left_out: bool,
}

impl SocketFacts {
    /// Acknowledged by the kernel, and not read by the application yet.
    pub fn unread_bytes(&self) -> u64 {
        u64::from(self.rcv_nxt.wrapping_sub(self.copied_seq))
    }

    /// Written by the application, and not acknowledged by the peer's kernel yet.
    pub fn unacknowledged_bytes(&self) -> u32 {
        self.write_seq.wrapping_sub(self.snd_una)
    }

    /// The more of both.
    pub fn queued_bytes(&self) -> u32 {
        self.unacknowledged_bytes().max(self.unread_bytes() as u32)
    }
}

/// The descriptor table of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableFacts {
    /// Names the table, for comparison only.
    pub table: u64,
    /// Threads that use it.
    pub users: u32,
}

/// A descriptor of another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdFacts {
    /// As [`SocketFacts::file`].
    pub file: u64,
    /// If it is an epoll set: which, as [`Watcher::epoll`].
    pub epoll: Option<u64>,
    pub close_on_exec: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    Epoll,
    IoUring,
}

/// One descriptor of some process.
#[derive(Clone, Debug)]
pub struct Descriptor {
    pub kind: Kind,
    pub file: u64,
    pub table: u64,
    pub inode: u64,
    pub epoll: u64,
    /// The process's cgroup and its ancestors, up to the root or zero.
    pub cgroups: [u64; 12],
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub tgid: i32,
    pub tid: i32,
    pub fd: i32,
    pub netns: u32,
    pub v6: bool,
    pub state: u32,
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// TCP_ESTABLISHED and TCP_LISTEN of `include/net/tcp_states.h`.
pub const TCP_ESTABLISHED: u32 = 1;
pub const TCP_LISTEN: u32 = 10;

/// Bytes that one read of a list takes: more than the kernel gives at once.
const LISTED_AT_ONCE: usize = 64 << 10;

/// So many are looked at by one run of a program: as in C.
const LOOKED_AT_ONCE: usize = size_of::<types::sockets_facts>() / size_of::<types::socket_facts>();

/// Size of the result maps: `MAX_SLOTS` in C.
const SLOTS: u32 = 64;

/// The loaded programs. One for the process; each transaction takes an [`Inspector`].
pub struct Programs {
    inspect_sockets: OwnedFd,
    inspect_table: OwnedFd,
    inspect_fds: OwnedFd,
    sockets: MapHandle,
    tables: MapHandle,
    fds: MapHandle,
    descriptors: Link,
    sleep: sleep::Programs,
    used_slots: AtomicU64,
}

// SAFETY: `Link` holds a raw pointer and is therefore neither Send nor Sync by itself; after construction it is only
// read for its file descriptor (`Iter::new`), which libbpf does without touching shared state. Everything else here
// is a file descriptor or an atomic.
unsafe impl Send for Programs {}
// SAFETY: as above.
unsafe impl Sync for Programs {}

impl Programs {
    /// Load the programs into the kernel.
    pub fn load() -> Result<Arc<Programs>, InspectError> {
        let mut object = MaybeUninit::uninit();
        let skel = skeleton::InspectSkelBuilder::default()
            .open(&mut object)
            .and_then(|open| open.load())
            .map_err(InspectError::Load)?;
        let keep =
            |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(|error| InspectError::Load(error.into()));
        Ok(Arc::new(Programs {
            inspect_sockets: keep(skel.progs.inspect_sockets.as_fd())?,
            inspect_table: keep(skel.progs.inspect_table.as_fd())?,
            inspect_fds: keep(skel.progs.inspect_fds.as_fd())?,
            sockets: MapHandle::try_from(&skel.maps.sockets).map_err(InspectError::Load)?,
            tables: MapHandle::try_from(&skel.maps.tables).map_err(InspectError::Load)?,
            fds: MapHandle::try_from(&skel.maps.fds).map_err(InspectError::Load)?,
            descriptors: skel
                .progs
                .list_descriptors
                .attach_iter_with_opts(libbpf_rs::IterOpts::None)
                .map_err(InspectError::Load)?,
            sleep: sleep::Programs::load()?,
            used_slots: AtomicU64::new(0),
        }))
    }

    /// Every TCP socket, epoll set and io_uring in every other process, descriptor by descriptor. (A child of ours, see
    /// [`crate::child`], has our descriptors, and is no holder of them.) Takes a microsecond for each: not to be called
    /// while anything is frozen.
    pub fn descriptors(&self) -> Result<Vec<Descriptor>, InspectError> {
        let iter =
            Iter::new(&self.descriptors).map_err(|error| InspectError::List(std::io::Error::other(error)))?;
        let mut reader = BufReader::with_capacity(LISTED_AT_ONCE, iter);
        let mut record = [0; size_of::<types::descriptor>()];
        let mut listed = Vec::new();
        while !reader.fill_buf().map_err(InspectError::List)?.is_empty() {
            reader.read_exact(&mut record).map_err(InspectError::List)?;
            listed.push(copy_record::<types::descriptor>(&record)?.into());
        }
        Ok(listed)
    }

    /// A place to look from.
    pub fn inspector(self: &Arc<Self>) -> Result<Inspector, InspectError> {
        let mut used = self.used_slots.load(Ordering::Relaxed);
        loop {
            let slot = (!used).trailing_zeros();
            if slot >= SLOTS {
                return Err(InspectError::NoSlot);
            }
            match self.used_slots.compare_exchange(
                used,
                used | 1 << slot,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Ok(Inspector { programs: Arc::clone(self), slot }),
                Err(now) => used = now,
            }
        }
    }
}

/// Looks; does not wait for anything.
pub struct Inspector {
    programs: Arc<Programs>,
    slot: u32,
}

impl Drop for Inspector {
    fn drop(&mut self) {
        self.programs.used_slots.fetch_and(!(1 << self.slot), Ordering::AcqRel);
    }
}

impl Inspector {
    /// What `fd`, a descriptor of this process, refers to; `None` if it is no TCP socket.
    pub fn socket(&self, fd: BorrowedFd<'_>) -> Result<Option<SocketFacts>, InspectError> {
        Ok(self.sockets(&[fd])?.pop().flatten())
    }

    /// [`Inspector::socket`] of many, one for each.
    pub fn sockets(&self, fds: &[BorrowedFd<'_>]) -> Result<Vec<Option<SocketFacts>>, InspectError> {
        let mut seen = Vec::with_capacity(fds.len());
        for some in fds.chunks(LOOKED_AT_ONCE) {
            let [a, b, c, d] = packed(some.iter().map(|fd| fd.as_raw_fd()));
            let args = [u64::from(self.slot), some.len() as u64, a, b, c, d];
            self.run(&self.programs.inspect_sockets, &args)?;
            let record: types::sockets_facts = self.result(&self.programs.sockets)?;
            let found = record.of.iter().take(some.len());
            seen.extend(found.map(|facts| (facts.is_tcp != 0).then(|| SocketFacts::from(facts))));
        }
        Ok(seen)
    }

    /// The descriptor table of the process behind `pidfd`; `None` if it has none any more.
    pub fn table(&self, pidfd: BorrowedFd<'_>) -> Result<Option<TableFacts>, InspectError> {
        if !self.run(&self.programs.inspect_table, &self.process(pidfd))? {
            return Ok(None);
        }
        let record: types::table_facts = self.result(&self.programs.tables)?;
        Ok((record.table != 0).then_some(TableFacts { table: record.table, users: record.users }))
    }

    /// These descriptors of the process behind `pidfd`, one for each; `None` if one is not open.
    pub fn fds(&self, pidfd: BorrowedFd<'_>, fds: &[RemoteFd]) -> Result<Vec<Option<FdFacts>>, InspectError> {
        let mut seen = Vec::with_capacity(fds.len());
        for some in fds.chunks(LOOKED_AT_ONCE) {
            let [a, b, c, d] = packed(some.iter().map(|fd| fd.0));
            let [slot, pidfd] = self.process(pidfd);
            self.run(&self.programs.inspect_fds, &[slot, pidfd, some.len() as u64, a, b, c, d])?;
            let record: types::fds_facts = self.result(&self.programs.fds)?;
            let found = record.of.iter().take(some.len());
            seen.extend(found.map(|facts| {
                (facts.file != 0).then_some(FdFacts {
                    file: facts.file,
                    epoll: (facts.epoll != 0).then_some(facts.epoll),
                    close_on_exec: facts.close_on_exec != 0,
                })
            }));
        }
        Ok(seen)
    }

    /// What a program needs to look at the process behind `pidfd`.
    fn process(&self, pidfd: BorrowedFd<'_>) -> [u64; 2] {
        [u64::from(self.slot), pidfd.as_raw_fd() as u64]
    }

    /// False where the program found nothing to look at.
    fn run(&self, program: &OwnedFd, args: &[u64]) -> Result<bool, InspectError> {
        let mut opts = libbpf_sys::bpf_test_run_opts {
            sz: size_of::<libbpf_sys::bpf_test_run_opts>() as _,
            ctx_in: args.as_ptr().cast(),
            ctx_size_in: size_of_val(args) as u32,
            ..Default::default()
        };
        let program: RawFd = program.as_raw_fd();
        // SAFETY: `opts` says its own size, and `ctx_in` points to `args`, which outlives the call.
        let ret = unsafe { libbpf_sys::bpf_prog_test_run_opts(program, &mut opts) };
        if ret != 0 {
            return Err(InspectError::Run(std::io::Error::from_raw_os_error(-ret)));
        }
        Ok(opts.retval == 0)
    }

    fn result<T: Record>(&self, map: &MapHandle) -> Result<T, InspectError> {
        let bytes = map
            .lookup(&self.slot.to_ne_bytes(), MapFlags::ANY)
            .map_err(InspectError::Map)?
            .unwrap_or_default();
        copy_record(&bytes)
    }
}

/// A C struct of `bpf/inspect.h`: fixed-width integers only, so that every byte pattern is a value of it.
///
/// # Safety
/// The type must have no padding, pointer, reference, bool or enum.
unsafe trait Record: Copy {}
// SAFETY: integers and arrays of integers, padding explicit.
unsafe impl Record for types::sockets_facts {}
// SAFETY: as above.
unsafe impl Record for types::table_facts {}
// SAFETY: as above.
unsafe impl Record for types::fds_facts {}
// SAFETY: as above.
unsafe impl Record for types::descriptor {}

/// Two descriptors in each word, the lower half first.
fn packed(fds: impl Iterator<Item = RawFd>) -> [u64; LOOKED_AT_ONCE / 2] {
    let mut words = [0; LOOKED_AT_ONCE / 2];
    for (index, fd) in fds.enumerate() {
        words[index / 2] |= u64::from(fd as u32) << (index % 2 * 32);
    }
    words
}

fn copy_record<T: Record>(bytes: &[u8]) -> Result<T, InspectError> {
    if bytes.len() < size_of::<T>() {
        return Err(InspectError::ShortRecord { received: bytes.len(), expected: size_of::<T>() });
    }
    // SAFETY: long enough by the check above, any bytes are a value by `Record`, and the read is unaligned.
    Ok(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

impl From<&types::socket_facts> for SocketFacts {
    fn from(facts: &types::socket_facts) -> Self {
        let watchers = facts.watchers.iter().take(facts.watcher_count as usize).map(|watcher| Watcher {
            epoll: watcher.epoll,
            fd: watcher.fd,
            events: watcher.events,
            data: watcher.data,
        });
        SocketFacts {
            file: facts.file,
            refs: facts.refs,
            inode: facts.inode,
            options: NonZeroU64::new(facts.options).map(OptionsMark),
            netns: facts.netns,
            v6: facts.family == libc::AF_INET6 as u32,
            state: facts.state,
            write_seq: facts.write_seq,
            snd_una: facts.snd_una,
            rcv_nxt: facts.rcv_nxt,
            copied_seq: facts.copied_seq,
            receive_window: facts.receive_window,
            shutdown: facts.shutdown,
            urgent: facts.urgent != 0,
            mptcp: facts.is_mptcp != 0,
            ulp: facts.has_ulp != 0,
            filter: facts.has_filter != 0,
            signature: facts.has_signature != 0,
            repair: facts.repair != 0,
            watchers: watchers.collect(),
            watchers_left_out: facts.watchers_left_out != 0,
        }
    }
}

impl From<types::descriptor> for Descriptor {
    fn from(found: types::descriptor) -> Self {
        let v6 = found.family == libc::AF_INET6 as u32;
        let address = |bytes: [u8; 16], port: u32| {
            let ip = if v6 {
                Ipv6Addr::from(bytes).to_canonical()
            } else {
                IpAddr::V4(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]))
            };
            SocketAddr::new(ip, port as u16)
        };
        Descriptor {
            kind: match found.kind {
                2 => Kind::Epoll,
                3 => Kind::IoUring,
                _ => Kind::Tcp,
            },
            file: found.file,
            table: found.table,
            inode: found.inode,
            epoll: found.epoll,
            cgroups: found.cgroups,
            bytes_sent: found.bytes_sent,
            bytes_received: found.bytes_received,
            tgid: found.tgid as i32,
            tid: found.tid as i32,
            fd: found.fd as i32,
            netns: found.netns,
            v6,
            state: found.state,
            local: address(found.local, found.local_port),
            remote: address(found.remote, found.remote_port),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    #[test]
    fn every_duplicate_of_a_descriptor_is_a_reference() {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let (client, _server) = pair();
        assert_eq!(inspector.socket(client.as_fd()).unwrap().unwrap().refs, 1);
        let _second = client.try_clone().unwrap();
        assert_eq!(inspector.socket(client.as_fd()).unwrap().unwrap().refs, 2);
    }

    #[test]
    fn sequence_numbers_of_two_quiet_ends_agree() {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let (client, server) = pair();
        std::io::Write::write_all(&mut &client, b"hello").unwrap();
        let look = |end: &TcpStream| inspector.socket(end.as_fd()).unwrap().unwrap();
        while look(&client).snd_una != look(&client).write_seq {}
        let (client, server) = (look(&client), look(&server));
        assert_eq!(client.write_seq, server.rcv_nxt);
        assert_eq!(server.write_seq, client.rcv_nxt);
        assert_eq!(server.rcv_nxt.wrapping_sub(server.copied_seq), 5);
    }

    #[test]
    fn many_are_looked_at_in_their_order_and_what_is_no_socket_is_none() {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let mut pairs: Vec<_> = (0..LOOKED_AT_ONCE).map(|_| pair()).collect();
        let file = std::fs::File::open("/dev/null").unwrap();
        pairs.extend((0..3).map(|_| pair()));
        let mut fds: Vec<BorrowedFd<'_>> = pairs.iter().map(|(client, _)| client.as_fd()).collect();
        fds.insert(LOOKED_AT_ONCE - 1, file.as_fd());
        let files = |seen: Vec<Option<SocketFacts>>| seen.into_iter().map(|facts| Some(facts?.file));
        let at_once: Vec<_> = files(inspector.sockets(&fds).unwrap()).collect();
        let singly: Vec<_> = files(fds.iter().map(|fd| inspector.socket(*fd).unwrap()).collect()).collect();
        assert_eq!(at_once, singly);
        assert_eq!(at_once.iter().position(Option::is_none), Some(LOOKED_AT_ONCE - 1));
        assert_eq!(at_once.iter().flatten().count(), pairs.len());
    }

    #[test]
    fn descriptors_of_another_process_are_looked_at_in_their_order() {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let (client, server) = pair();
        let of = |socket: &TcpStream| inspector.socket(socket.as_fd()).unwrap().unwrap().file;
        let files = (of(&client), of(&server));
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(client))
            .stdout(OwnedFd::from(server))
            .spawn()
            .unwrap();
        let pidfd = crate::process::pidfd(crate::process::Tgid(other.id() as i32)).unwrap();
        let fds: Vec<RemoteFd> = [0, 1, 999, 0, 0, 0, 0, 0, 1].map(RemoteFd).to_vec();
        let seen = inspector.fds(pidfd.as_fd(), &fds).unwrap();
        other.kill().unwrap();
        other.wait().unwrap();
        let seen: Vec<_> = seen.into_iter().map(|facts| Some(facts?.file)).collect();
        let (first, second) = (Some(files.0), Some(files.1));
        assert_eq!(seen, [first, second, None, first, first, first, first, first, second]);
    }

    #[test]
    fn epoll_registrations_are_seen_with_their_events_and_data() {
        use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
        let programs = Programs::load().unwrap();
        let (client, _server) = pair();
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        epoll.add(&client, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 77)).unwrap();
        let facts = programs.inspector().unwrap().socket(client.as_fd()).unwrap().unwrap();
        assert_eq!(facts.watchers.len(), 1);
        let watcher = facts.watchers[0];
        assert_eq!(watcher.data, 77);
        assert_eq!(watcher.fd as i32, client.as_raw_fd());
        assert_eq!(watcher.events & 1, 1);
        let other = std::process::Command::new("sleep")
            .arg("60")
            .stdin(OwnedFd::from(client))
            .stdout(epoll.0)
            .spawn();
        let mut other = other.unwrap();
        let listed = programs.descriptors().unwrap();
        let (holder, me) = (other.id() as i32, std::process::id() as i32);
        other.kill().unwrap();
        other.wait().unwrap();
        let held = |fd: i32| listed.iter().find(|d| d.tgid == holder && d.fd == fd).unwrap();
        assert_eq!((held(0).kind, held(0).file), (Kind::Tcp, facts.file));
        assert_eq!((held(1).kind, held(1).epoll), (Kind::Epoll, watcher.epoll));
        assert!(listed.iter().all(|d| d.tgid != me));
    }

    #[test]
    fn the_users_of_a_descriptor_table_are_its_threads() {
        let inspector = Programs::load().unwrap().inspector().unwrap();
        let child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = crate::process::pidfd(crate::process::Tgid(child.id() as i32)).unwrap();
        let facts = inspector.table(pidfd.as_fd()).unwrap().unwrap();
        let mut child = child;
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(facts.users, 1);
    }
}
