use super::*;

fn problems(text: &str) -> String {
    match ProxyConfig::parse(text, "helios_proxy.toml") {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(ProxyConfig::parse("", "f").unwrap(), ProxyConfig::default());
}

/// Keys that [`EVERY_KEY`] names differently.
const OTHER_NAMES: &[&str] = &[
    "enabled",
    "mode",
    "max_journal_bytes",
    "lost_notification_payload",
];

/// The reference names every key that is read, and none that is not.
#[test]
fn the_reference_is_complete() {
    let text = include_str!("../../../../docs/configuration.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `"));
    let cells = rows.filter_map(|row| row.split(" | ").next());
    let documented: Vec<&str> = cells
        .flat_map(|cell| cell.split('`').step_by(2))
        .filter(|key| !key.is_empty())
        .collect();
    let read = EVERY_KEY.lines().filter_map(|line| line.split_once(" = "));
    let read: Vec<&str> = read
        .map(|(key, _)| key)
        .chain(OTHER_NAMES.iter().copied())
        .collect();
    let missing: Vec<_> = read
        .iter()
        .filter(|key| !documented.contains(key))
        .collect();
    assert!(missing.is_empty(), "not documented: {missing:?}");
    let unknown: Vec<_> = documented
        .iter()
        .filter(|key| !read.contains(key))
        .collect();
    assert!(unknown.is_empty(), "documented, and not read: {unknown:?}");
}

const EVERY_KEY: &str = r#"
[proxy]
listen_address = "[::1]:7000"
protocol = "postgresql"
mode = "session"
session_migration_enabled = false
unix_socket_dir = "/run/helios"
max_connections = 500
max_connections_per_user = 50
threads = 3
login_timeout_secs = 10
idle_timeout_secs = 3600
auth = "cert"
tls_cert = "server.crt"
tls_key = "server.key"
tls_client_ca = "ca.crt"
tls_required = true

[transaction_replay]
tr_enabled = true
tr_mode = "select"
tr_max_journal_bytes = "32MiB"
max_total_journal_bytes = 2_147_483_648
switchover_drain_timeout_secs = 8
max_replay_attempts = 9
replay_backoff_ms = 10
max_replay_time_seconds = 11
replay_on_connection_loss = false
verify_on_replay = true

[session_migration]
restore_ahead = "off"
capture_set_parameters = true
capture_prepared_statements = true
capture_temp_tables = true
capture_cursors = true
transaction_buffer_path = "journals"
transaction_buffer_size = "64MiB"
transaction_buffer_total_size = "1GiB"
migration_timeout = "90s"

[backends]
sslmode = "verify-full"
sslrootcert = "root.crt"
sslcert = "proxy.crt"
sslkey = "proxy.key"
service_user = "helios"
service_database = "app"
service_password_file = "pw"
connect_timeout = "750ms"

[[backends.instances]]
name = "pg-1"
host = "10.0.0.1"
port = 5433
priority = 1
health_check_interval = "500ms"
health_check_timeout = 3

[[backends.instances]]
name = "pg-2"
host = "/run/pg2"

[health_checks]
check_query = "select 2"
failure_threshold = 4
success_threshold = 5

[migration_triggers]
on_backend_failure = false
on_maintenance_signal = false
on_process_restart = false
on_high_latency = true
latency_threshold = "250ms"
latency_duration = "20s"
latency_interval = "1h"

[observability]
log_level = "debug"
log_path = "/var/log/helios"
log_migrations = false
metrics_enabled = false
metrics_address = "0.0.0.0"
metrics_port = 9999
"#;

#[test]
fn every_supported_key_is_read() {
    let text = EVERY_KEY;
    let config = ProxyConfig::parse(text, "f").unwrap();
    assert_eq!(config.proxy.listen.host, "::1");
    assert_eq!(config.proxy.auth, AuthMethod::Cert);
    assert!(config.proxy.tls_required);
    assert_eq!(config.proxy.max_connections_per_user, Some(50));
    assert_eq!(config.proxy.threads, Some(3));
    assert_eq!(config.proxy.idle_timeout, Some(Duration::from_secs(3600)));
    assert!(!config.proxy.session_migration_enabled);
    assert_eq!(config.replay.mode, ReplayMode::Select);
    assert_eq!(config.replay.max_journal_bytes, 32 << 20);
    assert_eq!(config.replay.max_total_journal_bytes, 2 << 30);
    assert_eq!(config.replay.replay_backoff, Duration::from_millis(10));
    assert!(!config.replay.replay_on_connection_loss);
    assert_eq!(config.migration.migration_timeout, Duration::from_secs(90));
    assert_eq!(config.migration.transaction_buffer_size, 64 << 20);
    assert_eq!(config.migration.transaction_buffer_total_size, 1 << 30);
    assert_eq!(config.migration.restore_ahead, RestoreAhead::Off);
    assert_eq!(config.backends.sslmode, SslMode::VerifyFull);
    let [first, second] = &config.backends.instances[..] else {
        panic!("two instances");
    };
    assert_eq!(first.backend.endpoint.to_string(), "10.0.0.1:5433");
    assert_eq!(first.health_check_interval, Duration::from_millis(500));
    assert_eq!(first.health_check_timeout, Duration::from_secs(3));
    assert_eq!(
        second.backend.endpoint.to_string(),
        "/run/pg2/.s.PGSQL.5432"
    );
    assert_eq!(config.health.failure_threshold, 4);
    let triggers = &config.triggers;
    assert!(!triggers.on_backend_failure && !triggers.on_maintenance_signal);
    assert!(!triggers.on_process_restart && triggers.on_high_latency);
    assert_eq!(triggers.latency_threshold, Duration::from_millis(250));
    assert_eq!(triggers.latency_duration, Duration::from_secs(20));
    assert_eq!(triggers.latency_interval, Duration::from_secs(3600));
    assert_eq!(config.observability.log_level, LogLevel::Debug);
    assert_eq!(config.observability.metrics_port, 9999);
}

