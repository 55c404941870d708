// SPDX-License-Identifier: Apache-2.0
//! Builds the skeleton of `bpf/inspect.bpf.c`.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;

const BTF: &str = "/sys/kernel/btf/vmlinux";

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set: run by cargo only")?);
    let bpf = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set")?)
        .join("../bpf");
    let dump = Command::new("bpftool")
        .args(["btf", "dump", "file", BTF, "format", "c"])
        .output()
        .context("bpftool cannot be run: install Debian's package bpftool (./init.sh does)")?;
    if !dump.status.success() {
        bail!("bpftool cannot dump {BTF}: {}", String::from_utf8_lossy(&dump.stderr));
    }
    std::fs::write(out.join("vmlinux.h"), dump.stdout)?;
    SkeletonBuilder::new()
        .source(bpf.join("inspect.bpf.c"))
        .clang_args([format!("-I{}", out.display()), format!("-I{}", bpf.display())])
        .build_and_generate(out.join("inspect.skel.rs"))
        .context("bpf/inspect.bpf.c does not compile: clang is needed (./init.sh installs it)")?;
    println!("cargo:rerun-if-changed={}", bpf.display());
    Ok(())
}
