/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Process ids as user space sees them, which may live in a pid namespace of its own (a node of `kind`). What it is told of
 * is in its namespace, or in one below: iterators show nothing else, and of nothing else it has a pidfd. After vmlinux.h
 * and bpf_core_read.h.
 */
#ifndef PID_H
#define PID_H

/* How deep the reader's namespace is. */
static __always_inline __u32 own_pid_level(void)
{
	struct task_struct *reader = (void *)bpf_get_current_task();

	return BPF_CORE_READ(reader, thread_pid, level);
}

/* Zero for a task that has ended. */
static __always_inline __u32 pid_at(const struct task_struct *task, __u32 level)
{
	struct pid *pid = BPF_CORE_READ(task, thread_pid);
	int nr = 0;

	bpf_core_read(&nr, sizeof(nr), &pid->numbers[level].nr);
	return nr;
}

#endif
