// SPDX-License-Identifier: Apache-2.0
use std::path::PathBuf;

use anyhow::{Context, Result};

/// Where a program of this workspace is: in LAB_PROGRAMS if that is set, otherwise in the release directory of the
/// target directory that the running program comes from. A debug build would distort what is measured and tested.
pub fn program(name: &str) -> Result<PathBuf> {
    let directory = match std::env::var_os("LAB_PROGRAMS") {
        Some(directory) => PathBuf::from(directory),
        None => {
            let us = std::env::current_exe().context("where this program is")?;
            let target = us.ancestors().find(|directory| directory.join("CACHEDIR.TAG").exists());
            target.context("this program is not in a target directory: set LAB_PROGRAMS")?.join("release")
        }
    };
    let path = directory.join(name);
    anyhow::ensure!(
        path.exists(),
        "{} does not exist: run `cargo build --release --workspace`, or set LAB_PROGRAMS",
        path.display()
    );
    Ok(path)
}
