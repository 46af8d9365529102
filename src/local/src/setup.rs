//! From a data directory to agents that run: folders, versions, the instances' configurations, the
//! application's role and database.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use helios_agent::record::RecordFile;
use helios_agent::{AgentConfig, User};
use helios_api::{Host, InstanceName};
use helios_cluster::ClusterState;

use crate::credentials::{self, Credentials, SERVICE_USER};
use crate::error::LocalError;
use crate::layout::Layout;
use crate::lock::Lock;
use crate::options::LocalOptions;
use crate::postgres::{self, BinDir};

/// Number in the names of the servers' Unix sockets; each has a folder of its own.
pub(crate) const PORT: u16 = 5432;
/// WAL that a primary keeps when nobody needs it: the marks of statements in flight are looked for
/// in it after a crash.
const KEPT_WAL_MB: u32 = 64;
/// WAL files that it holds ready for use.
const READY_WAL_MB: u32 = 16;
/// How long agents of an earlier supervisor may take to end.
const OLD_AGENT_LIMIT: Duration = Duration::from_secs(45);
/// Limit of one statement while the role is made.
const SQL_LIMIT: Duration = Duration::from_secs(15);

/// A data directory that is ours and locked.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) layout: Layout,
    pub(crate) lock: Lock,
    pub(crate) state: ClusterState,
    pub(crate) credentials: Credentials,
    pub(crate) bin: BinDir,
    pub(crate) names: Vec<InstanceName>,
    /// Where the state is kept.
    pub(crate) record: Arc<Mutex<RecordFile>>,
}

/// Takes the directory, or creates it.
pub(crate) fn prepare(options: &LocalOptions) -> Result<Prepared, LocalError> {
    options.check()?;
    let bin = postgres::find_bin_dir(options.pg_bin_dir.as_deref())?;
    let layout = Layout::new(&options.data_dir);
    recognise(&layout)?;
    folder(layout.root(), 0o755)?;
    let lock = Lock::take(&layout.lock_file(), layout.root())?;
    let (record, stored) = open_state(&layout.state_file())?;
    if stored.is_none() && layout.root().join("instances").exists() && has_data(&layout) {
        return Err(LocalError::NotACluster {
            path: layout.root().to_owned(),
            why: "there are instances, but \"cluster.json\" is missing; restore it".to_owned(),
        });
    }
    let mut state = stored.unwrap_or_default();
    // What failed before the stop may have been mended meanwhile.
    for member in state.members.values_mut() {
        member.failures = 0;
        member.retry_at = helios_cluster::Time(0);
    }
    if state.format != helios_cluster::state::FORMAT {
        return Err(LocalError::NotACluster {
            path: layout.root().to_owned(),
            why: format!(
                "\"cluster.json\" has format {}, which this version does not know",
                state.format
            ),
        });
    }
    let names = names(options, &state)?;
    for name in &names {
        postgres::check_version(name.as_str(), &layout.instance_data(name), &bin)?;
    }
    let credentials = Credentials::load_or_create(
        layout.root(),
        &options.user,
        &options.database,
        options.password.as_deref(),
    )?;
    let folders = [
        layout.root().join("instances"),
        layout.logs(),
        layout.sockets().to_owned(),
    ];
    for path in folders {
        folder(&path, 0o755)?;
    }
    for name in &names {
        folder(&layout.instance(name), 0o755)?;
    }
    Ok(Prepared {
        layout,
        lock,
        state,
        credentials,
        bin,
        names,
        record: Arc::new(Mutex::new(record)),
    })
}

fn open_state(path: &Path) -> Result<(RecordFile, Option<ClusterState>), LocalError> {
    RecordFile::open(path.to_owned()).map_err(|e| match e.kind() {
        ErrorKind::InvalidData | ErrorKind::UnexpectedEof => LocalError::Corrupt {
            path: path.to_owned(),
            why: e.to_string(),
        },
        _ => LocalError::io("read", path, e),
    })
}

/// Whether the directory is free for us, or ours already.
pub(crate) fn recognise(layout: &Layout) -> Result<(), LocalError> {
    let ours = [
        layout.state_file(),
        layout.lock_file(),
        layout.root().join(credentials::FILE),
    ];
    if ours.iter().any(|path| path.exists()) {
        return Ok(());
    }
    match std::fs::read_dir(layout.root()) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(LocalError::io("read", layout.root(), e)),
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => Err(LocalError::NotACluster {
                path: layout.root().to_owned(),
                why: "it is not empty and holds no \"cluster.json\"".to_owned(),
            }),
        },
    }
}

fn has_data(layout: &Layout) -> bool {
    let entries = std::fs::read_dir(layout.root().join("instances"))
        .into_iter()
        .flatten();
    entries
        .flatten()
        .any(|entry| entry.path().join("data/PG_VERSION").exists())
}

fn folder(path: &Path, mode: u32) -> Result<(), LocalError> {
    std::fs::create_dir_all(path).map_err(|e| LocalError::io("create folder", path, e))?;
    // The servers' user must be able to pass through.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(|e| LocalError::io("set the mode of", path, e))
}

