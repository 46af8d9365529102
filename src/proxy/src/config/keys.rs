//! Keys of the documents that this version gives no meaning to yet. They are refused by name: a
//! setting that is silently without effect would be worse.

/// Section, keys.
const NOT_YET: &[(&str, &[&str])] = &[
    ("proxy", &["control_address", "control_socket"]),
    (
        "transaction_replay",
        &[
            "write_timeout_secs",
            "journal_path",
            "journal_max_size_mb",
            "journal_sync_mode",
            "checksum_algorithm",
            "auto_replay_on_startup",
            "parallel_replay",
            "replay_threads",
            "track_read_sets",
            "track_write_sets",
            "generate_gtid",
        ],
    ),
    (
        "session_migration",
        &[
            "capture_advisory_locks",
            "transaction_buffer_mode",
            "max_buffered_duration",
            "state_snapshot_interval",
            "zero_copy_temp_tables",
            "temp_table_storage_path",
            "temp_table_shared_memory",
            "temp_table_cleanup_delay",
            "persist_session_state",
            "session_state_path",
        ],
    ),
    ("backends.instances", &["replication_lag_max"]),
    (
        "health_checks",
        &["check_temp_table_access", "check_prepared_statements"],
    ),
    (
        "replication",
        &[
            "replicate_journal",
            "standby_host",
            "replication_mode",
            "replication_retry_interval_seconds",
        ],
    ),
    ("performance", &["simd_checksums", "io_uring_journal"]),
    ("edge", &["low_power_journal", "batch_journal_writes"]),
    (
        "observability",
        &[
            "log_replayed_transactions",
            "track_replay_latency",
            "track_journal_size",
            "trace_session_state",
        ],
    ),
];

/// Sections that hold nothing but such keys.
pub(super) const SECTIONS_NOT_YET: &[&str] = &["replication", "performance", "edge"];

/// The keys of a section that are known and have no meaning yet.
pub(super) fn not_yet(section: &str) -> &'static [&'static str] {
    let found = NOT_YET.iter().find(|(name, _)| *name == section);
    found.map_or(&[], |(_, keys)| keys)
}
