/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a descriptor of the current task refers to. After vmlinux.h and bpf_core_read.h. */
#ifndef DESCRIPTOR_H
#define DESCRIPTOR_H

static __always_inline struct file *file_of_fd(__u32 fd)
{
	struct task_struct *task = (void *)bpf_get_current_task();
	struct fdtable *table = BPF_CORE_READ(task, files, fdt);
	struct file **slots, *file = 0;

	if (fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	slots = BPF_CORE_READ(table, fd);
	bpf_probe_read_kernel(&file, sizeof(file), slots + fd);
	return file;
}

/* A pidfd keeps its struct pid in the inode since 6.9 (pidfs), in the file before. */
static __always_inline struct task_struct *task_of_pidfd(__u32 fd)
{
	struct file *file = file_of_fd(fd);
	struct hlist_node *node;
	struct pid *pid;

	if (!file)
		return 0;
	pid = BPF_CORE_READ(file, private_data);
	if (!pid)
		pid = BPF_CORE_READ(file, f_inode, i_private);
	if (!pid)
		return 0;
	node = BPF_CORE_READ(pid, tasks[PIDTYPE_PID].first);
	return node ? (void *)node - bpf_core_field_offset(struct task_struct, pid_links[PIDTYPE_PID]) : 0;
}

#endif
