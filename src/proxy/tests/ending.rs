//! The end of a proxy: where sessions end, and what clients are told.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::Duration;

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::{Client, Error};

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(40);

/// SQLSTATE of an error, or that the connection is closed.
fn code(error: &Error) -> String {
    let closed = || String::from("closed");
    error.code().map_or_else(closed, |c| c.code().to_owned())
}

async fn fails(client: &Client, sql: &str) -> String {
    let failed = tokio::time::timeout(PATIENCE, client.batch_execute(sql)).await;
    code(&failed.unwrap().unwrap_err())
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_end_where_no_transaction_is_open() {
    let bench = Bench::start(EngineOptions::default(), "CREATE TABLE t (v int)")
        .await
        .unwrap();
    let (idle, inside) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    idle.batch_execute("SELECT 1").await.unwrap();
    inside.batch_execute("BEGIN").await.unwrap();
    inside
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let proxy = bench.proxy.clone();
    let end = tokio::spawn(async move { proxy.shutdown(PATIENCE).await });
    // The task has begun when nobody is let in any more.
    let begun = async { while bench.client().await.is_ok() {} };
    tokio::time::timeout(PATIENCE, begun).await.unwrap();
    // Told before it asks; a driver reads it with its next request, or finds it closed.
    let told = fails(&idle, "INSERT INTO t VALUES (9)").await;
    assert!(told == "57P01" || told == "closed", "{told}");
    inside
        .batch_execute("INSERT INTO t VALUES (2)")
        .await
        .unwrap();
    inside.batch_execute("COMMIT").await.unwrap();
    let told = fails(&inside, "INSERT INTO t VALUES (9)").await;
    assert!(told == "57P01" || told == "closed", "{told}");
    let let_in = bench.client().await;
    assert!(let_in.is_err(), "a client was let in");
    tokio::time::timeout(PATIENCE, end).await.unwrap().unwrap();
    let v = bench.column("SELECT v FROM t ORDER BY v").await.unwrap();
    assert_eq!(v, ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cut_off_at_last_is_told_the_truth() {
    let schema = "CREATE TABLE t (v int); \
        CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS \
        'BEGIN PERFORM pg_sleep(3); RETURN NULL; END'; \
        CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED \
        FOR EACH ROW WHEN (NEW.v > 1) EXECUTE FUNCTION slowly()";
    let bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    let (inside, commits) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    for (client, v) in [(&inside, 1), (&commits, 2)] {
        client.batch_execute("BEGIN").await.unwrap();
        let insert = format!("INSERT INTO t VALUES ({v})");
        client.batch_execute(&insert).await.unwrap();
    }
    let commit = tokio::spawn(async move { commits.batch_execute("COMMIT").await });
    let runs = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    while bench.column(runs).await.unwrap() != ["1"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.proxy.shutdown(Duration::ZERO).await;
    let told = fails(&inside, "COMMIT").await;
    assert!(told == "57P01" || told == "closed", "{told}");
    let told = commit.await.unwrap().unwrap_err();
    assert_eq!(code(&told), "08007", "{told}");
    // The server may have gone on with it, and has: what the client was told is true.
    while bench.column(runs).await.unwrap() != ["0"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let v = bench.column("SELECT v FROM t ORDER BY v").await.unwrap();
    assert!(v.is_empty() || v == ["2"], "{v:?}");
}
