// SPDX-License-Identifier: Apache-2.0
//! The forwarder: stops processes, takes sockets out of them, puts sockets into them, and keeps what was taken out.
//!
//! It acts on what one router tells it over a unix socket, faces no network, and outlives the router.

mod alarm;
mod arch;
mod child;
mod exchange;
mod fault;
mod foothold;
mod freeze;
mod heap;
mod holders;
mod inject;
mod inspect;
mod mover;
mod options;
mod process;
mod queue;
mod receive;
mod room;
mod rseq;
mod server;
mod session;
mod site;
mod table;
mod transaction;
mod turns;

pub use heap::Heap;
pub use session::is_letter;

use std::{
    io::Write,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::{
    signal::{SigSet, Signal},
    stat::{Mode, umask},
};

use privileges::Need;

/// Stops processes, takes sockets out of them and puts sockets into them, as a router tells it.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Unix socket to listen on for the router; made with mode 0600.
    #[arg(
        long,
        env = "FORWARDER_SOCKET",
        default_value = "/run/ebpf-router/forwarder.sock",
        value_name = "PATH"
    )]
    socket: PathBuf,

    /// How much to log: ERROR, WARNING, INFO or DEBUG.
    #[arg(long = "loglevel", env = "FORWARDER_LOGLEVEL", default_value = "INFO", value_name = "LEVEL", value_parser = log_level)]
    log_level: log::LevelFilter,

    /// How lines of the log look: text, or json (one object a line).
    #[arg(long, env = "FORWARDER_LOG_FORMAT", default_value = "text", value_name = "text|json")]
    log_format: logging::Format,
}

fn log_level(text: &str) -> Result<log::LevelFilter, String> {
    match text {
        "ERROR" => Ok(log::LevelFilter::Error),
        "WARNING" => Ok(log::LevelFilter::Warn),
        "INFO" => Ok(log::LevelFilter::Info),
        "DEBUG" => Ok(log::LevelFilter::Debug),
        _ => Err("expected ERROR, WARNING, INFO or DEBUG".into()),
    }
}

/// The program, from its command line to its end.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not to panic where nobody takes it, as on a full disk.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Memory that is kept between moves: it holds what most of them carry, several times.
const CARRIED_BYTES: usize = 16 << 20;

fn run(arguments: &Arguments) -> Result<()> {
    let kept = memory::keep(CARRIED_BYTES);
    probe()?;
    // Before the first thread, so that all inherit it: a stop must not come while a process is frozen.
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.add(Signal::SIGINT);
    stop.thread_block().context("signals cannot be blocked")?;
    privileges::keep_only(&privileges::FORWARDER)?;
    let _log = logging::start(arguments.log_level, arguments.log_format, &[]);
    if let Err(error) = kept {
        log::warn!("{error}");
    }
    room::raise_limit().context("raising RLIMIT_NOFILE")?;
    let programs = inspect::Programs::load()?;
    let site = site::Site::new(programs).context("no epoll set")?;
    site.end_repairs()?;
    let listener = listen(&arguments.socket)?;
    outlive_others();
    log::info!("listening on {}", arguments.socket.display());
    let (serving, current) = (Arc::clone(&site), server::Current::default());
    let served = Arc::clone(&current);
    std::thread::Builder::new().name("serve".into()).spawn(move || {
        let error = server::serve(&serving, &served, &listener);
        log::error!("no router can be served any more: {error:?}");
        logging::flush();
        std::process::exit(1);
    })?;
    let signal = stop.wait().context("waiting for signals")?;
    // Whoever stops a pod or a host stops both at once.
    server::wait_for_router(&site, &current);
    let parked = site.close();
    log::info!("{signal}: stopping; {parked} swapped connections have no way back any more");
    std::fs::remove_file(&arguments.socket)
        .with_context(|| format!("removing {}", arguments.socket.display()))
}

const BTF: &str = "/sys/kernel/btf/vmlinux";

/// What this host and our privileges must offer.
fn probe() -> Result<()> {
    if !Path::new(BTF).exists() {
        bail!("{BTF} does not exist: run a kernel built with CONFIG_DEBUG_INFO_BTF=y");
    }
    if foothold::room().is_none() {
        bail!(
            "this kernel's vDSO leaves less than {} bytes free at its end: nothing can be injected",
            arch::foothold_len()
        );
    }
    if let Some(Need { capability, reason, .. }) = privileges::missing(&privileges::FORWARDER).first() {
        bail!(
            "{capability} is missing, which is needed {reason}: run the forwarder as root, or with this capability added"
        );
    }
    Ok(())
}

/// The kernel, out of memory, shall kill somebody else: this process may be in the middle of a move, and has the way
/// back of every swapped connection. See oom_score_adj in proc_pid_oom_score_adj(5).
fn outlive_others() {
    const NEVER: &str = "-1000";
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", NEVER) {
        log::warn!(
            "out of memory, the kernel may kill this process (oom_score_adj cannot be set: {error}); CAP_SYS_RESOURCE is needed"
        );
    }
}

/// How long a child of a forwarder that was killed may go on, see [`child`].
const LEFTOVERS: Duration = Duration::from_secs(2);

/// Take the socket's place; refuse while another forwarder answers there.
fn listen(path: &Path) -> Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)
            .with_context(|| format!("making the directory {}", directory.display()))?;
    }
    // One that was killed in the middle of a move leaves a child for some milliseconds, which has its descriptors.
    let patience = Instant::now() + LEFTOVERS;
    while UnixStream::connect(path).is_ok() {
        if Instant::now() >= patience {
            bail!("another forwarder listens on {}: stop it, or give another --socket", path.display());
        }
        std::thread::sleep(LEFTOVERS / 100);
    }
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => {
            return Err(error).with_context(|| format!("removing the old socket {}", path.display()));
        }
    }
    // From its first moment: for its own user, whatever the caller's umask is.
    let before = umask(Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    umask(before);
    listener.with_context(|| format!("listening on {}", path.display()))
}
