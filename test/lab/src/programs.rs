// SPDX-License-Identifier: Apache-2.0
//! Servers that people run, as `./init.sh programs` installs them: the command lines that start them anywhere.

use std::{
    net::IpAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{DEADLINE, Lab, Place, Process, wait_for};

/// Words with no spaces in them.
pub fn command(words: &str) -> Command {
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("true"));
    command.args(words);
    command
}

/// A program of ours, in a language that is not Rust.
pub fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../programs").join(name)
}

/// Builds a program of ours with a compiler's command line, and returns where it is.
pub fn compile(lab: &Lab, compiler: &str, name: &str) -> Result<PathBuf> {
    let program = lab.directory().join(name);
    let source = source(&format!("{name}.c"));
    let words = format!("{compiler} -O2 -Wall -o {} {}", program.display(), source.display());
    lab.h1.place().run(&mut command(&words))?;
    Ok(program)
}

/// A directory of this name that every user can read, in the lab's.
pub fn directory(lab: &Lab, name: &str) -> Result<PathBuf> {
    let directory = lab.directory().join(name);
    std::fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
    for path in [lab.directory(), &directory] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(directory)
}

pub const REDIS_PORT: u16 = 6379;

/// redis, which keeps nothing on disk.
pub fn redis(address: IpAddr) -> String {
    format!(
        "redis-server --port {REDIS_PORT} --bind {address} --protected-mode no --save \"\" --maxclients 20000"
    )
}

/// Clients that redis has, without the one that asks.
pub fn redis_clients(place: &Place, address: IpAddr) -> Result<usize> {
    let said = place.run(&mut command(&format!("redis-cli -h {address} info clients")))?;
    let count = said.lines().find_map(|line| line.strip_prefix("connected_clients:"));
    let count: usize = count.with_context(|| format!("redis said {said}"))?.trim().parse()?;
    Ok(count - 1)
}

/// So many clients of redis that say nothing, connected.
pub fn silent_redis_clients(place: &Place, address: IpAddr, count: usize) -> Result<Process> {
    // Else the ports of those before them would be missing for a minute.
    place.run_script(&["sh", "-e"], "echo 1 >/proc/sys/net/ipv4/tcp_tw_reuse\n")?;
    let clients = place
        .spawn("silent-clients", &mut command(&format!("redis-benchmark -h {address} -I -c {count}")))?;
    wait_for("redis-benchmark's connections", DEADLINE, || {
        Ok((redis_clients(place, address)? >= count).then_some(()))
    })?;
    Ok(clients)
}

pub const MEMCACHED_PORT: u16 = 11211;

pub fn memcached(address: IpAddr) -> String {
    format!("memcached -u nobody -m 2048 -c 4096 -p {MEMCACHED_PORT} -l {address} -t 4")
}

pub const NGINX_PORT: u16 = 8080;

/// nginx, which serves a directory and keeps connections open as long as the client wants. `listen`: what follows the
/// address in that directive, and further ones.
pub fn nginx(place: &Place, address: IpAddr, root: &Path, listen: &str) -> Result<String> {
    let own = &place.directory;
    let configuration = own.join("nginx.conf");
    let text = format!(
        "daemon off; worker_processes 2; error_log stderr; pid {}; events {{ worker_connections 4096; }} \
         http {{ access_log off; keepalive_requests 1000000000; keepalive_time 1d; \
         server {{ listen {address}:{NGINX_PORT} {listen}; root {}; }} }}",
        own.join("nginx.pid").display(),
        root.display()
    );
    std::fs::write(&configuration, text)?;
    Ok(format!("nginx -c {}", configuration.display()))
}

pub const POSTGRES_PORT: u16 = 5432;

const AS_POSTGRES: &str = "setpriv --reuid postgres --regid postgres --clear-groups";

/// An empty data directory of PostgreSQL, open to everyone.
pub fn postgres_data(lab: &Lab) -> Result<PathBuf> {
    let around = directory(lab, "postgres")?;
    let data = around.join("data");
    let place = lab.h1.place();
    place.run(Command::new("chown").arg("postgres").arg(&around))?;
    let initdb = postgres_program("initdb")?;
    place.run(&mut command(&format!("{AS_POSTGRES} {initdb} -A trust -U postgres {}", data.display())))?;
    std::fs::write(data.join("pg_hba.conf"), "local all all trust\nhost all all 0.0.0.0/0 trust\n")?;
    Ok(data)
}

pub fn postgres(data: &Path, address: IpAddr) -> Result<String> {
    Ok(format!(
        "{AS_POSTGRES} {} -D {data} -h {address} -c unix_socket_directories={data} -c fsync=off",
        postgres_program("postgres")?,
        data = data.display()
    ))
}

/// Debian keeps PostgreSQL's programs in a directory of their version.
pub fn postgres_program(name: &str) -> Result<String> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let newest = versions.flatten().map(|entry| entry.path().join("bin")).max();
    Ok(newest.context("PostgreSQL is not installed")?.join(name).display().to_string())
}

/// The first port on which ranks of OpenMPI accept connections for messages.
pub const MPI_PORT: u16 = 10_000;

/// The beginning of a command that runs an MPI program at two places, with as many ranks at each. mpirun starts those of
/// the second by a script in the place of ssh.
pub fn mpirun((here, from): (&Place, IpAddr), (there, to): (&Place, IpAddr), ranks: u32) -> Result<String> {
    let agent = here.directory.join("agent");
    // Called with the address and the command of the other daemon, as ssh would be.
    let script = format!(
        "#!/bin/sh -e\nshift\necho 0 >{}/cgroup.procs\nexport TMPDIR={}\nexec {} sh -c \"$*\"\n",
        there.cgroup.path().display(),
        there.directory.display(),
        there.line_to_enter()
    );
    std::fs::write(&agent, script)?;
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755))?;
    Ok(format!(
        "env TMPDIR={} mpirun --allow-run-as-root --bind-to none -np {} -H {from}:{ranks},{to}:{ranks} \
         --mca plm_rsh_agent {} --mca btl tcp,self --mca btl_tcp_if_include eth0 \
         --mca btl_tcp_port_min_v4 {MPI_PORT} --mca oob_tcp_if_include eth0 --mca mpi_yield_when_idle 1",
        here.directory.display(),
        2 * ranks,
        agent.display()
    ))
}
