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
    IterOpts, Link, MapCore, MapFlags, MapIterOpts,
    skel::{OpenSkel, SkelBuilder},
};

use crate::{
    bpf::{records, run},
    bytes::Plain,
    identity::Names,
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
use skeleton::{StallSkel, StallSkelBuilder, types};

#[derive(Debug, thiserror::Error)]
pub enum StallError {
    #[error("the programs that watch swapped connections cannot be loaded: {0}")]
    Load(libbpf_rs::Error),
    #[error("the programs that watch swapped connections cannot be attached: {0}")]
    Attach(libbpf_rs::Error),
    #[error("the swapped connections cannot be looked at: {0}")]
    Read(io::Error),
    #[error("the program that looks at known swapped connections cannot be run: {0}")]
    Run(libbpf_rs::Error),
}

/// `bpf/stall.bpf.c`
const WATCHED: usize = 16384;
const LOOK: u64 = 512;

/// The loaded programs.
pub struct Watch {
    way: Way,
    walk: Link,
    skel: StallSkel<'static>,
    /// So many are in the map of watched ones, and those are all. None: there may be others.
    known: Option<usize>,
}

/// How the sockets are found.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    ByMap,
    AmongAllOfNetwork,
}

impl Watch {
    /// `identities`: the map with the names of host sockets. The programs stay loaded as long as this process lives.
    pub fn start(identities: BorrowedFd<'_>) -> Result<Watch, StallError> {
        Watch::by(Way::ByMap, identities).or_else(|error| {
            log::debug!("{error}");
            Watch::by(Way::AmongAllOfNetwork, identities)
        })
    }

    fn by(way: Way, identities: BorrowedFd<'_>) -> Result<Watch, StallError> {
        // What runs programs borrows from the object that they were loaded from.
        let object = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut open = StallSkelBuilder::default().open(object).map_err(StallError::Load)?;
        open.maps.identities.reuse_fd(identities).map_err(StallError::Load)?;
        open.progs.host_sockets_of_map.set_autoload(way == Way::ByMap);
        open.progs.host_sockets_of_network.set_autoload(way == Way::AmongAllOfNetwork);
        let skel = open.load().map_err(StallError::Load)?;
        let walk = match way {
            Way::ByMap => {
                let over = IterOpts::Map(MapIterOpts::from_fd(identities));
                skel.progs.host_sockets_of_map.attach_iter_with_opts(over)
            }
            Way::AmongAllOfNetwork => {
                skel.progs.host_sockets_of_network.attach_iter_with_opts(IterOpts::None)
            }
        };
        Ok(Watch { way, walk: walk.map_err(StallError::Attach)?, skel, known: None })
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
    pub fn host_sockets(&mut self) -> Result<Vec<HostSocket>, StallError> {
        self.known = None;
        let records: Vec<types::host_socket> = records(&self.walk).map_err(StallError::Read)?;
        self.remember(&records)?;
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

    /// Those that are stalled. There is no walk where all are known and none of them has waited in vain at all.
    pub fn stalled(&mut self) -> Result<Vec<HostSocket>, StallError> {
        if let Some(known) = self.known
            && !self.any_has_waited(known)?
        {
            return Ok(Vec::new());
        }
        let mut stalled = self.host_sockets()?;
        stalled.retain(|host_socket| host_socket.sample.is_stalled());
        Ok(stalled)
    }

    /// A socket gets names.
    pub fn expect_more(&mut self) {
        self.known = None;
    }

    fn remember(&mut self, records: &[types::host_socket]) -> Result<(), StallError> {
        if records.len() > WATCHED {
            return Ok(());
        }
        let keys: Vec<u8> = (0..records.len() as u32).flat_map(u32::to_ne_bytes).collect();
        let watched = |record: &types::host_socket| [record.watched.cookie, record.watched.sock];
        let values: Vec<u8> = records.iter().flat_map(watched).flat_map(u64::to_ne_bytes).collect();
        if !records.is_empty() {
            let (map, count) = (&self.skel.maps.watched, records.len() as u32);
            map.update_batch(&keys, &values, count, MapFlags::ANY, MapFlags::ANY).map_err(StallError::Run)?;
        }
        self.known = Some(records.len());
        Ok(())
    }

    fn any_has_waited(&mut self, known: usize) -> Result<bool, StallError> {
        for from in (0..known as u64).step_by(LOOK as usize) {
            if run(&mut self.skel.progs.any_has_waited, &[from, known as u64]).map_err(StallError::Run)? != 0
            {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

// SAFETY: of `bpf/stall.h`: integers and arrays of bytes, padding explicit.
unsafe impl Plain for types::host_socket {}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        mem::offset_of,
        net::{TcpListener, TcpStream},
        os::fd::AsFd as _,
    };

    use nix::{
        libc,
        sys::socket::{setsockopt, sockopt::Linger},
    };

    use super::{types::host_socket, *};
    use crate::{
        identity,
        testing::{comes_true, give_names, lose_all},
    };

    #[test]
    fn each_way_that_the_kernel_takes_shows_the_sockets_with_an_identity_and_no_others() {
        let map = identity::nobody().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _without = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let with = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let names = give_names(&with, &map);
        for way in [Way::ByMap, Way::AmongAllOfNetwork] {
            let mut watch = match Watch::by(way, map.as_fd()) {
                Err(StallError::Load(_)) if way == Way::ByMap => continue,
                watch => watch.unwrap(),
            };
            let shown: Vec<Names> = watch.host_sockets().unwrap().iter().map(|socket| socket.names).collect();
            assert_eq!(shown, [names]);
            assert!(watch.stalled().unwrap().is_empty());
        }
    }

    #[test]
    fn a_known_socket_that_waits_in_vain_is_seen_without_a_walk_until_it_is_gone() {
        let map = identity::nobody().unwrap();
        let mut watch = Watch::start(map.as_fd()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut with = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let names = give_names(&with, &map);
        watch.host_sockets().unwrap();
        let known = watch.known.unwrap();
        assert!(!watch.any_has_waited(known).unwrap());
        lose_all(&server);
        with.write_all(b"lost").unwrap();
        assert!(comes_true(|| watch.any_has_waited(known).unwrap()));
        assert!(comes_true(|| watch.stalled().unwrap().iter().any(|stalled| stalled.names == names)));
        // Its end is a reset, and it does not stay to have its byte acknowledged.
        setsockopt(&with, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
        drop(with);
        assert!(!watch.any_has_waited(known).unwrap());
        assert!(watch.host_sockets().unwrap().is_empty());
    }

    #[test]
    fn the_layout_is_that_of_the_header() {
        assert_eq!(size_of::<host_socket>(), 80);
        assert_eq!(offset_of!(host_socket, watched), 48);
        assert_eq!(offset_of!(host_socket, inode), 64);
        assert_eq!(offset_of!(host_socket, unacknowledged_bytes), 72);
        assert_eq!(offset_of!(host_socket, retransmissions), 76);
        assert_eq!(offset_of!(host_socket, probes), 77);
    }
}
