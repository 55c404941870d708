// SPDX-License-Identifier: Apache-2.0
//! Calls that have nothing to do with the socket, in a process that has it.

use std::{
    mem::zeroed,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::{null, null_mut},
    sync::atomic::{AtomicU32, Ordering},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};

use crate::{
    Behaviour, Left,
    Left::Usable,
    tools::{expect_lasted, pattern, pipe, raw, receive, say, sys, wait_for_line, write},
    waits::{TIME, set_timeout, timespec, waits},
};

pub const ALL: &[Behaviour] = &[
    Behaviour { name: "nanosleep", subject: |fd| sleeps(fd, nanosleep), partner: waits },
    Behaviour { name: "clock-nanosleep", subject: |fd| sleeps(fd, clock_nanosleep), partner: waits },
    Behaviour { name: "futex-time", subject: |fd| sleeps(fd, futex), partner: waits },
    Behaviour { name: "sigtimedwait", subject: |fd| sleeps(fd, sigtimedwait), partner: waits },
    Behaviour { name: "semtimedop", subject: |fd| sleeps(fd, semtimedop), partner: waits },
    Behaviour { name: "accept", subject: accepts, partner: waits },
    Behaviour { name: "connect", subject: |fd| connects(fd, None), partner: waits },
    Behaviour { name: "connect-time", subject: |fd| connects(fd, Some(20)), partner: waits },
    Behaviour { name: "waitpid", subject: waits_for_a_child, partner: waits },
    Behaviour { name: "flock", subject: waits_for_a_lock, partner: waits },
    Behaviour { name: "sigwait", subject: waits_for_a_signal, partner: waits },
    Behaviour { name: "pause", subject: pauses, partner: waits },
    Behaviour { name: "semop", subject: waits_for_a_semaphore, partner: waits },
    Behaviour { name: "msgrcv", subject: waits_for_a_message, partner: waits },
    Behaviour { name: "futex", subject: waits_on_a_futex, partner: waits },
    Behaviour { name: "pipe-write", subject: writes_to_a_pipe, partner: waits },
    Behaviour { name: "inotify", subject: waits_for_a_file, partner: waits },
];

/// A call that sleeps for a time and says whether it ended as it should.
fn sleeps(fd: OwnedFd, sleep: fn(Duration) -> Result<()>) -> Result<Left> {
    say("ready");
    let started = Instant::now();
    sleep(TIME)?;
    expect_lasted(started, TIME)?;
    say("over");
    Ok(Usable(fd))
}

fn nanosleep(time: Duration) -> Result<()> {
    let time = timespec(time);
    // SAFETY: a valid time; what is left is not asked for.
    sys("nanosleep", unsafe { libc::nanosleep(&raw const time, null_mut()) }).map(drop)
}

fn clock_nanosleep(time: Duration) -> Result<()> {
    // SAFETY: clock_gettime fills the time in, clock_nanosleep reads it.
    let error = unsafe {
        let mut at: libc::timespec = zeroed();
        libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut at);
        at.tv_sec += time.as_secs() as i64;
        libc::clock_nanosleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, &raw const at, null_mut())
    };
    ensure!(error == 0, "clock_nanosleep: {error}");
    Ok(())
}

/// The call must fail with this error: its time is over.
fn expect_error(what: &str, result: i64, error: i32) -> Result<()> {
    let last = std::io::Error::last_os_error();
    ensure!(result == -1 && last.raw_os_error() == Some(error), "{what}: {result}, {last}");
    Ok(())
}

fn futex(time: Duration) -> Result<()> {
    let (word, time) = (AtomicU32::new(0), timespec(time));
    // SAFETY: word and time live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, &raw const time) };
    expect_error("futex", result, libc::ETIMEDOUT)
}

/// SIGUSR1 alone, blocked.
fn signals() -> libc::sigset_t {
    // SAFETY: the set is initialised by sigemptyset.
    unsafe {
        let mut set = zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGUSR1);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, null_mut());
        set
    }
}

fn sigtimedwait(time: Duration) -> Result<()> {
    let (set, time) = (signals(), timespec(time));
    // SAFETY: set and time live through the call.
    let result = unsafe { libc::sigtimedwait(&raw const set, null_mut(), &raw const time) };
    expect_error("sigtimedwait", result.into(), libc::EAGAIN)
}

/// A semaphore of this program, at zero; gone when it is dropped.
struct Semaphore(i32);

impl Semaphore {
    fn new() -> Result<Semaphore> {
        // SAFETY: plain integers.
        Ok(Semaphore(sys("semget", unsafe { libc::semget(libc::IPC_PRIVATE, 1, 0o600) })? as i32))
    }

