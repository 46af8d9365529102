//! The control API's client: talks to one agent over its Unix socket.
//!
//! One connection a request: a connection costs some ten microseconds here, and no answer can be
//! taken for that of another request. Every call has a limit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use helios_api::agent::{AgentError, AgentReply, AgentRequest, AgentState};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// How long an agent may take to answer a question about its state.
const STATE_LIMIT: Duration = Duration::from_secs(5);
/// How long a long poll may take: the agent answers earlier, changed or not.
const WATCH_LIMIT: Duration = Duration::from_secs(20);
/// The longest answer that is read.
const ANSWER_LIMIT: usize = 1 << 20;

/// Talks to one agent.
#[derive(Debug, Clone)]
pub struct AgentClient {
    socket: PathBuf,
}

/// Why there is no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClientError {
    /// The agent answered: it refused the command or failed at it.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// No agent there. A command was not taken if connecting failed, else it is unknown.
    #[error("could not reach the agent at \"{}\": {why}", .socket.display())]
    Unreachable {
        /// The agent's socket.
        socket: PathBuf,
        /// What happened.
        why: String,
    },
    /// No answer within the limit; whether the command was carried out is unknown.
    #[error("agent at \"{}\" did not answer within {limit:?}", .socket.display())]
    Timeout {
        /// The agent's socket.
        socket: PathBuf,
        /// The limit.
        limit: Duration,
    },
    /// What came back is not an answer of an agent.
    #[error("agent at \"{}\" gave an answer that makes no sense: {why}", .socket.display())]
    Protocol {
        /// The agent's socket.
        socket: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl AgentClient {
    /// A client of the agent that listens on `socket`. Connects when it is used.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// The agent's socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
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

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
        limit: Duration,
    ) -> Result<T, ClientError> {
        match tokio::time::timeout(limit, self.exchange(method, path, body)).await {
            Ok(Ok((status, bytes))) => self.read(status, &bytes),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ClientError::Timeout {
                socket: self.socket.clone(),
                limit,
            }),
        }
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let unreachable = |why: String| ClientError::Unreachable {
            socket: self.socket.clone(),
            why,
        };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|e| unreachable(e.to_string()))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| self.protocol(e))?;
        let answer = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(|e| unreachable(e.to_string()))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), ANSWER_LIMIT)
                .collect()
                .await
                .map_err(|e| unreachable(e.to_string()))?;
            Ok((status, body.to_bytes()))
        };
        // The connection is driven here and not in a task of its own: it ends with the call.
        let connection = async {
            let _ = connection.await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            answer = answer => answer,
            () = connection => Err(unreachable("connection closed".to_owned())),
        }
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
            socket: self.socket.clone(),
            why: why.to_string(),
        }
    }
}
