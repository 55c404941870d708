#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes the container image, without a daemon, from the two programs as cargo has built them:
#
#   deploy/image.sh [OUTPUT]     an OCI layout in a tar file; default target/ebpf-router.tar
#
#   ctr --namespace k8s.io image import target/ebpf-router.tar       on a node
#   skopeo copy oci-archive:target/ebpf-router.tar docker://...      to a registry
#
# In it are the programs, the libraries that they need, and nothing else: no shell. The same programs give the same image,
# to the byte.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-target/ebpf-router.tar}
built=${CARGO_TARGET_DIR:-target}/release
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)
for program in router forwarder; do
    [[ -x $built/$program ]] || { echo "error: $built/$program does not exist: cargo build --release" >&2; exit 1; }
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root blobs=$work/image/blobs/sha256
mkdir -p "$root"/usr/bin "$root"/{etc,proc,run,sys,tmp} "$blobs"

for program in router forwarder; do
    strip --strip-unneeded -o "$root/usr/bin/$program" "$built/$program"
    # `libelf.so.1 => /lib/x86_64-linux-gnu/libelf.so.1 (0x...)`, and the loader by its path alone.
    ldd "$built/$program" | grep -o '/[^ ]*' | while read -r library; do
        install -D --mode 755 "$(realpath "$library")" "$root$library"
    done
done
# Who 0 is; where names are looked for.
printf 'root:x:0:0:root:/:/usr/sbin/nologin\n' >"$root/etc/passwd"
printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
find "$root" -type d -exec chmod 755 {} +

# Moves a file to where its contents say, and prints digest and size.
blob() {
    local digest size
    digest=$(sha256sum "$1" | cut -d' ' -f1) size=$(stat --format %s "$1")
    mv "$1" "$blobs/$digest"
    echo "\"digest\":\"sha256:$digest\",\"size\":$size"
}
pack() { tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu -C "$1" -c .; }

pack "$root" >"$work/layer.tar"
contents=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
gzip --no-name --best "$work/layer.tar"
layer=$(blob "$work/layer.tar.gz")
cat >"$work/config" <<END
{"created":"1970-01-01T00:00:00Z","architecture":"amd64","os":"linux","config":{"Entrypoint":["/usr/bin/router"],"Labels":{"org.opencontainers.image.version":"$version","org.opencontainers.image.licenses":"Apache-2.0"}},"rootfs":{"type":"layers","diff_ids":["sha256:$contents"]},"history":[{"created":"1970-01-01T00:00:00Z","created_by":"deploy/image.sh"}]}
END
config=$(blob "$work/config")
type=application/vnd.oci.image
cat >"$work/manifest" <<END
{"schemaVersion":2,"mediaType":"$type.manifest.v1+json","config":{"mediaType":"$type.config.v1+json",$config},"layers":[{"mediaType":"$type.layer.v1.tar+gzip",$layer}]}
END
manifest=$(blob "$work/manifest")
cat >"$work/image/index.json" <<END
{"schemaVersion":2,"manifests":[{"mediaType":"$type.manifest.v1+json",$manifest,"platform":{"architecture":"amd64","os":"linux"},"annotations":{"org.opencontainers.image.ref.name":"$version","io.containerd.image.name":"docker.io/library/ebpf-router:$version"}}]}
END
printf '{"imageLayoutVersion":"1.0.0"}' >"$work/image/oci-layout"
pack "$work/image" >"$output"
echo "$output: ebpf-router:$version, $(du --apparent-size -BK "$output" | cut -f1)B, $(sha256sum "$output" | cut -d' ' -f1)"
