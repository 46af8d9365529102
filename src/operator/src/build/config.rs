//! The configurations of agents and proxies, as the files that they read.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use helios_agent::{AgentConfig, BaseBackup, Network, ServerTls};
use helios_api::InstanceName;
use helios_api::agent::ServerSettings;
use helios_api::v1alpha1::valid::{Invalid, ValidCluster};
use helios_api::v1alpha1::{
    MigrationTriggers, ProxyLogs, ProxySpec, SessionMigration, TransactionReplay, names,
};
use helios_control::TlsFiles;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::json;
use toml::{Table, Value};

use super::{Built, built};
use crate::OperatorError;

/// Where each thing lies in a Pod.
pub(super) const DATA: &str = "/var/lib/helios";
pub(super) const WAL: &str = "/var/lib/helios-wal";
pub(super) const RUN: &str = "/run/helios";
pub(super) const CONFIG: &str = "/etc/helios/config";
/// What a copy of a running server needs: `password`, `ca.crt`.
pub(super) const SOURCE: &str = "/etc/helios/source";
pub(super) const PASSWORD: &str = "password";
pub(super) const CA: &str = "ca.crt";
pub(super) const TLS: &str = "/etc/helios/tls";
/// Where the proxy's journals go that outgrow their memory.
pub(super) const JOURNAL: &str = "/var/lib/helios-journal";
/// The proxy's file in the ConfigMap.
pub(super) const PROXY_FILE: &str = "helios_proxy.toml";

/// Name of the ConfigMap.
pub(super) fn name(cluster: &ValidCluster) -> String {
    format!("{}-config", cluster.name)
}

/// All files of a cluster.
pub(super) fn config_map(cluster: &ValidCluster) -> Result<Built, OperatorError> {
    let mut files = BTreeMap::new();
    for instance in &cluster.instances {
        let config = agent(cluster, instance);
        files.insert(
            format!("{instance}.json"),
            serde_json::to_string_pretty(&config)?,
        );
    }
    files.insert(PROXY_FILE.to_owned(), proxy(cluster));
    let name = name(cluster);
    Ok(built::<ConfigMap>(
        cluster,
        &name,
        None,
        json!({"data": files}),
    ))
}

fn tls_files() -> TlsFiles {
    let file = |name: &str| PathBuf::from(TLS).join(name);
    TlsFiles {
        ca: file("ca.crt"),
        certificate: file("tls.crt"),
        key: file("tls.key"),
    }
}

/// The configuration of one agent.
fn agent(cluster: &ValidCluster, name: &InstanceName) -> AgentConfig {
    let any = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port);
    let postgres = &cluster.spec.postgresql;
    let files = tls_files();
    let run = PathBuf::from(RUN);
    let mut hba = vec![
        // The service logs in with a certificate of the cluster's authority, and in no other way.
        format!("hostssl all {0} all cert", names::SERVICE_USER),
        format!("hostssl replication {0} all cert", names::SERVICE_USER),
        format!("host all {0} all reject", names::SERVICE_USER),
        format!("host replication {0} all reject", names::SERVICE_USER),
    ];
    if postgres.pg_hba.is_empty() {
        hba.push("host all all all scram-sha-256".to_owned());
    }
    hba.extend(postgres.pg_hba.iter().cloned());
    let home = PathBuf::from(DATA).join("pg");
    AgentConfig {
        // Not the volume's own folder: that may hold more.
        wal_dir: cluster.wal_bytes.map(|_| PathBuf::from(WAL).join("pg")),
        base_backup: base_backup(cluster, name),
        control_socket: run.join("agent.sock"),
        listen_addresses: vec!["*".to_owned()],
        parameters: postgres.parameters.clone(),
        hba,
        tls: Some(ServerTls {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            client_ca: Some(files.ca.clone()),
        }),
        network: Some(Network {
            control: any(names::CONTROL_PORT),
            probes: any(names::HTTP_PORT),
            tls: files,
        }),
        // The agent looks for PostgreSQL itself: only it knows the image.
        ..AgentConfig::local(
            name.clone(),
            &home,
            &run.join("pg"),
            names::POSTGRES_PORT,
            std::path::Path::new(""),
        )
    }
}

