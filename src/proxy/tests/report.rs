//! The protection report and the history of migrations, as a client sees them by SQL and a scraper
//! by /metrics.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeMap;
use std::time::Duration;

use helios_api::Epoch;
use helios_api::control::MigrationEvent;
use helios_proxy::engine::shared::EngineOptions;
use helios_session::ReplayMode;
use helios_testkit::Bench;
use helios_testkit::interpose::Class;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::broadcast::Receiver;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

async fn bench() -> Bench {
    let schema = "CREATE TABLE t (a int); INSERT INTO t VALUES (1); \
                  CREATE ROLE app LOGIN; GRANT ALL ON t TO app; \
                  CREATE ROLE watcher LOGIN; GRANT pg_monitor TO watcher";
    let bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    bench.known().await.unwrap();
    bench
}

async fn client(bench: &Bench, user: &str, application: &str) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host("127.0.0.1").port(bench.proxy.port());
    config
        .user(user)
        .dbname("postgres")
        .application_name(application);
    let (client, connection) = config.connect(NoTls).await.unwrap();
    tokio::spawn(async move { connection.await.ok() });
    client
}

/// What a client gets, by simple query: rows of columns, as text.
async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await.unwrap();
    let line = |m: &SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => {
            let columns = (0..row.len()).map(|c| row.get(c).unwrap_or("null"));
            Some(columns.collect::<Vec<_>>().join(" "))
        }
        _ => None,
    };
    messages.iter().filter_map(line).collect()
}

async fn run(client: &Client, sql: &str) {
    client.batch_execute(sql).await.unwrap();
}

