// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Tells user space of every TCP connection that a task of this host's containers makes or accepts, and of every
 * host socket (a socket with an identity) that leaves ESTABLISHED.
 *
 * accept: the call that returned a new descriptor is the event.
 * connect: three moments, in this order but for the last two, which race:
 *
 *   CLOSE -> SYN_SENT    in the task that connects      remember the attempt
 *   -> ESTABLISHED       in softirq or in any task      mark it ESTABLISHED  \ whoever completes the pair
 *   connect returns      in the task that connects      mark it RETURNED     / sends the event, once
 *   -> CLOSE                                            forget it
 *
 * So it does not matter whether the socket blocks, whether connect returned EINPROGRESS or was interrupted, or
 * whether the connection was established before it returned. A connect that began before these programs were
 * attached is not seen; the router finds such connections as it finds any older than itself.
 *
 * There are two sets of programs for the calls, fexit and syscall tracepoints; user space loads one of them.
 */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include "descriptor.h"
#include "event.h"
#include "identity.h"
#include "socket.h"

#define RETURNED 1
#define ESTABLISHED 2

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Only tasks below this cgroup (its id, and its depth below the root of the v2 hierarchy) are seen. */
const volatile __u64 scope_cgroup_id = 0;
const volatile __u32 scope_level = 0;
/* The router itself is never seen. */
const volatile __u32 own_tgid = 0;

/* Not used here: they make the skeleton generate the Rust types. */
struct connection_event _connection_event = {};
struct closed_event _closed_event = {};

/* 1 MiB is about 9,000 connections between two wake-ups of the reader. When full: lost, counted. */
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

struct attempt {
	__u64 cgroup_id;
	__u64 socket;
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__u32 done; /* RETURNED, ESTABLISHED or both */
	__u8 comm[16];
};

/*
 * Connects under way, by struct sock. An entry lives for a handshake, so 16,384 is a rate of hundreds of thousands a
 * second; it takes 2 MB. When full: the connect is not seen, counted. Nothing is evicted, so no attempt that was
 * taken in is lost in silence.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, struct attempt);
} connecting SEC(".maps");

/*
 * Tracepoints only: the descriptor of a connect between its enter and its exit, by thread. One entry for each thread
 * inside connect. When full: the connect is not seen, counted.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u32);
} calls SEC(".maps");

IDENTITIES_MAP;

static __always_inline void count(__u32 counter)
{
	__u64 *value = bpf_map_lookup_elem(&counters, &counter);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* Is the current task one of this host's containers, and not the router? Not to be asked in softirq. */
static __always_inline int in_scope(void)
{
	if (bpf_get_current_pid_tgid() >> 32 == own_tgid)
		return 0;
	return bpf_get_current_ancestor_cgroup_id(scope_level) == scope_cgroup_id;
}

/* The TCP socket under a descriptor of the current task, and its inode number. */
static __always_inline struct sock *sock_of(__u32 fd, __u64 *inode)
{
	/* Another thread may have put something else under the descriptor since the call. */
	struct file *file = file_of_fd(fd);
	struct sock *sk = file ? tcp_sock_of(file) : 0;

	if (sk)
		*inode = BPF_CORE_READ(file, f_inode, i_ino);
	return sk;
}

static __always_inline void map_v4(__u8 *to, __be32 address)
{
	__builtin_memset(to, 0, 10);
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

static __always_inline void send_connection(__u8 side, const struct sock *sk, const struct attempt *of)
{
	struct connection_event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event) {
		count(COUNTER_RING_FULL);
		return;
	}
	event->kind = EVENT_CONNECTION;
	event->tgid = of->tgid;
	event->tid = of->tid;
	event->fd = of->fd;
	event->socket = of->socket;
	event->cgroup_id = of->cgroup_id;
	event->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	event->side = side;
	__builtin_memcpy(event->comm, of->comm, sizeof(event->comm));
	__builtin_memset(event->padding, 0, sizeof(event->padding));
	read_addresses(event, sk);
	bpf_ringbuf_submit(event, 0);
}

static __always_inline void describe_current(struct attempt *attempt)
{
	__u64 pid_tgid = bpf_get_current_pid_tgid();

	attempt->tgid = pid_tgid >> 32;
	attempt->tid = (__u32)pid_tgid;
	attempt->cgroup_id = bpf_get_current_cgroup_id();
	bpf_get_current_comm(attempt->comm, sizeof(attempt->comm));
}

static __always_inline void attempt_begins(const struct sock *sk)
{
	struct attempt attempt = {};
	__u64 key = (__u64)sk;

	describe_current(&attempt);
	if (bpf_map_update_elem(&connecting, &key, &attempt, BPF_ANY))
		count(COUNTER_CONNECTING_FULL);
}

