// SPDX-License-Identifier: Apache-2.0
//! Programs that keep data, and their copies.

use std::{net::Ipv4Addr, path::PathBuf, process::Command};

use anyhow::{Result, ensure};
use lab::{
    DEADLINE, Pod, Process, Scene,
    programs::{command, directory, postgres_program},
    wait_for,
};

use crate::{load, loads, loads_from, run, server};

fn redis(scene: &Scene, name: &str, ip: Ipv4Addr) -> Result<String> {
    let directory = directory(&scene.lab, name)?;
    let directory = directory.display();
    Ok(format!(
        "redis-server --port 6379 --bind {ip} --protected-mode no --save \"\" --dir {directory} \
         --unixsocket {directory}/socket --repl-diskless-sync-delay 0 --enable-debug-command yes"
    ))
}

#[test]
fn redis_answers_every_request() -> Result<()> {
    let scene = Scene::with_routers("redis")?;
    let ip = scene.server.v4;
    let _redis = server(&scene, 6379, &redis(&scene, "redis", ip)?)?;
    let load = load(&scene, 6379, &format!("redis-benchmark -h {ip} -t set,incr,lpush -n 400000 -c 20 -q"))?;
    ensure!(!load.stdout.to_lowercase().contains("error"), "{}", load.stdout);
    // redis-benchmark increments one counter, once for each request.
    let counted = run(&scene, &format!("redis-cli -h {ip} get counter:__rand_int__"))?;
    ensure!(counted.trim() == "400000", "{counted}");
    Ok(())
}

#[test]
fn a_redis_replica_catches_up_and_is_equal() -> Result<()> {
    let scene = Scene::with_routers("redis-replica")?;
    let (ip, here) = (scene.server.v4, scene.client.v4);
    let _primary = server(&scene, 6379, &redis(&scene, "primary", ip)?)?;
    // Over a unix socket: the link between the two is the only connection.
    let socket = scene.lab.directory().join("primary/socket");
    let fill = format!("redis-benchmark -s {} -t set -r 1000000 -d 200 -n 400000 -c 8 -q", socket.display());
    run(&scene, &fill)?;
    let replica = format!("{} --replicaof {ip} 6379", redis(&scene, "replica", here)?);
    let replica = scene.client.serve("replica", &mut command(&replica), 6379)?;
    loads_from(&scene, &scene.server, 6379, &fill)?;
    let digest = |ip| -> Result<String> {
        let digest = run(&scene, &format!("redis-cli -h {ip} debug digest"))?;
        ensure!(digest.trim().len() == 40, "{digest}");
        Ok(digest)
    };
    wait_for("the replica to be equal", DEADLINE, || Ok((digest(here)? == digest(ip)?).then_some(())))?;
    let log = replica.stdout();
    ensure!(log.matches("MASTER <-> REPLICA sync started").count() == 1, "the link was broken:\n{log}");
    Ok(())
}

#[test]
fn memcached_keeps_what_it_was_given() -> Result<()> {
    let scene = Scene::with_routers("memcached")?;
    let ip = scene.server.v4;
    // With room for all: what is not found was lost.
    let _memcached = server(&scene, 11211, &format!("memcached -u nobody -m 2048 -p 11211 -l {ip} -t 4"))?;
    for load in loads(&scene, 11211, &format!("memcaslap -s {ip}:11211 -T 2 -c 16 -t 15s -v 1.0"))? {
        for said in ["get_misses: 0\n", "verify_failed: 0\n"] {
            ensure!(load.stdout.contains(said), "{}", load.stdout);
        }
    }
    Ok(())
}

/// PostgreSQL in a pod, at port 5432.
struct Postgres {
    process: Process,
    ip: Ipv4Addr,
    /// Where its unix socket is.
    socket: PathBuf,
}

