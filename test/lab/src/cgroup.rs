// SPDX-License-Identifier: Apache-2.0
//! Directories of the version 2 hierarchy.

use std::{
    fs::{File, OpenOptions},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

#[derive(Clone, Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The mount point of the version 2 hierarchy, which may be the only one or stand beside version 1.
    pub fn root() -> Result<Cgroup> {
        let mounts = std::fs::read_to_string("/proc/self/mounts").context("reading /proc/self/mounts")?;
        let path = mounts
            .lines()
            .filter_map(|line| {
                let mut fields = line.split(' ');
                Some((fields.nth(1)?, fields.next()?))
            })
            .find_map(|(path, kind)| (kind == "cgroup2").then(|| PathBuf::from(path)))
            .context("no cgroup2 is mounted")?;
        Ok(Cgroup { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Below the root of its hierarchy, from `/`.
    pub fn relative(&self) -> Result<PathBuf> {
        Ok(Path::new("/").join(self.path.strip_prefix(Cgroup::root()?.path())?))
    }

    pub fn child(&self, name: &str) -> Cgroup {
        Cgroup { path: self.path.join(name) }
    }

    pub fn make(&self) -> Result<()> {
        std::fs::create_dir_all(&self.path).with_context(|| format!("making {}", self.path.display()))
    }

    /// Whoever writes `0` to this file moves into the cgroup.
    pub fn entrance(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// The processes in this cgroup and below.
    pub fn processes(&self) -> Vec<u32> {
        let mut pids: Vec<u32> = std::fs::read_to_string(self.path.join("cgroup.procs"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.parse().ok())
            .collect();
        for entry in std::fs::read_dir(&self.path).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                pids.extend(Cgroup { path: entry.path() }.processes());
            }
        }
        pids
    }
}
