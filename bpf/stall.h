/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A host socket and how it gets on, as one record of the iterators in stall.bpf.c. */
#ifndef STALL_H
#define STALL_H

#include "identity.h"

/* A socket that is to be looked at again. User space only hands it back. */
struct watched {
	__u64 cookie; /* no other socket has had it, or will */
	__u64 sock;   /* its struct sock, which may be gone or another's: the cookie tells */
};

struct host_socket {
	struct identity identity;
	struct watched watched;
	__u64 inode;
	__u32 unacknowledged_bytes;
	__u8 retransmissions; /* time-outs in a row, nothing new acknowledged since */
	__u8 probes; /* window or keepalive probes in a row, none answered */
	__u8 padding[2];
};

#endif
