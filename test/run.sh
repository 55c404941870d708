#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# All tests. `test/run.sh swap web` runs only the test files of these names. What takes long, or installs much, is added by
# an argument:
#   --programs      redis, PostgreSQL, nginx and others, moved under load
#   --adversity     what they need is taken away amid moves: paths, disk, descriptors
#   --containers    containers made over CRI by containerd
#   --engines       containers of Podman and Docker
#   --cluster       a Kubernetes API server, which is built once
#   --kubernetes    a cluster of two nodes, whose programs are built once, and the Helm chart in it
#   --deploy        manifests, image and Debian package
#   --web           the page in a browser
#   --kernel        a part of the tests under a second kernel, emulated
#   --fuzz MINUTES  the fuzz targets only, one after the other, for so long in all
set -euo pipefail
cd "$(dirname "$0")/.."
((EUID == 0)) || { echo "error: namespaces, BPF and ptrace need root: run $0 as root" >&2; exit 1; }

# Their test files have their names.
long=(programs adversity containers engines cluster kubernetes deploy web)
kernel=no added=() words=() failed=()
if [[ ${1:-} == --fuzz ]]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || { echo "error: --fuzz ${2:-}: expected minutes, as in --fuzz 60" >&2; exit 1; }
    exec test/fuzz.sh "$2"
fi
is_among() { [[ " ${*:2} " == *" $1 "* ]]; }
for argument in "$@"; do
    case $argument in
        --kernel) kernel=yes ;;
        --*)
            is_among "${argument#--}" "${long[@]}" || {
                echo "error: $argument: expected --kernel, --fuzz MINUTES, ${long[*]/#/--}, or names of test files" >&2
                exit 1
            }
            added+=("${argument#--}")
            ;;
        *)
            [[ -e test/lab/tests/$argument.rs || -e test/lab/tests/$argument/main.rs ]] || {
                echo "error: $argument: no such file in test/lab/tests" >&2
                exit 1
            }
            words+=("$argument")
            ! is_among "$argument" "${long[@]}" || added+=("$argument")
            ;;
    esac
done
./init.sh "${added[@]}"
! is_among cluster "${added[@]}" && ! is_among kubernetes "${added[@]}" || test/kubernetes.sh
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin LAB_QUIET=1 RUST_BACKTRACE=${RUST_BACKTRACE:-0}

lab() { "${CARGO_TARGET_DIR:-target}/release/lab" "$@"; }

if ((${#words[@]} == 0)); then
    cargo fmt --all --check
    # It compiles every dependency once more, in its own way: CI has time for the tests.
    [[ -n ${CI:-} ]] || cargo clippy --release --locked --workspace --all-targets -- -D warnings
fi
cargo build --release --locked --workspace
# For the tests of kills: a forwarder that dies where it is told to. Of the workspace as well: `-p forwarder` alone has fewer
# features of its dependencies, and would build them anew.
cargo build --release --locked --workspace --features forwarder/faults --bin forwarder-with-faults

if ((${#words[@]} == 0)); then
    cargo test --release --locked --workspace --lib --bins
fi
# What is measured and what is stopped is sensitive to company: one lab at a time.
for file in test/lab/tests/*.rs test/lab/tests/*/main.rs; do
    name=$(basename "${file%/main.rs}" .rs)
    ! is_among "$name" "${long[@]}" || is_among "$name" "${added[@]}" || continue
    if ((${#words[@]} == 0)) || is_among "$name" "${words[@]}"; then
        [[ $name != transparency ]] || lab transparency --clear
        # The files after one that fails have something to say as well.
        cargo test --release --locked --workspace --test "$name" -- --test-threads 1 || failed+=("$name")
        [[ $name != transparency ]] || lab transparency
    fi
done
if ((${#words[@]} == 0)); then
    # Each time another seed: it is printed, and `test/script.sh torture` with these options and --seed S is it again.
    lab torture --minutes 0.5 --connections 60
fi
[[ $kernel == no ]] || test/kernel.sh
((${#failed[@]} == 0)) || { echo "error: tests failed in: ${failed[*]}" >&2; exit 1; }
echo "all tests passed"
