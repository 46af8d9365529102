//! Whole messages over a stream, for logins and service queries: off the forwarding path.

use std::io;

use bytes::{Bytes, BytesMut};
use helios_wire::{FrameError, peek_header};
use tokio::io::AsyncWriteExt as _;

use crate::stream::Stream;

/// Bytes that one read may bring here; messages of a login are short.
const READ: usize = 2048;

/// A stream with the bytes that were read from it and not taken yet.
#[derive(Debug)]
pub(crate) struct Framed {
    pub(crate) stream: Stream,
    pub(crate) buf: BytesMut,
    /// What is to be sent with the next [`Framed::flush`].
    pub(crate) out: BytesMut,
}

/// Why there is no next message.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("message type \"{}\" of {len} bytes is too long here", tag.escape_ascii())]
    TooLong { tag: u8, len: usize },
}

impl Framed {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            buf: BytesMut::new(),
            out: BytesMut::new(),
        }
    }

    /// The next frame, header included, of at most `limit` bytes.
    pub(crate) async fn read(&mut self, limit: usize) -> Result<(u8, Bytes), ReadError> {
        loop {
            if let Some(header) = peek_header(&self.buf)? {
                let (tag, len) = (header.tag, header.len);
                if len > limit {
                    return Err(ReadError::TooLong { tag, len });
                }
                if self.buf.len() >= len {
                    return Ok((tag, self.buf.split_to(len).freeze()));
                }
            }
            if self.stream.fill(&mut self.buf, READ).await? == 0 {
                return Err(closed().into());
            }
        }
    }

    /// Sends what `out` holds.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        let out = std::mem::take(&mut self.out);
        self.stream.write_all(&out).await?;
        self.stream.flush().await
    }

    /// The stream and what was read behind the last message; no memory when that is nothing.
    pub(crate) fn into_parts(self) -> (Stream, BytesMut) {
        let buf = if self.buf.is_empty() {
            BytesMut::new()
        } else {
            self.buf
        };
        (self.stream, buf)
    }
}

/// The peer ended the connection in the middle of something.
pub(crate) fn closed() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the connection was closed unexpectedly",
    )
}
