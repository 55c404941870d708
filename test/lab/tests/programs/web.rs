// SPDX-License-Identifier: Apache-2.0
//! HTTP, plain and over TLS.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use anyhow::{Result, ensure};
use lab::{Process, Scene};

use crate::{command, directory, expect_equal, load, loads, server};

/// Serves a directory, and keeps connections open as long as the client wants.
fn nginx(scene: &Scene, root: &Path, listen: &str) -> Result<Process> {
    let (root, ip) = (root.display(), scene.server.v4);
    let own = &scene.server.place().directory;
    let configuration = own.join("nginx.conf");
    let text = format!(
        "daemon off; worker_processes 2; error_log stderr; pid {}; events {{}} \
         http {{ access_log off; keepalive_requests 1000000000; keepalive_time 1d; \
         server {{ listen {ip}:8080 {listen}; root {root}; }} }}",
        own.join("nginx.pid").display()
    );
    std::fs::write(&configuration, text)?;
    server(scene, 8080, &format!("nginx -c {}", configuration.display()))
}

#[test]
fn nginx_answers_every_request_of_wrk() -> Result<()> {
    let scene = Scene::with_routers("nginx")?;
    let root = directory(&scene, "root")?;
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
    let keys = directory(scene, "keys")?;
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
    let root = directory(&scene, "root")?;
    let received = directory(&scene, "received")?;
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
    let root = directory(&scene, "root")?;
    let copy = scene.lab.directory().join("copy");
    let bytes = File::open("/dev/urandom")?;
    io::copy(&mut bytes.take(600 << 20), &mut File::create(root.join("large"))?)?;
    let (_nginx, curl) = nginx_with_tls(&scene, &root)?;
    let (url, to) = (format!("https://{}:8080/large", scene.server.v4), copy.display());
    let load = load(&scene, 8080, &format!("{curl} {url} -o {to}"))?;
    ensure!(load.stdout.trim() == "1", "{} connections were made", load.stdout.trim());
    expect_equal(&root.join("large"), &copy)
}
