//! The cluster of an experiment: `helios local start` as a process of its own, as a user runs it.
//!
//! Invariant: it ends with its owner; its directory is removed unless it is to be looked into.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use helios_api::InstanceName;
use helios_api::agent::InstanceState;
use helios_local::client::LocalClient;
use helios_local::{Credentials, InstanceStatus, Layout, LocalStatus};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, Config, NoTls};

use super::disk::SmallDisk;
use super::processes;
use crate::Result;
use crate::driver::Target;

/// Limit on a start: two or three initdb and base backups on two busy cores.
const START_LIMIT: Duration = Duration::from_secs(150);
/// How often a status is read while waiting.
const POLL: Duration = Duration::from_millis(20);
/// Limit on one status: the controller may be busy.
const STATUS_LIMIT: Duration = Duration::from_secs(10);
/// Limit on a direct connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Limit on an orderly stop.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// What kind of cluster an experiment needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Shape {
    /// Servers.
    pub instances: u32,
    /// Commits wait for a standby.
    pub synchronous: bool,
    /// Instances have small disks of their own.
    #[serde(default)]
    pub small_disks: bool,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// What it is.
    pub shape: Shape,
    child: Child,
    dir: PathBuf,
    client: LocalClient,
    target: Target,
    service: Config,
    disks: BTreeMap<InstanceName, SmallDisk>,
}

impl Cluster {
    /// Starts one in a new directory and waits until it is redundant. `extra`: further options of
    /// `helios local start`.
    ///
    /// # Errors
    /// It did not come up; the directory is kept and named.
    pub async fn start(program: &Path, shape: Shape, extra: &[&str]) -> Result<Self> {
        let dir = helios_testkit::pg::server_dir("helios-chaos-")?.keep();
        let started = Box::pin(Self::start_in(program, shape, extra, &dir)).await;
        started.map_err(|error| format!("cluster in \"{}\": {error}", dir.display()).into())
    }

    async fn start_in(program: &Path, shape: Shape, extra: &[&str], dir: &Path) -> Result<Self> {
        let data = dir.join("data");
        let client = LocalClient::new(&data);
        let mut child = spawn(program, shape, extra, dir)?;
        let mut status = wait_up(&mut child, &client).await?;
        let mut disks = BTreeMap::new();
        if shape.small_disks {
            timeout(STOP_LIMIT, client.stop()).await??;
            timeout(STOP_LIMIT, child.wait()).await??;
            for instance in &status.instances {
                let folder = Layout::new(&data).instance(&instance.name);
                disks.insert(instance.name.clone(), SmallDisk::under(&folder)?);
            }
            child = spawn(program, shape, extra, dir)?;
            status = wait_up(&mut child, &client).await?;
        }
        let secret = Credentials::load(&data)?.ok_or("no credentials")?;
        let mut service = Config::new();
        service
            .user(helios_local::credentials::SERVICE_USER)
            .password(&secret.service_password)
            .dbname(&secret.database)
            .application_name("chaos")
            .connect_timeout(CONNECT_LIMIT);
        let address: Config = status.connection_string.parse()?;
        let target = Target {
            host: "127.0.0.1".to_owned(),
            port: address.get_ports().first().copied().ok_or("no port")?,
            user: secret.user,
            password: String::new(),
            database: secret.database,
        };
        let cluster = Self {
            shape,
            child,
            dir: dir.to_owned(),
            client,
            target,
            service,
            disks,
        };
        cluster.wait("redundant", START_LIMIT, redundant).await?;
        Ok(cluster)
    }

    /// The small disk of an instance.
    #[must_use]
    pub fn disk(&self, name: &InstanceName) -> Option<&SmallDisk> {
        self.disks.get(name)
    }

