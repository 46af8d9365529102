//! Local clusters for tests, clients that note what they were told, and the ways servers fail.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

pub mod supervised;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use helios_local::{
    InstanceStatus, LocalBuilder, LocalCluster, LocalError, LocalStatus, OperationRecord,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls};

/// For whatever has to happen in the end.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Small servers that do not wait for the disk: a killed process loses nothing that it wrote.
pub fn builder(dir: &Path) -> LocalBuilder {
    LocalCluster::builder()
        .data_dir(dir)
        .listen("127.0.0.1:0")
        .parameter("shared_buffers", "16MB")
        .parameter("max_connections", "50")
        .parameter("fsync", "off")
}

/// A folder in the place of the file that keeps the cluster's state: it cannot be saved.
pub struct Obstacle {
    file: PathBuf,
    aside: PathBuf,
}

impl Obstacle {
    pub fn put(data_dir: &Path) -> Self {
        let file = data_dir.join("cluster.json");
        let aside = data_dir.join("cluster.json.aside");
        std::fs::rename(&file, &aside).unwrap();
        std::fs::create_dir(&file).unwrap();
        Self { file, aside }
    }

    pub fn remove(self) {
        std::fs::remove_dir(&self.file).unwrap();
        std::fs::rename(&self.aside, &self.file).unwrap();
    }
}

pub async fn connect(cluster: &LocalCluster) -> Client {
    connect_to(&cluster.connection_string()).await.unwrap()
}

