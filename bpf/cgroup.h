/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The way up in the default hierarchy. After vmlinux.h and bpf_core_read.h. */
#ifndef CGROUP_H
#define CGROUP_H

/* Zero for the root. */
static __always_inline struct cgroup *parent_of(struct cgroup *cgroup)
{
	struct cgroup_subsys_state *parent = BPF_CORE_READ(cgroup, self.parent);

	return parent ? (void *)parent - bpf_core_field_offset(struct cgroup, self) : 0;
}

#endif
