// SPDX-License-Identifier: Apache-2.0
//! Many short connections, each of which ends at another moment of the swap that the routers begin at once.

use std::{
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::tools::{
    Child, expect_end, expect_pattern, is_told, pattern, raw, receive, say, sys, wait_for_line, write,
};

const CONNECTIONS: usize = 60;

/// How the connections end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The subject closes: all bytes arrive, and then the end.
    Close,
    /// A process of the subject ends, without closing.
    Exit,
    /// A process of the subject is killed.
    Kill,
    /// A process of the partner is killed.
    PartnerKilled,
}

pub fn ending_of(behaviour: &str) -> Option<Ending> {
    match behaviour {
        "churn-close" => Some(Ending::Close),
        "churn-exit" => Some(Ending::Exit),
        "churn-kill" => Some(Ending::Kill),
        "churn-partner-killed" => Some(Ending::PartnerKilled),
        _ => None,
    }
}

/// From nothing to forty milliseconds, in an order without a pattern.
fn life(number: usize) -> Duration {
    Duration::from_micros((number * 7919 % 40_000) as u64)
}

pub fn subject(ending: Ending, address: SocketAddr) -> Result<()> {
    say("connected");
    wait_for_line("enter")?;
    say("ready");
    for number in 1..=CONNECTIONS {
        one_connection(ending, address, number).with_context(|| format!("connection {number}"))?;
    }
    say("ok");
    Ok(())
}

fn one_connection(ending: Ending, address: SocketAddr, number: usize) -> Result<()> {
    match ending {
        Ending::Close => {
            let fd = connect(address)?;
            let length = number * 1999 % 200_000;
            write(&fd, &(length as u64).to_le_bytes())?;
            std::thread::sleep(life(number));
            write(&fd, &pattern(0, length))
        }
        Ending::Exit => Child::fork(|| {
            let fd = connect(address)?;
            std::thread::spawn(move || writes_on(&fd));
            std::thread::sleep(life(number));
            Ok(())
        })?
        .expect_success(),
        Ending::Kill => {
            let child = Child::fork(|| writes_on(&connect(address)?).map(drop))?;
            std::thread::sleep(life(number));
            drop(child);
            Ok(())
        }
        Ending::PartnerKilled => writes_on(&connect(address)?).map(drop),
    }
}

fn connect(address: SocketAddr) -> Result<OwnedFd> {
    Ok(TcpStream::connect(address).context("connect")?.into())
}

/// Until the other side has gone. Returns how much was written.
fn writes_on(fd: &OwnedFd) -> Result<usize> {
    let mut written = 0;
    loop {
        let bytes = pattern(written, 8192);
        // SAFETY: the bytes are valid for their length.
        let n = unsafe { libc::write(raw(fd), bytes.as_ptr().cast(), bytes.len()) };
        let error = std::io::Error::last_os_error();
        match (n, error.raw_os_error()) {
            // The end of the other side can come in the middle of a call.
            (1.., _) => written += n as usize,
            (-1, Some(libc::EPIPE | libc::ECONNRESET)) => return Ok(written),
            _ => bail!("write: {n}, {error}"),
        }
    }
}

pub fn partner(ending: Ending, address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).context("bind")?;
    say("listening");
    say("connected");
    wait_for_line("enter")?;
    say("ready");
    listener.set_nonblocking(true)?;
    for number in 1.. {
        let stream = loop {
            match listener.accept() {
                Ok((stream, _)) => break stream,
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => return Err(error.into()),
                Err(_) if is_told()? => {
                    // A process may be killed before it has connected.
                    ensure!(number > CONNECTIONS / 2, "only {number} connections");
                    say("ok");
                    return Ok(());
                }
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let fd = OwnedFd::from(stream);
        match ending {
            Ending::Close => {
                let mut length = [0; 8];
                let n = crate::tools::read(&fd, &mut length)?;
                ensure!(n == 8, "{n} bytes of the length");
                receive(&fd, 0, u64::from_le_bytes(length) as usize)?;
                expect_end(&fd)?;
            }
            Ending::Exit | Ending::Kill => reads_on(&fd)?,
            Ending::PartnerKilled => {
                let child = Child::fork(|| reads_on(&fd))?;
                drop(fd);
                std::thread::sleep(life(number));
                drop(child);
            }
        }
    }
    Ok(())
}

/// Until the end, or a reset: a process that ends with bytes unread resets its connections.
fn reads_on(fd: &OwnedFd) -> Result<()> {
    let (mut buffer, mut received) = (vec![0; 1 << 16], 0);
    loop {
        // SAFETY: the buffer is valid for its length.
        let n = unsafe { libc::read(raw(fd), buffer.as_mut_ptr().cast(), buffer.len()) };
        if n < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ECONNRESET) {
            return Ok(());
        }
        let n = sys("read", n as i64)?;
        if n == 0 {
            return Ok(());
        }
        expect_pattern(&buffer[..n], received)?;
        received += n;
    }
}
