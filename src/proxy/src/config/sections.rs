//! The sections of the file and their keys.

use helios_api::control::Backend;
use helios_api::{Endpoint, Host, InstanceName};
use toml::de::{DeTable, DeValue};

use super::keys::SECTIONS_NOT_YET;
use super::reader::{Problems, Section, did_you_mean};
use super::values::{
    address, boolean, bytes, choice, count, duration, millis, path, port, seconds, small, text,
};
use super::{InstanceConfig, LogLevel, Problem, ProxyConfig, ReplayMode, RestoreAhead};
use crate::auth::AuthMethod;
use crate::tls::{CertificateFiles, SslMode};

const DAY: u64 = 86_400;
const GIB: u64 = 1 << 30;

const AUTH: &[(&str, AuthMethod)] = &[
    ("trust", AuthMethod::Trust),
    ("scram-sha-256", AuthMethod::ScramSha256),
    ("cert", AuthMethod::Cert),
];
const REPLAY_MODE: &[(&str, ReplayMode)] = &[
    ("none", ReplayMode::None),
    ("session", ReplayMode::Session),
    ("transaction", ReplayMode::Transaction),
    ("select", ReplayMode::Select),
];
const RESTORE_AHEAD: &[(&str, RestoreAhead)] = &[
    ("off", RestoreAhead::Off),
    ("planned", RestoreAhead::Planned),
    ("always", RestoreAhead::Always),
];
const SSLMODE: &[(&str, SslMode)] = &[
    ("disable", SslMode::Disable),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];
const LOG_LEVEL: &[(&str, LogLevel)] = &[
    ("error", LogLevel::Error),
    ("warn", LogLevel::Warn),
    ("info", LogLevel::Info),
    ("debug", LogLevel::Debug),
    ("trace", LogLevel::Trace),
];
const SECTIONS: &[&str] = &[
    "proxy",
    "transaction_replay",
    "session_migration",
    "backends",
    "health_checks",
    "migration_triggers",
    "observability",
];

/// Reads a whole file.
pub(super) fn parse(source: &str) -> Result<ProxyConfig, Vec<Problem>> {
    let mut problems = Problems::new(source);
    let (file, errors) = DeTable::parse_recoverable(source);
    if !errors.is_empty() {
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            problems.add(at, error.message());
        }
        return problems.finish(ProxyConfig::default());
    }
    let file = file.get_ref();
    let mut config = ProxyConfig::default();
    edge(file, &mut config, &mut problems);
    replay(file, &mut config, &mut problems);
    migration(file, &mut config, &mut problems);
    backends(file, &mut config, &mut problems);
    health(file, &mut config, &mut problems);
    triggers(file, &mut config, &mut problems);
    observability(file, &mut config, &mut problems);
    for &name in SECTIONS_NOT_YET {
        Section::of(file, name, &mut problems).finish();
    }
    for (key, _) in file {
        let name = key.get_ref().as_ref();
        let known = SECTIONS.iter().chain(SECTIONS_NOT_YET).copied();
        if !known.clone().any(|section| section == name) {
            let hint = did_you_mean(name, known);
            problems.add(key.span().start, format!("unknown section [{name}]{hint}"));
        }
    }
    problems.finish(config)
}

fn edge(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let edge = &mut config.proxy;
    let mut section = Section::of(file, "proxy", problems);
    section
        .set("listen_address", &mut edge.listen, address)
        .set_some("unix_socket_dir", &mut edge.unix_socket_dir, path)
        .set("auth", &mut edge.auth, choice(AUTH))
        .set("tls_required", &mut edge.tls_required, boolean)
        .set_some("tls_client_ca", &mut edge.tls_client_ca, path)
        .set(
            "max_connections",
            &mut edge.max_connections,
            count(1, 1_000_000),
        )
        .set_some(
            "max_connections_per_user",
            &mut edge.max_connections_per_user,
            count(1, 1_000_000),
        )
        .set(
            "login_timeout_secs",
            &mut edge.login_timeout,
            seconds(1, 600),
        )
        .set_some(
            "idle_timeout_secs",
            &mut edge.idle_timeout,
            seconds(1, 365 * DAY),
        )
        .set_some("threads", &mut edge.threads, count(1, 1024))
        .set(
            "session_migration_enabled",
            &mut edge.session_migration_enabled,
            boolean,
        );
    // One protocol, and one way of pooling: a backend for each client's session.
    section.get("protocol", choice(&[("postgresql", ()), ("postgres", ())]));
    section.get("mode", choice(&[("session", ())]));
    edge.tls = certificate(&mut section, "tls_cert", "tls_key");
    if edge.auth == AuthMethod::Cert && (edge.tls.is_none() || edge.tls_client_ca.is_none()) {
        let message = "auth = \"cert\" needs tls_cert, tls_key and tls_client_ca";
        section.problem(&["auth"], message);
    }
    if edge.tls_required && edge.tls.is_none() {
        let message = "tls_required = true needs tls_cert and tls_key";
        section.problem(&["tls_required"], message);
    }
    if edge.tls_client_ca.is_some() && edge.tls.is_none() {
        section.problem(
            &["tls_client_ca"],
            "tls_client_ca needs tls_cert and tls_key",
        );
    }
    section.finish();
}

