// SPDX-License-Identifier: Apache-2.0
//! Routers believe those who prove who they are, about what is theirs, and nobody else.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::Path,
    process::Command,
    sync::Arc,
};

use anyhow::{Context, Result, bail, ensure};
use ebpf_router::wire::{self, Attempted, Cause, Message, Purpose, Tuple};
use forwarder_api::{ConnId, Direction, Refusal};
use lab::{Authority, DEADLINE, Host, RouterOptions, Scene, node_addresses, wait_for};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

const ROUTER_PORT: u16 = 1234;
const PORT: u16 = 7000;
const THIRD: &str = "192.168.78.3";

fn wait_for_log(host: &Host, words: &str) -> Result<()> {
    wait_for(&format!("the router of {} to say \"{words}\"", host.name), DEADLINE, || {
        Ok(host.router_log().contains(words).then_some(()))
    })
    .with_context(|| host.router_log())
}

/// Lines of the log at this level or worse that speak about peers.
fn complaints(host: &Host) -> Vec<String> {
    let log = host.router_log();
    let lines = log.lines().filter(|line| line.contains("WARN") || line.contains("ERROR"));
    lines.filter(|line| line.contains("peer ")).map(str::to_owned).collect()
}

/// A node of the same network that is neither h1 nor h2; its programs run on h2.
struct Stranger<'a> {
    scene: &'a Scene,
}

impl Stranger<'_> {
    fn new(scene: &Scene) -> Result<Stranger<'_>> {
        let add = format!("addr add {THIRD}/24 dev eth1\n");
        scene.lab.h2.place().run_script(&["ip", "-batch", "-"], &add)?;
        Ok(Stranger { scene })
    }

    /// To h1's router, up to the preambles.
    fn knock(&self, purpose: Purpose) -> Result<TcpStream> {
        let [_, to, ..] = node_addresses(1);
        let stream = self.scene.lab.h2.place().network.run(|| {
            let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            let address = |ip: IpAddr, port| match SocketAddr::new(ip, port) {
                SocketAddr::V4(v4) => Ok(SockaddrIn::from(v4)),
                SocketAddr::V6(_) => bail!("IPv4 expected"),
            };
            bind(socket.as_raw_fd(), &address(THIRD.parse()?, 0)?)?;
            connect(socket.as_raw_fd(), &address(to, ROUTER_PORT)?)?;
            Ok(TcpStream::from(socket))
        });
        let mut stream = stream?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.write_all(&wire::preamble(purpose))?;
        let mut preamble = [0; wire::PREAMBLE];
        stream.read_exact(&mut preamble)?;
        ensure!(wire::check_preamble(preamble)? == Purpose::Secure, "h1's router wants TLS");
        Ok(stream)
    }

    /// A session with h1's router, under the certificate in this directory; the error is what TLS says otherwise.
    fn session(&self, certificate: Option<&Path>) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.scene.lab.h1.tls().join("ca.crt"))?)?;
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let config = match certificate {
            None => config.with_no_client_auth(),
            Some(directory) => {
                let chain: Result<Vec<_>, _> =
                    CertificateDer::pem_file_iter(directory.join("tls.crt"))?.collect();
                let key = PrivateKeyDer::from_pem_file(directory.join("tls.key"))?;
                config.with_client_auth_cert(chain?, key)?
            }
        };
        let [_, name, ..] = node_addresses(1);
        let connection = ClientConnection::new(Arc::new(config), ServerName::from(name))?;
        let mut stream = StreamOwned::new(connection, self.knock(Purpose::Secure)?);
        let mut welcome = [0; 1];
        stream.read_exact(&mut welcome)?;
        ensure!(welcome == [1], "not welcome: {welcome:?}");
        Ok(stream)
    }

    fn check_turned_away(&self, certificate: Option<&Path>, why: &str) -> Result<()> {
        let h1 = &self.scene.lab.h1;
        let before = h1.status()?.turned_away;
        ensure!(self.session(certificate).is_err(), "{why}: it was let in");
        wait_for_log(h1, why)?;
        let after = h1.status()?.turned_away;
        ensure!(after == before + 1, "{why}: {after} turned away, {before} before");
        Ok(())
    }
}

fn openssl(directory: &Path, arguments: &str) -> Result<()> {
    let mut command = Command::new("openssl");
    command.current_dir(directory).args(arguments.split_whitespace());
    let output = command.output().context("starting openssl")?;
    ensure!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A certificate of the authority in `authority`, as another tool makes it, valid from now on for so many days.
fn issue_with_openssl(
    authority: &Path,
    directory: &Path,
    key: &str,
    addresses: &[IpAddr],
    days: i32,
) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let names: Vec<String> = addresses.iter().map(|address| format!("IP:{address}")).collect();
    let extensions = format!("subjectAltName={}\nextendedKeyUsage=serverAuth,clientAuth\n", names.join(","));
    std::fs::write(directory.join("extensions"), extensions)?;
    std::fs::copy(authority.join("ca.crt"), directory.join("ca.crt"))?;
    openssl(
        directory,
        &format!("req -new -newkey {key} -nodes -keyout tls.key -subj /CN=node -out request"),
    )?;
    let authority = authority.display();
    openssl(
        directory,
        &format!(
            "x509 -req -in request -CA {authority}/ca.crt -CAkey {authority}/ca.key -set_serial 7 \
             -extfile extensions -days {days} -out tls.crt"
        ),
    )
}

