//! Deaths on purpose, so that tests can have the operator die at every step of a move. Only in debug
//! builds, and only where the environment says so: a release does nothing here.
//!
//! `HELIOS_TEST_DIE_AT=fence` ends the process when the step is durable and nothing of it was done,
//! `HELIOS_TEST_DIE_AT=fence:done` when all of it was done and that is not durable. Either only in
//! the process that has begun the step: its successor lives.

use helios_cluster::ClusterState;

/// When a process dies.
#[cfg(debug_assertions)]
#[derive(Debug, Default)]
pub(super) struct Dying {
    begun: Option<(u64, &'static str)>,
}

#[cfg(debug_assertions)]
impl Dying {
    /// A decision was made and is not durable.
    pub(super) fn before_save(&self, before: &ClusterState, after: &ClusterState) {
        let (from, to) = (step(before), step(after));
        if from.is_some() && from == self.begun && from != to {
            die(from, ":done");
        }
    }

    /// It is durable, and nothing was done about it.
    pub(super) fn after_save(&mut self, before: &ClusterState, after: &ClusterState) {
        let (from, to) = (step(before), step(after));
        if from != to {
            self.begun = to;
            die(to, "");
        }
    }
}

#[cfg(debug_assertions)]
fn step(state: &ClusterState) -> Option<(u64, &'static str)> {
    state.moving().map(|m| (m.id, m.step.phase().as_str()))
}

#[cfg(debug_assertions)]
fn die(at: Option<(u64, &'static str)>, when: &str) {
    let Some((_, step)) = at else { return };
    if std::env::var("HELIOS_TEST_DIE_AT").is_ok_and(|wanted| wanted == format!("{step}{when}")) {
        tracing::warn!(step, when, "dying, as a test has asked for");
        std::process::abort();
    }
}

/// Nobody.
#[cfg(not(debug_assertions))]
#[derive(Debug, Default)]
pub(super) struct Dying;

#[cfg(not(debug_assertions))]
impl Dying {
    #[allow(clippy::unused_self, reason = "the same call as in a debug build")]
    pub(super) fn before_save(&self, _: &ClusterState, _: &ClusterState) {}

    #[allow(clippy::unused_self, reason = "the same call as in a debug build")]
    pub(super) fn after_save(&mut self, _: &ClusterState, _: &ClusterState) {}
}
