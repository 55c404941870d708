// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Each read shows every process of this host's containers. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "cgroup.h"
#include "pid.h"
#include "process.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct process _process = {};

/* The id of the cgroup that all containers are below. */
const volatile __u64 scope_cgroup_id = 0;
/* Inode number of the router's network namespace, the host's: what is in it is never seen. */
const volatile __u32 own_netns = 0;

/* For the verifier: nobody nests deeper. */
#define MAX_DEPTH 32

static __always_inline int in_scope(struct cgroup *cgroup)
{
	for (int above = 0; above < MAX_DEPTH && cgroup; above++) {
		if (BPF_CORE_READ(cgroup, kn, id) == scope_cgroup_id)
			return 1;
		cgroup = parent_of(cgroup);
	}
	return 0;
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
	record.tgid = pid_at(task, own_pid_level());
	bpf_seq_write(ctx->meta->seq, &record, sizeof(record));
	return 0;
}
