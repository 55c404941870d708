// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Each read shows sockets that have an identity, all of them or those that have waited in vain: host sockets of this router,
 * and no other socket of the kernel. Nothing holds a reference to them meanwhile, which would hide that an application closes one.
 *
 * There are two ways to find them, and user space loads one. A socket may change while it is shown: a record may mix two
 * moments.
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

static __always_inline bool has_waited_in_vain(struct tcp_sock *tp)
{
	return tp->inet_conn.icsk_retransmits || tp->inet_conn.icsk_probes_out;
}

static __always_inline void show(struct seq_file *seq, struct tcp_sock *tp, struct identity *identity)
{
	struct host_socket record = {};
	struct socket *socket;

	record.identity = *identity;
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
static __always_inline struct tcp_sock *of_map(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : NULL;
}

SEC("iter/bpf_sk_storage_map")
int all_of_map(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tcp_sock *tp = of_map(ctx);
	struct identity *identity = ctx->value;

	if (tp && identity)
		show(ctx->meta->seq, tp, identity);
	return 0;
}

/* Those of which user space has to decide whether they are stalled: of many, next to none. */
SEC("iter/bpf_sk_storage_map")
int waiting_of_map(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tcp_sock *tp = of_map(ctx);
	struct identity *identity = ctx->value;

	if (tp && identity && has_waited_in_vain(tp))
		show(ctx->meta->seq, tp, identity);
	return 0;
}

/* The other way: all TCP sockets of the network of the host, which the reader is in. */
static __always_inline struct tcp_sock *of_network(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;

	return sk ? bpf_skc_to_tcp_sock(sk) : NULL;
}

SEC("iter/tcp")
int all_of_network(struct bpf_iter__tcp *ctx)
{
	struct tcp_sock *tp = of_network(ctx);
	struct identity *identity = tp ? bpf_sk_storage_get(&identities, tp, 0, 0) : NULL;

	if (identity)
		show(ctx->meta->seq, tp, identity);
	return 0;
}

SEC("iter/tcp")
int waiting_of_network(struct bpf_iter__tcp *ctx)
{
	struct tcp_sock *tp = of_network(ctx);
	struct identity *identity =
		tp && has_waited_in_vain(tp) ? bpf_sk_storage_get(&identities, tp, 0, 0) : NULL;

	if (identity)
		show(ctx->meta->seq, tp, identity);
	return 0;
}
