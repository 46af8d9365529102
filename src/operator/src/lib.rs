//! The operator: keeps HeliosClusters as they are described, and carries out what
//! `helios_cluster` decides about their primaries.
//!
//! Two halves. `reconcile` is a pipeline from the object to what has to exist for it: dereference,
//! validate, build, apply; only the first and the last step hold a client. `conductor` is a task a
//! cluster that observes agents and proxies, asks for a decision, saves it in the object's status
//! and then acts on it.
//!
//! May do I/O: the API server, the control ports of agents and proxies, SQL on the primary.
//!
//! Invariants: only the holder of the lease does anything; a decision is in the status before any
//! action that follows from it is begun, and a save that finds somebody else's decision there ends
//! this process.

mod build;
mod certificates;
mod conductor;
mod contents;
mod error;
mod http;
mod leader;
mod metrics;
#[cfg(test)]
mod mock;
mod reconcile;
mod renewal;
mod renewing;
mod secret;
#[cfg(test)]
mod shelf;
mod volumes;

use std::net::SocketAddr;

use tokio_util::sync::CancellationToken;

pub use error::OperatorError;

/// How an operator is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The only namespace to look after; `None`: all.
    pub namespace: Option<String>,
    /// Namespace of the operator's own lease.
    pub lease_namespace: String,
    /// Name of this replica.
    pub identity: String,
    /// That name is its Pod's: no other process has it at the same time.
    pub in_pod: bool,
    /// This program's image, which agents and proxies run from.
    pub image: String,
    /// Where probes are served.
    pub http: SocketAddr,
}

/// Runs until cancelled: waits for the lease, then works for as long as it holds it.
///
/// # Errors
/// The API server cannot be found, the probes' port is taken, or the lease was lost: whoever runs
/// this starts it again.
pub async fn run(options: Options, cancel: CancellationToken) -> Result<(), OperatorError> {
    let client = kube::Client::try_default().await?;
    let metrics = metrics::Metrics::new()?;
    http::serve(options.http, metrics.clone(), cancel.clone()).await?;
    let lease = leader::Lease::new(client.clone(), &options);
    tokio::select! {
        () = lease.acquire() => {}
        () = cancel.cancelled() => return Ok(()),
    }
    metrics.lead();
    tracing::info!(identity = options.identity, "leading");
    let work = cancel.child_token();
    let result = tokio::select! {
        result = reconcile::run(client, options, metrics, work.clone()) => result,
        () = lease.keep() => Err(OperatorError::LeaseLost),
    };
    work.cancel();
    if cancel.is_cancelled() {
        lease.release().await;
    }
    result
}
