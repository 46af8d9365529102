//! When a session has something to do although nothing came: looking for a server, reading temporary
//! tables, cutting off what is in flight, ending what is idle.

use std::time::Duration;

use helios_session::TxnStatus;
use helios_wire::{ErrorFields, SqlState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::gate::{GateState, Phase};
use super::session::{End, Session};

/// What is in flight when a planned move cuts it off, and goes on, is looked at again after this.
const CUT_AGAIN: Duration = Duration::from_millis(50);

impl Session {
    pub(super) fn next_timer(&self) -> Option<Instant> {
        let timers = [
            self.next_other(),
            self.keeps_at(),
            self.back_at(),
            self.later_at(),
        ];
        timers.into_iter().flatten().min()
    }

    fn next_other(&self) -> Option<Instant> {
        if self.server.is_none() && self.gate.phase == Phase::Open && self.wants_server() {
            return Some(self.retry_at.unwrap_or_else(Instant::now));
        }
        if self.cancel_waits {
            return Some(Instant::now() + Duration::from_millis(2));
        }
        if self.cut_waits() {
            return Some(Instant::now() + CUT_AGAIN);
        }
        let idle = self.shared.options.idle_timeout?;
        Some(self.last_activity + idle.max(Duration::from_secs(1)))
    }

    /// Whether temporary tables are to be read, and no timer stands for that.
    pub(super) fn keeps_unarmed(&self) -> bool {
        let before = |at: Instant| self.timer_at.is_none_or(|armed| at < armed);
        self.temporary.is_some()
            && (self.keeps_at().is_some_and(before) || self.later_at().is_some_and(before))
    }

    /// Whether to look for a backend: one is needed, and no timer stands for the next attempt.
    pub(super) fn needs_server_now(&self) -> bool {
        let armed = |next: Instant| self.timer_at.is_some_and(|armed| armed <= next);
        self.server.is_none()
            && self.gate.phase == Phase::Open
            && self.wants_server()
            && !self.retry_at.is_some_and(armed)
    }

    /// Whether a backend is needed now.
    pub(super) fn wants_server(&self) -> bool {
        !self.client.input.is_empty()
            || self.must_rebuild()
            || self.client.passing > 0
            || self.last_words.is_some()
            || self.resend.is_some()
    }

    pub(super) async fn timer(&mut self, gate: &mut watch::Receiver<GateState>) -> Result<(), End> {
        if self.makes_now() {
            self.make_later(gate).await;
            return Ok(());
        }
        if self.keeps_now() {
            self.keep_temporary(gate).await;
            return Ok(());
        }
        if std::mem::take(&mut self.domain_due) {
            self.make_domain(gate).await;
            return Ok(());
        }
        if self.server.is_none() && self.gate.phase == Phase::Open && self.wants_server() {
            if self.retry_at.is_some_and(|at| at > Instant::now()) {
                return Ok(());
            }
            return self.find_server(gate).await;
        }
        if self.back_at().is_some_and(|at| at <= Instant::now()) {
            return self.come_back(gate).await;
        }
        if self.cancel_waits {
            self.forward_cancel();
            return Ok(());
        }
        if self.cut_waits() {
            self.cut_in_flight();
            return Ok(());
        }
        let quiet = self.tracker.is_between() && self.tracker.status() == TxnStatus::Idle;
        if let Some(limit) = self.shared.options.idle_timeout
            && quiet
            && self.last_activity.elapsed() >= limit
        {
            let message = "terminating connection due to idle-session timeout";
            return Err(End::Fatal(ErrorFields::fatal(
                SqlState::IDLE_SESSION_TIMEOUT,
                message,
            )));
        }
        Ok(())
    }
}
