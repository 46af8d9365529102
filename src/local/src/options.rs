//! What a local cluster is started with.
//!
//! Plain values with defaults; [`LocalOptions::check`] refuses what cannot work before anything is
//! created.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use helios_cluster::Durability;
use serde::{Deserialize, Serialize};

use crate::error::LocalError;

/// Most instances of one local cluster.
pub(crate) const MAX_INSTANCES: u32 = 9;

/// How the agents run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AgentMode {
    /// As tasks of this process: for applications that embed a cluster.
    #[default]
    InProcess,
    /// As child processes: `<binary> agent --config <file>`.
    Process(PathBuf),
}

/// How clients log in at the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProxyAuth {
    /// Anybody who reaches the listener; it listens on the loopback address by default.
    #[default]
    Trust,
    /// SCRAM-SHA-256 with the password of `credentials.json`.
    Scram,
}

/// Everything that [`crate::LocalCluster::start`] takes. Those that shape the data directory
/// (`instances`, `database`, `user`, `wal_segment_mb`) count when it is created; later starts may
/// add instances and otherwise keep what is on disk.
#[derive(Debug, Clone)]
pub struct LocalOptions {
    /// Where everything lives.
    pub data_dir: PathBuf,
    /// PostgreSQL servers, 1 to 9.
    pub instances: u32,
    /// Where the proxy listens, `host:port`; port 0 takes a free one.
    pub listen: String,
    /// Folder for the proxy's Unix socket (`.s.PGSQL.<port>`); `None`: TCP only.
    pub unix_socket_dir: Option<PathBuf>,
    /// Where the proxy's HTTP endpoints listen (`/metrics`, `/healthz`, …); `None`: nowhere.
    pub http_listen: Option<String>,
    /// Application database.
    pub database: String,
    /// Application user, owner of the database.
    pub user: String,
    /// Its password; `None`: generated.
    pub password: Option<String>,
    /// How clients log in.
    pub auth: ProxyAuth,
    /// How agents run.
    pub agents: AgentMode,
    /// PostgreSQL's programs; `None`: `PG_BINDIR`, `PATH`, `/usr/lib/postgresql/*/bin`.
    pub pg_bin_dir: Option<PathBuf>,
    /// Whether a commit waits for a standby (the default).
    pub synchronous: bool,
    /// What happens to commits when no standby is left to wait for.
    pub durability: Durability,
    /// A `helios_proxy.toml` that replaces the generated one.
    pub proxy_config: Option<PathBuf>,
    /// `[transaction_replay] mode` of the generated one: `none`, `session`, `transaction`, `select`.
    pub replay_mode: String,
    /// How long open transactions that cannot move may take at a switchover.
    pub drain_timeout: Duration,
    /// WAL segment size; small segments make a promotion faster.
    pub wal_segment_mb: u32,
    /// PostgreSQL settings for every instance.
    pub parameters: BTreeMap<String, String>,
    /// Bound on the whole start.
    pub start_timeout: Duration,
}

