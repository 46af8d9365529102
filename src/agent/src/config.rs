//! What an agent is told about its instance, and the check of it.
//!
//! Touches nothing: [`AgentConfig::validate`] judges the values alone. A configuration that passed
//! it can be written into PostgreSQL's files without further quoting questions.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;
use helios_api::{Host, InstanceName};
use helios_control::{Live, Material, PostgresTls, TlsFiles};
use serde::{Deserialize, Serialize};

use crate::AgentFailure;

/// The longest path of a Unix socket (`sun_path`), less its terminating zero.
const SOCKET_PATH_LIMIT: usize = 107;

/// Parameters that the agent sets itself; a user's value would break fencing, rejoining or the
/// addresses under which the others know the instance.
const PROTECTED: &[&str] = &[
    "archive_cleanup_command",
    "cluster_name",
    "config_file",
    "data_directory",
    "external_pid_file",
    "full_page_writes",
    "hba_file",
    "hot_standby",
    "ident_file",
    "listen_addresses",
    "logging_collector",
    "password_encryption",
    "port",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "recovery_end_command",
    "recovery_min_apply_delay",
    "ssl",
    "ssl_ca_file",
    "ssl_cert_file",
    "ssl_key_file",
    "synchronous_standby_names",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
    "wal_log_hints",
];

/// One instance, as its agent is to run it.
///
/// The folder that holds `data_dir` belongs to this instance alone: the agent keeps `agent.json`,
/// `agent.lock` and `postgres.log` there, and builds new data directories beside the old one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// Name of the instance; also its `application_name` and `cluster_name`.
    pub name: InstanceName,
    /// PostgreSQL's data directory (absolute). Need not exist.
    pub data_dir: PathBuf,
    /// Folder on another volume that the write-ahead log lives in (absolute); `pg_wal` is a link into
    /// it then. It belongs to this instance alone. Cannot be changed once there is a data directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_dir: Option<PathBuf>,
    /// Folder of PostgreSQL's Unix socket (absolute). Made with mode 0700, because whoever can
    /// enter it is trusted.
    pub socket_dir: PathBuf,
    /// Port, also the number in the Unix socket's name.
    pub port: u16,
    /// Addresses to listen on; empty for the Unix socket alone.
    #[serde(default)]
    pub listen_addresses: Vec<String>,
    /// The agent's own socket (absolute).
    pub control_socket: PathBuf,
    /// Folder of PostgreSQL's programs.
    pub bin_dir: PathBuf,
    /// The user that PostgreSQL runs as; needed when the agent is root.
    #[serde(default)]
    pub run_as: Option<User>,
    /// PostgreSQL's parameters, over the agent's defaults.
    #[serde(default)]
    pub parameters: BTreeMap<String, String>,
    /// Size of a WAL segment for `initdb`: 1 makes promotions three times as fast as 16.
    #[serde(default = "default_segment_size")]
    pub wal_segment_size_mb: u32,
    /// Lines for `pg_hba.conf`, behind those for the superuser on the Unix socket. Empty: everyone
    /// on the Unix socket is trusted, everybody else needs a SCRAM password.
    #[serde(default)]
    pub hba: Vec<String>,
    /// TLS for TCP connections to PostgreSQL.
    #[serde(default)]
    pub tls: Option<ServerTls>,
    /// Name of the superuser that initdb makes and that the service uses.
    #[serde(default = "default_superuser")]
    pub superuser: String,
    /// Extra connection parameters for reaching a primary over the network (`sslmode`, `sslcert`,
    /// `passfile`, ...), in libpq's names.
    #[serde(default)]
    pub primary_options: BTreeMap<String, String>,
    /// A running server that `Bootstrap` copies, in place of an empty data directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_backup: Option<BaseBackup>,
    /// Stop when the standard input ends: the process that started the agent has gone.
    #[serde(default)]
    pub parent_watch: bool,
    /// Orders over the network, and certificates towards the other instances; only the Unix
    /// sockets without it.
    #[serde(default)]
    pub network: Option<Network>,
}

/// An agent that is commanded from other machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Where orders are taken, under mutual TLS, from the operator's certificate alone.
    pub control: SocketAddr,
    /// Where `/healthz` and `/readyz` are served to anybody.
    pub probes: SocketAddr,
    /// Our certificate, for the control port and towards other instances. Its common name is the
    /// service's superuser, its alternative names hold the instance's name.
    pub tls: TlsFiles,
}

impl Network {
    /// TLS towards another instance.
    pub(crate) fn towards(&self, other: &InstanceName) -> Result<PostgresTls, AgentError> {
        let failed = |e: helios_control::TlsError| AgentError::Failed {
            reason: e.to_string(),
        };
        // Read at each use: they may have been renewed.
        let material = Material::load(&self.tls).map_err(failed)?;
        let certificates = Live::new(&material).map_err(failed)?;
        PostgresTls::new(other.as_str(), &certificates).map_err(failed)
    }
}

