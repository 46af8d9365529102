//! Sessions that go on with a backend which was opened on a standby: what their clients see of it.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

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
