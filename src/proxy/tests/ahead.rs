//! Backends that are opened ahead of a planned move: what they are warmed up with, and that none of
//! it is left in the session that goes on with one.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)] // helpers of tests are tests

use bytes::BytesMut;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_wire::message::front;
use helios_wire::startup::startup_message;
use helios_wire::{ErrorFields, backend, peek_header};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::NoTls;

/// A client that says what it likes.
struct Plain(TcpStream, BytesMut);

impl Plain {
    async fn connect(bench: &Bench) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", bench.proxy.port())).await;
        let mut plain = Self(socket.unwrap(), BytesMut::new());
        let mut packet = BytesMut::new();
        let who = [("user", "postgres"), ("database", "postgres")];
        startup_message(&mut packet, 0, who).unwrap();
        plain.ask(&packet).await;
        plain
    }

    /// The answer up to ReadyForQuery: the first error, if there is one.
    async fn ask(&mut self, bytes: &[u8]) -> Option<ErrorFields> {
        self.0.write_all(bytes).await.unwrap();
        let mut error = None;
        loop {
            while let Some(header) = peek_header(&self.1).unwrap()
                && self.1.len() >= header.len
            {
                let frame = self.1.split_to(header.len);
                match header.tag {
                    backend::READY_FOR_QUERY => return error,
                    backend::ERROR_RESPONSE => {
                        error = error.or(Some(ErrorFields::parse(&frame[5..]).unwrap()));
                    }
                    _ => {}
                }
            }
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "closed");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_opened_ahead_has_planned_what_clients_run() {
    let schema = "CREATE TABLE accounts (id int PRIMARY KEY, balance int);
                  INSERT INTO accounts VALUES (1, 10), (2, 20);
                  CREATE ROLE stranger LOGIN;
                  CREATE FUNCTION note(n int) RETURNS int LANGUAGE sql IMMUTABLE AS 'SELECT n'";
    let mut bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    let (pays, calls, odd) = tokio::join!(bench.client(), bench.client(), bench.client());
    let (pays, calls, odd) = (pays.unwrap(), calls.unwrap(), odd.unwrap());
    let mut plain = Plain::connect(&bench).await;
    // With a parameter, with a function of the user's, and one that nobody could plan.
    let pay = "UPDATE accounts SET balance = balance - 1 WHERE id = $1";
    pays.execute(pay, &[&1_i32]).await.unwrap();
    calls.batch_execute("SELECT note(7)").await.unwrap();
    // Twice, so it comes first: the last one is what the server shows.
    let again = bench.client().await.unwrap();
    // Another user's is not shown to this one, in a backend of its own.
    let stranger = format!("{} user=stranger", bench.conninfo());
    let (stranger, connection) = tokio_postgres::connect(&stranger, NoTls).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let secret = "SELECT 1 WHERE 'secret' = 'secret'";
        stranger.batch_execute(secret).await.unwrap();
    }
    again.batch_execute("SELECT note(8)").await.unwrap();
    odd.batch_execute("SELECT 1 FROM missing")
        .await
        .unwrap_err();
    let candidate = bench.candidate().unwrap();
    bench.proxy.prepare(&candidate).await;
    bench.switchover().await.unwrap();
    let asked = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND query IN \
                 ('EXPLAIN UPDATE accounts SET balance = balance - 1 WHERE id = $1', \
                  'EXPLAIN SELECT 1 FROM missing')";
    // One for each session: none of them has needed it yet.
    assert_eq!(bench.column(asked).await.unwrap(), ["5"]);
    let shown = "SELECT usename FROM pg_stat_activity WHERE query LIKE '%secret%' \
                 AND query NOT LIKE '%usename%' AND query LIKE 'EXPLAIN%'";
    assert_eq!(bench.column(shown).await.unwrap(), ["stranger"]);
    // Nothing was executed, and the unnamed statement is not there.
    let balance = "SELECT balance FROM accounts WHERE id = 1";
    assert_eq!(bench.column(balance).await.unwrap(), ["9"]);
    let mut bind = BytesMut::new();
    front::bind(&mut bind, b"", b"", &[], &[Some(b"1")], &[]).unwrap();
    front::execute(&mut bind, b"", 0).unwrap();
    front::sync(&mut bind);
    let error = plain.ask(&bind).await.unwrap();
    assert_eq!(error.sqlstate.as_str(), "26000", "{error}");
    pays.execute(pay, &[&1_i32]).await.unwrap();
    assert_eq!(bench.column(balance).await.unwrap(), ["8"]);
}

/// What the server has run so far, by its log.
fn ran(bench: &Bench, what: &str) -> usize {
    bench.server.log().matches(what).count()
}

async fn logged(restore_ahead: bool) -> Bench {
    let options = EngineOptions {
        restore_ahead,
        ..EngineOptions::default()
    };
    let schema = "CREATE ROLE boss; CREATE SCHEMA app; CREATE TABLE app.t (v int); \
                  INSERT INTO app.t VALUES (1)";
    let bench = Bench::start(options, schema).await.unwrap();
    let log = "ALTER SYSTEM SET log_statement = 'all'";
    bench.direct.batch_execute(log).await.unwrap();
    bench
        .direct
        .batch_execute("SELECT pg_reload_conf()")
        .await
        .unwrap();
    bench
}

const SHOWN: &str = "SELECT current_setting('app.note', true), current_setting('search_path'), \
     current_user, (SELECT string_agg(name || ':' || statement, ';' ORDER BY name) \
     FROM pg_prepared_statements WHERE from_sql)";