/// A server to copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseBackup {
    /// Connection parameters in libpq's names (`host`, `user`, `sslmode`, ...).
    pub options: BTreeMap<String, String>,
    /// File that holds the password, read when it is used.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
}

/// A user of the operating system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Its number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
}

impl User {
    /// The user that servers run as when this process is root: `postgres`. `None` for any other
    /// user, who runs them as itself.
    ///
    /// # Errors
    ///
    /// This process is root and there is no user `postgres`.
    pub fn for_server() -> Result<Option<Self>, AgentFailure> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        match nix::unistd::User::from_name("postgres") {
            Ok(Some(user)) => Ok(Some(Self {
                uid: user.uid.as_raw(),
                gid: user.gid.as_raw(),
            })),
            _ => Err(AgentFailure::Config(
                "PostgreSQL refuses to run as root, and there is no user \"postgres\"; \
                 create it or run as another user"
                    .to_owned(),
            )),
        }
    }
}

/// Files of PostgreSQL's own TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerTls {
    /// Certificate chain (PEM).
    pub certificate: PathBuf,
    /// Private key (PEM), readable for PostgreSQL's user alone.
    pub key: PathBuf,
    /// Authorities whose client certificates are accepted.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
}

fn default_segment_size() -> u32 {
    1
}

fn default_superuser() -> String {
    "helios".to_owned()
}

impl AgentConfig {
    /// A configuration with the defaults of an instance that is reached over its Unix socket.
    /// `home` is the instance's own folder: `home/data`, `home/agent.sock`.
    #[must_use]
    pub fn local(
        name: InstanceName,
        home: &Path,
        socket_dir: &Path,
        port: u16,
        bin: &Path,
    ) -> Self {
        Self {
            name,
            data_dir: home.join("data"),
            wal_dir: None,
            socket_dir: socket_dir.to_owned(),
            port,
            listen_addresses: Vec::new(),
            control_socket: home.join("agent.sock"),
            bin_dir: bin.to_owned(),
            run_as: None,
            parameters: BTreeMap::new(),
            wal_segment_size_mb: default_segment_size(),
            hba: Vec::new(),
            tls: None,
            superuser: default_superuser(),
            primary_options: BTreeMap::new(),
            base_backup: None,
            parent_watch: false,
            network: None,
        }
    }

    /// Checks every value that would otherwise fail later, or do harm.
    ///
    /// # Errors
    ///
    /// [`AgentFailure::Config`] names the value and what is allowed.
    pub fn validate(&self) -> Result<(), AgentFailure> {
        let bad = |text: String| Err(AgentFailure::Config(text));
        self.validate_paths()?;
        for socket in [self.postgres_socket(), self.control_socket.clone()] {
            if socket.as_os_str().len() > SOCKET_PATH_LIMIT {
                return bad(format!(
                    "path of socket \"{}\" is longer than {SOCKET_PATH_LIMIT} bytes",
                    socket.display()
                ));
            }
        }
        if self.port == 0 {
            return bad("port must not be 0".to_owned());
        }
        if !matches!(self.wal_segment_size_mb, 1..=1024)
            || !self.wal_segment_size_mb.is_power_of_two()
        {
            return bad(format!(
                "wal_segment_size_mb must be a power of two from 1 to 1024, but is {}",
                self.wal_segment_size_mb
            ));
        }
        let name_ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if self.superuser.is_empty()
            || self.superuser.len() > 63
            || self.superuser.starts_with("pg_")
            || !self.superuser.bytes().all(name_ok)
        {
            return bad(format!(
                "superuser \"{}\" must be 1 to 63 lower-case letters, digits and '_', not starting with \"pg_\"",
                self.superuser
            ));
        }
        if nix::unistd::geteuid().is_root() && self.run_as.is_none() {
            return bad("run_as must be set: PostgreSQL refuses to run as root".to_owned());
        }
        if let Some(line) = self.hba.iter().find(|line| line.contains(['\n', '\r'])) {
            return bad(format!("hba line {line:?} contains a line break"));
        }
        self.validate_parameters()
    }

    fn validate_paths(&self) -> Result<(), AgentFailure> {
        let bad = |text: String| Err(AgentFailure::Config(text));
        let paths = [
            ("data_dir", &self.data_dir),
            ("socket_dir", &self.socket_dir),
            ("control_socket", &self.control_socket),
            ("bin_dir", &self.bin_dir),
        ];
        let log = self.wal_dir.iter().map(|dir| ("wal_dir", dir));
        for (what, path) in paths.into_iter().chain(log) {
            if !path.is_absolute() || path.parent().is_none() {
                return bad(format!(
                    "{what} must be an absolute path, but is \"{}\"",
                    path.display()
                ));
            }
            if path
                .to_string_lossy()
                .contains(['\'', '\\', '\n', ',', '"'])
            {
                return bad(format!(
                    "{what} \"{}\" contains a quote, comma, backslash or line break",
                    path.display()
                ));
            }
        }
        if let Some(log) = &self.wal_dir
            && (log.starts_with(self.home()) || self.home().starts_with(log))
        {
            return bad(format!(
                "wal_dir \"{}\" must lie apart from \"{}\", which holds the data directory",
                log.display(),
                self.home().display()
            ));
        }
        Ok(())
    }