/// A certificate and its key, which come together or not at all.
fn certificate(
    section: &mut Section<'_, '_, '_>,
    cert: &'static str,
    key: &'static str,
) -> Option<CertificateFiles> {
    match (section.get(cert, path), section.get(key, path)) {
        (Some(certificate), Some(key)) => Some(CertificateFiles { certificate, key }),
        (None, None) => None,
        _ => {
            let message = format!("\"{cert}\" and \"{key}\" are needed together");
            section.problem(&[cert, key], message);
            None
        }
    }
}

fn replay(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let replay = &mut config.replay;
    let mut section = Section::of(file, "transaction_replay", problems);
    let mode = section.alias("mode", "tr_mode");
    let enabled = section.alias("enabled", "tr_enabled");
    let limit = section.alias("max_journal_bytes", "tr_max_journal_bytes");
    section
        .set(mode, &mut replay.mode, choice(REPLAY_MODE))
        .set(limit, &mut replay.max_journal_bytes, bytes(4096, 64 * GIB))
        .set(
            "max_total_journal_bytes",
            &mut replay.max_total_journal_bytes,
            bytes(4096, 1024 * GIB),
        )
        .set(
            "switchover_drain_timeout_secs",
            &mut replay.switchover_drain_timeout,
            seconds(0, DAY),
        )
        .set(
            "max_replay_attempts",
            &mut replay.max_replay_attempts,
            small(1, 1000),
        )
        .set(
            "replay_backoff_ms",
            &mut replay.replay_backoff,
            millis(0, 60_000),
        )
        .set(
            "max_replay_time_seconds",
            &mut replay.max_replay_time,
            seconds(1, DAY),
        )
        .set(
            "replay_on_connection_loss",
            &mut replay.replay_on_connection_loss,
            boolean,
        );
    if section.get(enabled, boolean) == Some(false) {
        replay.mode = ReplayMode::None;
    }
    section.get("verify_on_replay", |value| match boolean(value)? {
        true => Ok(()),
        false => Err("a replay is always verified; mode = \"session\" replays none".to_owned()),
    });
    if replay.max_journal_bytes > replay.max_total_journal_bytes {
        let message = "max_journal_bytes is larger than max_total_journal_bytes";
        section.problem(&["max_total_journal_bytes", limit], message);
    }
    section.finish();
}

fn migration(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let to = &mut config.migration;
    let mut section = Section::of(file, "session_migration", problems);
    section
        .set(
            "capture_set_parameters",
            &mut to.capture_set_parameters,
            boolean,
        )
        .set(
            "capture_prepared_statements",
            &mut to.capture_prepared_statements,
            boolean,
        )
        .set("capture_temp_tables", &mut to.capture_temp_tables, boolean)
        .set("capture_cursors", &mut to.capture_cursors, boolean)
        .set(
            "restore_ahead",
            &mut to.restore_ahead,
            choice(RESTORE_AHEAD),
        )
        .set_some(
            "transaction_buffer_path",
            &mut to.transaction_buffer_path,
            path,
        )
        .set(
            "transaction_buffer_size",
            &mut to.transaction_buffer_size,
            bytes(0, 1024 * GIB),
        )
        .set(
            "transaction_buffer_total_size",
            &mut to.transaction_buffer_total_size,
            bytes(0, 1024 * GIB),
        )
        .set_some(
            "lost_notification_payload",
            &mut to.lost_notification_payload,
            text,
        )
        .set("migration_timeout", &mut to.migration_timeout, duration);
    if to.transaction_buffer_size > to.transaction_buffer_total_size {
        let message = "transaction_buffer_size is larger than transaction_buffer_total_size";
        let keys = ["transaction_buffer_total_size", "transaction_buffer_size"];
        section.problem(&keys, message);
    }
    section.finish();
}

