// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Each read shows every socket that has an identity: the host sockets of this router, and no other socket of the
 * kernel. Nothing holds a reference to them meanwhile, which would hide that an application closes one.
 *
 * User space attaches it to the map of identity.bpf.c. The socket is not locked: a record may mix two moments.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "stall.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct host_socket _host_socket = {};

SEC("iter/bpf_sk_storage_map")
int host_sockets(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct identity *identity = ctx->value;
	struct host_socket record = {};
	struct socket *socket;
	struct sock *sk = ctx->sk;
	struct tcp_sock *tp;

	/* After the last socket the program runs once more, without one. */
	if (!sk || !identity)
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	record.identity = *identity;
	/* None: no descriptor is left. */
	socket = BPF_CORE_READ(sk, sk_socket);
	if (socket)
		record.inode = BPF_CORE_READ(container_of(socket, struct socket_alloc, socket), vfs_inode.i_ino);
	record.unacknowledged_bytes = tp->write_seq - tp->snd_una;
	record.retransmissions = tp->inet_conn.icsk_retransmits;
	record.probes = tp->inet_conn.icsk_probes_out;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
