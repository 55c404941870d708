// SPDX-License-Identifier: Apache-2.0
//! Which capabilities router and forwarder need and what for, and how they give up all others when they start.
//!
//! These tables are the only place where that is written: the manifests and units in `deploy/` are compared with them
//! by `test/lab/tests/privileges.rs`.

use std::collections::HashSet;

use caps::{CapSet, errors::CapsError};

pub use caps::Capability;

/// A capability that a program keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    pub capability: Capability,
    /// What it is needed for; reads on after "needed".
    pub reason: &'static str,
    /// Without it the program does not start. Otherwise it does less well.
    pub essential: bool,
}

const fn essential(capability: Capability, reason: &'static str) -> Need {
    Need { capability, reason, essential: true }
}

const fn useful(capability: Capability, reason: &'static str) -> Need {
    Need { capability, reason, essential: false }
}

/// The router faces the network: nothing that reaches into a process.
pub const ROUTER: [Need; 3] = [
    essential(Capability::CAP_BPF, "to load BPF programs and to read their maps"),
    essential(Capability::CAP_PERFMON, "for BPF programs that trace"),
    essential(
        Capability::CAP_NET_ADMIN,
        "for BPF programs at cgroups, which give host sockets their overlay addresses, and to ask connection tracking",
    ),
];

/// The forwarder acts on processes, and faces no network.
pub const FORWARDER: [Need; 8] = [
    essential(Capability::CAP_SYS_PTRACE, "to stop threads, to copy their descriptors and to put sockets in"),
    essential(
        Capability::CAP_SYS_ADMIN,
        "to suspend a container's seccomp filter while the block of calls runs, and to list descriptors by BPF",
    ),
    essential(
        Capability::CAP_NET_ADMIN,
        "to read sequence numbers (TCP_REPAIR) and to make room for carried bytes beyond the application's limits",
    ),
    essential(Capability::CAP_BPF, "to load the BPF programs that look at sockets"),
    essential(Capability::CAP_PERFMON, "for BPF programs that trace"),
    essential(
        Capability::CAP_DAC_OVERRIDE,
        "to write the memory of processes of other users (/proc/PID/mem)",
    ),
    useful(Capability::CAP_SYS_NICE, "to run before others while a process stands still"),
    useful(Capability::CAP_SYS_RESOURCE, "not to be killed when memory is short"),
];

#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    #[error("capabilities cannot be given up: {0}")]
    Capabilities(#[from] CapsError),
    #[error("no_new_privs cannot be set: {0}")]
    NoNewPrivs(nix::Error),
}

/// Every capability that there is, held or not.
pub fn all() -> impl Iterator<Item = Capability> {
    caps::all().into_iter()
}

/// Those that this process has.
pub fn held() -> HashSet<Capability> {
    caps::read(None, CapSet::Effective).unwrap_or_default()
}

/// What is essential and not there.
pub fn missing(needs: &[Need]) -> Vec<Need> {
    let held = held();
    needs.iter().filter(|need| need.essential && !held.contains(&need.capability)).copied().collect()
}

/// Give up, for good, every capability but these, and the right to gain others by executing a program. To be called before
/// the first thread is started: capabilities are each thread's own, and threads inherit them.
pub fn keep_only(needs: &[Need]) -> Result<(), PrivilegeError> {
    let wanted: HashSet<Capability> = needs.iter().map(|need| need.capability).collect();
    // In a container the bounding set is what the runtime has made it, and usually cannot be changed.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(&wanted) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    let kept = caps::read(None, CapSet::Permitted)?.intersection(&wanted).copied().collect();
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    nix::sys::prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_that_faces_the_network_cannot_reach_into_processes() {
        let reaching = [
            Capability::CAP_SYS_PTRACE,
            Capability::CAP_SYS_ADMIN,
            Capability::CAP_DAC_OVERRIDE,
            Capability::CAP_KILL,
        ];
        assert!(ROUTER.iter().all(|need| !reaching.contains(&need.capability)));
    }

    #[test]
    fn what_is_given_up_is_gone_from_every_set() {
        // Of this thread alone.
        let thread = std::thread::spawn(|| {
            keep_only(&ROUTER).unwrap();
            [CapSet::Effective, CapSet::Permitted, CapSet::Inheritable, CapSet::Ambient, CapSet::Bounding]
                .map(|set| caps::read(None, set).unwrap())
        });
        let kept: HashSet<Capability> = ROUTER.iter().map(|need| need.capability).collect();
        let was_root = caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap();
        let [effective, permitted, inheritable, ambient, bounding] = thread.join().unwrap();
        assert!(effective.is_subset(&kept) && permitted.is_subset(&kept));
        assert!(inheritable.is_empty() && ambient.is_empty());
        assert!(!was_root || bounding == kept);
    }
}
