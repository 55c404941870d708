// SPDX-License-Identifier: Apache-2.0
//! Programs in the lab: started in a host's or pod's namespaces and cgroup, their output in files.
//!
//! No PR_SET_PDEATHSIG: it fires when the thread that started the program ends. The lab's keeper does its work.

use std::{
    fs::File,
    io::Write,
    os::{
        fd::AsFd,
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sched::setns,
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{Cgroup, DEADLINE, Namespace, wait_for};

/// Where a program runs.
#[derive(Clone)]
pub struct Place {
    pub network: Arc<Namespace>,
    pub mounts: Option<Arc<Namespace>>,
    pub cgroup: Cgroup,
    /// Where the output of its programs goes.
    pub directory: PathBuf,
}

impl Place {
    /// The command line with which a person gets in.
    pub fn line_to_enter(&self) -> String {
        let mounts =
            self.mounts.as_ref().map(|mounts| format!(" --mount={}", mounts.path())).unwrap_or_default();
        format!("nsenter --net={}{mounts}", self.network.path())
    }

    /// Makes `command` run here. Between fork and exec it moves into the cgroup, then into the namespaces.
    pub fn put(&self, command: &mut Command) -> Result<()> {
        let entrance = self.cgroup.entrance()?;
        let mut namespaces = Vec::new();
        for namespace in [self.mounts.as_ref(), Some(&self.network)].into_iter().flatten() {
            namespaces.push((namespace.as_fd().try_clone_to_owned()?, namespace.kind()));
        }
        let enter = move || {
            (&entrance).write_all(b"0")?;
            for (fd, kind) in &namespaces {
                setns(fd, *kind)?;
            }
            Ok(())
        };
        // SAFETY: the closure only makes system calls (write, setns) and allocates nothing.
        unsafe { command.pre_exec(enter) };
        Ok(())
    }

    /// Runs a command to its end, which must come soon and be a success, and returns what it printed.
    pub fn run(&self, command: &mut Command) -> Result<String> {
        let words = words(command);
        self.put(command)?;
        let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {words}"))?;
        ensure!(
            output.status.success(),
            "{words}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Feeds `script` to a program that reads commands, such as `sh` or `ip -batch -`.
    pub fn run_script(&self, program: &[&str], script: &str) -> Result<()> {
        let mut command = Command::new(program[0]);
        command.args(&program[1..]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        self.put(&mut command)?;
        let mut child = command.spawn().with_context(|| format!("starting {}", program[0]))?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(script.as_bytes()).with_context(|| format!("feeding {}", program[0]))?;
        }
        let output = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}\n{said}{script}", program.join(" "), output.status);
        Ok(())
    }

    /// Starts a server and waits until something listens on its port. A program started first can then connect.
    pub fn serve(&self, name: &str, command: &mut Command, port: u16) -> Result<Process> {
        let mut server = self.spawn(name, command)?;
        wait_for(&format!("{name} to listen on port {port}"), DEADLINE, || {
            server.fail_if_ended()?;
            let state = |version: &str| {
                std::fs::read_to_string(format!("/proc/{}/net/{version}", server.pid())).unwrap_or_default()
            };
            // Local address and port in hexadecimal, then the remote one, then the state: 0A is LISTEN.
            let wanted = format!(":{port:04X}");
            let listens = |line: &str| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                fields.get(1).is_some_and(|local| local.ends_with(&wanted)) && fields.get(3) == Some(&"0A")
            };
            Ok((state("tcp").lines().any(listens) || state("tcp6").lines().any(listens)).then_some(()))
        })?;
        Ok(server)
    }

    /// Starts a program. Its output is in `NAME.out` and `NAME.err`; standard input is a pipe that stays open.
    pub fn spawn(&self, name: &str, command: &mut Command) -> Result<Process> {
        let words = words(command);
        let file = |suffix: &str| {
            let path = self.directory.join(format!("{name}.{suffix}"));
            let file = File::create(&path).with_context(|| format!("making {}", path.display()))?;
            anyhow::Ok((path, file))
        };
        let (stdout, out) = file("out")?;
        let (stderr, err) = file("err")?;
        self.put(command)?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(out)
            .stderr(err)
            .spawn()
            .with_context(|| format!("starting {words}"))?;
        Ok(Process { name: name.to_owned(), words, child, stdout, stderr })
    }
}

fn words(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    std::iter::once(program).chain(arguments).collect::<Vec<_>>().join(" ")
}

/// A running program. Dropping it kills it.
pub struct Process {
    pub name: String,
    words: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// How a program ended and what it printed.
#[derive(Debug)]
pub struct Finished {
    pub words: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// An error with all that is known, unless the program succeeded.
    pub fn expect_success(self) -> Result<Finished> {
        if !self.success() {
            bail!("{}: {}\n{}{}", self.words, self.status, self.stdout, self.stderr);
        }
        Ok(self)
    }

    pub fn killed_by(&self) -> Option<Signal> {
        self.status.signal().and_then(|signal| Signal::try_from(signal).ok())
    }

    /// The last line of its output.
    pub fn last_json(&self) -> Result<serde_json::Value> {
        let line = self.stdout.lines().last().with_context(|| format!("{} printed nothing", self.words))?;
        serde_json::from_str(line).with_context(|| format!("{} printed {line}", self.words))
    }
}

impl Process {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn stdout(&self) -> String {
        std::fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Ended already?
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// A line to its standard input.
    pub fn tell(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its standard input is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("telling {} to {line}", self.name))
    }

    /// Tells it that its input is over.
    pub fn close_stdin(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits until it has printed a line with these words; fails when it ends before.
    pub fn wait_until_it_says(&mut self, text: &str, limit: Duration) -> Result<()> {
        let what = format!("\"{text}\" from {}", self.words);
        wait_for(&what, limit, || {
            if self.stdout().contains(text) || self.stderr().contains(text) {
                return Ok(Some(()));
            }
            self.fail_if_ended()?;
            Ok(None)
        })
    }

    /// An error with all that it printed, if the program is not running any more.
    pub fn fail_if_ended(&mut self) -> Result<()> {
        if let Some(status) = self.ended()? {
            bail!("{} ended: {status}\n{}{}", self.words, self.stdout(), self.stderr());
        }
        Ok(())
    }

    /// Waits for its end.
    pub fn wait(mut self, limit: Duration) -> Result<Finished> {
        let what = format!("the end of {}", self.words);
        let status = wait_for(&what, limit, || self.ended())
            .with_context(|| format!("{}{}", self.stdout(), self.stderr()))?;
        Ok(Finished { words: self.words.clone(), status, stdout: self.stdout(), stderr: self.stderr() })
    }

    /// SIGKILL, and its end.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub fn show(&self) {
        eprintln!("--- {} ({})\n{}{}", self.name, self.words, self.stdout(), self.stderr());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
