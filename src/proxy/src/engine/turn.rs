//! The right to replay: beside others, or alone where sequences are set back.
//!
//! The invariant: who sets sequences back has the lock to itself.

use std::sync::Arc;
use std::time::Duration;

use helios_api::Endpoint;
use helios_session::sequences::candidates;
use helios_session::tracker::Tracker;
use tokio::sync::OwnedRwLockReadGuard;

use super::replay::ReplayError;
use super::sequences::{Keeper, Service};
use super::shared::Shared;

/// How long a replay waits to be alone: all that come later wait behind it.
const ALONE_WAIT: Duration = Duration::from_secs(2);

/// The right to replay.
pub(super) enum Turn {
    /// Beside others: no value of a sequence was seen.
    Beside {
        _guard: OwnedRwLockReadGuard<Option<Service>>,
    },
    /// Alone, sequences are set back.
    Alone(Box<Keeper>),
}

impl Turn {
    /// Waits for the right to replay the transaction of `tracker`, in `database` at `endpoint`.
    ///
    /// # Errors
    /// The proxy's own connection cannot be had at the moment.
    pub(super) async fn take(
        shared: &Arc<Shared>,
        endpoint: &Endpoint,
        database: &str,
        tracker: &Tracker,
    ) -> Result<Self, ReplayError> {
        let lock = Arc::clone(&shared.replaying);
        let records = candidates(tracker);
        if records.is_empty() {
            return Ok(Self::Beside {
                _guard: lock.read_owned().await,
            });
        }
        let alone = tokio::time::timeout(ALONE_WAIT, lock.write_owned()).await;
        let guard = alone.map_err(std::io::Error::from)?;
        let keeper = Keeper::open(shared, endpoint, database, records, guard).await?;
        Ok(Self::Alone(Box::new(keeper)))
    }

    /// Waits for the right to replay beside others; values of sequences come as they come.
    pub(super) async fn beside(shared: &Arc<Shared>) -> Self {
        let _guard = Arc::clone(&shared.replaying).read_owned().await;
        Self::Beside { _guard }
    }

    /// Who sets sequences back, if that is needed.
    pub(super) fn keeper(&mut self) -> Option<&mut Keeper> {
        match self {
            Self::Beside { .. } => None,
            Self::Alone(keeper) => Some(keeper),
        }
    }
}
