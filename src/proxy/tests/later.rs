//! Temporary tables that are made again behind a move when a statement may need them: which are
//! there when, as the database shows it, and that no statement ever misses one.

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)] // helpers of tests are tests

use std::time::{Duration, Instant};

use bytes::BytesMut;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use helios_wire::message::front;
use helios_wire::startup::startup_message;
use helios_wire::{ErrorFields, backend, peek_header};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_postgres::{Client, SimpleQueryMessage};

/// What a step may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(30);

const SCHEMA: &str = "\
    CREATE TABLE p (a int); INSERT INTO p VALUES (1), (2); \
    CREATE TABLE t1 (permanent int); \
    CREATE TABLE numbered (id serial, a int); \
    CREATE FUNCTION counts() RETURNS bigint LANGUAGE plpgsql AS \
    'BEGIN RETURN (SELECT count(*) FROM t2); END'; \
    CREATE VIEW counting AS SELECT counts() AS n; \
    CREATE TABLE defaults (n bigint DEFAULT counts()); \
    CREATE FUNCTION take_note() RETURNS trigger LANGUAGE plpgsql AS \
    'BEGIN INSERT INTO p SELECT id FROM t2 WHERE id = 1; RETURN NULL; END'; \
    CREATE TABLE triggers (a int); \
    CREATE TRIGGER noting AFTER INSERT ON triggers FOR EACH ROW EXECUTE FUNCTION take_note(); \
    CREATE TABLE parent (id int PRIMARY KEY); \
    CREATE TABLE child (id int REFERENCES parent ON DELETE CASCADE); \
    CREATE TRIGGER noting AFTER DELETE ON child FOR EACH ROW EXECUTE FUNCTION take_note(); \
    INSERT INTO parent VALUES (1); INSERT INTO child VALUES (1); \
    CREATE FUNCTION plus(int, int) RETURNS int LANGUAGE sql AS 'SELECT $1 + $2'; \
    CREATE ROLE worker";

async fn start(after: Duration) -> Bench {
    let options = EngineOptions {
        make_later_after: after,
        ..EngineOptions::default()
    };
    let bench = Bench::start(options, SCHEMA).await.unwrap();
    bench.known().await.unwrap();
    bench
}

/// A server that makes nothing in the background, as far as a test can see.
async fn bench() -> Bench {
    start(Duration::from_secs(3600)).await
}

const MADE: &str = "\
    CREATE TEMP TABLE t0 (id int PRIMARY KEY, note text); \
    INSERT INTO t0 SELECT n, 'zero ' || n FROM generate_series(1, 100) n; \
    CREATE TEMP TABLE t1 (id int PRIMARY KEY, note text); \
    INSERT INTO t1 SELECT n, 'one ' || n FROM generate_series(1, 100) n; \
    CREATE TEMP TABLE t2 (id int PRIMARY KEY, note text); \
    INSERT INTO t2 SELECT n, 'two ' || n FROM generate_series(1, 100) n; \
    CREATE TEMP TABLE a3 (id int); INSERT INTO a3 VALUES (3); \
    CREATE TEMP VIEW v AS SELECT t1.id FROM t1 JOIN a3 USING (id)";

/// Everything that the session has, by its own queries: it has all made.
const SHOWN: &str = "\
    SELECT md5(string_agg(t::text, ';' ORDER BY id)) FROM pg_temp.t0 t; \
    SELECT md5(string_agg(t::text, ';' ORDER BY id)) FROM pg_temp.t1 t; \
    SELECT md5(string_agg(t::text, ';' ORDER BY id)) FROM pg_temp.t2 t; \
    SELECT md5(string_agg(t::text, ';' ORDER BY id)) FROM pg_temp.v t; \
    SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class \
    WHERE relnamespace = pg_my_temp_schema()";

async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await;
    let row = |m: SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("null").to_owned()),
        _ => None,
    };
    let messages = messages.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    messages.into_iter().filter_map(row).collect()
}

async fn with_tables(bench: &Bench) -> Client {
    let client = bench.client().await.unwrap();
    client.batch_execute(MADE).await.unwrap();
    protected(bench).await;
    client
}

