//! A long transaction gets its values of sequences ahead, in one go, and runs again beside others.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::Duration;

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::{Client, SimpleQueryMessage};

const TABLE: &str = "CREATE TABLE t (id serial PRIMARY KEY, v int)";
const INSERT: &str = "INSERT INTO t (v) VALUES (1) RETURNING id";
/// So many values that others took in between make a transaction long enough.
const GAPS: usize = 300;

/// The server's log tells how often sequences were set back.
async fn start_with(engine: EngineOptions, schema: &str) -> Bench {
    let bench = Bench::start(engine, schema).await.unwrap();
    let tell = "ALTER SYSTEM SET log_min_messages = notice";
    bench.direct.batch_execute(tell).await.unwrap();
    numbers(&bench.direct, "SELECT pg_reload_conf()::int").await;
    while bench.column("SHOW log_min_messages").await.unwrap() != ["notice"] {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench
}

async fn start(schema: &str) -> Bench {
    start_with(EngineOptions::default(), schema).await
}

fn set_backs(bench: &Bench) -> usize {
    bench.server.log().matches("NOTICE:  helios: sets").count()
}

/// The first column of all rows of a simple query, as numbers.
async fn numbers(client: &Client, sql: &str) -> Vec<i64> {
    let messages = client.simple_query(sql).await.unwrap();
    let rows = messages.iter().filter_map(|m| match m {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap().parse().unwrap()),
        _ => None,
    });
    rows.collect()
}

/// Draws in turns, so that no two values of `client` follow each other; what each has seen.
async fn in_turns(client: &Client, other: &Client, sql: &str) -> (Vec<i64>, Vec<i64>) {
    let (mut seen, mut others) = (Vec::new(), Vec::new());
    for _ in 0..GAPS {
        seen.extend(numbers(client, sql).await);
        others.extend(numbers(other, sql).await);
    }
    (seen, others)
}

/// All rows are those that were seen, once each, and what comes next is behind them.
async fn all_there(bench: &Bench, mut seen: Vec<i64>) {
    seen.sort_unstable();
    let rows = numbers(&bench.direct, "SELECT id FROM t ORDER BY 1").await;
    assert_eq!(rows, seen);
    let next = numbers(&bench.direct, INSERT).await;
    assert!(next.first() > seen.last(), "{next:?} {:?}", seen.last());
}

