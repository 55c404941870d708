// SPDX-License-Identifier: Apache-2.0
//! The system calls that the router may make. It faces the network: whoever takes it over shall be able to start no
//! program, to stop no process and to enter no namespace.
//!
//! Another call kills the router, at once and all of it. That is the kindest end: connections stay where they are, the
//! forwarder keeps their way back, and the kernel's log has a line `type=1326 ... comm="router" ... syscall=N`. An error
//! in place of the call would be silent, and would be met in code that nobody has tried. Where a library has begun to make
//! a call that is not in the list, `ROUTER_SECCOMP=log` lets the router run on and leaves only the lines.

use std::collections::BTreeMap;

use clap::Args;
use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

#[derive(Args, Clone, Debug)]
pub struct SeccompSettings {
    /// What a system call that the router does not use leads to: kill (the router) or log (the call, in the kernel's log).
    #[arg(long, env = "ROUTER_SECCOMP", default_value = "kill", value_name = "kill|log", value_parser = unlisted)]
    pub seccomp: Unlisted,
}

/// What becomes of a call that is not in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unlisted {
    Kill,
    Log,
}

fn unlisted(text: &str) -> Result<Unlisted, String> {
    match text {
        "kill" => Ok(Unlisted::Kill),
        "log" => Ok(Unlisted::Log),
        _ => Err("expected kill or log".into()),
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    #[error("no filter of system calls can be made for this machine: {0}")]
    Make(#[from] BackendError),
    #[error("the filter of system calls cannot be set: {0}; the kernel must have CONFIG_SECCOMP_FILTER=y")]
    Set(#[from] seccompiler::Error),
}

const MEMORY: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
];

const THREADS: &[libc::c_long] = &[
    // Its flags cannot be seen by a filter. A process made by it could do no more than this one.
    libc::SYS_clone3,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    // A thread that would end the program while another does so.
    libc::SYS_pause,
    libc::SYS_prctl,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // abort(3)
    libc::SYS_tgkill,
];

const SIGNALS_AND_TIME: &[libc::c_long] = &[
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
];

const WAITING: &[libc::c_long] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_select,
];

const FILES: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_chmod,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fcntl,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_getcwd,
    libc::SYS_getdents64,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_rm_watch,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_write,
    libc::SYS_writev,
];

const SOCKETS: &[libc::c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
];

const KERNEL: &[libc::c_long] = &[
    libc::SYS_bpf,
    // Shown by `router check`.
    libc::SYS_capget,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getrandom,
    libc::SYS_getuid,
    // libbpf, for maps that it is about to make.
    libc::SYS_memfd_create,
    libc::SYS_prlimit64,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Kinds of sockets: unix, IPv4, IPv6, netlink. Not raw packets, not virtual machines.
const FAMILIES: [libc::c_int; 4] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK];

/// From now on this thread, and those that it starts, make no other system calls; and no program gains privileges.
pub fn confine(unlisted: Unlisted) -> Result<(), SeccompError> {
    let action = match unlisted {
        Unlisted::Kill => SeccompAction::KillProcess,
        Unlisted::Log => SeccompAction::Log,
    };
    Ok(seccompiler::apply_filter(&filter(action)?)?)
}

fn filter(unlisted: SeccompAction) -> Result<BpfProgram, BackendError> {
    let plain = [MEMORY, THREADS, SIGNALS_AND_TIME, WAITING, FILES, SOCKETS, KERNEL].concat();
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = plain.into_iter().map(|call| (call, vec![])).collect();
    let first_is = |compare, value| {
        SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Dword, compare, value)?])
    };
    let family = |family: libc::c_int| first_is(SeccompCmpOp::Eq, family as u64);
    calls.insert(libc::SYS_socket, FAMILIES.into_iter().map(family).collect::<Result<_, _>>()?);
    // A thread, not a process.
    let thread = libc::CLONE_THREAD as u64;
    calls.insert(libc::SYS_clone, vec![first_is(SeccompCmpOp::MaskedEq(thread), thread)?]);
    SeccompFilter::new(calls, unlisted, SeccompAction::Allow, std::env::consts::ARCH.try_into()?)?.try_into()
}

#[cfg(test)]
mod tests {
    use nix::{errno::Errno, sys::socket};

    use super::*;

    /// What `call` answers in a thread whose unlisted calls fail.
    fn confined<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> T {
        let refused = SeccompAction::Errno(Errno::EPERM as u32);
        let thread = std::thread::spawn(move || {
            seccompiler::apply_filter(&filter(refused).unwrap()).unwrap();
            call()
        });
        thread.join().unwrap()
    }

    fn open(family: socket::AddressFamily) -> nix::Result<()> {
        let kind = socket::SockType::Raw;
        socket::socket(family, kind, socket::SockFlag::empty(), None).map(drop)
    }

    #[test]
    fn no_program_can_be_started() {
        let error = confined(|| std::process::Command::new("/bin/true").status().unwrap_err());
        assert_eq!(error.raw_os_error(), Some(Errno::EPERM as i32));
    }

    #[test]
    fn no_other_namespace_can_be_entered() {
        let result = confined(|| nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS));
        assert_eq!(result, Err(Errno::EPERM));
    }

    #[test]
    fn no_process_can_be_signalled() {
        assert_eq!(confined(|| nix::sys::signal::kill(nix::unistd::Pid::this(), None)), Err(Errno::EPERM));
    }

    #[test]
    fn sockets_are_of_the_kinds_that_are_used() {
        assert_eq!(confined(|| open(socket::AddressFamily::Packet)), Err(Errno::EPERM));
        assert_eq!(confined(|| open(socket::AddressFamily::Netlink)), Ok(()));
    }

    #[test]
    fn threads_can_be_started() {
        assert_eq!(confined(|| std::thread::spawn(|| 7).join().unwrap()), 7);
    }
}
