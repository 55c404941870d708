// SPDX-License-Identifier: Apache-2.0
//! Programs that people run, untouched, under their own load, while their connections are swapped and swapped back all
//! the time.

use std::{os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use lab::{DEADLINE, Family, Finished, Process, Scene};

/// At least so many moves, each way counted, while a load runs.
const MOVES: u32 = 100;

fn command(words: &str) -> Command {
    let mut words = words.split_whitespace();
    let mut command = Command::new(words.next().unwrap_or("true"));
    command.args(words);
    command
}

/// A program in the server's pod that accepts on this port.
fn server(scene: &Scene, port: u16, words: &str) -> Result<Process> {
    scene.server.serve(&format!("server-{port}"), &mut command(words), port)
}

/// A load in the client's pod, and its end; meanwhile its connections move to and fro.
fn load(scene: &Scene, port: u16, words: &str) -> Result<Finished> {
    let mut running = scene.client.spawn("load", &mut command(words))?;
    let moves = scene.move_about(port, || Ok(running.ended()?.is_some()))?;
    let finished = running.wait(DEADLINE)?.expect_success()?;
    ensure!(moves >= MOVES, "only {moves} moves while {words}");
    Ok(finished)
}

fn run(scene: &Scene, words: &str) -> Result<String> {
    Ok(scene.client.exec("run", &mut command(words), DEADLINE)?.expect_success()?.stdout)
}

#[test]
fn redis_answers_every_request() -> Result<()> {
    let scene = Scene::with_routers("redis")?;
    let ip = scene.server.v4;
    let _redis = server(
        &scene,
        6379,
        &format!("redis-server --port 6379 --bind {ip} --protected-mode no --save {{}}")
            .replace("{}", "\"\""),
    )?;
    let load = load(&scene, 6379, &format!("redis-benchmark -h {ip} -t set,incr,lpush -n 400000 -c 20 -q"))?;
    ensure!(!load.stdout.to_lowercase().contains("error"), "{}", load.stdout);
    // redis-benchmark increments one counter, once for each request.
    let counted = run(&scene, &format!("redis-cli -h {ip} get counter:__rand_int__"))?;
    ensure!(counted.trim() == "400000", "{counted}");
    Ok(())
}

#[test]
fn a_redis_replica_catches_up_and_is_equal() -> Result<()> {
    let scene = Scene::with_routers("replica")?;
    let ip = scene.server.v4;
    let _redis = server(
        &scene,
        6379,
        &format!("redis-server --port 6379 --bind {ip} --protected-mode no --save \"\""),
    )?;
    let here = scene.client.v4;
    let replica = format!(
        "redis-server --port 6380 --bind {here} --protected-mode no --save \"\" --replicaof {ip} 6379"
    );
    let _replica = scene.client.serve("replica", &mut command(&replica), 6380)?;
    load(&scene, 6379, &format!("redis-benchmark -h {ip} -t set -r 100000 -d 200 -n 400000 -c 8 -q"))?;
    let digest = |ip| {
        run(&scene, &format!("redis-cli -h {ip} -p {} debug digest", if ip == here { 6380 } else { 6379 }))
    };
    lab::wait_for("the replica to be equal", DEADLINE, || Ok((digest(here)? == digest(ip)?).then_some(())))
}

#[test]
fn memcached_keeps_what_it_was_given() -> Result<()> {
    let scene = Scene::with_routers("memcached")?;
    let ip = scene.server.v4;
    let _memcached = server(&scene, 11211, &format!("memcached -u nobody -p 11211 -l {ip} -t 4"))?;
    for _ in 0..2 {
        let load = load(
            &scene,
            11211,
            &format!("memcslap --servers={ip} --concurrency=8 --execute-number=50000 --initial-load=1000"),
        )?;
        ensure!(!load.stderr.contains("rror"), "{}", load.stderr);
    }
    Ok(())
}

#[test]
fn postgres_keeps_its_books_balanced() -> Result<()> {
    let scene = Scene::with_routers("postgres")?;
    let ip = scene.server.v4;
    let directory = scene.server.place().directory.join("postgres");
    std::fs::create_dir(&directory)?;
    let data = directory.join("data");
    scene.server.place().run(Command::new("chown").arg("postgres").arg(&directory))?;
    let programs = postgres_programs()?;
    let postgres = format!("setpriv --reuid postgres --regid postgres --clear-groups {}", programs.display());
    let data = data.display();
    scene.server.place().run(&mut command(&format!("{postgres}/initdb -A trust -U postgres {data}")))?;
    std::fs::write(format!("{data}/pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")?;
    let _postgres = server(
        &scene,
        5432,
        &format!("{postgres}/postgres -D {data} -h {ip} -c unix_socket_directories={data} -c fsync=off"),
    )?;
    run(&scene, &format!("{}/pgbench -h {ip} -U postgres -i -s 2 -q postgres", programs.display()))?;
    load(
        &scene,
        5432,
        &format!("{}/pgbench -h {ip} -U postgres -c 8 -j 2 -T 15 postgres", programs.display()),
    )?;
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
                and (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)";
    let mut psql = Command::new(programs.join("psql"));
    psql.args(["-h", &ip.to_string(), "-U", "postgres", "-At", "-c", sums, "postgres"]);
    let balanced = scene.client.exec("psql", &mut psql, DEADLINE)?.expect_success()?.stdout;
    ensure!(balanced.trim() == "t", "{balanced}");
    Ok(())
}

/// Debian keeps them in a directory of their version.
fn postgres_programs() -> Result<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").context("PostgreSQL is not installed")?;
    let newest = versions.flatten().map(|entry| entry.path().join("bin")).max();
    newest.context("PostgreSQL is not installed")
}

#[test]
fn nginx_answers_every_request_of_wrk() -> Result<()> {
    let scene = Scene::with_routers("nginx")?;
    let ip = scene.server.v4;
    let directory = scene.server.place().directory.join("nginx");
    std::fs::create_dir(&directory)?;
    std::fs::write(directory.join("index.html"), vec![b'x'; 20_000])?;
    // Its workers are another user's.
    for path in [scene.lab.directory(), &directory] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?;
    }
    let directory = directory.display();
    let configuration = format!(
        "daemon off; worker_processes 2; error_log stderr; pid {directory}/pid; events {{}} \
         http {{ access_log off; keepalive_requests 1000000000; server {{ listen {ip}:8080; root {directory}; }} }}"
    );
    let path = scene.server.place().directory.join("nginx.conf");
    std::fs::write(&path, configuration)?;
    let _nginx = server(&scene, 8080, &format!("nginx -c {}", path.display()))?;
    let load = load(&scene, 8080, &format!("wrk -t 2 -c 16 -d 15 http://{ip}:8080/index.html"))?;
    for words in ["Non-2xx", "Socket errors"] {
        ensure!(!load.stdout.contains(words), "{}", load.stdout);
    }
    Ok(())
}

