//! Programs that embed a cluster, run as programs: the examples, and what a `kill -9` leaves.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use helios_local::client::LocalClient;
use helios_local::{LocalCluster, LocalStatus};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

const LIMIT: Duration = Duration::from_secs(40);

/// Cargo builds examples beside the tests, unless it was told to build one test alone.
fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    let path = path.join("examples").join(name);
    assert!(
        path.exists(),
        "run \"cargo build -p helios-local --examples\" first"
    );
    path
}

struct Supervised {
    child: Child,
    address: String,
}

impl Supervised {
    fn start(dir: &Path) -> Self {
        let mut child = Command::new(example("supervised"))
            .arg("run")
            .arg(dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut address = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut address)
            .unwrap();
        assert!(
            address.contains("host="),
            "it did not start: {:?}",
            child.wait()
        );
        Self { child, address }
    }

    async fn connect(&self) -> Client {
        let (client, connection) = tokio_postgres::connect(&self.address, NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn until(
    client: &LocalClient,
    what: &str,
    done: impl Fn(&LocalStatus) -> bool,
) -> LocalStatus {
    let deadline = Instant::now() + LIMIT;
    loop {
        let status = client.status().await.unwrap();
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

fn whole(status: &LocalStatus) -> bool {
    status.phase == "steady" && status.synchronous.len() + 1 == status.instances.len()
}

#[test]
fn the_example_runs() {
    let parent = TempDir::new().unwrap();
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(parent.path(), open).unwrap();
    let output = Command::new(example("embed"))
        .arg(parent.path().join("c"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}{errors}");
    for expected in [
        "moved 1 sessions to \"pg-2\"",
        "2 x lamp",
        "4 x bulb",
        "event: ",
    ] {
        assert!(text.contains(expected), "{text}{errors}");
    }
    assert!(!parent.path().join("c").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn survives_the_death_of_supervisor_agents_and_servers() {
    let dir = TempDir::new().unwrap();
    let mut first = Supervised::start(dir.path());
    let control = LocalClient::new(dir.path());
    until(&control, "whole cluster", whole).await;
    let client = first.connect().await;
    client
        .batch_execute("create table t (n int); insert into t values (1)")
        .await
        .unwrap();

    // The supervisor is killed; its agents notice that their parent has gone.
    first.kill();
    let mut second = Supervised::start(dir.path());
    let client = second.connect().await;
    client
        .batch_execute("insert into t values (2)")
        .await
        .unwrap();
    let status = until(&control, "whole cluster", whole).await;

    // An agent is killed: it is started again and takes its server over; nobody notices.
    let name = status.primary.clone().unwrap();
    let pid = status
        .instances
        .iter()
        .find(|i| i.name == name)
        .unwrap()
        .postmaster_pid;
    kill_agent(dir.path(), name.as_str());
    client
        .batch_execute("insert into t values (3)")
        .await
        .unwrap();
    let after = until(&control, "agent", |s| {
        s.instances.iter().all(|i| i.state.is_some())
    })
    .await;
    assert_eq!(after.primary, Some(name.clone()));
    let now = after
        .instances
        .iter()
        .find(|i| i.name == name)
        .unwrap()
        .postmaster_pid;
    assert_eq!(now, pid);
    assert_eq!(after.epoch, status.epoch);

    // Killed in the middle of a switchover: the next supervisor ends it one way or the other.
    let asked = tokio::spawn(async move {
        let control = LocalClient::new(control.data_dir());
        control.switchover(None, |_| ()).await
    });
    tokio::time::sleep(Duration::from_millis(60)).await;
    second.kill();
    let _ = asked.await.unwrap();

    let cluster = LocalCluster::builder()
        .data_dir(dir.path())
        .listen("127.0.0.1:0")
        .start();
    let cluster = cluster.await.unwrap();
    let (client, connection) = tokio_postgres::connect(&cluster.connection_string(), NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    let count: i64 = client
        .query_one("select count(*) from t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 3);
    until(&LocalClient::new(dir.path()), "whole cluster", whole).await;
    cluster.shutdown().await;
}

/// Finds the agent by its arguments and kills it.
fn kill_agent(dir: &Path, instance: &str) {
    let config = dir.join("instances").join(instance).join("config.json");
    let config = config.to_str().unwrap().to_owned();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        if line
            .split(|b| *b == 0)
            .any(|argument| argument == config.as_bytes())
        {
            let pid = entry.file_name().to_str().unwrap().parse().unwrap();
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
            return;
        }
    }
    panic!("no agent of {instance}");
}