    /// Waits until it can be taken; a null time is for ever. The system calls themselves: glibc has one for both.
    fn take(&self, time: Option<Duration>) -> i64 {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: -1, sem_flg: 0 };
        // SAFETY: one operation, a time.
        unsafe {
            match time.map(timespec) {
                None => libc::syscall(libc::SYS_semop, self.0, &raw mut operation, 1),
                Some(time) => {
                    libc::syscall(libc::SYS_semtimedop, self.0, &raw mut operation, 1, &raw const time)
                }
            }
        }
    }
}

impl Drop for Semaphore {
    fn drop(&mut self) {
        // SAFETY: plain integers.
        unsafe { libc::semctl(self.0, 0, libc::IPC_RMID) };
    }
}

fn semtimedop(time: Duration) -> Result<()> {
    expect_error("semtimedop", Semaphore::new()?.take(Some(time)), libc::EAGAIN)
}

/// Runs on another thread when the state is to end.
fn when_left(what: impl FnOnce() -> Result<()> + Send + 'static) -> JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        wait_for_line("leave")?;
        what()
    })
}

fn joined(thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

fn accepts(fd: OwnedFd) -> Result<Left> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let thread = when_left(move || {
        TcpStream::connect(address)?;
        Ok(())
    });
    say("ready");
    // SAFETY: the peer's address is not asked for.
    let accepted = sys("accept", unsafe { libc::accept(listener.as_raw_fd(), null_mut(), null_mut()) })?;
    // SAFETY: just made, and ours.
    drop(unsafe { OwnedFd::from_raw_fd(accepted as i32) });
    joined(thread)?;
    Ok(Usable(fd))
}

/// To a listener whose queue is full: the kernel goes on trying until there is room.
fn connects(fd: OwnedFd, timeout: Option<u64>) -> Result<Left> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // SAFETY: plain integers; the queue becomes one connection long.
    sys("listen", unsafe { libc::listen(listener.as_raw_fd(), 0) })?;
    let address = listener.local_addr()?;
    let _in_the_queue = TcpStream::connect(address)?;
    // SAFETY: a new socket that is ours.
    let socket = unsafe { OwnedFd::from_raw_fd(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)) };
    if let Some(seconds) = timeout {
        set_timeout(&socket, libc::SO_SNDTIMEO, Duration::from_secs(seconds))?;
    }
    let there = libc::sockaddr_in {
        sin_family: libc::AF_INET as u16,
        sin_port: address.port().to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(Ipv4Addr::LOCALHOST).to_be() },
        sin_zero: [0; 8],
    };
    let thread = when_left(move || {
        let first = listener.accept()?;
        let second = listener.accept()?;
        drop((first, second));
        Ok(())
    });
    say("ready");
    let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // SAFETY: the address and its size.
    sys("connect", unsafe { libc::connect(raw(&socket), (&raw const there).cast(), length) })?;
    joined(thread)?;
    Ok(Usable(fd))
}

fn waits_for_a_child(fd: OwnedFd) -> Result<Left> {
    let mut child = std::process::Command::new("sleep").arg("1000").spawn()?;
    let pid = child.id() as i32;
    // SAFETY: the child is not waited for before.
    let thread = when_left(move || sys("kill", unsafe { libc::kill(pid, libc::SIGKILL) }).map(drop));
    say("ready");
    let mut status = 0;
    // SAFETY: room for the status.
    let waited = sys("waitpid", unsafe { libc::waitpid(pid, &raw mut status, 0) })?;
    joined(thread)?;
    ensure!(waited as i32 == pid && libc::WIFSIGNALED(status), "waitpid: {waited}, status {status}");
    // It is gone: this only forgets it.
    let _ = child.try_wait();
    Ok(Usable(fd))
}

fn waits_for_a_lock(fd: OwnedFd) -> Result<Left> {
    let path = std::env::temp_dir().join(format!("behaviour-{}", std::process::id()));
    let (held, wanted) = (std::fs::File::create(&path)?, std::fs::File::create(&path)?);
    std::fs::remove_file(&path)?;
    // SAFETY: plain integers.
    sys("flock", unsafe { libc::flock(held.as_raw_fd(), libc::LOCK_EX) })?;
    let thread = when_left(move || {
        drop(held);
        Ok(())
    });
    say("ready");
    // SAFETY: plain integers.
    sys("flock", unsafe { libc::flock(wanted.as_raw_fd(), libc::LOCK_EX) })?;
    joined(thread)?;
    Ok(Usable(fd))
}

fn waits_for_a_signal(fd: OwnedFd) -> Result<Left> {
    let set = signals();
    // SAFETY: a signal to this process, which has blocked it.
    let thread = when_left(|| sys("kill", unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) }).map(drop));
    say("ready");
    let mut signal = 0;
    // SAFETY: set and signal live through the call.
    let error = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
    joined(thread)?;
    ensure!(error == 0 && signal == libc::SIGUSR1, "sigwait: {error}, signal {signal}");
    Ok(Usable(fd))
}

