/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What the forwarder learns about sockets: crosses to Rust by the skeleton. Includes nothing. */
#ifndef INSPECT_H
#define INSPECT_H

/* A socket may be registered in this many epoll sets at most; more is reported as `watchers_left_out`. */
#define MAX_WATCHERS 16

/* One run of a program looks at this many sockets, or descriptors, at most. */
#define LOOKED_AT_ONCE 8

/* Of a process's cgroup, so many levels up are reported. */
#define MAX_CGROUPS 12

#define KIND_TCP 1
#define KIND_EPOLL 2
#define KIND_IO_URING 3

/* One registration of a socket in an epoll set. `data` and `events` as given to epoll_ctl(2). */
struct watcher {
	__u64 epoll;
	__u64 data;
	__u32 events;
	__u32 fd;
};

/* A TCP socket as seen through a descriptor of the calling process. */
struct socket_facts {
	__u64 file;
	__u64 refs;
	__u64 inode;
	/* See options.h. */
	__u64 options;
	__u32 netns;
	__u32 is_tcp;
	__u32 family;
	__u32 state;
	__u32 write_seq;
	__u32 snd_una;
	__u32 rcv_nxt;
	__u32 copied_seq;
	__u32 receive_window;
	__u32 shutdown;
	__u32 urgent;
	__u32 is_mptcp;
	__u32 has_ulp;
	__u32 has_filter;
	__u32 has_signature;
	__u32 repair;
	__u32 watchers_left_out;
	__u32 watcher_count;
	struct watcher watchers[MAX_WATCHERS];
};

/* `is_tcp` is zero where a descriptor is none of a TCP socket. */
struct sockets_facts {
	struct socket_facts of[LOOKED_AT_ONCE];
};

/* The descriptor table of the process behind a pidfd of the calling process. */
struct table_facts {
	__u64 table;
	__u32 users;
	__u32 padding;
};

/* A descriptor of that process: the open file behind it, and its epoll set if it is one. `file` is zero if it is closed. */
struct fd_facts {
	__u64 file;
	__u64 epoll;
	__u32 close_on_exec;
	__u32 padding;
};

struct fds_facts {
	struct fd_facts of[LOOKED_AT_ONCE];
};

/* One descriptor somewhere on this machine: a TCP socket, an epoll set or an io_uring. */
struct descriptor {
	__u64 file;
	__u64 table;
	__u64 inode;
	__u64 epoll;
	/* The process's cgroup and its ancestors, in the default hierarchy. */
	__u64 cgroups[MAX_CGROUPS];
	__u64 bytes_sent;
	__u64 bytes_received;
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__u32 kind;
	__u32 netns;
	__u32 family;
	__u32 state;
	__u32 local_port;
	__u32 remote_port;
	__u8 local[16];
	__u8 remote[16];
	__u32 padding;
};

#endif
