#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Fuzzes everything that is parsed of others, target by target, for so many minutes in all; test/run.sh --fuzz calls it.
# What it learns stays in the target directory, and what breaks a target is printed and kept beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
minutes=$1
./init.sh
export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
built=$(realpath -m "${CARGO_TARGET_DIR:-target}") work=$(realpath -m "${CARGO_TARGET_DIR:-target}/fuzz")
# Of the workspace: alone, the package has fewer features of its dependencies, and would build them anew.
cargo build --release --locked --workspace --example seeds
"$built/release/examples/seeds" "$work/corpus"

# The compiler's sanitizers and coverage are for nightly; this lets a stable one use them.
export RUSTC_BOOTSTRAP=1
command -v cargo-fuzz >/dev/null || cargo install --quiet --locked cargo-fuzz@0.13.1
# A host's own target, not musl, which cargo-fuzz would take where it was built for it.
fuzz() { cargo fuzz "$1" --fuzz-dir test/fuzz --features libfuzzer --target-dir "$work" --target x86_64-unknown-linux-gnu "${@:2}"; }
mapfile -t targets < <(cargo fuzz list --fuzz-dir test/fuzz)
fuzz build
broken=()
for name in "${targets[@]}"; do
    mkdir -p "$work/corpus/$name" "$work/broken/$name"
    echo "fuzz: $name"
    # The targets after one that breaks have something to say as well.
    fuzz run "$name" "$work/corpus/$name" -- -max_total_time=$((minutes * 60 / ${#targets[@]})) -max_len=65536 \
        -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 -print_funcs=0 -verbosity=0 -artifact_prefix="$work/broken/$name/" ||
        broken+=("$name")
done
# cargo-fuzz makes these whether or not they are used.
find test/fuzz/artifacts -type d -empty -delete
((${#broken[@]} == 0)) || { echo "error: broken: ${broken[*]}; with what: $work/broken" >&2; exit 1; }
echo "fuzz: nothing found in $minutes minutes"
