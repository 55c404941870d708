// SPDX-License-Identifier: Apache-2.0
//! Lets a host socket show the overlay addresses to getsockname(2) and getpeername(2).
//!
//! The addresses live in the socket itself (`BPF_MAP_TYPE_SK_STORAGE`) and go with it. Map and links are pinned, so
//! that a swapped connection keeps its identity while no router runs.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use libbpf_rs::{
    MapCore, MapFlags, MapHandle,
    skel::{OpenSkel, SkelBuilder},
};

use crate::{
    bytes::{as_bytes, mapped, unmapped},
    endpoint::Endpoint,
};

crate::bpf::skeleton!("identity");
use skeleton::types;

const MAP_PIN: &str = "identities";

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{path}: the identity programs cannot be loaded: {source}", path = path.display())]
    Load { path: PathBuf, source: libbpf_rs::Error },
    #[error("the map of identities cannot be made: {0}")]
    Map(libbpf_rs::Error),
    #[error("{path}: cannot be made: {source}; mount a bpf file system there (mount -t bpf bpf /sys/fs/bpf), or give another --pins", path = path.display())]
    Pins { path: PathBuf, source: io::Error },
    #[error("{path}: cannot pin there: {source}; it must be on a bpf file system", path = path.display())]
    Pin { path: PathBuf, source: libbpf_rs::Error },
    #[error("the cgroup {path} cannot be opened: {source}", path = path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cgroup/{program} cannot be attached to {path}: {source}", path = path.display())]
    Attach { path: PathBuf, program: &'static str, source: libbpf_rs::Error },
    #[error("the host socket cannot be given its overlay addresses: {0}")]
    Set(libbpf_rs::Error),
}

/// What a host socket is to look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Names {
    /// Told when the socket closes.
    pub swap: u64,
    pub local: Endpoint,
    pub remote: Endpoint,
}

impl Names {
    /// Of `struct identity`: addresses and ports in network order.
    pub fn read(swap: u64, local: ([u8; 16], u16), remote: ([u8; 16], u16)) -> Names {
        let address = |(ip, port): ([u8; 16], u16)| Endpoint::new(unmapped(ip), u16::from_be(port));
        Names { swap, local: address(local), remote: address(remote) }
    }

    pub fn write(&self, map: &MapHandle, host_socket: BorrowedFd<'_>) -> libbpf_rs::Result<()> {
        let value = types::identity {
            swap: self.swap,
            local: mapped(self.local.ip()),
            remote: mapped(self.remote.ip()),
            local_port: self.local.port().to_be(),
            remote_port: self.remote.port().to_be(),
            v6: u8::from(self.local.ip().is_ipv6()),
            padding: [0; 3],
        };
        map.update(&host_socket.as_raw_fd().to_ne_bytes(), as_bytes(&value), MapFlags::ANY)
    }
}

/// A map in which nobody has names, for whoever only looks: it is not pinned, and no program is attached.
pub fn nobody() -> Result<MapHandle, IdentityError> {
    let mut object = MaybeUninit::uninit();
    let open = skeleton::IdentitySkelBuilder::default().open(&mut object).map_err(IdentityError::Map)?;
    let skel = open.load().map_err(IdentityError::Map)?;
    MapHandle::try_from(&skel.maps.identities).map_err(IdentityError::Map)
}

pub struct Identity {
    map: MapHandle,
    pins: Vec<PathBuf>,
    directory: PathBuf,
}

impl Identity {
    /// Attach to `cgroup`, which must hold whoever makes host sockets, and pin below `directory`. What an earlier
    /// router has pinned there is taken over.
    pub fn attach(cgroup: &Path, directory: &Path) -> Result<Identity, IdentityError> {
        std::fs::create_dir_all(directory)
            .map_err(|source| IdentityError::Pins { path: directory.to_owned(), source })?;
        let mut object = MaybeUninit::uninit();
        let map_pin = directory.join(MAP_PIN);
        let load = |source| IdentityError::Load { path: map_pin.clone(), source };
        let mut open = skeleton::IdentitySkelBuilder::default().open(&mut object).map_err(load)?;
        open.maps.identities.set_pin_path(&map_pin).map_err(load)?;
        let skel = open.load().map_err(load)?;
        let cgroup_fd = std::fs::File::open(cgroup)
            .map_err(|source| IdentityError::Cgroup { path: cgroup.to_owned(), source })?;
        let programs = [
            ("getsockname4", &skel.progs.getsockname4),
            ("getpeername4", &skel.progs.getpeername4),
            ("getsockname6", &skel.progs.getsockname6),
            ("getpeername6", &skel.progs.getpeername6),
        ];
        let mut pins = vec![map_pin.clone()];
        for (program, loaded) in programs {
            let mut link = loaded
                .attach_cgroup(cgroup_fd.as_raw_fd())
                .map_err(|source| IdentityError::Attach { path: cgroup.to_owned(), program, source })?;
            let pin = directory.join(program);
            // The old link goes when the new one is in force: for a moment both are, and say the same.
            let _ = std::fs::remove_file(&pin);
            link.pin(&pin).map_err(|source| IdentityError::Pin { path: pin.clone(), source })?;
            pins.push(pin);
        }
        let map = MapHandle::try_from(&skel.maps.identities).map_err(load)?;
        Ok(Identity { map, pins, directory: directory.to_owned() })
    }

    pub fn map(&self) -> BorrowedFd<'_> {
        self.map.as_fd()
    }

    /// Give a host socket its names.
    pub fn set(&self, host_socket: &OwnedFd, names: &Names) -> Result<(), IdentityError> {
        names.write(&self.map, host_socket.as_fd()).map_err(IdentityError::Set)
    }

    /// Take the programs away: no host socket is left that needs them.
    pub fn unpin(&self) -> io::Result<()> {
        for pin in &self.pins {
            std::fs::remove_file(pin)?;
        }
        std::fs::remove_dir(&self.directory)
    }
}

// SAFETY: of `bpf/identity.h`: integers and arrays of bytes, padding explicit.
unsafe impl crate::bytes::Plain for types::identity {}
