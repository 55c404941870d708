// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Tells user space of the TCP connections that this host's containers make and accept, of every host socket (a socket
 * with an identity) that leaves ESTABLISHED, and when host sockets time out.
 *
 * Most connections end young. So what happens when one is established is as little as can be: its birth is noted.
 * While there are births user space looks every few milliseconds: who has died is forgotten, who has shown that it
 * lives or carries data is told. With no births left it sleeps, and the next birth wakes it.
 *
 *   established      in softirq or in any task       note the birth; wake user space if it sleeps
 *   look_at_births   in user space's own thread      tell who is old enough, forget who is over
 *   look_at_one      likewise                        tell how a connection is that was too young before
 *
 * No system call is traced, which would put every system call of the host on the slow path, nor any change of a
 * socket's state, of which a connection has ten: the program is attached to the cgroup of this host's containers, whose
 * sockets call it when they are established. Whose connection it is tell the socket's cgroup and network namespace, for
 * which process.bpf.c finds a process.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "event.h"
#include "socket.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Inode number of the router's network namespace, the host's: connections in it are never told. */
const volatile __u32 own_netns = 0;
/* Tell of each connection when it is established, and note nothing. */
const volatile __u32 tell_at_once = 0;

/* Not used here: they make the skeleton generate the Rust types. */
struct connection_event _connection_event = {};
struct closed_event _closed_event = {};

/* 1 MiB is about 8,000 connections between two wake-ups of the reader. When full: lost, counted. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, COUNTERS);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* A birth that need not be looked at again has no cookie. */
struct place {
	struct birth birth;
	__u64 number; /* of the birth, from 1 */
};

/*
 * Births to be looked at, in a ring. 8,192 are 80,000 connections a second where they are told after 100 ms, in 320 KiB.
 * When full: the oldest is left to the router's scans, counted unless a look has found it dead.
 */
#define BIRTHS 8192
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, BIRTHS);
	__type(key, __u32);
	__type(value, struct place);
} births SEC(".maps");

/* How many births there were. */
volatile __u64 born = 0;

/* The reader sleeps, and the next birth is to wake it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} asleep SEC(".maps");

IDENTITIES_MAP;

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline void map_v4(__u8 *to, __be32 address)
{
	to[10] = 0xff;
	to[11] = 0xff;
	__builtin_memcpy(to + 12, &address, sizeof(address));
}

static __always_inline void read_addresses(struct connection_event *event, const struct sock *sk)
{
	event->v6 = BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6;
	event->local_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	event->remote_port = bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport));
	if (event->v6) {
		BPF_CORE_READ_INTO(&event->local, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&event->remote, sk, __sk_common.skc_v6_daddr);
	} else {
		map_v4(event->local, BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr));
		map_v4(event->remote, BPF_CORE_READ(sk, __sk_common.skc_daddr));
	}
}

static __always_inline void tell(const struct birth *birth, __u64 age_ns, __u64 bytes)
{
	const struct sock *sk = (const void *)birth->sock;
	const struct tcp_sock *tp = (const void *)sk;
	struct socket *socket = BPF_CORE_READ(sk, sk_socket);
	struct connection_event event = {
		.kind = EVENT_CONNECTION,
		.netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum),
		.birth = *birth,
		.age_ns = age_ns,
		.bytes = bytes,
		.cgroup_id = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id),
	};

	if (socket)
		event.socket = BPF_CORE_READ(container_of(socket, struct socket_alloc, socket), vfs_inode.i_ino);
	read_addresses(&event, sk);
	/* A part of an MPTCP connection, which no process has a descriptor of. */
	if (bpf_core_field_exists(tp->is_mptcp) && BPF_CORE_READ(tp, is_mptcp))
		return;
	/* All this was read of another socket, if ours has gone meanwhile. */
	if (BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) != birth->cookie)
		return;
	if (bpf_ringbuf_output(&events, &event, sizeof(event), 0))
		count(COUNTER_RING_FULL);
}

static __always_inline void note(const struct birth *birth)
{
	struct bare_event event = { .kind = EVENT_BIRTH };
	__u64 before = __sync_fetch_and_add(&born, 1);
	__u32 key = before % BIRTHS, zero = 0;
	struct place *place = bpf_map_lookup_elem(&births, &key);
	__u64 *sleeps = bpf_map_lookup_elem(&asleep, &zero);

	if (!place || !sleeps) /* never: for the verifier */
		return;
	if (place->birth.cookie)
		count(COUNTER_BIRTHS_FULL);
	place->birth = *birth;
	/* A full barrier: whoever sees the number sees the birth, and we see whether the reader sleeps. */
	__sync_lock_test_and_set(&place->number, before + 1);
	if (*sleeps && __sync_lock_test_and_set(sleeps, 0) && bpf_ringbuf_output(&events, &event, sizeof(event), 0))
		count(COUNTER_RING_FULL);
}

static __always_inline void established(struct bpf_sock_ops *ctx, const struct tcp_sock *tp, __u64 side)
{
	struct birth birth = {
		.cookie = bpf_get_socket_cookie(ctx),
		.sock = (__u64)tp,
		.born_ns = bpf_ktime_get_ns(),
		.side = side,
	};

	if (tell_at_once)
		tell(&birth, 0, 0);
	else
		note(&birth);
}

