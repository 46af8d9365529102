//! The control API's client: talks to one agent, over its Unix socket or its control port.
//!
//! One connection a request: a connection costs some ten microseconds on a socket, a millisecond
//! under TLS, and no answer can be taken for that of another request. Every call has a limit.

use std::path::PathBuf;
use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, AgentRequest, AgentState};
use helios_api::lease::{LeaseReply, LeaseRequest};
use helios_control::{CallError, ControlClient, http};
use hyper::body::Bytes;
use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// How long an agent may take to answer a question about its state.
const STATE_LIMIT: Duration = Duration::from_secs(5);
/// How long a long poll may take: the agent answers earlier, changed or not.
const WATCH_LIMIT: Duration = Duration::from_secs(20);

/// Talks to one agent.
#[derive(Debug, Clone)]
pub struct AgentClient {
    path: Path,
}

/// The way to an agent.
#[derive(Debug, Clone)]
enum Path {
    Socket(PathBuf),
    Port(ControlClient),
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Port(client) => client.address().fmt(f),
        }
    }
}

/// Why there is no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The agent answered: it refused the command or failed at it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// No agent there. A command was not taken if connecting failed, else it is unknown.
    #[error("could not reach the agent at \"{at}\": {why}")]
    Unreachable {
        /// The agent's socket or address.
        at: String,
        /// What happened.
        why: String,
    },
    /// Its machine answers, and nobody listens there.
    #[error("no agent listens on \"{at}\"")]
    Refused {
        /// The agent's address.
        at: String,
    },
    /// The connection ended before the answer; whether a command was carried out is unknown.
    #[error("connection to the agent at \"{at}\" broke: {why}")]
    Broken {
        /// The agent's address.
        at: String,
        /// What happened.
        why: String,
    },
    /// No answer within the limit; whether the command was carried out is unknown.
    #[error("agent at \"{at}\" did not answer within {limit:?}")]
    Timeout {
        /// The agent's socket or address.
        at: String,
        /// The limit.
        limit: Duration,
    },
    /// What came back is not an answer of an agent.
    #[error("agent at \"{at}\" gave an answer that makes no sense: {why}")]
    Protocol {
        /// The agent's socket or address.
        at: String,
        /// What is wrong with it.
        why: String,
    },
}

impl AgentClient {
    /// A client of the agent that listens on `socket`. Connects when it is used.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            path: Path::Socket(socket.into()),
        }
    }

    /// A client of the agent with this control port.
    #[must_use]
    pub fn over(port: ControlClient) -> Self {
        Self {
            path: Path::Port(port),
        }
    }

    /// Gives a command and waits for its reply. When the limit passes, the agent goes on with it;
    /// giving the same command again joins in or finds it done.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn command(
        &self,
        request: AgentRequest,
        limit: Duration,
    ) -> Result<AgentReply, ClientError> {
        let body = serde_json::to_vec(&request).map_err(|e| self.protocol(e))?;
        self.call(Method::POST, "/v1/command", body, limit).await
    }

    /// The agent's state now.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn state(&self) -> Result<AgentState, ClientError> {
        self.call(Method::GET, "/v1/state", Vec::new(), STATE_LIMIT)
            .await
    }

    /// The agent's state as soon as its revision is another one than `revision` (a restarted agent
    /// starts with a lower one); after some seconds the same state again.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn watch(&self, revision: u64) -> Result<AgentState, ClientError> {
        let path = format!("/v1/state?after={revision}");
        self.call(Method::GET, &path, Vec::new(), WATCH_LIMIT).await
    }

    /// Grants a primary's lease, and asks for the next number.
    ///
    /// # Errors
    ///
    /// See [`ClientError`].
    pub async fn renew(
        &self,
        request: &LeaseRequest,
        limit: Duration,
    ) -> Result<LeaseReply, ClientError> {
        let body = serde_json::to_vec(request).map_err(|e| self.protocol(e))?;
        self.call(Method::POST, "/v1/lease", body, limit).await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let (status, body) = match &self.path {
            Path::Socket(socket) => {
                let exchange = self.over_socket(socket, method, path, body);
                let timeout = |_| ClientError::Timeout {
                    at: self.path.to_string(),
                    limit,
                };
                tokio::time::timeout(limit, exchange)
                    .await
                    .map_err(timeout)??
            }
            Path::Port(port) => port
                .call(method, path, body, limit)
                .await
                .map_err(ClientError::from)?,
        };
        self.read(status, &body)
    }

    async fn over_socket(
        &self,
        socket: &std::path::Path,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let unreachable = |why: String| ClientError::Unreachable {
            at: self.path.to_string(),
            why,
        };
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        http::exchange(stream, method, path, body)
            .await
            .map_err(unreachable)
    }

    fn read<T: DeserializeOwned>(&self, status: StatusCode, body: &[u8]) -> Result<T, ClientError> {
        if status.is_success() {
            return serde_json::from_slice(body).map_err(|e| self.protocol(e));
        }
        match serde_json::from_slice::<AgentError>(body) {
            Ok(error) => Err(ClientError::Agent(error)),
            Err(_) => Err(self.protocol(format_args!(
                "status {status}: {}",
                String::from_utf8_lossy(body)
            ))),
        }
    }

    fn protocol(&self, why: impl std::fmt::Display) -> ClientError {
        ClientError::Protocol {
            at: self.path.to_string(),
            why: why.to_string(),
        }
    }
}

impl From<CallError> for ClientError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Unreachable { address, why } => Self::Unreachable {
                at: address.to_string(),
                why,
            },
            CallError::Refused { address } => Self::Refused {
                at: address.to_string(),
            },
            CallError::Broken { address, why } => Self::Broken {
                at: address.to_string(),
                why,
            },
            CallError::Timeout { address, limit } => Self::Timeout {
                at: address.to_string(),
                limit,
            },
        }
    }
}
