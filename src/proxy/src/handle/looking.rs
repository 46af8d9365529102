//! What a proxy says of itself: its status, its sessions, its metrics.
//!
//! Invariant: looking changes nothing but gauges.

use std::sync::atomic::Ordering;

use helios_api::control::{ProxyStatus, SessionInfo};
use helios_api::protection::{ProtectionReport, Unprotected};

use super::ProxyHandle;
use crate::engine::gate::Phase;
use crate::engine::registry::lock;

impl ProxyHandle {
    /// What the proxy is doing.
    #[must_use]
    pub fn status(&self) -> ProxyStatus {
        let state = self.0.shared.gate.now();
        let sessions = self.sessions();
        let count = |f: &dyn Fn(&SessionInfo) -> bool| sessions.iter().filter(|s| f(s)).count();
        ProxyStatus {
            epoch: state.topology.epoch,
            phase: match state.phase {
                Phase::Open if self.0.leaving.load(Ordering::Relaxed) => "leaving",
                phase => phase.name(),
            }
            .to_owned(),
            sessions: sessions.len() as u64,
            in_transaction: count(&|s| s.transaction_age_ms.is_some()) as u64,
            protected: count(&|s| s.unprotected.is_none()) as u64,
            held: count(&|s| matches!(s.state.as_str(), "held" | "migrating")) as u64,
            primary_reachable: self.0.reachable.load(Ordering::Relaxed),
            journal_bytes: self.0.shared.pool.used() as u64,
            slow: *lock(&self.0.latency),
        }
    }

    /// All sessions.
    #[must_use]
    pub fn sessions(&self) -> Vec<SessionInfo> {
        let now = self.0.shared.now_micros();
        self.0
            .shared
            .registry
            .all()
            .iter()
            .map(|entry| entry.info(now))
            .collect()
    }

    /// What was protected and what was not since the proxy started, of one role's sessions where
    /// one is given.
    #[must_use]
    pub fn protection(&self, of: Option<&str>) -> ProtectionReport {
        self.0.shared.protection(of)
    }

    /// Bytes of memory that all journals hold; for tests of the accounting.
    #[must_use]
    pub fn journal_bytes(&self) -> usize {
        self.0.shared.pool.used()
    }

    /// Bytes of all journals on disk; for tests of the accounting.
    #[must_use]
    pub fn journal_disk_bytes(&self) -> usize {
        self.0.shared.disk.used()
    }

    /// Refreshes the gauges and renders all metrics in Prometheus' text format.
    #[must_use]
    pub fn render_metrics(&self) -> String {
        let status = self.status();
        let metrics = self.metrics();
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        metrics.journal_bytes.set(gauge(status.journal_bytes));
        let disk = self.0.shared.disk.used();
        metrics.journal_disk_bytes.set(gauge(disk as u64));
        metrics.protected_sessions.set(gauge(status.protected));
        self.0.shared.read_meters();
        let sessions = self.sessions();
        for reason in Unprotected::ALL {
            let with = sessions.iter().filter(|s| s.reason == Some(reason));
            metrics
                .unprotected_sessions(reason.name())
                .set(gauge(with.count() as u64));
        }
        metrics.render()
    }
}
