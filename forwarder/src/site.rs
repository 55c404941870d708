// SPDX-License-Identifier: Apache-2.0
//! What all transactions of this forwarder share: the loaded programs, which processes are reserved, and what is parked.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::{Bytes, BytesMut};
use forwarder_api::{ConnId, Direction, Moved, ParkedConn, PrepareTarget, Refusal, SocketInode};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use smallvec::SmallVec;

use crate::{
    fault::{self, Point},
    holders::{Holders, Listing},
    inspect::{InspectError, Kind, Programs, SocketFacts, TCP_ESTABLISHED},
    options,
    process::{self, RemoteFd, Tgid},
    queue,
    room::Rooms,
};

/// How long transactions may take to end when the forwarder stops.
const CLOSING: Duration = Duration::from_secs(10);

/// How long [`Site::next_ended`] waits, milliseconds.
const ENDED_MS: u16 = 5000;

pub struct Site {
    pub programs: Arc<Programs>,
    pub own: Tgid,
    pub rooms: Rooms,
    /// Rings whenever somebody's turn may have come.
    pub bell: Bell,
    /// Processes that take part in a transaction.
    reserved: Mutex<HashSet<Tgid>>,
    parked: Mutex<BTreeMap<ConnId, Parked>>,
    /// Memory was freed since [`Site::tidy`].
    untidy: AtomicBool,
    /// Prepared, or being moved; true if released since: not to be parked again.
    in_hand: Mutex<HashMap<ConnId, bool>>,
    /// Watches the parked sockets for their end.
    ends: Epoll,
    batches: AtomicU64,
}

/// A swapped connection of this host.
pub struct Parked {
    /// Overlay sockets: one, or two for a connection within this host.
    pub overlay: SmallVec<[OwnedFd; 2]>,
    pub note: Bytes,
    /// With the host sockets that the applications have now.
    pub moved: Moved,
}

/// A connection that may be moved, as far as can be seen without stopping anything.
pub struct Prepared {
    pub conn: ConnId,
    pub direction: Direction,
    pub ends: Vec<PreparedEnd>,
    pub note: Bytes,
    /// Way back only: what was parked. Put back by [`Site::park`] if the transaction is given up.
    pub parked: Option<Parked>,
    site: Arc<Site>,
}

/// One socket that may be moved.
pub struct PreparedEnd {
    /// Our copy of the socket that the applications have.
    pub old: OwnedFd,
    pub holders: Holders,
    pub v6: bool,
    /// What it had written and received when it was looked at: what came since tells how busy it is.
    pub write_seq: u32,
    pub rcv_nxt: u32,
    pub looked_at: Instant,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if let Some(parked) = self.parked.take() {
            self.site.park(self.conn, parked);
        }
        locked(&self.site.in_hand).remove(&self.conn);
    }
}

/// Processes that take part in nothing else until this is dropped.
pub struct Reserved {
    site: Arc<Site>,
    tgids: Vec<Tgid>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut reserved = locked(&self.site.reserved);
        for tgid in &self.tgids {
            reserved.remove(tgid);
        }
        drop(reserved);
        self.site.leave_untidy();
        self.site.bell.ring();
    }
}

/// Wakes those who wait for their turn.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<u64>,
    heard: Condvar,
}

impl Bell {
    pub fn ring(&self) {
        *locked(&self.rung) += 1;
        self.heard.notify_all();
    }

    /// Wait, no longer than `time`, until it has rung once more than `before`. Returns how often it has.
    pub fn wait(&self, before: u64, time: Duration) -> u64 {
        let silent = |rung: &mut u64| *rung == before;
        let waited = self.heard.wait_timeout_while(locked(&self.rung), time, silent);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// All processes that hold a socket of these ends.
pub fn tgids_of<'a>(ends: impl IntoIterator<Item = &'a PreparedEnd>) -> Vec<Tgid> {
    let mut tgids: Vec<Tgid> = ends.into_iter().flat_map(|end| end.holders.tgids.iter().copied()).collect();
    tgids.sort_unstable();
    tgids.dedup();
    tgids
}

impl Site {
    pub fn new(programs: Arc<Programs>) -> nix::Result<Arc<Site>> {
        Ok(Arc::new(Site {
            programs,
            own: Tgid(std::process::id() as i32),
            rooms: Rooms::default(),
            bell: Bell::default(),
            reserved: Mutex::default(),
            parked: Mutex::default(),
            untidy: AtomicBool::new(true),
            in_hand: Mutex::default(),
            ends: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            // Not those of a forwarder before.
            batches: AtomicU64::new(
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_nanos() as u64),
            ),
        }))
    }

