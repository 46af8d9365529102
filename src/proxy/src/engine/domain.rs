//! The domain that marks of calls need from PostgreSQL 18 on ([`super::own::bound_mark`]).
//!
//! Touches the session's backend, between exchanges. The invariant: without it the client's call runs
//! all the same, as one whose outcome a crash leaves unknown.

use tokio::sync::watch;

use super::gate::{GateState, Phase};
use super::own;
use super::replay::{self, ReplayError};
use super::session::Session;

impl Session {
    /// Has the backend make it, once in its life as a rule.
    pub(super) async fn make_domain(&mut self, gate: &watch::Receiver<GateState>) {
        let epoch = self.gate.topology.epoch;
        let Some(server) = self.server.as_mut() else {
            return;
        };
        let mut watch = gate.clone();
        let gone = watch.wait_for(|g| g.topology.epoch != epoch || g.phase >= Phase::Gather);
        let sql = own::make_domain();
        let made = tokio::select! {
            biased;
            made = replay::simple(&mut server.link, &sql) => Some(made),
            _ = gone => None,
        };
        match made {
            Some(Ok(_)) => self.tracker.domain_made(true),
            Some(Err(ReplayError::State(error))) => {
                tracing::debug!(session = %self.entry().id, %error, "calls get no marks");
                self.tracker.domain_made(false);
            }
            Some(Err(_)) | None => self.server_lost(),
        }
    }
}
