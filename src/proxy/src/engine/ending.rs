//! The end of sessions because the proxy ends.
//!
//! The invariant: a client is told 57P01 only where everything that it was not answered has no
//! effect; where a COMMIT, or a statement that commits by itself, is in flight, it is told that
//! its outcome is unknown.

use helios_session::TxnStatus;
use helios_wire::{ErrorFields, SqlState};

use super::gate::Ending;
use super::session::{End, Session};

impl Session {
    /// Whether the proxy ends, and nothing holds the session any more.
    pub(super) fn leaves_with_proxy(&self) -> bool {
        matches!(self.shared.gate.ending(), Ending::AtBoundary | Ending::Now)
            && !self.owes()
            && self.resend.is_none()
            && self.client.passing == 0
            && self.tracker.is_quiet()
    }

    /// What its client is told.
    pub(super) fn ended_with_proxy(&self) -> End {
        let commits = !self.tracker.is_between()
            && (self.commit_in_flight() || self.tracker.status() == TxnStatus::Idle);
        End::Fatal(if commits {
            ErrorFields::fatal(
                SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
                "terminating connection because the proxy shuts down",
            )
            .detail("What is in flight may have been committed, or may still be.")
        } else {
            ErrorFields::fatal(
                SqlState::ADMIN_SHUTDOWN,
                "terminating connection because the proxy shuts down",
            )
        })
    }
}
