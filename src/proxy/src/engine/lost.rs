//! A backend that is gone: what it said last, since when, and whether it went alone.
//!
//! Notes only; what is done about it is decided elsewhere. The invariant: who is left behind has lost
//! a connection to a primary that others have left with whole ones.

use std::sync::atomic::Ordering;

use bytes::BytesMut;
use tokio::time::Instant;

use super::gate::Phase;
use super::registry::lock;
use super::session::Session;
use super::shared::Shared;

/// A fatal error that a server sent before it closed the connection.
#[derive(Debug)]
pub(super) struct LastWords {
    pub(super) frame: BytesMut,
    /// Start of the postmaster that was known then: a restart in place has another one.
    pub(super) postmaster: Option<String>,
}

impl LastWords {
    pub(super) fn new(frame: &[u8], shared: &Shared) -> Self {
        Self {
            frame: frame.into(),
            postmaster: lock(&shared.postmaster_start).clone(),
        }
    }
}

/// A backend that is gone.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lost {
    /// Since then.
    pub since: Instant,
    /// It went away by itself: the server may have started anew without a change of the epoch.
    pub alone: bool,
}

impl Lost {
    fn now() -> Self {
        Self {
            since: Instant::now(),
            alone: false,
        }
    }
}

impl Session {
    /// The backend's connection ended.
    pub(super) fn server_lost(&mut self) {
        self.end_what_failed();
        self.server = None;
        self.stays = false;
        self.entry().uncut.store(false, Ordering::Relaxed);
        self.heard &= self.tracker.is_quiet();
        self.held();
        let alone = self.gate.phase == Phase::Open;
        self.note_lost().alone |= alone;
        (self.retry_at, self.awaited) = (None, false);
        self.attempts = 0;
        tracing::debug!(session = %self.entry().id, phase = ?self.gate.phase, "backend lost");
    }

    pub(super) fn note_lost(&mut self) -> &mut Lost {
        self.entry().lost.store(true, Ordering::Relaxed);
        self.lost.get_or_insert_with(Lost::now)
    }

    pub(super) fn forget_lost(&mut self) {
        self.lost = None;
        self.entry().lost.store(false, Ordering::Relaxed);
    }

    /// The session's connection broke while the connections of others to the old primary went on: its
    /// locks were others' from then on. They have them again behind the move, so it goes last: beside
    /// new work, as it would have without the move. A connection that was opened since says nothing: a
    /// primary that has started anew lost all, and others may have found it first.
    pub(super) fn is_left_behind(&self) -> bool {
        self.lost_at()
            .is_some_and(|lost| self.shared.was_outlived(self.epoch, lost))
    }

    /// When the backend went, in microseconds since the proxy started.
    pub(super) fn lost_at(&self) -> Option<u64> {
        let ago = self.lost?.since.elapsed().as_micros();
        let ago = u64::try_from(ago).unwrap_or(u64::MAX);
        Some(self.shared.now_micros().saturating_sub(ago))
    }
}
