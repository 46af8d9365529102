//! What the schema cannot say, or an API server may not check: the spec as types that cannot be
//! wrong.
//!
//! Pure. Every error names the field as people write it.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::{
    BaseBackup, Bootstrap, Certificates, Failover, HeliosCluster, HeliosClusterSpec, Initdb, KeyOf,
    SqlSource, SslMode, names,
};
use crate::InstanceName;

/// A field that cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {why}")]
pub struct Invalid {
    /// The field's path, as in `spec.storage.size`.
    pub field: String,
    /// What is wrong with it, and what is allowed.
    pub why: String,
}

impl Invalid {
    /// A field and what is wrong with it.
    pub fn new(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            why: why.into(),
        }
    }
}

/// A cluster whose spec was checked.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidCluster {
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Its identity, for owner references.
    pub uid: String,
    /// Generation of the spec.
    pub generation: i64,
    /// All instances, in order of their numbers.
    pub instances: Vec<InstanceName>,
    /// Size of a volume in bytes.
    pub storage_bytes: u64,
    /// Size of a volume for the write-ahead log in bytes, where there are any.
    pub wal_bytes: Option<u64>,
    /// The spec as it was given, for what needs no type of its own.
    pub spec: HeliosClusterSpec,
}

/// Longest name: `-replicas` and the like are added to it, and labels hold 63 characters.
const NAME_LIMIT: usize = 40;
/// A data directory alone takes some 40 MB, a log with 1 MB segments 80 MB before any is reused.
const SMALLEST_VOLUME: u64 = 256 << 20;

/// Entries of SQL for a new database, and the longest of them; etcd takes objects of 1.5 MB.
const MOST_SQL: usize = 100;
const LONGEST_SQL: usize = 65_536;

impl ValidCluster {
    /// Checks everything.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn new(cluster: &HeliosCluster) -> Result<Self, Invalid> {
        let spec = &cluster.spec;
        let meta = &cluster.metadata;
        let text = |value: &Option<String>, field: &str| {
            value
                .clone()
                .ok_or_else(|| Invalid::new(field, "is missing"))
        };
        let name = text(&meta.name, "metadata.name")?;
        if name.len() > NAME_LIMIT || name.contains('.') {
            return Err(Invalid::new(
                "metadata.name",
                format!(
                    "must have at most {NAME_LIMIT} characters and no dot: Pods and Services are named after it"
                ),
            ));
        }
        range("spec.instances", spec.instances.into(), 1, 9)?;
        range("spec.proxy.replicas", spec.proxy.replicas.into(), 1, 50)?;
        range("spec.postgresUid", spec.postgres_uid, 1, 65_535)?;
        if spec.image_name.trim().is_empty() || spec.image_name.contains(char::is_whitespace) {
            return Err(Invalid::new("spec.imageName", "must be an image's name"));
        }
        check_postgresql(spec)?;
        check_initdb(spec)?;
        check_certificates(&spec.certificates)?;
        for (field, metadata) in [
            ("spec.podMetadata", &spec.pod_metadata),
            ("spec.proxy.podMetadata", &spec.proxy.pod_metadata),
        ] {
            let mut keys = metadata.labels.keys().chain(metadata.annotations.keys());
            if let Some(key) = keys.find(|key| key.starts_with("heliosdb.io/")) {
                return Err(Invalid::new(
                    field,
                    format!("\"{key}\" is managed by helios; remove it"),
                ));
            }
        }
        Ok(Self {
            instances: (1..=spec.instances)
                .map(|number| names::instance(&name, number).parse())
                .collect::<Result<_, _>>()
                .map_err(|e: crate::ParseError| Invalid::new("metadata.name", e.to_string()))?,
            storage_bytes: storage("spec.storage.size", &spec.storage.size)?,
            wal_bytes: spec
                .wal_storage
                .as_ref()
                .map(|wal| storage("spec.walStorage.size", &wal.size))
                .transpose()?,
            namespace: text(&meta.namespace, "metadata.namespace")?,
            uid: text(&meta.uid, "metadata.uid")?,
            generation: meta.generation.unwrap_or_default(),
            name,
            spec: spec.clone(),
        })
    }
}

fn range(field: &str, value: i64, min: i64, max: i64) -> Result<(), Invalid> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let why = format!("must be from {min} to {max}, but is {value}");
    Err(Invalid::new(field, why))
}