/// Waits until the list of sessions calls the only one protected.
async fn protected(bench: &Bench) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sessions = bench.proxy.sessions();
        match sessions.as_slice() {
            [one] if one.unprotected.is_none() => return,
            [one] => assert!(Instant::now() < deadline, "{:?}", one.unprotected),
            _ => assert!(Instant::now() < deadline, "{sessions:?}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until all sessions have ended, and their tables with them.
async fn alone(bench: &Bench) {
    let deadline = Instant::now() + PATIENCE;
    while !bench.proxy.sessions().is_empty() || !there(bench).await.is_empty() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The temporary tables and views that there are, of all sessions.
async fn there(bench: &Bench) -> String {
    let sql = "SELECT string_agg(relname, ' ' ORDER BY relname) FROM pg_class \
               WHERE relpersistence = 't' AND relkind IN ('r', 'v')";
    let found = bench.column(sql).await.unwrap();
    found[0].replace("null", "")
}

const ALL: &str = "a3 t0 t1 t2 v";

/// A statement, what is there behind it, and its first results.
const REACHES: &[(&str, &str, &[&str])] = &[
    ("SELECT 1", "", &["1"]),
    ("SELECT count(*), max(a) FROM p", "", &["2"]),
    (
        "INSERT INTO p VALUES (3); DELETE FROM p WHERE a = 3",
        "",
        &[],
    ),
    (
        "SELECT count(*) FROM p WHERE a::text = 't0' OR 't1' = 't2' -- t1",
        "",
        &["0"],
    ),
    ("INSERT INTO numbered (a) VALUES (1)", "", &[]),
    ("UPDATE parent SET id = id WHERE false", ALL, &[]),
    ("SELECT count(*) FROM t0", "t0", &["100"]),
    ("SELECT count(*) FROM \"t0\" JOIN p ON id = a", "t0", &["2"]),
    (
        "WITH x AS (SELECT id FROM t2 WHERE id < 4) SELECT count(*) FROM x",
        "t2",
        &["3"],
    ),
    (
        "UPDATE t2 SET note = t0.note FROM t0 WHERE t0.id = t2.id",
        "t0 t2",
        &[],
    ),
    // What belongs together comes together; a temporary table hides another one of its name.
    ("SELECT count(*) FROM v", "a3 t1 v", &["1"]),
    ("SELECT count(*) FROM t1", "a3 t1 v", &["100"]),
    ("SELECT count(*) FROM public.t1", "a3 t1 v", &["0"]),
    // What is named leads on to others.
    ("SELECT counts()", ALL, &["100"]),
    ("SELECT n FROM counting", ALL, &["100"]),
    ("INSERT INTO triggers VALUES (1)", ALL, &[]),
    ("INSERT INTO defaults DEFAULT VALUES", ALL, &[]),
    ("SELECT plus(1, 2)", ALL, &["3"]),
    ("DELETE FROM parent", ALL, &[]),
    // Nobody knows.
    ("BEGIN; SELECT count(*) FROM p; COMMIT", ALL, &["4"]),
    ("DO 'BEGIN PERFORM counts(); END'", ALL, &[]),
    ("SELECT 't2'::regclass", ALL, &["t2"]),
    ("SELECT count(*) FROM pg_temp.t2", ALL, &["100"]),
    (
        "SELECT count(*) FROM pg_class WHERE relname = 't2'",
        ALL,
        &["1"],
    ),
    (
        "SELECT query_to_xml('SELECT count(*) FROM t2', true, true, '') IS NOT NULL",
        ALL,
        &["t"],
    ),
    (
        "EXPLAIN (COSTS OFF) DELETE FROM t2 WHERE false",
        ALL,
        &["Delete on t2"],
    ),
    ("SET application_name = 'x'", ALL, &[]),
    ("SELECT 5 INTO TEMP t4", "a3 t0 t1 t2 t4 v", &[]),
    ("DISCARD TEMP", "", &[]),
];

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_waits_for_what_it_may_reach() {
    let mut bench = bench().await;
    for (sql, expected, results) in REACHES {
        let client = with_tables(&bench).await;
        bench.switchover().await.unwrap();
        let got = rows(&client, sql).await;
        assert_eq!(
            got.get(..results.len().min(got.len())).unwrap(),
            *results,
            "{sql}"
        );
        assert_eq!(there(&bench).await, *expected, "{sql}");
        drop(client);
        alone(&bench).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn by_the_extended_protocol_too() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    // Prepared before: its table is there at once, that of the others is not.
    let before = client
        .prepare("SELECT count(*) FROM t0 WHERE id > $1")
        .await
        .unwrap();
    let nothing = client.prepare("SELECT $1::int4 + 1").await.unwrap();
    for _ in 0..2 {
        protected(&bench).await;
        bench.switchover().await.unwrap();
        let row = client.query_one(&nothing, &[&4_i32]).await.unwrap();
        assert_eq!(row.get::<_, i32>(0), 5);
        assert_eq!(there(&bench).await, "t0");
        let row = client.query_one(&before, &[&90_i32]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 10);
        assert_eq!(there(&bench).await, "t0");
        let row = client
            .query_one("SELECT count(*) FROM t2", &[])
            .await
            .unwrap();
        assert_eq!(row.get::<_, i64>(0), 100);
        assert_eq!(there(&bench).await, "t0 t2");
        // The rest of it, so that it can be read.
        client.batch_execute("SELECT counts()").await.unwrap();
        assert_eq!(there(&bench).await, ALL);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_kept_is_what_is_restored_though_nothing_was_made_between() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    let before = rows(&client, SHOWN).await;
    protected(&bench).await;
    for turn in 0..6 {
        if turn % 2 == 0 {
            bench.switchover().await.unwrap();
        } else {
            bench.crash().await.unwrap();
            bench.resume().await.unwrap();
        }
        assert_eq!(rows(&client, "SELECT count(*) FROM p").await, ["2"]);
        assert_eq!(rows(&client, "SELECT 7").await, ["7"]);
        assert_eq!(there(&bench).await, "", "turn {turn}");
        protected(&bench).await;
    }
    // Read by nobody since it was made, it is there all the same.
    assert_eq!(rows(&client, SHOWN).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_changed_between_is_read_by_a_planned_move_and_told_to_be_lost_by_a_crash() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    bench.switchover().await.unwrap();
    client
        .batch_execute("UPDATE t2 SET note = 'changed'")
        .await
        .unwrap();
    assert_eq!(there(&bench).await, "t2");
    bench.switchover().await.unwrap();
    let changed = "SELECT count(*) FROM t2 WHERE note = 'changed'";
    assert_eq!(rows(&client, changed).await, ["100"]);
    assert_eq!(rows(&client, "SELECT count(*) FROM t0").await, ["100"]);
    client.batch_execute("DELETE FROM t2").await.unwrap();
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    let refused = client.batch_execute("SELECT 1").await.unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "40001");
    let detail = refused
        .as_db_error()
        .unwrap()
        .detail()
        .unwrap_or_default()
        .to_owned();
    assert!(detail.contains("changed since they were read"), "{detail}");
    // What the server has left of the backend that died is nobody's.
    let gone = client.batch_execute("SELECT * FROM t0").await.unwrap_err();
    assert_eq!(gone.code().unwrap().code(), "42P01");
}

/// Rows that are changed before the rest is made are read behind that, and so are objects that are
/// changed afterwards.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_changed_before_and_behind_the_making_of_the_rest_is_kept() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    for turn in 1..=3 {
        bench.switchover().await.unwrap();
        let change = format!("UPDATE t2 SET note = 'changed {turn}' WHERE id <= {turn}");
        client.batch_execute(&change).await.unwrap();
        // All are there in front of this one.
        let add = format!("ALTER TABLE t0 ADD COLUMN more_{turn} int DEFAULT {turn}");
        client.batch_execute(&add).await.unwrap();
        client
            .batch_execute("DELETE FROM t1 WHERE id > 90")
            .await
            .unwrap();
        protected(&bench).await;
        bench.crash().await.unwrap();
        bench.resume().await.unwrap();
        let changed = format!("SELECT count(*) FROM t2 WHERE note = 'changed {turn}'");
        assert_eq!(rows(&client, &changed).await, [turn.to_string()]);
        let more = format!("SELECT sum(more_{turn}) FROM t0");
        assert_eq!(rows(&client, &more).await, [(100 * turn).to_string()]);
        assert_eq!(rows(&client, "SELECT count(*) FROM t1").await, ["90"]);
        client.batch_execute("DISCARD SEQUENCES").await.unwrap();
        protected(&bench).await;
    }
}

/// Backends that a prepared move has opened, by what they run last before their session comes.
async fn opened_ahead(bench: &Bench) -> String {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle' AND \
               query LIKE ANY ('{BEGIN; SELECT relname FROM pg_catalog.pg_class %,EXPLAIN %,\
               select count(distinct query) from pg_stat_activity %}')";
    bench.column(sql).await.unwrap().remove(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn where_many_have_tables_those_that_are_idle_get_no_backend_ahead() {
    for (owners_ahead, expected) in [(3, "4"), (2, "2")] {
        let options = EngineOptions {
            make_later_after: Duration::from_secs(3600),
            leave_ahead_from: 1,
            owners_ahead,
            ..EngineOptions::default()
        };
        let mut bench = Bench::start(options, SCHEMA).await.unwrap();
        bench.known().await.unwrap();
        let (one, two) = (bench.client().await.unwrap(), bench.client().await.unwrap());
        let (busy, plain) = (bench.client().await.unwrap(), bench.client().await.unwrap());
        for owner in [&one, &two, &busy] {
            owner.batch_execute(MADE).await.unwrap();
        }
        plain.batch_execute("SELECT 1").await.unwrap();
        let before = rows(&one, SHOWN).await;
        rows(&two, "SELECT 1").await;
        let deadline = Instant::now() + PATIENCE;
        while bench
            .proxy
            .sessions()
            .iter()
            .any(|s| s.unprotected.is_some())
        {
            assert!(Instant::now() < deadline, "{:?}", bench.proxy.sessions());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        busy.batch_execute("BEGIN; DELETE FROM t0 WHERE id > 50")
            .await
            .unwrap();
        let candidate = bench.candidate().unwrap();
        bench.proxy.prepare(&candidate).await;
        assert_eq!(opened_ahead(&bench).await, expected, "{owners_ahead}");
        bench.switchover().await.unwrap();
        assert_eq!(rows(&busy, "SELECT count(*) FROM t0").await, ["50"]);
        busy.batch_execute("ROLLBACK").await.unwrap();
        for owner in [&one, &two, &busy] {
            assert_eq!(rows(owner, SHOWN).await, before);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_has_them_all_and_goes_on_with_them() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    bench.switchover().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    assert_eq!(there(&bench).await, ALL);
    client
        .batch_execute("UPDATE t2 SET note = 'in it'")
        .await
        .unwrap();
    client
        .batch_execute("INSERT INTO p SELECT id FROM t2 WHERE note = 'in it'")
        .await
        .unwrap();
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    let mine = "SELECT count(*) FROM t2 WHERE note = 'in it'";
    assert_eq!(rows(&client, mine).await, ["100"]);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(rows(&client, mine).await, ["100"]);
    assert_eq!(
        bench.column("SELECT count(*) FROM p").await.unwrap(),
        ["102"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_statement_they_are_made_in_the_background() {
    let mut bench = start(Duration::from_millis(50)).await;
    let client = with_tables(&bench).await;
    let before = rows(&client, SHOWN).await;
    protected(&bench).await;
    bench.switchover().await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while there(&bench).await != ALL {
        assert!(Instant::now() < deadline, "{}", there(&bench).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Nothing has changed them, and that is known.
    protected(&bench).await;
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    assert_eq!(rows(&client, SHOWN).await, before);
}

/// They belong to who has logged in, whatever the session has set since; what it knows of sequences
/// is not touched.
#[tokio::test(flavor = "multi_thread")]
async fn the_sessions_state_does_not_show_in_them() {
    let mut bench = bench().await;
    let client = with_tables(&bench).await;
    let set = "GRANT ALL ON p, numbered, numbered_id_seq TO worker; SET array_nulls = off; \
               SET statement_timeout = '1min'; SET ROLE worker; SET default_transaction_read_only = on";
    client.batch_execute(set).await.unwrap();
    protected(&bench).await;
    bench.switchover().await.unwrap();
    client
        .batch_execute("SET default_transaction_read_only = off; RESET ROLE")
        .await
        .unwrap();
    let owners = "SELECT DISTINCT relowner::regrole FROM pg_class WHERE relpersistence = 't'";
    assert_eq!(bench.column(owners).await.unwrap(), ["postgres"]);
    protected(&bench).await;
    bench.switchover().await.unwrap();
    client
        .batch_execute("INSERT INTO numbered (a) VALUES (9)")
        .await
        .unwrap();
    assert_eq!(rows(&client, "SELECT count(*) FROM t2").await, ["100"]);
    assert_eq!(there(&bench).await, "t2");
    let used = rows(&client, "SELECT lastval() = max(id) FROM numbered").await;
    assert_eq!(used, ["t"]);
}

/// A client that says what it likes.
struct Plain(TcpStream, BytesMut);

impl Plain {
    async fn connect(bench: &Bench) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", bench.proxy.port())).await;
        let mut plain = Self(socket.unwrap(), BytesMut::new());
        let mut packet = BytesMut::new();
        let who = [("user", "postgres"), ("database", "postgres")];
        startup_message(&mut packet, 0, who).unwrap();
        plain.ask(&packet, 1).await.unwrap();
        plain
    }

    async fn query(&mut self, sql: &str) {
        let mut out = BytesMut::new();
        front::query(&mut out, sql.as_bytes()).unwrap();
        self.ask(&out, 1).await.unwrap();
    }

    /// The first columns of rows up to the last ReadyForQuery of so many.
    async fn ask(&mut self, bytes: &[u8], mut readies: usize) -> Result<Vec<String>, ErrorFields> {
        self.0.write_all(bytes).await.unwrap();
        let (mut error, mut rows) = (None, Vec::new());
        loop {
            while let Some(header) = peek_header(&self.1).unwrap()
                && self.1.len() >= header.len
            {
                let frame = self.1.split_to(header.len);
                match header.tag {
                    backend::READY_FOR_QUERY => readies -= 1,
                    backend::ERROR_RESPONSE => {
                        error = error.or(Some(ErrorFields::parse(&frame[5..]).unwrap()));
                    }
                    backend::DATA_ROW => {
                        rows.push(String::from_utf8_lossy(&frame[11..]).into_owned());
                    }
                    _ => {}
                }
                if readies == 0 {
                    return error.map_or(Ok(rows), Err);
                }
            }
            assert_ne!(self.0.read_buf(&mut self.1).await.unwrap(), 0, "closed");
        }
    }
}

fn parse(out: &mut BytesMut, name: &[u8], sql: &str) {
    front::parse(out, name, sql.as_bytes(), &[]).unwrap();
}

fn run(out: &mut BytesMut, name: &[u8]) {
    front::bind(out, b"", name, &[], &[], &[]).unwrap();
    front::execute(out, b"", 0).unwrap();
    front::sync(out);
}

#[tokio::test(flavor = "multi_thread")]
async fn pipelines_and_the_unnamed_statement() {
    let mut bench = bench().await;
    let mut plain = Plain::connect(&bench).await;
    plain.query(MADE).await;
    protected(&bench).await;
    bench.switchover().await.unwrap();
    // The unnamed statement outlives what is made for another one behind it.
    let mut out = BytesMut::new();
    parse(&mut out, b"", "SELECT 42::text");
    front::sync(&mut out);
    assert_eq!(plain.ask(&out, 1).await.unwrap(), [""; 0]);
    out.clear();
    parse(&mut out, b"s", "SELECT count(*)::text FROM t2");
    front::sync(&mut out);
    assert_eq!(plain.ask(&out, 1).await.unwrap(), [""; 0]);
    assert_eq!(there(&bench).await, "t2");
    out.clear();
    run(&mut out, b"");
    assert_eq!(plain.ask(&out, 1).await.unwrap(), ["42"]);
    // Several exchanges at once: each has what it needs.
    out.clear();
    for sql in [
        "SELECT 'a'",
        "SELECT count(*)::text FROM t0",
        "SELECT counts()::text",
        "SELECT 'b'",
    ] {
        parse(&mut out, b"", sql);
        run(&mut out, b"");
    }
    assert_eq!(plain.ask(&out, 4).await.unwrap(), ["a", "100", "100", "b"]);
    // One exchange that needs something only in its middle, and whose end comes late.
    bench.switchover().await.unwrap();
    out.clear();
    parse(&mut out, b"", "SELECT 'begun'");
    front::bind(&mut out, b"", b"", &[], &[], &[]).unwrap();
    front::execute(&mut out, b"", 0).unwrap();
    front::flush(&mut out);
    plain.0.write_all(&out).await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    out.clear();
    parse(&mut out, b"", "SELECT count(*)::text FROM t2");
    run(&mut out, b"");
    assert_eq!(plain.ask(&out, 1).await.unwrap(), ["begun", "100"]);
}
