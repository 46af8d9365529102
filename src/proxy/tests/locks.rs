//! Whose locks replays wait for: those of sessions that have found the primary before them, and
//! those that transactions which had failed do not have any more.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant};

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;
use tokio_postgres::Client;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(40);

async fn bench() -> Bench {
    let options = EngineOptions {
        // Nothing here may wait for it.
        barrier_limit: 10 * PATIENCE,
        ..EngineOptions::default()
    };
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0), (2, 0)";
    let bench = Bench::start(options, schema).await.unwrap();
    bench.known().await.unwrap();
    bench
}

async fn run(client: &Client, sql: &str) {
    let done = tokio::time::timeout(PATIENCE, client.batch_execute(sql)).await;
    done.unwrap_or_else(|_| panic!("no answer: {sql}")).unwrap();
}

/// Polls the server until `sql` gives `wanted`.
async fn until(bench: &Bench, sql: &str, wanted: &str) {
    let deadline = Instant::now() + PATIENCE;
    while bench.column(sql).await.unwrap() != [wanted] {
        assert!(Instant::now() < deadline, "never {wanted}: {sql}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// SQLSTATE of the error that a statement gets.
async fn fails(client: &Client, sql: &str) -> String {
    let failed = client.batch_execute(sql).await.unwrap_err();
    failed.code().unwrap().code().to_owned()
}

async fn moves(bench: &mut Bench, crash: bool) {
    let moved = async {
        if crash {
            bench.crash().await?;
            return bench.resume().await;
        }
        bench.switchover().await
    };
    let Ok(moved) = tokio::time::timeout(PATIENCE, moved).await else {
        let seen = "SELECT concat_ws(' ', pid, pg_blocking_pids(pid), state, wait_event, query) \
                    FROM pg_stat_activity WHERE backend_type = 'client backend'";
        let seen = bench.column(seen).await;
        panic!(
            "a replay waits for a lock: {seen:#?} {:#?}",
            bench.proxy.sessions()
        );
    };
    moved.unwrap();
}

/// A failed transaction holds no locks any more, and another has taken them: it is not done again,
/// and what its client may ask for gives what it would have given.
async fn a_failed_transaction_takes_no_locks(crash: bool) {
    let mut bench = bench().await;
    let (failed, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    for sql in [
        "BEGIN ISOLATION LEVEL SERIALIZABLE",
        // Were it done again, the other would come first.
        "SELECT pg_sleep(1)",
        "UPDATE t SET v = v + 1 WHERE id = 1",
    ] {
        run(&failed, sql).await;
    }
    assert_eq!(fails(&failed, "SELECT 1/0").await, "22012");
    run(&other, "BEGIN").await;
    run(&other, "UPDATE t SET v = v + 10 WHERE id = 1").await;
    // The second time the failed block is one of ours.
    for _ in 0..2 {
        moves(&mut bench, crash).await;
    }
    assert_eq!(fails(&failed, "SELECT 1").await, "25P02");
    moves(&mut bench, crash).await;
    run(&failed, "ROLLBACK").await;
    run(&other, "COMMIT").await;
    run(&failed, "UPDATE t SET v = v + 100 WHERE id = 2").await;
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["10", "100"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_transaction_takes_no_locks_at_a_switchover() {
    a_failed_transaction_takes_no_locks(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_transaction_takes_no_locks_at_a_crash() {
    a_failed_transaction_takes_no_locks(true).await;
}

/// What outlasts a rollback, or can be gone back to, is there again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_transaction_leaves_is_there_again() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    run(&client, "BEGIN").await;
    run(&client, "SELECT pg_advisory_lock(7)").await;
    run(
        &client,
        "PREPARE change AS UPDATE t SET v = v + 1 WHERE id = 1",
    )
    .await;
    assert_eq!(fails(&client, "SELECT 1/0").await, "22012");
    moves(&mut bench, false).await;
    run(&client, "ROLLBACK").await;
    let held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 7";
    assert_eq!(bench.column(held).await.unwrap(), ["1"]);
    run(&client, "EXECUTE change").await;
    run(&client, "BEGIN").await;
    run(&client, "UPDATE t SET v = v + 10 WHERE id = 2").await;
    run(&client, "SAVEPOINT s").await;
    assert_eq!(fails(&client, "SELECT 1/0").await, "22012");
    moves(&mut bench, true).await;
    run(&client, "ROLLBACK TO s").await;
    run(&client, "COMMIT").await;
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["1", "10"]);
}

/// The replay of one session waits for a lock of another that is back already: that one may end
/// its transaction, and begin no other (experiment 838 of the thousand, 6 s).
#[tokio::test(flavor = "multi_thread")]
async fn who_is_back_already_ends_its_transaction_and_begins_no_other() {
    let mut bench = bench().await;
    let (back, late) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    run(&back, "BEGIN").await;
    run(&back, "SELECT v FROM t WHERE id = 2").await;
    // Its replay takes a while before it comes to the lock.
    for sql in [
        "BEGIN",
        "SELECT pg_sleep(2)",
        "UPDATE t SET v = v + 10 WHERE id = 1",
    ] {
        run(&late, sql).await;
    }
    bench.crash().await.unwrap();
    run(&back, "UPDATE t SET v = v + 1 WHERE id = 1").await;
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    until(&bench, waits, "1").await;
    let proxy = bench.proxy.clone();
    let topology = bench.topology().unwrap();
    let resume = tokio::spawn(async move { proxy.resume(topology).await });
    let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    until(&bench, sleeps, "1").await;
    assert_eq!(bench.proxy.status().phase, "resuming");
    run(&back, "COMMIT").await;
    let next = async move {
        run(&back, "UPDATE t SET v = v + 100 WHERE id = 1").await;
        back
    };
    let next = tokio::spawn(next);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!next.is_finished(), "a new transaction passed the barrier");
    let resumed = tokio::time::timeout(PATIENCE, resume).await;
    resumed.expect("it waits for a lock").unwrap().unwrap();
    // It has its lock again, in front of new work.
    until(&bench, waits, "1").await;
    run(&late, "COMMIT").await;
    let _back = tokio::time::timeout(PATIENCE, next).await.unwrap().unwrap();
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["111", "0"]);
}
