//! Where clients come in: sockets, and how many connections may be open.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream, lookup_host};
use tokio_util::sync::CancellationToken;

use crate::stream::{Detached, Stream};
pub use doors::{Doors, Sockets};
pub use limits::{Admission, ConnectionPermit, Limits, UserPermit};

mod doors;
mod limits;

/// Connections that the kernel keeps for us while we are busy.
const BACKLOG: u32 = 4096;
/// Pause when no connection can be taken (no file descriptors): retrying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A client's connection before its first byte.
#[derive(Debug)]
pub struct Incoming<S = Stream> {
    /// The connection.
    pub stream: S,
    /// Its address for people.
    pub peer: String,
    /// Its place among all connections.
    pub admission: Admission,
}

impl Incoming {
    /// Makes it ready to go to another thread.
    ///
    /// # Errors
    ///
    /// See [`Detached::new`].
    pub fn detach(self) -> io::Result<Incoming<Detached>> {
        Ok(Incoming {
            stream: Detached::new(self.stream)?,
            peer: self.peer,
            admission: self.admission,
        })
    }
}

impl Incoming<Detached> {
    /// Settles it on the runtime that this runs on.
    ///
    /// # Errors
    ///
    /// See [`Detached::attach`].
    pub fn attach(self) -> io::Result<Incoming> {
        Ok(Incoming {
            stream: self.stream.attach()?,
            peer: self.peer,
            admission: self.admission,
        })
    }
}

/// A socket that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Somebody else listens there.
    #[error("could not listen on {address}: it is already in use")]
    InUse {
        /// The address or path.
        address: String,
        /// What to do about it.
        hint: String,
    },
    /// Something else.
    #[error("could not listen on {address}: {source}")]
    Io {
        /// The address or path.
        address: String,
        /// What happened.
        source: io::Error,
    },
}

impl BindError {
    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::InUse { hint, .. } => Some(hint),
            Self::Io { .. } => None,
        }
    }

    fn new(address: String, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::AddrInUse {
            let port = address.rsplit(['.', ':']).next().unwrap_or_default();
            let hint = format!(
                "is another proxy or a PostgreSQL server running on port {port}? stop it, or \
                 set another listen_address"
            );
            Self::InUse { address, hint }
        } else {
            Self::Io { address, source }
        }
    }
}

/// Sockets on which clients are taken.
#[derive(Debug)]
pub struct Listener {
    tcp: Vec<TcpListener>,
    unix: Option<UnixSocket>,
    port: u16,
    doors: Arc<Doors>,
}

