//! The metrics registry of one process, with typed handles.
//!
//! [`Metrics`] is an `Arc`: cloning it is cheap. What is counted per message or per exchange is a
//! public field, already resolved to its label values, so that counting is one atomic addition;
//! what happens per connection or per move goes through a method that looks its label up.
//! Each `Metrics` has a registry of its own: two proxies in one process (embedding, tests) do not
//! mix.

mod labels;
pub mod names;

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use labels::{CommitOutcome, Refusal, ReplayResult, SessionState};
use prometheus::core::Collector;
use prometheus::{
    Counter, CounterVec, Gauge, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec,
    IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};

/// All metrics of a process; a cheap handle. See the module's head.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Handles>);

/// The handles behind [`Metrics`]. Public fields need no label.
#[derive(Debug)]
pub struct Handles {
    registry: Registry,
    sessions: [IntGauge; 6],
    /// [`names::CONNECTIONS`]
    pub connections: IntCounter,
    connections_refused: IntCounterVec,
    /// [`names::JOURNAL_BYTES`]
    pub journal_bytes: IntGauge,
    /// [`names::JOURNAL_DISK_BYTES`]
    pub journal_disk_bytes: IntGauge,
    /// [`names::JOURNAL_OVERFLOWS`]
    pub journal_overflows: IntCounter,
    migrations: IntCounterVec,
    migrations_failed: IntCounter,
    migrations_successful: IntCounter,
    replays: IntCounterVec,
    replay_seconds: Histogram,
    last_replay: Gauge,
    /// [`names::LOSSES_PREVENTED`]
    pub losses_prevented: IntCounter,
    /// [`names::LOSSY_PROMOTIONS`]
    pub lossy_promotions: IntCounter,
    commit_resolutions: IntCounterVec,
    pause_seconds: HistogramVec,
    phase_seconds: HistogramVec,
    /// [`names::EXCHANGES`]
    pub exchanges: IntCounter,
    /// [`names::BYTES`], `direction="from_client"`
    pub bytes_from_client: IntCounter,
    /// [`names::BYTES`], `direction="to_client"`
    pub bytes_to_client: IntCounter,
    /// [`names::PROTECTED_SESSIONS`]
    pub protected_sessions: IntGauge,
    unprotected_sessions: IntGaugeVec,
    backend_up: IntGaugeVec,
    protection_transactions: IntCounterVec,
    protection_seconds: CounterVec,
    migrations_started: IntCounterVec,
    migrations_state_bytes: Histogram,
}

impl Deref for Metrics {
    type Target = Handles;