    /// A number for a batch.
    pub fn next_batch(&self) -> u64 {
        self.batches.fetch_add(1, Ordering::Relaxed)
    }

    /// All descriptors of this host but our own.
    pub fn listing(&self) -> Result<Listing, Refusal> {
        Ok(Listing::new(self.programs.descriptors().map_err(report)?))
    }

    /// Find who holds the sockets of `target`, and check that they may be moved.
    pub fn prepare(
        self: &Arc<Self>,
        conn: ConnId,
        direction: Direction,
        target: PrepareTarget,
        listing: &Listing,
    ) -> Result<Prepared, Refusal> {
        locked(&self.in_hand).insert(conn, false);
        let mut prepared = Prepared {
            conn,
            direction,
            ends: Vec::new(),
            note: Bytes::new(),
            parked: None,
            site: Arc::clone(self),
        };
        let sockets = match (target, direction) {
            (PrepareTarget::Remote { socket, note }, Direction::ToHost) => {
                prepared.note = note.into();
                vec![socket]
            }
            (PrepareTarget::Local { first, second, note }, Direction::ToHost) => {
                prepared.note = note.into();
                vec![first, second]
            }
            (PrepareTarget::Parked, Direction::ToOverlay) => {
                let parked = self.unpark(conn).ok_or(Refusal::NotParked)?;
                let host = parked.moved.sockets.to_vec();
                prepared.note = parked.note.clone();
                prepared.parked = Some(parked);
                host
            }
            (PrepareTarget::Parked, Direction::ToHost)
            | (PrepareTarget::Remote { .. } | PrepareTarget::Local { .. }, Direction::ToOverlay) => {
                return Err(Refusal::NotParked);
            }
        };
        for socket in sockets {
            prepared.ends.push(self.prepare_end(socket, listing, direction)?);
        }
        Ok(prepared)
    }

    fn prepare_end(
        &self,
        socket: SocketInode,
        listing: &Listing,
        direction: Direction,
    ) -> Result<PreparedEnd, Refusal> {
        let held = listing.descriptor_of(socket.0).ok_or(Refusal::NotEstablished)?;
        let pidfd = process::pidfd(Tgid(held.tgid)).map_err(process::lacking)?;
        let old = process::copy_fd(&pidfd, RemoteFd(held.fd)).map_err(process::lacking)?;
        let inspector = self.programs.inspector().map_err(report)?;
        let facts = inspector.socket(old.as_fd()).map_err(report)?.ok_or(Refusal::HolderVanished)?;
        if facts.inode != socket.0 {
            return Err(Refusal::HolderVanished);
        }
        may_be_moved(&facts)?;
        if direction == Direction::ToHost {
            let own_network =
                process::network_namespace(Tgid(held.tgid)).map_err(|_| Refusal::HolderVanished)?;
            let host_network = process::network_namespace(self.own).map_err(|_| Refusal::HolderVanished)?;
            if facts.netns != own_network || facts.netns == host_network {
                return Err(Refusal::ForeignNamespace);
            }
            options::may_be_carried(old.as_fd())?;
        }
        let holders = listing.holders(facts.file);
        if holders.tgids.iter().any(|tgid| process::is_32_bit(*tgid)) {
            return Err(Refusal::Holder32Bit);
        }
        // There is one foothold, and so one block at a time, in one memory.
        if process::any_share_memory(&holders.tgids) {
            return Err(Refusal::SharedMemory);
        }
        // References are counted when all holders are frozen: until then, calls in progress take some of their own.
        let SocketFacts { v6, write_seq, rcv_nxt, .. } = facts;
        Ok(PreparedEnd { old, holders, v6, write_seq, rcv_nxt, looked_at: Instant::now() })
    }

    /// Memory was needed, and is not any more: there is something to be [tidied](Site::tidy).
    pub fn leave_untidy(&self) {
        self.untidy.store(true, Ordering::Relaxed);
    }

