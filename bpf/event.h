/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What crosses from BPF to Rust. The skeletons make the Rust types of these; src/trace/tests.rs pins their layout. */
#ifndef EVENT_H
#define EVENT_H

/* The first field of every record in the ring. */
#define EVENT_CONNECTION 1
#define EVENT_HOST_SOCKET_CLOSED 2

#define SIDE_CLIENT 1
#define SIDE_SERVER 2

/* Addresses have 16 bytes in network order, an IPv4 address in its v4-mapped form; ports are in host order. */
struct connection_event {
	__u32 kind;
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__u64 socket;    /* inode number in sockfs */
	__u64 cgroup_id; /* of the task, in the v2 hierarchy */
	__u32 netns;     /* inode number of the socket's network namespace */
	__u16 local_port;
	__u16 remote_port;
	__u8 local[16];
	__u8 remote[16];
	__u8 comm[16];
	__u8 side;
	__u8 v6; /* the socket's family is AF_INET6, also where the addresses are v4-mapped */
	__u8 padding[6];
};

/* A socket that has an identity left ESTABLISHED. */
struct closed_event {
	__u32 kind;
	__u32 padding;
	__u64 swap; /* of its identity */
};

/* Keys of the map `counters`. */
#define COUNTER_RING_FULL 0       /* records lost because the ring was full */
#define COUNTER_CONNECTING_FULL 1 /* connects lost because the map `connecting` was full */
#define COUNTER_CALLS_FULL 2      /* connects lost because the map `calls` was full */
#define COUNTERS 3

#endif
