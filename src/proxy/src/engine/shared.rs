//! What all sessions of a proxy share.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use helios_api::Epoch;
use helios_api::control::{Backend, MigrationEvent, ResumeReport};
use helios_api::protection::ProtectionReport;
use helios_journal::Pool;
use helios_session::ReplayMode;
use helios_telemetry::metrics::Metrics;
use tokio::sync::{Semaphore, broadcast, watch};

use super::counting::Countable;
use super::evidence::Found;
use super::gate::Gate;
use super::handover::Kin;
use super::history::History;
use super::kept::MAKERS;
use super::latency::LatencyRule;
use super::protection::Ledger;
use super::reach;
use super::reads::Proofs;
use super::registry::{Registry, lock};
use super::restarts::Positions;
use super::room::{Room, SpillOptions};
use super::sequences::ReplayLock;
use super::temporary::{READERS, RETURNING};
use crate::backend::Login;
use crate::tls::BackendTls;

/// Logins and rebuilds of sessions that run side by side: a backend's start is CPU work of the
/// server's.
pub const SIDE_BY_SIDE: usize = 64;

/// Sessions that make temporary objects in the background without more time between them.
const MAKE_LATER_TOGETHER: usize = 32;

/// Events that a slow subscriber may be behind before it misses some.
const EVENTS: usize = 4096;

/// Limits and options of the engine.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// What a failover does for an open transaction.
    pub mode: ReplayMode,
    /// Bytes of journal one session may hold.
    pub max_journal_bytes: usize,
    /// Bytes all journals may hold together.
    pub max_total_journal_bytes: usize,
    /// Where journals over these limits go; without it they are given up.
    pub spill: Option<Arc<SpillOptions>>,
    /// How long one session's replay may take.
    pub max_replay_time: Duration,
    /// Attempts of a replay that breaks in the middle.
    pub max_replay_attempts: u32,
    /// Pause before the second attempt; doubles with every further one.
    pub replay_backoff: Duration,
    /// Limit of one login at a server.
    pub connect_timeout: Duration,
    /// How long a client waits for a primary before it gets 57P03.
    pub outage_limit: Duration,
    /// A client that is silent outside a transaction for so long is disconnected (57P05).
    pub idle_timeout: Option<Duration>,
    /// Threads that sessions live on; half the processors without it.
    pub threads: Option<usize>,
    /// What a standby can have of a session's state is restored there ahead of a planned move.
    pub restore_ahead: bool,
    /// So it is at all times, for sessions in a transaction.
    pub keep_ahead: bool,
    /// Behind a move, temporary objects that no statement has asked for are made after about so long,
    /// when nobody else waits for any.
    pub make_later_after: Duration,
    /// From so many sessions on, idle ones leave their backends ahead of a planned move.
    pub leave_ahead_from: usize,
    /// How many idle sessions with temporary objects get a backend ahead of a planned move; when there
    /// are more, none of them does.
    pub owners_ahead: usize,
    /// How long the barrier holds new work back for replays.
    pub barrier_limit: Duration,
    /// Settings and role move; otherwise a session that has changed them is unprotected.
    pub capture_settings: bool,
    /// Prepared statements move; otherwise a session that has them is unprotected.
    pub capture_prepared: bool,
    /// Temporary tables move; otherwise a session that has them is unprotected.
    pub capture_temporary: bool,
    /// Cursors WITH HOLD move; otherwise a session that has one is unprotected.
    pub capture_cursors: bool,
    /// Payload of the notification that a client gets on each of its channels when others may have
    /// been lost; without it there is a warning only.
    pub lost_notification: Option<String>,
    /// A transaction is replayed when only its connection broke.
    pub replay_on_connection_loss: bool,
    /// Sessions move when the primary fails; otherwise their connections end.
    pub move_on_failure: bool,
    /// Sessions move at a planned switchover; otherwise their connections end.
    pub move_on_maintenance: bool,
    /// Sessions move to a primary that was started again where it was; otherwise their connections
    /// end.
    pub move_on_restart: bool,
    /// A session that finds its primary started again waits so long for the move that whoever leads
    /// this proxy will begin; zero where nobody does.
    pub restart_patience: Duration,
    /// What latency of the primary's heartbeats is reported; none is watched without it.
    pub latency: Option<LatencyRule>,
    /// Every move of a session is logged at level INFO.
    pub log_migrations: bool,
    /// What the health check runs.
    pub check_query: String,
    /// Failed checks in a row after which the primary counts as unreachable.
    pub failure_threshold: u32,
    /// Good checks in a row after which it counts as reachable again.
    pub success_threshold: u32,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            mode: ReplayMode::Transaction,
            max_journal_bytes: 16 << 20,
            max_total_journal_bytes: 1 << 30,
            spill: None,
            max_replay_time: Duration::from_secs(60),
            max_replay_attempts: 5,
            replay_backoff: Duration::from_millis(50),
            connect_timeout: Duration::from_secs(5),
            outage_limit: Duration::from_secs(60),
            idle_timeout: None,
            threads: None,
            restore_ahead: true,
            keep_ahead: false,
            make_later_after: Duration::from_millis(250),
            leave_ahead_from: 64,
            owners_ahead: 256,
            barrier_limit: Duration::from_secs(5),
            capture_settings: true,
            capture_prepared: true,
            capture_temporary: true,
            capture_cursors: true,
            lost_notification: None,
            replay_on_connection_loss: true,
            move_on_failure: true,
            move_on_maintenance: true,
            move_on_restart: true,
            restart_patience: Duration::ZERO,
            latency: None,
            log_migrations: true,
            check_query: "SELECT 1".into(),
            failure_threshold: 3,
            success_threshold: 1,
        }
    }
}

