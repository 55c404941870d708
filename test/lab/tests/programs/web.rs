// SPDX-License-Identifier: Apache-2.0
//! HTTP, plain and over TLS.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use anyhow::{Result, ensure};
use lab::{
    Process, Scene,
    programs::{self, NGINX_PORT, command, directory},
};

use crate::{expect_equal, load, loads, server};

/// nginx at the server, which serves `root`. `listen`: more of its directive.
fn nginx(scene: &Scene, root: &Path, listen: &str) -> Result<Process> {
    let words = programs::nginx(scene.server.place(), scene.server.v4.into(), root, listen)?;
    server(scene, NGINX_PORT, &words)
}

#[test]
fn nginx_answers_every_request_of_wrk() -> Result<()> {
    let scene = Scene::with_routers("nginx")?;
    let root = directory(&scene.lab, "root")?;
    std::fs::write(root.join("index.html"), vec![b'x'; 20_000])?;
    let _nginx = nginx(&scene, &root, "")?;
    let url = format!("http://{}:8080/index.html", scene.server.v4);
    for load in loads(&scene, 8080, &format!("wrk -t 2 -c 16 -d 15 {url}"))? {
        for words in ["Non-2xx", "Socket errors"] {
            ensure!(!load.stdout.contains(words), "{}", load.stdout);
        }
    }
    Ok(())
}

/// nginx with a certificate of its own, and the beginning of a curl command that trusts only that.
fn nginx_with_tls(scene: &Scene, root: &Path) -> Result<(Process, String)> {
    let keys = directory(&scene.lab, "keys")?;
    let (ip, keys) = (scene.server.v4, keys.display());
    scene.server.place().run(&mut command(&format!(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ip} -addext subjectAltName=IP:{ip} \
         -keyout {keys}/key.pem -out {keys}/certificate.pem"
    )))?;
    // The rate makes a large file last.
    let listen = format!(
        "ssl; ssl_certificate {keys}/certificate.pem; ssl_certificate_key {keys}/key.pem; limit_rate 50m"
    );
    let curl = "curl --no-progress-meter --fail-early --fail --write-out %{num_connects}\\n";
    Ok((nginx(scene, root, &listen)?, format!("{curl} --cacert {keys}/certificate.pem")))
}

#[test]
fn curl_gets_thousands_of_files_over_one_tls_connection() -> Result<()> {
    let scene = Scene::with_routers("curl-many")?;
    let root = directory(&scene.lab, "root")?;
    let received = directory(&scene.lab, "received")?;
    for number in 1..=20_000 {
        std::fs::write(root.join(number.to_string()), format!("file {number}\n").repeat(1 + number % 1000))?;
    }
    let (_nginx, curl) = nginx_with_tls(&scene, &root)?;
    let (url, copies) = (format!("https://{}:8080", scene.server.v4), received.display());
    let load = load(&scene, 8080, &format!("{curl} {url}/[1-20000] -o {copies}/#1"))?;
    let connects: u32 = load.stdout.lines().map(|connects| connects.parse::<u32>().unwrap_or(1000)).sum();
    ensure!(connects == 1, "{connects} connections were made");
    expect_equal(&root, &received)
}

#[test]
fn curl_gets_a_large_file_over_tls() -> Result<()> {
    let scene = Scene::with_routers("curl-large")?;
    let root = directory(&scene.lab, "root")?;
    let copy = scene.lab.directory().join("copy");
    let bytes = File::open("/dev/urandom")?;
    io::copy(&mut bytes.take(600 << 20), &mut File::create(root.join("large"))?)?;
    let (_nginx, curl) = nginx_with_tls(&scene, &root)?;
    let (url, to) = (format!("https://{}:8080/large", scene.server.v4), copy.display());
    let load = load(&scene, 8080, &format!("{curl} {url} -o {to}"))?;
    ensure!(load.stdout.trim() == "1", "{} connections were made", load.stdout.trim());
    expect_equal(&root.join("large"), &copy)
}
