// SPDX-License-Identifier: Apache-2.0
//! Namespaces without names: a thread makes one for itself, leaves us a descriptor of it, and ends.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result, anyhow};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};

#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
    kind: CloneFlags,
}

impl Namespace {
    pub fn network() -> Result<Namespace> {
        Namespace::make(CloneFlags::CLONE_NEWNET, "net", || Ok(()))
    }

    /// A copy of the mounts of this process, with a bpf file system of its own at `bpffs`.
    pub fn mounts_with_bpffs(bpffs: &Path) -> Result<Namespace> {
        Namespace::make(CloneFlags::CLONE_NEWNS, "mnt", || {
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
                .context("making / private")?;
            mount(Some("bpf"), bpffs, Some("bpf"), MsFlags::empty(), none)
                .with_context(|| format!("mounting a bpf file system at {}", bpffs.display()))
        })
    }

    fn make(kind: CloneFlags, file: &str, set_up: impl FnOnce() -> Result<()> + Send) -> Result<Namespace> {
        on_a_thread(|| {
            unshare(kind).with_context(|| format!("unshare({kind:?}); are you root?"))?;
            set_up()?;
            let path = format!("/proc/thread-self/ns/{file}");
            let fd = File::open(&path).with_context(|| format!("opening {path}"))?.into();
            Ok(Namespace { fd, kind })
        })
    }

    /// Runs something inside, on a thread that ends afterwards: no thread ever comes back from a namespace.
    pub fn run<T: Send>(&self, what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            if self.kind == CloneFlags::CLONE_NEWNS {
                // setns into a mount namespace is for those who share root and working directory with nobody.
                unshare(CloneFlags::CLONE_FS).context("unshare(CLONE_FS)")?;
            }
            setns(&self.fd, self.kind).context("setns")?;
            what()
        })
    }

    /// A path that names this namespace for programs such as ip and nsenter, as long as this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    pub fn kind(&self) -> CloneFlags {
        self.kind
    }

    /// The number that the kernel gives the namespace, as BPF programs see it.
    pub fn inode(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(std::fs::metadata(self.path())?.ino())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_a_thread<T: Send>(what: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        scope.spawn(what).join().unwrap_or_else(|_| Err(anyhow!("a thread in a namespace panicked")))
    })
}
