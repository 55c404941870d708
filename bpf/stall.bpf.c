// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Each read shows sockets that have an identity, all of them or those that have waited in vain: host sockets of this router,
 * and no other socket of the kernel. Nothing holds a reference to them meanwhile, which would hide that an application closes one.
 *
 * User space attaches both to the map of identity.bpf.c. A socket is not locked: a record may mix two moments.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "stall.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct host_socket _host_socket = {};

/* After the last socket a program runs once more, without one. */
static __always_inline struct tcp_sock *tcp_sock_of(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct sock *sk = ctx->sk;

	return sk ? bpf_skc_to_tcp_sock(sk) : NULL;
}

static __always_inline void show(struct bpf_iter__bpf_sk_storage_map *ctx, struct tcp_sock *tp)
{
	struct identity *identity = ctx->value;
	struct host_socket record = {};
	struct socket *socket;

	if (!identity)
		return;
	record.identity = *identity;
	/* None: no descriptor is left. */
	socket = BPF_CORE_READ((struct sock *)tp, sk_socket);
	if (socket)
		record.inode = BPF_CORE_READ(container_of(socket, struct socket_alloc, socket), vfs_inode.i_ino);
	record.unacknowledged_bytes = tp->write_seq - tp->snd_una;
	record.retransmissions = tp->inet_conn.icsk_retransmits;
	record.probes = tp->inet_conn.icsk_probes_out;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
}

SEC("iter/bpf_sk_storage_map")
int host_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tcp_sock *tp = tcp_sock_of(ctx);

	if (tp)
		show(ctx, tp);
	return 0;
}

/* Those of which user space has to decide whether they are stalled: of many, next to none. */
SEC("iter/bpf_sk_storage_map")
int waiting_host_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tcp_sock *tp = tcp_sock_of(ctx);

	if (tp && (tp->inet_conn.icsk_retransmits || tp->inet_conn.icsk_probes_out))
		show(ctx, tp);
	return 0;
}
