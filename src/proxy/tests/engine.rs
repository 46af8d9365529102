//! The engine in front of one real server: forwarding, and moves onto a fresh backend.
//!
//! A move to the same server exercises everything but the loss of the old one: the transaction's
//! old backend is gone, so what the client goes on with was replayed.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt, pin_mut};
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

async fn bench() -> Bench {
    Bench::start(EngineOptions::default(), "").await.unwrap()
}

/// The driver closes statements behind our back: its last messages may still be in flight.
async fn journal_is_empty(bench: &Bench) {
    for _ in 0..200 {
        if bench.proxy.journal_bytes() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} bytes of journal are left", bench.proxy.journal_bytes());
}

fn pid_sql() -> &'static str {
    "SELECT pg_backend_pid()"
}

async fn backend_pid(client: &Client) -> i32 {
    client.query_one(pid_sql(), &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_is_carried_faithfully() {
    let bench = bench().await;
    let mut client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int, b text)")
        .await
        .unwrap();
    assert_eq!(
        client
            .execute("INSERT INTO t VALUES ($1, $2)", &[&1, &"x"])
            .await
            .unwrap(),
        1
    );
    // an error in an extended query, recovery at Sync
    let error = client.query("SELECT 1 / $1::int", &[&0]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "22012");
    let error = client.query("SELECT nonsense", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42703");
    // COPY both ways
    let sink = client.copy_in("COPY t FROM STDIN").await.unwrap();
    pin_mut!(sink);
    let data = futures_util::stream::iter((2..1000).map(|n| Ok(format!("{n}\trow\n").into())));
    data.forward::<std::pin::Pin<&mut tokio_postgres::CopyInSink<bytes::Bytes>>>(sink)
        .await
        .unwrap();
    let out: Vec<bytes::Bytes> = client
        .copy_out("COPY t TO STDOUT")
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(out.len(), 999);
    // portals with a row limit
    let transaction = client.transaction().await.unwrap();
    let portal = transaction
        .bind("SELECT a FROM t ORDER BY a", &[])
        .await
        .unwrap();
    let first = transaction.query_portal(&portal, 10).await.unwrap();
    let second = transaction.query_portal(&portal, 10).await.unwrap();
    assert_eq!(
        (first[0].get::<_, i32>(0), second[0].get::<_, i32>(0)),
        (1, 11)
    );
    transaction.rollback().await.unwrap();
    // several statements in one simple query, an empty one
    let results = client.simple_query("SELECT 1; SELECT 2; ;").await.unwrap();
    let rows = results
        .iter()
        .filter(|m| matches!(m, SimpleQueryMessage::Row(_)))
        .count();
    assert_eq!(rows, 2);
    // a row of several MB goes through in pieces
    let long: String = client
        .query_one("SELECT repeat('x', 5000000)", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(long.len(), 5_000_000);
    let back: i32 = client
        .query_one("SELECT length($1::text)", &[&long])
        .await
        .unwrap()
        .get(0);
    assert_eq!(back, 5_000_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pipeline_keeps_its_order() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let wait = (0..500).map(|n: i32| {
        let client = &client;
        async move {
            client
                .query_one("SELECT $1::int", &[&n])
                .await
                .unwrap()
                .get::<_, i32>(0)
        }
    });
    let got = futures_util::future::join_all(wait).await;
    assert_eq!(got, (0..500).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_request_reaches_the_statement() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let token = client.cancel_token();
    let slow = tokio::spawn(async move { client.batch_execute("SELECT pg_sleep(30)").await });
    tokio::time::sleep(Duration::from_millis(300)).await;
    token.cancel_query(NoTls).await.unwrap();
    let error = slow.await.unwrap().unwrap_err();
    assert_eq!(error.code().unwrap().code(), "57014");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_moves() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (id int, v int); INSERT INTO t VALUES (1, 10)")
        .await
        .unwrap();
    let before = backend_pid(&client).await;
    client.batch_execute("BEGIN").await.unwrap();
    let update = "UPDATE t SET v = v + 1 WHERE id = $1 RETURNING v";
    let v: i32 = client.query_one(update, &[&1]).await.unwrap().get(0);
    assert_eq!(v, 11);
    bench.switchover().await.unwrap();
    let v: i32 = client.query_one(update, &[&1]).await.unwrap().get(0);
    assert_eq!(v, 12);
    client.batch_execute("COMMIT").await.unwrap();
    assert_ne!(backend_pid(&client).await, before);
    let direct = bench.server.connect().await.unwrap();
    let v: i32 = direct
        .query_one("SELECT v FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(v, 12);
    journal_is_empty(&bench).await;
}

/// What a lossy promotion does to transactions that have read what is not there any more.
#[tokio::test(flavor = "multi_thread")]
async fn reads_are_not_trusted_where_commits_may_be_lost() {
    for lossy in [false, true] {
        let mut bench = bench().await;
        bench
            .direct
            .batch_execute("CREATE TABLE t (v int)")
            .await
            .unwrap();
        bench
            .direct
            .batch_execute("INSERT INTO t VALUES (1)")
            .await
            .unwrap();
        let (saw, same) = (bench.client().await.unwrap(), bench.client().await.unwrap());
        saw.batch_execute("BEGIN; SELECT v FROM t").await.unwrap();
        same.batch_execute("BEGIN; SELECT count(*) FROM t")
            .await
            .unwrap();
        bench.drain().await.unwrap();
        bench
            .direct
            .batch_execute("UPDATE t SET v = 0")
            .await
            .unwrap();
        let mut topology = bench.next_topology().unwrap();
        if lossy {
            let fence = topology.fences.last_mut().unwrap();
            fence.lost = helios_api::control::LostCommits::Possible;
        }
        bench.proxy.resume(topology).await.unwrap();
        same.batch_execute("SELECT 1; COMMIT").await.unwrap();
        let metric = format!("helios_lossy_promotions_total {}", u8::from(lossy));
        assert!(bench.proxy.render_metrics().contains(&metric));
        let went_on = saw.batch_execute("SELECT 1").await;
        if !lossy {
            went_on.unwrap();
            continue;
        }
        let error = went_on.unwrap_err();
        let error = error.as_db_error().unwrap();
        assert_eq!(error.code().code(), "40001");
        let detail = error.detail().unwrap_or_default();
        assert!(detail.contains("may have been lost"), "{detail}");
        saw.batch_execute("ROLLBACK; SELECT 1").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_role_and_statements_move() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE ROLE boss; SET search_path = pg_catalog, public")
        .await
        .unwrap();
    client
        .batch_execute("SET work_mem = '7MB'; SET my.thing = 'it''s'; SET ROLE boss")
        .await
        .unwrap();
    client
        .batch_execute("PREPARE p (int) AS SELECT $1 * 2")
        .await
        .unwrap();
    let statement = client.prepare("SELECT $1::int + 1").await.unwrap();
    // the transaction changes what it must not change for the session
    client
        .batch_execute("BEGIN; SET LOCAL work_mem = '9MB'")
        .await
        .unwrap();
    bench.switchover().await.unwrap();
    let one = |sql: &'static str| {
        let client = &client;
        async move {
            client
                .query_one(sql, &[])
                .await
                .unwrap()
                .get::<_, String>(0)
        }
    };
    assert_eq!(one("SHOW work_mem").await, "9MB");
    client.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(one("SHOW work_mem").await, "7MB");
    assert_eq!(one("SHOW my.thing").await, "it's");
    assert_eq!(one("SHOW search_path").await, "pg_catalog, public");
    assert_eq!(one("SELECT current_user::text").await, "boss");
    let n: i32 = client.query_one(&statement, &[&41]).await.unwrap().get(0);
    assert_eq!(n, 42);
    let rows = client.simple_query("EXECUTE p (21)").await.unwrap();
    assert!(
        rows.iter()
            .any(|m| matches!(m, SimpleQueryMessage::Row(r) if r.get(0) == Some("42")))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_in_flight_is_answered_once() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int)")
        .await
        .unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    client
        .batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let slow = client.simple_query("SELECT pg_sleep(1); INSERT INTO t VALUES (2)");
    tokio::pin!(slow);
    let moved = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bench.switchover().await.unwrap();
        bench
    };
    let (result, bench) = tokio::join!(slow, moved);
    result.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    let direct = bench.server.connect().await.unwrap();
    let n: i64 = direct
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autocommit_statement_in_flight_runs_once() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int)")
        .await
        .unwrap();
    let slow = client.execute("INSERT INTO t SELECT 1 FROM pg_sleep(1)", &[]);
    let moved = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bench.switchover().await.unwrap();
        bench
    };
    let (result, bench) = tokio::join!(slow, moved);
    assert_eq!(result.unwrap(), 1);
    let direct = bench.server.connect().await.unwrap();
    let n: i64 = direct
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_difference_aborts_and_the_session_lives_on() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int, u text)")
        .await
        .unwrap();
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    // What is random cannot be had again.
    let random = "INSERT INTO t VALUES (2, gen_random_uuid()) RETURNING u";
    client.query_one(random, &[]).await.unwrap();
    bench.switchover().await.unwrap();
    let error = client
        .batch_execute("INSERT INTO t VALUES (3)")
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    let error = client
        .batch_execute("INSERT INTO t VALUES (4)")
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "25P02");
    client.batch_execute("ROLLBACK").await.unwrap();
    let n: i64 = client
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 0);
    // a COMMIT as the first thing it says must not look like a success
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    client.query_one(random, &[]).await.unwrap();
    bench.switchover().await.unwrap();
    let error = client.batch_execute("COMMIT").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    let n: i64 = client
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_move_is_known_beforehand_and_never_lost_silently() {
    let mut bench = bench().await;
    bench
        .direct
        .batch_execute("CREATE TABLE t (v text)")
        .await
        .unwrap();
    let temporary = (
        "CREATE TEMP TABLE tt (a int); ALTER TABLE tt ENABLE ROW LEVEL SECURITY",
        "temporary object",
    );
    let held = (
        "BEGIN; DECLARE c CURSOR WITH HOLD FOR SELECT ROW(1, 2); COMMIT",
        "cursor WITH HOLD",
    );
    for ((sql, what), crash, inside) in [
        (temporary, false, false),
        (held, false, false),
        (temporary, true, false),
        (held, true, false),
        (temporary, true, true),
        (held, true, true),
    ] {
        let client = bench.client().await.unwrap();
        client.batch_execute(sql).await.unwrap();
        let reason = bench.proxy.sessions().pop().unwrap().unprotected.unwrap();
        assert!(reason.contains(what), "{reason}");
        if inside {
            let begin = "BEGIN; INSERT INTO t VALUES ('lost')";
            client.batch_execute(begin).await.unwrap();
        }
        if crash {
            bench.crash().await.unwrap();
        } else {
            bench.switchover().await.unwrap();
        }
        let error = client.batch_execute("SELECT 1").await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "40001", "{what}");
        let detail = error.as_db_error().unwrap().detail().unwrap();
        assert!(detail.contains(what), "{detail}");
        if inside {
            client.batch_execute("ROLLBACK").await.unwrap();
        }
        let (schema, fetch) = ("SELECT * FROM tt", "FETCH c");
        let gone = client.batch_execute(if what == held.1 { fetch } else { schema });
        let code = gone.await.unwrap_err().code().unwrap().code().to_owned();
        assert!(["42P01", "34000"].contains(&code.as_str()), "{code}");
        client.batch_execute("SELECT 1").await.unwrap();
    }
    let rows = bench.column("SELECT count(*) FROM t").await.unwrap();
    assert_eq!(rows, ["0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_administrators_kill_stays_a_kill() {
    let bench = bench().await;
    let client = bench.client().await.unwrap();
    let pid = backend_pid(&client).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let direct = bench.server.connect().await.unwrap();
    direct
        .execute("SELECT pg_terminate_backend($1)", &[&pid])
        .await
        .unwrap();
    let error = client.batch_execute("SELECT 1").await.unwrap_err();
    let code = error.code().map(|c| c.code().to_owned());
    assert!(
        error.is_closed() || code.as_deref() == Some("57P01"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_over_its_limit_is_unprotected_not_half_kept() {
    let engine = EngineOptions {
        max_journal_bytes: 10_000,
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(engine, "").await.unwrap();
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a text)")
        .await
        .unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let long = "x".repeat(3000);
    for _ in 0..5 {
        client
            .execute("INSERT INTO t VALUES ($1)", &[&long])
            .await
            .unwrap();
        assert!(bench.proxy.journal_bytes() <= 10_000);
    }
    let reason = bench.proxy.sessions()[0].unprotected.clone().unwrap();
    assert!(reason.contains("limit of 10000 bytes"), "{reason}");
    bench.resume().await.unwrap();
    let error = client.batch_execute("COMMIT").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES ('y'); COMMIT")
        .await
        .unwrap();
    let n: i64 = client
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 1);
    journal_is_empty(&bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_server_is_found_again_with_the_transaction() {
    let mut bench = bench().await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("CREATE TABLE t (a int)")
        .await
        .unwrap();
    client
        .batch_execute("BEGIN; INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO t VALUES (2)")
        .await
        .unwrap();
    bench.server.crash();
    let commit = client.batch_execute("COMMIT");
    let boot = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        bench.server.boot().await.unwrap();
    };
    let (commit, ()) = tokio::join!(commit, boot);
    commit.unwrap();
    let direct = bench.server.connect().await.unwrap();
    let n: i64 = direct
        .query_one("SELECT count(*) FROM t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(n, 2);
}

/// Process id of a session's backend, leaving nothing in flight behind it.
async fn plain_pid(client: &Client) -> i32 {
    let rows = client.simple_query(pid_sql()).await.unwrap();
    let row = rows.iter().find_map(|m| match m {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    row.unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn idle_sessions_leave_ahead_of_a_planned_move() {
    let engine = EngineOptions {
        leave_ahead_from: 1,
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(engine, "").await.unwrap();
    let (idle, open, listening) = tokio::join!(bench.client(), bench.client(), bench.client());
    let (idle, open, listening) = (idle.unwrap(), open.unwrap(), listening.unwrap());
    idle.batch_execute("SET helios.kept = '7'").await.unwrap();
    let statement = idle.prepare("SELECT $1::int + 1").await.unwrap();
    listening.batch_execute("LISTEN news").await.unwrap();
    let pids = [
        plain_pid(&idle).await,
        plain_pid(&open).await,
        plain_pid(&listening).await,
    ];
    open.batch_execute("CREATE TABLE t (n int)").await.unwrap();
    open.batch_execute("BEGIN").await.unwrap();
    open.batch_execute("INSERT INTO t VALUES (1)")
        .await
        .unwrap();
    let candidate = bench.candidate().unwrap();
    bench.proxy.prepare(&candidate).await;
    // By the server's own list.
    let watcher = bench.client().await.unwrap();
    let sql = "SELECT pid FROM pg_stat_activity WHERE pid = ANY($1) ORDER BY pid";
    let rows = watcher.query(sql, &[&&pids[..]]).await.unwrap();
    let left: Vec<i32> = rows.iter().map(|r| r.get(0)).collect();
    let mut expected = pids[1..].to_vec();
    expected.sort_unstable();
    assert_eq!(left, expected, "idle {}", pids[0]);
    // Its client speaks before the move, and another time before the next.
    for _ in 0..2 {
        let value: i32 = idle.query_one(&statement, &[&41]).await.unwrap().get(0);
        assert_eq!(value, 42);
        assert_ne!(plain_pid(&idle).await, pids[0]);
        let kept = idle.simple_query("SHOW helios.kept").await.unwrap();
        assert!(
            kept.iter()
                .any(|m| matches!(m, SimpleQueryMessage::Row(r) if r.get(0) == Some("7")))
        );
        bench.proxy.prepare(&candidate).await;
    }
    // It sleeps through the move without a backend.
    bench.switchover().await.unwrap();
    let value: i32 = idle.query_one(&statement, &[&1]).await.unwrap().get(0);
    assert_eq!(value, 2);
    open.batch_execute("COMMIT").await.unwrap();
}