async fn shown(client: &tokio_postgres::Client) -> Vec<Option<String>> {
    let messages = client.simple_query(SHOWN).await.unwrap();
    let row = messages.into_iter().find_map(|m| match m {
        tokio_postgres::SimpleQueryMessage::Row(row) => Some(row),
        _ => None,
    });
    let row = row.unwrap();
    (0..4).map(|at| row.get(at).map(str::to_owned)).collect()
}

async fn wait_for_reload(bench: &Bench, client: &tokio_postgres::Client) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while ran(bench, "is logged now") == 0 {
        assert!(std::time::Instant::now() < deadline, "nothing is logged");
        client
            .batch_execute("SELECT 'is logged now'")
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn state_restored_ahead_is_adopted_and_not_restored_again() {
    for ahead in [true, false] {
        let mut bench = logged(ahead).await;
        let client = bench.client().await.unwrap();
        wait_for_reload(&bench, &client).await;
        for sql in [
            "SET app.note = 'kept'; SET search_path = app",
            "PREPARE q (int) AS SELECT v + $1 FROM t",
        ] {
            client.batch_execute(sql).await.unwrap();
        }
        let by_protocol = client
            .prepare("SELECT v + $1::int4 FROM app.t")
            .await
            .unwrap();
        client.batch_execute("SET ROLE postgres").await.unwrap();
        let before = shown(&client).await;
        assert_eq!(before[0].as_deref(), Some("kept"));
        bench.proxy.prepare(&bench.candidate().unwrap()).await;
        // The client's own, and the one ahead of time.
        let prepared = |bench: &Bench| ran(bench, "PREPARE q (int) AS");
        assert_eq!(prepared(&bench), 1 + usize::from(ahead));
        let settings = ran(&bench, "set_config('app.note'");
        assert_eq!(settings, usize::from(ahead));
        bench.switchover().await.unwrap();
        assert_eq!(shown(&client).await, before);
        assert_eq!(prepared(&bench), 2, "ahead: {ahead}");
        assert_eq!(ran(&bench, "set_config('app.note'"), 1);
        let row = client.query_one(&by_protocol, &[&4_i32]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), 5);
        client.batch_execute("EXECUTE q (1)").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn state_that_changed_since_is_restored_anew() {
    let mut bench = logged(true).await;
    let client = bench.client().await.unwrap();
    for sql in [
        "SET app.note = 'old'; SET search_path = app",
        "PREPARE q AS SELECT 1",
        "PREPARE r AS SELECT 2",
    ] {
        client.batch_execute(sql).await.unwrap();
    }
    let gone = client.prepare("SELECT 7").await.unwrap();
    bench.proxy.prepare(&bench.candidate().unwrap()).await;
    client
        .batch_execute("SET app.note = 'new'; RESET search_path; DEALLOCATE q; SET ROLE boss")
        .await
        .unwrap();
    let newer = client.prepare("SELECT 8").await.unwrap();
    drop(gone);
    let before = shown(&client).await;
    bench.switchover().await.unwrap();
    assert_eq!(shown(&client).await, before);
    assert_eq!(before[3].as_deref(), Some("r:PREPARE r AS SELECT 2"));
    let refused = client.batch_execute("EXECUTE q").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "26000");
    assert_eq!(
        client
            .query_one(&newer, &[])
            .await
            .unwrap()
            .get::<_, i32>(0),
        8
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_goes_on_behind_state_restored_ahead() {
    let mut bench = logged(true).await;
    let client = bench.client().await.unwrap();
    client
        .batch_execute("SET app.note = 'outside'")
        .await
        .unwrap();
    client
        .batch_execute(
            "BEGIN; SET LOCAL app.note = 'inside'; SET search_path = app; \
             PREPARE inside AS SELECT 3; UPDATE app.t SET v = v + 1",
        )
        .await
        .unwrap();
    bench.proxy.prepare(&bench.candidate().unwrap()).await;
    let before = shown(&client).await;
    bench.switchover().await.unwrap();
    assert_eq!(shown(&client).await, before);
    client.batch_execute("COMMIT").await.unwrap();
    let after = shown(&client).await;
    assert_eq!(after[0].as_deref(), Some("outside"));
    assert_eq!(after[1].as_deref(), Some("app"));
    let rows = bench.column("SELECT v FROM app.t").await.unwrap();
    assert_eq!(rows, ["2"]);
}

/// A session that holds a lock, and one with temporary tables, want a bare backend.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_acquired_since_finds_a_bare_backend() {
    let mut bench = logged(true).await;
    let (locks, tables) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    for client in [&locks, &tables] {
        let sql = "SET app.note = 'kept'; SET statement_timeout = '1h'";
        client.batch_execute(sql).await.unwrap();
    }
    bench.proxy.prepare(&bench.candidate().unwrap()).await;
    locks
        .batch_execute("SELECT pg_advisory_lock(42)")
        .await
        .unwrap();
    tables
        .batch_execute("CREATE TEMP TABLE mine AS SELECT 1 AS a")
        .await
        .unwrap();
    bench.switchover().await.unwrap();
    for client in [&locks, &tables] {
        assert_eq!(shown(client).await[0].as_deref(), Some("kept"));
        let timeout = client
            .query_one("SHOW statement_timeout", &[])
            .await
            .unwrap();
        assert_eq!(timeout.get::<_, String>(0), "1h");
    }
    let held = "SELECT objid FROM pg_locks WHERE locktype = 'advisory'";
    assert_eq!(bench.column(held).await.unwrap(), ["42"]);
    let row = tables.query_one("SELECT a FROM mine", &[]).await.unwrap();
    assert_eq!(row.get::<_, i32>(0), 1);
}
