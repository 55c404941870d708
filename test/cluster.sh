#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# `test/script.sh test KEY MANIFEST`: the benchmark KEY on the cluster that kubectl is set to, with the router of MANIFEST on
# every node: apply it, wait until it is ready, run test/jobs/KEY.yaml, print.
set -euo pipefail
cd "$(dirname "$0")/.."
key=${1:-} manifest=${2:-}
job=test/jobs/$key.yaml

fail() {
    echo "error: $1" >&2
    exit 1
}

[[ -e $job ]] || fail "$key: expected one of$(printf ' %s' test/jobs/*.yaml | sed 's#test/jobs/##g; s#\.yaml##g')"
# As seen from test/, from the repository, or in full.
for file in "test/$manifest" "$manifest"; do [[ ! -f $file ]] || break; done
[[ -f $file ]] || fail "$manifest does not exist: give the DaemonSet's manifest, such as ../deploy/simple-ds.yaml"
command -v kubectl >/dev/null || fail "kubectl is missing: a benchmark in a cluster needs it (without a cluster: test/script.sh test $key)"
kubectl version --request-timeout=10s >/dev/null 2>&1 ||
    fail "no cluster answers kubectl: set KUBECONFIG (without a cluster: test/script.sh test $key)"

# Whether a command prints what is wanted, asked each second.
wait_for() {
    local what=$1 seconds=$2 wanted=$3
    shift 3
    for ((; seconds > 0; seconds--)); do
        [[ $("$@") != $wanted ]] || return 0 # a pattern
        sleep 1
    done
    fail "$what: not so in time"
}

kubectl get --namespace kube-system configmap ebpf-router-rules >/dev/null 2>&1 || kubectl apply --filename deploy/rules.yaml
kubectl apply --filename "$file"
ready() {
    kubectl get --namespace kube-system daemonset ebpf-router --output \
        jsonpath='{.metadata.generation} {.status.observedGeneration} {.status.desiredNumberScheduled} {.status.numberReady}' |
        awk '{ print ($1 == $2 && $3 > 0 && $3 == $4) ? "yes" : "no" }'
}
wait_for "the routers are ready (kubectl --namespace kube-system get pods --selector app=ebpf-router)" 300 yes ready

trap 'kubectl delete --ignore-not-found --wait=false --filename "$job" >/dev/null' EXIT
if [[ $key == mpi* ]]; then
    keys=$(mktemp -d)
    ssh-keygen -q -t ed25519 -N '' -f "$keys/id_ed25519"
    kubectl create secret generic mpi-key --from-file="$keys" --dry-run=client --output yaml | kubectl apply --filename -
    rm -r "$keys"
    kubectl create configmap mpi-programs --from-file=test/programs --dry-run=client --output yaml | kubectl apply --filename -
fi
kubectl delete --ignore-not-found --filename "$job" >/dev/null
kubectl apply --filename "$job" >/dev/null
status() {
    kubectl get job "$key" --output jsonpath='{.status.conditions[?(@.status=="True")].type}'
}
wait_for "the job $key ends (kubectl describe job/$key)" 900 '?*' status
kubectl logs "job/$key"
node=$(kubectl get pods --selector "app=$key,role=client" --output jsonpath='{.items[0].spec.nodeName}')
router=$(kubectl get --namespace kube-system pods --selector app=ebpf-router --field-selector "spec.nodeName=$node" --output name)
kubectl exec --namespace kube-system "$router" --container router -- /usr/bin/router status
[[ $(status) == *Complete* ]] || fail "the job $key has failed: its log is above"