fn check_postgresql(spec: &HeliosClusterSpec) -> Result<(), Invalid> {
    for (number, line) in spec.postgresql.pg_hba.iter().enumerate() {
        if line.contains(['\n', '\r', '\0']) {
            return Err(Invalid::new(
                format!("spec.postgresql.pgHBA[{number}]"),
                "contains a line break; write each line as an entry of its own",
            ));
        }
    }
    let number = spec.postgresql.synchronous.number;
    range("spec.postgresql.synchronous.number", number.into(), 0, 1)?;
    let failover = &spec.failover;
    for (field, value) in [
        ("unresponsiveMs", failover.unresponsive_ms),
        ("standbyGraceMs", failover.standby_grace_ms),
        ("maxLagBytes", failover.max_lag_bytes),
        ("restartPatienceMs", failover.restart_patience_ms),
    ] {
        range(&format!("spec.failover.{field}"), value, 0, i64::MAX)?;
    }
    check_lease(failover)?;
    let drain = spec.switchover.drain_timeout_secs;
    range("spec.switchover.drainTimeoutSecs", drain, 0, 3600)
}

/// A fresh certificate must not be due again soon.
fn check_certificates(certificates: &Certificates) -> Result<(), Invalid> {
    let Certificates {
        duration_days,
        renew_before_days,
    } = *certificates;
    range("spec.certificates.durationDays", duration_days, 7, 730)?;
    let most = duration_days / 2;
    match renew_before_days {
        Some(days) => range("spec.certificates.renewBeforeDays", days, 3, most),
        None => Ok(()),
    }
}

/// The lease must outlast several attempts to renew it.
fn check_lease(failover: &Failover) -> Result<(), Invalid> {
    range("spec.failover.delayMs", failover.delay_ms, 0, 3_600_000)?;
    let lease = failover.lease_ms;
    range("spec.failover.leaseMs", lease, 2_000, 600_000)?;
    range("spec.failover.renewMs", failover.renew_ms, 100, lease / 5)
}

fn check_initdb(spec: &HeliosClusterSpec) -> Result<(), Invalid> {
    let Bootstrap {
        initdb,
        base_backup,
    } = &spec.bootstrap;
    for (field, value) in [("database", &initdb.database), ("owner", &initdb.owner)] {
        let field = format!("spec.bootstrap.initdb.{field}");
        if value.is_empty() || value.len() > 63 || value.contains('\0') {
            return Err(Invalid::new(field, "must have 1 to 63 bytes"));
        }
        let reserved = ["postgres", "template0", "template1", names::SERVICE_USER];
        if reserved.contains(&value.as_str()) || value.starts_with("pg_") {
            return Err(Invalid::new(
                field,
                format!("\"{value}\" is reserved; choose another name"),
            ));
        }
    }
    check_sql(initdb, base_backup.is_some())?;
    match base_backup {
        Some(source) => check_source(source),
        None => Ok(()),
    }
}

fn check_sql(initdb: &Initdb, copied: bool) -> Result<(), Invalid> {
    let field = "spec.bootstrap.initdb.sql";
    if initdb.sql.len() > MOST_SQL {
        let why = format!("must have at most {MOST_SQL} entries");
        return Err(Invalid::new(field, why));
    }
    for (number, sql) in initdb.sql.iter().enumerate() {
        if sql.trim().is_empty() || sql.len() > LONGEST_SQL || sql.contains('\0') {
            return Err(Invalid::new(
                format!("{field}[{number}]"),
                format!("must have 1 to {LONGEST_SQL} bytes"),
            ));
        }
    }
    if copied && (!initdb.sql.is_empty() || initdb.sql_from.is_some()) {
        let why = "is for a new database, not for a copy by spec.bootstrap.baseBackup";
        return Err(Invalid::new(field, why));
    }
    let Some(SqlSource { config_map, secret }) = &initdb.sql_from else {
        return Ok(());
    };
    if config_map.is_some() == secret.is_some() {
        let why = "must have either configMap or secret";
        return Err(Invalid::new("spec.bootstrap.initdb.sqlFrom", why));
    }
    let mut keys = config_map.iter().chain(secret);
    keys.try_for_each(|key| check_key("spec.bootstrap.initdb.sqlFrom", key))
}

