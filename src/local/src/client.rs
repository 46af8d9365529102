//! The command line's half of the control socket: HTTP/JSON over `control.sock`.
//!
//! One connection per request; every request but the long-running ones has a time limit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use helios_api::InstanceName;
use helios_api::control::{MigrationEvent, SessionInfo};
use helios_api::protection::ProtectionReport;
use helios_cluster::OperationRecord;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::error::LocalError;
use crate::layout::Layout;
use crate::status::{ControlError, LocalStatus, Progress};

/// Limit on a request that is answered at once.
const LIMIT: Duration = Duration::from_secs(10);
/// Limit on a stop: both servers shut down.
const STOP_LIMIT: Duration = Duration::from_secs(90);
/// Longest line of a stream.
const MAX_LINE: usize = 1 << 20;
/// Largest answer.
const MAX_ANSWER: usize = 64 << 20;

/// Talks to the supervisor of a data directory.
#[derive(Debug, Clone)]
pub struct LocalClient {
    data_dir: PathBuf,
    socket: PathBuf,
}

impl LocalClient {
    /// A client for the cluster on `data_dir`; nothing is connected yet.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        let data_dir = data_dir.into();
        let socket = Layout::new(&data_dir).control_socket();
        Self { data_dir, socket }
    }

    /// The data directory.
    #[must_use]
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// The cluster at a glance.
    ///
    /// # Errors
    /// [`LocalError::NotRunning`] and [`LocalError::Control`].
    pub async fn status(&self) -> Result<LocalStatus, LocalError> {
        self.get("/v1/status").await
    }

    /// The proxy's sessions.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn sessions(&self) -> Result<Vec<SessionInfo>, LocalError> {
        self.get("/v1/sessions").await
    }

    /// What was protected, and what was not and why, since the proxy started.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn protection(&self) -> Result<ProtectionReport, LocalError> {
        self.get("/v1/protection").await
    }

    /// Moves the primary, to `to` or to the best standby; `progress` is called as it goes on.
    ///
    /// # Errors
    /// [`LocalError::Refused`] when nothing was started, [`LocalError::Aborted`] when it ended on
    /// the old primary, else as [`Self::status`].
    pub async fn switchover(
        &self,
        to: Option<&InstanceName>,
        progress: impl FnMut(&Progress) + Send,
    ) -> Result<OperationRecord, LocalError> {
        let path = match to {
            Some(name) => format!("/v1/switchover?to={name}"),
            None => "/v1/switchover".to_owned(),
        };
        crate::cluster::judged(self.operate(&path, progress).await?)
    }

    /// Replaces a primary that does not come back, although acknowledged commits may be lost.
    ///
    /// # Errors
    /// [`LocalError::Refused`] while the primary is up or nobody can take over, else as
    /// [`Self::status`].
    pub async fn failover_accepting_loss(
        &self,
        progress: impl FnMut(&Progress) + Send,
    ) -> Result<OperationRecord, LocalError> {
        self.operate("/v1/failover", progress).await
    }

    /// Follows an operation to its end.
    async fn operate(
        &self,
        path: &str,
        mut progress: impl FnMut(&Progress) + Send,
    ) -> Result<OperationRecord, LocalError> {
        let mut answer = self.send(Method::POST, path).await?;
        let mut lines = Lines::default();
        while let Some(line) = lines.next(answer.body_mut()).await? {
            let step: Progress = parse(&line)?;
            progress(&step);
            match step {
                Progress::Phase { .. } => {}
                Progress::Finished { operation } => return Ok(*operation),
                Progress::Refused { reason } => return Err(LocalError::Refused(reason)),
            }
        }
        Err(LocalError::Control(
            "the supervisor ended the connection before the operation was done".to_owned(),
        ))
    }

    /// Stops an instance and keeps it stopped.
    ///
    /// # Errors
    /// [`LocalError::Refused`], else as [`Self::status`].
    pub async fn fence(&self, name: &InstanceName) -> Result<(), LocalError> {
        self.post(&format!("/v1/fence/{name}"), LIMIT).await
    }

    /// Lets an instance come back.
    ///
    /// # Errors
    /// [`LocalError::Refused`], else as [`Self::status`].
    pub async fn unfence(&self, name: &InstanceName) -> Result<(), LocalError> {
        self.post(&format!("/v1/unfence/{name}"), LIMIT).await
    }

    /// Stops the cluster; returns when everything has stopped.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn stop(&self) -> Result<(), LocalError> {
        self.post("/v1/stop", STOP_LIMIT).await
    }

    /// Calls `each` for every migration event until the cluster stops or `each` returns `false`.
    ///
    /// # Errors
    /// As [`Self::status`].
    pub async fn events(
        &self,
        mut each: impl FnMut(MigrationEvent) -> bool + Send,
    ) -> Result<(), LocalError> {
        let mut answer = self.send(Method::GET, "/v1/events").await?;
        let mut lines = Lines::default();
        while let Some(line) = lines.next(answer.body_mut()).await? {
            if !each(parse(&line)?) {
                break;
            }
        }
        Ok(())
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, LocalError> {
        bounded(LIMIT, async {
            let answer = self.send(Method::GET, path).await?;
            parse(&body(answer).await?)
        })
        .await
    }

    async fn post(&self, path: &str, limit: Duration) -> Result<(), LocalError> {
        bounded(limit, async {
            let answer = self.send(Method::POST, path).await?;
            body(answer).await.map(drop)
        })
        .await
    }

    /// Sends a request; an answer that is not a success becomes an error.
    async fn send(&self, method: Method, path: &str) -> Result<Response<Incoming>, LocalError> {
        let stream =
            UnixStream::connect(&self.socket)
                .await
                .map_err(|_| LocalError::NotRunning {
                    path: self.data_dir.clone(),
                })?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream))
                .await
                .map_err(control)?;
        // Ends with the connection: when the answer has been read or the client is dropped.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "local")
            .body(Full::new(Bytes::new()))
            .map_err(control)?;
        let answer = sender.send_request(request).await.map_err(control)?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let status = answer.status();
        let text = body(answer).await?;
        Err(match serde_json::from_slice::<ControlError>(&text) {
            Ok(refusal) => LocalError::Refused(refusal.error),
            Err(_) => LocalError::Control(format!("the supervisor answered {status}")),
        })
    }
}

