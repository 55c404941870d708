// SPDX-License-Identifier: Apache-2.0
//! Servers and clients in other languages, each with its own way to wait for sockets. The clients compare every byte,
//! and go on until their connections have moved often enough.

use anyhow::{Result, ensure};
use lab::{
    Scene,
    programs::{command, source},
};
use serde_json::Value;

use crate::{load, run, server};

/// `start` is the program; its last words are its role and address. Returns what the client printed.
fn talk(scene: &Scene, port: u16, start: &str, separator: char) -> Result<Value> {
    let address = format!("{}{separator}{port}", scene.server.v4);
    let mut server = server(scene, port, &format!("{start} server {address}"))?;
    let said = load(scene, port, &format!("{start} client {address}"))?.last_json()?;
    server.fail_if_ended()?;
    ensure!(server.stderr().is_empty(), "{}", server.stderr());
    Ok(said)
}

/// Eight connections, kept from beginning to end, with many answers, all of which were right.
fn expect_many_answers(said: &Value) -> Result<()> {
    ensure!(said["connections"] == 8 && said["requests"].as_u64() > Some(100), "{said}");
    Ok(())
}

#[test]
fn a_java_selector_echoes_every_byte() -> Result<()> {
    let scene = Scene::with_routers("java")?;
    let classes = scene.lab.directory().display().to_string();
    run(&scene, &format!("javac -d {classes} {}", source("Echo.java").display()))?;
    let said = talk(&scene, 9001, &format!("java -cp {classes} Echo"), ' ')?;
    ensure!(said["sent"] == said["received"] && said["sent"].as_u64() > Some(1 << 20), "{said}");
    Ok(())
}

#[test]
fn node_answers_every_request() -> Result<()> {
    let scene = Scene::with_routers("node")?;
    expect_many_answers(&talk(&scene, 9002, &format!("node {}", source("http.js").display()), ' ')?)
}

#[test]
fn go_answers_every_request() -> Result<()> {
    let scene = Scene::with_routers("go")?;
    let program = scene.lab.directory().join("http");
    let mut build = command("go build -o");
    build.arg(&program).arg(source("http.go")).env("GOCACHE", scene.lab.directory().join("go"));
    scene.client.place().run(&mut build)?;
    expect_many_answers(&talk(&scene, 9003, &program.display().to_string(), ':')?)
}

#[test]
fn python_asyncio_answers_every_message() -> Result<()> {
    let scene = Scene::with_routers("python")?;
    expect_many_answers(&talk(
        &scene,
        9004,
        // Debian's, whichever comes first in the path.
        &format!("/usr/bin/python3 {}", source("streams.py").display()),
        ' ',
    )?)
}
