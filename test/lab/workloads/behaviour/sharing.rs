// SPDX-License-Identifier: Apache-2.0
//! Sockets that more than one thread, descriptor or process has.

use std::{
    io::{IoSlice, IoSliceMut},
    net::TcpListener,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::PathBuf,
    ptr::null_mut,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::{
    Behaviour, Left,
    Left::{Over, Usable},
    calls::speaks,
    tools::{Child, SPEECH, goodbye, pipe, raw, read, receive, say, sys, wait_for_line},
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "threads-64", subject: threads::<64>, partner: speaks },
    Behaviour { name: "threads-1000", subject: threads::<1000>, partner: speaks },
    Behaviour { name: "fork", subject: children_hold_it, partner: speaks },
    Behaviour { name: "prefork", subject: crate::waits::waits, partner: crate::waits::waits },
    Behaviour { name: "dup", subject: duplicates, partner: speaks },
    Behaviour { name: "scm-in-flight", subject: in_flight, partner: speaks },
    Behaviour { name: "scm-delivered", subject: delivered, partner: speaks },
    Behaviour { name: "clone-files", subject: table_without_memory, partner: speaks },
    Behaviour { name: "clone-vm", subject: memory_without_table, partner: speaks },
    Behaviour { name: "vfork", subject: vforks, partner: speaks },
    Behaviour { name: "vfork-epoll", subject: vforks_beside_epoll_wait, partner: speaks },
    Behaviour { name: "traced", subject: traced, partner: speaks },
    Behaviour { name: "traced-child", subject: child_is_traced, partner: speaks },
    Behaviour { name: "zombie-leader", subject: leader_has_ended, partner: speaks },
    Behaviour { name: "passed-on", subject: passes_it_on, partner: speaks },
];

/// All but one wait in a read of a pipe that nobody writes to.
fn threads<const COUNT: usize>(fd: OwnedFd) -> Result<Left> {
    let (reader, writer) = pipe()?;
    std::thread::scope(|scope| {
        let reader = &reader;
        let threads = (1..COUNT)
            .map(|_| {
                let thread = std::thread::Builder::new().stack_size(64 << 10);
                Ok(thread.spawn_scoped(scope, move || read(reader, &mut [0]))?)
            })
            .collect::<Result<Vec<_>>>()?;
        say("ready");
        receive(&fd, 0, SPEECH)?;
        drop(writer);
        for thread in threads {
            let n = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?.context("a thread")?;
            ensure!(n == 0, "a thread read {n} bytes");
        }
        Ok(())
    })?;
    Ok(Usable(fd))
}

/// One of them reads; the others, and this process, only have it.
fn children_hold_it(fd: OwnedFd) -> Result<Left> {
    let (wait, leash) = pipe()?;
    let leash_number = raw(&leash);
    let mut children = vec![Child::fork(|| receive(&fd, 0, SPEECH))?];
    for _ in 0..3 {
        children.push(Child::fork(|| {
            // SAFETY: this process's copy, which it does not use.
            unsafe { libc::close(leash_number) };
            let n = read(&wait, &mut [0])?;
            ensure!(n == 0, "{n} bytes");
            Ok(())
        })?);
    }
    say("ready");
    children.remove(0).expect_success()?;
    drop(leash);
    children.into_iter().try_for_each(Child::expect_success)?;
    Ok(Usable(fd))
}

/// Children that share the listener; the one that accepts goes on as the partner.
pub fn accept_in_a_child(listener: &TcpListener) -> Result<OwnedFd> {
    const CHILDREN: usize = 4;
    let mut children = Vec::new();
    for _ in 0..CHILDREN {
        // SAFETY: this program has one thread.
        match sys("fork", unsafe { libc::fork() })? {
            0 => return Ok(listener.accept().context("accept")?.0.into()),
            pid => children.push(pid as i32),
        }
    }
    let mut status = 0;
    // SAFETY: room for the status; the children are ours and those that are left wait for nothing that will come.
    unsafe {
        let first = libc::wait(&raw mut status);
        for child in children.into_iter().filter(|child| *child != first) {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, null_mut(), 0);
        }
    }
    std::process::exit(libc::WEXITSTATUS(status))
}