/// Shared by all sessions.
#[derive(Debug)]
pub struct Shared {
    /// Phase and topology.
    pub gate: Arc<Gate>,
    /// Who is here.
    pub registry: Arc<Registry>,
    /// Journal memory.
    pub pool: Arc<Pool>,
    /// Journals on disk.
    pub disk: Arc<Pool>,
    /// Metrics.
    pub metrics: Metrics,
    /// Options.
    pub options: EngineOptions,
    /// TLS towards the servers.
    pub tls: BackendTls,
    /// The proxy's own login, for questions about sessions.
    pub service: Login,
    /// When the proxy started.
    pub started: Instant,
    /// Limits logins that run side by side.
    pub logins: Semaphore,
    /// Limits readings of temporary tables that run side by side.
    pub(super) readers: Semaphore,
    /// Limits those who make their temporary tables again.
    pub(super) makers: Semaphore,
    /// Limits idle sessions that look for a backend behind a move, before their clients ask.
    pub(super) returning: Semaphore,
    /// What statements have been found to reach.
    pub(super) reach: reach::Known,
    /// Held by every replay; alone by one that sets sequences back.
    pub(super) replaying: ReplayLock,
    /// Whether new work is held back for replays: only then sequences may be set back.
    pub(super) barrier: watch::Sender<bool>,
    /// Until when sequences may be set back, where other proxies wait for that.
    pub(super) turn_until: Mutex<Option<Instant>>,
    /// Epoch and time of the last one who was let in beside replays.
    worked: Mutex<(Epoch, u64)>,
    /// Last epoch whose primary was left by sessions with whole connections, and when the oldest of
    /// these was there.
    outlived: Mutex<(Epoch, u64)>,
    /// How far the log of the primary in use has come, while marks can be found in it.
    pub(super) positions: Mutex<Positions>,
    /// Statements that were proven to read only.
    pub(super) proofs: tokio::sync::Mutex<Option<Proofs>>,
    /// Statements whose answer the log can tell.
    pub(super) countable: Countable,
    /// Marks found for the move under way: one reading of the log serves all sessions.
    pub(super) found: tokio::sync::Mutex<Option<Found>>,
    /// What is counted of protection.
    pub ledger: Ledger,
    /// The last migrations.
    pub history: History,
    /// Roles that may see other roles' sessions, or not, as of then.
    pub(super) rights: Mutex<HashMap<String, (bool, Instant)>>,
    /// Migration events.
    pub events: broadcast::Sender<MigrationEvent>,
    /// What the move under way has come to.
    pub report: Mutex<ResumeReport>,
    /// `pg_postmaster_start_time()` of the primary, as last seen in this epoch.
    pub postmaster_start: Mutex<Option<String>>,
    /// Who is to be promoted should the primary fail, as far as can be told.
    pub(crate) heir: Mutex<Option<Backend>>,
    /// The processes that this one takes sessions from, and gives them to.
    pub(crate) kin: Kin,
}

