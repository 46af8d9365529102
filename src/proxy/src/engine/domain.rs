//! The domain that marks of calls need from PostgreSQL 18 on ([`super::own::bound_mark`]).
//!
//! Touches the session's backend, between exchanges. The invariant: without it the client's call runs
//! all the same, as one whose outcome a crash leaves unknown.

use tokio::sync::watch;

use super::asking::{Asking, Failure};
use super::gate::{GateState, Phase};
use super::lost::LastWords;
use super::own;
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
        let mut asking = Asking {
            link: &mut server.link,
            client: &mut self.client.output,
        };
        let statements = own::make_domain();
        let statements = statements.each_ref().map(String::as_str);
        let made = tokio::select! {
            biased;
            made = asking.run_as_client(&statements) => made,
            _ = gone => Err(Failure::Gone(None)),
        };
        match made {
            Ok(()) => self.tracker.domain_made(true),
            Err(Failure::Not(error) | Failure::Later(error)) => {
                tracing::debug!(session = %self.entry().id, %error, "calls get no marks");
                self.tracker.domain_made(false);
            }
            Err(Failure::Gone(words)) => {
                self.last_words = words.map(|frame| LastWords::new(&frame, &self.shared));
                self.server_lost();
            }
        }
    }
}
