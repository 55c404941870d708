// SPDX-License-Identifier: Apache-2.0
//! Who holds a socket: processes, descriptor tables, descriptors, and the epoll sets that watch it.
//!
//! Pure: from a list of all descriptors of the host to a plan of what to replace where.

use std::collections::{BTreeMap, HashMap};

use forwarder_api::Refusal;

use crate::{
    inspect::{Descriptor, Kind, SocketFacts, Watcher},
    process::{RemoteFd, Tgid, Tid},
    table::{Plan, Replacement, WatcherPlan},
};

/// The descriptors of one socket in one descriptor table. Several processes may share a table (CLONE_FILES); the
/// first one found acts for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    pub table: u64,
    pub tgid: Tgid,
    pub tid: Tid,
    pub fds: Vec<RemoteFd>,
    /// All epoll sets in this table: which set, and its descriptor here.
    pub epolls: Vec<(u64, RemoteFd)>,
}

/// All that can be seen to hold one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holders {
    /// Every process that can use the socket.
    pub tgids: Vec<Tgid>,
    pub tables: Vec<Table>,
}

/// A list of all descriptors, and where in it to look.
pub struct Listing {
    descriptors: Vec<Descriptor>,
    /// Places of those of each open file that is a TCP socket, and of the epoll sets in each table.
    of_file: HashMap<u64, Vec<usize>>,
    epolls_of_table: HashMap<u64, Vec<usize>>,
    file_of_socket: HashMap<u64, u64>,
}

impl Listing {
    pub fn new(descriptors: Vec<Descriptor>) -> Listing {
        let mut listing = Listing {
            descriptors: vec![],
            of_file: HashMap::new(),
            epolls_of_table: HashMap::new(),
            file_of_socket: HashMap::new(),
        };
        for (index, d) in descriptors.iter().enumerate() {
            match d.kind {
                Kind::Tcp => {
                    listing.of_file.entry(d.file).or_default().push(index);
                    listing.file_of_socket.insert(d.inode, d.file);
                }
                Kind::Epoll => listing.epolls_of_table.entry(d.table).or_default().push(index),
                Kind::IoUring => {}
            }
        }
        Listing { descriptors, ..listing }
    }

    /// A descriptor of the socket with this inode number.
    pub fn descriptor_of(&self, inode: u64) -> Option<&Descriptor> {
        self.held(*self.file_of_socket.get(&inode)?).next()
    }

    fn held(&self, file: u64) -> impl Iterator<Item = &Descriptor> {
        self.of_file.get(&file).into_iter().flatten().map(|index| &self.descriptors[*index])
    }

    fn epolls(&self, table: u64) -> Vec<(u64, RemoteFd)> {
        let indices = self.epolls_of_table.get(&table).into_iter().flatten();
        let mut epolls: Vec<_> =
            indices.map(|index| &self.descriptors[*index]).map(|d| (d.epoll, RemoteFd(d.fd))).collect();
        epolls.sort_unstable();
        epolls.dedup();
        epolls
    }

    /// Everything that holds the open file `file`.
    pub fn holders(&self, file: u64) -> Holders {
        let mut tables: BTreeMap<u64, Table> = BTreeMap::new();
        for descriptor in self.held(file) {
            let table = tables.entry(descriptor.table).or_insert_with(|| Table {
                table: descriptor.table,
                tgid: Tgid(descriptor.tgid),
                tid: Tid(descriptor.tid),
                fds: Vec::new(),
                epolls: self.epolls(descriptor.table),
            });
            let fd = RemoteFd(descriptor.fd);
            if !table.fds.contains(&fd) {
                table.fds.push(fd);
            }
        }
        let mut tgids: Vec<Tgid> = self.held(file).map(|descriptor| Tgid(descriptor.tgid)).collect();
        tgids.sort_unstable();
        tgids.dedup();
        Holders { tgids, tables: tables.into_values().collect() }
    }
}

impl Holders {
    pub fn fds(&self) -> usize {
        self.tables.iter().map(|table| table.fds.len()).sum()
    }

    /// Do the descriptors found account for every reference (invariant 5)? `own` are ours.
    pub fn account_for(&self, facts: &SocketFacts, own: usize) -> bool {
        facts.refs == (self.fds() + own) as u64
    }
}

/// What the descriptors of frozen processes are.
pub trait Descriptors {
    fn close_on_exec(&self, table: &Table, fd: RemoteFd) -> Result<bool, Refusal>;
    /// Which epoll set this descriptor is, if it is one.
    fn epoll_at(&self, table: &Table, fd: RemoteFd) -> Option<u64>;
    /// All descriptors that are epoll sets.
    fn epoll_sets(&self, table: &Table) -> Result<Vec<RemoteFd>, Refusal>;
}