/// What Prometheus would get: series with their values.
async fn scrape(bench: &Bench) -> BTreeMap<String, f64> {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let router = helios_proxy::control::router(bench.proxy.clone());
    let server = tokio::spawn(async move { axum::serve(listener, router).await });
    let mut stream = tokio::net::TcpStream::connect(at).await.unwrap();
    let request = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    server.abort();
    let value = |line: &str| {
        let (series, value) = line.rsplit_once(' ')?;
        Some((series.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(value).collect()
}

fn series(name: &str, application: &str, kind: &str, protection: &str) -> String {
    let (label, user) = if name.contains("seconds") {
        (
            format!("protection=\"{protection}\",state=\"{kind}\""),
            "app",
        )
    } else {
        (
            format!("kind=\"{kind}\",protection=\"{protection}\""),
            "app",
        )
    };
    format!("{name}{{application=\"{application}\",database=\"postgres\",{label},user=\"{user}\"}}")
}

const COUNTS: &str = "SELECT coalesce(reason, 'protected'), transactions, statements \
                      FROM helios_proxy.protection WHERE application_name = 'till' ORDER BY 1";

/// What cannot be moved yet.
const HELD: &str = "BEGIN; DECLARE held CURSOR WITH HOLD FOR SELECT ROW(1, 2); COMMIT";

#[tokio::test(flavor = "multi_thread")]
async fn the_report_counts_what_would_not_survive_and_why() {
    let bench = bench().await;
    let watcher = client(&bench, "watcher", "watch").await;
    let till = client(&bench, "app", "till").await;
    for _ in 0..3 {
        run(&till, "BEGIN").await;
        run(&till, "UPDATE t SET a = a + 1").await;
        run(&till, "COMMIT").await;
    }
    run(&till, "INSERT INTO t VALUES (2)").await;
    run(&till, "SELECT a FROM t").await;
    // by extended query: a statement to prepare is none that runs
    till.query("SELECT a FROM t WHERE a = $1", &[&1])
        .await
        .unwrap();
    run(&till, "BEGIN").await;
    run(&till, "ROLLBACK").await;
    assert_eq!(rows(&watcher, COUNTS).await, ["protected 4 3"]);
    run(&till, "DO $$ BEGIN NULL; END $$").await;
    run(&till, "SELECT 1; INSERT INTO t VALUES (3)").await;
    assert_eq!(rows(&watcher, COUNTS).await, ["protected 4 5"]);
    // may commit and go on: a crash would leave nobody who knows
    run(&till, "DO $$ BEGIN COMMIT; END $$").await;
    run(
        &till,
        "INSERT INTO t VALUES (3); COMMIT; INSERT INTO t VALUES (4)",
    )
    .await;
    // protected itself, what comes then is not
    run(&till, "CREATE TYPE pg_temp.mine AS (a int)").await;
    run(&till, "SELECT a FROM t").await;
    run(&till, "BEGIN").await;
    run(&till, "COMMIT").await;
    run(&till, "DROP TYPE mine").await;
    run(&till, "SELECT a FROM t").await;
    run(&till, "BEGIN").await;
    run(&till, "COMMIT AND CHAIN").await;
    run(&till, "COMMIT").await;
    let want = [
        "chained 1 0",
        "outcome_unknowable 0 2",
        "protected 4 7",
        "temporary_object 1 2",
    ];
    assert_eq!(rows(&watcher, COUNTS).await, want);

    let scraped = scrape(&bench).await;
    let transactions = "helios_protection_transactions_total";
    for (kind, protection, want) in [
        ("transaction", "protected", 4.0),
        ("transaction", "chained", 1.0),
        ("transaction", "temporary_object", 1.0),
        ("statement", "protected", 7.0),
        ("statement", "temporary_object", 2.0),
        ("statement", "outcome_unknowable", 2.0),
    ] {
        let name = series(transactions, "till", kind, protection);
        assert_eq!(scraped.get(&name), Some(&want), "{name} in {scraped:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn time_counts_by_what_it_is_spent_with_while_it_passes() {
    let bench = bench().await;
    let till = client(&bench, "app", "till").await;
    let watcher = client(&bench, "watcher", "watch").await;
    run(&till, HELD).await;
    run(&till, "BEGIN").await;
    let seconds = "helios_protection_seconds_total";
    let locked = series(seconds, "till", "in_transaction", "cursor_with_hold");
    let value = |scraped: &BTreeMap<String, f64>| scraped.get(&locked).copied().unwrap_or(0.0);
    let first = value(&scrape(&bench).await);
    // The transaction is still open, and its time grows from one look to the next.
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while value(&scrape(&bench).await) < first + 0.05 {
        assert!(
            tokio::time::Instant::now() < deadline,
            "{first} does not grow"
        );
    }
    let sql = "SELECT reason, transaction_seconds >= 0.05, transactions \
               FROM helios_proxy.protection \
               WHERE application_name = 'till' AND reason = 'cursor_with_hold'";
    assert_eq!(rows(&watcher, sql).await, ["cursor_with_hold t 0"]);
    let gauge = "helios_unprotected_sessions{reason=\"cursor_with_hold\"}";
    assert_eq!(scrape(&bench).await.get(gauge), Some(&1.0));
    drop(till);
    let gone = |scraped: &BTreeMap<String, f64>| scraped.get(gauge) == Some(&0.0);
    while !gone(&scrape(&bench).await) {
        assert!(tokio::time::Instant::now() < deadline, "the session stays");
    }
    let last = value(&scrape(&bench).await);
    assert!(
        value(&scrape(&bench).await) <= last,
        "a session that is gone counts on"
    );
}

fn events(from: &mut Receiver<MigrationEvent>) -> Vec<MigrationEvent> {
    std::iter::from_fn(|| from.try_recv().ok()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_are_rows_events_and_metrics() {
    let mut bench = bench().await;
    let mut heard = bench.proxy.subscribe();
    let idle = client(&bench, "watcher", "idle").await;
    let open = client(&bench, "app", "open").await;
    run(&open, "BEGIN").await;
    run(&open, "INSERT INTO t VALUES (7)").await;
    run(&open, "SELECT * FROM t").await;
    let lost = client(&bench, "app", "lost").await;
    run(&lost, HELD).await;
    run(&lost, "BEGIN").await;
    bench.switchover().await.unwrap();
    run(&open, "COMMIT").await;
    let error = lost.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    run(&lost, "ROLLBACK").await;

    let sql = "SELECT application_name, usename, datname, kind, reason, outcome, \
               duration > '0', state_bytes > 0, statements_replayed, epoch, sqlstate, \
               migration_time BETWEEN now() - interval '1 hour' AND clock_timestamp() \
               FROM helios_proxy.session_migrations AS m ORDER BY application_name";
    let want = [
        "idle watcher postgres planned switchover completed t f 0 2 null t",
        "lost app postgres planned switchover failed t t 0 2 40001 t",
        "open app postgres planned switchover completed t t 3 2 null t",
    ];
    assert_eq!(rows(&idle, sql).await, want);
    let told = rows(
        &idle,
        "SELECT error FROM helios_proxy.session_migrations WHERE error IS NOT NULL",
    );
    let told = told.await;
    assert!(
        told.len() == 1 && told[0].starts_with("cursor WITH HOLD: "),
        "{told:?}"
    );

    // Each has begun, and has ended once; bytes and reason are there.
    let mut by_session: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for event in events(&mut heard) {
        let (session, what) = match event {
            MigrationEvent::Started {
                session, reason, ..
            } => (session, format!("started {reason:?}")),
            MigrationEvent::Completed {
                session, reason, ..
            } => (session, format!("completed {reason:?}")),
            MigrationEvent::Failed {
                session, sqlstate, ..
            } => (session, format!("failed {sqlstate}")),
        };
        by_session.entry(session.0).or_default().push(what);
    }
    let completed = vec![
        "started Switchover".to_owned(),
        "completed Switchover".to_owned(),
    ];
    let failed = vec!["started Switchover".to_owned(), "failed 40001".to_owned()];
    let want = [completed.clone(), completed, failed];
    assert_eq!(by_session.into_values().collect::<Vec<_>>(), want);

    let scraped = scrape(&bench).await;
    for (name, want) in [
        (
            "helios_session_migrations_started_total{reason=\"switchover\"}",
            3.0,
        ),
        ("helios_session_migrations_successful", 2.0),
        ("helios_session_migrations_failed", 1.0),
        (
            "helios_session_migrations_total{reason=\"switchover\",result=\"completed\"}",
            2.0,
        ),
        (
            "helios_session_migrations_total{reason=\"switchover\",result=\"failed\"}",
            1.0,
        ),
        ("helios_session_migrations_state_bytes_count", 3.0),
    ] {
        assert_eq!(scraped.get(name), Some(&want), "{name} in {scraped:#?}");
    }
}

const MOVES: &str = "SELECT kind, reason, outcome, statements_replayed \
                     FROM helios_proxy.session_migrations \
                     WHERE application_name = 'open' ORDER BY migration_time";

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_lost_is_told_from_a_crash() {
    let mut bench = bench().await;
    bench.interpose().unwrap();
    let watcher = client(&bench, "watcher", "watch").await;
    let open = client(&bench, "app", "open").await;
    run(&open, "BEGIN").await;
    run(&open, "INSERT INTO t VALUES (7)").await;
    if let Some(between) = &bench.between {
        between.close(Class::Session);
    }
    run(&open, "INSERT INTO t VALUES (8)").await;
    let want = ["crash connection_loss completed 2"];
    assert_eq!(rows(&watcher, MOVES).await, want);
    run(&open, "COMMIT").await;
    assert_eq!(bench.column("SELECT count(*) FROM t").await.unwrap(), ["3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_is_a_failover() {
    let mut bench = bench().await;
    let watcher = client(&bench, "watcher", "watch").await;
    let open = client(&bench, "app", "open").await;
    run(&open, "BEGIN").await;
    run(&open, "INSERT INTO t VALUES (7)").await;
    // The move begins before the server is back: no session finds it by itself.
    bench.server.crash();
    let (next, proxy) = (bench.next_topology().unwrap(), bench.proxy.clone());
    let (resumed, booted) = tokio::join!(proxy.resume(next), bench.server.boot());
    resumed.unwrap();
    booted.unwrap();
    bench.direct = bench.server.connect().await.unwrap();
    run(&open, "INSERT INTO t VALUES (8)").await;
    assert_eq!(rows(&watcher, MOVES).await, ["crash failover completed 2"]);
    run(&open, "COMMIT").await;
    assert_eq!(bench.column("SELECT count(*) FROM t").await.unwrap(), ["3"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_undone_drain_has_moved_nobody() {
    let bench = bench().await;
    let mut heard = bench.proxy.subscribe();
    let watcher = client(&bench, "watcher", "watch").await;
    let open = client(&bench, "app", "open").await;
    run(&open, "BEGIN").await;
    bench.drain().await.unwrap();
    bench.proxy.abort(Epoch(1)).await.unwrap();
    run(&open, "COMMIT").await;
    let sql = "SELECT count(*) FROM helios_proxy.session_migrations";
    assert_eq!(rows(&watcher, sql).await, ["0"]);
    assert!(events(&mut heard).is_empty());
    let scraped = scrape(&bench).await;
    assert_eq!(
        scraped.get("helios_session_migrations_successful"),
        Some(&0.0)
    );
    assert!(
        !scraped
            .keys()
            .any(|k| k.starts_with("helios_pause_seconds"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn only_who_may_read_all_statistics_sees_others() {
    let mut bench = bench().await;
    let (app, watcher) = (
        client(&bench, "app", "a").await,
        client(&bench, "watcher", "w").await,
    );
    let root = client(&bench, "postgres", "p").await;
    bench.switchover().await.unwrap();
    let users = "SELECT DISTINCT usename FROM helios_proxy.session_migrations ORDER BY 1";
    let counted = "SELECT DISTINCT usename FROM helios_proxy.protection ORDER BY 1";
    for sql in [users, counted] {
        assert_eq!(rows(&app, sql).await, ["app"]);
        for client in [&watcher, &root] {
            assert_eq!(rows(client, sql).await, ["app", "postgres", "watcher"]);
        }
    }
    // Nor in what the server was given to run.
    let sql = format!("{users}; SELECT current_query() LIKE '%watch' || 'er%'");
    assert_eq!(rows(&app, &sql).await, ["app", "f"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_sql_runs_over_the_rows() {
    let mut bench = bench().await;
    let mut root = client(&bench, "postgres", "it's \"a\" \\b").await;
    bench.switchover().await.unwrap();
    for (sql, want) in [
        ("SELECT count(*) FROM helios_proxy.session_migrations", "1"),
        (
            "SELECT session_migrations.application_name, helios_proxy.protection.reason \
             FROM helios_proxy.session_migrations JOIN helios_proxy.protection \
             USING (application_name)",
            "it's \"a\" \\b null",
        ),
        (
            "WITH m AS (SELECT * FROM helios_proxy.session_migrations WHERE session_id > 0) \
             SELECT max(duration) < '1 hour', pg_typeof(max(duration)) FROM m",
            "t interval",
        ),
        (
            "SELECT a.session_id = b.session_id FROM helios_proxy.session_migrations a, \
             helios_proxy.session_migrations b, t LIMIT 1",
            "t",
        ),
        ("TABLE helios_proxy.session_migrations LIMIT 0", ""),
    ] {
        let want: &[&str] = if want.is_empty() { &[] } else { &[want] };
        assert_eq!(rows(&root, sql).await, want, "{sql}");
    }
    // Rows of the moment for each execution of a prepared statement, also behind a move, which
    // prepares it anew; in a transaction whose reads are all compared.
    let sql = "SELECT count(*), $1::text FROM helios_proxy.session_migrations WHERE outcome = $1";
    let prepared = root.prepare(sql).await.unwrap();
    assert_eq!(prepared.params().len(), 1);
    let transaction = root
        .build_transaction()
        .isolation_level(tokio_postgres::IsolationLevel::RepeatableRead)
        .start()
        .await
        .unwrap();
    for moves in 1..4_i64 {
        let row = transaction
            .query_one(&prepared, &[&"completed"])
            .await
            .unwrap();
        let got: (i64, String) = (row.get(0), row.get(1));
        assert_eq!(got, (moves, "completed".into()));
        bench.switchover().await.unwrap();
    }
    transaction.commit().await.unwrap();
    // psql, without us
    let psql = std::process::Command::new("psql")
        .args(["-XAt", "-F,", "-d", &bench.conninfo()])
        .args([
            "-c",
            "COPY (SELECT outcome, count(*) FROM helios_proxy.session_migrations \
                       GROUP BY 1) TO STDOUT",
        ])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&psql.stdout), "completed\t4\n");
    // What is no table is an error of the server's, as ever.
    let error = root
        .batch_execute("SELECT * FROM helios_proxy.nothing")
        .await
        .unwrap_err();
    assert_eq!(error.code().unwrap().code(), "42P01");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mode_that_does_not_replay_says_so() {
    let engine = EngineOptions {
        mode: ReplayMode::Session,
        ..EngineOptions::default()
    };
    let mut bench = Bench::start(engine, "CREATE ROLE app LOGIN").await.unwrap();
    let till = client(&bench, "postgres", "till").await;
    run(&till, "BEGIN").await;
    run(&till, "COMMIT").await;
    run(&till, "SELECT 1").await;
    let want = ["protected 0 1", "transactions_not_replayed 1 0"];
    assert_eq!(rows(&till, COUNTS).await, want);
    run(&till, "BEGIN").await;
    let shown = bench.proxy.sessions();
    assert_eq!(
        shown[0].unprotected.as_deref(),
        Some("replay of transactions is switched off")
    );
    // A drain does not wait for those: there is always one.
    tokio::time::timeout(Duration::from_secs(60), bench.switchover())
        .await
        .unwrap_or_else(|_| panic!("the drain waits"))
        .unwrap();
}