impl LocalOptions {
    /// The defaults: two instances, synchronous, the proxy on 127.0.0.1:5432.
    #[must_use]
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            instances: 2,
            listen: "127.0.0.1:5432".to_owned(),
            unix_socket_dir: None,
            http_listen: None,
            database: "app".to_owned(),
            user: "app".to_owned(),
            password: None,
            auth: ProxyAuth::default(),
            agents: AgentMode::default(),
            pg_bin_dir: None,
            synchronous: true,
            durability: Durability::Preferred,
            proxy_config: None,
            replay_mode: "transaction".to_owned(),
            drain_timeout: Duration::from_secs(30),
            wal_segment_mb: 1,
            parameters: BTreeMap::new(),
            start_timeout: Duration::from_secs(120),
        }
    }

    /// Refuses values that cannot work.
    ///
    /// # Errors
    /// [`LocalError::Option`] names the option and what is allowed.
    pub fn check(&self) -> Result<(), LocalError> {
        let bad = |option: &'static str, why: String| Err(LocalError::Option { option, why });
        if self.instances == 0 || self.instances > MAX_INSTANCES {
            return bad("instances", format!("must be 1 to {MAX_INSTANCES}"));
        }
        for (option, value) in [("database", &self.database), ("user", &self.user)] {
            if value.is_empty() || value.len() > 63 || value.contains('\0') {
                return bad(option, "must have 1 to 63 bytes".to_owned());
            }
        }
        if self.user == crate::credentials::SERVICE_USER {
            return bad("user", "this name is the service's own".to_owned());
        }
        if !self.wal_segment_mb.is_power_of_two() || self.wal_segment_mb > 1024 {
            return bad(
                "wal_segment_mb",
                "must be a power of 2 up to 1024".to_owned(),
            );
        }
        if !matches!(
            self.replay_mode.as_str(),
            "none" | "session" | "transaction" | "select"
        ) {
            return bad(
                "replay_mode",
                "must be none, session, transaction or select".to_owned(),
            );
        }
        if !self.data_dir.is_absolute() {
            return bad("data_dir", "must be an absolute path".to_owned());
        }
        Ok(())
    }
}

/// Builds [`LocalOptions`] call by call.
#[derive(Debug, Clone)]
pub struct LocalBuilder {
    options: LocalOptions,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => {
        $( $(#[$doc])* #[must_use] pub fn $name(mut self, value: $type) -> Self { self.options.$name = value; self } )*
    };
}

impl Default for LocalBuilder {
    fn default() -> Self {
        Self {
            options: LocalOptions::new("/var/lib/helios"),
        }
    }
}

impl LocalBuilder {
    /// Where everything lives.
    #[must_use]
    pub fn data_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.options.data_dir = dir.into();
        self
    }

    /// Where the proxy listens, `host:port`; port 0 takes a free one.
    #[must_use]
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.options.listen = address.into();
        self
    }

    /// Application database.
    #[must_use]
    pub fn database(mut self, name: impl Into<String>) -> Self {
        self.options.database = name.into();
        self
    }

    /// Application user, owner of the database.
    #[must_use]
    pub fn user(mut self, name: impl Into<String>) -> Self {
        self.options.user = name.into();
        self
    }

    /// Password of the application user; generated when it is not given.
    #[must_use]
    pub fn password(mut self, password: impl Into<String>) -> Self {
        self.options.password = Some(password.into());
        self
    }

    /// `none`, `session`, `transaction` or `select`.
    #[must_use]
    pub fn replay_mode(mut self, mode: impl Into<String>) -> Self {
        self.options.replay_mode = mode.into();
        self
    }

    /// A PostgreSQL setting for every instance.
    #[must_use]
    pub fn parameter(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.options.parameters.insert(name.into(), value.into());
        self
    }

    setters! {
        /// PostgreSQL servers, 1 to 9.
        instances: u32,
        /// How clients log in.
        auth: ProxyAuth,
        /// How agents run.
        agents: AgentMode,
        /// PostgreSQL's programs.
        pg_bin_dir: Option<PathBuf>,
        /// Folder for the proxy's Unix socket.
        unix_socket_dir: Option<PathBuf>,
        /// Where the proxy's HTTP endpoints listen.
        http_listen: Option<String>,
        /// Whether a commit waits for a standby.
        synchronous: bool,
        /// What happens to commits when no standby is left to wait for.
        durability: Durability,
        /// A `helios_proxy.toml` that replaces the generated one.
        proxy_config: Option<PathBuf>,
        /// How long open transactions that cannot move may take at a switchover.
        drain_timeout: Duration,
        /// WAL segment size in MiB.
        wal_segment_mb: u32,
        /// Bound on the whole start.
        start_timeout: Duration,
    }

    /// The options as they stand.
    #[must_use]
    pub fn options(&self) -> &LocalOptions {
        &self.options
    }

    /// Starts the cluster.
    ///
    /// # Errors
    /// As [`crate::LocalCluster::start`].
    pub async fn start(self) -> Result<crate::LocalCluster, LocalError> {
        crate::LocalCluster::start(self.options).await
    }
}
