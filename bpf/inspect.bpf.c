// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
// Looks at sockets, and only looks: what a descriptor of the forwarder refers to, who holds it in any process, and
// how far its sequence numbers are. Nothing here changes a socket, unlike TCP_REPAIR, which would.
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "cgroup.h"
#include "descriptor.h"
#include "inspect.h"
#include "pid.h"
#include "socket.h"
#include "options.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define TCP_LISTEN 10

/* So many threads may have ended, and not been reaped, before the first that lives. */
#define MAX_ENDED_THREADS 64

/* One slot for each transaction thread of the forwarder. */
#define MAX_SLOTS 64

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct sockets_facts);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct table_facts);
} tables SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct fds_facts);
} fds SEC(".maps");

/* Makes libbpf-cargo write the type of the iterator's records. */
struct descriptor _descriptor = {};

/* struct file counts its references in f_count up to Linux 6.12 and in f_ref (one less than the count) since. */
struct file___since_6_13 {
	struct {
		atomic64_t refcnt;
	} f_ref;
} __attribute__((preserve_access_index));

struct file___until_6_12 {
	atomic_long_t f_count;
} __attribute__((preserve_access_index));

/* The TCP-AO option came with 6.7; TCP-MD5 can be configured out. */
struct tcp_sock___signed {
	void *md5sig_info;
	void *ao_info;
} __attribute__((preserve_access_index));

static __always_inline __u64 file_refs(struct file *file)
{
	struct file___since_6_13 *now = (void *)file;
	struct file___until_6_12 *before = (void *)file;

	if (bpf_core_field_exists(now->f_ref))
		return BPF_CORE_READ(now, f_ref.refcnt.counter) + 1;
	return BPF_CORE_READ(before, f_count.counter);
}

static __always_inline void read_watchers(struct socket_facts *facts, struct file *file)
{
	struct hlist_head *head = BPF_CORE_READ(file, f_ep);
	struct hlist_node *node = head ? BPF_CORE_READ(head, first) : NULL;
	__u32 count = 0;

	for (int i = 0; i < MAX_WATCHERS && node; i++) {
		struct epitem *item = (void *)node - bpf_core_field_offset(struct epitem, fllink);
		struct watcher *watcher = &facts->watchers[i];

		watcher->epoll = (__u64)BPF_CORE_READ(item, ep);
		watcher->fd = BPF_CORE_READ(item, ffd.fd);
		/* struct epoll_event is packed, its fields are read by their own relocations. */
		watcher->events = BPF_CORE_READ(item, event.events);
		watcher->data = BPF_CORE_READ(item, event.data);
		node = BPF_CORE_READ(node, next);
		count++;
	}
	facts->watcher_count = count;
	facts->watchers_left_out = node != NULL;
}

static __always_inline void read_tcp(struct socket_facts *facts, struct sock *sk)
{
	struct tcp_sock *tp = (void *)sk;
	struct tcp_sock___signed *signature = (void *)sk;
	struct inet_connection_sock *icsk = (void *)sk;
	__u32 snd_up;
	__s32 window;

	facts->is_tcp = 1;
	facts->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	facts->state = BPF_CORE_READ(sk, __sk_common.skc_state);
	facts->netns = BPF_CORE_READ(sk, __sk_common.skc_net.net, ns.inum);
	facts->shutdown = BPF_CORE_READ_BITFIELD_PROBED(sk, sk_shutdown);
	facts->has_filter = BPF_CORE_READ(sk, sk_filter) != NULL;
	facts->has_ulp = BPF_CORE_READ(icsk, icsk_ulp_ops) != NULL;
	/* Each is behind the next, also where segments come and programs run in between. */
	snd_up = BPF_CORE_READ(tp, snd_up);
	facts->snd_una = BPF_CORE_READ(tp, snd_una);
	facts->write_seq = BPF_CORE_READ(tp, write_seq);
	facts->copied_seq = BPF_CORE_READ(tp, copied_seq);
	facts->rcv_nxt = BPF_CORE_READ(tp, rcv_nxt);
	window = BPF_CORE_READ(tp, rcv_wup) + BPF_CORE_READ(tp, rcv_wnd) - facts->rcv_nxt;
	facts->receive_window = window > 0 ? window : 0;
	facts->urgent = BPF_CORE_READ(tp, urg_data) != 0 ||
			(__s32)(snd_up - facts->snd_una) > 0;
	facts->repair = BPF_CORE_READ_BITFIELD_PROBED(tp, repair);
	if (bpf_core_field_exists(tp->is_mptcp))
		facts->is_mptcp = BPF_CORE_READ(tp, is_mptcp);
	if (bpf_core_field_exists(signature->md5sig_info))
		facts->has_signature |= BPF_CORE_READ(signature, md5sig_info) != NULL;
	if (bpf_core_field_exists(signature->ao_info))
		facts->has_signature |= BPF_CORE_READ(signature, ao_info) != NULL;
}