/// What to do to each table so that socket `index` takes the place of the one that `holders` hold, while `facts` is
/// what it looks like. Plans are added to those of other sockets of the same tables.
pub fn plan(
    plans: &mut BTreeMap<u64, Plan>,
    holders: &Holders,
    facts: &SocketFacts,
    index: usize,
    descriptors: &impl Descriptors,
) -> Result<(), Refusal> {
    if facts.watchers_left_out {
        return Err(Refusal::EpollUnreachable);
    }
    if has_fired_one_shot(facts) {
        return Err(Refusal::OneShotFired);
    }
    for (watcher, table, epoll) in registrations(holders, facts, descriptors)? {
        let plan = plans.entry(table.table).or_default();
        let fd = RemoteFd(watcher.fd as i32);
        plan.watchers.push(WatcherPlan { epoll, fd, events: watcher.events, data: watcher.data });
    }
    for table in &holders.tables {
        let plan = plans.entry(table.table).or_default();
        for fd in &table.fds {
            let close_on_exec = descriptors.close_on_exec(table, *fd)?;
            plan.replacements.push(Replacement { fd: *fd, close_on_exec, socket: index });
        }
    }
    Ok(())
}

/// Where each registration can be changed: it is named by set and descriptor, and somebody must have both.
fn registrations<'a>(
    holders: &'a Holders,
    facts: &'a SocketFacts,
    descriptors: &impl Descriptors,
) -> Result<Vec<(&'a Watcher, &'a Table, RemoteFd)>, Refusal> {
    let find = |watcher: &'a Watcher| {
        let fd = RemoteFd(watcher.fd as i32);
        for table in holders.tables.iter().filter(|table| table.fds.contains(&fd)) {
            if let Some(epoll) = descriptor_of(watcher.epoll, table, descriptors)? {
                return Ok((watcher, table, epoll));
            }
        }
        Err(Refusal::EpollUnreachable)
    };
    facts.watchers.iter().map(find).collect()
}

/// The list in `table` was made while the processes ran: a set that is not where it was then is looked for.
fn descriptor_of(
    epoll: u64,
    table: &Table,
    descriptors: &impl Descriptors,
) -> Result<Option<RemoteFd>, Refusal> {
    let is_there = |fd: &RemoteFd| descriptors.epoll_at(table, *fd) == Some(epoll);
    let listed = table.epolls.iter().filter(|(listed, _)| *listed == epoll).map(|(_, fd)| *fd);
    match listed.into_iter().find(is_there) {
        Some(fd) => Ok(Some(fd)),
        None => Ok(descriptors.epoll_sets(table)?.into_iter().find(is_there)),
    }
}

