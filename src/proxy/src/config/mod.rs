//! `helios_proxy.toml`: what the proxy is told, validated once.
//!
//! [`ProxyConfig`] is plain data with defaults, so that an embedding application can make one
//! without a file. Reading a file reports everything that is wrong with it, each with its line: an
//! unknown key with the nearest valid one, a known key that this version gives no meaning to yet,
//! a value out of its range. The names are those of the documents; where one of ours was needed, it
//! stands in the same section.

use std::path::{Path, PathBuf};
use std::time::Duration;

use helios_api::control::Backend;

use crate::auth::AuthMethod;
use crate::tls::{CertificateFiles, SslMode};

mod build;
mod keys;
mod reader;
mod sections;
mod values;

#[cfg(test)]
mod tests;

/// All settings of a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ProxyConfig {
    /// Where clients come in, and how.
    pub proxy: EdgeConfig,
    /// What is kept of a transaction, and when it is replayed.
    pub replay: ReplayConfig,
    /// What moves with a session.
    pub migration: MigrationConfig,
    /// The instances, and how the proxy logs in to them.
    pub backends: BackendsConfig,
    /// How instances are watched.
    pub health: HealthConfig,
    /// What makes sessions move.
    pub triggers: TriggerConfig,
    /// Logs and metrics.
    pub observability: ObservabilityConfig,
}

/// `[proxy]`: where clients come in, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EdgeConfig {
    /// Where clients connect to (`listen_address`).
    pub listen: ListenAddress,
    /// Folder of the Unix socket `.s.PGSQL.<port>`; none without it.
    pub unix_socket_dir: Option<PathBuf>,
    /// How clients prove who they are (`auth`).
    pub auth: AuthMethod,
    /// Our certificate (`tls_cert`, `tls_key`); no TLS without it.
    pub tls: Option<CertificateFiles>,
    /// Clients that come over TCP without TLS are refused.
    pub tls_required: bool,
    /// Authority of client certificates.
    pub tls_client_ca: Option<PathBuf>,
    /// Most connections of clients.
    pub max_connections: usize,
    /// Most connections of one user.
    pub max_connections_per_user: Option<usize>,
    /// A login may take this long.
    pub login_timeout: Duration,
    /// A session that is idle outside of a transaction for longer ends; never without it.
    pub idle_timeout: Option<Duration>,
    /// Threads that sessions live on; half the processors without it.
    pub threads: Option<usize>,
    /// Whether sessions move at all; `false` makes a plain proxy.
    pub session_migration_enabled: bool,
}

impl Default for EdgeConfig {
    fn default() -> Self {
        Self {
            listen: ListenAddress {
                host: "127.0.0.1".to_owned(),
                port: 6432,
            },
            unix_socket_dir: None,
            auth: AuthMethod::default(),
            tls: None,
            tls_required: false,
            tls_client_ca: None,
            max_connections: 10_000,
            max_connections_per_user: None,
            login_timeout: Duration::from_secs(60),
            idle_timeout: None,
            threads: None,
            session_migration_enabled: true,
        }
    }
}

/// A host with a port; `*` is every address of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    /// Host name, address or `*`.
    pub host: String,
    /// Port; 0 takes a free one.
    pub port: u16,
}

/// What is kept of an open transaction, and what is compared (`mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplayMode {
    /// A failover returns errors.
    None,
    /// Session state is rebuilt; an open transaction gets an error.
    Session,
    /// Statements are replayed; what the client can act on must match.
    #[default]
    Transaction,
    /// All result sets are compared too.
    Select,
}

/// `[transaction_replay]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplayConfig {
    /// `enabled = false` is [`ReplayMode::None`].
    pub mode: ReplayMode,
    /// Most bytes that one session's journal may hold.
    pub max_journal_bytes: usize,
    /// Most bytes that all journals may hold together.
    pub max_total_journal_bytes: usize,
    /// How long open transactions may go on when a switchover begins.
    pub switchover_drain_timeout: Duration,
    /// How often a replay that fails in the middle is begun.
    pub max_replay_attempts: u32,
    /// Pause between two attempts.
    pub replay_backoff: Duration,
    /// How long one session's replay may take, all attempts together.
    pub max_replay_time: Duration,
    /// Whether a lost connection to a primary that lives is replayed too.
    pub replay_on_connection_loss: bool,
}

impl Default for ReplayConfig {
    fn default() -> Self {
        Self {
            mode: ReplayMode::default(),
            max_journal_bytes: 16 << 20,
            max_total_journal_bytes: 1 << 30,
            switchover_drain_timeout: Duration::from_secs(30),
            max_replay_attempts: 5,
            replay_backoff: Duration::from_millis(50),
            max_replay_time: Duration::from_secs(60),
            replay_on_connection_loss: true,
        }
    }
}

/// When sessions are restored ahead of time (`restore_ahead`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestoreAhead {
    /// Never: all of it behind the promotion.
    Off,
    /// While a planned move is prepared.
    #[default]
    Planned,
    /// That, and at all times for sessions in a transaction.
    Always,
}

/// `[session_migration]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MigrationConfig {
    /// Settings move.
    pub capture_set_parameters: bool,
    /// Prepared statements move.
    pub capture_prepared_statements: bool,
    /// Temporary tables move with their rows.
    pub capture_temp_tables: bool,
    /// Cursors WITH HOLD move with their rows and positions.
    pub capture_cursors: bool,
    /// What of a session's state is restored on the next primary before it is one.
    pub restore_ahead: RestoreAhead,
    /// Folder for journals that outgrow their memory; the system's for temporary files without it.
    pub transaction_buffer_path: Option<PathBuf>,
    /// Most bytes of one journal on disk; 0: none goes there.
    pub transaction_buffer_size: usize,
    /// Most bytes of all journals on disk together.
    pub transaction_buffer_total_size: usize,
    /// Payload of a notification on each channel of a client that others may not have reached.
    pub lost_notification_payload: Option<String>,
    /// How long a session may take to move before its client gets an error.
    pub migration_timeout: Duration,
}

