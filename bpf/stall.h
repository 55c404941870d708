/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* A host socket, as one record of the iterators in stall.bpf.c. */
#ifndef STALL_H
#define STALL_H

#include "identity.h"

struct host_socket {
	struct identity identity;
	__u64 inode;
	__u32 unacknowledged_bytes;
	__u32 padding;
};

#endif
