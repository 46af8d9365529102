//! The proxy: the options of `helios_proxy.toml` under the same names, in camelCase.
//!
//! A value that is left out is left to the proxy, which has its defaults in one place.

use k8s_openapi::api::core::v1::ResourceRequirements;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::placement::{PodMetadata, Scheduling};

/// The proxies in front of the instances.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxySpec {
    /// How many.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 50))]
    pub replicas: i32,
    /// CPU and memory of each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// On which nodes they run.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// What is added to their Pods' metadata.
    #[serde(default)]
    pub pod_metadata: PodMetadata,
    /// Whether clients that come without TLS are refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_required: Option<bool>,
    /// Threads that sessions live on; one for two processors by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<i64>,
    /// Most client connections of one proxy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections: Option<i64>,
    /// Most of them from one user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_connections_per_user: Option<i64>,
    /// A login may take this long. In seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 600))]
    pub login_timeout_secs: Option<i64>,
    /// A session that is idle outside of a transaction for longer ends. In seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub idle_timeout_secs: Option<i64>,
    /// What is kept of open transactions, and when they are replayed.
    #[serde(default)]
    pub transaction_replay: TransactionReplay,
    /// What moves with a session.
    #[serde(default)]
    pub session_migration: SessionMigration,
    /// How the primary is watched.
    #[serde(default)]
    pub health_checks: HealthChecks,
    /// What makes sessions move.
    #[serde(default)]
    pub migration_triggers: MigrationTriggers,
    /// What is logged.
    #[serde(default)]
    pub observability: ProxyLogs,
}

impl Default for ProxySpec {
    fn default() -> Self {
        Self {
            replicas: two(),
            resources: None,
            scheduling: Scheduling::default(),
            pod_metadata: PodMetadata::default(),
            tls_required: None,
            threads: None,
            max_connections: None,
            max_connections_per_user: None,
            login_timeout_secs: None,
            idle_timeout_secs: None,
            transaction_replay: TransactionReplay::default(),
            session_migration: SessionMigration::default(),
            health_checks: HealthChecks::default(),
            migration_triggers: MigrationTriggers::default(),
            observability: ProxyLogs::default(),
        }
    }
}

fn two() -> i32 {
    2
}

/// What a move does with an open transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReplayMode {
    /// A failover returns errors.
    None,
    /// Session state is rebuilt, an open transaction gets an error.
    Session,
    /// Statements are replayed; what the client can act on must match.
    Transaction,
    /// As transaction, and all result sets are compared.
    Select,
}

/// `[transaction_replay]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TransactionReplay {
    /// What a move does with an open transaction; `transaction` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<ReplayMode>,
    /// Most bytes that one session's journal may hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 68_719_476_736_i64))]
    pub max_journal_bytes: Option<i64>,
    /// Most bytes that all journals of one proxy may hold together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 4096, max = 1_099_511_627_776_i64))]
    pub max_total_journal_bytes: Option<i64>,
    /// How often a replay that fails in the middle is begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_replay_attempts: Option<i64>,
    /// Pause between two attempts. In milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 60_000))]
    pub replay_backoff_ms: Option<i64>,
    /// How long one session's replay may take. In seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub max_replay_time_seconds: Option<i64>,
    /// Whether a lost connection to a primary that lives is replayed too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_on_connection_loss: Option<bool>,
}

/// When sessions are restored ahead of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RestoreAhead {
    /// Never: all of it behind the promotion.
    Off,
    /// While a planned move is prepared.
    Planned,
    /// That, and at all times for sessions in a transaction.
    Always,
}

impl RestoreAhead {
    /// The value as the configuration writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Planned => "planned",
            Self::Always => "always",
        }
    }
}

/// `[session_migration]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SessionMigration {
    /// Whether SET parameters move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_set_parameters: Option<bool>,
    /// Whether prepared statements move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_prepared_statements: Option<bool>,
    /// Whether temporary tables move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_temp_tables: Option<bool>,
    /// Whether cursors WITH HOLD move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture_cursors: Option<bool>,
    /// When what a standby can have of a session's state is restored there: `off`, or `planned`
    /// (the default), while a planned move is prepared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_ahead: Option<RestoreAhead>,
    /// Most bytes of one session's journal on the proxy's disk, where it goes when it outgrows its
    /// memory; 0: none goes there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_099_511_627_776_i64))]
    pub transaction_buffer_size: Option<i64>,
    /// Most bytes of all journals on one proxy's disk together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1_099_511_627_776_i64))]
    pub transaction_buffer_total_size: Option<i64>,
    /// Payload of a notification that a session gets on each of its channels when others may not
    /// have reached it; none is sent without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 7999))]
    pub lost_notification_payload: Option<String>,
    /// How long a session waits for a new primary, for example `30s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(ms|s|m|h)$"), length(max = 20))]
    pub migration_timeout: Option<String>,
}

/// `[health_checks]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HealthChecks {
    /// The query that a healthy primary answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub check_query: Option<String>,
    /// Failures in a row that make the primary unreachable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub failure_threshold: Option<i64>,
    /// Successes in a row that make it reachable again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub success_threshold: Option<i64>,
}

/// `[migration_triggers]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MigrationTriggers {
    /// Whether sessions move when the primary fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_backend_failure: Option<bool>,
    /// Whether they move at a switchover.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_maintenance_signal: Option<bool>,
    /// Whether they move to a primary that was started again where it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_process_restart: Option<bool>,
    /// Whether a primary whose heartbeats are slow is left for a standby; false by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_high_latency: Option<bool>,
    /// A heartbeat that takes longer is slow, for example `500ms`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(ms|s|m|h)$"), length(max = 20))]
    pub latency_threshold: Option<String>,
    /// Most heartbeats have to be slow for so long, for example `10s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(ms|s|m|h)$"), length(max = 20))]
    pub latency_duration: Option<String>,
    /// No such move sooner after the last change of primary, for example `10m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[0-9]+(ms|s|m|h)$"), length(max = 20))]
    pub latency_interval: Option<String>,
}

/// `[observability]`, as far as Kubernetes does not decide it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyLogs {
    /// From which level on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_level: Option<LogLevel>,
    /// Whether each migration is logged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_migrations: Option<bool>,
}

/// Level of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// A promise was broken, or a person is needed.
    Error,
    /// Abnormal, but handled.
    Warn,
    /// Changes of state.
    Info,
    /// A few lines a session.
    Debug,
    /// A line a message.
    Trace,
}

impl LogLevel {
    /// The level as the configuration writes it.
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

impl ReplayMode {
    /// The mode as the configuration writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Session => "session",
            Self::Transaction => "transaction",
            Self::Select => "select",
        }
    }
}