/// EP_PRIVATE_BITS of fs/eventpoll.c: all that is left of a one-shot registration that has fired.
const PRIVATE_BITS: u32 =
    (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;

/// A registration that has fired cannot be made anew: EPOLL_CTL_ADD always arms EPOLLERR and EPOLLHUP.
pub fn has_fired_one_shot(facts: &SocketFacts) -> bool {
    facts.watchers.iter().any(|watcher| has_fired(watcher.events))
}

fn has_fired(events: u32) -> bool {
    events & libc::EPOLLONESHOT as u32 != 0 && events & !PRIVATE_BITS == 0
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;

    const ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

    fn tcp(tgid: i32, table: u64, fd: i32) -> Descriptor {
        Descriptor {
            kind: Kind::Tcp,
            file: 100,
            table,
            inode: 1,
            epoll: 0,
            cgroups: [0; 12],
            bytes_sent: 0,
            bytes_received: 0,
            tgid,
            tid: tgid,
            fd,
            netns: 1,
            v6: false,
            state: 1,
            local: ADDRESS,
            remote: ADDRESS,
        }
    }

    fn epoll(tgid: i32, table: u64, fd: i32, epoll: u64) -> Descriptor {
        Descriptor { kind: Kind::Epoll, epoll, ..tcp(tgid, table, fd) }
    }

    fn holders(listed: &[Descriptor]) -> Holders {
        Listing::new(listed.to_vec()).holders(100)
    }

    fn watched(watchers: Vec<Watcher>) -> SocketFacts {
        SocketFacts {
            file: 100,
            refs: 0,
            options: None,
            inode: 1,
            netns: 1,
            v6: false,
            state: 1,
            write_seq: 0,
            snd_una: 0,
            rcv_nxt: 0,
            copied_seq: 0,
            receive_window: 0,
            shutdown: 0,
            urgent: false,
            mptcp: false,
            ulp: false,
            filter: false,
            signature: false,
            repair: false,
            watchers,
            watchers_left_out: false,
        }
    }

    /// The epoll sets as they are now, and their descriptors.
    struct Sets(Vec<(u64, i32)>);

    impl Descriptors for Sets {
        fn close_on_exec(&self, _: &Table, _: RemoteFd) -> Result<bool, Refusal> {
            Ok(false)
        }

        fn epoll_at(&self, _: &Table, fd: RemoteFd) -> Option<u64> {
            self.0.iter().find(|(_, at)| *at == fd.0).map(|(epoll, _)| *epoll)
        }

        fn epoll_sets(&self, _: &Table) -> Result<Vec<RemoteFd>, Refusal> {
            Ok(self.0.iter().map(|(_, fd)| RemoteFd(*fd)).collect())
        }
    }

    #[test]
    fn a_shared_table_counts_once_but_all_its_processes_are_frozen() {
        let holders = holders(&[tcp(10, 7, 3), tcp(11, 7, 3)]);
        assert_eq!(holders.tgids, [Tgid(10), Tgid(11)]);
        assert_eq!(holders.fds(), 1);
    }

    #[test]
    fn a_reference_that_nobody_shows_is_noticed() {
        let holders = holders(&[tcp(10, 7, 3), tcp(12, 8, 3), tcp(12, 8, 4)]);
        let facts = |refs| SocketFacts { refs, ..watched(vec![]) };
        assert!(holders.account_for(&facts(4), 1));
        assert!(!holders.account_for(&facts(5), 1));
    }

    #[test]
    fn an_epoll_set_shared_over_fork_is_changed_once() {
        let listed = [tcp(10, 7, 3), tcp(11, 8, 3), epoll(10, 7, 4, 55), epoll(11, 8, 4, 55)];
        let holders = holders(&listed);
        let facts = watched(vec![Watcher { epoll: 55, fd: 3, events: 1, data: 9 }]);
        let mut plans = BTreeMap::new();
        plan(&mut plans, &holders, &facts, 0, &Sets(vec![(55, 4)])).unwrap();
        assert_eq!(plans.values().map(|plan| plan.watchers.len()).sum::<usize>(), 1);
        assert!(plans.values().all(|plan| plan.replacements.len() == 1));
    }

    #[test]
    fn an_epoll_set_that_no_holder_has_is_refused() {
        let holders = holders(&[tcp(10, 7, 3)]);
        let facts = watched(vec![Watcher { epoll: 55, fd: 3, events: 1, data: 9 }]);
        assert_eq!(
            plan(&mut BTreeMap::new(), &holders, &facts, 0, &Sets(vec![])),
            Err(Refusal::EpollUnreachable)
        );
    }

    #[test]
    fn an_epoll_set_is_found_where_it_is_now() {
        let holders = holders(&[tcp(10, 7, 3), epoll(10, 7, 4, 55)]);
        let check = |watched_by: u64, sets: &[(u64, i32)]| {
            let facts = watched(vec![Watcher { epoll: watched_by, fd: 3, events: 1, data: 9 }]);
            let mut plans = BTreeMap::new();
            plan(&mut plans, &holders, &facts, 0, &Sets(sets.to_vec()))?;
            Ok(plans[&7].watchers[0].epoll.0)
        };
        assert_eq!(check(55, &[(55, 4), (66, 5)]), Ok(4));
        // Made since, or moved; and another took its number.
        assert_eq!(check(66, &[(55, 4), (66, 5)]), Ok(5));
        assert_eq!(check(55, &[(66, 4), (55, 5)]), Ok(5));
        assert_eq!(check(77, &[(55, 4), (66, 5)]), Err(Refusal::EpollUnreachable));
    }

    #[test]
    fn a_one_shot_registration_is_moved_only_while_it_is_armed() {
        let holders = holders(&[tcp(10, 7, 3), epoll(10, 7, 4, 55)]);
        let check = |events, expected| {
            let facts = watched(vec![Watcher { epoll: 55, fd: 3, events, data: 9 }]);
            assert_eq!(plan(&mut BTreeMap::new(), &holders, &facts, 0, &Sets(vec![(55, 4)])), expected);
        };
        let oneshot = libc::EPOLLONESHOT as u32;
        check(oneshot | libc::EPOLLIN as u32, Ok(()));
        check(oneshot, Err(Refusal::OneShotFired));
    }
}
