//! Sessions that go on with a backend which was opened on a standby: what their clients see of it.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

mod common;

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{builder, crash, direct, instance, primary, until, whole};
use helios_local::LocalCluster;
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// What a client has been told of `in_hot_standby`.
type Told = Arc<Mutex<BTreeSet<String>>>;

/// A client that notes what it is told of the server's role, with each message.
async fn connect(cluster: &LocalCluster) -> (Client, Told) {
    let (client, mut connection) = tokio_postgres::connect(&cluster.connection_string(), NoTls)
        .await
        .unwrap();
    let told = Told::default();
    let notes = Arc::clone(&told);
    tokio::spawn(async move {
        loop {
            let role = connection.parameter("in_hot_standby").map(str::to_owned);
            notes.lock().unwrap().extend(role);
            if poll_fn(|cx| {
                let polled = connection.poll_message(cx);
                // Also where nothing came that would be given to us.
                let role = connection.parameter("in_hot_standby").map(str::to_owned);
                notes.lock().unwrap().extend(role);
                polled
            })
            .await
            .is_none()
            {
                break;
            }
        }
    });
    (client, told)
}

async fn text(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap();
    let row = messages.iter().find_map(|m| match m {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    row.unwrap().get(0).unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_told_of_a_standby() {
    let dir = TempDir::new().unwrap();
    let builder = LocalCluster::builder().data_dir(dir.path());
    let cluster = builder.listen("127.0.0.1:0").start().await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(40);
    while cluster.status().await.synchronous.is_empty() {
        assert!(Instant::now() < deadline, "no standby confirms");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (idle, idle_told) = connect(&cluster).await;
    let (open, open_told) = connect(&cluster).await;
    open.batch_execute("CREATE TABLE t (n int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0)")
        .await
        .unwrap();
    idle.batch_execute("UPDATE t SET v = v + 1 WHERE n = 1")
        .await
        .unwrap();
    open.batch_execute("BEGIN; UPDATE t SET v = v + 10 WHERE n = 1")
        .await
        .unwrap();
    cluster.switchover(None).await.unwrap();
    // The session that has not spoken since sits on a backend that planned what it had run, in the
    // time in which that server was a standby.
    let planned = "SELECT count(*) FROM pg_stat_activity \
                   WHERE query LIKE 'EXPLAIN UPDATE t SET v%' AND state = 'idle'";
    assert_eq!(text(&open, planned).await, "1");
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(text(&idle, "SELECT v FROM t").await, "11");
    assert_eq!(text(&idle, "SELECT pg_is_in_recovery()").await, "f");
    for told in [idle_told, open_told] {
        assert_eq!(Vec::from_iter(told.lock().unwrap().iter()), ["off"]);
    }
    cluster.shutdown().await;
}

const ALWAYS: &str = r#"
[proxy]
listen_address = "127.0.0.1:0"
auth = "trust"

[session_migration]
restore_ahead = "always"

[backends]
service_user = "helios"
"#;

/// Backends of the application's user on a standby.
async fn there(standby: &Client) -> Vec<i32> {
    let sql = "SELECT pid FROM pg_stat_activity WHERE usename = 'app' ORDER BY 1";
    let rows = standby.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until there are so many of them.
async fn wait_for(standby: &Client, count: usize) -> Vec<i32> {
    let deadline = Instant::now() + Duration::from_secs(40);
    loop {
        let pids = there(standby).await;
        if pids.len() == count {
            return pids;
        }
        assert!(Instant::now() < deadline, "not {count}: {pids:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whose transaction lasts has a backend on the standby, with what it has set and prepared, and goes
/// on with that one behind a crash; nobody else has one, and it goes with the transaction.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_lasts_finds_its_backend_at_a_failover() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("proxy.toml");
    std::fs::write(&file, ALWAYS).unwrap();
    let data = dir.path().join("data");
    let cluster = builder(&data).proxy_config(Some(file));
    let cluster = cluster.start().await.unwrap();
    let before = whole(&cluster).await;
    let heir = before.instances.iter();
    let heir = heir
        .map(|i| &i.name)
        .find(|n| Some(*n) != before.primary.as_ref());
    let heir = heir.unwrap().as_str().to_owned();
    let standby = direct(instance(&before, &heir)).await;
    let (open, _) = connect(&cluster).await;
    let (idle, _) = connect(&cluster).await;
    open.batch_execute(
        "CREATE TABLE t (n int); SET work_mem = '7MB'; PREPARE mine AS INSERT INTO t VALUES ($1)",
    )
    .await
    .unwrap();
    let named = open.prepare("SELECT count(*) FROM t").await.unwrap();
    open.batch_execute("BEGIN; EXECUTE mine (1)").await.unwrap();
    text(&idle, "SELECT 1").await;
    let kept = wait_for(&standby, 1).await;
    // It stays the same one.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(there(&standby).await, kept);
    crash(primary(&before));
    open.batch_execute("EXECUTE mine (2)").await.unwrap();
    assert_eq!(
        text(&open, "SELECT pg_backend_pid()").await,
        kept[0].to_string()
    );
    assert_eq!(text(&open, "SHOW work_mem").await, "7MB");
    let count: i64 = open.query_one(&named, &[]).await.unwrap().get(0);
    assert_eq!(count, 2);
    let after = until(&cluster, "failover", |s| {
        s.primary.as_ref().is_some_and(|p| p.as_str() == heir)
    });
    after.await;
    // The old primary comes back as a standby, and has one as soon as it could be promoted.
    let after = whole(&cluster).await;
    let old = before.primary.as_ref().unwrap().as_str();
    let standby = direct(instance(&after, old)).await;
    let kept = wait_for(&standby, 1).await;
    open.batch_execute("COMMIT").await.unwrap();
    wait_for(&standby, 0).await;
    // One that has ended there is replaced.
    open.batch_execute("BEGIN; EXECUTE mine (3)").await.unwrap();
    let ended = wait_for(&standby, 1).await;
    assert_ne!(ended, kept);
    let end = format!("SELECT pg_terminate_backend({})", ended[0]);
    text(&standby, &end).await;
    while wait_for(&standby, 1).await == ended {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    open.batch_execute("COMMIT").await.unwrap();
    assert_eq!(text(&idle, "SELECT count(*) FROM t").await, "3");
    cluster.shutdown().await;
}
