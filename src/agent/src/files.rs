//! The files of a data directory that the agent writes: configuration, client authentication,
//! `standby.signal`; and what kind of directory it is.
//!
//! `helios.conf` holds defaults and the user's parameters, `helios-dynamic.conf` what commands
//! change while the server runs. What must never be changed by anybody is given on the postmaster's
//! command line, which outranks every file.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;

use crate::disk;
use crate::error::{file_failed, refused};
use crate::logs;
use crate::record;
use crate::{AgentConfig, AgentFailure};

const STATIC: &str = "helios.conf";
const DYNAMIC: &str = "helios-dynamic.conf";

/// Parameters that commands change while the server runs.
const DYNAMIC_NAMES: [&str; 4] = [
    "primary_conninfo",
    "primary_slot_name",
    "synchronous_standby_names",
    RETRY_INTERVAL,
];
/// How often a standby looks for its primary.
pub(crate) const RETRY_INTERVAL: &str = "wal_retrieve_retry_interval";

/// Defaults under the user's parameters.
const DEFAULTS: &[(&str, &str)] = &[
    ("wal_level", "replica"),
    ("max_connections", "300"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_wal_size", "1GB"), // initdb's own depends on the segment size: 64 MB with 1 MB ones
    ("min_wal_size", "80MB"),
    ("wal_keep_size", "256MB"), // lets an instance rejoin that had no slot for a while
    ("max_slot_wal_keep_size", "4GB"), // a standby that is away must not fill the disk
    ("wal_retrieve_retry_interval", "10ms"), // a promotion never waits 5 s for it
    ("wal_receiver_timeout", "2s"), // the age of the last message is a witness of failures
    ("wal_sender_timeout", "2s"),
    ("wal_receiver_status_interval", "1s"),
    ("hot_standby_feedback", "on"),
    ("restart_after_crash", "on"),
    ("track_commit_timestamp", "off"),
];

/// Parameters that a standby may not have less of than the WAL was written with
/// ("Hot Standby Administrator's Overview" in PostgreSQL's documentation).
pub(crate) const FLOORED: [&str; 5] = [
    "max_connections",
    "max_locks_per_transaction",
    "max_prepared_transactions",
    "max_wal_senders",
    "max_worker_processes",
];
/// The least of some of them.
pub(crate) type Floor = BTreeMap<&'static str, i64>;

/// Default where [`disk::can_sync_at_once`].
const INIT_SYNC: (&str, &str) = ("recovery_init_sync_method", "syncfs");

/// What the data directory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Directory {
    /// Missing or empty.
    Empty,
    /// A data directory of the major version of `bin_dir`.
    Ours,
}

/// Looks at the data directory.
///
/// Refuses one of another major version, and files that are no data directory.
pub(crate) fn inspect(config: &AgentConfig, major: &str) -> Result<Directory, AgentError> {
    let dir = &config.data_dir;
    let mut entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Directory::Empty),
        Err(e) => return Err(file_failed("could not list", dir)(e)),
    };
    if entries.next().is_none() {
        return Ok(Directory::Empty);
    }
    let Ok(version) = std::fs::read_to_string(dir.join("PG_VERSION")) else {
        return Err(refused(format_args!(
            "\"{}\" is not empty and not a data directory; empty it or choose another one",
            dir.display()
        )));
    };
    if version.trim() != major {
        return Err(refused(format_args!(
            "data directory \"{}\" is of PostgreSQL {}, but the programs in \"{}\" are of {major}; \
             upgrade it with pg_upgrade, or set bin_dir to version {}",
            dir.display(),
            version.trim(),
            config.bin_dir.display(),
            version.trim()
        )));
    }
    Ok(Directory::Ours)
}

/// What commands change while the server runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Dynamic {
    pub(crate) primary_conninfo: String,
    pub(crate) primary_slot_name: String,
    pub(crate) synchronous_standby_names: String,
    /// Empty: the default, or the user's.
    pub(crate) retry_interval: String,
}

