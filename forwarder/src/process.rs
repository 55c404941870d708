// SPDX-License-Identifier: Apache-2.0
//! Ids and plain facts of other processes, from /proc.

use std::{
    fs::File,
    io::{self, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
};

use forwarder_api::Refusal;
use rustix::fs::RawDir;

/// A thread group: what `ps` calls a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tgid(pub i32);

/// A thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tid(pub i32);

/// An address in another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteAddr(pub u64);

/// A descriptor number of another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteFd(pub i32);

/// A handle on a process that cannot come to mean another one.
pub fn pidfd(tgid: Tgid) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open(2) takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, tgid.0, 0) };
    owned(fd)
}

/// A copy of another process's descriptor, by pidfd_getfd(2).
pub fn copy_fd(pidfd: &OwnedFd, fd: RemoteFd) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_getfd(2) takes three integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd.0, 0) };
    owned(fd)
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Why something about another process could not be had: because of us, or because it has ended or changed.
pub fn lacking(error: io::Error) -> Refusal {
    out_of_descriptors(&error).unwrap_or(Refusal::HolderVanished)
}

/// A call that only makes something for us has failed.
pub fn not_made(error: impl Into<io::Error>) -> Refusal {
    out_of_descriptors(&error.into()).unwrap_or(Refusal::InjectionFailed)
}

fn out_of_descriptors(error: &io::Error) -> Option<Refusal> {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)).then_some(Refusal::Exhausted)
}

/// The threads of a process at this moment, zombies left out. Without the C library's memory, as [`crate::child`] wants it.
pub fn threads(tgid: Tgid) -> io::Result<Vec<Tid>> {
    let directory = File::open(format!("/proc/{}/task", tgid.0))?;
    let mut tids = Vec::new();
    let mut buffer = [MaybeUninit::uninit(); 8 << 10];
    let mut entries = RawDir::new(directory, &mut buffer);
    while let Some(entry) = entries.next() {
        if let Some(tid) = entry?.file_name().to_str().ok().and_then(|name| name.parse().ok()) {
            tids.push(Tid(tid));
        }
    }
    Ok(tids)
}

/// The state letter of a thread in /proc/PID/task/TID/stat, `None` if it is gone.
pub fn state(tgid: Tgid, tid: Tid) -> io::Result<Option<char>> {
    let stat = match std::fs::read_to_string(format!("/proc/{}/task/{}/stat", tgid.0, tid.0)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Ok(None),
        stat => stat?,
    };
    // The name in parentheses may hold anything: the state follows the last one.
    Ok(stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next()))
}

/// Does a seccomp filter, or the strict mode, stand between the thread and its system calls? If it cannot be read, yes.
pub fn is_filtered(tgid: Tgid, tid: Tid) -> bool {
    let status =
        std::fs::read_to_string(format!("/proc/{}/task/{}/status", tgid.0, tid.0)).unwrap_or_default();
    !status.lines().any(|line| line == "Seccomp:\t0")
}

/// Status flags and close-on-exec of a descriptor, as open(2) knows them: the `flags:` line of its fdinfo.
pub fn open_flags(tid: Tid, fd: RemoteFd) -> io::Result<i32> {
    let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{}", tid.0, fd.0))?;
    info.lines()
        .find_map(|line| line.strip_prefix("flags:"))
        .and_then(|octal| i32::from_str_radix(octal.trim(), 8).ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no flags line in fdinfo"))
}

/// The inode number of the socket behind a descriptor, `None` if it is no socket or not open.
pub fn socket_inode(tid: Tid, fd: RemoteFd) -> Option<u64> {
    let link = std::fs::read_link(format!("/proc/{}/fd/{}", tid.0, fd.0)).ok()?;
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Let the calling thread run before others, and sleep for no longer than it wants: processes stand still while it works.
/// Without CAP_SYS_NICE it takes its turn, and they stand still for longer on a busy machine.
pub fn hurry() {
    const FIRST: libc::c_int = -20;
    const SLACK_NS: libc::c_ulong = 1;
    // SAFETY: setpriority(2) and prctl(2) take integers here; zero is the calling thread.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, FIRST);
        libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS);
    }
}

/// Let others run before the calling thread: nobody stands still for what it does.
pub fn stand_back() {
    const LATER: libc::c_int = 10;
    // SAFETY: as above.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, LATER) };
}

/// Do two of these processes have one memory (CLONE_VM)? By kcmp(2), KCMP_VM.
pub fn any_share_memory(tgids: &[Tgid]) -> bool {
    const KCMP_VM: libc::c_int = 1;
    // SAFETY: kcmp(2) takes integers; this kind uses the first three alone. An error: one of them has ended.
    let same = |a: &Tgid, b: &Tgid| unsafe { libc::syscall(libc::SYS_kcmp, a.0, b.0, KCMP_VM, 0, 0) } == 0;
    tgids.iter().enumerate().any(|(index, a)| tgids[index + 1..].iter().any(|b| same(a, b)))
}

/// All descriptors of a process that are epoll sets.
pub fn epoll_sets(tid: Tid) -> io::Result<Vec<RemoteFd>> {
    let entries = std::fs::read_dir(format!("/proc/{}/fd", tid.0))?;
    let is_set = |path: std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|link| link.as_os_str() == "anon_inode:[eventpoll]")
    };
    let sets = entries.flatten().filter(|entry| is_set(entry.path()));
    Ok(sets.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).map(RemoteFd).collect())
}

/// Does a process run a 32-bit program? By the class in its ELF head.
pub fn is_32_bit(tgid: Tgid) -> bool {
    const EI_CLASS: u64 = 4;
    const ELFCLASS32: u8 = 1;
    let mut class = [0];
    let exe = File::open(format!("/proc/{}/exe", tgid.0));
    exe.and_then(|exe| exe.read_exact_at(&mut class, EI_CLASS)).is_ok() && class == [ELFCLASS32]
}

/// The inode number of the network namespace that a process is in.
pub fn network_namespace(tgid: Tgid) -> io::Result<u32> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(format!("/proc/{}/ns/net", tgid.0))?.ino() as u32)
}

/// Where the vDSO of a process is: AT_SYSINFO_EHDR in its auxiliary vector.
pub fn vdso(tgid: Tgid) -> io::Result<Option<RemoteAddr>> {
    const AT_NULL: u64 = 0;
    // Twice what the kernel puts there. It gives all of it at once.
    let mut auxv = [0; 1 << 10];
    let length = File::open(format!("/proc/{}/auxv", tgid.0))?.read(&mut auxv)?;
    let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(AT_NULL);
    let mut entries = auxv[..length].chunks_exact(16).map(|entry| (word(&entry[..8]), word(&entry[8..])));
    Ok(entries
        .by_ref()
        .take_while(|(kind, _)| *kind != AT_NULL)
        .find(|(kind, _)| *kind == libc::AT_SYSINFO_EHDR)
        .map(|(_, value)| RemoteAddr(value)))
}

/// The memory of another process, also where that process may not write.
pub struct Memory(File);

impl Memory {
    pub fn open(tgid: Tgid) -> io::Result<Memory> {
        File::options().read(true).write(true).open(format!("/proc/{}/mem", tgid.0)).map(Memory)
    }

    pub fn read(&self, at: RemoteAddr, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, at.0)
    }

    pub fn write(&self, at: RemoteAddr, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, at.0)
    }
}