/// Those on disk, and new ones up to the number that is asked for.
fn names(options: &LocalOptions, state: &ClusterState) -> Result<Vec<InstanceName>, LocalError> {
    let mut names: Vec<InstanceName> = state.members.keys().cloned().collect();
    for number in 1..=options.instances {
        let name: InstanceName =
            format!("pg-{number}")
                .parse()
                .map_err(|e| LocalError::Option {
                    option: "instances",
                    why: format!("{e}"),
                })?;
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Agents of a supervisor that was killed stop their servers when they notice; until then they
/// would answer in place of ours.
pub(crate) async fn await_old_agents(prepared: &Prepared) -> Result<(), LocalError> {
    let deadline = tokio::time::Instant::now() + OLD_AGENT_LIMIT;
    for name in &prepared.names {
        let path = prepared.layout.instance(name).join("agent.lock");
        let Ok(file) = std::fs::File::open(&path) else {
            continue; // there has never been one
        };
        while let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
            if tokio::time::Instant::now() >= deadline {
                return Err(LocalError::InUse { path, pid: None });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

/// What each agent is started with: configuration, its file, its log.
pub(crate) fn agent_configs(
    prepared: &Prepared,
    options: &LocalOptions,
    parent_watch: bool,
) -> Result<Vec<(AgentConfig, PathBuf, PathBuf)>, LocalError> {
    let run_as = User::for_server().map_err(|e| LocalError::Option {
        option: "data_dir",
        why: e.to_string(),
    })?;
    let one = |name: &InstanceName| {
        let layout = &prepared.layout;
        let mut parameters: BTreeMap<String, String> = options.parameters.clone();
        let mut fallback = |name: &str, value: &str| {
            parameters
                .entry(name.to_owned())
                .or_insert_with(|| value.to_owned());
        };
        // Every client holds a server connection, and a second one while it moves.
        fallback("max_connections", "300");
        fallback("shared_buffers", "128MB");
        // pg_rewind copies all WAL that the new primary has, onto the disk that its commits go to.
        fallback("wal_keep_size", &format!("{KEPT_WAL_MB}MB"));
        let ready = READY_WAL_MB.max(2 * options.wal_segment_mb);
        fallback("min_wal_size", &format!("{ready}MB"));
        let config = AgentConfig {
            name: name.clone(),
            data_dir: layout.instance_data(name),
            wal_dir: None,
            socket_dir: layout.instance_sockets(name),
            port: PORT,
            listen_addresses: Vec::new(),
            control_socket: layout.agent_socket(name),
            bin_dir: prepared.bin.path.clone(),
            run_as: run_as.clone(),
            parameters,
            wal_segment_size_mb: options.wal_segment_mb,
            hba: Vec::new(),
            tls: None,
            superuser: SERVICE_USER.to_owned(),
            primary_options: BTreeMap::new(),
            base_backup: None,
            parent_watch,
            network: None,
        };
        (
            config,
            layout.instance(name).join("config.json"),
            layout.agent_log(name),
        )
    };
    Ok(prepared.names.iter().map(one).collect())
}

/// Makes the application's role and database, and the service's password, unless they are there.
pub(crate) async fn create_role(
    endpoint: &helios_api::Endpoint,
    credentials: &Credentials,
) -> Result<(), LocalError> {
    let failed = |what: &'static str| {
        move |e: tokio_postgres::Error| LocalError::Sql {
            what,
            why: e
                .as_db_error()
                .map_or_else(|| e.to_string(), ToString::to_string),
        }
    };
    let mut config = tokio_postgres::Config::new();
    match &endpoint.host {
        Host::Unix(dir) => config.host_path(dir),
        Host::Tcp(host) => config.host(host),
    };
    config
        .port(endpoint.port)
        .user(SERVICE_USER)
        .dbname("postgres")
        .connect_timeout(SQL_LIMIT)
        // A standby that is not there yet must not hold this up.
        .options(
            "-c synchronous_commit=local -c statement_timeout=15000 -c search_path=pg_catalog",
        );
    let connect = failed("connect to the new primary");
    let (client, connection) = config
        .connect(tokio_postgres::NoTls)
        .await
        .map_err(connect)?;
    let connection = tokio::spawn(connection);
    let make = async {
        let role = "select 1 from pg_roles where rolname = $1";
        if client
            .query_opt(role, &[&credentials.user])
            .await?
            .is_none()
        {
            let user = identifier(&credentials.user);
            let password = literal(&credentials::verifier(&credentials.password));
            let service = literal(&credentials::verifier(&credentials.service_password));
            // One transaction: a second start finds both or neither.
            let sql = format!(
                "begin; create role {user} login password {password}; \
                 alter role {SERVICE_USER} password {service}; commit"
            );
            client.batch_execute(&sql).await?;
        }
        let database = "select 1 from pg_database where datname = $1";
        if client
            .query_opt(database, &[&credentials.database])
            .await?
            .is_none()
        {
            let database = identifier(&credentials.database);
            let owner = identifier(&credentials.user);
            client
                .batch_execute(&format!("create database {database} owner {owner}"))
                .await?;
        }
        Ok(())
    };
    let result = make
        .await
        .map_err(failed("create the application's role and database"));
    drop(client);
    connection.abort();
    result
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A literal for a server with standard_conforming_strings, which is the default everywhere.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}
