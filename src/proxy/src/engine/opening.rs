//! A session's first backend, and the one that is opened ahead of a planned move.
//!
//! The invariant: a client is refused only with the server's own words, or after the outage limit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use helios_api::{Endpoint, Epoch};
use helios_session::evidence::GtidSource;
use helios_session::tracker::Tracker;
use helios_wire::{ErrorFields, SqlState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::ahead::{self, Blueprint, Warm};
use super::gate::{GateState, Phase};
use super::link::Link;
use super::registry::{Entry, Identity, lock};
use super::rehearsal::Rehearsals;
use super::replay::{self, ReplayError, simple};
use super::session::frame_of;
use super::shared::Shared;
use crate::backend::{self, BackendConn};

/// Leaves no trace in the session, and has a new backend load what any statement needs: catalog
/// caches, and the code of parser, planner and executor. Its first transaction takes less than half
/// the time then (0.3 to 0.5 ms instead of 0.8 to 1.9 ms, the shortest of 40 each), and in a move
/// hundreds of first transactions are run at once.
const WARM_UP: &str = "BEGIN; SELECT relname FROM pg_catalog.pg_class \
     WHERE oid OPERATOR(pg_catalog.=) 1259::pg_catalog.oid \
     AND relname OPERATOR(pg_catalog.=) 'pg_class'::pg_catalog.name; ROLLBACK";

/// The sessions that get a backend ahead of a planned move: all but those that will have to make
/// temporary objects again when their client speaks, where these are many.
///
/// Each backend that is there is told of every change to the catalogs by all others, and three tables
/// are some hundred changes. Beside a thousand idle backends they cost a server two to three times as
/// much as alone (11 ms instead of 4, PostgreSQL 15), which is more than a login. Nor do such sessions
/// leave the old primary: their objects would be dropped there, in front of everybody's eyes, while
/// clients that come back meanwhile want theirs made again.
pub(crate) fn ahead(shared: &Shared) -> Vec<Arc<Entry>> {
    let mut all = shared.registry.all();
    if shared.registry.owners() > shared.options.owners_ahead {
        all.retain(|entry| !entry.owns_idly());
    }
    all
}

/// A backend on the instance that will be primary, ready for a session to go on with.
pub(crate) async fn open_ahead(
    shared: &Shared,
    entry: &Entry,
    at: &Endpoint,
    rehearsals: &Rehearsals,
) -> Option<Warm> {
    let blueprint = match shared.options.restore_ahead {
        true => ahead::blueprint(entry).await,
        false => None,
    };
    let opened = open_with(shared, entry, at, rehearsals, blueprint).await;
    match opened {
        // Something of its state cannot be had there: the rest of it is worth opening all the same.
        Err(Refused) => open_with(shared, entry, at, rehearsals, None).await,
        opened => opened,
    }
    .ok()
    .flatten()
}

/// The standby refuses something of the session's state.
struct Refused;

async fn open_with(
    shared: &Shared,
    entry: &Entry,
    at: &Endpoint,
    rehearsals: &Rehearsals,
    blueprint: Option<Box<Blueprint>>,
) -> Result<Option<Warm>, Refused> {
    let limit = shared.options.connect_timeout;
    let conn = match backend::connect(at, &shared.tls, &entry.login, limit).await {
        Ok(conn) => conn,
        Err(error) => {
            tracing::debug!(%error, "no backend ahead of time");
            return Ok(None);
        }
    };
    let mut link = Link {
        parameters: conn.parameters,
        ..Link::new(conn.stream, conn.buf)
    };
    let warming = async {
        simple(&mut link, WARM_UP).await?;
        rehearsals.run(&mut link, &entry.login).await?;
        match &blueprint {
            Some(blueprint) => replay::restore_ahead(&mut link, blueprint).await,
            None => Ok(()),
        }
    };
    match tokio::time::timeout(limit, warming).await {
        Ok(Ok(())) => {
            let conn = BackendConn {
                stream: link.stream,
                buf: link.input,
                parameters: link.parameters,
                pid: conn.pid,
                secret: conn.secret,
                notices: conn.notices,
                endpoint: conn.endpoint,
            };
            let restored = blueprint;
            Ok(Some(Warm {
                conn,
                restored,
                of: None,
            }))
        }
        Ok(Err(error @ ReplayError::State(_))) if blueprint.is_some() => {
            tracing::debug!(session = %entry.id, %error, "state cannot be restored ahead of time");
            Err(Refused)
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "backend opened ahead of time cannot be used");
            Ok(None)
        }
        Err(_) => Ok(None),
    }
}

/// The tracker of a new session on this backend.
pub(super) fn follow(shared: &Shared, conn: &BackendConn) -> Tracker {
    let ids = GtidSource::new(rand::random());
    let tracker = Tracker::new(shared.options.mode).with_ids(ids);
    tracker.on(&conn.parameters)
}

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
                    *lock(&entry.identity) = Identity::new(conn.pid, epoch, shared.now_micros());
                    shared.new_work(epoch);
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

/// Whether a server refuses because it starts, stops or recovers (57P01 to 57P03).
pub(super) fn is_away(code: &SqlState) -> bool {
    [
        SqlState::ADMIN_SHUTDOWN,
        SqlState::CRASH_SHUTDOWN,
        SqlState::CANNOT_CONNECT_NOW,
    ]
    .contains(code)
}

/// Whether the server is in recovery, reported since PostgreSQL 14.
pub(super) const IN_HOT_STANDBY: &str = "in_hot_standby";

/// Whether the server said that it takes writes.
pub(super) fn is_primary(conn: &BackendConn) -> bool {
    conn.parameters
        .get(IN_HOT_STANDBY)
        .is_none_or(|v| v == "off")
}

pub(super) fn no_primary(why: &str) -> ErrorFields {
    ErrorFields::fatal(SqlState::CANNOT_CONNECT_NOW, "no primary is available")
        .detail(why.to_owned())
        .hint("Try again later; the cluster's status tells what it waits for.")
}
