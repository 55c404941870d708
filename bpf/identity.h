/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The overlay addresses of a host socket, as user space writes them. One map, used by both objects. */
#ifndef IDENTITY_H
#define IDENTITY_H

/*
 * Addresses have 16 bytes in network order, an IPv4 address in its v4-mapped form: just what a v6 socket must show.
 * Ports are in network order.
 */
struct identity {
	__u64 swap; /* the swap that installed the socket, so that the end of an earlier one is not taken for its */
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u8 v6; /* the overlay addresses are IPv6 and not v4-mapped: nothing that a v4 socket could show */
	__u8 padding[3];
};

/* Storage lives in the socket and goes away with it: no size to choose, never full but for want of memory. */
#define IDENTITIES_MAP                                                                                              \
	struct {                                                                                                    \
		__uint(type, BPF_MAP_TYPE_SK_STORAGE);                                                              \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                                               \
		__type(key, int);                                                                                   \
		__type(value, struct identity);                                                                     \
	} identities SEC(".maps")

#endif
