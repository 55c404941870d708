#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the programs of a Kubernetes cluster from Debian's source package, once, with Debian's Go: Debian has etcd and
# kubectl as packages, but neither servers nor kubelet and kube-proxy. It takes some minutes, and they are kept in
# ~/.cache/ebpf-router. The tests of test/lab/tests/cluster.rs and kubernetes start them; `./init.sh cluster` installs what this needs.
set -euo pipefail

version=1.20.2
url="http://deb.debian.org/debian/pool/main/k/kubernetes/kubernetes_1.20.5+really$version.orig.tar.gz"
sum=b83c0780efb182d928dc63d46488a847f161f04e40a94b96bf5247dd671ecdfc
cache=$HOME/.cache/ebpf-router

programs=(kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy)
# What was built by another version of this script is built anew.
made_by=$(sha256sum <"$0")
is_there=yes
for program in "${programs[@]}"; do [[ -x $cache/$program ]] || is_there=no; done
[[ $is_there == no || $(cat "$cache/made-by" 2>/dev/null) != "$made_by" ]] || exit 0
mkdir -p "$cache"
work=$(mktemp -d "$cache/build.XXXXXX")
# Go makes its files read-only.
trap 'chmod -R u+w "$work" && rm -rf "$work"' EXIT

curl -sSfL -o "$work/source.tar.gz" "$url" || { echo "error: $url: cannot be downloaded" >&2; exit 1; }
echo "$sum  $work/source.tar.gz" | sha256sum --check --quiet ||
    { echo "error: $url: not the file that was expected; its sum should be $sum" >&2; exit 1; }

# Go 1.19 does not take the vendored modules of Go 1.15, but a GOPATH.
export GOPATH=$work/gopath GO111MODULE=off GOFLAGS= CGO_ENABLED=0
source=$GOPATH/src/k8s.io/kubernetes
mkdir -p "$source"
tar -xzf "$work/source.tar.gz" -C "$source" --strip-components 1
cd "$source"

# As `make generated_files` does: the only generated file that the source lacks.
go build -o "$work/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages=$(grep -rl --include='*.go' '^// +k8s:openapi-gen=true' staging/src/k8s.io pkg cmd plugin |
    grep -v -e code-generator/ -e sample-apiserver/ | xargs -n 1 dirname | sort -u |
    sed 's,^staging/src/,k8s.io/kubernetes/vendor/,; t; s,^,k8s.io/kubernetes/,' | paste -sd ,)
"$work/openapi-gen" --logtostderr -i "$packages" -p k8s.io/kubernetes/pkg/generated/openapi -O zz_generated.openapi \
    -h vendor/k8s.io/code-generator/hack/boilerplate.go.txt -r "$work/violations"

flags="-s -w"
# What the programs print, and what the API server answers.
for of in component-base/version client-go/pkg/version; do
    for value in gitVersion=v$version gitMajor=1 gitMinor=20; do
        flags+=" -X k8s.io/kubernetes/vendor/k8s.io/$of.$value"
    done
done
mkdir "$work/programs"
nice go build -ldflags "$flags" -o "$work/programs/" "${programs[@]/#/./cmd/}"
mv "$work/programs"/* "$cache"
echo "$made_by" >"$cache/made-by"