fn check_key(field: &str, key: &KeyOf) -> Result<(), Invalid> {
    let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    for (part, text) in [("name", &key.name), ("key", &key.key)] {
        if text.is_empty() || text.len() > 253 || !text.chars().all(named) {
            let why = "must be a name: 1 to 253 letters, digits, '-', '_' and '.'";
            return Err(Invalid::new(format!("{field}.{part}"), why));
        }
    }
    Ok(())
}

fn check_source(source: &BaseBackup) -> Result<(), Invalid> {
    let field = |name: &str| format!("spec.bootstrap.baseBackup.{name}");
    let host = &source.host;
    let plain = |c: char| c.is_ascii_graphic() && !matches!(c, ',' | '/' | '\'' | '"' | '\\');
    if host.is_empty() || host.len() > 253 || !host.chars().all(plain) {
        let why = "must be the name or address of one server";
        return Err(Invalid::new(field("host"), why));
    }
    range(&field("port"), source.port.into(), 1, 65_535)?;
    if source.user.is_empty() || source.user.len() > 63 || source.user.contains('\0') {
        return Err(Invalid::new(field("user"), "must have 1 to 63 bytes"));
    }
    if let Some(key) = &source.password_secret {
        check_key(&field("passwordSecret"), key)?;
    }
    if let Some(key) = &source.ca_secret {
        check_key(&field("caSecret"), key)?;
    }
    let verifies = matches!(source.ssl_mode, SslMode::VerifyCa | SslMode::VerifyFull);
    if verifies && source.ca_secret.is_none() {
        let why = "verify-ca and verify-full need caSecret";
        return Err(Invalid::new(field("sslMode"), why));
    }
    Ok(())
}

fn storage(field: &str, size: &Quantity) -> Result<u64, Invalid> {
    let text = &size.0;
    let bytes = bytes(size).ok_or_else(|| {
        Invalid::new(
            field,
            format!("\"{text}\" is not a size; write for example 10Gi"),
        )
    })?;
    if bytes < SMALLEST_VOLUME {
        return Err(Invalid::new(
            field,
            format!("\"{text}\" is less than 256Mi"),
        ));
    }
    Ok(bytes)
}

