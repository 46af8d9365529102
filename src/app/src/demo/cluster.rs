//! The throw-away cluster of the demo: start, status, moves, direct connections, removal.
//!
//! The supervisor and its proxy run in this process, the agents as children of it. Invariant: the
//! directory is removed only when the run was good or nothing can be learnt from it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use helios_api::agent::InstanceState;
use helios_api::{Endpoint, Host};
use helios_local::client::LocalClient;
use helios_local::{
    AgentMode, Credentials, LocalCluster, LocalOptions, LocalStatus, OperationRecord,
};
use tokio_postgres::{Client, Config, NoTls};

use crate::failure::Failure;

/// How often the status is read while waiting.
const POLL: Duration = Duration::from_millis(20);
/// Limit on a direct connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The folder that the demo works in.
#[derive(Debug)]
pub(crate) struct Workspace(PathBuf);

impl Workspace {
    pub(crate) fn create() -> Result<Self, Failure> {
        let dir = tempfile::Builder::new()
            .prefix("helios-demo-")
            // The server's user has to pass through.
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir()
            .map_err(|e| Failure::failed(format!("could not create a temporary directory: {e}")))?;
        Ok(Self(dir.keep()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Where the log lines of this process go.
    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("helios.log")
    }

    fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    /// Removes everything.
    pub(crate) fn remove(&self) {
        if let Err(e) = std::fs::remove_dir_all(&self.0) {
            tracing::warn!(path = %self.0.display(), error = %e, "could not remove the demo's directory");
        }
    }
}

/// A running cluster.
#[derive(Debug)]
pub(crate) struct DemoCluster {
    cluster: LocalCluster,
    client: LocalClient,
    service: Config,
}

impl DemoCluster {
    pub(crate) async fn start(
        workspace: &Workspace,
        instances: u32,
        mode: &str,
    ) -> Result<Self, Failure> {
        let program = std::env::current_exe()
            .map_err(|e| Failure::failed(format!("could not find this program's file: {e}")))?;
        let mut options = LocalOptions::new(workspace.data());
        options.instances = instances;
        mode.clone_into(&mut options.replay_mode);
        "127.0.0.1:0".clone_into(&mut options.listen);
        options.agents = AgentMode::Process(program);
        let cluster = Box::pin(LocalCluster::start(options)).await?;
        let credentials = Credentials::load(&workspace.data())?
            .ok_or_else(|| Failure::failed("the cluster has no credentials".to_owned()))?;
        let mut service = Config::new();
        service
            .user(helios_local::credentials::SERVICE_USER)
            .password(&credentials.service_password)
            .dbname(&credentials.database)
            .application_name("helios demo")
            .connect_timeout(CONNECT_LIMIT);
        Ok(Self {
            cluster,
            client: LocalClient::new(workspace.data()),
            service,
        })
    }

    /// How a client connects: through the proxy.
    pub(crate) fn proxy(&self) -> Result<Config, Failure> {
        let text = self.cluster.connection_string();
        let mut config: Config = text
            .parse()
            .map_err(|e| Failure::failed(format!("invalid connection string \"{text}\": {e}")))?;
        config.application_name("helios demo client");
        Ok(config)
    }

    /// The status over the control socket, as `helios local status` gets it.
    pub(crate) async fn status(&self) -> Result<LocalStatus, Failure> {
        Ok(self.client.status().await?)
    }

    /// A planned move over the control socket, as `helios local switchover` asks for it.
    pub(crate) async fn switchover(&self) -> Result<OperationRecord, Failure> {
        Ok(self.client.switchover(None, |_| ()).await?)
    }

    /// Polls the status until `done`; an error says what the status was instead.
    pub(crate) async fn wait(
        &self,
        what: &str,
        limit: Duration,
        mut done: impl FnMut(&LocalStatus) -> bool,
    ) -> Result<LocalStatus, Failure> {
        let deadline = Instant::now() + limit;
        loop {
            let status = self.status().await?;
            if done(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                return Err(Failure::failed(format!(
                    "cluster is not {what} after {limit:?}: {}",
                    summary(&status)
                )));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Direct connections to all instances; the primary is first.
    pub(crate) async fn connect_all(&self) -> Result<Vec<(String, Client)>, Failure> {
        let status = self.status().await?;
        let mut instances: Vec<_> = status.instances.iter().collect();
        instances.sort_by_key(|i| (Some(&i.name) != status.primary.as_ref(), i.name.clone()));
        let mut clients = Vec::new();
        for instance in instances {
            let name = instance.name.to_string();
            let client = connect(&self.service, &instance.endpoint)
                .await
                .map_err(|e| Failure::failed(format!("could not connect to \"{name}\": {e}")))?;
            clients.push((name, client));
        }
        Ok(clients)
    }

    pub(crate) async fn shutdown(self) {
        self.cluster.shutdown().await;
    }
}

async fn connect(service: &Config, endpoint: &Endpoint) -> Result<Client, tokio_postgres::Error> {
    let mut config = service.clone();
    config.port(endpoint.port);
    match &endpoint.host {
        Host::Tcp(host) => config.host(host),
        Host::Unix(dir) => config.host_path(dir),
    };
    let (client, connection) = config.connect(NoTls).await?;
    // Ends with the client.
    tokio::spawn(connection);
    Ok(client)
}

/// Whether the cluster could lose its primary now without losing anything: no operation under
/// way, every instance up, every standby streaming, commits waiting for one of them.
pub(crate) fn redundant(status: &LocalStatus) -> bool {
    let Some(primary) = &status.primary else {
        return false;
    };
    // The cluster names a standby here only once it is proven to hold every acknowledged commit.
    let provable = status.instances.len() == 1 || !status.synchronous.is_empty();
    status.phase == "steady"
        && provable
        && status
            .proxy
            .as_ref()
            .is_some_and(|p| p.phase == "running" && p.primary_reachable)
        && status.instances.iter().all(|i| match &i.state {
            Some(InstanceState::Primary { standbys, .. }) => {
                i.name == *primary
                    && standbys.len() + 1 >= status.instances.len()
                    && (status.instances.len() == 1 || standbys.iter().any(|s| s.synchronous))
            }
            Some(InstanceState::Standby { heard_ms, .. }) => {
                i.name != *primary && heard_ms.is_some()
            }
            _ => false,
        })
}

/// The status in a line, for an error message.
fn summary(status: &LocalStatus) -> String {
    let instances: Vec<_> = status
        .instances
        .iter()
        .map(|i| format!("{} {:?}", i.name, i.state))
        .collect();
    format!(
        "epoch {}, phase {}, primary {:?}, proxy {:?}, {}",
        status.epoch,
        status.phase,
        status.primary.as_ref().map(ToString::to_string),
        status.proxy.as_ref().map(|p| &p.phase),
        instances.join(", ")
    )
}
