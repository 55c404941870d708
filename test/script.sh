#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The lab, the benchmark and torture: two hosts, an overlay and pods on this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'END'
test/script.sh test iperf3             compare overlay, router and host network
test/script.sh deploy_and_run iperf3   run iperf3 over the overlay, without the router
test/script.sh log iperf3              show the client's log of the last run
test/script.sh torture [--minutes N] [--seed S]
                                       move many connections while everything is killed, restarted and changed
test/script.sh lab up|down             raise a lab to play in, with routers, and end it
test/script.sh lab shell PLACE [CMD]   enter h1, h2, client or server
END
}

build() {
    ((EUID == 0)) || { echo "error: namespaces, BPF and ptrace need root: run $0 as root" >&2; exit 1; }
    ./init.sh
    export PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
    cargo build --quiet --release --locked
}

lab() { "${CARGO_TARGET_DIR:-target}/release/lab" "$@"; }

case "${1:-} ${2:-}" in
    "test iperf3") build && lab bench iperf3 "${@:3}" ;;
    "deploy_and_run iperf3") build && lab bench iperf3 --without-router "${@:3}" ;;
    "log iperf3")
        log=test/results/iperf3.log
        [[ -e $log ]] || { echo "error: $log does not exist: run '$0 test iperf3' first" >&2; exit 1; }
        cat $log
        ;;
    "torture "*) build && lab torture "${@:2}" ;;
    "lab up" | "lab down" | "lab shell") build && lab "${@:2}" ;;
    "-h " | "--help ") usage ;;
    *) usage >&2 && exit 1 ;;
esac
