//! The lease of a primary, as its agent holds it: asks, grants, confirmations, and the guard that
//! kills the server when it has ended. What counts is decided by [`Tenancy`].
//!
//! Invariant: once a lease was taken, the instance is writable only while one holds. The guard is a
//! thread of its own: neither a command that takes its time nor a busy runtime delays it. Time is
//! that since the machine's start, suspension included, which nobody can set.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use helios_api::agent::{AgentError, AgentState, InstanceState};
use helios_api::lease::{LeaseReply, LeaseRequest};
use helios_api::{InstanceName, Lsn};
use helios_cluster::Tenancy;
use helios_cluster::lease::Moment;
use nix::sys::signal::Signal;

use crate::error::{failed, file_failed};
use crate::{AgentConfig, AgentFailure, files, process};

/// How often the guard looks. What it may be late by is part of `helios_cluster::lease::wait_ms`.
const INTERVAL: Duration = Duration::from_millis(20);
/// How long the start of a primary waits for its lease: the operator renews it several times a
/// second.
const WAIT_LIMIT: Duration = Duration::from_secs(5);

/// An instance's lease.
#[derive(Debug, Clone)]
pub(crate) struct Lease(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    config: AgentConfig,
    marker: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    tenancy: Tenancy,
    /// Number of the last ask.
    number: u64,
    /// Whether this instance ever took a lease (durable).
    leased: bool,
}

impl Lease {
    /// The lease of the instance with this configuration; nothing is guarded yet.
    pub(crate) fn new(config: &AgentConfig) -> Self {
        let marker = config.home().join("agent.leased");
        // Later than any number of an agent before this one.
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let micros = since.unwrap_or_default().as_micros();
        Self(Arc::new(Shared {
            inner: Mutex::new(Inner {
                tenancy: Tenancy::default(),
                number: u64::try_from(micros).unwrap_or_default(),
                leased: marker.exists(),
            }),
            marker,
            config: config.clone(),
        }))
    }

    /// Starts the guard, which ends with the last of these.
    pub(crate) fn guard(&self) -> Result<(), AgentFailure> {
        let shared = Arc::downgrade(&self.0);
        std::thread::Builder::new()
            .name("lease".to_owned())
            .spawn(move || watch(&shared))
            .map(drop)
            .map_err(|e| AgentFailure::Config(format!("could not start a thread: {e}")))
    }

    /// Takes a grant, if it is one of now, and makes the next ask.
    pub(crate) fn renew(
        &self,
        request: &LeaseRequest,
        state: &AgentState,
    ) -> Result<LeaseReply, AgentError> {
        // A fence that stops it cleanly is still at it; such a stop may take longer than the lease.
        let runs = matches!(state.instance, InstanceState::Primary { .. });
        let fenced = state.fenced && !runs && request.epoch == state.epoch;
        let stale = request.epoch < state.epoch || fenced;
        let mut inner = self.lock();
        if let Some(grant) = request.grant.filter(|_| !stale) {
            if !inner.leased {
                let file = File::create(&self.0.marker).and_then(|file| file.sync_all());
                file.map_err(file_failed("could not write", &self.0.marker))?;
                inner.leased = true;
            }
            let _ = inner.tenancy.grant(&request.terms, grant, now());
        }
        inner.number += 1;
        let ask = inner.number;
        inner.tenancy.ask(ask, now());
        let version = inner.tenancy.version();
        Ok(LeaseReply { ask, version })
    }

    /// The instance becomes a standby, which needs none. It is held to a lease when it is started
    /// as a primary again.
    pub(crate) fn release(&self) {
        self.lock().tenancy = Tenancy::default();
    }

    /// Waits until the instance may be started as a primary.
    pub(crate) async fn wait(&self) -> Result<(), AgentError> {
        let began = tokio::time::Instant::now();
        while !self.lock().may_start() {
            if began.elapsed() > WAIT_LIMIT {
                return Err(failed(format_args!(
                    "nobody granted the lease of a primary within {WAIT_LIMIT:?}"
                )));
            }
            tokio::time::sleep(INTERVAL).await;
        }
        Ok(())
    }

