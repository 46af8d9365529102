//! Programs that embed a cluster, run as programs: the examples, and what a `kill -9` leaves.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

mod common;

use std::process::Command;
use std::time::Duration;

use common::supervised::{Supervised, agent_pid, example, until};
use helios_local::client::LocalClient;
use helios_local::{LocalCluster, LocalStatus};
use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;
use tokio_postgres::NoTls;

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
    kill(agent_pid(dir.path(), name.as_str()), Signal::SIGKILL).unwrap();
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