#[test]
fn rsync_copies_a_tree_as_it_is() -> Result<()> {
    let scene = Scene::with_routers("rsync")?;
    let address = scene.server.address(Family::V4, 8730);
    let tree = scene.server.place().directory.join("tree");
    std::fs::create_dir(&tree)?;
    for number in 0..40u8 {
        let line = format!("file {number} ").into_bytes();
        std::fs::write(tree.join(number.to_string()), line.repeat(2_000_000))?;
    }
    let configuration = scene.server.place().directory.join("rsyncd.conf");
    let text = format!("use chroot = no\n[tree]\npath = {}\nuid = root\n", tree.display());
    std::fs::write(&configuration, text)?;
    let _rsync = server(
        &scene,
        8730,
        &format!(
            "rsync --daemon --no-detach --port 8730 --address {} --config {}",
            address.ip(),
            configuration.display()
        ),
    )?;
    let copy = scene.client.place().directory.join("copy");
    load(
        &scene,
        8730,
        &format!("rsync -a --whole-file --bwlimit=60m rsync://{address}/tree/ {}/", copy.display()),
    )?;
    let compared = scene.client.place().run(Command::new("diff").arg("-r").args([&tree, &copy]))?;
    ensure!(compared.is_empty(), "{compared}");
    Ok(())
}
