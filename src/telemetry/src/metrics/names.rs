//! The names of all metrics, each with its type, unit and labels.
//!
//! Dashboards, alerts and the documentation refer to these; a name is never changed, only
//! superseded.

/// Gauge: client sessions by `state` (`connecting`, `idle`, `active`, `in_transaction`, `held`,
/// `migrating`).
pub const SESSIONS: &str = "helios_sessions";
/// Counter: client connections accepted.
pub const CONNECTIONS: &str = "helios_connections_total";
/// Counter: client connections turned away, by `reason` (`limit`, `authentication`, `protocol`,
/// `timeout`, `no_primary`, …).
pub const CONNECTIONS_REFUSED: &str = "helios_connections_refused_total";
/// Gauge, bytes: memory that the journals of all sessions hold.
pub const JOURNAL_BYTES: &str = "helios_journal_bytes";
/// Gauge, bytes: what of the journals of all sessions is on disk.
pub const JOURNAL_DISK_BYTES: &str = "helios_journal_disk_bytes";
/// Counter: transactions that outgrew their journal and became unprotected.
pub const JOURNAL_OVERFLOWS: &str = "helios_journal_overflows_total";
/// Counter: session migrations by `result` (`completed`, `failed`) and `reason` (`switchover`,
/// `failover`, `connection_loss`).
pub const SESSION_MIGRATIONS: &str = "helios_session_migrations_total";
/// Counter: session migrations that ended in an error for the client.
pub const SESSION_MIGRATIONS_FAILED: &str = "helios_session_migrations_failed";
/// Counter: session migrations that the client did not notice.
pub const SESSION_MIGRATIONS_SUCCESSFUL: &str = "helios_session_migrations_successful";
/// Counter: replays of an open transaction by `result` (`success`, `mismatch`, `error`,
/// `timeout`).
pub const TRANSACTION_REPLAYS: &str = "helios_transaction_replays_total";
/// Histogram, seconds: replay of one open transaction, from its first statement to the last.
pub const TRANSACTION_REPLAY_SECONDS: &str = "helios_transaction_replay_seconds";
/// Gauge, seconds since the Unix epoch: when a replay last ended; 0 when none has.
pub const LAST_REPLAY_TIMESTAMP: &str = "helios_last_replay_timestamp_seconds";
/// Counter: transactions that a move would have cost the client: replayed, or their outcome
/// resolved from evidence.
pub const LOSSES_PREVENTED: &str = "helios_losses_prevented_total";
/// Counter: changes of primary after which commits that clients were told of may be missing.
pub const LOSSY_PROMOTIONS: &str = "helios_lossy_promotions_total";
/// Counter: COMMITs that were in flight when the primary went, by `outcome` (`committed`,
/// `not_committed`, `unknown`).
pub const COMMIT_RESOLUTIONS: &str = "helios_commit_resolutions_total";
/// Histogram, seconds: how long a session stood still in a move, by `kind` (`switchover`,
/// `failover`, `connection_loss`).
pub const PAUSE_SECONDS: &str = "helios_pause_seconds";
/// Histogram, seconds: duration of a move's phases by `phase` (`drain`, `restore`, `resolve`,
/// `replay`, `resume`, …).
pub const MOVE_PHASE_SECONDS: &str = "helios_move_phase_seconds";
/// Counter: exchanges, from a client's request to the ReadyForQuery that ended it.
pub const EXCHANGES: &str = "helios_exchanges_total";
/// Counter, bytes: protocol traffic by `direction` (`from_client`, `to_client`).
pub const BYTES: &str = "helios_bytes_total";
/// Gauge: sessions that a failover now would not cost an error.
pub const PROTECTED_SESSIONS: &str = "helios_protected_sessions";
/// Gauge: sessions that a failover now would cost an error, by `reason`.
pub const UNPROTECTED_SESSIONS: &str = "helios_unprotected_sessions";
/// Counter: transactions that ended, by `database`, `user`, `application`, `kind` (`transaction`: a
/// block, `statement`: outside of one) and `protection`: `protected` through its whole life, or the
/// first reason why a failover would have cost it an error.
pub const PROTECTION_TRANSACTIONS: &str = "helios_protection_transactions_total";
/// Counter, seconds: what sessions spent by `database`, `user`, `application`, `state`
/// (`in_transaction`, `idle`: outside of one) and `protection`, as above.
pub const PROTECTION_SECONDS: &str = "helios_protection_seconds_total";
/// Counter: session migrations that began, by `reason` (`switchover`, `failover`,
/// `connection_loss`).
pub const SESSION_MIGRATIONS_STARTED: &str = "helios_session_migrations_started_total";
/// Histogram, bytes: journal and state of the sessions that moved.
pub const SESSION_MIGRATIONS_STATE_BYTES: &str = "helios_session_migrations_state_bytes";
/// Gauge: 1 when the `instance` answered its last health check, else 0.
pub const BACKEND_UP: &str = "helios_backend_up";

