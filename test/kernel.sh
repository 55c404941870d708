#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Runs tests under Debian's cloud kernel, in a virtual machine: some of what the programs can do depends on the kernel,
# and the kernel of this machine takes only one of the ways.
#
#   test/kernel.sh [--package PACKAGE] [SOURCE FILTER]...
#
# SOURCE is the main file of a test executable, FILTER chooses tests in it as `cargo test` does ('' takes them all).
# Without them, those listed here run.
tests=(
    test/lab/tests/lab.rs            two_labs_with_the_same_addresses_are_up_at_once
    test/lab/tests/without_router.rs every_kind_of_address_passes
)
# Where these tests and the programs that they start come from.
packages=(--package lab)
# Looked for on this machine; a test that needs one that is not here fails in the guest and says so.
tools=(sh find rm ip bridge ss nsenter setpriv iperf3 sockperf bpftool)
# Seconds, for all of them in a processor that is emulated.
limit=900

set -euo pipefail
cd "$(dirname "$0")/.."
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")

fail() {
    echo "second kernel: $1" >&2
    exit 1
}

# On CI everything is there, so that a skip would hide something.
skip() {
    echo "skipped: second kernel: $1"
    [[ -z ${CI:-} ]]
    exit
}

package=linux-image-cloud-amd64
if [[ ${1:-} == --package ]]; then
    package=$2
    shift 2
fi
if (($# > 0)); then tests=("$@"); fi
((${#tests[@]} % 2 == 0)) || fail "each SOURCE needs a FILTER"

for program in qemu-system-x86_64 busybox cpio jq; do
    [[ -n $(command -v $program) ]] || skip "$program is not installed"
done

# The kernel's package, unpacked. A metapackage names the one that holds the newest kernel.
depends=$(apt-cache depends "$package" 2>&1) || skip "apt knows no package $package"
real=$(sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' <<<"$depends")
package=${real:-$package}
deb=$(apt-get download --print-uris "$package" 2>&1) || skip "apt does not offer $package: $deb"
deb=$(cut -d ' ' -f 2 <<<"$deb")
kernel=$target/kernel/${deb%.deb}
if [[ ! -d $kernel ]]; then
    mkdir -p "$target/kernel"
    (cd "$target/kernel" && apt-get -qq -o APT::Sandbox::User=root download "$package") || skip "$package: no download"
    rm -rf "$kernel.part"
    dpkg-deb -x "$target/kernel/$deb" "$kernel.part"
    # Not in the package: apt makes the list of dependencies when it installs.
    busybox depmod -b "$kernel.part" "$(ls "$kernel.part/lib/modules")"
    mv "$kernel.part" "$kernel"
    rm "$target/kernel/$deb"
fi

# What cargo has built, as lines of: is it a test, main file, executable.
built=$({
    cargo build --release --locked "${packages[@]}" --message-format=json
    cargo test --release --locked "${packages[@]}" --no-run --message-format=json
} | jq -r 'select(.executable) | [.profile.test, .target.src_path, .executable] | @tsv')

mapfile -t programs < <(awk -F '\t' '$1 == "false" { print $3 }' <<<"$built")
executables=()
commands=
for ((i = 0; i < ${#tests[@]}; i += 2)); do
    source=${tests[i]} filter=${tests[i + 1]}
    executable=$(awk -F '\t' -v source="$PWD/$source" '$1 == "true" && $2 == source { print $3 }' <<<"$built")
    [[ -n $executable ]] || fail "no package among \"${packages[*]}\" has a test executable made from $source"
    # A filter that chooses nothing would pass.
    "$executable" --list $filter | grep ': test$' >/dev/null || fail "$source has no test named \"$filter\""
    executables+=("$executable")
    # One at a time: they share two slow processors.
    commands+="echo 'kernel: $source $filter'; $executable --test-threads 1 $filter || failed=1"$'\n'
done

# The guest's files: everything at the path that it has here, libraries included.
root=$target/kernel/root
rm -rf "$root"
mkdir -p "$root"/{proc,sys,dev,run,tmp,applets,usr/{bin,sbin,lib,lib64}}
for directory in bin sbin lib lib64; do ln -s usr/$directory "$root/$directory"; done
pack() {
    { printf '%s\n' "$@" && ldd "$@" | grep -o '/[^ :]*\.so[^ ]*'; } | sort -u | xargs cp -L --parents -t "$root"
}
for tool in "${tools[@]}"; do
    if path=$(command -v "$tool"); then programs+=("$path"); fi
done
pack "${programs[@]}" "${executables[@]}"
# Last in the guest's PATH: only what is not there in full.
cp -L "$(command -v busybox)" "$root/bin/busybox"
for applet in $(busybox --list); do ln -s /bin/busybox "$root/applets/$applet"; done
ln -s /bin/busybox "$root/sbin/modprobe"
modules=lib/modules/$(ls "$kernel/lib/modules")
mkdir -p "$root/$modules"
(cd "$kernel" && cp -r --parents "$modules"/{modules.*,kernel/{crypto,lib,net,drivers/net/{veth.ko,vxlan}}} "$root")

# What the guest does, as its first process: where that ends early, the kernel panics and the machine ends.
cat >"$root/init" <<EOF
#!/bin/sh -e
export PATH=/usr/sbin:/usr/bin:/applets HOME=/ LAB_QUIET=1 LAB_PROGRAMS=$target/release
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
mount -t cgroup2 cgroup /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
ip link set lo up
modprobe -a veth bridge vxlan tcp_diag udp_diag unix_diag
echo "kernel: \$(uname -r), up after \$(cut -d ' ' -f 1 /proc/uptime) s"
failed=0
${commands}echo "kernel: status \$failed"
poweroff -f
EOF
chmod +x "$root/init"
(cd "$root" && find . | cpio --quiet -o -H newc) >"$target/kernel/initramfs"

log=$target/kernel/log
# Emulated everywhere: where this machine is itself a virtual one, its /dev/kvm may be there and boot nothing.
timeout --foreground "$limit" qemu-system-x86_64 -accel tcg -cpu max -smp 2 -m 2G -nodefaults -no-reboot -display none \
    -kernel "$kernel"/boot/vmlinuz-* -initrd "$target/kernel/initramfs" -append 'console=ttyS0 quiet panic=-1' \
    -serial stdio </dev/null | sed -u 's/\r$//' | tee "$log" || {
    ((PIPESTATUS[0] != 124)) || fail "the guest did not end within $limit s"
    fail "qemu failed"
}
status=$(sed -n 's/^kernel: status //p' "$log")
[[ -n $status ]] || fail "the guest ended before its tests did"
exit "$status"
