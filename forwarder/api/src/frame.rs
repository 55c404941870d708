// SPDX-License-Identifier: Apache-2.0
//! Frames on the unix socket: a little-endian `u32` length, then that many bytes of postcard.

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_UNREAD_BYTES;

/// The longest frame body, in bytes: a `FromPeer` with all the unread bytes allowed, and room for its head.
pub const MAX_FRAME: usize = MAX_UNREAD_BYTES + (1 << 20);

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("frame of {length} bytes, at most {MAX_FRAME} expected")]
    TooLong { length: usize },
    #[error("frame body of {length} bytes cannot be decoded: {source}")]
    Malformed { length: usize, source: postcard::Error },
}

/// A message as it goes over the socket, and back.
pub struct Frame;

impl Frame {
    /// Length and body of `message`.
    pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
        let body =
            postcard::to_stdvec(message).map_err(|source| FrameError::Malformed { length: 0, source })?;
        if body.len() > MAX_FRAME {
            return Err(FrameError::TooLong { length: body.len() });
        }
        let mut frame = Vec::with_capacity(4 + body.len());
        frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
        frame.extend_from_slice(&body);
        Ok(frame)
    }

    /// The body length that a frame's first four bytes announce.
    pub fn body_length(head: [u8; 4]) -> Result<usize, FrameError> {
        let length = u32::from_le_bytes(head) as usize;
        if length > MAX_FRAME { Err(FrameError::TooLong { length }) } else { Ok(length) }
    }

    /// The message in a frame's body.
    pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
        postcard::from_bytes(body).map_err(|source| FrameError::Malformed { length: body.len(), source })
    }
}
