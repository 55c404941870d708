#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Fuzzes everything that is parsed of others, target by target, for so many minutes in all; test/run.sh --fuzz calls it.
# What it learns stays in the target directory, and what breaks a target is printed and kept beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=$1
./init.sh
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
# The compiler's sanitizers and coverage are for nightly; this lets a stable one use them.
export RUSTC_BOOTSTRAP=1
command -v cargo-fuzz >/dev/null || cargo install --quiet --locked cargo-fuzz@0.13.1
target=$(realpath -m "${CARGO_TARGET_DIR:-target}")/fuzz
# A host's own target, not musl, which cargo-fuzz would take where it was built for it.
fuzz() { cargo fuzz "$1" --fuzz-dir test/fuzz --features libfuzzer --target-dir "$target" --target x86_64-unknown-linux-gnu "${@:2}"; }
mapfile -t targets < <(cargo fuzz list --fuzz-dir test/fuzz)
fuzz build
for name in "${targets[@]}"; do
    mkdir -p "$target/corpus/$name" "$target/broken/$name"
    echo "fuzz: $name"
    fuzz run "$name" "$target/corpus/$name" -- -max_total_time=$((minutes * 60 / ${#targets[@]})) -max_len=65536 \
        -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -verbosity=0 -artifact_prefix="$target/broken/$name/"
done
echo "fuzz: nothing found in $minutes minutes"