#[test]
fn who_cannot_prove_to_be_the_node_at_its_address_is_turned_away() -> Result<()> {
    let scene = Scene::without_routers("trust-strangers")?;
    let (lab, third) = (&scene.lab, THIRD.parse()?);
    lab.h1.start_forwarder()?;
    lab.h1.start_router(&RouterOptions::default())?;
    let stranger = Stranger::new(&scene)?;
    let good = lab.authority.issue("third", &[third])?;
    stranger.session(Some(&good))?;
    stranger.check_turned_away(None, "it has no certificate")?;
    let other = Authority::new(&lab.directory().join("other"))?.issue("third", &[third])?;
    stranger.check_turned_away(Some(&other), "its certificate is not of an authority that we know")?;
    stranger.check_turned_away(
        Some(&lab.h2.tls()),
        &format!("its certificate is of another node: {THIRD} expected, it holds 192.168.77.2"),
    )?;
    let old = lab.directory().join("old");
    issue_with_openssl(&lab.directory().join("pki"), &old, "rsa:2048", &[third], -1)?;
    stranger.check_turned_away(Some(&old), "its certificate has expired")
}

#[test]
fn plain_tcp_is_turned_away() -> Result<()> {
    let scene = Scene::without_routers("trust-plain")?;
    let (h1, h2) = (&scene.lab.h1, &scene.lab.h2);
    [h1, h2].into_iter().try_for_each(Host::start_forwarder)?;
    h1.start_router(&RouterOptions::default())?;
    h2.start_router(&RouterOptions::default().with("ROUTER_INSECURE", "true"))?;
    wait_for_log(h2, "INSECURE: anybody who reaches ROUTER_PORT")?;
    let stream = scene.stream(PORT, "--pings")?;
    wait_for_log(h1, "it speaks plain TCP, TLS expected")?;
    wait_for_log(h2, "it speaks TLS, and this router was started with --insecure")?;
    ensure!(h1.wait_until_refused(PORT)? == "peer_unreachable");
    stream.finish()?;
    Ok(())
}

#[test]
fn two_insecure_routers_swap() -> Result<()> {
    let scene = Scene::without_routers("trust-insecure")?;
    scene.lab.start_everything(&RouterOptions::default().with("ROUTER_INSECURE", "true"))?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    Ok(())
}

/// A mounted secret: `..data` points to the present version, and each name leads through it.
struct Secret<'a>(&'a Path);

impl Secret<'_> {
    fn mount(&self, version: &Path) -> Result<()> {
        std::fs::remove_dir_all(self.0)?;
        std::fs::create_dir(self.0)?;
        for name in ["tls.crt", "tls.key", "ca.crt"] {
            std::os::unix::fs::symlink(Path::new("..data").join(name), self.0.join(name))?;
        }
        self.renew(version)
    }

    /// All at once, as the kubelet does it.
    fn renew(&self, version: &Path) -> Result<()> {
        let new = self.0.join("..data_tmp");
        std::os::unix::fs::symlink(version, &new)?;
        std::fs::rename(new, self.0.join("..data"))?;
        Ok(())
    }
}

#[test]
fn a_certificate_is_taken_live_and_one_that_is_broken_is_not() -> Result<()> {
    let scene = Scene::without_routers("trust-reload")?;
    let (lab, h1, h2) = (&scene.lab, &scene.lab.h1, &scene.lab.h2);
    let strange = Authority::new(&lab.directory().join("other"))?.issue("h2", &node_addresses(2))?;
    let good = lab.authority.issue("good", &node_addresses(2))?;
    let (tls, broken) = (h2.tls(), lab.directory().join("broken"));
    let secret = Secret(&tls);
    secret.mount(&strange)?;
    lab.start_everything(&RouterOptions::default())?;
    let stream = scene.stream(PORT, "--pings")?;
    // Each side says once what it has against the other, however often they try.
    wait_for_log(h1, "its certificate is not of an authority that we know")?;
    wait_for_log(h2, "its certificate is not of an authority that we know")?;
    ensure!(h1.wait_until_refused(PORT)? == "peer_unreachable");

    secret.renew(&good)?;
    wait_for_log(h2, "this node's certificate has changed: 192.168.77.2")?;
    scene.wait_until_on_host(PORT)?;
    stream.finish()?;

    std::fs::create_dir(&broken)?;
    for name in ["tls.key", "ca.crt"] {
        std::fs::copy(good.join(name), broken.join(name))?;
    }
    std::fs::write(broken.join("tls.crt"), "-----BEGIN CERTIFICATE-----\nhalf of it")?;
    secret.renew(&broken)?;
    wait_for_log(h2, "the certificates stay as they were")?;
    ensure!(h2.router_log().contains("tls.crt: "), "{}", h2.router_log());
    // With a router that is new to it.
    h1.stop_router()?;
    h1.start_router(&RouterOptions::default())?;
    scene.swapped_stream(PORT + 1, "--pings")?.finish()?;
    Ok(())
}

