//! Renews the lease of whoever may be primary: a task an instance, which works while its instance
//! holds the duty ([`helios_cluster::lease::duty`]).
//!
//! Invariant: what is granted is what is durable, and that a grant was sent is known before it is
//! sent. An ask that was not answered is not granted later: to one that is cut off at most one
//! grant is under way.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use helios_agent::client::{AgentClient, ClientError};
use helios_api::Epoch;
use helios_api::lease::{LeaseRequest, Terms};
use tokio::sync::{Notify, watch};

use super::agents::{Known, learn, lock};

/// An agent that does not know of leases is asked again after this.
const UNKNOWN: Duration = Duration::from_secs(5);

/// What an instance is granted, and how often; `None`: nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Duty {
    pub(super) epoch: Epoch,
    pub(super) terms: Terms,
    pub(super) every: Duration,
}

impl Duty {
    /// How long an answer may take before the agent counts as silent.
    fn limit(&self) -> Duration {
        Duration::from_millis(self.terms.hold_ms / 2)
    }
}

/// Renews until it is dropped.
pub(super) async fn renew(
    client: AgentClient,
    known: Arc<Mutex<Known>>,
    mut duty: watch::Receiver<Option<Duty>>,
    changed: Arc<Notify>,
) {
    let mut ask = None;
    loop {
        let Some(now) = duty.borrow_and_update().clone() else {
            ask = None;
            if duty.changed().await.is_err() {
                return;
            }
            continue;
        };
        let began = Instant::now();
        let granting = ask.take();
        if granting.is_some() {
            lock(&known).granted = began;
        }
        let request = LeaseRequest {
            epoch: now.epoch,
            terms: now.terms.clone(),
            grant: granting,
        };
        let pause = match client.renew(&request, now.limit()).await {
            Ok(reply) => {
                ask = Some(reply.ask);
                note(&client, &known, reply.version, &changed).await;
                granting.map_or(Duration::ZERO, |_| now.every)
            }
            Err(ClientError::Protocol { .. }) => UNKNOWN,
            Err(error) => {
                silent(&known, began, &error, &changed);
                now.every
            }
        };
        // Other terms are offered at once.
        let _ = tokio::time::timeout(pause, duty.changed()).await;
    }
}

/// Takes note of an answer. One whose question for the state is still under way is asked anew.
async fn note(client: &AgentClient, known: &Mutex<Known>, version: Option<u64>, changed: &Notify) {
    let unknown = {
        let mut known = lock(known);
        if known.version != version {
            known.version = version;
            changed.notify_one();
        }
        known.state.is_none()
    };
    if unknown && let Ok(state) = client.state().await {
        learn(known, state, changed);
    }
}

/// An agent that answers no more: what it said last is worth nothing.
fn silent(known: &Mutex<Known>, since: Instant, error: &ClientError, changed: &Notify) {
    let mut known = lock(known);
    if known.state.take().is_some() {
        tracing::info!(%error, "agent does not answer for the lease");
        known.silent_since = since;
        changed.notify_one();
    }
}