impl Postgres {
    /// `fill` is the program that makes the data directory, which is given to it last.
    fn start(scene: &Scene, pod: &Pod, fill: &str) -> Result<Postgres> {
        let socket = directory(&scene.lab, &format!("postgres-{}", pod.name))?;
        let (data, ip) = (socket.join("data"), pod.v4);
        pod.place().run(Command::new("chown").arg("postgres").arg(&socket))?;
        // It refuses to run as root.
        let user = "setpriv --reuid postgres --regid postgres --clear-groups";
        let at = data.display();
        pod.place().run(&mut command(&format!("{user} {fill} {at}")))?;
        let every_address = "local all all trust\nhost all,replication all 0.0.0.0/0 trust\n";
        std::fs::write(data.join("pg_hba.conf"), every_address)?;
        let start = format!(
            "{user} {} -D {at} -h {ip} -c unix_socket_directories={} -c fsync=off",
            postgres_program("postgres")?,
            socket.display()
        );
        let mut process = pod.serve("postgres", &mut command(&start), 5432)?;
        process.wait_until_it_says("ready to accept", DEADLINE)?;
        Ok(Postgres { process, ip, socket })
    }

    fn primary(scene: &Scene) -> Result<Postgres> {
        Postgres::start(
            scene,
            &scene.server,
            &format!("{} -A trust -U postgres", postgres_program("initdb")?),
        )
    }

    fn replica_of(primary: &Postgres, scene: &Scene) -> Result<Postgres> {
        let copy = format!(
            "{} -h {} -U postgres -R -X stream -c fast -D",
            postgres_program("pg_basebackup")?,
            primary.ip
        );
        Postgres::start(scene, &scene.client, &copy)
    }

    fn ask(&self, scene: &Scene, query: &str) -> Result<String> {
        let mut psql = command(&format!("{} -h {} -U postgres -At -c", postgres_program("psql")?, self.ip));
        let answer = scene.client.exec("psql", psql.args([query, "postgres"]), DEADLINE)?;
        Ok(answer.expect_success()?.stdout.trim().to_owned())
    }
}

#[test]
fn postgres_keeps_its_books_balanced() -> Result<()> {
    let scene = Scene::with_routers("postgres")?;
    let postgres = Postgres::primary(&scene)?;
    let pgbench = format!("{} -h {} -U postgres postgres", postgres_program("pgbench")?, postgres.ip);
    run(&scene, &format!("{pgbench} -i -s 2 -q"))?;
    loads(&scene, 5432, &format!("{pgbench} -c 8 -j 2 -T 15"))?;
    let sums = "select (select sum(abalance) from pgbench_accounts) = (select sum(delta) from pgbench_history) \
                and (select sum(bbalance) from pgbench_branches) = (select sum(tbalance) from pgbench_tellers)";
    ensure!(postgres.ask(&scene, sums)? == "t", "the books are not balanced");
    Ok(())
}

#[test]
fn a_postgres_replica_catches_up_and_is_equal() -> Result<()> {
    let scene = Scene::with_routers("postgres-replica")?;
    let primary = Postgres::primary(&scene)?;
    // Over a unix socket: the link between the two is the only connection.
    let pgbench =
        format!("{} -h {} -U postgres postgres", postgres_program("pgbench")?, primary.socket.display());
    scene.server.place().run(&mut command(&format!("{pgbench} -i -s 2 -q")))?;
    let replica = Postgres::replica_of(&primary, &scene)?;
    loads_from(&scene, &scene.server, 5432, &format!("{pgbench} -c 8 -j 2 -T 15"))?;
    let written = primary.ask(&scene, "select pg_current_wal_flush_lsn()")?;
    let replayed = format!("select pg_last_wal_replay_lsn() >= '{written}'");
    wait_for("the replica to catch up", DEADLINE, || {
        Ok((replica.ask(&scene, &replayed)? == "t").then_some(()))
    })?;
    for table in ["accounts", "branches", "tellers", "history"] {
        let rows = format!(
            "select count(*), md5(string_agg(row::text, ' ' order by row::text)) from pgbench_{table} row"
        );
        let (wanted, found) = (primary.ask(&scene, &rows)?, replica.ask(&scene, &rows)?);
        ensure!(wanted == found, "{table}: {wanted} at the primary, {found} at the replica");
    }
    let log = replica.process.stderr();
    ensure!(log.matches("started streaming WAL").count() == 1, "the link was broken:\n{log}");
    Ok(())
}