impl Dynamic {
    /// What the file says; empty values when it is missing.
    pub(crate) fn read(config: &AgentConfig) -> Self {
        let text = std::fs::read_to_string(config.data_dir.join(DYNAMIC)).unwrap_or_default();
        let value = |name: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(name)?.trim().strip_prefix('='))
                .map(|value| unquote(value.trim()))
                .unwrap_or_default()
        };
        Self {
            primary_conninfo: value(DYNAMIC_NAMES[0]),
            primary_slot_name: value(DYNAMIC_NAMES[1]),
            synchronous_standby_names: value(DYNAMIC_NAMES[2]),
            retry_interval: value(DYNAMIC_NAMES[3]),
        }
    }

    /// Writes the file; takes effect with the next reload or start.
    pub(crate) fn write(&self, config: &AgentConfig) -> Result<(), AgentError> {
        let Self {
            primary_conninfo,
            primary_slot_name,
            synchronous_standby_names,
            retry_interval,
        } = self;
        let values = [
            primary_conninfo,
            primary_slot_name,
            synchronous_standby_names,
            retry_interval,
        ];
        let mut text = String::from("# written by helios, changed by its commands\n");
        for (name, value) in DYNAMIC_NAMES.iter().zip(values) {
            // An empty interval would be an error; the others may be empty.
            if *name == RETRY_INTERVAL && value.is_empty() {
                continue;
            }
            let _ = writeln!(text, "{name} = {}", quote(value));
        }
        replace(config, &config.data_dir.join(DYNAMIC), &text)
    }
}

/// A value in single quotes, as the configuration file's grammar has it.
fn quote(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''"))
}

fn unquote(value: &str) -> String {
    let inner = value
        .strip_prefix('\'')
        .and_then(|v| v.strip_suffix('\''))
        .unwrap_or(value);
    inner.replace("''", "'").replace("\\\\", "\\")
}

/// Replaces a file without waiting for the disk (the configuration is written anew before each
/// start) and gives it to PostgreSQL's user.
fn replace(config: &AgentConfig, path: &Path, text: &str) -> Result<(), AgentError> {
    let failed = |e| file_failed("could not write", path)(e);
    let temporary = PathBuf::from(format!("{}.tmp", path.display()));
    std::fs::write(&temporary, text).map_err(failed)?;
    own(config, &temporary).map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}