impl Default for MigrationConfig {
    fn default() -> Self {
        Self {
            capture_set_parameters: true,
            capture_prepared_statements: true,
            capture_temp_tables: true,
            capture_cursors: true,
            restore_ahead: RestoreAhead::default(),
            transaction_buffer_path: None,
            transaction_buffer_size: 1 << 30,
            transaction_buffer_total_size: 8 << 30,
            lost_notification_payload: None,
            migration_timeout: Duration::from_secs(60),
        }
    }
}

/// `[backends]`: how the proxy logs in to instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendsConfig {
    /// `[[backends.instances]]`.
    pub instances: Vec<InstanceConfig>,
    /// TLS towards instances.
    pub sslmode: SslMode,
    /// Authority of their certificates.
    pub sslrootcert: Option<PathBuf>,
    /// Our certificate towards them (`sslcert`, `sslkey`).
    pub client_certificate: Option<CertificateFiles>,
    /// The proxy's own role: health checks, verifiers, commit resolution.
    pub service_user: String,
    /// Database of its connections.
    pub service_database: String,
    /// File with its password; none without it.
    pub service_password_file: Option<PathBuf>,
    /// How long one attempt to connect and log in may take.
    pub connect_timeout: Duration,
}

impl Default for BackendsConfig {
    fn default() -> Self {
        Self {
            instances: Vec::new(),
            sslmode: SslMode::Disable,
            sslrootcert: None,
            client_certificate: None,
            service_user: "postgres".to_owned(),
            service_database: "postgres".to_owned(),
            service_password_file: None,
            connect_timeout: Duration::from_secs(5),
        }
    }
}

/// One instance of `[[backends.instances]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceConfig {
    /// Name and address.
    pub backend: Backend,
    /// The lower, the sooner it is chosen.
    pub priority: u32,
    /// Time between two health checks.
    pub health_check_interval: Duration,
    /// A check that takes longer has failed.
    pub health_check_timeout: Duration,
}

/// `[health_checks]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthConfig {
    /// The statement that is run.
    pub check_query: String,
    /// So many failures in a row mean that the instance is down.
    pub failure_threshold: u32,
    /// So many successes in a row mean that it is up again.
    pub success_threshold: u32,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            check_query: "select 1".to_owned(),
            failure_threshold: 3,
            success_threshold: 1,
        }
    }
}

/// `[migration_triggers]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TriggerConfig {
    /// Sessions move when the primary fails.
    pub on_backend_failure: bool,
    /// Sessions move when a switchover is asked for.
    pub on_maintenance_signal: bool,
    /// Sessions move to a primary that was started again where it was.
    pub on_process_restart: bool,
    /// A primary whose heartbeats are slow is left for a standby.
    pub on_high_latency: bool,
    /// A heartbeat that takes longer is slow.
    pub latency_threshold: Duration,
    /// Most heartbeats have to be slow for so long.
    pub latency_duration: Duration,
    /// No such move sooner after the last change of primary.
    pub latency_interval: Duration,
}

impl Default for TriggerConfig {
    fn default() -> Self {
        Self {
            on_backend_failure: true,
            on_maintenance_signal: true,
            on_process_restart: true,
            on_high_latency: false,
            latency_threshold: Duration::from_millis(500),
            latency_duration: Duration::from_secs(10),
            latency_interval: Duration::from_secs(600),
        }
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogLevel {
    /// What somebody must act on.
    Error,
    /// What somebody should look at.
    Warn,
    /// What happened to the cluster and to sessions.
    #[default]
    Info,
    /// What each session does.
    Debug,
    /// Each message.
    Trace,
}

impl LogLevel {
    /// Its name, as a tracing filter takes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// `[observability]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObservabilityConfig {
    /// How much is logged.
    pub log_level: LogLevel,
    /// Log file; standard error without it.
    pub log_path: Option<PathBuf>,
    /// Each migration of a session is logged.
    pub log_migrations: bool,
    /// Whether metrics can be scraped.
    pub metrics_enabled: bool,
    /// Address on which they can.
    pub metrics_address: String,
    /// Port on which they can.
    pub metrics_port: u16,
}

impl Default for ObservabilityConfig {
    fn default() -> Self {
        Self {
            log_level: LogLevel::default(),
            log_path: None,
            log_migrations: true,
            metrics_enabled: true,
            metrics_address: "127.0.0.1".to_owned(),
            metrics_port: 9464,
        }
    }
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("could not read \"{}\": {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What happened.
        source: std::io::Error,
    },
    /// Everything that is wrong with its contents, in the order of its lines.
    #[error("{}", show(file, problems))]
    Invalid {
        /// Name of the file.
        file: String,
        /// At least one.
        problems: Vec<Problem>,
    },
}

fn show(file: &str, problems: &[Problem]) -> String {
    let lines = problems
        .iter()
        .map(|p| format!("{file}:{}: {}", p.line, p.message));
    lines.collect::<Vec<_>>().join("\n")
}

impl ProxyConfig {
    /// Reads a file.
    ///
    /// # Errors
    ///
    /// It cannot be read, or something is wrong with it: then all of it is said.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Reads a file's contents; `file` is its name in messages.
    ///
    /// # Errors
    ///
    /// Something is wrong: then all of it is said.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        sections::parse(text).map_err(|problems| ConfigError::Invalid {
            file: file.to_owned(),
            problems,
        })
    }
}
