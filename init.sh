#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Installs what building and testing need on Debian 12 or later, and mounts what tracing needs. Safe to repeat.
# What only some tests need is installed by name (`./init.sh programs cluster`): `programs`, the servers and clients of
# test/lab/tests/programs.rs and of the benchmarks; `containers`, containerd, and what makes a clean system; `engines`, Podman
# and Docker; `web`, a browser, and Prometheus as the judge of metrics; `cluster`, what building and running a Kubernetes API
# server needs; `kubernetes`, the same for a cluster with nodes; `deploy`, what judges manifests, image and package.
set -euo pipefail

packages=(
    clang llvm libelf-dev zlib1g-dev pkg-config gcc libc6-dev make # the programs and their BPF
    bpftool                                                      # vmlinux.h, and looking at what was loaded
    iproute2 procps util-linux nftables openssl python3          # the lab
    iperf3 sockperf                                              # throughput and latency
    nftables conntrack musl-tools gcc-multilib                   # the matrix: NAT, and programs of other kinds
    qemu-system-x86 busybox-static cpio jq                       # the second kernel
)
if [[ " $* " == *" web "* ]]; then
    packages+=(chromium prometheus fonts-dejavu-core)
fi
if [[ " $* " == *" programs "* ]]; then
    packages+=(
        redis-server redis-tools memcached libmemcached-tools postgresql-15 postgresql-contrib # stores
        nginx-light wrk curl                                                                   # web
        rsync openssh-server openssh-client                                                    # files
        openmpi-bin libopenmpi-dev netpipe-openmpi                                             # MPI
        golang-go default-jdk-headless nodejs python3                                          # languages
    )
fi
if [[ " $* " == *" containers "* || " $* " == *" deploy "* || " $* " == *" kubernetes "* ]]; then
    packages+=(containerd runc containernetworking-plugins)
fi
if [[ " $* " == *" containers "* || " $* " == *" deploy "* ]]; then
    packages+=(debootstrap systemd-container) # a clean system: for nodes that are containers, and for the package
fi
if [[ " $* " == *" engines "* ]]; then
    packages+=(podman conmon docker.io)
fi
if [[ " $* " == *" kubernetes "* ]]; then
    packages+=(
        iptables                                                               # kube-proxy
        dnsmasq-base                                                           # names of services
        python3-venv                                                           # Helm
        bash hostname memcached libmemcached-tools openmpi-bin libopenmpi-dev netpipe-openmpi # test/jobs
        openssh-server openssh-client
    )
fi
if [[ " $* " == *" cluster "* || " $* " == *" kubernetes "* ]]; then
    packages+=(etcd-server golang-go curl ca-certificates openssl)
    # Other packages have it as well, at the same path.
    command -v kubectl >/dev/null || packages+=(kubernetes-client)
fi

if [[ " $* " == *" deploy "* ]]; then
    command -v kubectl >/dev/null || packages+=(kubernetes-client) # kustomize
    packages+=(dpkg-dev)                                           # what the package depends on
fi

missing=()
for package in "${packages[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $state == installed ]] || missing+=("$package")
done
if ((${#missing[@]})); then
    ((EUID == 0)) || { echo "error: ${missing[*]} must be installed: run $0 as root" >&2; exit 1; }
    echo "installing ${missing[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get -qq update
    # Debian starts a server when it installs it; these are wanted for tests only.
    policy=/usr/sbin/policy-rc.d
    if [[ ! -e $policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >$policy && chmod +x $policy
        trap 'rm -f "$policy"' EXIT
    fi
    apt-get -qq install --no-install-recommends -y "${missing[@]}" >/dev/null
fi

# In another order on each machine: rustup's directory, or the distribution's.
command -v cargo >/dev/null || [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo ]] ||
    { echo "error: cargo is missing: install Rust from https://rustup.rs" >&2; exit 1; }

# Debian has no package of Helm. PyPI has it as a library (Helm's own, in Go), with one for Python around it that asks for a
# later Python than Debian 12's, and runs with that as well.
helm=$HOME/.cache/ebpf-router/helm
if [[ " $* " == *" kubernetes "* ]] && ! "$helm/bin/python" -c 'import helm_sdkpy' 2>/dev/null; then
    /usr/bin/python3 -m venv --clear "$helm"
    "$helm/bin/pip" --quiet --disable-pip-version-check install --ignore-requires-python helm-sdkpy==0.1.32
fi

if [[ " $* " == *" deploy "* ]]; then
    command -v cargo-deb >/dev/null || [[ -x ${CARGO_HOME:-$HOME/.cargo}/bin/cargo-deb ]] ||
        cargo install --quiet --locked cargo-deb
fi

if ((EUID == 0)); then
    grep -q ' cgroup2 ' /proc/self/mounts || {
        mkdir -p /sys/fs/cgroup/unified
        mount -t cgroup2 none /sys/fs/cgroup/unified
    }
fi
