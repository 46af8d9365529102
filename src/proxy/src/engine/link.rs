//! One socket with its two bounded buffers.
//!
//! Bytes read wait in `input` until they are processed, bytes to write in `output`. The invariant:
//! both are bounded; who fills `output` over its mark stops reading from the other side.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BytesMut};
use tokio::io::AsyncWrite;

use crate::stream::Stream;

/// Most bytes read at once, and what a read buffer holds before a large message is streamed.
pub const READ: usize = 64 * 1024;

/// Room that an empty buffer keeps while its session is idle.
const KEEP: usize = 1024;

/// Bytes from which handing a part of a buffer over is worth more than copying it.
const WORTH_SPLITTING: usize = 16 * 1024;

/// Bytes of output over which the other side is not read.
pub const HIGH_WATER: usize = 256 * 1024;

/// A message up to this size is held until it is complete; a larger row or copy message is passed
/// on as it comes.
pub const WHOLE: usize = 1024 * 1024;

/// A socket with its buffers.
#[derive(Debug)]
pub struct Link {
    /// The socket.
    pub stream: Stream,
    /// Read and not yet processed.
    pub input: BytesMut,
    /// To be written.
    pub output: BytesMut,
    /// Bytes of a large message that are still to come and go through unlooked.
    pub passing: usize,
    /// The peer has closed its side.
    pub ended: bool,
    /// Parameters that the peer, a server, has reported.
    pub parameters: BTreeMap<String, String>,
}

impl Link {
    /// A link over `stream`, with bytes that were already read.
    #[must_use]
    pub fn new(stream: Stream, input: BytesMut) -> Self {
        Self {
            stream,
            input,
            output: BytesMut::new(),
            passing: 0,
            ended: false,
            parameters: BTreeMap::new(),
        }
    }

    /// Reads what is there. Ready when something came, the peer closed (`ended`), or it failed.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.stream.poll_fill(cx, &mut self.input, READ) {
            Poll::Ready(Ok(0)) => {
                self.ended = true;
                Poll::Ready(Ok(()))
            }
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => Poll::Pending,
        }
    }

    /// Writes what it can. Ready when all is written.
    ///
    /// # Errors
    /// The socket's.
    pub fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            match Pin::new(&mut self.stream).poll_write(cx, &self.output) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => consume(&mut self.output, n),
                Poll::Ready(Err(e)) => return Poll::Ready(Err(e)),
                Poll::Pending => return Poll::Pending,
            }
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    /// Writes all of the output.
    ///
    /// # Errors
    /// The socket's.
    pub async fn flush(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_write(cx)).await
    }

    /// Reads more input; `Ok(false)` at the end.
    ///
    /// # Errors
    /// The socket's.
    pub async fn read_more(&mut self) -> io::Result<bool> {
        std::future::poll_fn(|cx| self.poll_read(cx)).await?;
        Ok(!self.ended)
    }

    /// Moves `n` bytes of input to `to`, the output of another link, without a copy where that is
    /// possible.
    pub fn forward(&mut self, n: usize, to: &mut BytesMut) {
        if n == 0 {
            return;
        }
        if to.is_empty() && n == self.input.len() {
            // The buffers change places: in the steady state neither is ever allocated.
            to.clear();
            std::mem::swap(&mut self.input, to);
        } else if to.is_empty() && n >= WORTH_SPLITTING {
            let rest = self.input.split_off(n);
            *to = std::mem::replace(&mut self.input, rest);
        } else {
            to.extend_from_slice(&self.input[..n]);
            consume(&mut self.input, n);
        }
    }

    /// Drops the first `n` bytes of input.
    pub fn skip(&mut self, n: usize) {
        consume(&mut self.input, n);
    }

    /// The session is idle: gives back the memory of large buffers that are empty.
    pub fn release(&mut self) {
        for buffer in [&mut self.input, &mut self.output] {
            if buffer.is_empty() && buffer.capacity() > KEEP {
                *buffer = BytesMut::new();
            }
        }
    }
}

/// Drops the first `n` bytes; room of an emptied buffer is kept.
fn consume(buffer: &mut BytesMut, n: usize) {
    if n == buffer.len() {
        buffer.clear();
    } else {
        buffer.advance(n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn link(input: &[u8]) -> Link {
        let (ours, _) = tokio::net::UnixStream::pair().unwrap();
        Link::new(Stream::Unix(ours), BytesMut::from(input))
    }

    #[tokio::test]
    async fn bytes_are_forwarded_in_order_however_they_move() {
        let all: Vec<u8> = (0..60_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        // Whole, a large part, a small part; to an empty and to a filled output.
        for n in [60_000, 50_000, 10, 0] {
            for before in [&b""[..], b"before"] {
                let mut from = link(&all).await;
                let mut to = BytesMut::from(before);
                from.forward(n, &mut to);
                assert_eq!(to, [before, &all[..n]].concat());
                assert_eq!(from.input, &all[n..]);
                from.input.extend_from_slice(b"later");
                from.skip(all.len() - n);
                assert_eq!(&from.input[..], b"later");
            }
        }
    }

    #[tokio::test]
    async fn idle_links_hold_little() {
        let mut link = link(&[7; 50_000]).await;
        link.release();
        assert_eq!(link.input.len(), 50_000, "what is to be processed stays");
        let mut to = BytesMut::new();
        link.forward(50_000, &mut to);
        link.output.reserve(50_000);
        link.release();
        assert!(link.input.capacity() <= KEEP && link.output.capacity() <= KEEP);
    }
}
