/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a socket's options are, as one number. After socket.h. */
#ifndef OPTIONS_H
#define OPTIONS_H

/* Of O_NONBLOCK and O_ASYNC, of TCP_NODELAY and TCP_CORK, of IP_RECVTTL and IP_RECVTOS: the kernel keeps more beside them. */
#define FILE_FLAGS 024000
#define NAGLE_FLAGS 3
#define CMSG_FLAGS 6

/* In inet_flags since 6.6. */
struct inet_sock___until_6_5 {
	__u16 cmsg_flags;
} __attribute__((preserve_access_index));

struct inet_sock___since_6_6 {
	unsigned long inet_flags;
} __attribute__((preserve_access_index));

/* In the file itself until 6.11. */
struct file___owner_inside {
	struct fown_struct f_owner;
} __attribute__((preserve_access_index));

struct file___owner_outside {
	struct fown_struct *f_owner;
} __attribute__((preserve_access_index));

static __always_inline void mix(__u64 *number, __u64 value)
{
	*number = (*number ^ value) * 0x9e3779b97f4a7c15;
	*number ^= *number >> 32;
}

/* Of any width, as a bit field or not: kernels differ. */
#define MIX(number, object, field)                                                                                     \
	({                                                                                                             \
		if (!bpf_core_field_exists((object)->field))                                                           \
			return 0;                                                                                      \
		mix(&(number), BPF_CORE_READ_BITFIELD_PROBED(object, field));                                          \
	})

/* Equal for two sockets of a family only if all that forwarder/src/options.rs carries over, but for the sizes of buffers, is
 * equal. Zero: this kernel keeps some of it elsewhere. */
static __always_inline __u64 options_of(struct file *file, struct sock *sk)
{
	struct inet_connection_sock *icsk = (void *)sk;
	struct inet_sock *inet = (void *)sk;
	struct tcp_sock *tp = (void *)sk;
	struct inet_sock___until_6_5 *cmsg_before = (void *)sk;
	struct inet_sock___since_6_6 *cmsg_now = (void *)sk;
	struct file___owner_inside *inside = (void *)file;
	struct file___owner_outside *outside = (void *)file;
	struct fown_struct *owner;
	struct ipv6_pinfo *np;
	__u64 options = 1;

	MIX(options, sk, __sk_common.skc_flags);
	MIX(options, sk, sk_lingertime);
	MIX(options, sk, sk_rcvtimeo);
	MIX(options, sk, sk_sndtimeo);
	MIX(options, sk, sk_rcvlowat);
	MIX(options, sk, sk_max_pacing_rate);
	MIX(options, sk, sk_priority);
	MIX(options, sk, sk_tsflags);
	MIX(options, sk, sk_ll_usec);
	MIX(options, sk, sk_prefer_busy_poll);
	MIX(options, sk, __sk_common.skc_reuse);
	MIX(options, inet, tos);
	MIX(options, inet, uc_ttl);
	MIX(options, icsk, icsk_user_timeout);
	MIX(options, tp, keepalive_time);
	MIX(options, tp, keepalive_intvl);
	MIX(options, tp, keepalive_probes);
	MIX(options, tp, notsent_lowat);
	MIX(options, tp, linger2);
	MIX(options, tp, thin_lto);
	MIX(options, tp, recvmsg_inq);
	mix(&options, BPF_CORE_READ_BITFIELD_PROBED(tp, nonagle) & NAGLE_FLAGS);
	mix(&options, (__u64)BPF_CORE_READ(icsk, icsk_ca_ops));
	if (bpf_core_field_exists(cmsg_now->inet_flags))
		mix(&options, BPF_CORE_READ(cmsg_now, inet_flags) & CMSG_FLAGS);
	else if (bpf_core_field_exists(cmsg_before->cmsg_flags))
		mix(&options, BPF_CORE_READ(cmsg_before, cmsg_flags) & CMSG_FLAGS);
	else
		return 0;
	/* A kernel may be without IPv6. */
	np = bpf_core_field_exists(inet->pinet6) ? BPF_CORE_READ(inet, pinet6) : 0;
	if (np && BPF_CORE_READ(sk, __sk_common.skc_family) == AF_INET6) {
		MIX(options, np, tclass);
		MIX(options, np, hop_limit);
		MIX(options, np, rxopt.all);
	}
	mix(&options, BPF_CORE_READ(file, f_flags) & FILE_FLAGS);
	if (bpf_core_field_exists(outside->f_owner))
		owner = BPF_CORE_READ(outside, f_owner);
	else if (bpf_core_field_exists(inside->f_owner))
		owner = (void *)file + bpf_core_field_offset(inside->f_owner);
	else
		return 0;
	/* Who never had an owner has the same as who has none any more. */
	mix(&options, owner ? (__u64)BPF_CORE_READ(owner, pid) : 0);
	mix(&options, owner && BPF_CORE_READ(owner, pid) ? BPF_CORE_READ(owner, pid_type) : 0);
	mix(&options, owner ? BPF_CORE_READ(owner, signum) : 0);
	return options;
}

#endif
