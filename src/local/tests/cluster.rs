//! Real servers, agents and proxy, judged by the data.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_precision_loss)] // a test that cannot go on has failed

use std::path::Path;
use std::time::{Duration, Instant};

use helios_local::client::LocalClient;
use helios_local::{LocalBuilder, LocalCluster, LocalError, LocalStatus, OperationKind, ProxyAuth};
use helios_testkit::pg::kill_all;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

const LIMIT: Duration = Duration::from_secs(40);

fn builder(dir: &Path) -> LocalBuilder {
    LocalCluster::builder()
        .data_dir(dir)
        .listen("127.0.0.1:0")
        .parameter("shared_buffers", "16MB")
        .parameter("max_connections", "50")
}

async fn connect(cluster: &LocalCluster) -> Client {
    let (client, connection) = tokio_postgres::connect(&cluster.connection_string(), NoTls)
        .await
        .unwrap();
    tokio::spawn(connection);
    client
}

async fn until(
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
async fn whole(cluster: &LocalCluster) -> LocalStatus {
    until(cluster, "whole cluster", |s| {
        s.phase == "steady" && s.synchronous.len() + 1 == s.instances.len()
    })
    .await
}

fn primary_pid(status: &LocalStatus) -> i32 {
    let name = status.primary.as_ref().unwrap();
    let found = status.instances.iter().find(|i| i.name == *name).unwrap();
    found.postmaster_pid.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_crashes_and_comes_back_from_disk() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    let before = whole(&cluster).await;
    let mut client = connect(&cluster).await;
    client
        .batch_execute("create table t (n int primary key)")
        .await
        .unwrap();

    // Planned, with a transaction open.
    let transaction = client.transaction().await.unwrap();
    transaction
        .execute("insert into t values (1)", &[])
        .await
        .unwrap();
    let report = cluster.migrate_for_maintenance().await.unwrap();
    transaction
        .execute("insert into t values (2)", &[])
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(report.failed, 0);
    let after = whole(&cluster).await;
    assert_ne!(before.primary, after.primary);
    println!(
        "planned: pause {} us, {:?}",
        report.pause_micros, report.operation.phases
    );

    // What was committed without waiting for anybody is not left behind by a planned move.
    client
        .batch_execute("create table a (n int); set synchronous_commit = off")
        .await
        .unwrap();
    client
        .batch_execute("insert into a values (1)")
        .await
        .unwrap();
    cluster.migrate_for_maintenance().await.unwrap();
    let after = whole(&cluster).await;
    let count: i64 = client
        .query_one("select count(*) from a", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 1);
    client
        .batch_execute("reset synchronous_commit")
        .await
        .unwrap();
    cluster.migrate_for_maintenance().await.unwrap();
    assert_eq!(after.primary, before.primary);
    let after = whole(&cluster).await;

    // A crash, with a transaction open; the old primary comes back by itself.
    let transaction = client.transaction().await.unwrap();
    transaction
        .execute("insert into t values (3)", &[])
        .await
        .unwrap();
    let killed = Instant::now();
    kill_all(primary_pid(&after)).unwrap();
    transaction
        .execute("insert into t values (4)", &[])
        .await
        .unwrap();
    println!("crash: resumed after {:?}", killed.elapsed());
    transaction.commit().await.unwrap();
    let status = whole(&cluster).await;
    assert_eq!(status.primary, before.primary);
    let operation = status.operations.last().unwrap();
    assert_eq!(operation.kind, OperationKind::Failover);
    println!("crash: {:?} {:?}", operation.phases, operation.rejoin);
    assert!(operation.rejoin.is_some());
    drop(client);
    cluster.shutdown().await;

    // From disk.
    let cluster = builder(dir.path()).start().await.unwrap();
    let client = connect(&cluster).await;
    let count: i64 = client
        .query_one("select count(*) from t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(count, 4);
    let status = whole(&cluster).await;
    assert_eq!(status.primary, before.primary);
    cluster.shutdown().await;
    helios_local::destroy(dir.path()).await.unwrap();
    assert!(!dir.path().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_primary_restarts_in_place_and_requests_are_refused() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).instances(1).start().await.unwrap();
    let client = connect(&cluster).await;
    client
        .batch_execute("create table t as select 1 as n")
        .await
        .unwrap();
    let refusal = cluster.switchover(None).await.unwrap_err();
    assert!(
        refusal.to_string().contains("only one instance"),
        "{refusal}"
    );
    let refusal = cluster.fence("pg-1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(refusal, LocalError::Refused(_)), "{refusal}");
    kill_all(primary_pid(&cluster.status().await)).unwrap();
    let status = until(&cluster, "restart", |s| !s.operations.is_empty()).await;
    assert_eq!(status.operations[0].kind, OperationKind::Restart);
    assert_eq!(status.epoch.0, 1);
    let n: i32 = client
        .query_one("select n from t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 1);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_socket_does_what_the_library_does() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path())
        .auth(ProxyAuth::Scram)
        .start()
        .await
        .unwrap();
    whole(&cluster).await;
    assert!(cluster.connection_string().contains("password="));
    connect(&cluster)
        .await
        .simple_query("select 1")
        .await
        .unwrap();

    let second = builder(dir.path()).start().await.unwrap_err();
    assert!(
        matches!(second, LocalError::InUse { pid: Some(_), .. }),
        "{second}"
    );
    let refusal = helios_local::destroy(dir.path()).await.unwrap_err();
    assert!(matches!(refusal, LocalError::InUse { .. }), "{refusal}");

    let client = LocalClient::new(dir.path());
    let status = client.status().await.unwrap();
    assert!(!status.connection_string.contains("password"));
    let mut steps = Vec::new();
    let operation = client
        .switchover(None, |step| steps.push(format!("{step:?}")))
        .await
        .unwrap();
    assert_ne!(Some(&operation.to), status.primary.as_ref());
    assert!(steps.len() >= 5, "{steps:?}");

    let status = whole(&cluster).await;
    let standby = status
        .instances
        .iter()
        .find(|i| Some(&i.name) != status.primary.as_ref());
    let standby = standby.unwrap().name.clone();
    client.fence(&standby).await.unwrap();
    until(&cluster, "fence", |s| {
        s.synchronous.is_empty() && s.instances.iter().any(|i| i.fenced && i.role == "none")
    })
    .await;
    let refusal = client.switchover(Some(&standby), |_| ()).await.unwrap_err();
    assert!(refusal.to_string().contains("fenced"), "{refusal}");
    // Commits go on without it.
    connect(&cluster)
        .await
        .batch_execute("create table t ()")
        .await
        .unwrap();
    client.unfence(&standby).await.unwrap();
    whole(&cluster).await;

    let stopping = tokio::spawn(async move {
        cluster.stop_requested().await;
        cluster.shutdown().await;
    });
    client.stop().await.unwrap();
    stopping.await.unwrap();
    assert!(matches!(
        client.status().await,
        Err(LocalError::NotRunning { .. })
    ));
}

#[tokio::test]
async fn bad_starts_are_refused_before_anything_is_made() {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("precious"), "x").unwrap();
    let error = builder(dir.path()).start().await.unwrap_err();
    assert!(matches!(error, LocalError::NotACluster { .. }), "{error}");
    let error = helios_local::destroy(dir.path()).await.unwrap_err();
    assert!(matches!(error, LocalError::NotACluster { .. }), "{error}");

    let dir = TempDir::new().unwrap();
    let error = builder(dir.path()).instances(0).start().await.unwrap_err();
    assert!(error.to_string().contains("instances"), "{error}");
    let bin = Some("/nonexistent".into());
    let error = builder(dir.path())
        .pg_bin_dir(bin)
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, LocalError::NoPostgres { .. }), "{error}");
    assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none());

    let data = dir.path().join("instances/pg-1/data");
    std::fs::create_dir_all(&data).unwrap();
    std::fs::write(data.join("PG_VERSION"), "9.6\n").unwrap();
    std::fs::write(dir.path().join("cluster.json"), state_of_another_version()).unwrap();
    let error = builder(dir.path()).start().await.unwrap_err();
    assert!(matches!(error, LocalError::Version { .. }), "{error}");
}