static HANDLED: AtomicU32 = AtomicU32::new(0);

extern "C" fn count(_signal: i32) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

fn pauses(fd: OwnedFd) -> Result<Left> {
    // SAFETY: the handler only counts; a signal to the thread that pauses.
    let thread = unsafe {
        libc::signal(libc::SIGUSR1, count as *const () as libc::sighandler_t);
        let this = libc::pthread_self();
        when_left(move || {
            libc::pthread_kill(this, libc::SIGUSR1);
            Ok(())
        })
    };
    say("ready");
    // SAFETY: takes nothing.
    expect_error("pause", i64::from(unsafe { libc::pause() }), libc::EINTR)?;
    joined(thread)?;
    let handled = HANDLED.load(Ordering::Relaxed);
    ensure!(handled == 1, "{handled} signals were handled");
    Ok(Usable(fd))
}

fn waits_for_a_semaphore(fd: OwnedFd) -> Result<Left> {
    let semaphore = Semaphore::new()?;
    let id = semaphore.0;
    let thread = when_left(move || {
        let mut operation = libc::sembuf { sem_num: 0, sem_op: 1, sem_flg: 0 };
        // SAFETY: one operation.
        sys("semop", unsafe { libc::semop(id, &raw mut operation, 1) }).map(drop)
    });
    say("ready");
    sys("semop", semaphore.take(None))?;
    joined(thread)?;
    Ok(Usable(fd))
}

fn waits_for_a_message(fd: OwnedFd) -> Result<Left> {
    // SAFETY: plain integers.
    let queue = sys("msgget", unsafe { libc::msgget(libc::IPC_PRIVATE, 0o600) })? as i32;
    let thread = when_left(move || {
        let message = [1i64, 42];
        // SAFETY: a type and eight bytes.
        sys("msgsnd", unsafe { libc::msgsnd(queue, message.as_ptr().cast(), 8, 0) }).map(drop)
    });
    say("ready");
    let mut message = [0i64; 2];
    // SAFETY: room for a type and eight bytes; the queue is removed afterwards.
    let received = unsafe {
        let received = libc::msgrcv(queue, message.as_mut_ptr().cast(), 8, 0, 0);
        let received = sys("msgrcv", received as i64);
        libc::msgctl(queue, libc::IPC_RMID, null_mut());
        received
    }?;
    joined(thread)?;
    ensure!(received == 8 && message == [1, 42], "{received} bytes, {message:?}");
    Ok(Usable(fd))
}

fn waits_on_a_futex(fd: OwnedFd) -> Result<Left> {
    static WORD: AtomicU32 = AtomicU32::new(0);
    let thread = when_left(|| {
        WORD.store(1, Ordering::Relaxed);
        // SAFETY: only compares the address.
        let woken = unsafe { libc::syscall(libc::SYS_futex, WORD.as_ptr(), libc::FUTEX_WAKE, 1) };
        ensure!(woken == 1, "{woken} threads were waiting");
        Ok(())
    });
    say("ready");
    // SAFETY: a static word and no time.
    let woken = unsafe {
        libc::syscall(libc::SYS_futex, WORD.as_ptr(), libc::FUTEX_WAIT, 0, null::<libc::timespec>())
    };
    sys("futex", woken)?;
    joined(thread)?;
    Ok(Usable(fd))
}

/// More than a pipe holds, in one call.
fn writes_to_a_pipe(fd: OwnedFd) -> Result<Left> {
    const LENGTH: usize = 1 << 20;
    let (reader, writer) = pipe()?;
    let thread = when_left(move || receive(&reader, 0, LENGTH));
    say("ready");
    write(&writer, &pattern(0, LENGTH))?;
    joined(thread)?;
    Ok(Usable(fd))
}

fn waits_for_a_file(fd: OwnedFd) -> Result<Left> {
    let directory = std::env::temp_dir().join(format!("behaviour-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let path = std::ffi::CString::new(directory.to_string_lossy().as_bytes())?;
    // SAFETY: a new descriptor that is ours; the path lives through the call.
    let inotify = unsafe {
        let inotify = OwnedFd::from_raw_fd(sys("inotify_init", libc::inotify_init())? as i32);
        let watch = libc::inotify_add_watch(raw(&inotify), path.as_ptr(), libc::IN_CREATE);
        sys("inotify_add_watch", watch)?;
        inotify
    };
    let file = directory.join("file");
    let thread = when_left(move || {
        std::fs::File::create(file)?;
        Ok(())
    });
    say("ready");
    let n = crate::tools::read(&inotify, &mut [0; 4096]);
    let _ = std::fs::remove_dir_all(&directory);
    ensure!(n? > 0, "inotify gave nothing");
    joined(thread)?;
    Ok(Usable(fd))
}
