// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
// Finds how long the threads of a process would sleep on. Nobody keeps that for them but the timer that is to wake
// them: it lies on the kernel stack of the thread, in the frame of the function that called schedule(), followed by a
// pointer to the thread, and it is linked into the kernel's timers. Nothing but such a timer looks like that.
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

#include "descriptor.h"
#include "pid.h"
#include "sleep.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define CLOCK_MONOTONIC 1

/* A timer of the wheel may be late by an eighth of its time, and is never set for longer. */
#define MAX_LATE_TICKS (1LL << 30)
#define MAX_LEFT_TICKS (1LL << 40)

/* The frames of schedule() and of its caller take less. In pieces: the stack may end before. */
#define SCANNED_BYTES 1024
#define PIECE_WORDS 16

/* One slot for each transaction thread of the forwarder. */
#define MAX_SLOTS 64

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct sleepers);
} sleeping SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_SLOTS);
	__type(key, __u32);
	__type(value, struct threads);
} stopped SEC(".maps");

/* Of schedule_hrtimeout(), whose timer is in a tree. */
static __always_inline int is_hrtimer_sleeper(struct hrtimer_sleeper *sleeper)
{
	struct rb_node *node = &sleeper->timer.node.node;
	struct rb_node *parent = (void *)(BPF_CORE_READ(node, __rb_parent_color) & ~3UL);
	struct hrtimer_clock_base *base = BPF_CORE_READ(sleeper, timer.base);

	if (BPF_CORE_READ(base, clockid) != CLOCK_MONOTONIC)
		return 0;
	if (!parent)
		return BPF_CORE_READ(base, active.rb_root.rb_root.rb_node) == node;
	return BPF_CORE_READ(parent, rb_left) == node || BPF_CORE_READ(parent, rb_right) == node;
}

/* Of schedule_timeout(), whose timer is in a list. A member of another list is not followed by a time. */
static __always_inline int is_process_timer(struct process_timer *timer, __s64 left)
{
	struct hlist_node *entry = &timer->timer.entry;
	struct hlist_node **pprev = BPF_CORE_READ(entry, pprev), *first = NULL;

	bpf_probe_read_kernel(&first, sizeof(first), pprev);
	return first == entry && left > -MAX_LATE_TICKS && left < MAX_LEFT_TICKS;
}

/* Fills in how long the thread sleeps on, if what is before this word of its stack, which points to it, is a timer. */
static __always_inline int read_timer(struct sleeper *found, __u64 word_at)
{
	struct hrtimer_sleeper *sleeper = (void *)word_at - bpf_core_field_offset(struct hrtimer_sleeper, task);
	struct process_timer *timer = (void *)word_at - bpf_core_field_offset(struct process_timer, task);

	found->left_ns = BPF_CORE_READ(sleeper, timer._softexpires) - bpf_ktime_get_ns();
	found->left_ticks = 0;
	if (is_hrtimer_sleeper(sleeper))
		return 1;
	found->left_ns = 0;
	found->left_ticks = BPF_CORE_READ(timer, timer.expires) - bpf_jiffies64();
	return is_process_timer(timer, found->left_ticks);
}

/* A function of its own for the verifier: it is not looked through again for each thread. */
__noinline int find_sleeper(__u32 slot, __u64 address)
{
	struct sleepers *sleepers = bpf_map_lookup_elem(&sleeping, &slot);
	struct task_struct *task = (void *)address;
	struct sleeper *found;
	__u64 words[PIECE_WORDS];
	__u64 at = BPF_CORE_READ(task, thread.sp);
	__u64 switches = BPF_CORE_READ(task, nvcsw);
	__u32 count;

	if (!sleepers)
		return 1;
	count = sleepers->count;
	if (count >= MAX_SLEEPERS)
		return 1;
	found = &sleepers->list[count];
	for (int piece = 0; piece < SCANNED_BYTES / sizeof(words); piece++) {
		if (bpf_probe_read_kernel(words, sizeof(words), (void *)at))
			return 0;
		for (int i = 0; i < PIECE_WORDS; i++) {
			if (words[i] != address || !read_timer(found, at + 8 * i))
				continue;
			found->switches = switches;
			found->tid = pid_at(task, own_pid_level());
			sleepers->count = count + 1;
			return 0;
		}
		at += sizeof(words);
	}
	return 0;
}

/* Run by BPF_PROG_TEST_RUN only, never attached: args[0] is the slot of the caller, args[1] a pidfd of it. */
SEC("raw_tp")
int find_sleepers(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 slot = ctx->args[0];
	struct sleepers *sleepers = bpf_map_lookup_elem(&sleeping, &slot);
	struct task_struct *task = task_of_pidfd(ctx->args[1]);
	struct list_head *head, *node;

	if (!sleepers || !task)
		return 1;
	sleepers->count = 0;
	head = &BPF_CORE_READ(task, signal)->thread_head;
	node = BPF_CORE_READ(head, next);
	for (int i = 0; i < MAX_THREADS && node && node != head; i++) {
		find_sleeper(slot, (__u64)node - bpf_core_field_offset(struct task_struct, thread_node));
		node = BPF_CORE_READ(node, next);
	}
	return 0;
}

/* As above: what the threads of a process are like now that they stand still. */
SEC("raw_tp")
int look_at_threads(struct bpf_raw_tracepoint_args *ctx)
{
	__u32 slot = ctx->args[0];
	struct threads *threads = bpf_map_lookup_elem(&stopped, &slot);
	struct task_struct *task = task_of_pidfd(ctx->args[1]);
	struct list_head *head, *node;
	__u32 level = own_pid_level();
	__u32 count = 0;

	if (!threads || !task)
		return 1;
	head = &BPF_CORE_READ(task, signal)->thread_head;
	node = BPF_CORE_READ(head, next);
	for (int i = 0; i < MAX_THREADS && node && node != head; i++) {
		struct thread *thread = &threads->list[i];

		task = (void *)node - bpf_core_field_offset(struct task_struct, thread_node);
		thread->switches = BPF_CORE_READ(task, nvcsw);
		thread->tid = pid_at(task, level);
		thread->seccomp = BPF_CORE_READ(task, seccomp.mode);
		node = BPF_CORE_READ(node, next);
		count = i + 1;
	}
	threads->count = count;
	return 0;
}
