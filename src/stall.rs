// SPDX-License-Identifier: Apache-2.0
//! Notices that the host path of a swapped connection carries nothing any more. [`Watch`] looks, [`sample`] decides.
//!
//! The sockets are found by the identity that they carry, so none of them is held: a copy of a descriptor would keep
//! the connection open after its application has closed it.

mod sample;

use std::{io, mem::MaybeUninit};

use forwarder_api::SocketInode;
use libbpf_rs::{
    Link,
    skel::{OpenSkel, SkelBuilder},
};

use crate::{
    bpf::records,
    bytes::Plain,
    identity::{Identity, Names},
};
pub use sample::Sample;

/// A host socket of this router, at one moment.
#[derive(Clone, Debug)]
pub struct HostSocket {
    /// Zero where no descriptor is left.
    pub socket: SocketInode,
    pub names: Names,
    pub sample: Sample,
}

crate::bpf::skeleton!("stall");
use skeleton::types;

#[derive(Debug, thiserror::Error)]
pub enum StallError {
    #[error("the programs that watch swapped connections cannot be loaded: {0}")]
    Load(libbpf_rs::Error),
    #[error("the programs that watch swapped connections cannot be attached to the map of identities: {0}")]
    Attach(libbpf_rs::Error),
    #[error("the swapped connections cannot be looked at: {0}")]
    Read(io::Error),
}

/// The loaded programs. Dropping it unloads them.
pub struct Watch {
    all: Link,
    waiting: Link,
}

impl Watch {
    pub fn start(identity: &Identity) -> Result<Watch, StallError> {
        let mut object = MaybeUninit::uninit();
        let open = skeleton::StallSkelBuilder::default().open(&mut object).map_err(StallError::Load)?;
        let skel = open.load().map_err(StallError::Load)?;
        let all = skel.progs.host_sockets.attach_iter(identity.map());
        let waiting = skel.progs.waiting_host_sockets.attach_iter(identity.map());
        Ok(Watch { all: all.map_err(StallError::Attach)?, waiting: waiting.map_err(StallError::Attach)? })
    }

    /// All host sockets of this router, as they are now.
    pub fn host_sockets(&self) -> Result<Vec<HostSocket>, StallError> {
        read(&self.all)
    }

    /// Those that are stalled. Those that have not waited in vain at all are passed over in the kernel.
    pub fn stalled(&self) -> Result<Vec<HostSocket>, StallError> {
        let mut waiting = read(&self.waiting)?;
        waiting.retain(|host_socket| host_socket.sample.is_stalled());
        Ok(waiting)
    }
}

fn read(link: &Link) -> Result<Vec<HostSocket>, StallError> {
    let records = records(link).map_err(StallError::Read)?;
    let host_socket = |record: types::host_socket| HostSocket {
        socket: SocketInode(record.inode),
        names: Names::read(
            record.identity.swap,
            (record.identity.local, record.identity.local_port),
            (record.identity.remote, record.identity.remote_port),
        ),
        sample: Sample {
            unacknowledged_bytes: record.unacknowledged_bytes,
            retransmissions: record.retransmissions,
            probes: record.probes,
        },
    };
    Ok(records.into_iter().map(host_socket).collect())
}

// SAFETY: of `bpf/stall.h`: integers and arrays of bytes, padding explicit.
unsafe impl Plain for types::host_socket {}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::types::host_socket;

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!(size_of::<host_socket>(), 64);
        assert_eq!(offset_of!(host_socket, inode), 48);
        assert_eq!(offset_of!(host_socket, unacknowledged_bytes), 56);
        assert_eq!(offset_of!(host_socket, retransmissions), 60);
        assert_eq!(offset_of!(host_socket, probes), 61);
    }
}