    fn deref(&self) -> &Handles {
        &self.0
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// From 1 ms to 30 s, dense where the design's limits lie (60, 80, 150, 200, 250, 500 ms).
const PAUSE_BUCKETS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0,
    2.0, 5.0, 10.0, 30.0,
];

/// From 1 KiB to 1 GiB.
const STATE_BUCKETS: &[f64] = &[
    1024.0,
    16_384.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    268_435_456.0,
    1_073_741_824.0,
];

impl Metrics {
    /// A registry with all metrics at zero.
    #[must_use]
    #[expect(
        clippy::expect_used,
        reason = "names and labels are constants; any test that calls this proves them valid"
    )]
    pub fn new() -> Self {
        Self::try_new().expect("names of metrics are valid and distinct")
    }

    fn try_new() -> Result<Self, prometheus::Error> {
        use names as n;
        let r = Registry::new();
        let sessions = gauges(&r, n::SESSIONS, "state")?;
        let bytes = counters(&r, n::BYTES, &["direction"])?;
        let replays = counters(&r, n::TRANSACTION_REPLAYS, &["result"])?;
        let commit_resolutions = counters(&r, n::COMMIT_RESOLUTIONS, &["outcome"])?;
        // An increase from nothing to 1 is invisible to Prometheus; one from 0 is not.
        for result in ReplayResult::ALL {
            replays.with_label_values(&[result.label()]);
        }
        for outcome in CommitOutcome::ALL {
            commit_resolutions.with_label_values(&[outcome.label()]);
        }
        let connections_refused = counters(&r, n::CONNECTIONS_REFUSED, &["reason"])?;
        for refusal in Refusal::ALL {
            connections_refused.with_label_values(&[refusal.label()]);
        }
        Ok(Self(Arc::new(Handles {
            sessions: SessionState::ALL.map(|s| sessions.with_label_values(&[s.label()])),
            connections: counter(&r, n::CONNECTIONS)?,
            connections_refused,
            journal_bytes: gauge(&r, n::JOURNAL_BYTES)?,
            journal_disk_bytes: gauge(&r, n::JOURNAL_DISK_BYTES)?,
            journal_overflows: counter(&r, n::JOURNAL_OVERFLOWS)?,
            migrations: counters(&r, n::SESSION_MIGRATIONS, &["result", "reason"])?,
            migrations_failed: counter(&r, n::SESSION_MIGRATIONS_FAILED)?,
            migrations_successful: counter(&r, n::SESSION_MIGRATIONS_SUCCESSFUL)?,
            replays,
            replay_seconds: register(
                &r,
                Histogram::with_opts(buckets(n::TRANSACTION_REPLAY_SECONDS))?,
            )?,
            last_replay: register(
                &r,
                Gauge::new(n::LAST_REPLAY_TIMESTAMP, n::help(n::LAST_REPLAY_TIMESTAMP))?,
            )?,
            losses_prevented: counter(&r, n::LOSSES_PREVENTED)?,
            lossy_promotions: counter(&r, n::LOSSY_PROMOTIONS)?,
            commit_resolutions,
            pause_seconds: histograms(&r, n::PAUSE_SECONDS, "kind")?,
            phase_seconds: histograms(&r, n::MOVE_PHASE_SECONDS, "phase")?,
            exchanges: counter(&r, n::EXCHANGES)?,
            bytes_from_client: bytes.with_label_values(&["from_client"]),
            bytes_to_client: bytes.with_label_values(&["to_client"]),
            protected_sessions: gauge(&r, n::PROTECTED_SESSIONS)?,
            unprotected_sessions: gauges(&r, n::UNPROTECTED_SESSIONS, "reason")?,
            backend_up: gauges(&r, n::BACKEND_UP, "instance")?,
            protection_transactions: counters(
                &r,
                n::PROTECTION_TRANSACTIONS,
                &["database", "user", "application", "kind", "protection"],
            )?,
            protection_seconds: register(
                &r,
                CounterVec::new(
                    Opts::new(n::PROTECTION_SECONDS, n::help(n::PROTECTION_SECONDS)),
                    &["database", "user", "application", "state", "protection"],
                )?,
            )?,
            migrations_started: counters(&r, n::SESSION_MIGRATIONS_STARTED, &["reason"])?,
            migrations_state_bytes: register(
                &r,
                Histogram::with_opts(
                    buckets(n::SESSION_MIGRATIONS_STATE_BYTES).buckets(STATE_BUCKETS.to_vec()),
                )?,
            )?,
            registry: r,
        })))
    }

    /// A session came to be (`from` is `None`), changed its state, or ended (`to` is `None`).
    pub fn session_state(&self, from: Option<SessionState>, to: Option<SessionState>) {
        if let Some(from) = from {
            self.sessions[from as usize].dec();
        }
        if let Some(to) = to {
            self.sessions[to as usize].inc();
        }
    }

    /// A client was turned away.
    pub fn connection_refused(&self, why: Refusal) {
        let counter = self.connections_refused.with_label_values(&[why.label()]);
        counter.inc();
    }

    /// A session's migration ended; `reason` is why it moved.
    pub fn migration(&self, completed: bool, reason: &str) {
        let result = if completed { "completed" } else { "failed" };
        self.migrations.with_label_values(&[result, reason]).inc();
        if completed {
            self.migrations_successful.inc();
        } else {
            self.migrations_failed.inc();
        }
    }

    /// A session's migration began, with this much of journal and state.
    pub fn migration_started(&self, reason: &str, state_bytes: u64) {
        self.migrations_started.with_label_values(&[reason]).inc();
        #[expect(clippy::cast_precision_loss, reason = "a bucket is coarser")]
        self.migrations_state_bytes.observe(state_bytes as f64);
    }

    /// The counter of [`names::PROTECTION_TRANSACTIONS`] with these labels, to be kept: the caller
    /// bounds how many there are.
    #[must_use]
    pub fn protection_transactions(&self, labels: &[&str; 5]) -> IntCounter {
        self.protection_transactions.with_label_values(labels)
    }

    /// The counter of [`names::PROTECTION_SECONDS`] with these labels, likewise.
    #[must_use]
    pub fn protection_seconds(&self, labels: &[&str; 5]) -> Counter {
        self.protection_seconds.with_label_values(labels)
    }

    /// The replay of an open transaction ended after `took`. A successful one counts as a loss
    /// prevented.
    pub fn replay(&self, result: ReplayResult, took: Duration) {
        self.replays.with_label_values(&[result.label()]).inc();
        self.replay_seconds.observe(took.as_secs_f64());
        if let Ok(now) = SystemTime::now().duration_since(UNIX_EPOCH) {
            self.last_replay.set(now.as_secs_f64());
        }
        if result == ReplayResult::Success {
            self.losses_prevented.inc();
        }
    }

    /// A COMMIT in flight was resolved. A known outcome counts as a loss prevented.
    pub fn commit_resolution(&self, outcome: CommitOutcome) {
        self.commit_resolutions
            .with_label_values(&[outcome.label()])
            .inc();
        if outcome != CommitOutcome::Unknown {
            self.losses_prevented.inc();
        }
    }

    /// A session stood still for `took` in a move of this `kind`.
    pub fn pause(&self, kind: &str, took: Duration) {
        self.pause_seconds
            .with_label_values(&[kind])
            .observe(took.as_secs_f64());
    }

    /// A `phase` of a move took this long.
    pub fn phase(&self, phase: &str, took: Duration) {
        self.phase_seconds
            .with_label_values(&[phase])
            .observe(took.as_secs_f64());
    }

    /// The gauge of unprotected sessions of this `reason`, for inc and dec.
    #[must_use]
    pub fn unprotected_sessions(&self, reason: &str) -> IntGauge {
        self.unprotected_sessions.with_label_values(&[reason])
    }

    /// Whether the `instance` answered its last health check.
    pub fn backend_up(&self, instance: &str, up: bool) {
        self.backend_up
            .with_label_values(&[instance])
            .set(i64::from(up));
    }

    /// An instance that no longer exists disappears from [`names::BACKEND_UP`].
    pub fn backend_gone(&self, instance: &str) {
        // An error says that it was never there, which is what was asked for.
        let _ = self.backend_up.remove_label_values(&[instance]);
    }

    /// All metrics in Prometheus' text format (version 0.0.4).
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::new();
        if let Err(error) = TextEncoder::new().encode_utf8(&self.registry.gather(), &mut text) {
            tracing::warn!(%error, "could not render metrics");
        }
        text
    }
}