    /// Give back the memory that is free, unless somebody takes part in a transaction. What is parked lies scattered over it, because it came amid moves, each bit keeping a
    /// page: it is put together.
    pub fn tidy(&self) {
        if !locked(&self.reserved).is_empty() || !self.untidy.swap(false, Ordering::Relaxed) {
            return;
        }
        let mut parked = locked(&self.parked);
        // A tree that is collected has full nodes.
        *parked = std::mem::take(&mut *parked).into_iter().collect();
        let mut notes = BytesMut::with_capacity(parked.values().map(|parked| parked.note.len()).sum());
        parked.values().for_each(|parked| notes.extend_from_slice(&parked.note));
        let mut notes = notes.freeze();
        parked.values_mut().for_each(|parked| parked.note = notes.split_to(parked.note.len()));
        drop(parked);
        memory::trim();
    }

    /// None: one of them takes part in something else.
    pub fn reserve(self: &Arc<Self>, tgids: Vec<Tgid>) -> Option<Reserved> {
        let mut reserved = locked(&self.reserved);
        if tgids.iter().any(|tgid| reserved.contains(tgid)) {
            return None;
        }
        reserved.extend(&tgids);
        Some(Reserved { site: Arc::clone(self), tgids })
    }

    pub fn park(&self, conn: ConnId, parked: Parked) {
        if locked(&self.in_hand).get(&conn) == Some(&true) {
            return reset_all(&parked);
        }
        fault::point(Point::Parking);
        let mut all = locked(&self.parked);
        for socket in &parked.overlay {
            let event = EpollEvent::new(EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLONESHOT, conn.0);
            if let Err(error) = self.ends.add(socket, event) {
                log::warn!("{conn}: the end of its overlay connection will not be noticed: {error}");
            }
        }
        all.insert(conn, parked);
    }

    /// The registration goes with it: it would stay with the socket wherever that goes.
    fn unpark(&self, conn: ConnId) -> Option<Parked> {
        let parked = locked(&self.parked).remove(&conn)?;
        for socket in &parked.overlay {
            let _ = self.ends.delete(socket);
        }
        Some(parked)
    }

    /// Close the overlay sockets of a connection that is over, or will be as soon as its transaction is.
    pub fn release(&self, conn: ConnId) -> bool {
        match self.unpark(conn) {
            Some(parked) => {
                reset_all(&parked);
                self.leave_untidy();
                true
            }
            None => {
                if let Some(forsaken) = locked(&self.in_hand).get_mut(&conn) {
                    *forsaken = true;
                }
                false
            }
        }
    }

    /// Wait for a while until parked overlay connections have ended, and release them.
    pub fn next_ended(&self) -> nix::Result<Vec<ConnId>> {
        let mut events = [EpollEvent::empty(); 64];
        let count = self.ends.wait(&mut events, EpollTimeout::from(ENDED_MS))?;
        let ended: HashSet<ConnId> = events[..count].iter().map(|event| ConnId(event.data())).collect();
        Ok(ended.into_iter().filter(|conn| self.release(*conn)).collect())
    }