/// Nothing of how it was done is left.
async fn nothing_is_left(bench: &Bench) {
    let cached = "SELECT count(*) FROM pg_sequence WHERE seqcache <> 1 OR seqmin <> 1";
    assert_eq!(numbers(&bench.direct, cached).await, [0]);
    let made = "SELECT count(*) FROM pg_proc WHERE proname LIKE 'helios%'";
    assert_eq!(numbers(&bench.direct, made).await, [0]);
    let granted = "SELECT count(*) FROM pg_namespace, aclexplode(nspacl) \
                   WHERE nspname LIKE 'pg_temp%' AND grantee = 0";
    assert_eq!(numbers(&bench.direct, granted).await, [0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_among_those_of_others_come_again() {
    for planned in [true, false] {
        let mut bench = start(TABLE).await;
        let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
        client.batch_execute("BEGIN").await.unwrap();
        let (mut seen, others) = in_turns(&client, &other, INSERT).await;
        assert_eq!(seen.last(), Some(&599));
        if planned {
            bench.switchover().await.unwrap();
        } else {
            bench.resume().await.unwrap();
        }
        assert_eq!(set_backs(&bench), 1);
        seen.extend(numbers(&client, INSERT).await);
        let current = numbers(&client, "SELECT currval('t_id_seq')").await;
        assert_eq!(current.last(), seen.last());
        client.batch_execute("COMMIT").await.unwrap();
        seen.extend(others);
        all_there(&bench, seen).await;
        nothing_is_left(&bench).await;
    }
}

/// The rest takes longer than the barrier holds new work back: it goes on beside others who draw.
#[tokio::test(flavor = "multi_thread")]
async fn what_takes_longer_than_the_barrier_gets_its_values() {
    for planned in [true, false] {
        let engine = EngineOptions {
            barrier_limit: Duration::from_secs(1),
            ..EngineOptions::default()
        };
        let mut bench = start_with(engine, TABLE).await;
        let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
        client.batch_execute("BEGIN").await.unwrap();
        let (mut seen, mut others) = in_turns(&client, &other, INSERT).await;
        let sleep = "SELECT pg_sleep(2)";
        client.batch_execute(sleep).await.unwrap();
        seen.extend(numbers(&client, INSERT).await);
        if planned {
            bench.switchover().await.unwrap();
        } else {
            bench.resume().await.unwrap();
        }
        for _ in 0..3 {
            others.extend(numbers(&other, INSERT).await);
        }
        let sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        assert_eq!(numbers(&bench.direct, sleeps).await, [1], "it is not over");
        seen.extend(numbers(&client, INSERT).await);
        client.batch_execute("COMMIT").await.unwrap();
        assert_eq!(set_backs(&bench), 1);
        seen.extend(others);
        all_there(&bench, seen).await;
    }
}

/// Another who has seen values is not stopped by it, though it takes its turn behind.
#[tokio::test(flavor = "multi_thread")]
async fn others_have_their_turn_meanwhile() {
    let mut bench = start(&format!(
        "{TABLE}; CREATE TABLE u (id serial PRIMARY KEY, v int)"
    ))
    .await;
    let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    client.batch_execute("BEGIN").await.unwrap();
    let (mut seen, others) = in_turns(&client, &other, INSERT).await;
    client.batch_execute("SELECT pg_sleep(3)").await.unwrap();
    seen.extend(numbers(&client, INSERT).await);
    let mut short = Vec::new();
    for _ in 0..5 {
        let one = bench.client().await.unwrap();
        one.batch_execute("BEGIN; SELECT pg_sleep(0.1)")
            .await
            .unwrap();
        let insert = "INSERT INTO u (v) VALUES (1) RETURNING id";
        let first = numbers(&one, insert).await;
        short.push((one, first));
    }
    bench.resume().await.unwrap();
    for (one, _) in &short {
        one.batch_execute("COMMIT").await.unwrap();
    }
    client.batch_execute("COMMIT").await.unwrap();
    let ids: Vec<i64> = short.into_iter().flat_map(|(_, ids)| ids).collect();
    assert_eq!(
        numbers(&bench.direct, "SELECT id FROM u ORDER BY 1").await,
        ids
    );
    seen.extend(others);
    all_there(&bench, seen).await;
}

/// Downward, in steps, of several tables and by name, by statements of both protocols.
#[tokio::test(flavor = "multi_thread")]
async fn sequences_of_any_kind() {
    let mut bench = start(
        "CREATE TABLE t (id smallint GENERATED ALWAYS AS IDENTITY, \
         n bigint GENERATED BY DEFAULT AS IDENTITY (INCREMENT -7 MINVALUE -100000 START -1)); \
         CREATE SCHEMA hidden; CREATE SEQUENCE hidden.s INCREMENT 50 MINVALUE 10 START 10",
    )
    .await;
    let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    let both = "INSERT INTO t DEFAULT VALUES RETURNING id, n";
    let next = "SELECT nextval('s')";
    for client in [&client, &other] {
        client
            .batch_execute("SET search_path = public, hidden")
            .await
            .unwrap();
    }
    let prepared = client.prepare(both).await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let (mut ids, mut downward, mut named) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..GAPS {
        let row = client.query_one(&prepared, &[]).await.unwrap();
        ids.push(i64::from(row.get::<_, i16>(0)));
        downward.push(row.get::<_, i64>(1));
        named.extend(numbers(&client, next).await);
        numbers(&other, both).await;
        numbers(&other, next).await;
    }
    bench.switchover().await.unwrap();
    assert_eq!(set_backs(&bench), 1);
    named.extend(numbers(&client, next).await);
    client.batch_execute("COMMIT").await.unwrap();
    let ours = "FROM t WHERE xmin = (SELECT xmin FROM t WHERE id = 1)";
    let rows = numbers(&bench.direct, &format!("SELECT id {ours} ORDER BY 1")).await;
    assert_eq!(rows, ids);
    let rows = numbers(&bench.direct, &format!("SELECT n {ours} ORDER BY 1 DESC")).await;
    assert_eq!(rows, downward);
    assert_eq!((ids[1], downward[1], named[1]), (3, -15, 110));
    assert!(
        numbers(&bench.direct, "SELECT nextval('hidden.s')")
            .await
            .first()
            > named.last()
    );
    let left = "SELECT seqcache FROM pg_sequence UNION SELECT 1 ORDER BY 1";
    assert_eq!(numbers(&bench.direct, left).await, [1]);
}

/// Values that a trigger draws, unseen, lie between those that are returned: all of them are this
/// transaction's, and it draws them again.
#[tokio::test(flavor = "multi_thread")]
async fn what_it_draws_unseen_in_between_comes_again() {
    let mut bench = start(
        "CREATE TABLE t (id serial PRIMARY KEY, v int, hidden int); \
         CREATE FUNCTION draw() RETURNS trigger LANGUAGE plpgsql \
         AS 'BEGIN NEW.hidden := nextval(''t_id_seq''); RETURN NEW; END'; \
         CREATE TRIGGER draw AFTER INSERT ON t FOR EACH ROW EXECUTE FUNCTION draw()",
    )
    .await;
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..GAPS {
        seen.extend(numbers(&client, INSERT).await);
    }
    assert_eq!(seen[..3], [1, 3, 5]);
    bench.switchover().await.unwrap();
    seen.extend(numbers(&client, INSERT).await);
    client.batch_execute("COMMIT").await.unwrap();
    all_there(&bench, seen).await;
}

/// Others have drawn as well, and what is drawn unseen, again, may be theirs: honest, and nobody gets
/// a value twice.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_anothers_is_not_drawn() {
    let mut bench = start(
        "CREATE TABLE t (id serial, v int); CREATE TABLE hidden (id int); \
         CREATE FUNCTION draw() RETURNS trigger LANGUAGE plpgsql \
         AS 'BEGIN INSERT INTO hidden VALUES (nextval(''t_id_seq'')); RETURN NULL; END'; \
         CREATE TRIGGER draw AFTER INSERT ON t FOR EACH ROW WHEN (NEW.v = 1) \
         EXECUTE FUNCTION draw()",
    )
    .await;
    let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    client.batch_execute("BEGIN").await.unwrap();
    for _ in 0..GAPS {
        numbers(&client, INSERT).await;
        numbers(&other, "INSERT INTO t (v) VALUES (2) RETURNING id").await;
    }
    bench.switchover().await.unwrap();
    match client.batch_execute("COMMIT").await {
        Ok(()) => {}
        Err(told) => assert_eq!(told.code().unwrap().code(), "40001", "{told}"),
    }
    numbers(&bench.direct, "INSERT INTO t (v) VALUES (1) RETURNING id").await;
    let all = "SELECT id FROM t UNION ALL SELECT id FROM hidden ORDER BY 1";
    let all = numbers(&bench.direct, all).await;
    assert!(all.is_sorted_by(|x, y| x < y), "{all:?}");
    nothing_is_left(&bench).await;
}

/// The client chooses its values, and the sequence has given none of them: what was taken ahead would
/// be given to it next. Statements run again one by one then.
#[tokio::test(flavor = "multi_thread")]
async fn values_that_the_client_chose_are_not_given_to_it_again() {
    let mut bench = start(&format!("{TABLE}; CREATE SEQUENCE s")).await;
    let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    client.batch_execute("BEGIN").await.unwrap();
    let mut seen = Vec::new();
    for n in 0..GAPS {
        let chosen = format!("INSERT INTO t VALUES ({}, 1) RETURNING id", 1000 + n);
        seen.extend(numbers(&client, &chosen).await);
        for client in [&client, &other] {
            numbers(client, "SELECT nextval('s')").await;
        }
    }
    bench.switchover().await.unwrap();
    assert!(set_backs(&bench) > 1);
    seen.extend(numbers(&client, INSERT).await);
    client.batch_execute("COMMIT").await.unwrap();
    seen.sort_unstable();
    let rows = numbers(&bench.direct, "SELECT id FROM t ORDER BY 1").await;
    assert_eq!(rows, seen);
    nothing_is_left(&bench).await;
}

/// Settings that stand in the way of writing in front of a transaction do not.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_session_has_set() {
    let mut bench = start(&format!(
        "{TABLE}; CREATE ROLE teller; GRANT INSERT, SELECT ON t TO teller; \
         GRANT USAGE ON SEQUENCE t_id_seq TO teller"
    ))
    .await;
    let (client, other) = (bench.client().await.unwrap(), bench.client().await.unwrap());
    let sets = [
        "SET default_transaction_read_only = on",
        "SET default_transaction_isolation = 'serializable'",
        "SET statement_timeout = '10s'",
        "SET search_path = public, pg_catalog",
        "SET ROLE teller",
    ];
    for sql in sets {
        client.batch_execute(sql).await.unwrap();
    }
    client.batch_execute("BEGIN READ WRITE").await.unwrap();
    let (mut seen, others) = in_turns(&client, &other, INSERT).await;
    bench.switchover().await.unwrap();
    assert_eq!(set_backs(&bench), 1);
    let set = "SELECT count(*) FROM pg_settings WHERE (name, setting) IN \
               (('default_transaction_read_only', 'on'), ('statement_timeout', '10000'), \
               ('transaction_isolation', 'serializable')) AND current_user = 'teller'";
    assert_eq!(numbers(&client, set).await, [3]);
    seen.extend(numbers(&client, INSERT).await);
    client.batch_execute("COMMIT").await.unwrap();
    seen.extend(others);
    all_there(&bench, seen).await;
}
