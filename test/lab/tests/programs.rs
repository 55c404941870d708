// SPDX-License-Identifier: Apache-2.0
//! Programs that people run, untouched, under their own load, while their connections are swapped and swapped back all
//! the time. Each test looks at what the program was to bring about, not only at how it ended.
//!
//! With `--nocapture` each load prints how often its connections moved, and what the routers have refused.

mod programs {
    mod files;
    mod languages;
    mod mpi;
    mod stores;
    mod web;
}

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{DEADLINE, Finished, Pod, Process, Scene, programs::command};

/// At least so many moves, each way counted, while a load runs.
const MOVES: u32 = 100;

/// No load takes as long, on a machine that is busy.
const LIMIT: Duration = Duration::from_secs(120);

/// A program in the server's pod that accepts on this port.
fn server(scene: &Scene, port: u16, words: &str) -> Result<Process> {
    scene.server.serve(&format!("server-{port}"), &mut command(words), port)
}

/// A load in the client's pod, and its end; meanwhile its connections move to and fro. The load's input ends when they
/// have moved often enough.
fn load(scene: &Scene, port: u16, words: &str) -> Result<Finished> {
    let (finished, moves) = under_moves(scene, &scene.client, port, words)?;
    ensure!(moves >= MOVES, "only {moves} moves while {words}");
    Ok(finished)
}

/// For a load that takes its time whatever happens: again and again, until its connections have moved often enough.
fn loads_from(scene: &Scene, pod: &Pod, port: u16, words: &str) -> Result<Vec<Finished>> {
    let (mut all, mut moves) = (Vec::new(), 0);
    while moves < MOVES {
        ensure!(all.len() < 10, "only {moves} moves while {words}, ten times");
        let (finished, more) = under_moves(scene, pod, port, words)?;
        all.push(finished);
        moves += more;
    }
    Ok(all)
}

fn loads(scene: &Scene, port: u16, words: &str) -> Result<Vec<Finished>> {
    loads_from(scene, &scene.client, port, words)
}

fn under_moves(scene: &Scene, pod: &Pod, port: u16, words: &str) -> Result<(Finished, u32)> {
    let mut running = pod.spawn("load", &mut command(words))?;
    let began = Instant::now();
    let moves = scene.move_about(port, |moves| {
        if moves >= MOVES {
            running.close_stdin();
        }
        ensure!(began.elapsed() < LIMIT, "{words}: no end\n{}{}", running.stdout(), running.stderr());
        Ok(running.ended()?.is_some())
    })?;
    let finished = running.wait(DEADLINE)?.expect_success()?;
    let [h1, h2] = scene.lab.hosts().map(|host| host.status().map(|status| status.refused));
    eprintln!("{words}: {moves} moves; refused by h1 {:?}, by h2 {:?}", h1?, h2?);
    Ok((finished, moves))
}

/// What a program in the client's pod prints.
fn run(scene: &Scene, words: &str) -> Result<String> {
    Ok(scene.client.exec("run", &mut command(words), DEADLINE)?.expect_success()?.stdout)
}

/// Two files, or two trees.
fn expect_equal(sent: &Path, received: &Path) -> Result<()> {
    let compared = Command::new("diff").arg("-r").args([sent, received]).output()?;
    ensure!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    Ok(())
}