fn descriptor_flags(fd: &OwnedFd) -> Result<usize> {
    // SAFETY: plain integers.
    sys("F_GETFD", unsafe { libc::fcntl(raw(fd), libc::F_GETFD) })
}

fn duplicates(fd: OwnedFd) -> Result<Left> {
    // SAFETY: new descriptors that are ours.
    let copies = unsafe {
        [
            OwnedFd::from_raw_fd(sys("dup", libc::dup(raw(&fd)))? as i32),
            OwnedFd::from_raw_fd(
                sys("F_DUPFD_CLOEXEC", libc::fcntl(raw(&fd), libc::F_DUPFD_CLOEXEC, 700))? as i32
            ),
            OwnedFd::from_raw_fd(sys("F_DUPFD", libc::fcntl(raw(&fd), libc::F_DUPFD, 900))? as i32),
        ]
    };
    let before = copies.each_ref().map(|copy| descriptor_flags(copy).ok());
    ensure!(before == [Some(0), Some(libc::FD_CLOEXEC as usize), Some(0)], "descriptor flags {before:?}");
    say("ready");
    wait_for_line("leave")?;
    let after = copies.each_ref().map(|copy| descriptor_flags(copy).ok());
    ensure!(before == after, "descriptor flags {after:?}, {before:?} expected");
    let part = SPEECH / copies.len();
    for (number, copy) in copies.iter().enumerate() {
        receive(copy, number * part, part)?;
    }
    receive(&fd, part * copies.len(), SPEECH - part * copies.len())?;
    Ok(Usable(fd))
}