fn state_of_another_version() -> String {
    serde_json::to_string(&helios_cluster::ClusterState::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_said_and_nothing_is_left_running() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = TempDir::new().unwrap();
    let error = builder(dir.path())
        .listen(&address)
        .start()
        .await
        .unwrap_err();
    assert!(matches!(error, LocalError::Listen { .. }), "{error}");
    assert!(error.to_string().contains(&address), "{error}");
    assert!(
        !dir.path()
            .join("instances/pg-1/data/postmaster.pid")
            .exists()
    );
    // Another port is all it needs.
    let cluster = builder(dir.path()).start().await.unwrap();
    connect(&cluster)
        .await
        .simple_query("select 1")
        .await
        .unwrap();
    cluster.shutdown().await;
}

/// The numbers of the limits, printed; the limits themselves are the demo's to hold.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn measure() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    for round in 0..10 {
        let status = whole(&cluster).await;
        let client = connect(&cluster).await;
        client.batch_execute("begin; select 1").await.unwrap();
        if round % 2 == 0 {
            cluster.switchover(None).await.unwrap();
        } else {
            kill_all(primary_pid(&status)).unwrap();
            client.batch_execute("select 1").await.unwrap();
        }
        client.batch_execute("commit").await.unwrap();
        let operations = until(&cluster, "record", |s| {
            s.operations.last().is_some_and(|o| o.id == round + 1)
        });
        let operation = operations.await.operations.pop().unwrap();
        let phases: Vec<_> = operation
            .phases
            .iter()
            .map(|p| format!("{} {:.1}", p.phase.as_str(), p.micros as f64 / 1000.0))
            .collect();
        println!(
            "{:?} {:.1} ms: {}",
            operation.kind,
            operation.pause_micros() as f64 / 1000.0,
            phases.join(", ")
        );
    }
    cluster.shutdown().await;
}
