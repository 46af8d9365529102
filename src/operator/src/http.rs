//! Probes and metrics of the operator.

use std::net::SocketAddr;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::OperatorError;
use crate::metrics::Metrics;

/// Serves `/healthz`, `/readyz` and `/metrics` until cancelled. A replica that waits for the lease
/// is ready too: it can take over at any time.
pub(crate) async fn serve(
    address: SocketAddr,
    shown: Metrics,
    stop: CancellationToken,
) -> Result<(), OperatorError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|why| OperatorError::Listen { address, why })?;
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .with_state(shown);
    tokio::spawn(async move {
        tokio::select! {
            _ = async { axum::serve(listener, router).await } => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(())
}

async fn metrics(State(shown): State<Metrics>) -> impl IntoResponse {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], shown.render())
}
