#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Replaces the routers of a cluster by those of another image, node by node, and touches no connection:
#
#   deploy/upgrade.sh IMAGE [NAMESPACE]
#
# Only the router's container of each pod is restarted, with the image changed in place. The forwarder's goes on, with the
# way back of every swapped connection. A release that changes the forwarder says so: then delete the pods one by one; each
# takes its connections back to the overlay first, and the next one moves them again.
set -euo pipefail
image=${1:-} namespace=${2:-kube-system}
[[ -n $image ]] || { echo "error: IMAGE is missing: deploy/upgrade.sh registry.example/ebpf-router:0.2.0" >&2; exit 1; }
run() { kubectl --namespace "$namespace" "$@"; }

# For pods that are made from now on. OnDelete: those that run are not replaced.
strategy=$(run get daemonset ebpf-router --output jsonpath='{.spec.updateStrategy.type}')
[[ $strategy == OnDelete ]] || {
    echo "error: the DaemonSet's updateStrategy is $strategy: with any but OnDelete its pods are replaced, forwarders too" >&2
    exit 1
}
run set image daemonset/ebpf-router "router=$image"

for pod in $(run get pods --selector app=ebpf-router --output name); do
    old=$(run get "$pod" --output jsonpath='{.status.containerStatuses[?(@.name=="router")].containerID}')
    run exec "$pod" --container router -- /usr/bin/router leave
    run set image "$pod" "router=$image"
    for ((tries = 0; ; tries++)); do
        new=$(run get "$pod" --output jsonpath='{.status.containerStatuses[?(@.name=="router")].containerID}')
        ready=$(run get "$pod" --output jsonpath='{.status.containerStatuses[?(@.name=="router")].ready}')
        [[ $new == "$old" || $ready != true ]] || break
        ((tries < 120)) || { echo "error: the router of $pod is not ready after 2 minutes: kubectl describe $pod" >&2; exit 1; }
        sleep 1
    done
    echo "$pod: replaced"
done