    /// Where clients connect to.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where its files are.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout::new(self.client.data_dir())
    }

    /// What it says of itself.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn status(&self) -> Result<LocalStatus> {
        Ok(timeout(STATUS_LIMIT, self.client.status()).await??)
    }

    /// A planned move; a line that says what came of it, and whether the primary has moved.
    ///
    /// # Errors
    /// It did not end within the limit.
    pub async fn switchover(&self, limit: Duration) -> Result<(String, bool)> {
        let moving = Box::pin(self.client.switchover(None, |_| ()));
        match timeout(limit, moving).await {
            Ok(Ok(record)) => {
                let what = format!(
                    "switchover {} -> {}, pause {} ms",
                    record.from,
                    record.to,
                    record.pause_micros() / 1000
                );
                Ok((what, record.from != record.to))
            }
            // Refused, or ended elsewhere: what clients see of it is what counts.
            Ok(Err(error)) => Ok((format!("switchover: {error}"), false)),
            Err(_) => Err(format!("switchover is not done after {limit:?}").into()),
        }
    }

    /// Polls the status until `done`.
    ///
    /// # Errors
    /// It was not within the limit; the message holds the last status.
    pub async fn wait(
        &self,
        what: &str,
        limit: Duration,
        done: impl Fn(&LocalStatus, Shape) -> bool,
    ) -> Result<LocalStatus> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status().await;
            if let Ok(status) = &status
                && done(status, self.shape)
            {
                return Ok(status.clone());
            }
            if Instant::now() > deadline {
                let is = match &status {
                    Ok(status) => summary(status),
                    Err(error) => format!("no status: {error}"),
                };
                return Err(format!("cluster is not {what} after {limit:?}: {is}").into());
            }
            sleep(POLL).await;
        }
    }

    /// The primary as the cluster knows it, and the others.
    ///
    /// # Errors
    /// There is none.
    pub async fn roles(&self) -> Result<(InstanceStatus, Vec<InstanceStatus>)> {
        let status = self.status().await?;
        let name = status.primary.ok_or("there is no primary")?;
        let (primary, others): (Vec<_>, Vec<_>) =
            status.instances.into_iter().partition(|i| i.name == name);
        let primary = primary.into_iter().next().ok_or("no such instance")?;
        Ok((primary, others))
    }

    /// A superuser's connection to an instance, past the proxy.
    ///
    /// # Errors
    /// It refused.
    pub async fn connect(&self, instance: &InstanceStatus) -> Result<Client> {
        let mut config = self.service.clone();
        config.port(instance.endpoint.port);
        match &instance.endpoint.host {
            helios_api::Host::Tcp(name) => config.host(name),
            helios_api::Host::Unix(folder) => config.host_path(folder),
        };
        let (client, connection) = timeout(CONNECT_LIMIT, config.connect(NoTls)).await??;
        // Ends with the client.
        tokio::spawn(connection);
        Ok(client)
    }

    /// The agent of an instance, while it runs.
    #[must_use]
    pub fn agent(&self, name: &InstanceName) -> Option<i32> {
        processes::agent(&self.layout().instance(name).join("config.json"))
    }

    /// Stops it; the directory is removed unless `keep`.
    pub async fn stop(mut self, keep: bool) {
        let asked = timeout(STOP_LIMIT, self.client.stop()).await;
        let ended =
            matches!(asked, Ok(Ok(()))) && timeout(STOP_LIMIT, self.child.wait()).await.is_ok();
        if !ended {
            let _ = self.child.kill().await;
        }
        for disk in std::mem::take(&mut self.disks).into_values() {
            if keep {
                // Without them there still are the logs.
                let _ = disk.keep();
            }
        }
        if !keep {
            // Ends servers that a killed supervisor left behind.
            let _ = helios_local::destroy(self.client.data_dir()).await;
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn spawn(program: &Path, shape: Shape, extra: &[&str], dir: &Path) -> Result<Child> {
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(dir.join("helios.log"))?;
    let mut command = Command::new(program);
    command
        .args(["local", "start", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(dir.join("data"))
        .args(["--instances", &shape.instances.to_string()])
        // Crashes here are of processes: what they wrote stays with the kernel.
        .args(["--set", "fsync=off", "--set", "shared_buffers=24MB"])
        .args([
            "--set",
            "max_connections=120",
            "--set",
            "max_prepared_transactions=100",
        ])
        .args([
            "--set",
            "max_wal_size=64MB",
            "--set",
            "deadlock_timeout=100ms",
        ])
        .args(extra)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true);
    if !shape.synchronous {
        command.arg("--asynchronous");
    }
    Ok(command.spawn()?)
}

async fn wait_up(child: &mut Child, client: &LocalClient) -> Result<LocalStatus> {
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if let Ok(Ok(status)) = timeout(STATUS_LIMIT, client.status()).await
            && status.proxy.as_ref().is_some_and(|p| p.phase == "running")
        {
            return Ok(status);
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!("it ended with {status}, see its helios.log").into());
        }
        if Instant::now() > deadline {
            return Err(format!("it is not up after {START_LIMIT:?}, see its helios.log").into());
        }
        sleep(POLL).await;
    }
}

/// Whether it could lose its primary now without losing anything.
#[must_use]
pub fn redundant(status: &LocalStatus, shape: Shape) -> bool {
    let follow = status
        .instances
        .iter()
        .all(|instance| match &instance.state {
            Some(InstanceState::Primary { standbys, .. }) => {
                Some(&instance.name) == status.primary.as_ref()
                    && standbys.len() + 1 >= status.instances.len()
            }
            Some(InstanceState::Standby { heard_ms, .. }) => {
                Some(&instance.name) != status.primary.as_ref() && heard_ms.is_some()
            }
            _ => false,
        });
    serving(status, shape) && follow && (!shape.synchronous || !status.synchronous.is_empty())
}

/// Whether clients are served, and nothing is under way.
#[must_use]
pub fn serving(status: &LocalStatus, _: Shape) -> bool {
    let proxy = status.proxy.as_ref();
    status.phase == "steady"
        && status.primary.is_some()
        && proxy.is_some_and(|p| p.phase == "running" && p.primary_reachable)
}

/// The status in a line.
#[must_use]
pub fn summary(status: &LocalStatus) -> String {
    let one = |i: &InstanceStatus| format!("{} {:?}", i.name, i.state);
    let instances: Vec<String> = status.instances.iter().map(one).collect();
    format!(
        "epoch {}, phase {} {:?}, primary {:?}, synchronous {:?}, proxy {:?}, {}",
        status.epoch,
        status.phase,
        status.step,
        status.primary.as_ref().map(ToString::to_string),
        status.synchronous,
        status.proxy,
        instances.join(", ")
    )
}
