// SPDX-License-Identifier: Apache-2.0
//! Notices that the host path of a swapped connection carries nothing any more. [`Watch`] looks, [`sample`] decides.
//!
//! The sockets are found by the identity that they carry, so none of them is held: a copy of a descriptor would keep
//! the connection open after its application has closed it. A kernel that takes no iterator over a map shows them among all
//! of the host's network, which is slower.

mod sample;

use std::{io, mem::MaybeUninit, os::fd::BorrowedFd};

use forwarder_api::SocketInode;
use libbpf_rs::{
    IterOpts, Link, MapIterOpts,
    skel::{OpenSkel, SkelBuilder},
};

use crate::{bpf::records, bytes::Plain, identity::Names};
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
    #[error("the programs that watch swapped connections cannot be attached: {0}")]
    Attach(libbpf_rs::Error),
    #[error("the swapped connections cannot be looked at: {0}")]
    Read(io::Error),
}

/// The loaded programs. Dropping it unloads them.
pub struct Watch {
    way: Way,
    all: Link,
    waiting: Link,
}

/// How the sockets are found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ByMap,
    AmongAllOfNetwork,
}

impl Watch {
    /// `identities`: the map with the names of host sockets.
    pub fn start(identities: BorrowedFd<'_>) -> Result<Watch, StallError> {
        Watch::by(Way::ByMap, identities).or_else(|error| {
            log::debug!("{error}");
            Watch::by(Way::AmongAllOfNetwork, identities)
        })
    }

    fn by(way: Way, identities: BorrowedFd<'_>) -> Result<Watch, StallError> {
        let mut object = MaybeUninit::uninit();
        let mut open = skeleton::StallSkelBuilder::default().open(&mut object).map_err(StallError::Load)?;
        open.maps.identities.reuse_fd(identities).map_err(StallError::Load)?;
        let progs = &mut open.progs;
        for of_map in [&mut progs.all_of_map, &mut progs.waiting_of_map] {
            of_map.set_autoload(way == Way::ByMap);
        }
        for of_network in [&mut progs.all_of_network, &mut progs.waiting_of_network] {
            of_network.set_autoload(way == Way::AmongAllOfNetwork);
        }
        let skel = open.load().map_err(StallError::Load)?;
        let progs = &skel.progs;
        let (all, waiting, over) = match way {
            Way::ByMap => {
                (&progs.all_of_map, &progs.waiting_of_map, IterOpts::Map(MapIterOpts::from_fd(identities)))
            }
            Way::AmongAllOfNetwork => (&progs.all_of_network, &progs.waiting_of_network, IterOpts::None),
        };
        let (all, waiting) = (all.attach_iter_with_opts(over.clone()), waiting.attach_iter_with_opts(over));
        Ok(Watch {
            way,
            all: all.map_err(StallError::Attach)?,
            waiting: waiting.map_err(StallError::Attach)?,
        })
    }

    /// For people.
    pub fn way(&self) -> &'static str {
        match self.way {
            Way::ByMap => "by the map of them",
            Way::AmongAllOfNetwork => {
                "among all TCP sockets of the host's network (this kernel takes no iterator over a map)"
            }
        }
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
    use std::{
        mem::offset_of,
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use super::{types::host_socket, *};
    use crate::identity;

    #[test]
    fn each_way_that_the_kernel_takes_shows_the_sockets_with_an_identity_and_no_others() {
        let map = identity::nobody().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _without = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let with = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let [local, remote] = ["10.244.1.10:40000", "10.244.2.10:80"].map(|end| end.parse().unwrap());
        let names = Names { swap: 7, local, remote };
        names.write(&map, with.as_fd()).unwrap();
        for way in [Way::ByMap, Way::AmongAllOfNetwork] {
            let watch = match Watch::by(way, map.as_fd()) {
                Err(StallError::Load(_)) if way == Way::ByMap => continue,
                watch => watch.unwrap(),
            };
            let shown: Vec<Names> = watch.host_sockets().unwrap().iter().map(|socket| socket.names).collect();
            assert_eq!(shown, [names]);
            assert!(watch.stalled().unwrap().is_empty());
        }
    }

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!(size_of::<host_socket>(), 64);
        assert_eq!(offset_of!(host_socket, inode), 48);
        assert_eq!(offset_of!(host_socket, unacknowledged_bytes), 56);
        assert_eq!(offset_of!(host_socket, retransmissions), 60);
        assert_eq!(offset_of!(host_socket, probes), 61);
    }
}
