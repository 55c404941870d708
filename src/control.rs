// SPDX-License-Identifier: Apache-2.0
//! The unix socket on which the commands find the running router: one JSON request, one JSON answer.

use std::{
    io::{self, Read, Write},
    os::unix::{fs::PermissionsExt, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
};

use forwarder_api::{ConnId, Direction, Refusal};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

use crate::coordinator::{Subject, Wish};

/// The longest request, in bytes: it may name the sockets of a process.
const MAX_REQUEST: u64 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub enum Question {
    Status,
    Flows,
    Explain(Subject),
    Peers,
    /// A stop in the next while leaves connections on the host network; answered by how long, in seconds.
    Leave,
    Swap(ConnId),
    SwapBack(ConnId),
}

/// What came of a move that was ordered.
#[derive(Debug, Serialize, Deserialize)]
pub enum Moved {
    Done {
        pause_us: u64,
    },
    Refused(Refusal),
    /// The router knows no such connection.
    Unknown,
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{path}: {source}; is a router running, and is this its --control?", path = path.display())]
    Unreachable { path: PathBuf, source: io::Error },
    #[error("{path}: {source}; only root may ask the router: run this as root", path = path.display())]
    Forbidden { path: PathBuf, source: io::Error },
    #[error("{path}: another router answers there: stop it, or give another --control", path = path.display())]
    InUse { path: PathBuf },
    #[error("{path}: cannot be listened on: {source}; give another --control", path = path.display())]
    Listen { path: PathBuf, source: io::Error },
    #[error("{path}: the router's answer cannot be read: {source}; are both of the same release?", path = path.display())]
    Answer { path: PathBuf, source: serde_json::Error },
}

/// The socket, there as long as this is.
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ControlSocket {
    /// Refuses while another router answers at `path`; what is left of one that is dead goes.
    pub fn open(path: &Path) -> Result<ControlSocket, ControlError> {
        let wrong = |source| ControlError::Listen { path: path.to_owned(), source };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(wrong)?;
        }
        if StdUnixStream::connect(path).is_ok() {
            return Err(ControlError::InUse { path: path.to_owned() });
        }
        if let Err(error) = std::fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(wrong(error));
        }
        let listener = UnixListener::bind(path).map_err(wrong)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(wrong)?;
        Ok(ControlSocket { listener, path: path.to_owned() })
    }

    /// Answer, for ever.
    pub async fn serve(self, wishes: mpsc::Sender<Wish>) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let wishes = wishes.clone();
                    tokio::spawn(async move {
                        if let Err(error) = answer(stream, &wishes).await {
                            log::debug!("a command was not answered: {error}");
                        }
                    });
                }
                Err(error) => {
                    log::warn!("a command could not be accepted: {error}");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn answer(mut stream: UnixStream, wishes: &mpsc::Sender<Wish>) -> io::Result<()> {
    let mut request = Vec::new();
    (&mut stream).take(MAX_REQUEST).read_to_end(&mut request).await?;
    let answer = match serde_json::from_slice(&request)? {
        Question::Status => serde_json::to_vec(&asked(wishes, Wish::Status).await?)?,
        Question::Flows => serde_json::to_vec(&asked(wishes, Wish::Flows).await?)?,
        Question::Explain(subject) => {
            serde_json::to_vec(&asked(wishes, |answer| Wish::Explain(subject, answer)).await?)?
        }
        Question::Peers => serde_json::to_vec(&asked(wishes, Wish::Peers).await?)?,
        Question::Leave => serde_json::to_vec(&asked(wishes, Wish::Leave).await?.as_secs())?,
        Question::Swap(conn) => serde_json::to_vec(&moved(wishes, conn, Direction::ToHost).await?)?,
        Question::SwapBack(conn) => serde_json::to_vec(&moved(wishes, conn, Direction::ToOverlay).await?)?,
    };
    stream.write_all(&answer).await
}

async fn moved(wishes: &mpsc::Sender<Wish>, conn: ConnId, direction: Direction) -> io::Result<Moved> {
    Ok(match asked(wishes, |answer| Wish::Move(conn, direction, answer)).await? {
        Some(Ok(pause_us)) => Moved::Done { pause_us },
        Some(Err(reason)) => Moved::Refused(reason),
        None => Moved::Unknown,
    })
}

/// Ask the coordinator.
pub async fn asked<T>(
    wishes: &mpsc::Sender<Wish>,
    wish: impl FnOnce(oneshot::Sender<T>) -> Wish,
) -> io::Result<T> {
    let (sender, receiver) = oneshot::channel();
    let stopping = || io::Error::other("the router is stopping");
    wishes.send(wish(sender)).await.map_err(|_| stopping())?;
    receiver.await.map_err(|_| stopping())
}

/// Ask the router at `path`.
pub fn ask<T: DeserializeOwned>(path: &Path, question: &Question) -> Result<T, ControlError> {
    let unreachable = |source: io::Error| match source.kind() {
        io::ErrorKind::PermissionDenied => ControlError::Forbidden { path: path.to_owned(), source },
        _ => ControlError::Unreachable { path: path.to_owned(), source },
    };
    let mut stream = StdUnixStream::connect(path).map_err(unreachable)?;
    let request = serde_json::to_vec(question).map_err(|error| unreachable(error.into()))?;
    stream.write_all(&request).map_err(unreachable)?;
    stream.shutdown(std::net::Shutdown::Write).map_err(unreachable)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).map_err(unreachable)?;
    serde_json::from_slice(&answer).map_err(|source| ControlError::Answer { path: path.to_owned(), source })
}