/// A quantity in bytes; `None` when it is none, is negative, or is too large to count.
#[must_use]
pub fn bytes(quantity: &Quantity) -> Option<u64> {
    let text = quantity.0.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    // Three decimal places are all that Kubernetes keeps.
    let part = format!("{part:0<3}");
    let thousandths: u64 = part.get(..3)?.parse().ok()?;
    whole
        .checked_mul(factor)?
        .checked_add(factor.checked_mul(thousandths)? / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster() -> HeliosCluster {
        let spec = serde_json::json!({"imageName": "postgres:17", "storage": {"size": "1Gi"}});
        let mut cluster = HeliosCluster::new("pg", serde_json::from_value(spec).unwrap());
        cluster.metadata.namespace = Some("default".to_owned());
        cluster.metadata.uid = Some("u".to_owned());
        cluster
    }

    fn refused(change: impl FnOnce(&mut HeliosCluster), field: &str) {
        let mut cluster = cluster();
        change(&mut cluster);
        let error = ValidCluster::new(&cluster).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }

    #[test]
    fn the_smallest_spec_is_valid() {
        let valid = ValidCluster::new(&cluster()).unwrap();
        let names: Vec<_> = valid.instances.iter().map(InstanceName::as_str).collect();
        assert_eq!(names, ["pg-1", "pg-2"]);
        assert_eq!((valid.storage_bytes, valid.wal_bytes), (1 << 30, None));
        assert_eq!(valid.spec.proxy.replicas, 2);
    }

    #[test]
    fn the_field_that_is_wrong_is_named() {
        refused(|c| c.spec.instances = 0, "spec.instances");
        refused(|c| c.spec.instances = 10, "spec.instances");
        refused(|c| c.spec.proxy.replicas = 0, "spec.proxy.replicas");
        refused(|c| c.spec.image_name = " ".into(), "spec.imageName");
        refused(
            |c| c.spec.storage.size = Quantity("1 GB".into()),
            "spec.storage.size",
        );
        refused(
            |c| c.spec.storage.size = Quantity("1Mi".into()),
            "spec.storage.size",
        );
        let wal = |size: &str| {
            let wal = serde_json::json!({"size": size});
            Some(serde_json::from_value(wal).unwrap())
        };
        for size in ["1 GB", "1Mi"] {
            refused(|c| c.spec.wal_storage = wal(size), "spec.walStorage.size");
        }
        refused(
            |c| c.spec.postgresql.pg_hba = vec!["a".into(), "b\nc".into()],
            "spec.postgresql.pgHBA[1]",
        );
        refused(
            |c| c.spec.postgresql.synchronous.number = 2,
            "spec.postgresql.synchronous.number",
        );
        refused(
            |c| c.spec.bootstrap.initdb.owner = "helios".into(),
            "spec.bootstrap.initdb.owner",
        );
        refused(
            |c| c.spec.switchover.drain_timeout_secs = -1,
            "spec.switchover.drainTimeoutSecs",
        );
        refused(|c| c.spec.failover.lease_ms = 0, "spec.failover.leaseMs");
        refused(|c| c.spec.failover.delay_ms = -1, "spec.failover.delayMs");
        refused(|c| c.spec.failover.renew_ms = 601, "spec.failover.renewMs");
        let field = "spec.certificates.durationDays";
        for days in [0, 6, 731] {
            refused(|c| c.spec.certificates.duration_days = days, field);
        }
        let field = "spec.certificates.renewBeforeDays";
        for days in [-1, 2, 46] {
            refused(
                |c| c.spec.certificates.renew_before_days = Some(days),
                field,
            );
        }
        refused(|c| c.metadata.name = Some("x".repeat(41)), "metadata.name");
        refused(
            |c| {
                let labels = &mut c.spec.pod_metadata.labels;
                labels.insert(names::ROLE.into(), "primary".into());
            },
            "spec.podMetadata",
        );
    }

    #[test]
    fn what_a_cluster_starts_from_is_checked_by_field() {
        let wrong = |bootstrap: serde_json::Value, field: &str| {
            refused(
                |c| c.spec.bootstrap = serde_json::from_value(bootstrap).unwrap(),
                field,
            );
        };
        let key = serde_json::json!({"name": "a", "key": "b"});
        for (initdb, field) in [
            (serde_json::json!({"sql": ["select 1", " "]}), "sql[1]"),
            (serde_json::json!({"sqlFrom": {}}), "sqlFrom"),
            (
                serde_json::json!({"sqlFrom": {"configMap": key, "secret": key}}),
                "sqlFrom",
            ),
            (
                serde_json::json!({"sqlFrom": {"secret": {"name": "a/b", "key": "c"}}}),
                "sqlFrom.name",
            ),
        ] {
            let field = format!("spec.bootstrap.initdb.{field}");
            wrong(serde_json::json!({"initdb": initdb}), &field);
        }
        for (change, field) in [
            (serde_json::json!({"host": "a,b"}), "host"),
            (serde_json::json!({"host": "/run"}), "host"),
            (serde_json::json!({"port": 0}), "port"),
            (serde_json::json!({"user": ""}), "user"),
            (serde_json::json!({"sslMode": "verify-full"}), "sslMode"),
            (
                serde_json::json!({"passwordSecret": {"name": "", "key": "c"}}),
                "passwordSecret.name",
            ),
        ] {
            let mut source = serde_json::json!({"host": "old", "user": "mover"});
            source
                .as_object_mut()
                .unwrap()
                .extend(change.as_object().unwrap().clone());
            let field = format!("spec.bootstrap.baseBackup.{field}");
            wrong(serde_json::json!({"baseBackup": source}), &field);
        }
        wrong(
            serde_json::json!({
                "baseBackup": {"host": "old", "user": "mover"},
                "initdb": {"sql": ["select 1"]},
            }),
            "spec.bootstrap.initdb.sql",
        );
    }

    #[test]
    fn quantities_are_bytes() {
        for (text, expected) in [
            ("1Gi", Some(1 << 30)),
            ("1.5Ki", Some(1536)),
            ("10G", Some(10_000_000_000)),
            ("7", Some(7)),
            ("-1", None),
            ("", None),
            ("1X", None),
            ("100000000000Pi", None),
        ] {
            assert_eq!(bytes(&Quantity(text.to_owned())), expected, "{text}");
        }
    }
}