fn control(e: impl std::fmt::Display) -> LocalError {
    LocalError::Control(e.to_string())
}

fn parse<T: DeserializeOwned>(text: &[u8]) -> Result<T, LocalError> {
    serde_json::from_slice(text).map_err(control)
}

async fn bounded<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, LocalError>>,
) -> Result<T, LocalError> {
    tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
        let seconds = limit.as_secs();
        Err(LocalError::Control(format!("no answer within {seconds} s")))
    })
}

async fn body(mut answer: Response<Incoming>) -> Result<Vec<u8>, LocalError> {
    let mut all = Vec::new();
    while let Some(frame) = answer.body_mut().frame().await {
        if let Ok(data) = frame.map_err(control)?.into_data() {
            if all.len() + data.len() > MAX_ANSWER {
                return Err(LocalError::Control("the answer is too long".to_owned()));
            }
            all.extend_from_slice(&data);
        }
    }
    Ok(all)
}

/// Cuts a body into lines.
#[derive(Default)]
struct Lines {
    rest: Vec<u8>,
}

impl Lines {
    async fn next(&mut self, body: &mut Incoming) -> Result<Option<Vec<u8>>, LocalError> {
        loop {
            if let Some(end) = self.rest.iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                if line.is_empty() {
                    continue; // a keep-alive
                }
                return Ok(Some(line));
            }
            if self.rest.len() > MAX_LINE {
                return Err(LocalError::Control("a line is too long".to_owned()));
            }
            match body.frame().await {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.map_err(control)?.into_data() {
                        self.rest.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}