/// Gives a file to PostgreSQL's user.
pub(crate) fn own(config: &AgentConfig, path: &Path) -> std::io::Result<()> {
    match &config.run_as {
        Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

/// Writes everything that the server reads at its start. Returns the parameters that are higher
/// than asked for, because of `floor`.
pub(crate) fn configure(config: &AgentConfig, floor: &Floor) -> Result<Vec<String>, AgentError> {
    let dir = &config.data_dir;
    let (text, kept) = parameters(config, floor);
    replace(config, &dir.join(STATIC), &text)?;
    write_hba(config)?;
    let dynamic = dir.join(DYNAMIC);
    if !dynamic.exists() {
        Dynamic::default().write(config)?;
    }
    include(config)?;
    forget_altered(config)?;
    Ok(kept)
}

/// `helios.conf`, and what in it is higher than asked for.
fn parameters(config: &AgentConfig, floor: &Floor) -> (String, Vec<String>) {
    let mut all: BTreeMap<&str, String> = BTreeMap::new();
    for (name, value) in DEFAULTS {
        all.insert(name, (*value).to_owned());
    }
    if disk::can_sync_at_once() {
        all.insert(INIT_SYNC.0, INIT_SYNC.1.to_owned());
    }
    for (name, value) in &config.parameters {
        all.insert(name, value.clone());
    }
    let mut kept = Vec::new();
    for (name, least) in floor {
        // What is no number is for PostgreSQL to judge.
        let asked = all.get(name).map(|value| value.parse::<i64>());
        match asked {
            Some(Ok(asked)) if asked < *least => kept.push((*name).to_owned()),
            None => {}
            Some(_) => continue,
        }
        all.insert(name, least.to_string());
    }
    let mut text = String::from("# written by helios; set parameters there\n");
    for (name, value) in all {
        let _ = writeln!(text, "{name} = {}", quote(&value));
    }
    (text, kept)
}

/// Writes `pg_hba.conf`; in force from the next reload on.
pub(crate) fn write_hba(config: &AgentConfig) -> Result<(), AgentError> {
    let path = config.data_dir.join("pg_hba.conf");
    replace(config, &path, &client_authentication(config))
}

fn client_authentication(config: &AgentConfig) -> String {
    let user = &config.superuser;
    let mut text = format!(
        "# written by helios at each start\n\
         local all {user} trust\nlocal replication {user} trust\n"
    );
    if config.hba.is_empty() {
        text.push_str(
            "local all all trust\nlocal replication all trust\n\
             host all all all scram-sha-256\nhost replication all all scram-sha-256\n",
        );
    }
    for line in &config.hba {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// Makes `postgresql.conf` end with our files.
fn include(config: &AgentConfig) -> Result<(), AgentError> {
    let path = config.data_dir.join("postgresql.conf");
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
        Err(e) => return Err(file_failed("could not read", &path)(e)),
    };
    let ours = format!("include_if_exists = '{STATIC}'\ninclude_if_exists = '{DYNAMIC}'\n");
    if text.ends_with(&ours) {
        return Ok(());
    }
    replace(config, &path, &format!("{text}\n# helios\n{ours}"))
}

/// Takes what is ours out of `postgresql.auto.conf`: an `ALTER SYSTEM` would outrank our files.
fn forget_altered(config: &AgentConfig) -> Result<(), AgentError> {
    let path = config.data_dir.join("postgresql.auto.conf");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let ours = |line: &&str| {
        let name = line.split('=').next().unwrap_or_default().trim();
        DYNAMIC_NAMES.contains(&name)
    };
    if !text.lines().any(|line| ours(&line)) {
        return Ok(());
    }
    let kept: Vec<&str> = text.lines().filter(|line| !ours(line)).collect();
    replace(config, &path, &(kept.join("\n") + "\n"))
}

/// The postmaster's arguments: what no file may change.
pub(crate) fn arguments(config: &AgentConfig) -> Vec<String> {
    let mut settings = vec![
        ("port", config.port.to_string()),
        ("listen_addresses", config.listen_addresses.join(",")),
        (
            "unix_socket_directories",
            config.socket_dir.display().to_string(),
        ),
        ("cluster_name", config.name.to_string()),
        ("hot_standby", "on".to_owned()),
        ("wal_log_hints", "on".to_owned()),
        ("full_page_writes", "on".to_owned()),
        ("password_encryption", "scram-sha-256".to_owned()),
        ("recovery_target_timeline", "latest".to_owned()),
        ("logging_collector", "off".to_owned()),
    ];
    if let Some(tls) = &config.tls {
        settings.push(("ssl", "on".to_owned()));
        settings.push(("ssl_cert_file", tls.certificate.display().to_string()));
        settings.push(("ssl_key_file", tls.key.display().to_string()));
        if let Some(ca) = &tls.client_ca {
            settings.push(("ssl_ca_file", ca.display().to_string()));
        }
    }
    settings
        .into_iter()
        .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")])
        .collect()
}

fn standby_signal(config: &AgentConfig) -> PathBuf {
    config.data_dir.join("standby.signal")
}

/// Whether the directory would start as a standby.
pub(crate) fn is_standby(config: &AgentConfig) -> bool {
    standby_signal(config).exists()
}

/// Makes the directory start as a standby, or as a primary; durable when it returns.
pub(crate) fn set_standby(config: &AgentConfig, standby: bool) -> Result<(), AgentError> {
    let path = standby_signal(config);
    let failed = |e| file_failed("could not change", &path)(e);
    if standby {
        File::create(&path)
            .and_then(|file| file.sync_all())
            .map_err(failed)?;
        own(config, &path).map_err(failed)?;
    } else {
        remove_if_exists(&path).map_err(failed)?;
    }
    sync_folder(&config.data_dir).map_err(failed)
}

pub(crate) fn remove_if_exists(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes the folders that have to be there before anything runs.
pub(crate) fn prepare_folders(config: &AgentConfig) -> Result<(), AgentFailure> {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = &config.socket_dir;
    let failed = |e| AgentFailure::file("could not prepare folder", dir, e);
    std::fs::create_dir_all(dir).map_err(failed)?;
    own(config, dir).map_err(failed)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(failed)
}

/// Makes an empty folder for building a data directory; what an earlier attempt left is removed.
pub(crate) async fn start_building(config: &AgentConfig) -> Result<PathBuf, AgentError> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = config.building_dir();
    remove_tree(&path).await?;
    let failed = |e| file_failed("could not create", &path)(e);
    std::fs::create_dir(&path).map_err(failed)?;
    own(config, &path).map_err(failed)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).map_err(failed)?;
    Ok(path)
}

/// Puts the built directory in the data directory's place; what was there is removed, with its log.
pub(crate) async fn finish_building(config: &AgentConfig) -> Result<(), AgentError> {
    let old = PathBuf::from(format!("{}.old", config.data_dir.display()));
    remove_tree(&old).await?;
    if config.data_dir.exists() {
        std::fs::rename(&config.data_dir, &old)
            .map_err(file_failed("could not move away", &config.data_dir))?;
    }
    std::fs::rename(config.building_dir(), &config.data_dir)
        .and_then(|()| sync_folder(config.home()))
        .map_err(file_failed("could not put in place", &config.data_dir))?;
    remove_tree(&old).await?;
    logs::sweep(config).await
}

/// Removes a folder with all it holds, off the runtime's threads.
pub(crate) async fn remove_tree(path: &Path) -> Result<(), AgentError> {
    let owned = path.to_owned();
    let removed = tokio::task::spawn_blocking(move || match std::fs::remove_dir_all(owned) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    })
    .await
    .unwrap_or_else(|e| Err(std::io::Error::other(e)));
    removed.map_err(file_failed("could not remove", path))
}

/// Writes the synchronous setting through to the disk: losing it would acknowledge commits that
/// only one instance holds.
pub(crate) fn write_dynamic_through(
    config: &AgentConfig,
    dynamic: &Dynamic,
) -> Result<(), AgentError> {
    dynamic.write(config)?;
    let path = config.data_dir.join(DYNAMIC);
    let text = std::fs::read(&path).map_err(file_failed("could not read", &path))?;
    record::replace(&path, &text, 0o600)
        .and_then(|()| own(config, &path))
        .map_err(file_failed("could not write", &path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoting_is_undone() {
        for value in ["", "it's", "a\\b", "host='/x' user=helios"] {
            assert_eq!(unquote(&quote(value)), value);
        }
    }

    #[test]
    fn a_floor_raises_what_is_less_and_says_so() {
        let path = Path::new("/srv/a");
        let mut config = AgentConfig::local("a".parse().unwrap(), path, path, 1, path);
        config
            .parameters
            .insert("max_connections".into(), "50".into());
        let floor = Floor::from([("max_connections", 100), ("max_worker_processes", 8)]);
        let (text, kept) = parameters(&config, &floor);
        assert!(text.contains("max_connections = '100'\n"), "{text}");
        assert!(text.contains("max_worker_processes = '8'\n"), "{text}");
        assert_eq!(kept, ["max_connections"]);
        config
            .parameters
            .insert("max_connections".into(), "200".into());
        let (text, kept) = parameters(&config, &floor);
        assert!(text.contains("max_connections = '200'\n"), "{text}");
        assert_eq!(kept, [""; 0]);
    }

    #[test]
    fn dynamic_settings_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            AgentConfig::local("a".parse().unwrap(), dir.path(), dir.path(), 1, dir.path());
        std::fs::create_dir(&config.data_dir).unwrap();
        assert_eq!(Dynamic::read(&config), Dynamic::default());
        let dynamic = Dynamic {
            primary_conninfo: "host='/a b' port=1".into(),
            primary_slot_name: "helios_a".into(),
            synchronous_standby_names: "FIRST 1 (\"a\")".into(),
            retry_interval: "5s".into(),
        };
        dynamic.write(&config).unwrap();
        assert_eq!(Dynamic::read(&config), dynamic);
    }
}
