//! A proxy that an operator commands: it has no topology of its own, waits for its first one, and
//! keeps the last one, whether or not the operator is there, and over a restart of its process.
//!
//! Invariant: a command that was begun is carried out to its end, though whoever gave it may have
//! died; the next one waits for it.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use helios_api::Epoch;
use helios_api::control::{
    AbortRequest, AdvanceRequest, DrainReport, DrainRequest, GatherRequest, Gathered, HeirRequest,
    PrepareRequest, ProxyError, ProxyStatus, ResumeReport, SessionInfo, Stage, Topology,
};
use helios_api::protection::ProtectionReport;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::config::ProxyConfig;
use crate::engine::gate::Phase;
use crate::engine::kept_topology;
use crate::handle::CommandError;
use crate::{Proxy, ProxyHandle, ProxyOptions};

/// How long the operator has to speak first, behind a start.
const OPERATOR_FIRST: Duration = Duration::from_secs(3);

/// A proxy before and after its first topology. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Managed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: ProxyConfig,
    /// One start at a time.
    starting: Mutex<()>,
    handle: OnceLock<ProxyHandle>,
    /// Where the topology is kept.
    kept: OnceLock<PathBuf>,
    stop: CancellationToken,
}

impl Managed {
    /// A proxy that listens for clients only once it knows a primary.
    #[must_use]
    pub fn new(config: ProxyConfig) -> Self {
        Self(Arc::new(Inner {
            config,
            starting: Mutex::new(()),
            handle: OnceLock::new(),
            kept: OnceLock::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Keeps the topology that it serves in a file. One that is there already, because this process
    /// was started again, is served when the operator says nothing for a while and its primary has
    /// not been promoted since.
    pub fn keep_in(&self, file: PathBuf) {
        let kept = std::fs::read(&file).ok();
        let _ = self.0.kept.set(file);
        let Some(kept) = kept else { return };
        let this = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(OPERATOR_FIRST) => {}
                () = this.0.stop.cancelled() => return,
            }
            match serde_json::from_slice(&kept) {
                Ok(topology) => this.go_on_with(topology).await,
                Err(error) => tracing::warn!(%error, "what was kept cannot be read"),
            }
        });
    }

    /// Serves what was kept, once its primary is found to write the same timeline as then: behind a
    /// promotion others may be in the middle of their replays.
    async fn go_on_with(&self, topology: Topology) {
        while self.0.handle.get().is_none() && !self.0.stop.is_cancelled() {
            let there = match ProxyOptions::from_config(&self.0.config) {
                Ok(options) => kept_topology::is_still_so(&topology, &options).await,
                Err(error) => Err(error.to_string()),
            };
            match there {
                Ok(true) => {
                    tracing::info!(epoch = %topology.epoch, primary = %topology.primary.name,
                        "no word of the operator: goes on where it was before its start");
                    if let Err(error) = self.started(&topology, Phase::Open).await {
                        tracing::warn!(%error, "could not go on");
                    }
                }
                Ok(false) => tracing::debug!("the primary was promoted since"),
                Err(error) => tracing::debug!(error, "the primary of then is not there"),
            }
            tokio::time::sleep(OPERATOR_FIRST).await;
        }
    }

    /// Looks at the certificate files so often until it is shut down.
    pub fn follow_certificates(&self, every: Duration) {
        let this = self.clone();
        tokio::spawn(async move {
            let looking = async {
                loop {
                    tokio::time::sleep(every).await;
                    this.look_at_certificates();
                }
            };
            tokio::select! {
                () = looking => {}
                () = this.0.stop.cancelled() => {}
            }
        });
    }

    /// Looks at the certificate files now: [`ProxyHandle::look_at_certificates`].
    pub fn look_at_certificates(&self) {
        // One that has no primary yet reads them when it gets one.
        if let Some(handle) = self.0.handle.get() {
            handle.look_at_certificates();
        }
    }

    /// Keeps what is served now: new work has been let in.
    fn keep(&self) {
        if let (Some(file), Some(handle)) = (self.0.kept.get(), self.0.handle.get()) {
            kept_topology::write(file, &handle.topology());
        }
    }

    /// Cancelled when it is shut down.
    #[must_use]
    pub fn stopped(&self) -> CancellationToken {
        self.0.stop.clone()
    }

    /// What can be looked at and not commanded, for whoever is inside of the Pod: port-forwarding
    /// leads there, which the API server's RBAC decides about.
    pub fn inspection(&self) -> Router {
        Router::new()
            .route("/v1/status", get(status))
            .route("/v1/sessions", get(sessions))
            .route("/v1/protection", get(protection))
            .with_state(self.clone())
    }

    /// The control API, for the operator alone.
    pub fn orders(&self) -> Router {
        Router::new()
            .route("/v1/status", get(status))
            .route("/v1/sessions", get(sessions))
            .route("/v1/protection", get(protection))
            .route("/v1/prepare", post(prepare))
            .route("/v1/heir", post(heir))
            .route("/v1/drain", post(drain))
            .route("/v1/resume", post(resume))
            .route("/v1/join", post(join))
            .route("/v1/gather", post(gather))
            .route("/v1/advance", post(advance))
            .route("/v1/abort", post(abort))
            .with_state(self.clone())
    }

    /// `/healthz`, `/readyz` and `/metrics`, for anybody.
    pub fn probes(&self) -> Router {
        Router::new()
            .route("/healthz", get(|| async { "ok\n" }))
            .route("/readyz", get(ready))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
    }

    /// Says that it is not ready any more and goes on for `notice`, because clients are sent to it
    /// until everybody knows; then takes no more, lets transactions end for `grace`, and ends.
    pub async fn shutdown(&self, notice: Duration, grace: Duration) {
        if let Some(handle) = self.0.handle.get() {
            handle.announce_leave();
            tokio::time::sleep(notice).await;
        }
        if let Some(handle) = self.0.handle.get() {
            handle.shutdown(grace).await;
        }
        self.0.stop.cancel();
    }

    fn status(&self) -> ProxyStatus {
        self.0.handle.get().map_or_else(
            || ProxyStatus {
                epoch: Epoch(0),
                phase: "waiting".to_owned(),
                sessions: 0,
                in_transaction: 0,
                protected: 0,
                held: 0,
                primary_reachable: true,
                journal_bytes: 0,
                slow: None,
            },
            ProxyHandle::status,
        )
    }

    fn handle(&self) -> Result<ProxyHandle, ProxyError> {
        let handle = self.0.handle.get().cloned();
        handle.ok_or_else(|| failed("this proxy has no primary yet"))
    }

    /// The proxy, started where it does not run yet, with its gate in `phase`; whether it was.
    async fn started(
        &self,
        topology: &Topology,
        phase: Phase,
    ) -> Result<(ProxyHandle, bool), ProxyError> {
        let _one = self.0.starting.lock().await;
        if let Some(handle) = self.0.handle.get() {
            return Ok((handle.clone(), false));
        }
        let options = ProxyOptions::from_config(&self.0.config).map_err(failed)?;
        let options = options.led();
        let handle = Proxy::start_at(options, topology.clone(), phase).await;
        let handle = handle.map_err(failed)?;
        let _ = self.0.handle.set(handle.clone());
        Ok((handle, true))
    }

    async fn resume(&self, topology: Topology, alone: bool) -> Result<ResumeReport, ProxyError> {
        let (handle, fresh) = self.started(&topology, Phase::Open).await?;
        let report = match (fresh, alone) {
            (true, _) => Ok(ResumeReport::default()),
            (false, true) => handle.resume(topology).await.map_err(stale),
            (false, false) => handle.join(topology).await.map_err(stale),
        };
        self.keep();
        report
    }

    async fn gather(&self, order: GatherRequest) -> Result<Gathered, ProxyError> {
        let (handle, _) = self.started(&order.topology, Phase::Gather).await?;
        let patience = Duration::from_millis(order.patience_ms);
        handle.gather(order.topology, patience).await.map_err(stale)
    }
}

fn failed(reason: impl std::fmt::Display) -> ProxyError {
    ProxyError::Failed {
        reason: reason.to_string(),
    }
}

fn stale(error: CommandError) -> ProxyError {
    match error {
        CommandError::Stale { given, current } => ProxyError::Stale {
            given,
            seen: current,
        },
        CommandError::Superseded | CommandError::NotGathered(_) => ProxyError::Failed {
            reason: error.to_string(),
        },
    }
}

/// Carries an order out in a task of its own, which the end of the connection does not end.
async fn carry_out<T>(
    work: impl Future<Output = Result<T, ProxyError>> + Send + 'static,
) -> Response
where
    T: Serialize + Send + 'static,
{
    match tokio::spawn(work).await.unwrap_or_else(|e| Err(failed(e))) {
        Ok(report) => Json(report).into_response(),
        Err(error @ ProxyError::Stale { .. }) => {
            (StatusCode::CONFLICT, Json(error)).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, Json(error)).into_response(),
    }
}

async fn status(State(this): State<Managed>) -> Json<ProxyStatus> {
    Json(this.status())
}

async fn sessions(State(this): State<Managed>) -> Json<Vec<SessionInfo>> {
    Json(
        this.0
            .handle
            .get()
            .map(ProxyHandle::sessions)
            .unwrap_or_default(),
    )
}

async fn protection(State(this): State<Managed>) -> Json<ProtectionReport> {
    let handle = this.0.handle.get();
    Json(handle.map(|h| h.protection(None)).unwrap_or_default())
}

async fn prepare(State(this): State<Managed>, Json(order): Json<PrepareRequest>) -> Response {
    carry_out(async move {
        let wait = Duration::from_millis(order.wait_ms);
        // One that has no primary yet has no sessions either.
        if let Ok(handle) = this.handle() {
            handle.prepare_after(&order.candidate, wait).await;
        }
        Ok(())
    })
    .await
}

async fn heir(State(this): State<Managed>, Json(order): Json<HeirRequest>) -> Response {
    carry_out(async move {
        match this.handle() {
            Ok(handle) if order.epoch >= handle.topology().epoch => handle.set_heir(order.heir),
            // One of an earlier epoch says nothing.
            _ => {}
        }
        Ok(())
    })
    .await
}

async fn drain(State(this): State<Managed>, Json(order): Json<DrainRequest>) -> Response {
    carry_out(async move {
        match this.handle() {
            Ok(handle) => handle.drain(&order).await.map_err(stale),
            Err(_) => Ok(DrainReport::default()),
        }
    })
    .await
}

async fn resume(State(this): State<Managed>, Json(topology): Json<Topology>) -> Response {
    carry_out(async move { this.resume(topology, true).await }).await
}

async fn join(State(this): State<Managed>, Json(topology): Json<Topology>) -> Response {
    carry_out(async move { this.resume(topology, false).await }).await
}

async fn gather(State(this): State<Managed>, Json(order): Json<GatherRequest>) -> Response {
    carry_out(async move { this.gather(order).await }).await
}

async fn advance(State(this): State<Managed>, Json(order): Json<AdvanceRequest>) -> Response {
    let turn = Duration::from_millis(order.turn_ms);
    let work = async move {
        let advanced = this.handle()?.advance(order.epoch, order.to, turn).await;
        if order.to == Stage::Open {
            this.keep();
        }
        advanced.map_err(stale)
    };
    carry_out(work).await
}

async fn abort(State(this): State<Managed>, Json(order): Json<AbortRequest>) -> Response {
    carry_out(async move {
        match this.handle() {
            Ok(handle) => handle.abort(order.epoch).await.map_err(stale),
            Err(_) => Ok(()),
        }
    })
    .await
}

async fn ready(State(this): State<Managed>) -> (StatusCode, &'static str) {
    match this.0.handle.get() {
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for the operator\n",
        ),
        Some(handle) if handle.is_leaving() => (StatusCode::SERVICE_UNAVAILABLE, "leaving\n"),
        Some(handle) if handle.status().primary_reachable => (StatusCode::OK, "ready\n"),
        Some(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the primary does not answer\n",
        ),
    }
}

async fn metrics(State(this): State<Managed>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let text = this
        .0
        .handle
        .get()
        .map(ProxyHandle::render_metrics)
        .unwrap_or_default();
    ([(header::CONTENT_TYPE, kind)], text)
}
