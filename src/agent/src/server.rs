//! The control API over HTTP. The routes know nothing of the transport: a Unix socket, whose
//! folder's permissions decide who may command, and, in a Pod, a port under mutual TLS, where the
//! operator's certificate does. Probes have a port of their own, which takes no orders.

use std::path::Path;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use helios_api::agent::{AgentError, AgentReply, AgentRequest, AgentState, InstanceState};
use helios_api::lease::LeaseRequest;
use helios_api::v1alpha1::names;
use helios_control::{LOOK_EVERY, Live};
use serde::Deserialize;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::AgentFailure;
use crate::config::Network;
use crate::error::failed;
use crate::hub::Hub;
use crate::lease::Lease;

/// How long a long poll is held before it is answered with an unchanged state.
const POLL_LIMIT: Duration = Duration::from_secs(10);
/// The longest command that is read.
const BODY_LIMIT: usize = 512 << 10;

/// A command on its way to the agent, and where its reply goes.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) request: AgentRequest,
    pub(crate) reply: oneshot::Sender<Result<AgentReply, AgentError>>,
}

#[derive(Debug, Clone)]
struct Routes {
    hub: Hub,
    jobs: mpsc::Sender<Job>,
    lease: Lease,
}

/// The API's routes.
pub(crate) fn router(hub: Hub, jobs: mpsc::Sender<Job>, lease: Lease) -> Router {
    Router::new()
        .route("/v1/lease", post(renew))
        .route("/v1/command", post(command))
        .route("/v1/state", get(state))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(Routes { hub, jobs, lease })
}

/// Binds the control socket, open to this process's user alone. Only for whoever holds the
/// instance's lock: a socket left behind is removed.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, AgentFailure> {
    use std::os::unix::fs::PermissionsExt as _;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .map_err(|e| AgentFailure::file("could not create folder", folder, e))?;
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(AgentFailure::file("could not remove old socket", path, e));
        }
        _ => {}
    }
    let listener =
        UnixListener::bind(path).map_err(|e| AgentFailure::file("could not listen on", path, e))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .map_err(|e| AgentFailure::file("could not restrict socket", path, e))?;
    Ok(listener)
}

/// Serves until cancelled; open requests are then cut off.
pub(crate) async fn serve(listener: UnixListener, router: Router, stop: CancellationToken) {
    tokio::select! {
        ended = async { axum::serve(listener, router).await } => {
            if let Err(error) = ended {
                tracing::error!(%error, "control socket failed");
            }
        }
        () = stop.cancelled() => {}
    }
}

/// Serves the network's control port and probes until cancelled.
pub(crate) async fn serve_network(
    network: &Network,
    hub: Hub,
    router: Router,
    stop: CancellationToken,
) -> Result<(), AgentFailure> {
    let listen = async |address| {
        TcpListener::bind(address)
            .await
            .map_err(|e| AgentFailure::Config(format!("could not listen on {address}: {e}")))
    };
    let certificates = Live::follow(&network.tls, LOOK_EVERY, stop.clone())
        .map_err(|e| AgentFailure::Config(e.to_string()))?;
    let control = listen(network.control).await?;
    // The kernel refuses connections to it only when nobody has it any more: the server's processes
    // have it, too, so that a refusal says that none of them is left.
    rustix::io::fcntl_setfd(&control, rustix::io::FdFlags::empty())
        .map_err(|e| AgentFailure::Config(format!("could not hand on the control port: {e}")))?;
    let probes = listen(network.probes).await?;
    helios_control::serve(
        control,
        router,
        &certificates,
        names::OPERATOR_IDENTITY,
        stop.clone(),
    );
    let answers = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(hub);
    tokio::spawn(async move {
        tokio::select! {
            _ = async { axum::serve(probes, answers).await } => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(())
}

/// Ready is an instance that serves, as primary or as standby.
async fn ready(State(hub): State<Hub>) -> (StatusCode, &'static str) {
    match hub.state().instance {
        InstanceState::Primary { .. } => (StatusCode::OK, "primary\n"),
        InstanceState::Standby { .. } => (StatusCode::OK, "standby\n"),
        _ => (
            StatusCode::SERVICE_UNAVAILABLE,
            "PostgreSQL does not serve\n",
        ),
    }
}

async fn command(State(routes): State<Routes>, Json(request): Json<AgentRequest>) -> Response {
    let (reply, answer) = oneshot::channel();
    let result = match routes.jobs.try_send(Job { request, reply }) {
        Err(_) => Err(failed(
            "too many commands are waiting, or the agent is stopping",
        )),
        Ok(()) => answer
            .await
            .unwrap_or_else(|_| Err(failed("the agent is stopping"))),
    };
    match result {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => {
            let status = match error {
                AgentError::Stale { .. } | AgentError::Refused { .. } => StatusCode::CONFLICT,
                AgentError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            };
            (status, Json(error)).into_response()
        }
    }
}

/// Not a command: it waits for none.
async fn renew(State(routes): State<Routes>, Json(request): Json<LeaseRequest>) -> Response {
    match routes.lease.renew(&request, &routes.hub.state()) {
        Ok(reply) => Json(reply).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response(),
    }
}

#[derive(Debug, Deserialize)]
struct After {
    after: Option<u64>,
}

async fn state(State(routes): State<Routes>, Query(query): Query<After>) -> Json<AgentState> {
    let Some(seen) = query.after else {
        return Json(routes.hub.state());
    };
    let changed = tokio::time::timeout(POLL_LIMIT, routes.hub.changed(seen)).await;
    Json(changed.unwrap_or_else(|_| routes.hub.state()))
}