/// Whether an instance may be the one that copies a running server: the first primary is the first
/// instance.
fn copies(cluster: &ValidCluster, name: &InstanceName) -> bool {
    cluster.spec.bootstrap.base_backup.is_some() && cluster.instances.first() == Some(name)
}

/// Whether it needs Secrets for that.
pub(super) fn copies_with_secrets(cluster: &ValidCluster, name: &InstanceName) -> bool {
    let source = cluster.spec.bootstrap.base_backup.as_ref();
    let any = source.is_some_and(|s| s.password_secret.is_some() || s.ca_secret.is_some());
    any && copies(cluster, name)
}

/// The server that it copies, as its agent reaches it.
fn base_backup(cluster: &ValidCluster, name: &InstanceName) -> Option<BaseBackup> {
    let source = cluster.spec.bootstrap.base_backup.as_ref();
    let source = source.filter(|_| copies(cluster, name))?;
    let file = |name: &str| PathBuf::from(SOURCE).join(name);
    let mut options = BTreeMap::from([
        ("host", source.host.clone()),
        ("port", source.port.to_string()),
        ("user", source.user.clone()),
        ("sslmode", source.ssl_mode.as_str().to_owned()),
    ]);
    if source.ca_secret.is_some() {
        options.insert("sslrootcert", file(CA).display().to_string());
    }
    let options = options.into_iter().map(|(name, v)| (name.to_owned(), v));
    Some(BaseBackup {
        options: options.collect(),
        password_file: source.password_secret.as_ref().map(|_| file(PASSWORD)),
    })
}

/// What agents are told of the spec while they run.
pub(crate) fn server_settings(cluster: &ValidCluster) -> ServerSettings {
    let Some(first) = cluster.instances.first() else {
        return ServerSettings::default();
    };
    let AgentConfig {
        parameters, hba, ..
    } = agent(cluster, first);
    ServerSettings { parameters, hba }
}

/// Checks what becomes of the spec by the rules of those who read it.
pub(crate) fn check(cluster: &ValidCluster) -> Result<(), Invalid> {
    let Some(first) = cluster.instances.first() else {
        return Ok(());
    };
    let mut config = agent(cluster, first);
    config.bin_dir = PathBuf::from("/usr/bin");
    // The rules for the operator's own user are not those for the agent's.
    config.run_as = Some(helios_agent::User { uid: 1, gid: 1 });
    config
        .validate()
        .map_err(|e| Invalid::new("spec.postgresql", e.to_string()))?;
    helios_proxy::config::ProxyConfig::parse(&proxy(cluster), PROXY_FILE)
        .map(drop)
        .map_err(|e| Invalid::new("spec.proxy", e.to_string()))
}

/// The proxy's `helios_proxy.toml`.
pub(super) fn proxy(cluster: &ValidCluster) -> String {
    let spec: &ProxySpec = &cluster.spec.proxy;
    let health = &spec.health_checks;
    let file = section([
        ("proxy", edge(spec)),
        ("transaction_replay", replay(&spec.transaction_replay)),
        ("session_migration", migration(&spec.session_migration)),
        ("backends", backends()),
        (
            "health_checks",
            section([
                ("check_query", health.check_query.as_deref().map(text)),
                ("failure_threshold", integer(health.failure_threshold)),
                ("success_threshold", integer(health.success_threshold)),
            ]),
        ),
        ("migration_triggers", triggers(&spec.migration_triggers)),
        ("observability", observability(&spec.observability)),
    ]);
    match file {
        // As a table it is written as a document; as a value it would be one in braces.
        Some(Value::Table(file)) => file.to_string(),
        _ => String::new(),
    }
}

fn file_name(path: &std::path::Path) -> Option<Value> {
    Some(text(&path.display().to_string()))
}

fn edge(spec: &ProxySpec) -> Option<Value> {
    let files = tls_files();
    let listen = format!("*:{}", names::POSTGRES_PORT);
    section([
        ("listen_address", Some(text(&listen))),
        ("auth", Some(text("scram-sha-256"))),
        ("tls_cert", file_name(&files.certificate)),
        ("tls_key", file_name(&files.key)),
        ("tls_required", flag(spec.tls_required)),
        ("threads", integer(spec.threads)),
        ("max_connections", integer(spec.max_connections)),
        (
            "max_connections_per_user",
            integer(spec.max_connections_per_user),
        ),
        ("login_timeout_secs", integer(spec.login_timeout_secs)),
        ("idle_timeout_secs", integer(spec.idle_timeout_secs)),
    ])
}

