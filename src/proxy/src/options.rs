//! Everything a proxy is started with, in code or from a `helios_proxy.toml`.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helios_journal::SpillFile;
use helios_telemetry::metrics::Metrics;

use crate::auth::AuthMethod;
use crate::backend::Login;
use crate::config::{MigrationConfig, ProxyConfig, ReplayMode, RestoreAhead};
use crate::engine::latency::LatencyRule;
use crate::engine::room::SpillOptions;
use crate::engine::shared::EngineOptions;
use crate::handle::StartError;
use crate::tls::{BackendTls, ServerTls};

/// Everything a proxy is started with.
#[derive(Debug)]
pub struct ProxyOptions {
    /// Host to listen on; `*` for all addresses.
    pub host: String,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// Folder for a Unix socket.
    pub unix_socket_dir: Option<PathBuf>,
    /// How clients prove who they are.
    pub auth: AuthMethod,
    /// TLS towards clients.
    pub tls: Option<ServerTls>,
    /// Clients that come over TCP without TLS are refused.
    pub tls_required: bool,
    /// TLS towards servers.
    pub backend_tls: BackendTls,
    /// The proxy's own login: a superuser, for verifiers and for questions about sessions.
    pub service: Login,
    /// Most connections in all.
    pub max_connections: usize,
    /// Most connections of one user.
    pub max_connections_per_user: Option<usize>,
    /// Limit of a client's login.
    pub login_timeout: Duration,
    /// How often the primary is asked whether it lives.
    pub health_check_interval: Duration,
    /// How long it may take to answer.
    pub health_check_timeout: Duration,
    /// The engine's.
    pub engine: EngineOptions,
    /// Metrics registry.
    pub metrics: Metrics,
}

impl ProxyOptions {
    /// What a `helios_proxy.toml` says; reads the files that it names.
    ///
    /// # Errors
    /// A certificate, key or password file cannot be used, or the folder for large journals.
    pub fn from_config(config: &ProxyConfig) -> Result<Self, StartError> {
        let (edge, backends) = (&config.proxy, &config.backends);
        let first = backends.instances.first();
        Ok(Self {
            host: edge.listen.host.clone(),
            port: edge.listen.port,
            unix_socket_dir: edge.unix_socket_dir.clone(),
            auth: edge.auth,
            tls: edge.server_tls()?,
            tls_required: edge.tls_required,
            backend_tls: backends.tls()?,
            service: backends.service_login().map_err(StartError::Password)?,
            max_connections: edge.max_connections,
            max_connections_per_user: edge.max_connections_per_user,
            login_timeout: edge.login_timeout,
            health_check_interval: first.map_or(HEALTH, |i| i.health_check_interval),
            health_check_timeout: first.map_or(HEALTH, |i| i.health_check_timeout),
            engine: EngineOptions {
                spill: spill(&config.migration)?,
                ..engine_options(config)
            },
            metrics: Metrics::new(),
        })
    }

    /// For a proxy that is told of every start of a primary.
    #[must_use]
    pub fn led(mut self) -> Self {
        self.engine.restart_patience = RESTART_PATIENCE;
        self
    }
}

/// How long sessions wait to be told of a start of their primary that they have noticed themselves:
/// an executor notices it too, and is about as quick.
const RESTART_PATIENCE: Duration = Duration::from_secs(1);

/// Interval and limit of health checks where no instance is configured.
const HEALTH: Duration = Duration::from_secs(2);

/// A folder that somebody chose has to work; without the system's own the proxy goes on.
fn spill(migration: &MigrationConfig) -> Result<Option<Arc<SpillOptions>>, StartError> {
    let folder = migration.transaction_buffer_path.clone();
    if migration.transaction_buffer_size == 0 {
        return Ok(None);
    }
    if let Some(folder) = &folder {
        SpillFile::create(folder, migration.transaction_buffer_size).map_err(|why| {
            StartError::Buffer {
                folder: folder.clone(),
                why,
            }
        })?;
    }
    let options = SpillOptions {
        folder: folder.unwrap_or_else(std::env::temp_dir),
        max_bytes: migration.transaction_buffer_size,
        max_total_bytes: migration.transaction_buffer_total_size,
    };
    Ok(Some(Arc::new(options)))
}

fn engine_options(config: &ProxyConfig) -> EngineOptions {
    let (edge, replay, migration) = (&config.proxy, &config.replay, &config.migration);
    let mode = match replay.mode {
        _ if !edge.session_migration_enabled => helios_session::ReplayMode::None,
        ReplayMode::None => helios_session::ReplayMode::None,
        ReplayMode::Session => helios_session::ReplayMode::Session,
        ReplayMode::Transaction => helios_session::ReplayMode::Transaction,
        ReplayMode::Select => helios_session::ReplayMode::Select,
    };
    EngineOptions {
        mode,
        max_journal_bytes: replay.max_journal_bytes,
        max_total_journal_bytes: replay.max_total_journal_bytes,
        max_replay_time: replay.max_replay_time,
        max_replay_attempts: replay.max_replay_attempts,
        replay_backoff: replay.replay_backoff,
        replay_on_connection_loss: replay.replay_on_connection_loss,
        connect_timeout: config.backends.connect_timeout,
        outage_limit: migration.migration_timeout,
        idle_timeout: edge.idle_timeout,
        threads: edge.threads,
        capture_settings: migration.capture_set_parameters,
        capture_prepared: migration.capture_prepared_statements,
        capture_temporary: migration.capture_temp_tables,
        capture_cursors: migration.capture_cursors,
        restore_ahead: migration.restore_ahead != RestoreAhead::Off,
        keep_ahead: migration.restore_ahead == RestoreAhead::Always,
        lost_notification: migration.lost_notification_payload.clone(),
        move_on_failure: config.triggers.on_backend_failure,
        move_on_maintenance: config.triggers.on_maintenance_signal,
        move_on_restart: config.triggers.on_process_restart,
        latency: config.triggers.on_high_latency.then_some(LatencyRule {
            threshold: config.triggers.latency_threshold,
            lasting: config.triggers.latency_duration,
        }),
        log_migrations: config.observability.log_migrations,
        check_query: config.health.check_query.clone(),
        failure_threshold: config.health.failure_threshold,
        success_threshold: config.health.success_threshold,
        ..EngineOptions::default()
    }
}
