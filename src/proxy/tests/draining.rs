//! What is in flight when a planned move begins, and who waits for whom; judged by what clients
//! received and by the data.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::{Duration, Instant};

use helios_api::Epoch;
use helios_api::control::DrainRequest;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::bench::Bench;
use tokio_postgres::Client;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

async fn bench() -> Bench {
    let schema = "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 0), (2, 0)";
    let bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    bench.known().await.unwrap();
    bench
}

/// A drain of the first epoch that may take as long as `limit`.
async fn drain(bench: &Bench, limit: Duration) {
    let request = DrainRequest {
        epoch: Epoch(1),
        timeout_ms: u64::try_from(limit.as_millis()).unwrap(),
    };
    let drained = tokio::time::timeout(PATIENCE, bench.proxy.drain(&request)).await;
    drained.unwrap().unwrap();
}

/// Polls the server until `sql` counts something.
async fn until(bench: &Bench, sql: &str) {
    let deadline = Instant::now() + PATIENCE;
    while bench.column(sql).await.unwrap() == ["0"] {
        assert!(Instant::now() < deadline, "never: {sql}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Waits until the proxy has read a position of the log in the lives of all sessions that there are.
/// Without one (in their first half second) an id that is handed out again after a crash is waited
/// for, as long as it runs.
async fn looked(bench: &Bench) {
    let looked = "SELECT count(*) FROM pg_stat_activity AS a \
                  WHERE a.query LIKE '%pg_current_wal_flush_lsn%' AND a.pid <> pg_backend_pid() \
                  AND a.state = 'idle' AND a.query_start > \
                  (SELECT max(b.state_change) + interval '100 ms' FROM pg_stat_activity AS b \
                   WHERE b.usename = 'postgres' AND b.pid <> pg_backend_pid())";
    until(bench, looked).await;
}

const SLEEPS: &str = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";

/// Works until it is told to stop; the times at which its statements began and ended.
async fn works(client: Client, stop: impl Future<Output = ()>) -> Vec<(Instant, Instant)> {
    let mut times = Vec::new();
    tokio::pin!(stop);
    loop {
        let began = Instant::now();
        let change = "UPDATE t SET v = v + 1 WHERE id = 2";
        assert_eq!(client.execute(change, &[]).await.unwrap(), 1);
        times.push((began, Instant::now()));
        let pause = tokio::time::sleep(Duration::from_millis(2));
        tokio::select! {
            () = &mut stop => return times,
            () = pause => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_cannot_be_cut_holds_nobody_else() {
    let mut bench = bench().await;
    let (slow, quick) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    let calls = tokio::spawn(async move {
        let sql = "DO $$ BEGIN PERFORM pg_sleep(2); UPDATE t SET v = v + 1 WHERE id = 1; END $$";
        let done = slow.batch_execute(sql).await;
        (done, Instant::now(), slow)
    });
    until(&bench, SLEEPS).await;
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let worker = tokio::spawn(works(quick, async { stopped.await.unwrap_or_default() }));
    let began = Instant::now();
    drain(&bench, PATIENCE).await;
    bench.resume().await.unwrap();
    let (done, ended, slow) = calls.await.unwrap();
    done.unwrap();
    stop.send(()).unwrap();
    let times = worker.await.unwrap();
    // Of what was begun once the drain was under way, much was done before the slow one ended.
    let meanwhile = times
        .iter()
        .filter(|(b, e)| *b > began && *e < ended)
        .count();
    assert!(
        meanwhile > 20,
        "{meanwhile} statements in {:?}",
        ended - began
    );
    slow.batch_execute("SELECT 1").await.unwrap();
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["1".to_owned(), times.len().to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_never_ends_is_left_to_the_evidence() {
    let mut bench = bench().await;
    let (slow, quick) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    let calls = tokio::spawn(async move {
        let sql = "DO $$ BEGIN UPDATE t SET v = 9 WHERE id = 1; \
                   PERFORM pg_sleep(600); ROLLBACK; END $$";
        (slow.batch_execute(sql).await, slow)
    });
    until(&bench, SLEEPS).await;
    drain(&bench, Duration::from_millis(300)).await;
    bench.resume().await.unwrap();
    let (told, slow) = tokio::time::timeout(PATIENCE, calls)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(told.unwrap_err().code().unwrap().code(), "08007");
    slow.batch_execute("SELECT 1").await.unwrap();
    let change = "UPDATE t SET v = v + 1 WHERE id = 2";
    assert_eq!(quick.execute(change, &[]).await.unwrap(), 1);
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["0", "1"]);
}

/// A drain waits for a transaction that cannot be moved, and the primary dies meanwhile: nobody
/// waits for the drain's limit (experiment 838 of the thousand, 30 s).
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_ends_a_drain_that_waits() {
    let mut bench = bench().await;
    let (open, quick) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    for sql in ["CREATE TYPE pg_temp.mine AS RANGE (SUBTYPE = int)", "BEGIN"] {
        open.batch_execute(sql).await.unwrap();
    }
    let proxy = bench.proxy.clone();
    let request = DrainRequest {
        epoch: Epoch(1),
        timeout_ms: 600_000,
    };
    let drain = tokio::spawn(async move { proxy.drain(&request).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!drain.is_finished());
    bench.crash().await.unwrap();
    let resumed = tokio::time::timeout(PATIENCE, bench.resume()).await;
    resumed.expect("it waits for the drain").unwrap();
    let drained = drain.await.unwrap();
    assert_eq!(drained, Err(helios_proxy::CommandError::Superseded));
    let change = "UPDATE t SET v = v + 1 WHERE id = 2";
    assert_eq!(quick.execute(change, &[]).await.unwrap(), 1);
    let told = open.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(told.code().unwrap().code(), "40001");
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["0", "1"]);
}

/// Past the limit the old primary is fenced, and the evidence says that nothing was committed.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_waited_for_in_vain_runs_again() {
    // Sleeps in its first run.
    let sleep = "CASE WHEN nextval('runs') <= 2 THEN pg_sleep(600)::text END";
    let block = "UPDATE t SET v = v + 1 WHERE id = 1";
    let statements = [
        format!("DO $$ BEGIN {block}; PERFORM {sleep}; END $$"),
        format!("INSERT INTO t VALUES (3, 0); SELECT {sleep}"),
    ];
    let mut bench = bench().await;
    let sequence = "CREATE SEQUENCE runs";
    bench.direct.batch_execute(sequence).await.unwrap();
    let mut running = Vec::new();
    for sql in statements {
        let client = bench.client().await.unwrap();
        running.push(tokio::spawn(
            async move { client.batch_execute(&sql).await },
        ));
    }
    let two = SLEEPS.replacen("count(*)", "(count(*) = 2)::int", 1);
    until(&bench, &two).await;
    drain(&bench, Duration::from_millis(300)).await;
    let fence = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
                 WHERE wait_event = 'PgSleep'";
    bench.column(fence).await.unwrap();
    let gone = SLEEPS.replacen("count(*)", "(count(*) = 0)::int", 1);
    until(&bench, &gone).await;
    bench.resume().await.unwrap();
    for one in running {
        tokio::time::timeout(PATIENCE, one)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["1", "0", "0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_pipelined_behind_a_lock_wait_is_cut_off_and_taken_up_again() {
    commit_behind_a_lock_wait(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_pipelined_behind_a_lock_wait_commits_once_after_a_crash() {
    commit_behind_a_lock_wait(true).await;
}

async fn commit_behind_a_lock_wait(crash: bool) {
    let mut bench = bench().await;
    let (holder, waiter) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    looked(&bench).await;
    let change = "BEGIN; UPDATE t SET v = v + 1 WHERE id = 1";
    holder.batch_execute(change).await.unwrap();
    // Its transaction's id is known before the COMMIT is sent, so the COMMIT is not held back.
    waiter.batch_execute("BEGIN").await.unwrap();
    let change = "INSERT INTO t VALUES (3, 0)";
    waiter.batch_execute(change).await.unwrap();
    let mut pipeline = tokio::spawn(async move {
        let change = waiter.simple_query("UPDATE t SET v = v + 10 WHERE id = 1");
        let commit = waiter.simple_query("COMMIT");
        tokio::join!(change, commit)
    });
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    until(&bench, waits).await;
    if crash {
        bench.crash().await.unwrap();
    } else {
        // Should the pipeline not be cut off, the drain would last for its whole limit.
        drain(&bench, 4 * PATIENCE).await;
    }
    bench.resume().await.unwrap();
    let early = tokio::select! {
        () = until(&bench, waits) => None,
        done = &mut pipeline => Some(done.unwrap()),
    };
    // In front of a planned move nobody has lost a lock. After a crash sessions that found the
    // server by themselves take theirs in any order.
    assert!(crash || early.is_none(), "nobody waited: {early:?}");
    holder.batch_execute("COMMIT").await.unwrap();
    let (changed, committed) = match early {
        Some(done) => done,
        None => tokio::time::timeout(PATIENCE, pipeline)
            .await
            .unwrap()
            .unwrap(),
    };
    changed.unwrap();
    committed.unwrap();
    let v = bench.column("SELECT v FROM t ORDER BY id").await.unwrap();
    assert_eq!(v, ["11", "0", "0"]);
}