fn replay(spec: &TransactionReplay) -> Option<Value> {
    section([
        ("mode", spec.mode.map(|mode| text(mode.as_str()))),
        ("max_journal_bytes", integer(spec.max_journal_bytes)),
        (
            "max_total_journal_bytes",
            integer(spec.max_total_journal_bytes),
        ),
        ("max_replay_attempts", integer(spec.max_replay_attempts)),
        ("replay_backoff_ms", integer(spec.replay_backoff_ms)),
        (
            "max_replay_time_seconds",
            integer(spec.max_replay_time_seconds),
        ),
        (
            "replay_on_connection_loss",
            flag(spec.replay_on_connection_loss),
        ),
    ])
}

fn migration(spec: &SessionMigration) -> Option<Value> {
    section([
        ("capture_set_parameters", flag(spec.capture_set_parameters)),
        (
            "capture_prepared_statements",
            flag(spec.capture_prepared_statements),
        ),
        ("capture_temp_tables", flag(spec.capture_temp_tables)),
        ("capture_cursors", flag(spec.capture_cursors)),
        (
            "restore_ahead",
            spec.restore_ahead.map(|when| text(when.as_str())),
        ),
        ("transaction_buffer_path", Some(text(JOURNAL))),
        (
            "transaction_buffer_size",
            integer(spec.transaction_buffer_size),
        ),
        (
            "transaction_buffer_total_size",
            integer(spec.transaction_buffer_total_size),
        ),
        (
            "lost_notification_payload",
            spec.lost_notification_payload.as_deref().map(text),
        ),
        (
            "migration_timeout",
            spec.migration_timeout.as_deref().map(text),
        ),
    ])
}

fn triggers(spec: &MigrationTriggers) -> Option<Value> {
    let time = |value: &Option<String>| value.as_deref().map(text);
    section([
        ("on_backend_failure", flag(spec.on_backend_failure)),
        ("on_maintenance_signal", flag(spec.on_maintenance_signal)),
        ("on_process_restart", flag(spec.on_process_restart)),
        ("on_high_latency", flag(spec.on_high_latency)),
        ("latency_threshold", time(&spec.latency_threshold)),
        ("latency_duration", time(&spec.latency_duration)),
        ("latency_interval", time(&spec.latency_interval)),
    ])
}

/// How far apart moves for latency have to be, by the rules and defaults of the proxy's file.
pub(crate) fn latency_interval_ms(cluster: &ValidCluster) -> u64 {
    let config = helios_proxy::config::ProxyConfig::parse(&proxy(cluster), PROXY_FILE);
    let interval = config.map(|c| c.triggers.latency_interval);
    // A spec that was checked is read; one that is not is not acted upon.
    interval.map_or(u64::MAX, |d| {
        u64::try_from(d.as_millis()).unwrap_or(u64::MAX)
    })
}

fn backends() -> Option<Value> {
    let files = tls_files();
    section([
        // Not verify-full: Pods are addressed by IP, which no certificate carries.
        ("sslmode", Some(text("verify-ca"))),
        ("sslrootcert", file_name(&files.ca)),
        ("sslcert", file_name(&files.certificate)),
        ("sslkey", file_name(&files.key)),
        ("service_user", Some(text(names::SERVICE_USER))),
        ("service_database", Some(text("postgres"))),
    ])
}

fn observability(spec: &ProxyLogs) -> Option<Value> {
    section([
        (
            "log_level",
            spec.log_level.map(|level| text(level.as_str())),
        ),
        ("log_migrations", flag(spec.log_migrations)),
        ("metrics_enabled", Some(Value::Boolean(true))),
        ("metrics_address", Some(text("0.0.0.0"))),
        ("metrics_port", integer(Some(names::HTTP_PORT.into()))),
    ])
}

/// The entries that have a value; `None` when none has.
fn section<const N: usize>(entries: [(&str, Option<Value>); N]) -> Option<Value> {
    let table: Table = entries
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)))
        .collect();
    (!table.is_empty()).then_some(Value::Table(table))
}

fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

fn integer(value: Option<i64>) -> Option<Value> {
    value.map(Value::Integer)
}

fn flag(value: Option<bool>) -> Option<Value> {
    value.map(Value::Boolean)
}
