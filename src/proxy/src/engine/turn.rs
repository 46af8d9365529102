//! The right to replay: beside others, or alone where sequences are set back.
//!
//! The invariant: who sets sequences back has the lock to itself.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use helios_api::Endpoint;
use helios_api::control::MoveReason;
use helios_session::TxnStatus;
use helios_session::sequences::{candidates, run};
use helios_session::tracker::Tracker;
use tokio::sync::OwnedRwLockReadGuard;

use super::gate::Phase;
use super::preallocate::TakenAhead;
use super::registry::lock;
use super::replay::ReplayError;
use super::runs::Records;
use super::sequences::{Keeper, Service};
use super::session::Session;
use super::shared::Shared;

/// How long a replay waits to be alone: all that come later wait behind it.
const ALONE_WAIT: Duration = Duration::from_secs(2);

/// Within so many microseconds a session notices that its server has gone, before anybody can be
/// let in by that server's next start.
const NOTICED_WITHIN: u64 = 100_000;

/// The right to replay.
pub(super) enum Turn {
    /// Beside others: no value of a sequence was seen, or its backend has them, or they come as they
    /// come.
    Beside {
        /// Until nothing draws from a sequence any more.
        guard: Option<OwnedRwLockReadGuard<Option<Service>>>,
        /// What the backend has.
        taken: Option<TakenAhead>,
    },
    /// Alone, sequences are set back.
    Alone(Box<Keeper>),
}

impl Turn {
    /// Waits for the right to replay the transaction of `tracker`, in `database` at `endpoint`; values
    /// of sequences that were seen before `since`, in microseconds since the proxy started, come as
    /// they come. `one_by_one`: no setting back serves several records.
    ///
    /// # Errors
    /// The proxy's own connection cannot be had at the moment.
    pub(super) async fn take(
        shared: &Arc<Shared>,
        endpoint: &Endpoint,
        database: &str,
        tracker: &Tracker,
        (since, one_by_one): (u64, bool),
    ) -> Result<Self, ReplayError> {
        let lock = Arc::clone(&shared.replaying);
        let wanted = to_set_back(tracker, since);
        if wanted.is_empty() {
            return Ok(Self::beside(shared, None).await);
        }
        let alone = tokio::time::timeout(ALONE_WAIT, lock.write_owned()).await;
        let guard = alone.map_err(std::io::Error::from)?;
        let apart = (!one_by_one).then(|| Arc::new(run::apart(tracker)));
        let whole = since == 0;
        let records = Records {
            wanted,
            apart,
            whole,
        };
        let keeper = Keeper::open(shared, endpoint, database, records, guard).await?;
        Ok(Self::Alone(Box::new(keeper)))
    }

    /// Waits for the right to replay beside others; values of sequences come as they come, or from
    /// what was taken ahead.
    pub(super) async fn beside(shared: &Arc<Shared>, taken: Option<TakenAhead>) -> Self {
        let guard = Some(Arc::clone(&shared.replaying).read_owned().await);
        Self::Beside { guard, taken }
    }

    /// Whether a sequence is set back, or may be yet.
    pub(super) fn sets_back(&self) -> Arc<AtomicBool> {
        match self {
            Self::Beside { .. } => Arc::default(),
            Self::Alone(keeper) => keeper.sets_back(),
        }
    }

    /// The replay has come to record `next`, everything before it being sent: where no sequence is
    /// set back from there on, the rest goes on beside others. It may draw from sequences all the
    /// same, so nobody sets one back before it is over.
    pub(super) fn at(&mut self, next: usize) {
        if let Self::Alone(keeper) = self {
            keeper.release_behind(next);
        }
    }

    /// The replay draws from no sequence any more.
    pub(super) fn end(&mut self) {
        match self {
            Self::Beside { guard, .. } => *guard = None,
            Self::Alone(keeper) => keeper.end(),
        }
    }

    /// Who sets sequences back, if that is needed.
    pub(super) fn keeper(&mut self) -> Option<&mut Keeper> {
        match self {
            Self::Beside { .. } => None,
            Self::Alone(keeper) => Some(keeper),
        }
    }

    /// What the backend has of sequences.
    pub(super) fn taken(&mut self) -> Option<&mut TakenAhead> {
        match self {
            Self::Beside { taken, .. } => taken.as_mut(),
            Self::Alone(_) => None,
        }
    }
}

/// Records whose values of sequences come again.
fn to_set_back(tracker: &Tracker, since: u64) -> BTreeSet<usize> {
    let all = tracker.journal().records();
    let mut records = candidates(tracker);
    records.retain(|at| all.get(*at).is_some_and(|r| r.at_micros > since));
    records
}

/// When the turn of this proxy ends by the server's clock, in seconds, where other proxies wait for
/// it: they go on then, and this process may be stopped between any two of its instructions.
pub(super) async fn turn_ends(
    shared: &Shared,
    keeper: &mut Keeper,
) -> Result<Option<f64>, ReplayError> {
    let Some(until) = *lock(&shared.turn_until) else {
        return Ok(None);
    };
    let clock = "SELECT extract(epoch FROM pg_catalog.clock_timestamp())::pg_catalog.float8";
    let rows = keeper.ask(clock).await?;
    let now = rows
        .first()
        .and_then(|row| row.first()?.as_deref()?.parse().ok());
    // Read before the answer came: what is left counts from then at the latest.
    let left = until.saturating_duration_since(Instant::now());
    let now: f64 = now.ok_or_else(|| ReplayError::State("the server has no clock".into()))?;
    Ok(Some(now + left.as_secs_f64()))
}

impl Session {
    /// Whether its replay sets sequences back, if it may.
    pub(super) fn sets_back(&self) -> bool {
        self.tracker.status() != TxnStatus::Idle
            && self
                .values_since()
                .is_some_and(|since| !to_set_back(&self.tracker, since).is_empty())
    }

    /// Whether the session may rebuild itself in this phase; says beforehand whether it wants a
    /// turn.
    pub(super) fn is_its_time(&self) -> bool {
        let wants = &self.entry().wants_turn;
        match self.gate.phase {
            phase if phase > Phase::Gather && self.is_left_behind() => false,
            Phase::Gather => {
                let sets_back = self.sets_back();
                if sets_back && self.gate.reason == MoveReason::Failover {
                    *lock(&self.entry().seen) = self.seen_of_sequences();
                }
                wants.store(sets_back, Ordering::Relaxed);
                false
            }
            Phase::Turn => wants.load(Ordering::Relaxed),
            _ => true,
        }
    }

    /// Values of sequences that were seen later than this can be nobody else's; `None`: any may be.
    ///
    /// A server that starts anew after a crash forgets values that no commit has made durable, and
    /// gives them again to whoever is let in. On a primary of a new epoch that is nobody before the
    /// barrier goes down. A server that starts anew in its epoch is found again by each session for
    /// itself, so others may have worked on it by the time this one comes.
    pub(super) fn values_since(&self) -> Option<u64> {
        let (epoch, worked) = self.shared.worked();
        if self.epoch >= self.gate.topology.epoch || epoch > self.epoch {
            return None;
        }
        let alone = self.lost.is_some_and(|lost| lost.alone);
        let Some(lost) = self.lost_at().filter(|_| alone) else {
            return Some(0);
        };
        let unsure = worked.saturating_add(NOTICED_WITHIN) > lost;
        Some(if unsure { worked } else { 0 })
    }
}
