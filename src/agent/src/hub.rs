//! The agent's published state: one value, a revision that grows with every change, and waiting
//! for the next one.
//!
//! Observations of a postmaster carry the number of its run. Once the agent has said that a run is
//! over, whatever a late observer still says about it is dropped.

use std::time::{SystemTime, UNIX_EPOCH};

use helios_api::agent::{AgentState, InstanceState, SettingsReport};
use helios_api::{Epoch, InstanceName};
use tokio::sync::watch;

/// Number of a postmaster's run, never used twice by one agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run(pub(crate) u64);

#[derive(Debug)]
struct Published {
    state: AgentState,
    run: Option<Run>,
}

/// Holder of the published state.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    sender: watch::Sender<Published>,
}

impl Hub {
    pub(crate) fn new(name: InstanceName) -> Self {
        // Later than any revision of an agent before this one: nobody waits for a number that has
        // been before.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let millis = now.unwrap_or_default().as_millis();
        let state = AgentState {
            revision: u64::try_from(millis).unwrap_or_default(),
            name,
            epoch: Epoch(0),
            fenced: false,
            instance: InstanceState::Empty,
            leaving: false,
            settings: SettingsReport::default(),
        };
        Self {
            sender: watch::Sender::new(Published { state, run: None }),
        }
    }

    /// The state now.
    pub(crate) fn state(&self) -> AgentState {
        self.sender.borrow().state.clone()
    }

    /// Waits until the revision is another one than `seen`.
    pub(crate) async fn changed(&self, seen: u64) -> AgentState {
        let mut receiver = self.sender.subscribe();
        match receiver.wait_for(|p| p.state.revision != seen).await {
            Ok(published) => published.state.clone(),
            Err(_) => self.state(),
        }
    }

    /// Waits until the state is as wanted.
    pub(crate) async fn until(&self, wanted: impl Fn(&AgentState) -> bool) {
        let mut receiver = self.sender.subscribe();
        // The sender is this hub's own: it cannot be gone.
        let _ = receiver.wait_for(|p| wanted(&p.state)).await;
    }

    /// The agent was told to end.
    pub(crate) fn leave(&self) {
        self.change(|p| p.state.leaving = true);
    }

    /// What became of the settings.
    pub(crate) fn set_settings(&self, settings: SettingsReport) {
        self.change(|p| p.state.settings = settings);
    }

    /// Says what the instance is while no postmaster is observed.
    pub(crate) fn set(&self, instance: InstanceState) {
        self.change(|p| {
            p.run = None;
            p.state.instance = instance;
        });
    }

    /// A postmaster was started: from now on its observer reports.
    pub(crate) fn begin(&self, run: Run, step: &str) {
        self.change(|p| {
            p.run = Some(run);
            p.state.instance = InstanceState::Starting {
                step: step.to_owned(),
            };
        });
    }

    /// What the observer of a run has seen; dropped when the run is over.
    pub(crate) fn observe(&self, run: Run, instance: InstanceState) {
        self.change(|p| {
            if p.run == Some(run) {
                p.state.instance = instance;
            }
        });
    }

    /// What is durable has changed.
    pub(crate) fn set_durable(&self, epoch: Epoch, fenced: bool) {
        self.change(|p| {
            p.state.epoch = epoch;
            p.state.fenced = fenced;
        });
    }

    fn change(&self, change: impl FnOnce(&mut Published)) {
        self.sender.send_if_modified(|published| {
            let before = published.state.clone();
            change(published);
            let changed = published.state != before;
            if changed {
                published.state.revision += 1;
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn late_observations_are_dropped_and_waiters_wake() {
        let hub = Hub::new("a".parse().unwrap());
        hub.begin(Run(1), "recovery");
        let seen = hub.state().revision;
        let waiter = tokio::spawn({
            let hub = hub.clone();
            async move { hub.changed(seen).await }
        });
        hub.set(InstanceState::Empty);
        hub.observe(Run(1), InstanceState::Unresponsive { for_ms: 1 });
        assert_eq!(hub.state().instance, InstanceState::Empty);
        assert_eq!(waiter.await.unwrap().revision, seen + 1);
        hub.set(InstanceState::Empty);
        assert_eq!(hub.state().revision, seen + 1);
    }
}
