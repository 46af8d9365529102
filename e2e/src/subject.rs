//! The cluster that a test's clients connect to, through its proxy.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use helios_local::credentials::SERVICE_USER;
use helios_local::{Credentials, LocalBuilder, LocalCluster, LocalError};
use helios_testkit::{PgOptions, PgServer};
use tokio_postgres::config::Host;
use tokio_postgres::{Client, Config, NoTls};

use crate::Result;
use crate::driver::Target;
use crate::restart::{RestartingServer, all_protected};

/// The longest that an old primary may take to follow the new one: rewound or cloned, on two busy
/// cores.
const REJOIN_LIMIT: Duration = Duration::from_secs(40);

/// How the primary moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// A planned switchover.
    Planned,
    /// `kill -9` of the primary with all its processes.
    Crash,
}

/// A cluster with its proxy in this process, in a directory of its own.
///
/// To tell faults apart, `HELIOS_E2E_SUBJECT` puts something smaller in its place: `direct` is
/// PostgreSQL alone, where a switchover does nothing; `restart` is the proxy in front of one server
/// that restarts instead.
#[derive(Debug)]
pub struct Subject {
    what: What,
    target: Target,
    dir: tempfile::TempDir,
}

#[derive(Debug)]
enum What {
    Cluster(Box<LocalCluster>),
    Direct(Box<PgServer>),
    Restart(Box<RestartingServer>),
}

impl Subject {
    /// Two instances, clients trusted.
    ///
    /// # Errors
    ///
    /// The cluster did not start.
    pub async fn start() -> Result<Self> {
        Self::start_with(|builder| builder).await
    }

    /// A cluster with options of the caller's.
    ///
    /// # Errors
    ///
    /// The cluster did not start.
    pub async fn start_with(options: impl FnOnce(LocalBuilder) -> LocalBuilder) -> Result<Self> {
        // Silent, unless somebody looks for a fault; a second call is refused, and that is fine.
        if let Ok(filter) = std::env::var("RUST_LOG") {
            let _ = helios_telemetry::init(helios_telemetry::LogFormat::Text, &filter, None);
        }
        let dir = tempfile::Builder::new().prefix("helios-e2e-").tempdir()?;
        // The servers' user has to pass through.
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
        match std::env::var("HELIOS_E2E_SUBJECT").as_deref() {
            Ok("direct") => {
                let server = PgServer::start(PgOptions::default()).await?;
                let target = target(&server.conninfo())?;
                return Ok(Self {
                    what: What::Direct(Box::new(server)),
                    target,
                    dir,
                });
            }
            Ok("restart") => {
                let server = RestartingServer::start().await?;
                let target = server.target();
                return Ok(Self {
                    what: What::Restart(Box::new(server)),
                    target,
                    dir,
                });
            }
            _ => {}
        }
        let data = dir.path().join("data");
        let builder = LocalCluster::builder()
            .data_dir(&data)
            .listen("127.0.0.1:0");
        let cluster = Box::pin(options(builder).start()).await?;
        let mut target = target(&cluster.connection_string())?;
        target.password = credentials(&data)?.password;
        let subject = Self {
            what: What::Cluster(Box::new(cluster)),
            target,
            dir,
        };
        // A dump is restored into a database of its own.
        let admin = subject.admin().await?;
        let user = &subject.target.user;
        admin
            .batch_execute(&format!("alter role \"{user}\" createdb"))
            .await?;
        Ok(subject)
    }

    /// Where clients connect to.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// The cluster; `None` when the test runs on PostgreSQL alone.
    #[must_use]
    pub fn cluster(&self) -> Option<&LocalCluster> {
        match &self.what {
            What::Cluster(cluster) => Some(cluster),
            What::Direct(_) | What::Restart(_) => None,
        }
    }

