//! The last migrations of a proxy's sessions, for `helios_proxy.session_migrations`.
//!
//! A ring in memory. The invariant: a migration has one row, from its beginning on, and its end
//! changes that row.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use helios_api::control::MoveReason;
use helios_api::{Epoch, SessionId};

use super::protection::Who;
use super::registry::lock;

/// Migrations that are remembered: a move of as many sessions as one proxy is made for.
pub const MAX_ROWS: usize = 10_000;

/// Longest error that is kept, in bytes.
const MAX_ERROR: usize = 500;

/// How a migration stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is under way.
    Started,
    /// The session goes on, and its client saw nothing.
    Completed,
    /// The client got an error, or left.
    Failed,
}

impl Outcome {
    /// As SQL shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Started => "started",
            Self::Completed => "completed",
            Self::Failed => "failed",
        }
    }
}

/// One migration.
#[derive(Debug, Clone)]
pub struct Migration {
    /// The session.
    pub session: SessionId,
    /// Whose session.
    pub who: Arc<Who>,
    /// When the session stood still.
    pub at: SystemTime,
    /// Why it moves.
    pub reason: MoveReason,
    /// The epoch that it moves to.
    pub epoch: Epoch,
    /// How it stands.
    pub outcome: Outcome,
    /// From the hold to the end.
    pub took: Option<Duration>,
    /// Bytes of journal and state.
    pub state_bytes: u64,
    /// Requests of the client's that were run again.
    pub replayed: u64,
    /// What the client got: SQLSTATE, and what stood in the way.
    pub error: Option<(String, String)>,
}

/// How a migration ended.
#[derive(Debug)]
pub struct Ended {
    /// Why it moved, as is known now.
    pub reason: MoveReason,
    /// From the hold to the end.
    pub took: Duration,
    /// Requests that were run again.
    pub replayed: u64,
    /// SQLSTATE and text, when it failed.
    pub error: Option<(String, String)>,
}

/// The ring.
#[derive(Debug, Default)]
pub struct History(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    /// Number of the first row.
    first: u64,
    rows: VecDeque<Migration>,
}

impl History {
    /// Adds a row; returns its number.
    pub fn begin(&self, migration: Migration) -> u64 {
        let mut ring = lock(&self.0);
        if ring.rows.len() >= MAX_ROWS {
            ring.rows.pop_front();
            ring.first += 1;
        }
        ring.rows.push_back(migration);
        ring.first + ring.rows.len() as u64 - 1
    }

    /// Ends a row, if it is still there.
    pub fn end(&self, number: u64, mut ended: Ended) {
        if let Some((_, text)) = &mut ended.error {
            let end = (0..=MAX_ERROR.min(text.len())).rev();
            let end = end.into_iter().find(|at| text.is_char_boundary(*at));
            text.truncate(end.unwrap_or(0));
        }
        let mut ring = lock(&self.0);
        let at = number
            .checked_sub(ring.first)
            .and_then(|at| usize::try_from(at).ok());
        let Some(row) = at.and_then(|at| ring.rows.get_mut(at)) else {
            return;
        };
        row.outcome = match ended.error {
            None => Outcome::Completed,
            Some(_) => Outcome::Failed,
        };
        row.reason = ended.reason;
        row.took = Some(ended.took);
        row.replayed = ended.replayed;
        row.error = ended.error;
    }

    /// The rows, oldest first, of one role's sessions where one is given.
    #[must_use]
    pub fn rows(&self, of: Option<&str>) -> Vec<Migration> {
        let ring = lock(&self.0);
        let of_role = |m: &&Migration| of.is_none_or(|user| m.who.user == user);
        ring.rows.iter().filter(of_role).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migration(session: u64) -> Migration {
        Migration {
            session: SessionId(session),
            who: Arc::new(Who {
                database: "shop".into(),
                user: ["even", "odd"][usize::from(session & 1 == 1)].into(),
                application: String::new(),
            }),
            at: SystemTime::UNIX_EPOCH,
            reason: MoveReason::ConnectionLoss,
            epoch: Epoch(2),
            outcome: Outcome::Started,
            took: None,
            state_bytes: 0,
            replayed: 0,
            error: None,
        }
    }

    fn ended(error: Option<&str>) -> Ended {
        Ended {
            reason: MoveReason::Failover,
            took: Duration::from_millis(3),
            replayed: 4,
            error: error.map(|e| ("40001".into(), e.into())),
        }
    }

    #[test]
    fn the_ring_keeps_the_last_and_ends_what_is_still_there() {
        let history = History::default();
        let numbers: Vec<_> = (0..MAX_ROWS as u64 + 5)
            .map(|n| history.begin(migration(n)))
            .collect();
        history.end(numbers[0], ended(None));
        history.end(numbers[6], ended(None));
        history.end(numbers[7], ended(Some(&"ß".repeat(400))));
        let rows = history.rows(None);
        assert_eq!(rows.len(), MAX_ROWS);
        let shown = |at: usize| (rows[at].session.0, rows[at].outcome, rows[at].replayed);
        assert_eq!(shown(0), (5, Outcome::Started, 0));
        assert_eq!(shown(1), (6, Outcome::Completed, 4));
        assert_eq!(shown(2), (7, Outcome::Failed, 4));
        assert_eq!(rows[1].reason, MoveReason::Failover);
        let error = rows[2].error.as_ref().map(|(_, text)| text.len());
        assert_eq!(error, Some(MAX_ERROR));
        assert_eq!(history.rows(Some("odd")).len(), MAX_ROWS / 2);
    }
}