    /// The moment before a record is written, when one should be.
    pub(crate) fn wants_proof(&self) -> Option<Moment> {
        let now = now();
        self.lock().tenancy.wants_proof(now).then_some(now)
    }

    /// A record was written at `at` behind the moment `since`.
    pub(crate) fn written(&self, at: Lsn, since: Moment) {
        self.lock().tenancy.written(at, since);
    }

    /// What a standby has flushed.
    pub(crate) fn flushed(&self, standby: &InstanceName, flushed: Lsn) {
        self.lock().tenancy.flushed(standby, flushed);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock()
    }
}

impl Inner {
    fn may_start(&self) -> bool {
        !self.leased || self.tenancy.version().is_some() && !self.tenancy.expired(now())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills a server that may be writable. `false`: there was none.
    fn strike(&self, first: bool) -> bool {
        let postmaster = process::postmaster(&self.config.data_dir).map(|(pid, _)| pid);
        if files::is_standby(&self.config) || (postmaster.is_none() && !first) {
            return false;
        }
        let killed = process::stop_at_once(postmaster, &self.config.data_dir, Signal::SIGKILL);
        if let Err(error) = killed {
            tracing::error!(%error, "could not kill a server whose lease has ended");
        }
        postmaster.is_some()
    }
}

fn watch(shared: &Weak<Shared>) {
    let mut ended = false;
    while let Some(shared) = shared.upgrade() {
        let expired = shared.lock().tenancy.expired(now());
        if expired && shared.strike(!ended) {
            tracing::warn!("the primary's lease was not renewed: PostgreSQL was killed");
        }
        ended = expired;
        drop(shared);
        std::thread::sleep(INTERVAL);
    }
}

/// Milliseconds since the machine's start.
fn now() -> Moment {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    let nanos = u64::try_from(time.tv_nsec).unwrap_or_default();
    seconds.saturating_mul(1_000) + nanos / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::Epoch;
    use helios_api::lease::{Rule, Terms};
    use std::path::Path;

    fn request(epoch: u64, grant: Option<u64>) -> LeaseRequest {
        LeaseRequest {
            epoch: Epoch(epoch),
            terms: Terms {
                version: 1,
                rule: Rule::Any(["b".parse().unwrap()].into()),
                hold_ms: 200,
            },
            grant,
        }
    }

    fn state(epoch: u64, fenced: bool) -> AgentState {
        AgentState {
            revision: 1,
            name: "a".parse().unwrap(),
            epoch: Epoch(epoch),
            fenced,
            instance: InstanceState::Empty,
            leaving: false,
            settings: helios_api::agent::SettingsReport::default(),
        }
    }

    #[tokio::test]
    async fn a_start_waits_for_a_lease_once_one_was_taken() {
        let home = tempfile::tempdir().unwrap();
        let name: InstanceName = "a".parse().unwrap();
        let config = AgentConfig::local(name, home.path(), home.path(), 1, Path::new("/bin"));
        let lease = Lease::new(&config);
        lease.wait().await.unwrap();
        let first = lease.renew(&request(1, None), &state(1, false)).unwrap();
        assert_eq!(first.version, None);
        // Neither an earlier epoch nor a fence takes a grant.
        for (epoch, fenced) in [(2, false), (1, true)] {
            let reply = lease.renew(&request(1, Some(first.ask)), &state(epoch, fenced));
            assert_eq!(reply.unwrap().version, None);
        }
        let reply = lease.renew(&request(1, Some(first.ask)), &state(1, false));
        assert_eq!(reply.unwrap().version, Some(1));
        lease.wait().await.unwrap();
        // The agent after this one knows.
        let next = Lease::new(&config);
        assert!(!next.lock().may_start());
        let ask = next.renew(&request(1, None), &state(1, false)).unwrap().ask;
        assert!(ask > first.ask);
        next.renew(&request(1, Some(ask)), &state(1, false))
            .unwrap();
        assert!(next.lock().may_start());
        tokio::time::sleep(Duration::from_millis(250)).await;
        assert!(!next.lock().may_start());
    }
}
