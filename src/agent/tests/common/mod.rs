//! Agents on real servers for tests: each in a task of its own, or as a process that can be killed.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::time::Duration;

use helios_agent::client::{AgentClient, ClientError};
use helios_agent::{AgentConfig, AgentFailure, User};
use helios_api::agent::{
    AgentCommand, AgentReply, AgentRequest, AgentState, InstanceState, Rejoin,
};
use helios_api::control::{Backend, Fence};
use helios_api::{Epoch, Lsn, Timeline};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

pub const LIMIT: Duration = Duration::from_secs(60);

/// An agent in a task of this process; stopped on drop.
pub struct Node {
    pub config: AgentConfig,
    pub client: AgentClient,
    cancel: CancellationToken,
    task: Option<JoinHandle<Result<(), AgentFailure>>>,
}

/// A temporary folder that PostgreSQL's user may reach.
pub fn folder() -> tempfile::TempDir {
    let dir = helios_testkit::pg::server_dir("helios-agent-").unwrap();
    if std::env::var_os("KEEP").is_some() {
        eprintln!("{}", dir.path().display());
    }
    dir
}

pub fn config(base: &Path, name: &str) -> AgentConfig {
    let home = base.join(name);
    std::fs::create_dir_all(&home).unwrap();
    let bin = helios_testkit::pg::bin_dir().unwrap();
    let mut config = AgentConfig::local(name.parse().unwrap(), &home, &home.join("s"), 5432, &bin);
    config.run_as = User::for_server().unwrap();
    if let Some(user) = &config.run_as {
        std::os::unix::fs::chown(&home, Some(user.uid), Some(user.gid)).unwrap();
    }
    let settings = [
        ("shared_buffers", "16MB"),
        ("max_connections", "50"),
        ("fsync", "off"),
    ];
    for (name, value) in settings {
        config.parameters.insert(name.into(), value.into());
    }
    config
}

impl Node {
    pub async fn start(base: &Path, name: &str) -> Self {
        Self::run(config(base, name)).await
    }

    pub async fn run(config: AgentConfig) -> Self {
        let cancel = CancellationToken::new();
        let task = tokio::spawn(Box::pin(helios_agent::run(config.clone(), cancel.clone())));
        let client = AgentClient::new(&config.control_socket);
        let node = Self {
            config,
            client,
            cancel,
            task: Some(task),
        };
        wait_for(|| async { node.client.state().await.is_ok() }).await;
        node
    }

    pub async fn try_command(
        &self,
        epoch: u64,
        command: AgentCommand,
    ) -> Result<AgentReply, ClientError> {
        let epoch = Epoch(epoch);
        self.client
            .command(AgentRequest { epoch, command }, LIMIT)
            .await
    }

    pub async fn command(&self, epoch: u64, command: AgentCommand) -> AgentReply {
        let what = format!("{}: {command:?}", self.config.name);
        match self.try_command(epoch, command).await {
            Ok(reply) => reply,
            Err(error) => panic!("{what}: {error}"),
        }
    }

    pub fn backend(&self) -> Backend {
        Backend {
            name: self.config.name.clone(),
            endpoint: self.config.unix_endpoint(),
        }
    }

    pub async fn follow(&self, epoch: u64, primary: &Node, at: &At) -> Rejoin {
        match self.command(epoch, follow(primary, at)).await {
            AgentReply::Following { how } => how,
            other => panic!("{other:?}"),
        }
    }

    pub async fn promote(&self, epoch: u64) -> (Fence, u64) {
        match self.command(epoch, AgentCommand::Promote).await {
            AgentReply::Promoted { fence, micros } => (fence, micros),
            other => panic!("{other:?}"),
        }
    }

    pub async fn sql(&self) -> Client {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(&self.config.socket_dir)
            .port(self.config.port)
            .user("helios")
            .dbname("postgres");
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    pub fn postmaster(&self) -> i32 {
        postmaster(&self.config)
    }

    pub async fn state(&self) -> AgentState {
        self.client.state().await.unwrap()
    }

    /// Waits for a state by long polls.
    pub async fn reach(&self, wanted: impl Fn(&InstanceState) -> bool) -> AgentState {
        let deadline = Instant::now() + LIMIT;
        let mut state = self.state().await;
        while !wanted(&state.instance) {
            assert!(Instant::now() < deadline, "stays {state:?}");
            state = self.client.watch(state.revision).await.unwrap();
        }
        state
    }

    pub async fn stop(mut self) {
        self.cancel.cancel();
        self.task.take().unwrap().await.unwrap().unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.cancel.cancel();
        kill_instance(&self.config);
    }
}

/// Kills every process whose working directory is the data directory.
pub fn kill_instance(config: &AgentConfig) {
    for pid in processes(config) {
        let pid = nix::unistd::Pid::from_raw(pid);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
    }
}

pub fn processes(config: &AgentConfig) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == config.data_dir)
        })
        .collect()
}

pub fn postmaster(config: &AgentConfig) -> i32 {
    let text = std::fs::read_to_string(config.data_dir.join("postmaster.pid")).unwrap();
    text.lines().next().unwrap().parse().unwrap()
}

pub fn crash(node: &Node) {
    let pid = nix::unistd::Pid::from_raw(node.postmaster());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// A primary's timeline and where it began.
#[derive(Debug, Clone, Copy)]
pub struct At {
    pub timeline: Timeline,
    pub fork: Option<Lsn>,
}

pub const FIRST: At = At {
    timeline: Timeline(1),
    fork: None,
};

impl From<&Fence> for At {
    fn from(fence: &Fence) -> Self {
        Self {
            timeline: fence.timeline,
            fork: Some(fence.fork),
        }
    }
}

pub fn follow(primary: &Node, at: &At) -> AgentCommand {
    AgentCommand::Follow {
        primary: primary.backend(),
        timeline: at.timeline,
        fork: at.fork,
    }
}

pub async fn wait_for<F: Future<Output = bool>>(mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + LIMIT;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A primary and its standby, with a table `t`.
pub async fn pair(base: &Path) -> (Node, Node) {
    let a = Node::start(base, "a").await;
    let b = Node::start(base, "b").await;
    a.command(1, AgentCommand::Bootstrap).await;
    assert_eq!(b.follow(1, &a, &FIRST).await, Rejoin::Cloned);
    let sql = a.sql().await;
    sql.batch_execute("create table t (n int)").await.unwrap();
    (a, b)
}

pub async fn numbers(node: &Node) -> Vec<i32> {
    try_numbers(node).await.unwrap()
}

/// Fails on a standby that does not know the table yet.
async fn try_numbers(node: &Node) -> Result<Vec<i32>, tokio_postgres::Error> {
    let sql = node.sql().await;
    let rows = sql.query("select n from t order by n", &[]).await?;
    Ok(rows.iter().map(|r| r.get(0)).collect())
}

pub async fn insert(node: &Node, n: i32) {
    let sql = node.sql().await;
    sql.execute("insert into t values ($1)", &[&n])
        .await
        .unwrap();
}

/// Waits until a standby shows the same numbers as expected.
pub async fn shows(node: &Node, expected: &[i32]) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let found = try_numbers(node).await;
        if found.as_ref().is_ok_and(|found| found == expected) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{} shows {found:?}, not {expected:?}",
            node.config.name
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn socket(config: &AgentConfig) -> PathBuf {
    config.control_socket.clone()
}
