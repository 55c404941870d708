// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/* Each read shows every process of this host's containers. */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include "process.h"
#include "scope.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Not used here: it makes the skeleton generate the Rust type. */
struct process _process = {};

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