fn send_descriptor(through: &UnixStream, fd: &OwnedFd) -> Result<()> {
    let fds = [raw(fd)];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(through.as_raw_fd(), &[IoSlice::new(b"x")], &rights, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive_descriptor(through: &UnixStream) -> Result<OwnedFd> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([i32; 1]);
    let message = recvmsg::<()>(through.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let [fd] = fds[..]
        {
            // SAFETY: just received, and ours.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    bail!("no descriptor came")
}

fn in_flight(fd: OwnedFd) -> Result<Left> {
    let (from, to) = UnixStream::pair()?;
    send_descriptor(&from, &fd)?;
    say("ready");
    wait_for_line("leave")?;
    let arrived = receive_descriptor(&to)?;
    receive(&arrived, 0, SPEECH)?;
    Ok(Usable(fd))
}

/// Only the child has it in the end.
fn delivered(fd: OwnedFd) -> Result<Left> {
    let (from, to) = UnixStream::pair()?;
    let number = raw(&fd);
    let child = Child::fork(|| {
        // SAFETY: the copy that came by fork is not the one to be used.
        unsafe { libc::close(number) };
        let fd = receive_descriptor(&to)?;
        say("ready");
        receive(&fd, 0, SPEECH)?;
        goodbye(&fd, true)
    })?;
    send_descriptor(&from, &fd)?;
    drop(fd);
    child.expect_success()?;
    Ok(Over)
}

/// clone(2) as fork(2), with more flags. Nothing of the parent's memory may be changed by a child that shares it.
fn clone(flags: i32, child: extern "C" fn(*mut libc::c_void) -> i32, argument: i32) -> Result<Child> {
    // Never given back: the child may run on it for as long as it likes.
    let stack = Vec::leak(vec![0u8; 256 << 10]).as_mut_ptr_range().end;
    let argument = argument as usize as *mut libc::c_void;
    // SAFETY: a stack of its own, 16 bytes aligned, and functions that only make system calls.
    let pid = unsafe {
        let stack = stack.wrapping_sub(stack as usize % 16);
        sys("clone", libc::clone(child, stack.cast(), flags | libc::SIGCHLD, argument))?
    };
    Ok(Child(pid as i32))
}

/// Waits until the descriptor has something to read, and ends well if it has.
extern "C" fn read_one(fd: *mut libc::c_void) -> i32 {
    let mut bytes = [0u8; 16];
    // SAFETY: room for the bytes; the process ends at once.
    unsafe {
        let n = libc::read(fd as usize as i32, bytes.as_mut_ptr().cast(), bytes.len());
        libc::_exit(if n > 0 { 0 } else { 1 })
    }
}

/// The child reads the first bytes.
fn table_without_memory(fd: OwnedFd) -> Result<Left> {
    let child = clone(libc::CLONE_FILES, read_one, raw(&fd))?;
    say("ready");
    child.expect_success()?;
    receive(&fd, 16, SPEECH - 16)?;
    Ok(Usable(fd))
}

fn memory_without_table(fd: OwnedFd) -> Result<Left> {
    let (wait, leash) = pipe()?;
    let child = clone(libc::CLONE_VM, read_one, raw(&wait))?;
    say("ready");
    receive(&fd, 0, SPEECH)?;
    crate::tools::write(&leash, b"x")?;
    child.expect_success()?;
    Ok(Usable(fd))
}

/// The parent stands still until the child has ended: the child reads the line that ends the state.
fn vforks(fd: OwnedFd) -> Result<Left> {
    say("ready");
    clone(libc::CLONE_VM | libc::CLONE_VFORK, read_one, 0)?.expect_success()?;
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

/// Another thread waits in a call that a stop ends with EINTR.
fn vforks_beside_epoll_wait(fd: OwnedFd) -> Result<Left> {
    let (wait, leash) = pipe()?;
    let thread = std::thread::spawn(move || crate::readiness::wait_once(&wait));
    let left = vforks(fd)?;
    crate::tools::write(&leash, b"x")?;
    thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    Ok(left)
}

/// A child that traces `pid` until the pipe ends. Its end lets go of the traced process.
fn tracer(pid: i32, wait: &OwnedFd, leash: i32) -> Result<Child> {
    Child::fork(|| {
        // SAFETY: plain integers; this process's copy of the leash is closed.
        unsafe {
            libc::close(leash);
            sys("PTRACE_SEIZE", libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0))?;
        }
        say("ready");
        read(wait, &mut [0]).map(drop)
    })
}

fn traced(fd: OwnedFd) -> Result<Left> {
    let (wait, leash) = pipe()?;
    let child = tracer(std::process::id() as i32, &wait, raw(&leash))?;
    receive(&fd, 0, SPEECH)?;
    drop(leash);
    child.expect_success()?;
    Ok(Usable(fd))
}

/// The parent waits in a call that a stop ends with EINTR.
fn child_is_traced(fd: OwnedFd) -> Result<Left> {
    let (wait, leash) = pipe()?;
    let number = raw(&leash);
    let holder = Child::fork(|| {
        // SAFETY: this process's copy.
        unsafe { libc::close(number) };
        read(&wait, &mut [0]).map(drop)
    })?;
    let tracer = tracer(holder.0, &wait, number)?;
    crate::readiness::wait_once(&fd)?;
    receive(&fd, 0, SPEECH)?;
    drop(leash);
    tracer.expect_success()?;
    holder.expect_success()?;
    Ok(Usable(fd))
}

/// The first thread ends, another one goes on.
fn leader_has_ended(fd: OwnedFd) -> Result<Left> {
    std::thread::spawn(move || {
        let last = || {
            say("ready");
            receive(&fd, 0, SPEECH)?;
            goodbye(&fd, true)
        };
        if let Err(error) = last() {
            eprintln!("error: {error:#}");
            std::process::exit(1);
        }
        std::process::exit(0)
    });
    // SAFETY: ends this thread alone; nothing of it is used any more.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    bail!("a thread outlived its end")
}

/// Where `passed-on` and `received` meet.
fn meeting_place() -> Result<PathBuf> {
    Ok(std::env::var_os("BEHAVIOUR_SOCKET").context("BEHAVIOUR_SOCKET")?.into())
}

/// Another program has it too, which the test has started in another container.
fn passes_it_on(fd: OwnedFd) -> Result<Left> {
    let listener = UnixListener::bind(meeting_place()?)?;
    say("waiting");
    let (other, _) = listener.accept()?;
    send_descriptor(&other, &fd)?;
    read(&OwnedFd::from(other), &mut [0])?;
    say("ready");
    receive(&fd, 0, SPEECH)?;
    Ok(Usable(fd))
}

/// The other program.
pub fn has_what_was_passed_on() -> Result<()> {
    let mut place = UnixStream::connect(meeting_place()?)?;
    let fd = receive_descriptor(&place)?;
    std::io::Write::write_all(&mut place, b"x")?;
    say("ready");
    wait_for_line("leave")?;
    drop(fd);
    say("ok");
    Ok(())
}
