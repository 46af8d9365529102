//! A proxy that an operator commands: it has no topology of its own, waits for its first one, and
//! keeps the last one for as long as it runs, whether or not the operator is there.
//!
//! Invariant: a command that was begun is carried out to its end, though whoever gave it may have
//! died; the next one waits for it.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use helios_api::Epoch;
use helios_api::control::{
    AbortRequest, DrainRequest, PrepareRequest, ProxyError, ProxyStatus, ResumeReport, SessionInfo,
    Topology,
};
use helios_api::protection::ProtectionReport;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio_util::sync::CancellationToken;

use crate::config::ProxyConfig;
use crate::handle::CommandError;
use crate::{Proxy, ProxyHandle, ProxyOptions};

/// A proxy before and after its first topology. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Managed(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    config: ProxyConfig,
    /// One start at a time.
    starting: Mutex<()>,
    handle: OnceLock<ProxyHandle>,
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
            stop: CancellationToken::new(),
        }))
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
            .route("/v1/drain", post(drain))
            .route("/v1/resume", post(resume))
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

    /// Takes no more clients, lets sessions end by themselves for `grace`, then ends them.
    pub async fn shutdown(&self, grace: Duration) {
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

    async fn resume(&self, topology: Topology) -> Result<ResumeReport, ProxyError> {
        if let Some(handle) = self.0.handle.get() {
            return handle.resume(topology).await.map_err(stale);
        }
        let _one = self.0.starting.lock().await;
        if let Some(handle) = self.0.handle.get() {
            return handle.resume(topology).await.map_err(stale);
        }
        let options = ProxyOptions::from_config(&self.0.config).map_err(failed)?;
        let handle = Proxy::start(options, topology).await.map_err(failed)?;
        let _ = self.0.handle.set(handle);
        Ok(ResumeReport::default())
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
        CommandError::Superseded => ProxyError::Failed {
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
        this.handle()?.prepare(&order.candidate).await;
        Ok(())
    })
    .await
}

async fn drain(State(this): State<Managed>, Json(order): Json<DrainRequest>) -> Response {
    carry_out(async move { this.handle()?.drain(&order).await.map_err(stale) }).await
}

async fn resume(State(this): State<Managed>, Json(topology): Json<Topology>) -> Response {
    carry_out(async move { this.resume(topology).await }).await
}

async fn abort(State(this): State<Managed>, Json(order): Json<AbortRequest>) -> Response {
    carry_out(async move { this.handle()?.abort(order.epoch).await.map_err(stale) }).await
}

async fn ready(State(this): State<Managed>) -> (StatusCode, &'static str) {
    match this.0.handle.get() {
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "waiting for the operator\n",
        ),
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
