//! The socket to a server, with TLS as the mode asks for it.

use std::io;

use bytes::BytesMut;
use helios_api::{Endpoint, Host};
use helios_wire::startup::ssl_request;
use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use super::BackendError;
use crate::framed::closed;
use crate::stream::Stream;
use crate::tls::{BackendTls, SslMode, end_point_hash};

/// A connection before the start-up packet.
pub(super) struct Opened {
    pub(super) stream: Stream,
    /// Hash of the server's certificate, for channel binding.
    pub(super) end_point: Option<Vec<u8>>,
}

pub(super) async fn open(endpoint: &Endpoint, tls: &BackendTls) -> Result<Opened, BackendError> {
    let io = |source| BackendError::io(endpoint, source);
    let host = match &endpoint.host {
        Host::Unix(dir) => {
            let path = dir.join(format!(".s.PGSQL.{}", endpoint.port));
            let socket = UnixStream::connect(path).await.map_err(io)?;
            return Ok(plain(Stream::Unix(socket)));
        }
        Host::Tcp(host) => host.as_str(),
    };
    let connect = || async {
        let socket = TcpStream::connect((host, endpoint.port)).await?;
        socket.set_nodelay(true)?;
        io::Result::Ok(socket)
    };
    let socket = connect().await.map_err(io)?;
    let Some(config) = tls.config() else {
        return Stream::tcp(socket).map(plain).map_err(io);
    };
    let mut stream = Stream::tcp(socket).map_err(io)?;
    if !offers_tls(&mut stream).await.map_err(io)? {
        return if tls.mode() == SslMode::Prefer {
            Ok(plain(stream))
        } else {
            Err(BackendError::protocol(
                endpoint,
                "it does not support TLS, but sslmode requires it",
            ))
        };
    }
    let Stream::Tcp(socket) = stream else {
        return Err(BackendError::protocol(endpoint, "not a TCP connection"));
    };
    let name = server_name(host, tls.mode()).map_err(io)?;
    match TlsConnector::from(config).connect(name, socket).await {
        Ok(session) => {
            let chain = session.get_ref().1.peer_certificates();
            let end_point = chain
                .and_then(|c| c.first())
                .and_then(|c| end_point_hash(c));
            let stream = Stream::TlsClient(Box::new(session));
            Ok(Opened { stream, end_point })
        }
        // As libpq: what is only preferred may fail.
        Err(_) if tls.mode() == SslMode::Prefer => {
            let socket = connect().await.map_err(io)?;
            Stream::tcp(socket).map(plain).map_err(io)
        }
        Err(error) => Err(io(error)),
    }
}

fn plain(stream: Stream) -> Opened {
    Opened {
        stream,
        end_point: None,
    }
}

/// Asks for TLS. Exactly one byte is read: more, sent before the encryption, would be taken for a
/// part of what is encrypted.
async fn offers_tls(stream: &mut Stream) -> io::Result<bool> {
    let mut request = BytesMut::new();
    ssl_request(&mut request);
    stream.write_all(&request).await?;
    let mut answer = [0; 1];
    match stream.read(&mut answer).await? {
        0 => Err(closed()),
        _ => match answer[0] {
            b'S' => Ok(true),
            b'N' => Ok(false),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "unexpected answer to the TLS request: not a PostgreSQL server, or one in trouble",
            )),
        },
    }
}

fn server_name(host: &str, mode: SslMode) -> io::Result<ServerName<'static>> {
    match ServerName::try_from(host.to_owned()) {
        Ok(name) => Ok(name),
        Err(_) if mode == SslMode::VerifyFull => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the host is no name that a certificate could be for",
        )),
        // Nobody checks it, and no name is sent for an address.
        Err(_) => Ok(ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from([0; 4])))),
    }
}
