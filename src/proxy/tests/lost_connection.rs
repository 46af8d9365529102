//! A connection that breaks while its server lives: the backend behind it, and no other, is ended.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant};

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;
use helios_testkit::frames::Unit;
use helios_testkit::interpose::{Class, Cut, Order, Rules, Way};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error};

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

/// Its row is another's before the primary moves, and the other's again behind the move: neither
/// waits for the other behind the barrier, which would hold everybody (seed 20262070 of the
/// experiments), and the other one loses nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_lost_it_before_a_move_goes_behind_those_who_have_its_row() {
    let options = EngineOptions {
        // Who waits for the barrier's end waits for longer than this test.
        barrier_limit: 10 * PATIENCE,
        ..EngineOptions::default()
    };
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v text)";
    let mut bench = Bench::start(options, schema).await.unwrap();
    bench.interpose().unwrap();
    for round in 0..5 {
        let begin = "TRUNCATE t; INSERT INTO t VALUES (1, '')";
        bench.column(begin).await.unwrap();
        let [late, other] = [bench.client().await.unwrap(), bench.client().await.unwrap()];
        for client in [&late, &other] {
            client.batch_execute("BEGIN").await.unwrap();
        }
        append(&late, "late").await;
        let late = cut_off(&bench, late).await;
        append(&other, "other").await;
        bench.drain().await.unwrap();
        let between = bench.between.as_ref().unwrap();
        between.set(|rules| *rules = Rules::default());
        let moved = tokio::time::timeout(PATIENCE, bench.resume()).await;
        moved.expect("the move waits for a lock").unwrap();
        other.batch_execute("COMMIT").await.unwrap();
        let lost = late.await.unwrap().unwrap_err();
        assert_eq!(lost.code().unwrap().code(), "40001", "round {round}");
        assert_eq!(bench.column("SELECT v FROM t").await.unwrap(), ["other"]);
    }
}

async fn append(client: &Client, what: &str) {
    let sql = format!("UPDATE t SET v = v || '{what}' RETURNING v");
    client.query_one(&sql, &[]).await.unwrap();
}

/// The connection behind this client breaks at its next statement, and no other is let in until the
/// rules change.
async fn cut_off(bench: &Bench, client: Client) -> JoinHandle<Result<(), Error>> {
    let cut = Cut {
        way: Way::ToServer,
        unit: Unit::Messages,
        after: 0,
    };
    let order = Order::new(cut, 1);
    let between = bench.between.as_ref().unwrap();
    between.set(|rules| {
        rules.cut = Some(order.clone());
        rules.refuse = vec![Class::Session];
    });
    let asks = tokio::spawn(async move { client.batch_execute("SELECT v FROM t").await });
    tokio::time::timeout(PATIENCE, order.hit()).await.unwrap();
    asks
}