    fn validate_parameters(&self) -> Result<(), AgentFailure> {
        let bad = |text: String| Err(AgentFailure::Config(text));
        for (name, value) in &self.parameters {
            let form = name
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
            if name.is_empty() || !form {
                return bad(format!("\"{name}\" is not the name of a parameter"));
            }
            let lower = name.to_ascii_lowercase();
            if PROTECTED.contains(&lower.as_str()) || lower.starts_with("recovery_target") {
                return bad(format!(
                    "parameter \"{name}\" is managed by helios and cannot be set; remove it"
                ));
            }
            if value.contains(['\n', '\r', '\0']) {
                return bad(format!(
                    "value of parameter \"{name}\" contains a line break"
                ));
            }
            if lower == "wal_level" && !matches!(value.as_str(), "replica" | "logical") {
                return bad(format!(
                    "wal_level must be \"replica\" or \"logical\", but is \"{value}\""
                ));
            }
        }
        Ok(())
    }

    /// The path of PostgreSQL's Unix socket.
    #[must_use]
    pub fn postgres_socket(&self) -> PathBuf {
        self.socket_dir.join(format!(".s.PGSQL.{}", self.port))
    }

    /// The instance's endpoint on its Unix socket.
    #[must_use]
    pub fn unix_endpoint(&self) -> helios_api::Endpoint {
        helios_api::Endpoint {
            host: Host::Unix(self.socket_dir.clone()),
            port: self.port,
        }
    }

    /// The instance's own folder, which holds the data directory.
    #[must_use]
    pub fn home(&self) -> &Path {
        self.data_dir.parent().unwrap_or(&self.data_dir)
    }

    /// What PostgreSQL writes to its standard error.
    #[must_use]
    pub fn log_file(&self) -> PathBuf {
        self.home().join("postgres.log")
    }

    pub(crate) fn state_file(&self) -> PathBuf {
        self.home().join("agent.json")
    }

    pub(crate) fn lock_file(&self) -> PathBuf {
        self.home().join("agent.lock")
    }

    /// Where a data directory is built before it takes its place.
    pub(crate) fn building_dir(&self) -> PathBuf {
        let mut name = self.data_dir.clone().into_os_string();
        name.push(".new");
        name.into()
    }

    /// Whether the disk is to be waited for; who switches it off for the server means it for the
    /// programs too.
    pub(crate) fn syncs(&self) -> bool {
        let value = self.parameters.get("fsync").map(String::as_str);
        !matches!(value, Some("off" | "false" | "no" | "0"))
    }

    pub(crate) fn program(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AgentConfig {
        let mut config = AgentConfig::local(
            "pg-1".parse().unwrap(),
            Path::new("/srv/pg-1"),
            Path::new("/srv/pg-1/s"),
            5433,
            Path::new("/usr/bin"),
        );
        config.run_as = Some(User { uid: 1, gid: 1 });
        config
    }

    fn refused(change: impl FnOnce(&mut AgentConfig), says: &str) {
        let mut config = config();
        change(&mut config);
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }

    #[test]
    fn good_values_pass() {
        let mut config = config();
        config.parameters.insert("work_mem".into(), "8MB".into());
        config.validate().unwrap();
    }

    #[test]
    fn bad_values_are_refused_by_name() {
        refused(|c| c.data_dir = "data".into(), "data_dir");
        refused(|c| c.wal_dir = Some("wal".into()), "wal_dir");
        for inside in ["/srv/pg-1/data/pg_wal", "/srv"] {
            refused(|c| c.wal_dir = Some(inside.into()), "apart");
        }
        refused(|c| c.port = 0, "port");
        refused(|c| c.wal_segment_size_mb = 3, "wal_segment_size_mb");
        refused(|c| c.superuser = "pg_x".into(), "superuser");
        refused(
            |c| c.socket_dir = format!("/{}", "x".repeat(120)).into(),
            "longer",
        );
        refused(|c| c.hba.push("a\nb".into()), "line break");
        for name in ["port", "Primary_ConnInfo", "recovery_target_lsn", "a b"] {
            refused(|c| drop(c.parameters.insert(name.into(), "1".into())), name);
        }
        refused(
            |c| drop(c.parameters.insert("wal_level".into(), "minimal".into())),
            "wal_level",
        );
    }

    #[test]
    fn survives_a_round_trip_through_json() {
        let text = serde_json::to_string(&config()).unwrap();
        assert_eq!(
            serde_json::from_str::<AgentConfig>(&text).unwrap(),
            config()
        );
    }
}
