//! How far a session's replay is, for the list of sessions.
//!
//! Touches two counters. Invariant: nobody decides anything from them.

use std::sync::atomic::{AtomicU64, Ordering};

use helios_api::control::ReplayProgress;

/// Requests of a transaction that have been answered again, and how many there are.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    /// 0: no replay is under way.
    total: AtomicU64,
}

/// A replay that is under way; it is over when this is dropped.
#[derive(Debug)]
pub(super) struct UnderWay<'a>(&'a Progress);

impl Progress {
    /// A replay of so many requests begins.
    pub(super) fn begin(&self, total: usize) -> UnderWay<'_> {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(total as u64, Ordering::Relaxed);
        UnderWay(self)
    }

    /// How far it is; `None`: none is under way.
    #[must_use]
    pub fn now(&self) -> Option<ReplayProgress> {
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed).min(total);
        (total > 0).then_some(ReplayProgress { done, total })
    }
}

impl UnderWay<'_> {
    /// So many have been answered.
    pub(super) fn at(&self, done: usize) {
        self.0.done.store(done as u64, Ordering::Relaxed);
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.total.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replay_is_shown_while_it_is_under_way() {
        let progress = Progress::default();
        assert_eq!(progress.now(), None);
        let replay = progress.begin(10);
        replay.at(4);
        let (done, total) = (4, 10);
        assert_eq!(progress.now(), Some(ReplayProgress { done, total }));
        drop(replay);
        assert_eq!(progress.now(), None);
        // Nothing to run again is nothing to show.
        let _replay = progress.begin(0);
        assert_eq!(progress.now(), None);
    }
}