/*
 * A global function is verified once, by itself, and not once for each turn of the loop that calls it. Always 0: it must
 * return something.
 */
__noinline int look_at_socket(__u32 slot, __u32 index, __u32 fd)
{
	struct sockets_facts *all = bpf_map_lookup_elem(&sockets, &slot);
	struct file *file = file_of_fd(fd);
	struct socket_facts *facts;
	struct sock *sk;

	if (!all || index >= LOOKED_AT_ONCE)
		return 0;
	facts = &all->of[index];
	__builtin_memset(facts, 0, sizeof(*facts));
	sk = file ? tcp_sock_of(file) : NULL;
	if (!sk)
		return 0;
	facts->file = (__u64)file;
	facts->refs = file_refs(file);
	facts->inode = BPF_CORE_READ(file, f_inode, i_ino);
	facts->options = options_of(file, sk);
	read_tcp(facts, sk);
	read_watchers(facts, file);
	return 0;
}

/* From args[first] on, two descriptors in each word, the lower half first. */
static __always_inline void read_fds(__u32 fds[LOOKED_AT_ONCE], struct bpf_raw_tracepoint_args *ctx, int first)
{
#pragma unroll
	for (int i = 0; i < LOOKED_AT_ONCE; i++) {
		/* The context is read at constants only. */
		__u64 word = *(volatile __u64 *)&ctx->args[first + i / 2];

		fds[i] = word >> (i % 2 * 32);
	}
}

/*
 * Run by BPF_PROG_TEST_RUN only, never attached: args[0] is the slot of the caller, args[1] how many descriptors of the caller
 * follow.
 */
SEC("raw_tp")
int inspect_sockets(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 slot = ctx->args[0], count = ctx->args[1], list[LOOKED_AT_ONCE];

	read_fds(list, ctx, 2);
	for (__u32 i = 0; i < LOOKED_AT_ONCE && i < count; i++)
		look_at_socket(slot, i, list[i]);
	return 0;
}

/* The descriptor table of a process: a leader that has ended before its threads has none any more. */
static __always_inline struct files_struct *table_of(struct task_struct *leader)
{
	struct signal_struct *signal = BPF_CORE_READ(leader, signal);
	struct list_head *head = (void *)signal + bpf_core_field_offset(struct signal_struct, thread_head);
	struct list_head *node = BPF_CORE_READ(signal, thread_head.next);

	for (int i = 0; i < MAX_ENDED_THREADS && node && node != head; i++) {
		struct task_struct *task = (void *)node - bpf_core_field_offset(struct task_struct, thread_node);
		struct files_struct *table = BPF_CORE_READ(task, files);

		if (table)
			return table;
		node = BPF_CORE_READ(node, next);
	}
	return NULL;
}

/* As above; args[1] is a pidfd. */
SEC("raw_tp")
int inspect_table(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 slot = ctx->args[0];
	struct table_facts *facts = bpf_map_lookup_elem(&tables, &slot);
	struct task_struct *task = task_of_pidfd(ctx->args[1]);
	struct files_struct *table;

	if (!facts || !task)
		return 1;
	table = table_of(task);
	facts->table = (__u64)table;
	facts->users = table ? BPF_CORE_READ(table, count.counter) : 0;
	return 0;
}

static __always_inline int anonymous_kind(struct file *file);

__noinline int look_at_fd(__u32 slot, __u32 index, __u32 pidfd, __u32 fd)
{
	struct fds_facts *all = bpf_map_lookup_elem(&fds, &slot);
	struct task_struct *task = task_of_pidfd(pidfd);
	struct files_struct *table;
	struct fd_facts *facts;
	struct file *file = NULL;
	unsigned long bits = 0;
	struct fdtable *fdt;

	if (!all || index >= LOOKED_AT_ONCE)
		return 0;
	facts = &all->of[index];
	__builtin_memset(facts, 0, sizeof(*facts));
	table = task ? table_of(task) : NULL;
	fdt = table ? BPF_CORE_READ(table, fdt) : NULL;
	if (!fdt || fd >= BPF_CORE_READ(fdt, max_fds))
		return 0;
	bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(fdt, fd) + fd);
	if (!file)
		return 0;
	bpf_probe_read_kernel(&bits, sizeof(bits), BPF_CORE_READ(fdt, close_on_exec) + fd / 64);
	facts->file = (__u64)file;
	facts->close_on_exec = bits >> (fd % 64) & 1;
	if (anonymous_kind(file) == KIND_EPOLL)
		facts->epoll = (__u64)BPF_CORE_READ(file, private_data);
	return 0;
}