#[test]
fn everything_that_is_wrong_is_said_with_its_line() {
    let text = r#"[proxy]
lisen_address = "127.0.0.1:6432"
auth = "md5"
max_connections = 0
tls_cert = "x"

[transaction_replay]
journal_path = "/tmp"
mode = "all"
tr_mode = "none"
verify_on_replay = false

[backends]
sslmode = "verify-full"

[[backends.instances]]
name = "PG"
prot = 1

[[backends.instances]]
name = "a"
host = "b"
port = "5432"
replication_lag_max = 3

[[backends.instances]]
name = "a"
host = "c"

[performance]
simd_checksums = true

[observabillity]
"#;
    let expected = r#"helios_proxy.toml:2: unknown key "lisen_address" in [proxy], did you mean "listen_address"?
helios_proxy.toml:3: invalid value for "auth" in [proxy]: expected "trust" or "scram-sha-256" or "cert", got "md5"
helios_proxy.toml:4: invalid value for "max_connections" in [proxy]: expected an integer from 1 to 1000000, got 0
helios_proxy.toml:5: "tls_cert" and "tls_key" are needed together
helios_proxy.toml:8: "journal_path" in [transaction_replay] is not supported by this version
helios_proxy.toml:9: invalid value for "mode" in [transaction_replay]: expected "none" or "session" or "transaction" or "select", got "all"
helios_proxy.toml:10: "tr_mode" is another name of "mode", which is given too
helios_proxy.toml:11: invalid value for "verify_on_replay" in [transaction_replay]: a replay is always verified; mode = "session" replays none
helios_proxy.toml:14: sslmode verify-ca and verify-full need sslrootcert
helios_proxy.toml:16: "host" is missing in [[backends.instances]]
helios_proxy.toml:17: invalid value for "name" in [[backends.instances]]: invalid instance name "PG": only lower-case letters, digits and '-' are allowed
helios_proxy.toml:18: unknown key "prot" in [[backends.instances]], did you mean "port"?
helios_proxy.toml:23: invalid value for "port" in [[backends.instances]]: expected an integer from 1 to 65535, got "5432"
helios_proxy.toml:24: "replication_lag_max" in [[backends.instances]] is not supported by this version
helios_proxy.toml:26: instance "a" is given twice
helios_proxy.toml:31: "simd_checksums" in [performance] is not supported by this version
helios_proxy.toml:33: unknown section [observabillity], did you mean "observability"?"#;
    assert_eq!(problems(text), expected);
}

#[test]
fn broken_toml_is_said_with_its_line() {
    let said = problems("[proxy]\nlisten_address = \n");
    assert!(said.starts_with("helios_proxy.toml:2: "), "{said}");
    assert!(problems("proxy = 1").contains("must be a section"));
    assert!(problems("[backends]\ninstances = 1").contains("must be a list"));
}

#[test]
fn values_have_limits() {
    for bad in [
        "[proxy]\nlisten_address = \"::1:5432\"",
        "[proxy]\nlisten_address = \"localhost\"",
        "[proxy]\nlisten_address = \"localhost:99999\"",
        "[proxy]\nlogin_timeout_secs = 1.5",
        "[transaction_replay]\nmax_journal_bytes = \"2XB\"",
        "[transaction_replay]\nmax_journal_bytes = \"99999999999999GiB\"",
        "[transaction_replay]\nmax_journal_bytes = \"2GiB\"",
        "[session_migration]\nmigration_timeout = \"0s\"",
        "[session_migration]\nmigration_timeout = \"fast\"",
        "[session_migration]\nmigration_timeout = -1",
        "[observability]\nmetrics_port = 70000",
        "[health_checks]\ncheck_query = \"\"",
    ] {
        assert!(problems(bad).starts_with("helios_proxy.toml:2: "), "{bad}");
    }
    assert_eq!(problems("[proxy]\nlisten_address = \":5432\""), "");
}