static __always_inline void host_socket_closed(struct bpf_sock *sk)
{
	struct identity *identity = bpf_sk_storage_get(&identities, sk, 0, 0);
	struct closed_event event = { .kind = EVENT_HOST_SOCKET_CLOSED };

	if (!identity)
		return;
	event.identity = *identity;
	if (bpf_ringbuf_output(&events, &event, sizeof(event), 0))
		count(COUNTER_RING_FULL);
}

/* When user space was told last that a host socket waits. Two CPUs at once tell twice, which does no harm. */
volatile __u64 wait_told_ns = 0;

/* Its path may be dead. User space looks at all of them then. */
static __always_inline void host_socket_waits(struct bpf_sock *sk)
{
	struct bare_event event = { .kind = EVENT_HOST_SOCKET_WAITS };
	__u64 now_ns = bpf_ktime_get_ns();

	if (now_ns - wait_told_ns < TELL_WAITS_NS || !bpf_sk_storage_get(&identities, sk, 0, 0))
		return;
	wait_told_ns = now_ns;
	if (bpf_ringbuf_output(&events, &event, sizeof(event), 0))
		count(COUNTER_RING_FULL);
}

/*
 * Runs with the socket locked, in softirq as well as in tasks. Only sockets of the host's own network are asked to tell
 * of their later states and time-outs. A socket leaves ESTABLISHED once, so its end is told once.
 */
SEC("sockops")
int socket_events(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	struct bpf_sock *sk;
	struct tcp_sock *tp;

	if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB &&
	    op != BPF_SOCK_OPS_STATE_CB && op != BPF_SOCK_OPS_RTO_CB)
		return 1;
	sk = ctx->sk;
	if (!sk)
		return 1;
	if (op == BPF_SOCK_OPS_STATE_CB) {
		if (ctx->args[0] == BPF_TCP_ESTABLISHED)
			host_socket_closed(sk);
		return 1;
	}
	if (op == BPF_SOCK_OPS_RTO_CB) {
		/* How many there were in a row before this one. */
		if (ctx->args[0])
			host_socket_waits(sk);
		return 1;
	}
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 1;
	if (tp->inet_conn.icsk_inet.sk.__sk_common.skc_net.net->ns.inum == own_netns)
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG |
						       BPF_SOCK_OPS_RTO_CB_FLAG);
	else
		established(ctx, tp, op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ? SIDE_CLIENT : SIDE_SERVER);
	return 1;
}

/* Is this birth to be looked at again? Not who is dead, and not who is told now. */
static __always_inline int is_left(const struct birth *birth, __u64 after_ns, __u64 after_bytes)
{
	const struct tcp_sock *tp = (const void *)birth->sock;
	const struct sock *sk = (const void *)birth->sock;
	__u64 now_ns = bpf_ktime_get_ns(), age_ns, bytes;
	__u8 state;

	state = BPF_CORE_READ(sk, __sk_common.skc_state);
	if (BPF_CORE_READ(sk, __sk_common.skc_cookie.counter) != birth->cookie ||
	    (state != TCP_ESTABLISHED && state != TCP_SYN_RECV))
		return 0;
	age_ns = now_ns > birth->born_ns ? now_ns - birth->born_ns : 0;
	bytes = BPF_CORE_READ(tp, bytes_acked) + BPF_CORE_READ(tp, bytes_received);
	/* A server's gets ESTABLISHED a moment after its birth. */
	if (state == TCP_SYN_RECV || (age_ns < after_ns && bytes < after_bytes))
		return 1;
	tell(birth, age_ns, bytes);
	return 0;
}

/* A function of its own, and not inlined, so that the verifier looks at it once. */
__noinline int look_at_birth(__u64 number, __u64 after_ns, __u64 after_bytes)
{
	__u32 key = (number - 1) % BIRTHS;
	struct place *place = bpf_map_lookup_elem(&births, &key);
	struct birth birth;

	if (!place)
		return 0;
	/* Counted, and about to be noted. */
	if (place->number < number)
		return 1;
	birth = place->birth;
	if (!birth.cookie)
		return 0;
	if (is_left(&birth, after_ns, after_bytes))
		return 1;
	/* Unless the place is another's already. */
	__sync_val_compare_and_swap(&place->birth.cookie, birth.cookie, 0);
	return 0;
}

/*
 * Run by BPF_PROG_TEST_RUN only: looks at up to LOOK births after the first args[0], and tells of those that are as old
 * as args[1] (ns) or have carried args[2] bytes. Returns how many it has looked at; in the upper half, how many of
 * them, from the first on, need not be looked at again.
 */
#define LOOK 512
SEC("raw_tp")
int look_at_births(struct bpf_raw_tracepoint_args *ctx)
{
	__u64 from = ctx->args[0], after_ns = ctx->args[1], after_bytes = ctx->args[2];
	__u32 looked = 0, over = 0, left = 0;

	for (int i = 0; i < LOOK && from + i < born; i++) {
		/* No branch: for the verifier. */
		left |= look_at_birth(from + i + 1, after_ns, after_bytes) & 1;
		over += left ^ 1;
		looked++;
	}
	return over << 16 | looked;
}

/* As above: tells of the birth in args, unless the connection is over. */
SEC("raw_tp")
int look_at_one(struct bpf_raw_tracepoint_args *ctx)
{
	struct birth birth = {
		.cookie = ctx->args[0],
		.sock = ctx->args[1],
		.born_ns = ctx->args[2],
		.side = ctx->args[3],
	};

	return is_left(&birth, 0, 0);
}
