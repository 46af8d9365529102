//! The proxy over HTTP: metrics, health, sessions.
//!
//! Read-only. Commands that move sessions come through the handle, or through the control API of
//! whoever runs the proxy. The invariant: nothing here waits for a session.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use helios_api::control::{ProxyStatus, SessionInfo};
use helios_api::protection::ProtectionReport;

use crate::ProxyHandle;

/// `/metrics`, `/healthz`, `/readyz`, `/v1/status`, `/v1/sessions`, `/v1/protection`.
pub fn router(handle: ProxyHandle) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/v1/status", get(status))
        .route("/v1/sessions", get(sessions))
        .route("/v1/protection", get(protection))
        .with_state(handle)
}

async fn metrics(State(handle): State<ProxyHandle>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], handle.render_metrics())
}

async fn ready(State(handle): State<ProxyHandle>) -> impl IntoResponse {
    if handle.status().primary_reachable {
        (StatusCode::OK, "ready\n")
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "the primary does not answer\n",
        )
    }
}

async fn status(State(handle): State<ProxyHandle>) -> Json<ProxyStatus> {
    Json(handle.status())
}

async fn sessions(State(handle): State<ProxyHandle>) -> Json<Vec<SessionInfo>> {
    Json(handle.sessions())
}

async fn protection(State(handle): State<ProxyHandle>) -> Json<ProtectionReport> {
    Json(handle.protection(None))
}
