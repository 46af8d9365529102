//! A connection that breaks while its server lives: the backend behind it, and no other, is ended.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant};

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;
use helios_testkit::interpose::Class;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(40);

/// Polls the server until `sql` gives `wanted`.
async fn until(bench: &Bench, sql: &str, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let got = bench.column(sql).await.unwrap();
        if got == [wanted] {
            return;
        }
        assert!(Instant::now() < deadline, "{sql}: {got:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backend_behind_it_is_known_by_its_start_and_ended() {
    let schema = "CREATE TABLE t (v int); INSERT INTO t VALUES (1)";
    let mut bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    bench.interpose().unwrap();
    let client = bench.client().await.unwrap();
    // The proxy asks when its backends began.
    let asked = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'helios' \
                 AND state = 'idle' AND query LIKE '%backend_start%'";
    until(&bench, asked, "1").await;
    client.batch_execute("BEGIN").await.unwrap();
    let slow = "UPDATE t SET v = v + 1 WHERE pg_sleep(600) IS NOT NULL";
    let asleep = tokio::spawn(async move { client.batch_execute(slow).await });
    let sleeps = "FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    until(&bench, &format!("SELECT count(*) {sleeps}"), "1").await;
    let pid = bench.column(&format!("SELECT pid {sleeps}")).await.unwrap();
    bench.between.as_ref().unwrap().close(Class::Session);
    // It sleeps, and would notice nothing by itself for ten minutes.
    let old = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE pid = {}",
        pid[0]
    );
    until(&bench, &old, "0").await;
    // The statement runs again, on another backend.
    until(&bench, &format!("SELECT count(*) {sleeps}"), "1").await;
    assert!(!asleep.is_finished());
    asleep.abort();
    until(&bench, "SELECT v FROM t", "1").await;
}
