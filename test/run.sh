#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# All tests. `test/run.sh swap` runs only the test files of these names. `--kernel` adds a part of them under a second
# kernel, emulated; `--programs` adds those with redis, PostgreSQL and others, which take long and install servers; `--deploy`
# those of the image, the package, the manifests and the chart.
set -euo pipefail
cd "$(dirname "$0")/.."
((EUID == 0)) || { echo "error: namespaces, BPF and ptrace need root: run $0 as root" >&2; exit 1; }

kernel=no programs=no deploy=no words=() failed=()
for argument in "$@"; do
    case $argument in
        --kernel) kernel=yes ;;
        --programs) programs=yes ;;
        --deploy) deploy=yes ;;
        -*) echo "error: $argument: expected --kernel, --programs, --deploy, or names of test files" >&2 && exit 1 ;;
        *) words+=("$argument") ;;
    esac
done

if [[ $programs == yes ]]; then ./init.sh programs; else ./init.sh; fi
[[ $deploy == no ]] || ./init.sh deploy
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin LAB_QUIET=1 RUST_BACKTRACE=${RUST_BACKTRACE:-0}

lab() { "${CARGO_TARGET_DIR:-target}/release/lab" "$@"; }

if ((${#words[@]} == 0)); then
    cargo fmt --all --check
    cargo clippy --release --locked --workspace --all-targets -- -D warnings
fi
cargo build --release --locked --workspace
# For the tests of kills: a forwarder that dies where it is told to.
cargo build --release --locked -p forwarder --features faults --bin forwarder-with-faults

if ((${#words[@]} == 0)); then
    cargo test --release --locked --workspace --exclude lab
fi
# What is measured and what is stopped is sensitive to company: one lab at a time.
for file in test/lab/tests/*.rs test/lab/tests/*/main.rs; do
    name=$(basename "${file%/main.rs}" .rs)
    [[ $name != programs || $programs == yes ]] || continue
    [[ $name != deploy || $deploy == yes ]] || continue
    if ((${#words[@]} == 0)) || [[ " ${words[*]} " == *" $name "* ]]; then
        [[ $name != transparency ]] || lab transparency --clear
        # The files after one that fails have something to say as well.
        cargo test --release --locked -p lab --test "$name" -- --test-threads 1 || failed+=("$name")
        [[ $name != transparency ]] || lab transparency
    fi
done
if ((${#words[@]} == 0)); then
    cargo test --release --locked -p lab --lib --bins
    # Each time another seed: it is printed, and `test/script.sh torture` with these options and --seed S is it again.
    lab torture --minutes 0.5 --connections 60 --without kills
    [[ $kernel == no ]] || test/kernel.sh
fi
((${#failed[@]} == 0)) || { echo "error: tests failed in: ${failed[*]}" >&2; exit 1; }
echo "all tests passed"
