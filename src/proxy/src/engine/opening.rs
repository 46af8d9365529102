//! A session's first backend.
//!
//! The invariant: a client is refused only with the server's own words, or after the outage limit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use helios_api::Epoch;
use tokio::sync::watch;
use tokio::time::Instant;

use super::gate::{GateState, Phase};
use super::registry::{Entry, Identity, lock};
use super::session::{frame_of, is_away, is_primary, no_primary};
use super::shared::Shared;
use crate::backend::{self, BackendConn};

/// Opens the first backend; waits while no primary can be had. The error is a frame for the client.
pub(super) async fn open_first(
    shared: &Arc<Shared>,
    gate: &mut watch::Receiver<GateState>,
    entry: &Entry,
) -> Result<(BackendConn, Epoch), Bytes> {
    let deadline = Instant::now() + shared.options.outage_limit;
    let mut pause = Duration::from_millis(10);
    loop {
        let state = gate.borrow_and_update().clone();
        let mut problem = String::from("a move of the primary is under way");
        if state.phase == Phase::Open {
            let permit = shared.logins.acquire().await;
            let limit = shared.options.connect_timeout;
            let at = &state.topology.primary.endpoint;
            let result = backend::connect(at, &shared.tls, &entry.login, limit).await;
            drop(permit);
            match result {
                Ok(conn) if is_primary(&conn) => {
                    let epoch = state.topology.epoch;
                    *lock(&entry.identity) = Identity::new(conn.pid, epoch);
                    return Ok((conn, epoch));
                }
                Ok(_) => "the server is in recovery".clone_into(&mut problem),
                Err(backend::BackendError::Refused { fields, frame, .. })
                    if !is_away(&fields.sqlstate) =>
                {
                    return Err(frame);
                }
                Err(e) => problem = e.to_string(),
            }
        }
        if Instant::now() >= deadline {
            return Err(frame_of(&no_primary(&problem)));
        }
        let _ = tokio::time::timeout(pause, gate.changed()).await;
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}
