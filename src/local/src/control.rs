//! The control socket: HTTP/JSON for the command line, on a Unix socket that only its owner opens.
//!
//! `GET /v1/status`, `/v1/sessions`, `/v1/protection`, `/v1/events` (a line per event); `POST /v1/switchover[?to=]`
//! and `/v1/failover` (a line per step), `/v1/fence/{name}`, `/v1/unfence/{name}`, `/v1/stop`.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use helios_api::InstanceName;
use helios_cluster::Request;
use serde::Deserialize;
use tokio::net::UnixListener;
use tokio::sync::{broadcast, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cluster::Inner;
use crate::error::LocalError;
use crate::status::{ControlError, Progress};

/// Lines that a slow reader may leave unread before the writer waits.
const LINES: usize = 64;
/// How long answers may take to be sent once everything has stopped.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
/// How often a silent stream is tested for a reader.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// The running server.
#[derive(Debug)]
pub(crate) struct Server {
    task: JoinHandle<()>,
    stop: CancellationToken,
    socket: PathBuf,
}

impl Server {
    /// Sends what is still to be sent, then ends.
    pub(crate) async fn close(self) {
        self.stop.cancel();
        let mut task = self.task;
        if tokio::time::timeout(CLOSE_LIMIT, &mut task).await.is_err() {
            task.abort();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// Listens on the control socket.
pub(crate) fn serve(inner: Arc<Inner>) -> Result<Server, LocalError> {
    let socket = inner.layout.control_socket();
    let failed = |e| LocalError::io("listen on", &socket, e);
    // The lock says that nobody uses it.
    match std::fs::remove_file(&socket) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&socket).map_err(failed)?;
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let stop = CancellationToken::new();
    let router = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/sessions", get(sessions))
        .route("/v1/protection", get(protection))
        .route("/v1/events", get(events))
        .route("/v1/switchover", post(switchover))
        .route("/v1/failover", post(failover))
        .route("/v1/fence/{name}", post(fence))
        .route("/v1/unfence/{name}", post(unfence))
        .route("/v1/stop", post(stop_all))
        .with_state(inner);
    let stopped = stop.clone();
    let task = tokio::spawn(async move {
        let served =
            axum::serve(listener, router).with_graceful_shutdown(stopped.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "control socket ended");
        }
    });
    Ok(Server { task, stop, socket })
}

type Shared = State<Arc<Inner>>;

fn refused(error: &LocalError) -> Response {
    let status = match error {
        LocalError::Refused(_) => StatusCode::CONFLICT,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let error = error.to_string();
    (status, Json(ControlError { error })).into_response()
}

async fn status(State(inner): Shared) -> Response {
    Json(inner.status().await).into_response()
}

async fn sessions(State(inner): Shared) -> Response {
    Json(inner.sessions().await).into_response()
}

async fn protection(State(inner): Shared) -> Response {
    Json(inner.protection().await).into_response()
}

async fn fence(State(inner): Shared, Path(name): Path<String>) -> Response {
    on_instance(&inner, &name, |instance| Request::Fence { instance }).await
}

async fn unfence(State(inner): Shared, Path(name): Path<String>) -> Response {
    on_instance(&inner, &name, |instance| Request::Unfence { instance }).await
}

async fn on_instance(
    inner: &Inner,
    name: &str,
    request: impl FnOnce(InstanceName) -> Request,
) -> Response {
    let result = match parse(name) {
        Ok(name) => inner.ask(request(name)).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(_) => Json(serde_json::json!({})).into_response(),
        Err(error) => refused(&error),
    }
}

fn parse(name: &str) -> Result<InstanceName, LocalError> {
    name.parse()
        .map_err(|e| LocalError::Refused(format!("{e}")))
}

/// Answers when everything has stopped.
async fn stop_all(State(inner): Shared) -> Response {
    inner.stop.cancel();
    inner.stopped.cancelled().await;
    Json(serde_json::json!({})).into_response()
}

#[derive(Debug, Deserialize)]
struct Target {
    to: Option<String>,
}

async fn switchover(State(inner): Shared, Query(target): Query<Target>) -> Response {
    let to = match target.to.as_deref().map(parse).transpose() {
        Ok(to) => to,
        Err(error) => return refused(&error),
    };
    operate(inner, Request::Switchover { to })
}

async fn failover(State(inner): Shared) -> Response {
    operate(inner, Request::Failover)
}

/// Answers with the steps of an operation, and its end.
fn operate(inner: Arc<Inner>, request: Request) -> Response {
    let (lines, answer) = stream();
    let mut steps = inner.progress();
    tokio::spawn(async move {
        let work = inner.operate(request);
        tokio::pin!(work);
        let result = loop {
            tokio::select! {
                biased;
                Ok(step) = steps.recv() => {
                    if matches!(step, Progress::Phase { .. }) && !send(&lines, &step).await {
                        // The reader has gone; the switchover goes on all the same.
                        return;
                    }
                }
                result = &mut work => break result,
            }
        };
        let last = match result {
            Ok(operation) => Progress::Finished {
                operation: Box::new(operation),
            },
            Err(error) => Progress::Refused {
                reason: error.to_string(),
            },
        };
        send(&lines, &last).await;
    });
    answer
}

async fn events(State(inner): Shared) -> Response {
    let (lines, answer) = stream();
    let mut events = inner.subscribe();
    let stop = inner.stop.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                event = events.recv() => match event {
                    Ok(event) => if !send(&lines, &event).await { return },
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "a follower of events is too slow");
                    }
                    Err(broadcast::error::RecvError::Closed) => return,
                },
                () = tokio::time::sleep(KEEP_ALIVE) => {
                    if lines.send(Ok(Bytes::from_static(b"\n"))).await.is_err() {
                        return;
                    }
                }
            }
        }
    });
    answer
}

type Line = Result<Bytes, std::convert::Infallible>;

/// A response whose body is written line by line.
fn stream() -> (mpsc::Sender<Line>, Response) {
    let (sender, receiver) = mpsc::channel(LINES);
    let body = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|line: Line| (line, receiver))
    });
    let answer = (
        [("content-type", "application/x-ndjson")],
        Body::from_stream(body),
    );
    (sender, answer.into_response())
}

/// Sends a line; `false`: nobody reads any more.
async fn send<T: serde::Serialize>(lines: &mpsc::Sender<Line>, value: &T) -> bool {
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    lines.send(Ok(Bytes::from(text))).await.is_ok()
}
