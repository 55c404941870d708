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
    forwarder/src/lib.rs             options::
    src/lib.rs                       stall::tests
    src/lib.rs                       trace::tests
    test/lab/tests/lab.rs            two_labs_with_the_same_addresses_are_up_at_once
    test/lab/tests/tracing.rs        traced
    test/lab/tests/young.rs          after_zero_swaps_at_once
    test/lab/tests/swap.rs           an_idle_connection_survives_twenty_swaps
)
# Looked for on this machine; a test that needs one that is not here fails in the guest and says so.
tools=(sh find rm ip bridge ss nsenter setpriv iperf3 sockperf bpftool)
limit=900 # seconds

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
if [[ ${1:-} == --package ]]; then package=$2 && shift 2; fi
if (($# > 0)); then tests=("$@"); fi
((${#tests[@]} % 2 == 0)) || fail "each SOURCE needs a FILTER"

for program in qemu-system-x86_64 busybox cpio jq; do
    command -v $program >/dev/null || skip "$program is not installed"
done

# What cargo makes, as lines of: is it a test, main file, executable. First, because cargo marks the target directory
# as its own only when it makes it, and the lab finds programs by that mark.
built=$({
    cargo build --release --locked --workspace --message-format=json-render-diagnostics &&
        cargo test --release --locked --workspace --no-run --message-format=json-render-diagnostics
} | jq -r 'select(.executable) | [.profile.test, .target.src_path, .executable] | @tsv')
mapfile -t programs < <(awk -F '\t' '$1 == "false" { print $3 }' <<<"$built" | sort -u)
commands=
for ((i = 0; i < ${#tests[@]}; i += 2)); do
    source=${tests[i]} filter=${tests[i + 1]}
    test=$(awk -F '\t' -v source="$PWD/$source" '$1 == "true" && $2 == source { print $3 }' <<<"$built")
    [[ -n $test ]] || fail "cargo makes no test executable from $source"
    # A filter that chooses nothing would pass.
    "$test" --list "$filter" | grep ': test$' >/dev/null || fail "$source has no test named \"$filter\""
    [[ " ${programs[*]} " == *" $test "* ]] || programs+=("$test")
    # One test at a time: they share two slow processors.
    commands+="echo 'kernel: $source $filter'; $test --test-threads 1 '$filter' || failed=1"$'\n'
done
for tool in "${tools[@]}"; do
    if path=$(command -v "$tool"); then programs+=("$path"); fi
done

# The kernel's package, unpacked. A metapackage names the one that holds the newest kernel.
real=$(apt-cache depends "$package" 2>&1 | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p') || true
package=${real:-$package}
uri=$(apt-get download --print-uris "$package" 2>&1) || skip "apt does not offer $package: $uri"
deb=$(cut -d ' ' -f 2 <<<"$uri")
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

# The guest's files: everything at the path that it has here, libraries included.
root=$target/kernel/root
rm -rf "$root"
mkdir -p "$root"/{proc,sys,dev,run,tmp,busybox,usr/{bin,sbin,lib,lib64}}
for directory in bin sbin lib lib64; do ln -s usr/$directory "$root/$directory"; done
libraries=$(ldd "${programs[@]}" | grep -o '/[^ :]*\.so[^ ]*' | sort -u)
cp -L --parents -t "$root" "${programs[@]}" $libraries
cp -r "$kernel/lib/modules" "$root/lib"
# Last in the guest's PATH, for all that is not packed as a tool.
cp "$(command -v busybox)" "$root/bin"
for name in $(busybox --list); do ln -s /bin/busybox "$root/busybox/$name"; done
ln -s /bin/busybox "$root/sbin/modprobe" # where the kernel looks for it

# What the guest does, as its first process: where that ends early, the kernel panics and the machine ends.
cat >"$root/init" <<EOF
#!/bin/sh -e
export PATH=/usr/sbin:/usr/bin:/busybox HOME=/ LAB_QUIET=1 LAB_PROGRAMS=$target/release
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
mount -t tmpfs none /run
mount -t cgroup2 none /sys/fs/cgroup
mount -t bpf none /sys/fs/bpf
mount -t debugfs none /sys/kernel/debug
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
    -serial stdio </dev/null | sed -u 's/\r$//' | tee "$log" || fail "qemu failed, or did not end within $limit s"
status=$(sed -n 's/^kernel: status //p' "$log")
[[ -n $status ]] || fail "the guest ended before its tests did"
exit "$status"
