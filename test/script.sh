#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The lab, the benchmarks and torture: two hosts, an overlay and pods on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
test/script.sh test KEY             compare overlay, router and host network
test/script.sh test KEY MANIFEST    the same programs on a cluster: apply the DaemonSet (../deploy/simple-ds.yaml), wait, run test/jobs/KEY.yaml
test/script.sh test all             all keys, and a page with all figures: test/results/report.html
test/script.sh deploy_and_run KEY   run the programs of KEY over the overlay, without the router
test/script.sh log KEY              show what the programs printed in the last run
    KEY: iperf3 latency rate memcached redis postgres mpilat mpibw mpiall pause scale cost (test/BENCHMARKS.md)
test/script.sh torture [--minutes N] [--seed S]
                                       move many connections while everything is killed, restarted and changed
test/script.sh lab up|down             raise a lab to play in, with routers, and end it
test/script.sh lab shell PLACE [CMD]   enter h1, h2, client or server
END
}

build() {
    ((EUID == 0)) || { echo "error: namespaces, BPF and ptrace need root: run $0 as root" >&2; exit 1; }
    ./init.sh "$@"
    export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    [[ -x ${CARGO_TARGET_DIR:-target}/release/lab ]] || echo "building, which takes some minutes the first time" >&2
    cargo build --quiet --release --locked
}

# What init.sh has to install for a key; nothing for one that does not exist.
programs() { case $1 in all | rate | memcached | redis | postgres | mpi* | pause | scale | cost) echo programs ;; esac; }

lab() { "${CARGO_TARGET_DIR:-target}/release/lab" "$@"; }

case "${1:-} ${2:-}" in
    "test "?*) [[ ${3:-} != *.y*ml ]] || exec test/cluster.sh "$2" "$3" ;;&
    "test "?*) build $(programs "$2") && lab bench "${@:2}" ;;
    "deploy_and_run "?*) build $(programs "$2") && lab bench --without-router "${@:2}" ;;
    "log "?*)
        log=test/results/$2.log
        [[ -e $log ]] || { echo "error: $log does not exist: run '$0 test $2' first" >&2; exit 1; }
        cat "$log"
        ;;
    "torture "*) build && lab torture "${@:2}" ;;
    "lab up" | "lab down" | "lab shell") build && lab "${@:2}" ;;
    "-h " | "--help ") usage ;;
    *) usage >&2 && exit 1 ;;
esac