impl Shared {
    /// Everything a proxy's sessions share.
    #[must_use]
    pub fn new(
        gate: Gate,
        options: EngineOptions,
        tls: BackendTls,
        service: Login,
        metrics: Metrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            gate: Arc::new(gate),
            registry: Arc::default(),
            pool: Pool::new(options.max_total_journal_bytes),
            disk: Pool::new(options.spill.as_ref().map_or(0, |s| s.max_total_bytes)),
            ledger: Ledger::new(metrics.clone()),
            history: History::default(),
            rights: Mutex::default(),
            metrics,
            options,
            tls,
            service,
            started: Instant::now(),
            logins: Semaphore::new(SIDE_BY_SIDE),
            readers: Semaphore::new(READERS),
            makers: Semaphore::new(MAKERS),
            returning: Semaphore::new(RETURNING),
            reach: reach::Known::default(),
            replaying: ReplayLock::default(),
            barrier: watch::Sender::new(false),
            turn_until: Mutex::default(),
            worked: Mutex::default(),
            outlived: Mutex::default(),
            positions: Mutex::default(),
            proofs: tokio::sync::Mutex::default(),
            countable: Countable::default(),
            found: tokio::sync::Mutex::default(),
            events: broadcast::Sender::new(EVENTS),
            report: Mutex::default(),
            postmaster_start: Mutex::default(),
            heir: Mutex::default(),
            kin: Kin::default(),
        })
    }

    /// When a session makes temporary objects in the background next, at the earliest: the more
    /// sessions have some, the later, so that all together leave the server to those who wait.
    pub(super) fn make_later_after(&self) -> Duration {
        let many = self.registry.owners() / MAKE_LATER_TOGETHER;
        let times = u32::try_from(many).unwrap_or(u32::MAX).max(1);
        self.options.make_later_after.saturating_mul(times)
    }

    /// Room for one session's journal.
    #[must_use]
    pub fn room(&self) -> Room {
        let options = &self.options;
        let (memory, disk) = (&self.pool, &self.disk);
        Room::new(
            memory,
            options.max_journal_bytes,
            disk,
            options.spill.as_ref(),
        )
    }

    /// Microseconds since the proxy started, at least 1.
    #[must_use]
    pub fn now_micros(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros())
            .unwrap_or(u64::MAX)
            .max(1)
    }

    /// Somebody may work on the primary of `epoch` from now on, beside replays.
    pub fn new_work(&self, epoch: Epoch) {
        *lock(&self.worked) = (epoch, self.now_micros());
    }

    /// When somebody was let in last to work on a primary beside replays, and in which epoch.
    #[must_use]
    pub fn worked(&self) -> (Epoch, u64) {
        *lock(&self.worked)
    }

    /// A session leaves the primary of `epoch`, and its connection, which was there at `since`, in
    /// microseconds since the proxy started, is whole.
    pub(super) fn outlived(&self, epoch: Epoch, since: u64) {
        let mut known = lock(&self.outlived);
        *known = match *known {
            (of, oldest) if of == epoch => (of, oldest.min(since)),
            (of, _) if of < epoch => (epoch, since),
            later => later,
        };
    }

    /// Whether a connection to the primary of `epoch` went on from before `lost`, in microseconds
    /// since the proxy started, until it was left: who had lost one then lost it alone.
    pub(super) fn was_outlived(&self, epoch: Epoch, lost: u64) -> bool {
        let (of, oldest) = *lock(&self.outlived);
        of == epoch && oldest < lost
    }

    /// Begins the time in which sequences may be set back: no new work is let in, here or, until
    /// then, at any other proxy.
    pub fn raise_barrier(&self, until: Option<Instant>) {
        *lock(&self.turn_until) = until;
        self.barrier.send_replace(true);
    }

    /// Ends it: replays that still have sequences set back are broken off, and waited for until
    /// those stand where they should, at most `limit`.
    pub async fn lower_barrier(&self, limit: Duration) {
        self.barrier.send_replace(false);
        self.new_work(self.gate.now().topology.epoch);
        let settled = tokio::time::timeout(limit, self.replaying.read()).await;
        if settled.is_err() {
            tracing::error!("sequences are still set back, and new work is let in");
        }
    }

    /// Counts the time of all sessions up to now.
    pub fn read_meters(&self) {
        for entry in self.registry.all() {
            if let Some(meter) = entry.meter.get() {
                meter.read();
            }
        }
    }

    /// What was protected and what was not, of one role's sessions where one is given.
    #[must_use]
    pub fn protection(&self, of: Option<&str>) -> ProtectionReport {
        self.read_meters();
        self.ledger.report(of)
    }

    /// Tells subscribers; nobody listening is fine.
    pub fn event(&self, event: MigrationEvent) {
        let _ = self.events.send(event);
    }

    /// Takes the report of the move that ends.
    pub fn take_report(&self) -> ResumeReport {
        std::mem::take(&mut *lock(&self.report))
    }

    /// Counts a session that got an error.
    pub fn count_failed(&self, reason: &str) {
        let failed: &mut BTreeMap<_, _> = &mut lock(&self.report).failed;
        *failed.entry(reason.to_owned()).or_default() += 1;
    }
}