/// A Unix socket, removed on drop unless it is another process's by then.
#[derive(Debug)]
struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
    doors: Arc<Doors>,
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if !self.doors.are_left() {
            // When it is gone already there is nothing to do.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens on all addresses of `host` (`*` for every one) and, in the folder `unix_dir`, on
    /// `.s.PGSQL.<port>`. Port 0 takes a free one.
    ///
    /// # Errors
    ///
    /// A socket cannot be had.
    pub async fn bind(host: &str, port: u16, unix_dir: Option<&Path>) -> Result<Self, BindError> {
        let named = format!("{host}:{port}");
        let addresses: Vec<SocketAddr> = if host == "*" {
            every_address(port)
        } else {
            let found = lookup_host((host, port)).await;
            found.map_err(|e| BindError::new(named, e))?.collect()
        };
        let mut chosen = port;
        let mut tcp = Vec::with_capacity(addresses.len());
        for mut address in addresses {
            address.set_port(chosen);
            let listener = match bind_tcp(address) {
                // `*` on a machine without IPv6.
                Err(_) if host == "*" && address.is_ipv6() => continue,
                bound => bound.map_err(|e| BindError::new(address.to_string(), e))?,
            };
            if let Ok(bound) = listener.local_addr() {
                chosen = bound.port();
            }
            tcp.push(listener);
        }
        let doors = Arc::new(Doors::new(true));
        let unix = match unix_dir {
            Some(dir) => Some(bind_unix(dir, chosen, &doors).await?),
            None => None,
        };
        Ok(Self {
            tcp,
            unix,
            port: chosen,
            doors,
        })
    }

    /// Goes on with the sockets of another process, behind closed doors.
    ///
    /// # Errors
    ///
    /// They are no such sockets.
    pub fn received(sockets: Sockets, port: u16) -> io::Result<Self> {
        let Sockets { tcp, unix } = sockets;
        let doors = Arc::new(Doors::new(false));
        // As long as they are closed the path is the other process's too.
        doors.leave(true);
        let of_tcp = |socket| {
            let listener = std::net::TcpListener::from(socket);
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        let of_unix = |(socket, path)| {
            let listener = std::os::unix::net::UnixListener::from(socket);
            listener.set_nonblocking(true)?;
            io::Result::Ok(UnixSocket {
                listener: UnixListener::from_std(listener)?,
                path,
                doors: Arc::clone(&doors),
            })
        };
        Ok(Self {
            tcp: tcp.into_iter().map(of_tcp).collect::<io::Result<_>>()?,
            unix: unix.map(of_unix).transpose()?,
            port,
            doors,
        })
    }

    /// Copies of its sockets.
    ///
    /// # Errors
    ///
    /// There are no more descriptors.
    pub fn sockets(&self) -> io::Result<Sockets> {
        let tcp = self.tcp.iter().map(|l| l.as_fd().try_clone_to_owned());
        let copy = |u: &UnixSocket| {
            let socket = u.listener.as_fd().try_clone_to_owned()?;
            io::Result::Ok((socket, u.path.clone()))
        };
        Ok(Sockets {
            tcp: tcp.collect::<io::Result<_>>()?,
            unix: self.unix.as_ref().map(copy).transpose()?,
        })
    }

    /// Opens and closes it.
    #[must_use]
    pub fn doors(&self) -> Arc<Doors> {
        Arc::clone(&self.doors)
    }

    /// The port that clients use.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Takes clients until `stop`, and hands each to `on_client`, which must not block. The
    /// sockets are closed when this returns.
    pub async fn run(
        self,
        limits: Arc<Limits>,
        stop: CancellationToken,
        mut on_client: impl FnMut(Incoming),
    ) {
        let mut doors = self.doors.watch();
        loop {
            if !*doors.borrow_and_update() {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = doors.changed() => continue,
                }
            }
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                _ = doors.changed() => continue,
                accepted = std::future::poll_fn(|cx| self.poll_accept(cx)) => accepted,
            };
            let stream = match accepted {
                Ok(stream) => stream,
                Err(error) if is_clients_fault(&error) => continue,
                Err(error) => {
                    tracing::warn!(%error, "could not take a connection");
                    tokio::select! {
                        () = stop.cancelled() => return,
                        () = tokio::time::sleep(ACCEPT_PAUSE) => continue,
                    }
                }
            };
            let peer = stream.peer();
            match limits.admit() {
                // Too many even to be told so.
                None => tracing::warn!(peer, "too many connections: closed without an answer"),
                Some(admission) => on_client(Incoming {
                    stream,
                    peer,
                    admission,
                }),
            }
        }
    }

    fn poll_accept(&self, cx: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<Stream>> {
        use std::task::Poll;
        for listener in &self.tcp {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                return Poll::Ready(accepted.and_then(|(socket, _)| Stream::tcp(socket)));
            }
        }
        if let Some(unix) = &self.unix
            && let Poll::Ready(accepted) = unix.listener.poll_accept(cx)
        {
            return Poll::Ready(accepted.map(|(socket, _)| Stream::Unix(socket)));
        }
        Poll::Pending
    }
}

/// The connection broke before it was taken; the next one may be good.
fn is_clients_fault(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionAborted
            | Kind::ConnectionReset
            | Kind::ConnectionRefused
            | Kind::NotConnected
            | Kind::InvalidInput
    )
}

fn every_address(port: u16) -> Vec<SocketAddr> {
    vec![
        SocketAddr::from(([0, 0, 0, 0], port)),
        SocketAddr::from(([0_u16; 8], port)),
    ]
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        tokio::net::TcpSocket::new_v4()?
    } else {
        let socket = tokio::net::TcpSocket::new_v6()?;
        // IPv4 has a socket of its own.
        socket2::SockRef::from(&socket).set_only_v6(true)?;
        socket
    };
    // Or a restart would have to wait for the old connections' TIME_WAIT.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn bind_unix(dir: &Path, port: u16, doors: &Arc<Doors>) -> Result<UnixSocket, BindError> {
    let path = dir.join(format!(".s.PGSQL.{port}"));
    let named = || path.display().to_string();
    let listener = match UnixListener::bind(&path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            // A file that nobody listens on is left over from a crash.
            match UnixStream::connect(&path).await {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    std::fs::remove_file(&path).map_err(|e| BindError::new(named(), e))?;
                    UnixListener::bind(&path)
                }
                _ => Err(e),
            }
        }
        bound => bound,
    };
    let listener = listener.map_err(|e| BindError::new(named(), e))?;
    // As PostgreSQL's (unix_socket_permissions): who may log in is the authentication's business.
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(&path, open).map_err(|e| BindError::new(named(), e))?;
    Ok(UnixSocket {
        listener,
        path,
        doors: Arc::clone(doors),
    })
}
