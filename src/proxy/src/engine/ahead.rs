//! The state of a session on the backend that is opened for it ahead of a planned move: what a standby
//! can have of it already is restored there in the time in which nobody waits.
//!
//! That is settings, role and prepared statements. Locks, channels and temporary objects need the
//! promotion, and so does whatever names one of these. The invariant: what was restored is adopted
//! only if it is, byte for byte, what the session would restore now; else the backend is cleared of
//! it first.

use std::time::Duration;

use helios_session::state::{Prepared, Snapshot};
use tokio::sync::oneshot;

use super::link::Link;
use super::registry::{Entry, lock};
use super::replay::{ReplayError, simple};
use super::session::Session;
use crate::backend::BackendConn;

/// How long a session that is busy may take to say what it is. Then its backend is opened without.
const ANSWER: Duration = Duration::from_millis(500);

/// Takes a backend back to where its login left it.
pub(super) const CLEAR: &str = "DISCARD ALL";

/// What a standby can have of a session.
#[derive(Debug, Clone)]
pub struct Blueprint {
    /// Settings, role, and what PREPARE has made.
    pub(super) state: Snapshot,
    /// The protocol's named statements.
    pub(super) prepared: Vec<(Vec<u8>, Prepared)>,
}

impl PartialEq for Blueprint {
    fn eq(&self, other: &Self) -> bool {
        let mut both = self.prepared.iter().zip(&other.prepared);
        self.state == other.state
            && self.prepared.len() == other.prepared.len()
            && both.all(|((name, a), (same, b))| {
                name == same && a.parse == b.parse && a.columns == b.columns
            })
    }
}

impl Blueprint {
    /// The part of a session's state that a standby can have.
    pub(super) fn of(state: &Snapshot, prepared: &[(Vec<u8>, Prepared)]) -> Self {
        let named = prepared.iter().filter(|(name, _)| !name.is_empty());
        let mut named: Vec<_> = named.cloned().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        Self {
            state: Snapshot {
                settings: state.settings.clone(),
                role: state.role.clone(),
                session_authorization: state.session_authorization.clone(),
                prepared: state.prepared.clone(),
                ..Snapshot::default()
            },
            prepared: named,
        }
    }

    /// Whether there is anything to restore.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::of(&Snapshot::default(), &[])
    }
}

/// A backend on the next primary, and what of its session is there already.
#[derive(Debug)]
pub struct Warm {
    /// The backend.
    pub conn: BackendConn,
    /// What was restored on it.
    pub restored: Option<Box<Blueprint>>,
    /// It is kept for a transaction that began then ([`super::heir`]); `None`: for a planned move.
    pub of: Option<u64>,
}

/// Asks a session what is to be restored. Nothing, when it does not know now or has nothing.
pub(crate) async fn blueprint(entry: &Entry) -> Option<Box<Blueprint>> {
    let (tell, told) = oneshot::channel();
    *lock(&entry.blueprint) = Some(tell);
    entry.bell.ring();
    let told = tokio::time::timeout(ANSWER, told).await;
    told.ok()?.ok().filter(|blueprint| !blueprint.is_empty())
}

/// Whether the blueprint is there; a backend on which something else was restored is brought back to
/// where its login left it.
///
/// # Errors
/// The connection's, or the server refuses to clear it.
pub(super) async fn is_there(
    link: &mut Link,
    restored: Option<&Blueprint>,
    wanted: Option<&Blueprint>,
) -> Result<bool, ReplayError> {
    match restored {
        None => Ok(false),
        Some(there) if Some(there) == wanted => Ok(true),
        Some(_) => {
            simple(link, CLEAR).await?;
            Ok(false)
        }
    }
}

impl Session {
    /// Tells what is to be restored ahead of a planned move, if that is asked for and known.
    pub(super) fn asked_for_blueprint(&mut self) {
        let Some(tell) = lock(&self.entry().blueprint).take() else {
            return;
        };
        let prepared = self.prepared_at_begin();
        let knows = !self.state_due && self.asking.is_none();
        // Some of its statements may need what cannot be there.
        let bare = !self.state.locks.is_empty() || !self.name_no_objects(&prepared);
        if knows && !bare && self.tracker.mode() != helios_session::ReplayMode::None {
            // Whoever asked may have stopped waiting.
            let _ = tell.send(Box::new(Blueprint::of(&self.state, &prepared)));
        }
    }
}