pub async fn connect_to(address: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(address, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// As the superuser, past the proxy.
pub async fn direct(instance: &InstanceStatus) -> Client {
    let helios_api::Host::Unix(folder) = &instance.endpoint.host else {
        panic!("no socket");
    };
    let mut config = Config::new();
    config
        .host_path(folder)
        .port(instance.endpoint.port)
        .user("helios")
        .dbname("app");
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

pub async fn until(
    cluster: &LocalCluster,
    what: &str,
    done: impl Fn(&LocalStatus) -> bool,
) -> LocalStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = cluster.status().await;
        if done(&status) {
            return status;
        }
        assert!(
            Instant::now() < deadline,
            "no {what} within {LIMIT:?}: {status:#?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Everybody follows and confirms.
pub fn is_whole(s: &LocalStatus) -> bool {
    s.phase == "steady" && s.synchronous.len() + 1 == s.instances.len()
}

pub async fn whole(cluster: &LocalCluster) -> LocalStatus {
    until(cluster, "whole cluster", is_whole).await
}

/// Everybody follows; whether they confirm or not.
pub async fn streaming(cluster: &LocalCluster) -> LocalStatus {
    until(cluster, "streaming cluster", |s| {
        let streams = |i: &InstanceStatus| match &i.state {
            Some(helios_api::agent::InstanceState::Standby {
                timeline, heard_ms, ..
            }) => heard_ms.is_some() && Some(*timeline) == s.timeline,
            _ => false,
        };
        let standbys = s.instances.iter().filter(|i| streams(i)).count();
        let seen = s.instances.iter().find_map(|i| match &i.state {
            Some(helios_api::agent::InstanceState::Primary { standbys, .. }) => {
                Some(standbys.len())
            }
            _ => None,
        });
        let all = s.instances.len() - 1;
        s.phase == "steady" && standbys == all && seen == Some(all)
    })
    .await
}

/// Switches over as soon as there is somebody to switch over to: a standby may stream already while
/// the command that made it follow has not been answered yet.
pub async fn moved_when_ready(cluster: &LocalCluster) -> OperationRecord {
    let deadline = Instant::now() + LIMIT;
    loop {
        match cluster.switchover(None).await {
            Ok(operation) => return operation,
            Err(LocalError::Refused(_)) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

pub fn instance<'s>(status: &'s LocalStatus, name: &str) -> &'s InstanceStatus {
    let found = status.instances.iter().find(|i| i.name.as_str() == name);
    found.unwrap()
}

pub fn primary(status: &LocalStatus) -> &InstanceStatus {
    instance(status, status.primary.as_ref().unwrap().as_str())
}

pub fn standbys(status: &LocalStatus) -> Vec<&InstanceStatus> {
    let primary = status.primary.as_ref();
    let others = status.instances.iter();
    others.filter(|i| Some(&i.name) != primary).collect()
}

/// Process ids of a server: the postmaster and its children.
pub fn processes(instance: &InstanceStatus) -> Vec<Pid> {
    let postmaster = instance.postmaster_pid.unwrap();
    let mut found = vec![Pid::from_raw(postmaster)];
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        if fields.get(1) == Some(&postmaster.to_string().as_str()) {
            let pid = entry.file_name().to_str().unwrap().parse().unwrap();
            found.push(Pid::from_raw(pid));
        }
    }
    found
}

/// Sends a signal to a whole server; `SIGKILL` is a crash, `SIGSTOP` a freeze.
pub fn signal_all(instance: &InstanceStatus, signal: Signal) {
    for pid in processes(instance) {
        let _ = kill(pid, signal);
    }
}

pub fn crash(instance: &InstanceStatus) {
    signal_all(instance, Signal::SIGKILL);
}

/// Clients that insert one row a transaction through the proxy, each with a number of its own, and
/// note what was acknowledged.
pub struct Writers {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
    tasks: Vec<JoinHandle<Notes>>,
}

/// What a client was told.
#[derive(Debug, Default)]
pub struct Notes {
    pub acknowledged: BTreeSet<i64>,
    /// SQLSTATE, or the text of an error without one.
    pub errors: Vec<String>,
}

impl Writers {
    pub async fn start(cluster: &LocalCluster, count: i64) -> Self {
        let admin = connect(cluster).await;
        let table = "create table if not exists ledger (id bigint not null)";
        admin.batch_execute(table).await.unwrap();
        Self::go_on(&cluster.connection_string(), count)
    }

    /// For a table that is there.
    pub fn go_on(address: &str, count: i64) -> Self {
        static NEXT: AtomicI64 = AtomicI64::new(1);
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicI64::new(0));
        let tasks = (0..count).map(|_| {
            let first = NEXT.fetch_add(1, Ordering::Relaxed) * 1_000_000;
            let (stop, count) = (Arc::clone(&stop), Arc::clone(&acknowledged));
            tokio::spawn(write(address.to_owned(), first, stop, count))
        });
        let tasks = tasks.collect();
        Self {
            stop,
            acknowledged,
            tasks,
        }
    }

    /// Acknowledged so far.
    pub fn count(&self) -> i64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until so many more were acknowledged.
    pub async fn more(&self, commits: i64) {
        let goal = self.count() + commits;
        let deadline = Instant::now() + LIMIT;
        while self.count() < goal {
            assert!(Instant::now() < deadline, "commits do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends them and adds up their notes.
    pub async fn stop(self) -> Notes {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Notes::default();
        for task in self.tasks {
            let notes = tokio::time::timeout(LIMIT, task).await.unwrap().unwrap();
            all.acknowledged.extend(notes.acknowledged);
            all.errors.extend(notes.errors);
        }
        all
    }
}

async fn write(
    address: String,
    first: i64,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
) -> Notes {
    let mut notes = Notes::default();
    let mut client = None;
    for id in first.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        match transaction(&address, &mut client, id).await {
            Ok(()) => {
                notes.acknowledged.insert(id);
                acknowledged.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let code = error.code().map(|c| c.code().to_owned());
                notes.errors.push(code.unwrap_or_else(|| error.to_string()));
                if client.as_ref().is_some_and(Client::is_closed) {
                    client = None;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
    notes
}

async fn transaction(
    address: &str,
    client: &mut Option<Client>,
    id: i64,
) -> Result<(), tokio_postgres::Error> {
    if client.is_none() {
        *client = Some(connect_to(address).await?);
    }
    let client = client.as_mut().unwrap();
    let transaction = client.transaction().await?;
    transaction
        .execute("insert into ledger values ($1)", &[&id])
        .await?;
    transaction.commit().await
}

/// The rows of the ledger, with duplicates, on one instance.
pub async fn ledger(instance: &InstanceStatus) -> Vec<i64> {
    let rows = direct(instance)
        .await
        .query("select id from ledger order by id", &[])
        .await;
    rows.unwrap().iter().map(|row| row.get(0)).collect()
}

/// What the clients were told of against what is there: lost, and there more than once.
pub async fn compare(status: &LocalStatus, notes: &Notes) -> (Vec<i64>, Vec<i64>) {
    let rows = ledger(primary(status)).await;
    let held: BTreeSet<i64> = rows.iter().copied().collect();
    let lost = notes.acknowledged.difference(&held).copied().collect();
    let twice = rows.windows(2).filter(|w| w[0] == w[1]).map(|w| w[0]);
    (lost, twice.collect())
}

/// Nothing lost, nothing twice, and every instance holds the same rows.
pub async fn sound(cluster: &LocalCluster, notes: &Notes) -> LocalStatus {
    let status = streaming(cluster).await;
    let (lost, twice) = compare(&status, notes).await;
    let what = || format!("errors {:?}; {:#?}", notes.errors, status.operations);
    assert!(lost.is_empty(), "lost: {lost:?}; {}", what());
    assert!(twice.is_empty(), "twice: {twice:?}; {}", what());
    assert!(!notes.acknowledged.is_empty());
    let rows = ledger(primary(&status)).await;
    for standby in standbys(&status) {
        let deadline = Instant::now() + LIMIT;
        while ledger(standby).await != rows {
            assert!(Instant::now() < deadline, "{} differs", standby.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    status
}
