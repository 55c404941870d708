// SPDX-License-Identifier: Apache-2.0
//! Images made on the spot: a program or two, and the libraries that they need.

use std::{
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::program;

/// busybox and `stream`; by itself it sleeps, as the first process of a pod does.
pub const LAB_IMAGE: &str = "docker.io/lab/programs:1";

/// Router and forwarder.
pub const ROUTER_IMAGE: &str = "docker.io/lab/router:1";

/// $1: the root that is made; then packages.
const PACKAGES: &str = r#"
set -euo pipefail
root=$1
shift
mkdir -p "$root"/{usr/{bin,sbin,lib,lib64,local/bin},dev,proc,sys,run,root,tmp,var/tmp,etc}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package") == installed ]]
done
apt-cache depends --recurse --installed --important "$@" | grep '^[a-z0-9]' | sort -u |
    while read -r package; do dpkg -L "$package" 2>/dev/null || true; done |
    grep -v -e '^/usr/share/\(doc\|man\|locale\|info\|lintian\|perl\)' -e '^/\.$' | sort -u |
    while read -r path; do [[ -d $path && ! -L $path ]] || [[ ! -e $path && ! -L $path ]] || echo "$path"; done |
    sed 's,^/\(bin\|sbin\|lib\|lib64\)/,/usr/\1/,' | sort -u >"$root.list"
# Made when they were installed, so no package's.
{
    find /usr/bin /usr/sbin -lname '/etc/alternatives/*'
    for path in /etc/alternatives/* /etc/{passwd,group,nsswitch.conf,ld.so.cache,ssl/openssl.cnf,ssh/ssh_config,ssh/sshd_config}; do
        [[ ! -e $path && ! -L $path ]] || echo "$path"
    done
} >>"$root.list"
tar -C / --no-recursion --files-from <(sed 's,^/,,' "$root.list") -cf - | tar -C "$root" --keep-directory-symlink -xf -
rm "$root.list"
"#;

pub struct Image;

impl Image {
    /// Makes [`LAB_IMAGE`] as a tar in this directory.
    pub fn of_lab(directory: &Path) -> Result<PathBuf> {
        let root = directory.join("rootfs");
        let bin = root.join("bin");
        std::fs::create_dir_all(&bin)?;
        std::fs::copy("/bin/busybox", bin.join("busybox")).context("/bin/busybox: run ./init.sh")?;
        symlink("busybox", bin.join("sh"))?;
        copy_with_libraries(&program("stream")?, &root, "bin/stream")?;
        let entrypoint = ["/bin/busybox", "sleep", "2147483647"];
        Image::pack(directory, &root, LAB_IMAGE, &entrypoint)
    }

    /// Makes [`ROUTER_IMAGE`] as a tar in this directory.
    pub fn of_router(directory: &Path) -> Result<PathBuf> {
        let root = directory.join("router");
        std::fs::create_dir_all(root.join("bin"))?;
        for name in ["router", "forwarder"] {
            copy_with_libraries(&program(name)?, &root, &format!("bin/{name}"))?;
        }
        Image::pack(directory, &root, ROUTER_IMAGE, &["/bin/router"])
    }

    /// Makes an image of Debian packages that are installed here, and of all that they need: without package manager,
    /// manuals, and what installing them has configured but for a few files.
    pub fn of_packages(directory: &Path, name: &str, packages: &[&str]) -> Result<PathBuf> {
        let root = directory.join("packages");
        let script = directory.join("packages.sh");
        std::fs::write(&script, PACKAGES)?;
        run(Command::new("bash").arg(&script).arg(&root).args(packages))?;
        let image = Image::pack(directory, &root, name, &["/bin/bash"])?;
        std::fs::remove_dir_all(&root)?;
        Ok(image)
    }

    /// Makes a tar, as `docker save` does, of a directory.
    pub fn pack(directory: &Path, root: &Path, name: &str, entrypoint: &[&str]) -> Result<PathBuf> {
        let (layer, image) = (directory.join("layer.tar"), directory.join("image.tar"));
        run(Command::new("tar").arg("-C").arg(root).arg("-cf").arg(&layer).arg("."))?;
        let digest = run(Command::new("sha256sum").arg(&layer))?;
        let digest = digest.split(' ').next().context("no digest")?;
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": { "Entrypoint": entrypoint, "Env": ["PATH=/usr/bin:/bin:/usr/sbin"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
        });
        let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
        std::fs::write(directory.join("config.json"), config.to_string())?;
        std::fs::write(directory.join("manifest.json"), manifest.to_string())?;
        let files = ["manifest.json", "config.json", "layer.tar"];
        run(Command::new("tar").arg("-C").arg(directory).arg("-cf").arg(&image).args(files))?;
        std::fs::remove_file(&layer)?;
        Ok(image)
    }
}

/// Copies a program, stripped, to `name` below `root`, and its libraries to where it looks for them.
fn copy_with_libraries(program: &Path, root: &Path, name: &str) -> Result<()> {
    run(Command::new("strip").arg("-o").arg(root.join(name)).arg(program))?;
    let libraries = run(Command::new("ldd").arg(program))?;
    for library in libraries.split_whitespace().filter_map(|word| word.strip_prefix('/')) {
        let copy = root.join(library);
        std::fs::create_dir_all(copy.parent().unwrap_or(root))?;
        std::fs::copy(Path::new("/").join(library), copy)?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
