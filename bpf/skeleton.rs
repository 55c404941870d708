// SPDX-License-Identifier: Apache-2.0
//! Builds BPF objects and their Rust skeletons: the types of the build machine's kernel once as `vmlinux.h`, then each
//! `bpf/NAME.bpf.c` as `NAME.skel.rs` in cargo's OUT_DIR. CO-RE makes the result run on other kernels with BTF.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;

const SOURCES: &str = env!("CARGO_MANIFEST_DIR");
const KERNEL_BTF: &str = "/sys/kernel/btf/vmlinux";

/// For a build script: compile `bpf/NAME.bpf.c` for each of `names`.
pub fn build(names: &[&str]) -> Result<()> {
    println!("cargo::rerun-if-changed={SOURCES}");
    println!("cargo::rerun-if-env-changed=VMLINUX_BTF");
    let out =
        PathBuf::from(std::env::var_os("OUT_DIR").context("OUT_DIR is not set: run this through cargo")?);
    write_vmlinux_header(&out.join("vmlinux.h"))?;
    if Command::new("clang").arg("--version").output().is_err() {
        bail!("clang is needed to build the BPF programs and was not found: install it (./init.sh does)");
    }
    for name in names {
        SkeletonBuilder::new()
            .source(Path::new(SOURCES).join(format!("{name}.bpf.c")))
            .clang_args([
                "-I".as_ref(),
                out.as_os_str(),
                // Atomic operations that return the old value need the third instruction set (Linux 5.12).
                "-mcpu=v3".as_ref(),
                "-Wall".as_ref(),
                "-Werror".as_ref(),
            ])
            .build_and_generate(out.join(format!("{name}.skel.rs")))
            .with_context(|| format!("bpf/{name}.bpf.c"))?;
    }
    Ok(())
}

fn write_vmlinux_header(header: &Path) -> Result<()> {
    let btf = std::env::var("VMLINUX_BTF").unwrap_or_else(|_| KERNEL_BTF.into());
    if !Path::new(&btf).exists() {
        bail!(
            "{btf} does not exist, so the kernel's types are not known: build on a kernel with \
             CONFIG_DEBUG_INFO_BTF=y, or set VMLINUX_BTF to the BTF of one (a copy of its {KERNEL_BTF})"
        );
    }
    // bpftool is in /usr/sbin on Debian, which is not in every user's PATH.
    let dumped = ["bpftool", "/usr/sbin/bpftool"]
        .iter()
        .find_map(|bpftool| {
            Command::new(bpftool).args(["btf", "dump", "file", &btf, "format", "c"]).output().ok()
        })
        .context(
            "bpftool is needed to read the kernel's types and was not found: install it (./init.sh does)",
        )?;
    if !dumped.status.success() {
        bail!("bpftool cannot read {btf}: {}", String::from_utf8_lossy(&dumped.stderr).trim());
    }
    std::fs::write(header, dumped.stdout).with_context(|| format!("cannot write {}", header.display()))
}
