//! Calls a control port.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{Live, TlsError, http};

/// How long connecting and the handshake may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

/// Calls one control port. Connects when it is used.
#[derive(Debug, Clone)]
pub struct ControlClient {
    address: SocketAddr,
    name: ServerName<'static>,
    certificates: Live,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// Nobody there, or nobody we believe. If connecting failed, nothing was asked.
    #[error("could not reach \"{address}\": {why}")]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What happened.
        why: String,
    },
    /// The machine answers, and nobody listens there.
    #[error("nobody listens on \"{address}\"")]
    Refused {
        /// The address.
        address: SocketAddr,
    },
    /// The connection ended before the answer; whether it was carried out is unknown.
    #[error("connection to \"{address}\" broke: {why}")]
    Broken {
        /// The address.
        address: SocketAddr,
        /// What happened.
        why: String,
    },
    /// No answer in time; whether it was carried out is unknown.
    #[error("\"{address}\" did not answer within {limit:?}")]
    Timeout {
        /// The address.
        address: SocketAddr,
        /// The limit.
        limit: Duration,
    },
}

impl ControlClient {
    /// A client of the control port at `address`, whose certificate has to carry `name`. Each call
    /// goes by the certificates that are in use then.
    ///
    /// # Errors
    /// `name` is none.
    pub fn new(address: SocketAddr, name: &str, certificates: &Live) -> Result<Self, TlsError> {
        Ok(Self {
            address,
            name: ServerName::try_from(name.to_owned())
                .map_err(|_| TlsError::Name(name.to_owned()))?,
            certificates: certificates.clone(),
        })
    }

    /// Where it connects to.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a request and returns status and body of the answer.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<(StatusCode, Bytes), CallError> {
        let address = self.address;
        let unreachable = |why: String| CallError::Unreachable { address, why };
        let broken = |why: String| CallError::Broken { address, why };
        let whole = async {
            let connect = async {
                let stream = TcpStream::connect(address).await?;
                // A command is one small write; waiting for more of it costs 40 ms.
                stream.set_nodelay(true)?;
                let connector = TlsConnector::from(self.certificates.client());
                connector.connect(self.name.clone(), stream).await
            };
            let stream = tokio::time::timeout(CONNECT_LIMIT, connect)
                .await
                .map_err(|_| unreachable(format!("no connection within {CONNECT_LIMIT:?}")))?
                .map_err(|e| match e.kind() {
                    ErrorKind::ConnectionRefused => CallError::Refused { address },
                    ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => broken(e.to_string()),
                    _ => unreachable(e.to_string()),
                })?;
            http::exchange(stream, method, path, body)
                .await
                .map_err(broken)
        };
        tokio::time::timeout(limit, whole)
            .await
            .unwrap_or(Err(CallError::Timeout { address, limit }))
    }
}
