// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * getsockname and getpeername of a host socket tell the overlay addresses that user space stored with it. A socket
 * without an identity is left alone. Each program returns 1: these hooks cannot refuse.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include "identity.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

IDENTITIES_MAP;

static __always_inline struct identity *identity_of(struct bpf_sock_addr *ctx)
{
	struct bpf_sock *sk = ctx->sk;

	return sk ? bpf_sk_storage_get(&identities, sk, 0, 0) : 0;
}

static __always_inline void show4(struct bpf_sock_addr *ctx, const __u8 *address, __u16 port)
{
	__u32 ip4;

	__builtin_memcpy(&ip4, address + 12, sizeof(ip4));
	ctx->user_ip4 = ip4;
	ctx->user_port = port;
}

static __always_inline void show6(struct bpf_sock_addr *ctx, const __u8 *address, __u16 port)
{
	__u32 ip6[4];

	__builtin_memcpy(ip6, address, sizeof(ip6));
	ctx->user_ip6[0] = ip6[0];
	ctx->user_ip6[1] = ip6[1];
	ctx->user_ip6[2] = ip6[2];
	ctx->user_ip6[3] = ip6[3];
	ctx->user_port = port;
}

SEC("cgroup/getsockname4")
int getsockname4(struct bpf_sock_addr *ctx)
{
	struct identity *identity = identity_of(ctx);

	if (identity && !identity->v6)
		show4(ctx, identity->local, identity->local_port);
	return 1;
}

SEC("cgroup/getpeername4")
int getpeername4(struct bpf_sock_addr *ctx)
{
	struct identity *identity = identity_of(ctx);

	if (identity && !identity->v6)
		show4(ctx, identity->remote, identity->remote_port);
	return 1;
}

SEC("cgroup/getsockname6")
int getsockname6(struct bpf_sock_addr *ctx)
{
	struct identity *identity = identity_of(ctx);

	if (identity)
		show6(ctx, identity->local, identity->local_port);
	return 1;
}

SEC("cgroup/getpeername6")
int getpeername6(struct bpf_sock_addr *ctx)
{
	struct identity *identity = identity_of(ctx);

	if (identity)
		show6(ctx, identity->remote, identity->remote_port);
	return 1;
}