fn backends(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let to = &mut config.backends;
    let mut section = Section::of(file, "backends", problems);
    section
        .set("sslmode", &mut to.sslmode, choice(SSLMODE))
        .set_some("sslrootcert", &mut to.sslrootcert, path)
        .set("service_user", &mut to.service_user, text)
        .set("service_database", &mut to.service_database, text)
        .set_some("service_password_file", &mut to.service_password_file, path)
        .set("connect_timeout", &mut to.connect_timeout, duration);
    to.client_certificate = certificate(&mut section, "sslcert", "sslkey");
    if matches!(to.sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && to.sslrootcert.is_none() {
        let message = "sslmode verify-ca and verify-full need sslrootcert";
        section.problem(&["sslmode"], message);
    }
    let list = section.raw("instances");
    section.finish();
    let Some(list) = list else { return };
    let Some(tables) = list.get_ref().as_array() else {
        let message = "\"instances\" must be a list of sections: [[backends.instances]]";
        problems.add(list.span().start, message);
        return;
    };
    for entry in tables {
        let at = entry.span().start;
        let Some(table) = entry.get_ref().as_table() else {
            problems.add(at, "an instance must be a section: [[backends.instances]]");
            continue;
        };
        if let Some(read) = instance(table, at, problems) {
            let name = &read.backend.name;
            if to.instances.iter().any(|i| i.backend.name == *name) {
                problems.add(at, format!("instance \"{name}\" is given twice"));
            }
            to.instances.push(read);
        }
    }
}

fn instance(table: &DeTable<'_>, at: usize, problems: &mut Problems<'_>) -> Option<InstanceConfig> {
    use std::time::Duration;
    let mut section = Section::new("backends.instances", at, Some(table), problems);
    let (mut number, mut priority) = (5432, 100);
    let (mut interval, mut limit) = (Duration::from_secs(2), Duration::from_secs(1));
    section
        .set("port", &mut number, port(1))
        .set("priority", &mut priority, small(0, 1_000_000))
        .set("health_check_interval", &mut interval, duration)
        .set("health_check_timeout", &mut limit, duration);
    let name = required(&mut section, "name", |value| {
        text(value)?
            .parse::<InstanceName>()
            .map_err(|e| e.to_string())
    });
    let host = required(&mut section, "host", |value| {
        let host = text(value)?;
        Ok(if host.starts_with('/') {
            Host::Unix(host.into())
        } else {
            Host::Tcp(host)
        })
    });
    section.finish();
    let endpoint = Endpoint {
        host: host?,
        port: number,
    };
    Some(InstanceConfig {
        backend: Backend {
            name: name?,
            endpoint,
        },
        priority,
        health_check_interval: interval,
        health_check_timeout: limit,
    })
}

fn required<T>(
    section: &mut Section<'_, '_, '_>,
    key: &'static str,
    parse: impl Fn(&DeValue<'_>) -> Result<T, String>,
) -> Option<T> {
    if section.raw(key).is_none() {
        let message = format!("\"{key}\" is missing in [[backends.instances]]");
        section.problem(&[], message);
    }
    section.get(key, parse)
}

fn health(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let to = &mut config.health;
    let mut section = Section::of(file, "health_checks", problems);
    section
        .set("check_query", &mut to.check_query, text)
        .set(
            "failure_threshold",
            &mut to.failure_threshold,
            small(1, 1000),
        )
        .set(
            "success_threshold",
            &mut to.success_threshold,
            small(1, 1000),
        );
    section.finish();
}

fn triggers(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let to = &mut config.triggers;
    let mut section = Section::of(file, "migration_triggers", problems);
    section
        .set("on_backend_failure", &mut to.on_backend_failure, boolean)
        .set(
            "on_maintenance_signal",
            &mut to.on_maintenance_signal,
            boolean,
        )
        .set("on_process_restart", &mut to.on_process_restart, boolean)
        .set("on_high_latency", &mut to.on_high_latency, boolean)
        .set("latency_threshold", &mut to.latency_threshold, duration)
        .set("latency_duration", &mut to.latency_duration, duration)
        .set("latency_interval", &mut to.latency_interval, duration);
    section.finish();
}

fn observability(file: &DeTable<'_>, config: &mut ProxyConfig, problems: &mut Problems<'_>) {
    let to = &mut config.observability;
    let mut section = Section::of(file, "observability", problems);
    section
        .set("log_level", &mut to.log_level, choice(LOG_LEVEL))
        .set_some("log_path", &mut to.log_path, path)
        .set("log_migrations", &mut to.log_migrations, boolean)
        .set("metrics_enabled", &mut to.metrics_enabled, boolean)
        .set("metrics_address", &mut to.metrics_address, text)
        .set("metrics_port", &mut to.metrics_port, port(0));
    section.finish();
}
