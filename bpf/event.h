/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What crosses from BPF to Rust. The skeletons make the Rust types of these; src/trace/tests.rs pins their layout. */
#ifndef EVENT_H
#define EVENT_H

#include "identity.h"

/* The first field of every record in the ring. */
#define EVENT_CONNECTION 1
#define EVENT_HOST_SOCKET_CLOSED 2
#define EVENT_BIRTH 3
#define EVENT_HOST_SOCKET_WAITS 4

#define SIDE_CLIENT 1
#define SIDE_SERVER 2

/* A connection that was established. User space only hands it back, to look at the connection again. */
struct birth {
	__u64 cookie; /* of the socket: no other has had it, or will */
	__u64 sock;   /* its struct sock, which may be gone or another's: the cookie tells */
	__u64 born_ns; /* CLOCK_MONOTONIC */
	__u64 side;
};

/* Addresses have 16 bytes in network order, an IPv4 address in its v4-mapped form; ports are in host order. */
struct connection_event {
	__u32 kind;
	__u32 netns;     /* inode number of the socket's network namespace */
	struct birth birth;
	__u64 age_ns;
	__u64 bytes;     /* acknowledged by the peer, and received */
	__u64 socket;    /* inode number in sockfs; 0 while nobody has accepted it */
	__u64 cgroup_id; /* of whoever made the socket, or the one that listens, in the v2 hierarchy */
	__u16 local_port;
	__u16 remote_port;
	__u8 local[16];
	__u8 remote[16];
	__u8 v6; /* the socket's family is AF_INET6, also where the addresses are v4-mapped */
	__u8 padding[3];
};

/* A socket that has an identity left ESTABLISHED. */
struct closed_event {
	__u32 kind;
	__u32 padding;
	struct identity identity;
};

/*
 * Of EVENT_BIRTH: the first connection was established since the reader has gone to sleep. Of EVENT_HOST_SOCKET_WAITS: a
 * socket that has an identity has timed out for the second time in a row, and perhaps others within the next TELL_WAITS_NS.
 */
struct bare_event {
	__u32 kind;
};

#define TELL_WAITS_NS 50000000

/* Keys of the map `counters`. */
#define COUNTER_RING_FULL 0   /* records lost because the ring was full */
#define COUNTER_BIRTHS_FULL 1 /* births written over before anybody has looked */
#define COUNTERS 2

#endif