/// Gauge: 1 when this replica of the operator leads, else 0.
pub const OPERATOR_LEADING: &str = "helios_operator_leading";
/// Counter: reconciliations of a cluster that failed and were tried again, by `namespace` and
/// `cluster`.
pub const RECONCILE_FAILURES: &str = "helios_operator_reconcile_failures_total";
/// Gauge: 1 when a cluster's phase is Ready, else 0, by `namespace` and `cluster`; so are the next.
pub const CLUSTER_READY: &str = "helios_cluster_ready";
/// Gauge: instances that exist.
pub const CLUSTER_INSTANCES: &str = "helios_cluster_instances";
/// Gauge: instances that serve in their role.
pub const CLUSTER_INSTANCES_READY: &str = "helios_cluster_instances_ready";
/// Gauge: standbys that commits wait for and that are up.
pub const CLUSTER_CONFIRMING: &str = "helios_cluster_confirming_standbys";
/// Gauge, bytes: what a standby has not replayed yet, by `instance` too; none when it is not known.
pub const CLUSTER_LAG_BYTES: &str = "helios_cluster_lag_bytes";
/// Gauge, seconds since the Unix epoch: when the first of the cluster's certificates ends.
pub const CLUSTER_CERTIFICATE_EXPIRY: &str = "helios_cluster_certificate_expiry_timestamp_seconds";
/// Counter: operations that ended while this replica led, by `kind` (`switchover`, `failover`,
/// `restart`) and `outcome` (`succeeded`, `aborted`, `diverted`) too.
pub const CLUSTER_OPERATIONS: &str = "helios_cluster_operations_total";
/// Histogram, seconds: what sessions may have noticed of an operation, by `kind` too.
pub const CLUSTER_PAUSE_SECONDS: &str = "helios_cluster_pause_seconds";

/// Shows that a metric was added without a help text; a test refuses it.
pub const NO_HELP: &str = "no help";

/// The help text of a metric.
#[must_use]
pub fn help(name: &str) -> &'static str {
    match name {
        SESSIONS => "client sessions by state",
        BYTES => "bytes of protocol traffic by direction",
        CONNECTIONS => "client connections accepted",
        CONNECTIONS_REFUSED => "client connections turned away by reason",
        JOURNAL_BYTES => "bytes of memory held by all journals",
        JOURNAL_DISK_BYTES => "bytes of all journals on disk",
        JOURNAL_OVERFLOWS => "transactions that outgrew their journal",
        SESSION_MIGRATIONS => "session migrations by result and reason",
        SESSION_MIGRATIONS_FAILED => "session migrations that ended in an error for the client",
        SESSION_MIGRATIONS_SUCCESSFUL => "session migrations that the client did not notice",
        TRANSACTION_REPLAYS => "replays of open transactions by result",
        TRANSACTION_REPLAY_SECONDS => "seconds to replay one open transaction",
        LAST_REPLAY_TIMESTAMP => "seconds since the Unix epoch when a replay last ended",
        LOSSES_PREVENTED => "transactions saved by replay or by resolving their outcome",
        LOSSY_PROMOTIONS => "changes of primary that may have lost acknowledged commits",
        COMMIT_RESOLUTIONS => "commits in flight resolved by outcome",
        PAUSE_SECONDS => "seconds a session stood still in a move by kind",
        MOVE_PHASE_SECONDS => "seconds a phase of a move took by phase",
        EXCHANGES => "requests answered up to ReadyForQuery",
        PROTECTED_SESSIONS => "sessions that a failover now would not cost an error",
        UNPROTECTED_SESSIONS => "sessions that a failover now would cost an error by reason",
        PROTECTION_TRANSACTIONS => "transactions by whether a failover would have cost an error",
        PROTECTION_SECONDS => "seconds of sessions by whether a failover would have cost an error",
        SESSION_MIGRATIONS_STARTED => "session migrations that began by reason",
        SESSION_MIGRATIONS_STATE_BYTES => "bytes of journal and state of sessions that moved",
        BACKEND_UP => "1 when the instance answered its last health check",
        OPERATOR_LEADING => "1 when this replica of the operator leads",
        RECONCILE_FAILURES => "reconciliations of a cluster that failed",
        CLUSTER_READY => "1 when the cluster is ready",
        CLUSTER_INSTANCES => "instances that exist",
        CLUSTER_INSTANCES_READY => "instances that serve in their role",
        CLUSTER_CONFIRMING => "standbys that commits wait for and that are up",
        CLUSTER_LAG_BYTES => "bytes that a standby has not replayed yet",
        CLUSTER_CERTIFICATE_EXPIRY => {
            "seconds since the Unix epoch when the first certificate of the cluster ends"
        }
        CLUSTER_OPERATIONS => "operations that ended by kind and outcome",
        CLUSTER_PAUSE_SECONDS => "seconds that sessions may have noticed of an operation",
        _ => NO_HELP,
    }
}
