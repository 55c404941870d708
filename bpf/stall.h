/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A host socket and how it gets on, as one record of the iterators in stall.bpf.c. */
#ifndef STALL_H
#define STALL_H

#include "identity.h"

struct host_socket {
	struct identity identity;
	__u64 inode;
	__u32 unacknowledged_bytes;
	__u8 retransmissions; /* time-outs in a row, nothing new acknowledged since */
	__u8 probes; /* window or keepalive probes in a row, none answered */
	__u8 padding[2];
};

#endif