/* The fetch-and-or is a full barrier: exactly one of the two callers sees the other's mark, and all before it. */
static __always_inline void attempt_gets(const struct sock *sk, struct attempt *attempt, __u32 mark)
{
	__u64 key = (__u64)sk;
	__u32 before = __sync_fetch_and_or(&attempt->done, mark);

	if ((before | mark) != (RETURNED | ESTABLISHED) || before == (RETURNED | ESTABLISHED))
		return;
	send_connection(SIDE_CLIENT, sk, attempt);
	bpf_map_delete_elem(&connecting, &key);
}

static __always_inline int connect_returned(int fd)
{
	struct attempt *attempt;
	struct sock *sk;
	__u64 inode, key;

	sk = sock_of(fd, &inode);
	key = (__u64)sk;
	attempt = sk ? bpf_map_lookup_elem(&connecting, &key) : 0;
	/* Refused already, or a second connect for an attempt that has been told. */
	if (!attempt || attempt->done & RETURNED)
		return 0;
	attempt->fd = fd;
	attempt->socket = inode;
	attempt_gets(sk, attempt, RETURNED);
	return 0;
}

static __always_inline int accept_returned(int fd)
{
	struct attempt accepted = {};
	struct sock *sk;

	sk = fd < 0 ? 0 : sock_of(fd, &accepted.socket);
	if (!sk)
		return 0;
	describe_current(&accepted);
	accepted.fd = fd;
	send_connection(SIDE_SERVER, sk, &accepted);
	return 0;
}

/* The first set. */

SEC("fexit/__sys_connect")
int BPF_PROG(connect_fexit, int fd, void *address, int length, int ret)
{
	return in_scope() ? connect_returned(fd) : 0;
}

SEC("fexit/__sys_accept4")
int BPF_PROG(accept_fexit, int fd, void *address, void *length, int flags, int ret)
{
	return in_scope() ? accept_returned(ret) : 0;
}

/* The second set. */

SEC("tracepoint/syscalls/sys_enter_connect")
int connect_enter(struct trace_event_raw_sys_enter *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid();
	__u32 fd = ctx->args[0];

	if (in_scope() && bpf_map_update_elem(&calls, &thread, &fd, BPF_ANY))
		count(COUNTER_CALLS_FULL);
	return 0;
}

SEC("tracepoint/syscalls/sys_exit_connect")
int connect_exit(struct trace_event_raw_sys_exit *ctx)
{
	__u64 thread = bpf_get_current_pid_tgid();
	__u32 *entry = bpf_map_lookup_elem(&calls, &thread);
	__u32 fd;

	if (!entry)
		return 0;
	fd = *entry;
	bpf_map_delete_elem(&calls, &thread);
	return connect_returned(fd);
}

SEC("tracepoint/syscalls/sys_exit_accept")
int accept_exit(struct trace_event_raw_sys_exit *ctx)
{
	return in_scope() ? accept_returned(ctx->ret) : 0;
}

SEC("tracepoint/syscalls/sys_exit_accept4")
int accept4_exit(struct trace_event_raw_sys_exit *ctx)
{
	return in_scope() ? accept_returned(ctx->ret) : 0;
}

/* With either set. */

static __always_inline void host_socket_closed(const struct sock *sk)
{
	struct identity *identity = bpf_sk_storage_get(&identities, (void *)sk, 0, 0);
	struct closed_event *event;

	if (!identity)
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		count(COUNTER_RING_FULL);
		return;
	}
	event->kind = EVENT_HOST_SOCKET_CLOSED;
	event->padding = 0;
	event->swap = identity->swap;
	bpf_ringbuf_submit(event, 0);
}

/*
 * Runs with the socket locked, in softirq as well as in tasks; the current task means something only on the way to
 * SYN_SENT. A socket leaves ESTABLISHED once, so its end is told once.
 */
SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(state_changes, const struct sock *sk, const int from, const int to)
{
	__u64 key = (__u64)sk;
	struct attempt *attempt;

	if (from == TCP_ESTABLISHED)
		host_socket_closed(sk);
	if (to == TCP_SYN_SENT) {
		if (is_tcp(sk) && in_scope())
			attempt_begins(sk);
	} else if (to == TCP_ESTABLISHED) {
		attempt = bpf_map_lookup_elem(&connecting, &key);
		if (attempt)
			attempt_gets(sk, attempt, ESTABLISHED);
	} else if (to == TCP_CLOSE) {
		bpf_map_delete_elem(&connecting, &key);
	}
	return 0;
}
