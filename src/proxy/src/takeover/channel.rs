//! Messages and file descriptors between two processes of a proxy, over a Unix socket.
//!
//! A message is eight bytes (the length of its text, the number of its descriptors, both
//! big-endian) and JSON; descriptors come with the eight bytes (`SCM_RIGHTS`, unix(7)). The
//! invariant: a message is taken whole, with all its descriptors, or not at all; lengths are
//! checked before memory is taken.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Longest text of a message; a session that needs more stays where it is.
pub const MAX_TEXT: usize = 64 << 20;

/// Most descriptors of one message.
pub const MAX_SOCKETS: usize = 32;

/// How long the other process may take to take a message.
const SEND: Duration = Duration::from_secs(5);

const HEAD: usize = 8;

/// The sending side.
#[derive(Debug)]
pub struct Sender(OwnedWriteHalf);

/// The receiving side.
#[derive(Debug)]
pub struct Receiver(OwnedReadHalf);

/// Both sides of a connection to another process.
#[must_use]
pub fn channel(stream: UnixStream) -> (Sender, Receiver) {
    let (read, write) = stream.into_split();
    (Sender(write), Receiver(read))
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

impl Sender {
    /// Sends a message with copies of these descriptors.
    ///
    /// # Errors
    /// The other process is gone, does not read, or wants no more; the message is over a limit.
    pub async fn send(
        &mut self,
        message: &impl Serialize,
        sockets: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message).map_err(invalid)?;
        if text.len() > MAX_TEXT || sockets.len() > MAX_SOCKETS {
            return Err(invalid("message is over the limit"));
        }
        let sending = self.send_text(&text, sockets);
        tokio::time::timeout(SEND, sending)
            .await
            .map_err(|_| ErrorKind::TimedOut)?
    }

    async fn send_text(&mut self, text: &[u8], sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        let length = u32::try_from(text.len()).map_err(invalid)?;
        let count = u32::try_from(sockets.len()).map_err(invalid)?;
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&length.to_be_bytes());
        head[4..].copy_from_slice(&count.to_be_bytes());
        let stream: &UnixStream = self.0.as_ref();
        let write = || send_head(stream, &head, sockets);
        let sent = stream.async_io(Interest::WRITABLE, write).await?;
        if sent != HEAD {
            // Eight bytes are taken whole, or not at all.
            return Err(ErrorKind::WriteZero.into());
        }
        self.0.write_all(text).await?;
        self.0.flush().await
    }

    /// From now on nothing that the other process sends arrives: it is told so when it tries. What
    /// it has sent before can still be received, and then the end.
    ///
    /// # Errors
    /// The socket's.
    pub fn refuse_more(&self) -> io::Result<()> {
        let stream: &UnixStream = self.0.as_ref();
        Ok(rustix::net::shutdown(stream, Shutdown::Read)?)
    }
}

fn send_head(stream: &UnixStream, head: &[u8], sockets: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut with = SendAncillaryBuffer::new(&mut space);
    if !sockets.is_empty() && !with.push(SendAncillaryMessage::ScmRights(sockets)) {
        return Err(invalid("too many descriptors"));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(
        stream,
        &[IoSlice::new(head)],
        &mut with,
        flags,
    )?)
}

impl Receiver {
    /// The next message with its descriptors; `None` at the end. Not to be dropped half-way.
    ///
    /// # Errors
    /// The socket's, or what comes is no such message.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut head = [0; HEAD];
        let mut sockets = Vec::new();
        let mut have = 0;
        while have < HEAD {
            let stream: &UnixStream = self.0.as_ref();
            let read = || receive_head(stream, &mut head[have..], &mut sockets);
            match stream.async_io(Interest::READABLE, read).await? {
                0 if have == 0 => return Ok(None),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => have += n,
            }
        }
        let [l0, l1, l2, l3, c0, c1, c2, c3] = head;
        let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
        if length > MAX_TEXT {
            return Err(invalid("message is over the limit"));
        }
        if u32::from_be_bytes([c0, c1, c2, c3]) as usize != sockets.len() {
            return Err(invalid("descriptors are missing"));
        }
        let mut text = vec![0; length];
        self.0.read_exact(&mut text).await?;
        let message = serde_json::from_slice(&text).map_err(invalid)?;
        Ok(Some((message, sockets)))
    }
}

fn receive_head(
    stream: &UnixStream,
    head: &mut [u8],
    sockets: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    let mut with = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(head)], &mut with, flags)?;
    for message in with.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            sockets.extend(received);
        }
    }
    Ok(got.bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;

    fn pair() -> ((Sender, Receiver), (Sender, Receiver)) {
        let (a, b) = UnixStream::pair().unwrap();
        (channel(a), channel(b))
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_messages() {
        let ((mut to, _back), (_to, mut from)) = pair();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        to.send(&"first", &[]).await.unwrap();
        to.send(&"second", &[ours.as_fd(), ours.as_fd()])
            .await
            .unwrap();
        to.send(&"third", &[ours.as_fd()]).await.unwrap();
        drop((ours, to));
        let mut got = Vec::new();
        while let Some((text, sockets)) = from.receive::<String>().await.unwrap() {
            got.push((text, sockets));
        }
        let counts: Vec<_> = got.iter().map(|(t, s)| (t.as_str(), s.len())).collect();
        assert_eq!(counts, [("first", 0), ("second", 2), ("third", 1)]);
        let (_, mut sockets) = got.pop().unwrap();
        let mut sent = std::os::unix::net::UnixStream::from(sockets.pop().unwrap());
        sent.write_all(b"x").unwrap();
        let mut byte = [0];
        theirs.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
    }

    #[tokio::test]
    async fn a_large_message_and_one_over_the_limit() {
        let ((mut to, _back), (_to, mut from)) = pair();
        let large = "x".repeat(3 << 20);
        let (sent, got) = tokio::join!(to.send(&large, &[]), from.receive::<String>());
        sent.unwrap();
        assert_eq!(got.unwrap().unwrap().0, large);
        let over = "x".repeat(MAX_TEXT);
        assert!(to.send(&over, &[]).await.is_err());
    }

    #[tokio::test]
    async fn what_was_sent_in_time_counts_and_nothing_behind_it() {
        let ((ours, mut from), (mut theirs, _from)) = pair();
        theirs.send(&"in time", &[]).await.unwrap();
        ours.refuse_more().unwrap();
        let late = theirs.send(&"late", &[]).await.unwrap_err();
        assert_eq!(late.kind(), ErrorKind::BrokenPipe);
        let got = from.receive::<String>().await.unwrap();
        assert_eq!(got.unwrap().0, "in time");
        assert!(from.receive::<String>().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn half_a_message_is_none() {
        let ((to, _back), (_to, mut from)) = pair();
        let Sender(mut raw) = to;
        raw.write_all(&[0, 0, 0, 9, 0, 0, 0, 0, b'"'])
            .await
            .unwrap();
        drop(raw);
        let error = from.receive::<String>().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn nothing_is_taken_for_a_message_that_is_none() {
        for head in [[0xff; HEAD], [0, 0, 0, 2, 0, 0, 0, 1]] {
            let ((to, _back), (_to, mut from)) = pair();
            let Sender(mut raw) = to;
            raw.write_all(&head).await.unwrap();
            raw.write_all(b"{}").await.unwrap();
            let error = from.receive::<serde_json::Value>().await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidData);
        }
    }
}
