// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Each read shows every process of this host's containers. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "process.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct process _process = {};

/* The cgroup that all containers are below: its id, and its depth below the root of the v2 hierarchy. */
const volatile __u64 scope_cgroup_id = 0;
const volatile __u32 scope_level = 0;
/* Inode number of the router's network namespace, the host's: what is in it is never seen. */
const volatile __u32 own_netns = 0;

/* struct cgroup has pointers to its ancestors since 6.1, their ids before. */
struct cgroup___until_6_0 {
	int level;
	__u64 ancestor_ids[];
} __attribute__((preserve_access_index));

static __always_inline int in_scope(const struct cgroup *cgroup)
{
	const struct cgroup___until_6_0 *before = (const void *)cgroup;
	const struct cgroup *top = 0;
	__u64 id = 0;

	if (scope_level == 0)
		return 1;
	if (BPF_CORE_READ(cgroup, level) < (int)scope_level)
		return 0;
	if (bpf_core_field_exists(before->ancestor_ids)) {
		bpf_core_read(&id, sizeof(id), &before->ancestor_ids[scope_level]);
	} else {
		bpf_core_read(&top, sizeof(top), &cgroup->ancestors[scope_level]);
		id = BPF_CORE_READ(top, kn, id);
	}
	return id == scope_cgroup_id;
}

SEC("iter/task")
int processes(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct process record = {};
	struct cgroup *cgroup;

	/* After the last task the program runs once more, without one. */
	if (!task || task->pid != task->tgid)
		return 0;
	cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);
	record.netns = BPF_CORE_READ(task, nsproxy, net_ns, ns.inum);
	/* None: it ends. */
	if (!record.netns || record.netns == own_netns || !in_scope(cgroup))
		return 0;
	record.cgroup_id = BPF_CORE_READ(cgroup, kn, id);
	record.tgid = task->tgid;
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