    /// Wait until nobody is frozen, and let nobody be frozen any more. Returns how many connections are parked.
    pub fn close(&self) -> usize {
        let deadline = Instant::now() + CLOSING;
        // The lock stays with the caller's process to its end: whoever prepares now waits for it.
        loop {
            let reserved = locked(&self.reserved);
            if reserved.is_empty() || Instant::now() >= deadline {
                std::mem::forget(reserved);
                return locked(&self.parked).len();
            }
            drop(reserved);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Is anything parked, or on its way back?
    pub fn has_way_back_to_give(&self) -> bool {
        !locked(&self.parked).is_empty() || !locked(&self.in_hand).is_empty()
    }

    /// Release what belongs to host sockets that nobody holds any more: without a router, nobody else tells.
    pub fn release_forsaken(&self) {
        let host_sockets = |parked: &Parked| parked.moved.sockets.clone();
        let parked: Vec<_> =
            locked(&self.parked).iter().map(|(conn, parked)| (*conn, host_sockets(parked))).collect();
        if parked.is_empty() {
            return;
        }
        // Listed after they were parked: what is not in the list is gone.
        let listed = match self.programs.descriptors() {
            Ok(listed) => listed,
            Err(error) => return log::error!("sockets cannot be listed: {error}"),
        };
        let held: HashSet<u64> = listed.iter().filter(|d| d.kind == Kind::Tcp).map(|d| d.inode).collect();
        for (conn, sockets) in parked {
            if !sockets.iter().any(|socket| held.contains(&socket.0)) && self.release(conn) {
                log::info!("{conn}: its application has closed it; its parked sockets are closed");
            }
        }
    }

    /// Host sockets that an earlier forwarder was killed over, while it read their queues: see [`queue`].
    pub fn end_repairs(&self) -> Result<(), InspectError> {
        let Ok(host_network) = process::network_namespace(self.own) else { return Ok(()) };
        for d in self.programs.descriptors()? {
            // A program of the host that has a socket of its own in repair mode does so on purpose.
            let is_of_container =
                || process::network_namespace(Tgid(d.tgid)).is_ok_and(|own| own != host_network);
            if d.kind != Kind::Tcp || d.netns != host_network || !is_of_container() {
                continue;
            }
            let socket =
                process::pidfd(Tgid(d.tgid)).and_then(|pidfd| process::copy_fd(&pidfd, RemoteFd(d.fd)));
            // An error: the process has ended or closed it.
            if socket.is_ok_and(|socket| queue::leave_repair(socket.as_fd())) {
                log::warn!("process {}: its descriptor {} was in repair mode", d.tgid, d.fd);
            }
        }
        Ok(())
    }

    pub fn list_parked(&self) -> Vec<ParkedConn> {
        let parked = locked(&self.parked);
        parked
            .iter()
            .map(|(conn, parked)| ParkedConn {
                conn: *conn,
                host_sockets: parked.moved.sockets.to_vec(),
                note: parked.note.to_vec(),
                moved: parked.moved.clone(),
            })
            .collect()
    }
}

/// Close parked sockets by a reset: the one of a pair that closed first in the orderly way would stay in TIME_WAIT, and
/// keep a server that the application starts anew from its own address.
fn reset_all(parked: &Parked) {
    parked.overlay.iter().for_each(reset);
}

/// Once the last reference to this socket goes, it is closed by a reset.
pub fn reset(socket: &OwnedFd) {
    let now = libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Linger, &now);
}

/// Refuse a socket in a state that cannot be moved.
pub fn may_be_moved(facts: &SocketFacts) -> Result<(), Refusal> {
    let refused = [
        (facts.shutdown != 0, Refusal::HalfClosed),
        (facts.state != TCP_ESTABLISHED, Refusal::NotEstablished),
        (facts.urgent, Refusal::UrgentData),
        (facts.mptcp, Refusal::Mptcp),
        (facts.ulp, Refusal::KernelTls),
        (facts.filter, Refusal::SocketFilter),
        (facts.signature, Refusal::TcpSignature),
        (facts.repair, Refusal::UnknownOption),
    ];
    refused.into_iter().find(|(is, _)| *is).map_or(Ok(()), |(_, reason)| Err(reason))
}

/// An error of ours while looking: logged, and a refusal for the connection.
pub fn report(error: InspectError) -> Refusal {
    log::error!("{error}");
    match error {
        InspectError::List(_) | InspectError::NoSlot => Refusal::Exhausted,
        InspectError::Load(_)
        | InspectError::Run(_)
        | InspectError::Map(_)
        | InspectError::ShortRecord { .. } => Refusal::InjectionFailed,
    }
}

/// A lock whose holder panicked still guards plain data: go on with it.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tidying_leaves_each_parked_connection_its_note() {
        let site = Site::new(Programs::load().unwrap()).unwrap();
        let notes = [&b"one"[..], b"", b"and three"];
        for (conn, note) in notes.iter().enumerate() {
            let parked =
                Parked { overlay: SmallVec::new(), note: note.to_vec().into(), moved: Moved::default() };
            site.park(ConnId(conn as u64), parked);
        }
        site.tidy();
        assert!(site.release(ConnId(1)));
        site.tidy();
        let left: Vec<_> =
            site.list_parked().into_iter().map(|parked| (parked.conn.0, parked.note)).collect();
        assert_eq!(left, [(0, b"one".to_vec()), (2, b"and three".to_vec())]);
    }
}
