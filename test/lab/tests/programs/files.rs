// SPDX-License-Identifier: Apache-2.0
//! Programs that copy trees of files.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use lab::{
    Process, Scene,
    programs::{command, directory},
};

use crate::{expect_equal, load, run, server};

/// Large files beside each other, small ones in directories below.
fn tree(scene: &Scene) -> Result<PathBuf> {
    let tree = directory(&scene.lab, "tree")?;
    for number in 0..40 {
        std::fs::write(tree.join(number.to_string()), format!("file {number} ").repeat(2_000_000))?;
        let below = tree.join(format!("below-{number}"));
        std::fs::create_dir(&below)?;
        for small in 0..10 {
            std::fs::write(below.join(small.to_string()), format!("{number} {small}\n").repeat(small * 100))?;
        }
    }
    Ok(tree)
}

#[test]
fn rsync_copies_a_tree_as_it_is() -> Result<()> {
    let scene = Scene::with_routers("rsync")?;
    let (tree, copy) = (tree(&scene)?, scene.lab.directory().join("copy"));
    let ip = scene.server.v4;
    let configuration = scene.lab.directory().join("rsyncd.conf");
    std::fs::write(
        &configuration,
        format!("use chroot = no\n[tree]\npath = {}\nuid = root\n", tree.display()),
    )?;
    let daemon = format!("rsync --daemon --no-detach --port 8730 --address {ip}");
    let _rsync = server(&scene, 8730, &format!("{daemon} --config {}", configuration.display()))?;
    let from = format!("rsync://{ip}:8730/tree/");
    load(&scene, 8730, &format!("rsync -a --whole-file --bwlimit=60m {from} {}/", copy.display()))?;
    expect_equal(&tree, &copy)
}

/// An SSH server that knows one key, made for this test, and the beginning of an scp command that has it.
fn sshd(scene: &Scene) -> Result<(Process, String)> {
    let keys = directory(&scene.lab, "keys")?;
    let key = |name: &str| -> Result<()> {
        let file = keys.join(name).display().to_string();
        scene.client.place().run(command("ssh-keygen -q -t ed25519 -f").args([&file, "-N", ""])).map(drop)
    };
    key("host")?;
    key("user")?;
    let (ip, keys) = (scene.server.v4, keys.display());
    let host = std::fs::read_to_string(format!("{keys}/host.pub"))?;
    std::fs::write(format!("{keys}/known_hosts"), format!("[{ip}]:2222 {host}"))?;
    std::fs::write(
        format!("{keys}/sshd_config"),
        format!(
            "ListenAddress {ip}:2222\nHostKey {keys}/host\nAuthorizedKeysFile {keys}/user.pub\nPidFile none\n\
             PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nSubsystem sftp internal-sftp\n"
        ),
    )?;
    // What Debian's service makes when it starts, and sshd demands.
    std::fs::create_dir_all(Path::new("/run/sshd"))?;
    let server = server(scene, 2222, &format!("/usr/sbin/sshd -D -e -f {keys}/sshd_config"))?;
    let scp = format!("scp -F none -i {keys}/user -o UserKnownHostsFile={keys}/known_hosts -P 2222");
    Ok((server, format!("{scp} -B -q -r -l 480000")))
}

#[test]
fn scp_copies_a_tree_there() -> Result<()> {
    let scene = Scene::with_routers("scp-there")?;
    let (tree, copy) = (tree(&scene)?, scene.lab.directory().join("copy"));
    let (_sshd, scp) = sshd(&scene)?;
    load(&scene, 2222, &format!("{scp} {} root@{}:{}", tree.display(), scene.server.v4, copy.display()))?;
    expect_equal(&tree, &copy)
}

#[test]
fn scp_copies_a_tree_back() -> Result<()> {
    let scene = Scene::with_routers("scp-back")?;
    let (tree, copy) = (tree(&scene)?, scene.lab.directory().join("copy"));
    let (_sshd, scp) = sshd(&scene)?;
    load(&scene, 2222, &format!("{scp} root@{}:{} {}", scene.server.v4, tree.display(), copy.display()))?;
    expect_equal(&tree, &copy)
}

/// While a client logs in, sshd's process for it may make very few system calls: another one would end it.
#[test]
fn sshd_lets_everybody_in() -> Result<()> {
    let scene = Scene::with_routers("sshd")?;
    let (file, copy) = (scene.lab.directory().join("file"), scene.lab.directory().join("copy"));
    std::fs::write(&file, "file")?;
    let (_sshd, scp) = sshd(&scene)?;
    let words = format!("{scp} {} root@{}:{}", file.display(), scene.server.v4, copy.display());
    for number in 1..=40 {
        run(&scene, &words).with_context(|| format!("login {number}"))?;
    }
    expect_equal(&file, &copy)
}
