//! Probes of the operator.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::OperatorError;

/// Whether this replica leads.
#[derive(Debug, Clone, Default)]
pub(crate) struct Leading(Arc<AtomicBool>);

impl Leading {
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Serves `/healthz`, `/readyz` and `/metrics` until cancelled. A replica that waits for the lease
/// is ready too: it can take over at any time.
pub(crate) async fn serve(
    address: SocketAddr,
    stop: CancellationToken,
) -> Result<Leading, OperatorError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|why| OperatorError::Listen { address, why })?;
    let leading = Leading::default();
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics))
        .with_state(leading.clone());
    tokio::spawn(async move {
        tokio::select! {
            _ = async { axum::serve(listener, router).await } => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(leading)
}

async fn metrics(State(leading): State<Leading>) -> String {
    let value = u8::from(leading.0.load(Ordering::Relaxed));
    format!(
        "# HELP helios_operator_leading Whether this replica of the operator leads.\n\
         # TYPE helios_operator_leading gauge\nhelios_operator_leading {value}\n"
    )
}
