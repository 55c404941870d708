// SPDX-License-Identifier: Apache-2.0
//! What the modules with BPF programs share: their skeletons, the records that iterators write, and how programs are run.

use std::io::{self, Read};

use libbpf_rs::{Iter, Link, ProgramInput, ProgramMut};

use crate::bytes::{Plain, from_bytes};

/// The module `skeleton`, made by libbpf-cargo from `bpf/NAME.bpf.c`.
macro_rules! skeleton {
    ($name:literal) => {
        #[allow(
            clippy::all,
            clippy::pedantic,
            clippy::undocumented_unsafe_blocks,
            clippy::unwrap_used,
            clippy::expect_used,
            dead_code
        )]
        mod skeleton {
            include!(concat!(env!("OUT_DIR"), "/", $name, ".skel.rs"));
        }
    };
}
pub(crate) use skeleton;

/// All that an iterator writes now.
pub fn records<T: Plain>(iterator: &Link) -> io::Result<Vec<T>> {
    let mut bytes = Vec::new();
    Iter::new(iterator).map_err(io::Error::other)?.read_to_end(&mut bytes)?;
    Ok(bytes.chunks_exact(size_of::<T>()).filter_map(from_bytes).collect())
}

/// Run a program of the kind `raw_tp` in this thread, and return what it returns.
pub fn run(program: &mut ProgramMut<'_>, arguments: &[u64]) -> Result<u32, libbpf_rs::Error> {
    let mut context: Vec<u8> = arguments.iter().flat_map(|argument| argument.to_ne_bytes()).collect();
    let input = ProgramInput { context_in: Some(&mut context), ..ProgramInput::default() };
    program.test_run(input).map(|output| output.return_value)
}