fn register<C: Collector + Clone + 'static>(r: &Registry, c: C) -> Result<C, prometheus::Error> {
    r.register(Box::new(c.clone()))?;
    Ok(c)
}

fn counter(r: &Registry, name: &str) -> Result<IntCounter, prometheus::Error> {
    register(r, IntCounter::new(name, names::help(name))?)
}

fn counters(r: &Registry, name: &str, labels: &[&str]) -> Result<IntCounterVec, prometheus::Error> {
    register(
        r,
        IntCounterVec::new(Opts::new(name, names::help(name)), labels)?,
    )
}

fn gauge(r: &Registry, name: &str) -> Result<IntGauge, prometheus::Error> {
    register(r, IntGauge::new(name, names::help(name))?)
}

fn gauges(r: &Registry, name: &str, label: &str) -> Result<IntGaugeVec, prometheus::Error> {
    register(
        r,
        IntGaugeVec::new(Opts::new(name, names::help(name)), &[label])?,
    )
}

fn buckets(name: &str) -> HistogramOpts {
    HistogramOpts::new(name, names::help(name)).buckets(PAUSE_BUCKETS.to_vec())
}

fn histograms(r: &Registry, name: &str, label: &str) -> Result<HistogramVec, prometheus::Error> {
    register(r, HistogramVec::new(buckets(name), &[label])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_rendered_once_it_was_used() {
        let m = Metrics::new();
        m.session_state(None, Some(SessionState::Connecting));
        m.session_state(Some(SessionState::Connecting), Some(SessionState::Idle));
        m.connection_refused(Refusal::Limit);
        m.migration(true, "switchover");
        m.migration(false, "failover");
        m.replay(ReplayResult::Success, Duration::from_millis(3));
        m.replay(ReplayResult::Mismatch, Duration::from_millis(3));
        m.commit_resolution(CommitOutcome::Committed);
        m.commit_resolution(CommitOutcome::Unknown);
        m.pause("switchover", Duration::from_millis(70));
        m.phase("drain", Duration::from_millis(7));
        m.unprotected_sessions("temporary table").inc();
        m.backend_up("pg-1", true);
        m.migration_started("switchover", 2048);
        let who = ["shop", "app", "till", "transaction", "protected"];
        m.protection_transactions(&who).inc();
        m.protection_seconds(&who).inc_by(1.5);
        m.bytes_to_client.inc_by(12);
        let text = m.render();
        for line in [
            "helios_sessions{state=\"idle\"} 1",
            "helios_sessions{state=\"connecting\"} 0",
            "helios_connections_total 0",
            "helios_connections_refused_total{reason=\"limit\"} 1",
            "helios_connections_refused_total{reason=\"timeout\"} 0",
            "helios_journal_bytes 0",
            "helios_journal_disk_bytes 0",
            "helios_journal_overflows_total 0",
            "helios_session_migrations_total{reason=\"switchover\",result=\"completed\"} 1",
            "helios_session_migrations_failed 1",
            "helios_session_migrations_successful 1",
            "helios_transaction_replays_total{result=\"success\"} 1",
            "helios_transaction_replay_seconds_count 2",
            "helios_losses_prevented_total 2",
            "helios_lossy_promotions_total 0",
            "helios_commit_resolutions_total{outcome=\"unknown\"} 1",
            "helios_pause_seconds_bucket{kind=\"switchover\",le=\"0.08\"} 1",
            "helios_move_phase_seconds_count{phase=\"drain\"} 1",
            "helios_exchanges_total 0",
            "helios_bytes_total{direction=\"to_client\"} 12",
            "helios_protected_sessions 0",
            "helios_unprotected_sessions{reason=\"temporary table\"} 1",
            "helios_backend_up{instance=\"pg-1\"} 1",
            "helios_session_migrations_started_total{reason=\"switchover\"} 1",
            "helios_session_migrations_state_bytes_sum 2048",
            "helios_protection_transactions_total{application=\"till\",database=\"shop\",\
             kind=\"transaction\",protection=\"protected\",user=\"app\"} 1",
            "helios_protection_seconds_total{application=\"till\",database=\"shop\",\
             protection=\"protected\",state=\"transaction\",user=\"app\"} 1.5",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in:\n{text}");
        }
        assert!(text.contains(names::LAST_REPLAY_TIMESTAMP));
        let helped = text.lines().filter(|l| l.starts_with("# HELP"));
        assert!(helped.clone().count() == 26 && !text.contains(names::NO_HELP));
        m.backend_gone("pg-1");
        m.backend_gone("never there");
        assert!(!m.render().contains("pg-1"));
    }

    #[test]
    fn what_alerts_count_is_there_from_the_start() {
        let text = Metrics::new().render();
        for line in [
            "helios_transaction_replays_total{result=\"mismatch\"} 0",
            "helios_commit_resolutions_total{outcome=\"unknown\"} 0",
            "helios_session_migrations_failed 0",
            "helios_lossy_promotions_total 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} not in:\n{text}");
        }
    }

    #[test]
    fn states_index_their_gauges() {
        for (i, s) in SessionState::ALL.into_iter().enumerate() {
            assert_eq!(s as usize, i);
        }
    }
}
