//! The first half of a planned move: everybody stands still, for as short as can be.
//!
//! The invariant: nobody is held because of somebody else for longer than a moment. What can be
//! waited for (a transaction that cannot be moved, a statement that cannot be cut off and run again:
//! CALL, DO, VACUUM, several statements in one query) is waited for while the gate is open, up to
//! the request's limit; what is still there then is left to the evidence, as at a crash.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use helios_api::Epoch;
use helios_api::control::{DrainReport, DrainRequest, MoveReason, SessionInfo};
use helios_api::protection::Unprotected;
use tokio::sync::MutexGuard;
use tokio_util::sync::CancellationToken;

use super::{CommandError, ProxyHandle};
use crate::engine::gate::Phase;
use crate::engine::registry::lock;

/// How long open transactions may go on by themselves once new ones are held, before they are
/// frozen: long enough for short ones to end, short enough not to be noticed.
const GRACE: Duration = Duration::from_millis(5);

/// How long frozen sessions may take to finish the statement in flight before it is cut.
const STATEMENT_GRACE: Duration = Duration::from_millis(10);

/// How long everybody is held for a statement in flight that cannot be cut: most end sooner.
const UNCUT_GRACE: Duration = Duration::from_millis(250);

/// How long a statement that cannot be cut may still take when the request's limit is over.
const LAST_GRACE: Duration = Duration::from_millis(500);

/// How long backends may take to pass on the last notifications.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(10);

impl ProxyHandle {
    /// Holds new transactions, lets open ones end within a short grace, freezes the rest between
    /// statements. Sessions that cannot be moved, and statements that cannot be cut off, get up to
    /// the request's limit to end by themselves first, while everybody else goes on.
    ///
    /// # Errors
    /// [`CommandError::Stale`]; [`CommandError::Superseded`] when the primary is replaced meanwhile,
    /// or the drain undone.
    pub async fn drain(&self, request: &DrainRequest) -> Result<DrainReport, CommandError> {
        let _one = self.0.moving.lock().await;
        self.check_epoch(request.epoch)?;
        let over = CancellationToken::new();
        lock(&self.0.drain).clone_from(&over);
        *lock(&self.0.waiting) = None;
        tokio::select! {
            biased;
            () = over.cancelled() => Err(CommandError::Superseded),
            report = self.drained(request) => Ok(report),
        }
    }

    /// Whoever has got this far may say what the sessions do next: a drain that is under way is
    /// ended. What it waits for may never come: the primary may have died.
    pub(super) async fn next_step(&self, epoch: Epoch) -> Result<MutexGuard<'_, ()>, CommandError> {
        self.check_epoch(epoch)?;
        lock(&self.0.drain).cancel();
        let one = self.0.moving.lock().await;
        self.check_epoch(epoch)?;
        Ok(one)
    }

    async fn drained(&self, request: &DrainRequest) -> DrainReport {
        let deadline = Instant::now() + Duration::from_millis(request.timeout_ms);
        let began = loop {
            self.wait_for_unprotected(deadline).await;
            let began = Instant::now();
            if self.hold(deadline).await {
                break began;
            }
            // They go on where they stand; a statement that was cut off runs again.
            self.0.shared.gate.publish(Phase::Open, None, None);
            self.wait_for_uncut(deadline).await;
        };
        self.hear_out().await;
        let mut report = DrainReport {
            micros: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
            ..DrainReport::default()
        };
        for info in self.sessions() {
            match (info.unprotected, info.transaction_age_ms) {
                (Some(_), _) => report.unprotected += 1,
                (None, Some(_)) => report.frozen += 1,
                (None, None) => report.idle += 1,
            }
        }
        report
    }

    /// Takes all sessions to a stand; `false` when a statement that cannot be cut is in the way, and
    /// there is time to wait for it.
    async fn hold(&self, deadline: Instant) -> bool {
        let gate = &self.0.shared.gate;
        gate.publish(Phase::Hold, None, Some(MoveReason::Switchover));
        if gate.all_acknowledged(GRACE).await {
            return true;
        }
        gate.publish(Phase::Freeze, None, None);
        if gate.all_acknowledged(STATEMENT_GRACE).await {
            return true;
        }
        // Before anything else is cut off: it would be run again for nothing.
        let patience = deadline.min(Instant::now() + UNCUT_GRACE);
        self.wait_for_uncut(patience).await;
        if self.is_in_the_way(deadline) {
            return false;
        }
        gate.publish(Phase::Cut, None, None);
        while !gate.all_acknowledged(UNCUT_GRACE).await {
            // One that had not said so yet.
            if self.is_in_the_way(deadline) {
                return false;
            }
            if Instant::now() >= deadline {
                gate.all_acknowledged(LAST_GRACE).await;
                break;
            }
        }
        true
    }

    /// Where all stand, nobody notifies any more: backends pass on the last notifications.
    async fn hear_out(&self) {
        let shared = &self.0.shared;
        let listens = shared.registry.all().iter().any(|e| lock(&e.shown).listens);
        if listens && shared.gate.all_acknowledged(Duration::ZERO).await {
            shared.gate.publish(Phase::Still, None, None);
            shared.gate.all_acknowledged(LAST_WORD).await;
        }
    }

    /// Waits for whatever would keep everybody waiting in a drain, while all go on.
    pub(super) async fn wait_beforehand(&self, wait: Duration) {
        let deadline = Instant::now() + wait;
        self.wait_for_unprotected(deadline).await;
    }

    fn is_in_the_way(&self, deadline: Instant) -> bool {
        Instant::now() < deadline && self.has_uncut()
    }

    fn has_uncut(&self) -> bool {
        let sessions = self.0.shared.registry.all();
        sessions.iter().any(|s| s.uncut.load(Ordering::Relaxed))
    }

    async fn wait_for_uncut(&self, deadline: Instant) {
        while Instant::now() < deadline && self.has_uncut() {
            tokio::time::sleep(LOOK).await;
        }
    }

    async fn wait_for_unprotected(&self, deadline: Instant) {
        // Where replay is switched off nobody is better off for waiting: there is always one.
        let may_end = |r: Unprotected| {
            !matches!(
                r,
                Unprotected::ReplayOff | Unprotected::TransactionsNotReplayed
            )
        };
        let hurts =
            |i: &SessionInfo| i.reason.is_some_and(may_end) && i.transaction_age_ms.is_some();
        while Instant::now() < deadline && self.sessions().iter().any(hurts) {
            tokio::time::sleep(LOOK).await;
        }
    }
}
