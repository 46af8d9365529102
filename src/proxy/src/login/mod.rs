//! A client's way in: from its first byte to AuthenticationOk.
//!
//! `first` reads the untyped packets and switches to TLS, `handshake` judges the start-up
//! packet, `authenticate` lets the client prove who it is. Nothing here trusts a byte: lengths
//! are bounded before anything is read, and a time limit is over all of it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use helios_wire::ErrorFields;
use helios_wire::startup::CancelKey;
use tokio::time::Instant;

use crate::auth::{AuthMethod, VerifierCache};
use crate::backend::Login;
use crate::listener::{ConnectionPermit, Incoming, Limits, UserPermit};
use crate::stream::Stream;
use crate::tls::ServerTls;

mod authenticate;
mod first;
mod handshake;

/// What logins need to know of the proxy.
#[derive(Debug)]
pub struct EdgeContext {
    /// How clients prove who they are.
    pub auth: AuthMethod,
    /// TLS towards clients, when there is a certificate.
    pub tls: Option<ServerTls>,
    /// Clients that come over TCP without TLS are refused.
    pub tls_required: bool,
    /// SCRAM verifiers.
    pub verifiers: Arc<VerifierCache>,
    /// Limits of connections.
    pub limits: Arc<Limits>,
    /// A login may take this long, all of it together.
    pub login_timeout: Duration,
}

/// What a client wanted.
#[derive(Debug)]
pub enum Accepted {
    /// To cancel what another connection does. Its client waits until this connection is closed,
    /// before it goes on: to be kept until the request has been delivered.
    Cancel {
        /// Whom.
        key: CancelKey,
        /// The connection to close then.
        stream: Stream,
    },
    /// A session; its client waits for ParameterStatus, BackendKeyData and ReadyForQuery.
    Session(Box<ClientLogin>),
}

/// A client that has proven who it is and was told AuthenticationOk.
#[derive(Debug)]
pub struct ClientLogin {
    /// Its connection.
    pub stream: Stream,
    /// Bytes that it sent already behind its login.
    pub buf: BytesMut,
    /// Who it is and what it asked for.
    pub login: Login,
    /// Minor version of the protocol that was agreed upon: 0 or 2.
    pub protocol_minor: u16,
    /// Its address for people.
    pub peer: String,
    /// Its places among all connections and among its user's.
    pub permits: (ConnectionPermit, UserPermit),
}

/// Why there is no session. The client has been told already, where there was anybody to tell.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The client went away before it asked for anything: a port check, no fault.
    #[error("connection closed before a login")]
    Closed,
    /// The connection failed.
    #[error("connection failed during login: {0}")]
    Io(#[from] io::Error),
    /// The login took too long.
    #[error("login took longer than {0:?}")]
    Timeout(Duration),
    /// The client was refused.
    #[error("login refused: {0}")]
    Refused(ErrorFields),
    /// The client does not speak the protocol.
    #[error("client broke the protocol: {0}")]
    Protocol(String),
}

/// Leads a client through its login.
///
/// # Errors
///
/// See [`LoginError`].
pub async fn accept(incoming: Incoming, ctx: &EdgeContext) -> Result<Accepted, LoginError> {
    // Boxed: a login's state (a TLS handshake, an exchange) is large, and its caller's future
    // lives as long as the session.
    let deadline = Deadline::in_(ctx.login_timeout);
    let login = Box::pin(handshake::handshake(incoming, ctx, deadline));
    // The rest of it, for a client that does not even read why it is refused.
    let limit = ctx.login_timeout + GRACE;
    match tokio::time::timeout(limit, login).await {
        Ok(done) => done,
        Err(_) => Err(LoginError::Timeout(ctx.login_timeout)),
    }
}

/// Time to be told why a login was refused, behind its time limit.
const GRACE: Duration = Duration::from_secs(3);

/// Until when a login must be through.
#[derive(Debug, Clone, Copy)]
struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    fn in_(limit: Duration) -> Self {
        let at = Instant::now() + limit;
        Self { at, limit }
    }

    /// Holds a step of the login to it.
    async fn hold<F: Future>(&self, step: F) -> Result<F::Output, LoginError> {
        let done = tokio::time::timeout_at(self.at, step).await;
        done.map_err(|_| LoginError::Timeout(self.limit))
    }
}
