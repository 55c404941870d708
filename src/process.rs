// SPDX-License-Identifier: Apache-2.0
//! Finds a process for a socket: one that lives where the socket was made. Which one of several does not matter to
//! those who ask for its container and its network.

use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    path::Path,
    time::{Duration, Instant},
};

use libbpf_rs::{
    IterOpts, Link,
    skel::{OpenSkel, SkelBuilder},
};

use crate::{bpf::records, bytes::Plain, trace::Scope};

crate::bpf::skeleton!("process");
use skeleton::types;

/// How long a list of processes is believed. One that has ended since is not taken.
const FRESH: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("the program that lists processes cannot be loaded: {0}")]
    Load(libbpf_rs::Error),
    #[error("processes cannot be listed: {0}")]
    Read(io::Error),
}

/// The loaded program, and what it has listed. Dropping it unloads it.
pub struct Processes {
    link: Link,
    list: List,
    listed: Option<Instant>,
}

/// The last one seen of each place.
#[derive(Default)]
struct List {
    /// By cgroup and network namespace.
    of_cgroup: HashMap<(u64, u32), u32>,
    of_netns: HashMap<u32, u32>,
}

impl Processes {
    pub fn load(scope: &Scope) -> Result<Processes, ProcessError> {
        let mut object = MaybeUninit::uninit();
        let mut open =
            skeleton::ProcessSkelBuilder::default().open(&mut object).map_err(ProcessError::Load)?;
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.scope_cgroup_id = scope.cgroup_id;
            rodata.own_netns = scope.own_netns;
        }
        let skel = open.load().map_err(ProcessError::Load)?;
        let link = skel.progs.processes.attach_iter_with_opts(IterOpts::None).map_err(ProcessError::Load)?;
        Ok(Processes { link, list: List::default(), listed: None })
    }

    /// A process in this network namespace, of this cgroup if there is one.
    pub fn find(&mut self, cgroup_id: u64, netns: u32) -> Result<Option<u32>, ProcessError> {
        let lives = |tgid: &u32| Path::new(&format!("/proc/{tgid}")).exists();
        let is_fresh = self.listed.is_some_and(|when| when.elapsed() < FRESH);
        if is_fresh && let Some(tgid) = self.list.find(cgroup_id, netns).filter(lives) {
            return Ok(Some(tgid));
        }
        self.list = self.read()?;
        self.listed = Some(Instant::now());
        Ok(self.list.find(cgroup_id, netns))
    }

    fn read(&self) -> Result<List, ProcessError> {
        let mut list = List::default();
        for types::process { cgroup_id, netns, tgid } in records(&self.link).map_err(ProcessError::Read)? {
            list.of_cgroup.insert((cgroup_id, netns), tgid);
            list.of_netns.insert(netns, tgid);
        }
        Ok(list)
    }
}

impl List {
    /// A socket may have been made by a process that has moved to another cgroup since.
    fn find(&self, cgroup_id: u64, netns: u32) -> Option<u32> {
        self.of_cgroup.get(&(cgroup_id, netns)).or_else(|| self.of_netns.get(&netns)).copied()
    }
}

// SAFETY: of `bpf/process.h`: integers, no padding.
unsafe impl Plain for types::process {}

#[cfg(test)]
mod tests {
    use super::{List, types::process};

    #[test]
    fn a_record_has_no_padding() {
        assert_eq!(size_of::<process>(), 16);
    }

    #[test]
    fn a_process_of_the_same_cgroup_goes_before_another_of_the_same_network() {
        let mut list = List::default();
        list.of_cgroup.insert((7, 1), 100);
        list.of_netns.insert(1, 200);
        assert_eq!((list.find(7, 1), list.find(8, 1), list.find(7, 2)), (Some(100), Some(200), None));
    }
}
