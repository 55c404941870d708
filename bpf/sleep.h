/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the forwarder learns about threads: crosses to Rust by the skeleton. Includes nothing. */
#ifndef SLEEP_H
#define SLEEP_H

/* Of a process with more threads, or more that sleep for a time, the rest is left out. */
#define MAX_THREADS 1024
#define MAX_SLEEPERS 128

/* A thread that sleeps for a time. Its time is up in `left_ns` and `left_ticks`: one of them is zero. */
struct sleeper {
	__s64 left_ns;
	__s64 left_ticks;
	/* As the line voluntary_ctxt_switches of /proc/PID/status has it. */
	__u64 switches;
	__u32 tid;
	__u32 padding;
};

struct sleepers {
	__u32 count;
	__u32 padding;
	struct sleeper list[MAX_SLEEPERS];
};

struct thread {
	/* As in struct sleeper. */
	__u64 switches;
	__u32 tid;
	/* As the line Seccomp of /proc/PID/status has it: zero if there is none. */
	__u32 seccomp;
};

struct threads {
	__u32 count;
	__u32 padding;
	struct thread list[MAX_THREADS];
};

#endif