#[test]
fn routers_that_do_not_believe_each_other_say_why_in_one_line_each() -> Result<()> {
    let scene = Scene::without_routers("trust-lines")?;
    let (lab, h1, h2) = (&scene.lab, &scene.lab.h1, &scene.lab.h2);
    // Of this authority, and of another address than it has.
    let elsewhere = lab.authority.issue("elsewhere", &["192.0.2.1".parse()?])?;
    std::fs::remove_dir_all(h2.tls())?;
    std::fs::rename(elsewhere, h2.tls())?;
    lab.start_everything(&RouterOptions::default())?;
    wait_for_log(h2, "this node's certificate does not hold 192.168.77.2 of HOST_IF")?;
    let stream = scene.stream(PORT, "--pings")?;
    wait_for_log(h1, "of another node: 10.244.2.0 expected, it holds")?;
    wait_for_log(h2, "it refuses our certificate")?;
    ensure!(h1.wait_until_refused(PORT)? == "peer_unreachable");
    stream.finish()?;
    let once = |host: &Host, words: &str| {
        let lines = complaints(host).into_iter().filter(|line| line.contains(words)).count();
        ensure!(lines == 1, "{lines} lines about {words}: {:#?}", complaints(host));
        Ok(())
    };
    once(h1, "cannot be reached")?;
    once(h2, "cannot be reached")
}

#[test]
fn certificates_of_other_tools_are_as_good() -> Result<()> {
    let scene = Scene::without_routers("trust-openssl")?;
    let authority = scene.lab.directory().join("openssl");
    std::fs::create_dir(&authority)?;
    openssl(
        &authority,
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 30 -subj /CN=theirs",
    )?;
    for (host, key) in [(&scene.lab.h1, "ec -pkeyopt ec_paramgen_curve:P-256"), (&scene.lab.h2, "rsa:2048")] {
        std::fs::remove_dir_all(host.tls())?;
        issue_with_openssl(&authority, &host.tls(), key, &node_addresses(host.index), 30)?;
    }
    scene.lab.start_everything(&RouterOptions::default())?;
    scene.swapped_stream(PORT, "--pings")?.finish()?;
    Ok(())
}

#[test]
fn a_peer_with_a_good_certificate_is_not_believed_about_connections_of_others() -> Result<()> {
    let scene = Scene::with_routers("trust-liar")?;
    let (lab, h1) = (&scene.lab, &scene.lab.h1);
    let stream = scene.swapped_stream(PORT, "--pings")?;
    let flow = h1.wait_until_on_host(PORT)?;
    let conn = ConnId(u64::from_str_radix(&flow.conn.context("a name")?, 16)?);
    let (local, remote) = (flow.remote.parse()?, flow.local.parse()?);

    let liar = Stranger::new(&scene)?;
    let mut session = liar.session(Some(&lab.authority.issue("third", &[THIRD.parse()?])?))?;
    let (tuple, attempted) = (Tuple { local, remote }, Attempted { conn, number: 1 });
    let (direction, cause) = (Direction::ToOverlay, Cause::Order);
    let lies = [
        Message::Know { tuple, declined: None, answer: false },
        Message::Ask { tuple, direction, cause },
        Message::Offer { attempted, tuple, direction, cause },
        Message::Cancel { attempted, reason: Refusal::Stopping },
        Message::Relay { attempted, message: vec![0; 64] },
    ];
    for lie in &lies {
        session.write_all(&wire::encode(lie)?)?;
    }
    session.flush()?;
    let count = lies.len() as u64;
    wait_for("the lies to be counted", DEADLINE, || Ok((h1.status()?.false_claims == count).then_some(())))?;
    wait_for_log(
        h1,
        &format!("peer {THIRD} speaks about {remote} - {local}, whose other end is at 10.244.2.0"),
    )?;
    ensure!(h1.wait_until_on_host(PORT)?.conn == Some(conn.to_string()), "it has moved");
    stream.finish()?;
    Ok(())
}

#[test]
fn the_forwarder_takes_orders_from_root_only() -> Result<()> {
    let scene = Scene::without_routers("trust-forwarder")?;
    let h1 = &scene.lab.h1;
    h1.start_forwarder()?;
    let socket = h1.place().directory.join("forwarder.sock");
    ensure!(std::fs::metadata(&socket)?.permissions().mode() & 0o777 == 0o600);
    // What the mode forbids is forbidden without it as well.
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666))?;
    let connect = "my $s = IO::Socket::UNIX->new(Peer => $ARGV[0]) or die $!; read $s, my $answer, 1";
    let mut other = Command::new("setpriv");
    other
        .args(["--reuid", "65534", "--clear-groups", "perl", "-MIO::Socket::UNIX", "-e", connect])
        .arg(&socket);
    h1.place().run(&mut other)?;
    wait_for("the forwarder to say why", DEADLINE, || {
        let words = "the other end of the socket is user 65534, user 0 or 0 expected";
        Ok(h1.forwarder_log().contains(words).then_some(()))
    })
}
