//! A connection to a server, from the socket to the first ReadyForQuery.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use helios_api::Endpoint;
use helios_wire::ErrorFields;
use helios_wire::scram::ScramKeys;
use helios_wire::startup::{self as startup_packet, CancelKey};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::stream::Stream;
use crate::tls::BackendTls;

mod open;
mod startup;

/// Who logs in, where, and with which start-up parameters.
#[derive(Debug, Clone)]
pub struct Login {
    /// Role.
    pub user: String,
    /// Database.
    pub database: String,
    /// Other start-up parameters, in the client's order (`application_name`, `options`, ...).
    pub params: Vec<(String, String)>,
    /// What proves it.
    pub credentials: Credentials,
}

/// What proves to a server who we are.
#[derive(Clone, Default)]
pub enum Credentials {
    /// Nothing: the server must trust us, or go by our certificate.
    #[default]
    None,
    /// The keys of a client's SCRAM exchange.
    Scram(Arc<ScramKeys>),
    /// A clear password: only for the proxy's own service user.
    Password(Arc<str>),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Scram(_) => "Scram(..)",
            Self::Password(_) => "Password(..)",
        })
    }
}

/// A connection that is logged in and ready for its first query.
#[derive(Debug)]
pub struct BackendConn {
    /// The connection.
    pub stream: Stream,
    /// Bytes that came behind the first ReadyForQuery.
    pub buf: BytesMut,
    /// Process id, for cancel requests.
    pub pid: i32,
    /// Secret, for cancel requests.
    pub secret: Bytes,
    /// NoticeResponse frames of the login (a login trigger may say something); a bounded number.
    pub notices: Vec<Bytes>,
    /// Parameters that the server reported.
    pub parameters: BTreeMap<String, String>,
    /// Where it is connected to.
    pub endpoint: Endpoint,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The socket failed, or the server closed it.
    #[error("could not connect to server at {endpoint}: {source}")]
    Io {
        /// The server.
        endpoint: Endpoint,
        /// What happened.
        source: io::Error,
    },
    /// It took too long.
    #[error("could not connect to server at {endpoint}: no answer within {limit:?}")]
    Timeout {
        /// The server.
        endpoint: Endpoint,
        /// The limit.
        limit: Duration,
    },
    /// The server refused the login.
    #[error("server at {endpoint} refused the login: {fields}")]
    Refused {
        /// The server.
        endpoint: Endpoint,
        /// Its error.
        fields: ErrorFields,
        /// The ErrorResponse as it came, to be forwarded to the client.
        frame: Bytes,
    },
    /// The server does not keep to the protocol.
    #[error("server at {endpoint} broke the protocol: {why}")]
    Protocol {
        /// The server.
        endpoint: Endpoint,
        /// How.
        why: String,
    },
    /// The server asks for something that we cannot give.
    #[error("cannot log in to server at {endpoint}: {why}")]
    AuthUnsupported {
        /// The server.
        endpoint: Endpoint,
        /// What it asks for.
        why: String,
    },
}

impl BackendError {
    fn io(endpoint: &Endpoint, source: io::Error) -> Self {
        Self::Io {
            endpoint: endpoint.clone(),
            source,
        }
    }

    fn protocol(endpoint: &Endpoint, why: impl Into<String>) -> Self {
        Self::Protocol {
            endpoint: endpoint.clone(),
            why: why.into(),
        }
    }

    fn auth(endpoint: &Endpoint, why: impl Into<String>) -> Self {
        Self::AuthUnsupported {
            endpoint: endpoint.clone(),
            why: why.into(),
        }
    }

    /// Whether the server may accept the same login a little later: it starts, stops, is full, or
    /// cannot be reached.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Timeout { .. } => true,
            Self::Refused { fields, .. } => {
                fields.sqlstate.class() == *b"57" || fields.sqlstate.class() == *b"53"
            }
            Self::Protocol { .. } | Self::AuthUnsupported { .. } => false,
        }
    }
}

/// Connects, logs in and reads up to the first ReadyForQuery.
///
/// # Errors
///
/// See [`BackendError`]; `timeout` is over all of it.
pub async fn connect(
    endpoint: &Endpoint,
    tls: &BackendTls,
    login: &Login,
    timeout: Duration,
) -> Result<BackendConn, BackendError> {
    let attempt = async {
        let opened = open::open(endpoint, tls).await?;
        startup::log_in(opened, endpoint, login).await
    };
    within(endpoint, timeout, attempt).await
}

/// Asks a server to cancel what the backend `pid` does, and waits until it has taken note. That
/// it succeeded is never said.
///
/// # Errors
///
/// The server could not be reached in time.
pub async fn cancel(
    endpoint: &Endpoint,
    tls: &BackendTls,
    pid: i32,
    secret: Bytes,
    timeout: Duration,
) -> Result<(), BackendError> {
    let key = CancelKey { pid, secret };
    let attempt = async {
        let io = |source| BackendError::io(endpoint, source);
        let mut stream = open::open(endpoint, tls).await?.stream;
        let mut request = BytesMut::new();
        startup_packet::cancel_request(&mut request, &key)
            .map_err(|e| BackendError::protocol(endpoint, e.to_string()))?;
        stream.write_all(&request).await.map_err(io)?;
        stream.flush().await.map_err(io)?;
        // The server closes when it has sent the signal; how it closes says nothing.
        let _ = stream.read(&mut [0; 1]).await;
        Ok(())
    };
    within(endpoint, timeout, attempt).await
}

async fn within<T>(
    endpoint: &Endpoint,
    limit: Duration,
    attempt: impl Future<Output = Result<T, BackendError>>,
) -> Result<T, BackendError> {
    // Boxed: a login's state is large, and lives in the future of every session.
    match tokio::time::timeout(limit, Box::pin(attempt)).await {
        Ok(done) => done,
        Err(_) => Err(BackendError::Timeout {
            endpoint: endpoint.clone(),
            limit,
        }),
    }
}