/* As above; args[1] is a pidfd, args[2] how many descriptors of the process behind it follow. */
SEC("raw_tp")
int inspect_fds(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 slot = ctx->args[0], pidfd = ctx->args[1], count = ctx->args[2], list[LOOKED_AT_ONCE];

	read_fds(list, ctx, 3);
	for (__u32 i = 0; i < LOOKED_AT_ONCE && i < count; i++)
		look_at_fd(slot, i, pidfd, list[i]);
	return 0;
}

static __always_inline void read_addresses(struct descriptor *found, struct sock *sk)
{
	found->family = sk->__sk_common.skc_family;
	found->local_port = sk->__sk_common.skc_num;
	found->remote_port = __builtin_bswap16(sk->__sk_common.skc_dport);
	if (found->family == AF_INET) {
		__u32 local = sk->__sk_common.skc_rcv_saddr;
		__u32 remote = sk->__sk_common.skc_daddr;

		__builtin_memcpy(found->local, &local, sizeof(local));
		__builtin_memcpy(found->remote, &remote, sizeof(remote));
		return;
	}
	BPF_CORE_READ_INTO(&found->local, sk, __sk_common.skc_v6_rcv_saddr.in6_u.u6_addr8);
	BPF_CORE_READ_INTO(&found->remote, sk, __sk_common.skc_v6_daddr.in6_u.u6_addr8);
}

static __always_inline void read_cgroups(struct descriptor *found, struct cgroup *cgroup)
{
	for (int level = 0; level < MAX_CGROUPS && cgroup; level++) {
		found->cgroups[level] = BPF_CORE_READ(cgroup, kn, id);
		cgroup = parent_of(cgroup);
	}
}

static __always_inline int anonymous_kind(struct file *file)
{
	/* BPF has no memcmp: compared as words. */
	union {
		char text[16];
		__u64 words[2];
	} name = {}, epoll = { .text = "[eventpoll]" }, io_uring = { .text = "[io_uring]" };

	bpf_probe_read_kernel_str(name.text, sizeof(name.text), BPF_CORE_READ(file, f_path.dentry, d_name.name));
	if (name.words[0] == epoll.words[0] && name.words[1] == epoll.words[1])
		return KIND_EPOLL;
	if (name.words[0] == io_uring.words[0] && name.words[1] == io_uring.words[1])
		return KIND_IO_URING;
	return 0;
}

/*
 * Every descriptor of every process that is a TCP socket, an epoll set or an io_uring, but for those of the reader's own
 * table. Read directly, not by BPF_CORE_READ: on a host with many connections this runs for each of them.
 */
SEC("iter/task_file")
int list_descriptors(struct bpf_iter__task_file *ctx)
{
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct descriptor found = {};
	struct socket *socket;
	struct tcp_sock *tp;
	__u32 level;

	if (!task || !file || task->files == bpf_get_current_task_btf()->files)
		return 0;
	socket = bpf_sock_from_file(file);
	tp = socket && socket->sk ? bpf_skc_to_tcp_sock(socket->sk) : NULL;
	if (tp) {
		struct sock *sk = (struct sock *)tp;

		found.kind = KIND_TCP;
		found.inode = file->f_inode->i_ino;
		found.netns = sk->__sk_common.skc_net.net->ns.inum;
		found.state = sk->__sk_common.skc_state;
		if (found.state != TCP_LISTEN) {
			found.bytes_sent = tp->bytes_acked;
			found.bytes_received = tp->bytes_received;
		}
		read_addresses(&found, sk);
	} else {
		found.kind = anonymous_kind(file);
		if (!found.kind)
			return 0;
		found.epoll = (__u64)BPF_CORE_READ(file, private_data);
	}
	found.file = (__u64)file;
	found.table = (__u64)task->files;
	read_cgroups(&found, task->cgroups->dfl_cgrp);
	level = own_pid_level();
	found.tgid = pid_at(task->group_leader, level);
	found.tid = pid_at(task, level);
	found.fd = ctx->fd;
	bpf_seq_write(ctx->meta->seq, &found, sizeof(found));
	return 0;
}
