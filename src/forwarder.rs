// SPDX-License-Identifier: Apache-2.0
//! The router's side of the forwarder's unix socket.

use std::{
    io::{self, IoSlice},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};

use forwarder_api::{Event, Frame, FrameError, Request, VERSION};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
};

use crate::lanes::{self, Urgent};

type Reader = BufReader<OwnedReadHalf>;

const RETRY: Duration = Duration::from_millis(200);

/// A request, and the descriptors that go with it. They are closed here once sent: a copy that stays would hide that
/// a host socket was closed.
pub type Sent = (Request, Vec<OwnedFd>);

/// What comes from the forwarder.
pub enum ForwarderEvent {
    Up { pid: u32, requests: mpsc::UnboundedSender<Sent> },
    Down,
    Said(Event),
}

impl Urgent for ForwarderEvent {
    /// What it says to the other end, it says from a move. It says so only when it was told to move, and not again before it is
    /// told anew, so that nothing which must come first can be overtaken.
    fn is_urgent(&self) -> bool {
        matches!(self, ForwarderEvent::Said(Event::ToPeer { .. }))
    }
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("it sent something else than a frame: {0}")]
    Frame(#[from] FrameError),
    #[error(
        "it speaks version {received} of the forwarder's protocol, version {VERSION} expected: use a router and a forwarder of the same release"
    )]
    Version { received: u32 },
    #[error("it said something else than Hello first")]
    NoHello,
    #[error(
        "it has closed the connection: it has ended, or another router has taken this one's place (its log says so)"
    )]
    Closed,
}

/// Keep in touch with the forwarder, for ever.
pub async fn reach(path: PathBuf, events: lanes::Sender<ForwarderEvent>) {
    let mut complained = false;
    loop {
        match connect(&path).await {
            Ok((reader, writer, pid)) => {
                complained = false;
                log::info!("the forwarder (process {pid}) is reached at {}", path.display());
                let (requests, queue) = mpsc::unbounded_channel();
                if events.send(ForwarderEvent::Up { pid, requests }).await.is_err() {
                    return;
                }
                let error = tokio::select! {
                    Err(error) = listen(reader, &events) => error,
                    Err(error) = speak(writer, queue) => error,
                    else => return,
                };
                log::warn!("the forwarder is lost: {error}");
                if events.send(ForwarderEvent::Down).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                let level = if complained { log::Level::Debug } else { log::Level::Warn };
                log::log!(
                    level,
                    "no forwarder at {}: {error}; nothing is swapped until one is there",
                    path.display()
                );
                complained = true;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn connect(path: &Path) -> Result<(Reader, OwnedWriteHalf, u32), LinkError> {
    let (reader, mut writer) = UnixStream::connect(path).await?.into_split();
    let mut reader = BufReader::new(reader);
    writer.write_all(&Frame::encode(&Request::Hello { version: VERSION })?).await?;
    match next(&mut reader).await? {
        Event::Hello { version: VERSION, pid } => Ok((reader, writer, pid)),
        Event::Hello { version, .. } => Err(LinkError::Version { received: version }),
        _ => Err(LinkError::NoHello),
    }
}

async fn listen(mut reader: Reader, events: &lanes::Sender<ForwarderEvent>) -> Result<(), LinkError> {
    loop {
        let event = next(&mut reader).await?;
        if events.send(ForwarderEvent::Said(event)).await.is_err() {
            return Ok(());
        }
    }
}

async fn next(reader: &mut Reader) -> Result<Event, LinkError> {
    let mut head = [0; 4];
    reader.read_exact(&mut head).await.map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => LinkError::Closed,
        _ => LinkError::Io(error),
    })?;
    let mut body = vec![0; Frame::body_length(head)?];
    reader.read_exact(&mut body).await?;
    Ok(Frame::decode(&body)?)
}

async fn speak(
    mut writer: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Sent>,
) -> Result<(), LinkError> {
    while let Some((request, fds)) = queue.recv().await {
        let frame = Frame::encode(&request)?;
        let sent = send_with(&writer, &frame, &fds).await?;
        drop(fds);
        writer.write_all(&frame[sent..]).await?;
    }
    Ok(())
}

/// Send the descriptors with as much of the frame as goes at once.
async fn send_with(writer: &OwnedWriteHalf, frame: &[u8], fds: &[OwnedFd]) -> io::Result<usize> {
    if fds.is_empty() {
        return Ok(0);
    }
    let stream: &UnixStream = writer.as_ref();
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let send = || {
        let control = [ControlMessage::ScmRights(&raw)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(frame)], &control, flags, None)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}
