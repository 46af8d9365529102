//! A connection's byte stream, whatever it runs over.
//!
//! An enum by hand: no dynamic dispatch on the forwarding path. TLS states are boxed, so that the
//! thousands of plain sessions do not pay for their size. An idle stream holds no read buffer of
//! its own: [`Stream::poll_fill`] reads into the thread's, and takes memory only for what came.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

/// Bytes that one read may bring.
const SCRATCH: usize = 64 * 1024;

thread_local! {
    /// All reads of a thread go through this before a session's buffer grows. Much larger than most
    /// of what comes: a read that does not fill it tells tokio that the socket is empty, which
    /// saves the second read that would only be told so.
    static SCRATCH_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// A client's or a server's connection.
pub enum Stream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS, we are the server.
    TlsServer(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    /// TLS, we are the client.
    TlsClient(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

/// Calls the same poll function on whichever stream it is.
macro_rules! poll_inner {
    ($self:expr, $method:ident, $($arg:expr),*) => {
        match $self.get_mut() {
            Stream::Tcp(s) => Pin::new(s).$method($($arg),*),
            Stream::Unix(s) => Pin::new(s).$method($($arg),*),
            Stream::TlsServer(s) => Pin::new(&mut **s).$method($($arg),*),
            Stream::TlsClient(s) => Pin::new(&mut **s).$method($($arg),*),
        }
    };
}

impl Stream {
    /// Takes a TCP connection: no delay of small messages, dead peers noticed by keep-alives.
    ///
    /// # Errors
    ///
    /// The kernel refuses an option; the connection is gone.
    pub fn tcp(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(30))
            .with_interval(Duration::from_secs(10))
            .with_retries(3);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        Ok(Self::Tcp(socket))
    }

    /// Whether the bytes are encrypted on the way.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        matches!(self, Self::TlsServer(_) | Self::TlsClient(_))
    }

    /// The peer's address for people: `10.0.0.7:51234`, or `[local]` as PostgreSQL calls it.
    #[must_use]
    pub fn peer(&self) -> String {
        let address = match self {
            Self::Tcp(s) => s.peer_addr(),
            Self::TlsServer(s) => s.get_ref().0.peer_addr(),
            Self::TlsClient(s) => s.get_ref().0.peer_addr(),
            Self::Unix(_) => return "[local]".to_owned(),
        };
        address.map_or_else(|_| "[gone]".to_owned(), |a| a.to_string())
    }

    /// Reads what is there, at most about `limit` bytes, and appends it to `buf`; `Ok(0)` is the
    /// end. Memory is taken only when bytes have come.
    ///
    /// # Errors
    ///
    /// The connection failed.
    pub fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut BytesMut,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let room = limit.clamp(1, scratch.len());
            let mut read = ReadBuf::new(&mut scratch[..room]);
            ready!(Pin::new(self).poll_read(cx, &mut read))?;
            buf.extend_from_slice(read.filled());
            Poll::Ready(Ok(read.filled().len()))
        })
    }

    /// [`Stream::poll_fill`] as a future. Safe to drop: nothing read is lost.
    ///
    /// # Errors
    ///
    /// The connection failed.
    pub async fn fill(&mut self, buf: &mut BytesMut, limit: usize) -> io::Result<usize> {
        std::future::poll_fn(|cx| self.poll_fill(cx, buf, limit)).await
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        poll_inner!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        poll_inner!(self, poll_write, cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_inner!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        poll_inner!(self, poll_shutdown, cx)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        poll_inner!(self, poll_write_vectored, cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(s) => s.is_write_vectored(),
            Self::Unix(s) => s.is_write_vectored(),
            Self::TlsServer(s) => s.is_write_vectored(),
            Self::TlsClient(s) => s.is_write_vectored(),
        }
    }
}

/// What a plain connection runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// TCP.
    Tcp,
    /// A Unix socket.
    Unix,
}

impl Stream {
    /// The connection's socket, where another process could go on with it: what TLS knows of a
    /// connection is in this process alone.
    #[must_use]
    pub fn plain(&self) -> Option<(Kind, BorrowedFd<'_>)> {
        match self {
            Self::Tcp(s) => Some((Kind::Tcp, s.as_fd())),
            Self::Unix(s) => Some((Kind::Unix, s.as_fd())),
            Self::TlsServer(_) | Self::TlsClient(_) => None,
        }
    }
}

/// A stream that belongs to no runtime: on its way from one thread, or process, to another.
#[derive(Debug)]
pub struct Detached(Socket);

#[derive(Debug)]
enum Socket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

impl Detached {
    /// Takes a socket from this runtime's poller.
    ///
    /// # Errors
    ///
    /// The poller does not let it go; or TLS runs over it already.
    pub fn new(stream: Stream) -> io::Result<Self> {
        match stream {
            Stream::Tcp(s) => s.into_std().map(Socket::Tcp).map(Self),
            Stream::Unix(s) => s.into_std().map(Socket::Unix).map(Self),
            Stream::TlsServer(_) | Stream::TlsClient(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// A socket that another process has given away.
    ///
    /// # Errors
    ///
    /// The kernel does not take it for one that never blocks.
    pub fn received(kind: Kind, socket: OwnedFd) -> io::Result<Self> {
        let socket = match kind {
            Kind::Tcp => Socket::Tcp(socket.into()),
            Kind::Unix => Socket::Unix(socket.into()),
        };
        match &socket {
            Socket::Tcp(s) => s.set_nonblocking(true)?,
            Socket::Unix(s) => s.set_nonblocking(true)?,
        }
        Ok(Self(socket))
    }

    /// Gives it to the poller of the runtime that this runs on.
    ///
    /// # Errors
    ///
    /// The poller does not take it.
    pub fn attach(self) -> io::Result<Stream> {
        match self.0 {
            Socket::Tcp(s) => TcpStream::from_std(s).map(Stream::Tcp),
            Socket::Unix(s) => UnixStream::from_std(s).map(Stream::Unix),
        }
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Tcp(_) => "tcp",
            Self::Unix(_) => "unix",
            Self::TlsServer(_) => "tls server",
            Self::TlsClient(_) => "tls client",
        };
        write!(f, "Stream({kind} {})", self.peer())
    }
}
