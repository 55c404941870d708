// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Each read shows the sockets that have an identity: host sockets of this router, and no other socket of the kernel. Nothing
 * holds a reference to them meanwhile, which would hide that an application closes one. A socket may change while it is
 * shown: a record may mix two moments.
 *
 * There are two ways to find them, and user space loads one. Either is a walk, and so user space hands those that were found
 * back, and is told without another walk whether any of them waits.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "stall.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct host_socket _host_socket = {};

/* That of identity.bpf.c. */
IDENTITIES_MAP;

/* 256 KiB. Where there are more, each look is a walk. */
#define WATCHED 16384
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, WATCHED);
	__type(key, __u32);
	__type(value, struct watched);
} watched SEC(".maps");

static __always_inline void show(struct seq_file *seq, struct tcp_sock *tp, struct identity *identity)
{
	struct host_socket record = {};
	struct socket *socket;

	record.identity = *identity;
	record.watched.cookie = bpf_get_socket_cookie(tp);
	record.watched.sock = (__u64)tp;
	/* None: no descriptor is left. */
	socket = BPF_CORE_READ((struct sock *)tp, sk_socket);
	if (socket)
		record.inode = BPF_CORE_READ(container_of(socket, struct socket_alloc, socket), vfs_inode.i_ino);
	record.unacknowledged_bytes = tp->write_seq - tp->snd_una;
	record.retransmissions = tp->inet_conn.icsk_retransmits;
	record.probes = tp->inet_conn.icsk_probes_out;
	bpf_seq_write(seq, &record, sizeof(record));
}

/*
 * The first way: by the map, which holds just the sockets that are meant. After the last one a program runs once more,
 * without one.
 */
SEC("iter/bpf_sk_storage_map")
int host_sockets_of_map(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;
	struct identity *identity = ctx->value;

	if (tp && identity)
		show(ctx->meta->seq, tp, identity);
	return 0;
}

/* The other way: among all TCP sockets of the network of the host, which the reader is in. */
SEC("iter/tcp")
int host_sockets_of_network(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct tcp_sock *tp = sk ? bpf_skc_to_tcp_sock(sk) : NULL;
	struct identity *identity = tp ? bpf_sk_storage_get(&identities, tp, 0, 0) : NULL;

	if (identity)
		show(ctx->meta->seq, tp, identity);
	return 0;
}

/* A function of its own, and not inlined, so that the verifier looks at it once. */
__noinline int has_waited_in_vain(__u32 number)
{
	struct watched *one = bpf_map_lookup_elem(&watched, &number);
	const struct tcp_sock *tp;
	const struct sock *sk;

	if (!one)
		return 0;
	tp = (const void *)one->sock;
	sk = (const void *)one->sock;
	/* The memory of one that is gone keeps its cookie until it is another's. */
	if (BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) != one->cookie ||
	    BPF_CORE_READ(sk, __sk_common.skc_state) == TCP_CLOSE)
		return 0;
	return BPF_CORE_READ(tp, inet_conn.icsk_retransmits) || BPF_CORE_READ(tp, inet_conn.icsk_probes_out);
}

/*
 * Run by BPF_PROG_TEST_RUN only: has any of the watched sockets waited in vain, of those from args[0] on, up to args[1] and no
 * more than LOOK?
 */
#define LOOK 512
SEC("raw_tp")
int any_has_waited(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 from = ctx->args[0], to = ctx->args[1];
	__u32 waited = 0;

	for (int i = 0; i < LOOK && from + i < to; i++)
		waited |= has_waited_in_vain(from + i);
	return waited;
}
