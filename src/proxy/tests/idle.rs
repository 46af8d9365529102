//! Idle sessions behind a move: they have no backend until somebody needs one.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant};

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(40);

/// The timer of its idle timeout stood for the one of its next attempt to find a server: its client
/// waited for the end of the timeout.
#[tokio::test(flavor = "multi_thread")]
async fn one_with_an_idle_timeout_goes_on_at_once() {
    let options = EngineOptions {
        idle_timeout: Some(Duration::from_secs(3600)),
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(options, "SELECT 1").await.unwrap();
    let client = bench.client().await.unwrap();
    client.batch_execute("SET work_mem = '5MB'").await.unwrap();
    bench.switchover().await.unwrap();
    let asked = client.query_one("SELECT current_setting('work_mem')", &[]);
    let row = tokio::time::timeout(PATIENCE, asked).await.unwrap();
    assert_eq!(row.unwrap().get::<_, &str>(0), "5MB");
}

/// Whoever comes first after a move need not wait for what could be done before.
#[tokio::test(flavor = "multi_thread")]
async fn temporary_tables_are_made_again_before_the_client_asks_for_them() {
    let mut bench = Bench::start(EngineOptions::default(), "SELECT 1")
        .await
        .unwrap();
    let client = bench.client().await.unwrap();
    let table = "CREATE TEMP TABLE w AS SELECT n FROM generate_series(1, 100) n";
    client.batch_execute(table).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while bench.proxy.sessions().pop().unwrap().unprotected.is_some() {
        assert!(Instant::now() < deadline, "the table was not read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let there = "SELECT oid FROM pg_class WHERE relname = 'w'";
    let old = bench.column(there).await.unwrap();
    bench.switchover().await.unwrap();
    let again = format!("{there} AND oid <> {}", old[0]);
    while bench.column(&again).await.unwrap().is_empty() {
        assert!(Instant::now() < deadline, "its client has to ask first");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let row = client.query_one("SELECT sum(n) FROM w", &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 5050);
}

/// What is found out in the background is told once, when the client speaks.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_made_again_is_told_at_the_next_statement() {
    let mut bench = Bench::start(EngineOptions::default(), "SELECT 1")
        .await
        .unwrap();
    let client = bench.client().await.unwrap();
    let table = "CREATE TEMP TABLE p (n int); ALTER TABLE p ENABLE ROW LEVEL SECURITY";
    client.batch_execute(table).await.unwrap();
    bench.switchover().await.unwrap();
    // Long enough for the background to have tried.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let told = client.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(told.code().map(|c| c.code()), Some("40001"), "{told:?}");
    for _ in 0..2 {
        client.batch_execute("SELECT 1").await.unwrap();
    }
    let gone = client.batch_execute("SELECT * FROM p").await.unwrap_err();
    assert_eq!(gone.code().map(|c| c.code()), Some("42P01"), "{gone:?}");
}
