/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A process, as one record of the iterator in process.bpf.c. */
#ifndef PROCESS_H
#define PROCESS_H

struct process {
	__u64 cgroup_id; /* in the v2 hierarchy */
	__u32 netns;     /* inode number of its network namespace */
	__u32 tgid;
};

#endif
