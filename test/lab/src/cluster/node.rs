// SPDX-License-Identifier: Apache-2.0
//! A host of the lab as a node: what a machine of its own would have, containerd, kubelet and kube-proxy.

use std::{net::Ipv4Addr, process::Command};

use anyhow::{Context, Result, ensure};

use crate::{
    ApiServer, Cgroup, Host, Process,
    api_server::{CLUSTER_IPS, PROXY, kubernetes_program},
    containerd::{Containerd, LAB_IMAGE, SOCKET},
    keeper,
    network::{HOST_IF, PODS, overlay_v4},
};

/// A node, running.
pub struct Node<'lab> {
    /// Before its runtime: it is dropped first.
    pub kubelet: Process,
    pub proxy: Process,
    pub containerd: Containerd<'lab>,
}

/// Where pods ask for names: the bridge of h1.
pub fn dns_address() -> Ipv4Addr {
    overlay_v4(1, 1)
}

/// What kubelet would set for the whole machine, if it found anything else: it finds files.
const SYSCTLS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// $1: the host's directory, $2: its cgroup below the root of all hierarchies, $3: the directory of all labs.
const FURNISH: &str = r#"
own=$1 cgroup=$2 labs=$3
# Over /run first: the directory itself is in there.
cd "$labs"
mount -t tmpfs none /run
mkdir -p "$labs"
mount --no-canonicalize --rbind . "$labs"
cd /
for place in etc var/lib var/log; do
    upper=$own/over/$place
    mkdir -p "$upper" "$upper.work"
    mount -t overlay none -o "lowerdir=/$place,upperdir=$upper,workdir=$upper.work" "/$place"
done
mkdir -p /var/lib/kubelet
mount --bind "$own/bpf" /sys/fs/bpf
# The host's part of each hierarchy, as if there were no other.
mkdir "$own/cgroup"
mount -t tmpfs none "$own/cgroup"
for hierarchy in /sys/fs/cgroup/*/; do
    hierarchy=${hierarchy%/}
    part=$hierarchy$cgroup
    mkdir -p "$part" "$own/cgroup/${hierarchy##*/}"
    # Empty in a new cgroup, and nobody can run there.
    if [ -e "$part/cpuset.cpus" ]; then
        for directory in "${part%/*}" "$part"; do
            for file in cpuset.cpus cpuset.mems; do cat "$hierarchy/$file" >"$directory/$file"; done
        done
    fi
    mount --bind "$part" "$own/cgroup/${hierarchy##*/}"
done
umount --recursive /sys/fs/cgroup
mount --move "$own/cgroup" /sys/fs/cgroup
"#;

/// Gives a host its own of what else all hosts of the lab would share. Once, before anything runs on it.
pub fn furnish(host: &Host) -> Result<()> {
    ensure!(
        Cgroup::root()?.path() != "/sys/fs/cgroup",
        "a cluster in the lab needs cgroups of version 1, with version 2 beside them"
    );
    let place = host.place();
    let own = &place.directory;
    let mut script = FURNISH.to_owned();
    for (name, value) in SYSCTLS {
        let file = own.join("sysctl").join(name.replace('/', "."));
        std::fs::create_dir_all(own.join("sysctl"))?;
        std::fs::write(&file, format!("{value}\n"))?;
        script += &format!("mount --bind {} /proc/sys/{name}\n", file.display());
    }
    let file = own.join("furnish.sh");
    std::fs::write(&file, script)?;
    let mut shell = Command::new("sh");
    shell.arg("-e").arg(file).args([own, &host.cgroup().relative()?, &keeper::directory()]);
    place.run(&mut shell).context("giving the host directories of its own")?;
    // In place of a default route: what has none is not sent, and so not translated.
    crate::network::ip(place, &format!("route add {CLUSTER_IPS} dev {HOST_IF}\n"))
}

impl Node<'_> {
    pub fn start<'lab>(host: &'lab Host, server: &ApiServer) -> Result<Node<'lab>> {
        let containerd = Containerd::start_with(host, "overlayfs")?;
        let directory = host.place().directory.join("kubelet");
        std::fs::create_dir_all(&directory)?;
        let names = directory.join("resolv.conf");
        std::fs::write(&names, format!("nameserver {}\n", dns_address()))?;
        let mut kubelet = Command::new(kubernetes_program("kubelet")?);
        kubelet
            .args(["--hostname-override", &host.name, "--node-ip", &host.address.to_string()])
            .args([
                "--container-runtime",
                "remote",
                "--container-runtime-endpoint",
                &format!("unix://{SOCKET}"),
            ])
            .args(["--pod-infra-container-image", LAB_IMAGE, "--cgroup-driver", "cgroupfs"])
            // What this machine may lack: swap is none of our business, and root may not be all-powerful.
            .args(["--fail-swap-on=false", "--oom-score-adj", "0", "--enforce-node-allocatable", ""])
            .args(["--eviction-hard", "", "--image-gc-high-threshold", "100"])
            .args(["--cluster-dns", &dns_address().to_string(), "--cluster-domain", "cluster.local"])
            .args(["--node-status-update-frequency", "2s", "--sync-frequency", "10s"])
            .arg("--resolv-conf")
            .arg(&names)
            .arg("--root-dir")
            .arg(directory.join("root"))
            .arg("--cert-dir")
            .arg(directory.join("certificates"))
            .arg("--volume-plugin-dir")
            .arg(directory.join("plugins"))
            .arg("--kubeconfig")
            .arg(server.kubeconfig(&format!("system:node:{}", host.name)));
        let kubelet = host.place().spawn("kubelet", &mut kubelet)?;
        Ok(Node { kubelet, proxy: start_proxy(host, server)?, containerd })
    }
}

/// It translates the addresses of Services.
fn start_proxy(host: &Host, server: &ApiServer) -> Result<Process> {
    let mut proxy = Command::new(kubernetes_program("kube-proxy")?);
    proxy
        .args(["--proxy-mode", "iptables", "--cluster-cidr", PODS, "--hostname-override", &host.name])
        // What this machine may lack, and what is the whole machine's.
        .args(["--oom-score-adj", "0", "--conntrack-max-per-core", "0"])
        .arg("--kubeconfig")
        .arg(server.kubeconfig(PROXY));
    host.place().spawn("kube-proxy", &mut proxy)
}
