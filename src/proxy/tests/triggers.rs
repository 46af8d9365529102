//! What makes sessions move, and what ends them instead where it is switched off.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

use std::time::Duration;

use helios_proxy::engine::latency::LatencyRule;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_testkit::interpose::Class;
use tokio::time::Instant;
use tokio_postgres::Client;

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

async fn bench(options: EngineOptions) -> Bench {
    let bench = Bench::start(options, "CREATE TABLE t (v int)").await;
    let bench = bench.unwrap();
    bench.known().await.unwrap();
    bench
}

/// The SQLSTATE of the error that a client gets, or "" when it gets none.
async fn refused(client: &Client) -> String {
    match client.batch_execute("INSERT INTO t VALUES (1)").await {
        Ok(()) => String::new(),
        Err(error) => error.code().map_or("closed", |code| code.code()).to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_started_again_ends_sessions_only_where_that_is_asked_for() {
    for moves in [true, false] {
        let options = EngineOptions {
            move_on_restart: moves,
            ..EngineOptions::default()
        };
        let mut bench = bench(options).await;
        let idle = bench.client().await.unwrap();
        let open = bench.client().await.unwrap();
        idle.batch_execute("SET app.x = '1'").await.unwrap();
        open.batch_execute("BEGIN; INSERT INTO t VALUES (0)")
            .await
            .unwrap();
        bench.crash().await.unwrap();
        bench.resume_here().await.unwrap();
        // The same server, whether the session finds it by itself or is told of it.
        if moves {
            assert_eq!(refused(&idle).await, "");
            assert_eq!(refused(&open).await, "");
            open.batch_execute("COMMIT").await.unwrap();
            let rows = bench.column("SELECT count(*) FROM t").await.unwrap();
            assert_eq!(rows, ["3"]);
        } else {
            for client in [&idle, &open] {
                let code = refused(client).await;
                assert!(["57P01", "closed"].contains(&code.as_str()), "{code}");
            }
            let rows = bench.column("SELECT count(*) FROM t").await.unwrap();
            assert_eq!(rows, ["0"]);
        }
    }
}

/// A connection that breaks is no restart: its server goes on.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_connection_is_no_restart() {
    let options = EngineOptions {
        move_on_restart: false,
        ..EngineOptions::default()
    };
    let mut bench = bench(options).await;
    bench.interpose().unwrap();
    let client = bench.client().await.unwrap();
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (0)")
        .await
        .unwrap();
    bench.between.as_ref().unwrap().close(Class::Session);
    assert_eq!(refused(&client).await, "");
    client.batch_execute("COMMIT").await.unwrap();
    let rows = bench.column("SELECT count(*) FROM t").await.unwrap();
    assert_eq!(rows, ["2"]);
}

/// What the proxy tells of a server that stands still for most of the time, and of one that does not.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_tells_of_a_slow_primary() {
    let rule = LatencyRule {
        threshold: Duration::from_millis(200),
        lasting: Duration::from_secs(2),
    };
    let options = EngineOptions {
        latency: Some(rule),
        ..EngineOptions::default()
    };
    let mut bench = bench(options).await;
    bench.interpose().unwrap();
    // Heartbeats go through this process once the proxy has connected anew.
    bench.switchover().await.unwrap();
    let between = bench.between.as_ref().unwrap();
    let told = || bench.proxy.status().slow;
    let deadline = Instant::now() + PATIENCE;
    let slow = loop {
        between.set(|rules| rules.hold = vec![Class::Service]);
        tokio::time::sleep(Duration::from_millis(400)).await;
        between.set(|rules| rules.hold.clear());
        tokio::time::sleep(Duration::from_millis(60)).await;
        if let Some(slow) = told() {
            break slow;
        }
        assert!(Instant::now() < deadline, "never slow");
    };
    assert_eq!(slow.threshold_ms, 200);
    assert!(slow.median_ms > 200, "{slow:?}");
    assert!(slow.for_ms >= 1800, "{slow:?}");
    // Clients are served all the while: it is no failure.
    let client = bench.client().await.unwrap();
    assert_eq!(refused(&client).await, "");
    assert!(bench.proxy.status().primary_reachable);
    let deadline = Instant::now() + PATIENCE;
    while let Some(slow) = told() {
        assert!(Instant::now() < deadline, "{slow:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A server that crashed and is there again while a client's transaction has one row; nobody has told
/// the proxy.
async fn crashed_in_a_transaction(restart_patience: Duration) -> (Bench, Client) {
    let options = EngineOptions {
        restart_patience,
        ..EngineOptions::default()
    };
    let mut bench = bench(options).await;
    let client = bench.client().await.unwrap();
    let begin = "BEGIN; INSERT INTO t VALUES (7)";
    client.batch_execute(begin).await.unwrap();
    bench.crash().await.unwrap();
    (bench, client)
}

/// Where somebody leads the proxy, a session that finds its primary started again goes on when all
/// do, behind the barrier: one that went on by itself would take locks that replays of others need,
/// and wait for theirs (seed 20261290 of the experiments).
#[tokio::test(flavor = "multi_thread")]
async fn who_finds_a_primary_started_again_waits_for_the_others() {
    let (mut bench, client) = crashed_in_a_transaction(10 * PATIENCE).await;
    let asks = tokio::spawn(async move {
        client.batch_execute("INSERT INTO t VALUES (8)").await?;
        client.batch_execute("COMMIT").await
    });
    // It is there beside this test's own connection, and does nothing.
    let there = "SELECT count(*) FROM pg_stat_activity \
                 WHERE usename = 'postgres' AND backend_type = 'client backend'";
    let deadline = Instant::now() + PATIENCE;
    loop {
        let count = bench.column(there).await.unwrap();
        if count == ["2"] {
            break;
        }
        let seen = || format!("{count:?} are there; {:?}", bench.proxy.sessions());
        assert!(Instant::now() < deadline, "{}", seen());
        assert!(!asks.is_finished(), "{}", seen());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!asks.is_finished());
    let open = "SELECT count(*) FROM pg_stat_activity WHERE xact_start < now() - '20ms'::interval";
    assert_eq!(bench.column(open).await.unwrap(), ["0"]);
    bench.resume_here().await.unwrap();
    asks.await.unwrap().unwrap();
    let rows = bench.column("SELECT v FROM t ORDER BY v").await.unwrap();
    assert_eq!(rows, ["7", "8"]);
}

/// Who is not told goes on by himself.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_ever_to_be_told_of_a_restart() {
    let (bench, client) = crashed_in_a_transaction(Duration::from_millis(200)).await;
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(bench.column("SELECT v FROM t").await.unwrap(), ["7"]);
}
