// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Each read shows sockets that have an identity, all of them or those that are stalled: host sockets of this router, and no
 * other socket of the kernel. Nothing holds a reference to them meanwhile, which would hide that an application closes one.
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

/*
 * So many retransmission time-outs in a row, or probes of a closed window or an idle connection (keepalive), that brought
 * nothing: with the kernel's shortest time-out of 200 ms the second has passed after 0.6 s. One is not enough: where segments
 * are lost now and then, it comes without any fault. The kernel resets both counts with what the peer acknowledges or
 * answers, so one look is enough. A slow reader is no stall: its closed window is probed, and the probes are answered.
 */
#define IN_VAIN 2

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

SEC("iter/bpf_sk_storage_map")
int stalled_host_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct tcp_sock *tp = tcp_sock_of(ctx);

	if (tp && (tp->inet_conn.icsk_retransmits >= IN_VAIN || tp->inet_conn.icsk_probes_out >= IN_VAIN))
		show(ctx, tp);
	return 0;
}