    /// A superuser's connection past the proxy, to the primary.
    ///
    /// # Errors
    ///
    /// There is no primary, or it refused.
    pub async fn admin(&self) -> Result<Client> {
        let mut config = Config::new();
        match &self.what {
            What::Direct(server) => return Ok(server.connect().await?),
            What::Restart(server) => return server.admin().await,
            What::Cluster(cluster) => {
                let status = cluster.status().await;
                let primary = status.primary.ok_or("no primary")?;
                let mut instances = status.instances.into_iter();
                let instance = instances
                    .find(|i| i.name == primary)
                    .ok_or("no such instance")?;
                let secret = credentials(&self.dir.path().join("data"))?;
                config
                    .user(SERVICE_USER)
                    .password(&secret.service_password)
                    .dbname(&self.target.database)
                    .port(instance.endpoint.port);
                match instance.endpoint.host {
                    helios_api::Host::Tcp(name) => config.host(name),
                    helios_api::Host::Unix(folder) => config.host_path(folder),
                };
            }
        }
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// A planned switchover; returns when it is over, and fails when the primary has not moved.
    ///
    /// # Errors
    ///
    /// It was refused or aborted.
    pub async fn switchover(&self) -> Result<()> {
        let cluster = match &self.what {
            What::Cluster(cluster) => cluster,
            What::Restart(server) => return server.restart().await,
            What::Direct(_) => return Ok(()),
        };
        all_protected(&cluster.sessions().await)?;
        let before = cluster.status().await.primary;
        // Refused while the old primary of the move before is not a standby yet; nothing is done.
        let deadline = Instant::now() + REJOIN_LIMIT;
        while let Err(e) = Box::pin(cluster.switchover(None)).await {
            if !matches!(e, LocalError::Refused(_)) || Instant::now() >= deadline {
                return Err(e.into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let after = cluster.status().await.primary;
        if after.is_none() || after == before {
            return Err(format!("the primary has not moved: was {before:?}, is {after:?}").into());
        }
        Ok(())
    }

    /// Waits until every instance follows and confirms.
    ///
    /// # Errors
    ///
    /// It took longer than an old primary may take to come back.
    pub async fn whole(&self) -> Result<()> {
        let Some(cluster) = self.cluster() else {
            return Ok(());
        };
        let deadline = Instant::now() + REJOIN_LIMIT;
        loop {
            let status = cluster.status().await;
            if status.phase == "steady" && status.synchronous.len() + 1 == status.instances.len() {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(format!("not whole within {REJOIN_LIMIT:?}: {status:#?}").into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Kills the primary with all its processes. Returns at once: clients live through the rest.
    ///
    /// # Errors
    ///
    /// There is no primary, or no standby that could take over.
    pub async fn crash(&self) -> Result<()> {
        self.whole().await?;
        let cluster = self.cluster().ok_or("only a cluster can crash")?;
        let status = cluster.status().await;
        let primary = status
            .instances
            .iter()
            .find(|i| Some(&i.name) == status.primary.as_ref());
        let postmaster = primary.and_then(|i| i.postmaster_pid).ok_or("no primary")?;
        Ok(helios_testkit::pg::kill_all(postmaster)?)
    }

    /// Moves the primary, whatever state the sessions are in. A crash returns at once.
    ///
    /// # Errors
    ///
    /// It did not move.
    pub async fn move_primary(&self, how: Move) -> Result<()> {
        if how == Move::Crash {
            return self.crash().await;
        }
        self.whole().await?;
        let cluster = self.cluster().ok_or("only a cluster can switch over")?;
        Box::pin(cluster.switchover(None)).await?;
        Ok(())
    }

    /// Stops everything.
    pub async fn stop(self) {
        match self.what {
            What::Cluster(cluster) => Box::pin(cluster.shutdown()).await,
            What::Restart(server) => server.stop().await,
            What::Direct(_) => {}
        }
    }
}

fn credentials(data: &Path) -> Result<Credentials> {
    Ok(Credentials::load(data)?.ok_or("the cluster has no credentials")?)
}

fn target(conninfo: &str) -> Result<Target> {
    let config: Config = conninfo.parse()?;
    let host = match config.get_hosts().first() {
        Some(Host::Tcp(name)) => name.clone(),
        Some(Host::Unix(folder)) => folder.display().to_string(),
        None => return Err("no host in the connection string".into()),
    };
    Ok(Target {
        host,
        port: config.get_ports().first().copied().unwrap_or(5432),
        user: config.get_user().unwrap_or("postgres").to_owned(),
        password: String::from_utf8_lossy(config.get_password().unwrap_or_default()).into_owned(),
        database: config.get_dbname().unwrap_or("postgres").to_owned(),
    })
}
