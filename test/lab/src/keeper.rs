// SPDX-License-Identifier: Apache-2.0
//! Who cleans a lab up: a process that waits for its standard input to end, which it does when the owner of the lab
//! drops it, exits, or is killed. Then it kills what runs in the lab's cgroup and removes cgroup and directory.
//! Dropping a lab and losing its owner are one path.

use std::{
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};

use crate::Cgroup;

/// Names of the labs' cgroups begin with this and end with the owner's process id.
pub const PREFIX: &str = "lab-";

/// Where the labs' directories are.
pub fn directory() -> PathBuf {
    PathBuf::from("/run/ebpf-router-lab")
}

const SCRIPT: &str = r#"
cat >/dev/null
[ ! -e "$1/cgroup.kill" ] || echo 1 >"$1/cgroup.kill"
tries=0
while [ -d "$1" ] && [ $tries -lt 500 ]; do
    find "$1" -depth -type d -exec rmdir {} \; 2>/dev/null || sleep 0.02
    tries=$((tries + 1))
done
# Containers are in the hierarchies of version 1 too, where there are any.
for directory in /sys/fs/cgroup/*/"$(basename "$1")"; do
    [ ! -d "$directory" ] || find "$directory" -depth -type d -exec rmdir {} \; 2>/dev/null
done
rm -rf --one-file-system "$2"
rmdir "$(dirname "$2")" 2>/dev/null
[ ! -d "$1" ]
"#;

pub struct Keeper {
    child: Child,
}

impl Keeper {
    /// Starts before the first resource exists, so that a half-built lab is cleaned up too.
    pub fn start(cgroup: &Cgroup, directory: &Path) -> Result<Keeper> {
        ensure!(!cgroup.path().exists(), "a lab of this name is up: {}", cgroup.path().display());
        let child = script(cgroup.path(), directory, Stdio::piped()).context("starting sh")?;
        Ok(Keeper { child })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        match self.child.wait() {
            Ok(status) if status.success() => (),
            other => eprintln!("the lab was not cleaned up: {other:?}"),
        }
    }
}

fn script(cgroup: &Path, directory: &Path, stdin: Stdio) -> std::io::Result<Child> {
    Command::new("sh")
        .args(["-c", SCRIPT, "lab-keeper"])
        .args([cgroup, directory])
        .stdin(stdin)
        .stdout(Stdio::null())
        // Not in the owner's group: what interrupts the owner must not interrupt this.
        .process_group(0)
        .spawn()
}

/// Cleans up after owners whose keeper was killed as well.
pub fn sweep() {
    let Ok(root) = Cgroup::root() else { return };
    let Ok(entries) = std::fs::read_dir(root.path()) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(lab) = name.strip_prefix(PREFIX) else { continue };
        let owner = lab.rsplit('-').next().and_then(|pid| pid.parse::<u32>().ok());
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let cleaned = script(&entry.path(), &directory().join(lab), Stdio::null());
            let _ = cleaned.and_then(|mut child| child.wait());
        }
    }
}
