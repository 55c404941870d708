// SPDX-License-Identifier: Apache-2.0
//! `seeds DIRECTORY`: writes what each target begins with to a directory of the target's name.

use std::{io, path::PathBuf};

fn main() -> io::Result<()> {
    let corpus = std::env::args_os().nth(1).map(PathBuf::from);
    let corpus = corpus.ok_or_else(|| io::Error::other("the corpora's directory is missing"))?;
    for (target, seeds) in fuzz::seeds::all() {
        let directory = corpus.join(target);
        std::fs::create_dir_all(&directory)?;
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
