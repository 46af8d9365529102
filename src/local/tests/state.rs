//! Everything that a session can have, before and after it goes to the other server: as its own
//! queries show it there, where nothing of the old server is left.

#![allow(clippy::unwrap_used, clippy::panic)] // a test that cannot go on has failed

mod common;

use std::time::{Duration, Instant};

use common::{LIMIT, builder, connect, crash, direct, moved_when_ready, primary, until, whole};
use helios_local::LocalCluster;
use tempfile::TempDir;
use tokio_postgres::{Client, SimpleQueryMessage};

const MADE: &[&str] = &[
    "CREATE TABLE base (id serial PRIMARY KEY, n int)",
    "SET work_mem = '9MB'; SET app.own = 'x'; SET search_path = public, pg_temp",
    "PREPARE p (int) AS SELECT count(*) FROM base WHERE n < $1",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_lock_shared(7)",
    "SELECT pg_advisory_lock(1, -2)",
    "SELECT pg_advisory_lock_shared(9223372036854775807)",
    "LISTEN \"One channel\"; LISTEN two",
    "CREATE TYPE pg_temp.mood AS ENUM ('a', 'b')",
    "CREATE TEMP TABLE t (m pg_temp.mood, n int GENERATED ALWAYS AS IDENTITY) ON COMMIT PRESERVE ROWS",
    "INSERT INTO t (m) VALUES ('a'), ('b')",
    "INSERT INTO base (n) SELECT generate_series(1, 20)",
    "BEGIN; DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT n FROM base ORDER BY n; COMMIT; FETCH 5 FROM c",
];

const SHOWN: &[&str] = &[
    "SELECT name, setting, source FROM pg_settings WHERE source = 'session' ORDER BY 1",
    "SHOW app.own",
    "SELECT name, statement FROM pg_prepared_statements WHERE from_sql",
    "EXECUTE p (10)",
    "SELECT classid, objid, objsubid, mode FROM pg_locks WHERE locktype = 'advisory' \
     AND pid = pg_backend_pid() ORDER BY 1, 2, 3, 4",
    "SELECT c FROM pg_listening_channels() c ORDER BY 1",
    "SELECT name, is_scrollable FROM pg_cursors WHERE is_holdable",
    "FETCH RELATIVE 0 FROM c",
    "SELECT m::text, n FROM t",
    "SELECT typname FROM pg_type WHERE typnamespace = pg_my_temp_schema() AND typtype = 'e'",
];

async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await;
    let messages = messages.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let row = |m: SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => {
            let values = (0..row.len()).map(|at| row.get(at).unwrap_or("null").to_owned());
            Some(values.collect::<Vec<_>>().join("|"))
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

async fn shown(client: &Client) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for sql in SHOWN {
        all.push(rows(client, sql).await);
    }
    all
}

async fn protected(cluster: &LocalCluster) {
    let deadline = Instant::now() + LIMIT;
    loop {
        let sessions = cluster.sessions().await;
        if sessions.iter().all(|s| s.unprotected.is_none()) {
            return;
        }
        assert!(Instant::now() < deadline, "{sessions:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Nobody else gets what it holds.
async fn holds(cluster: &LocalCluster) {
    let status = cluster.status().await;
    let other = direct(primary(&status)).await;
    let taken = "SELECT pg_try_advisory_lock(7), pg_try_advisory_lock_shared(7), \
                 pg_try_advisory_lock(1, -2), pg_try_advisory_lock(9223372036854775807), \
                 pg_try_advisory_lock_shared(9223372036854775807)";
    assert_eq!(rows(&other, taken).await, ["f|f|f|f|t"]);
}

fn same(before: &[Vec<String>], after: &[Vec<String>], what: &str) {
    for ((sql, before), after) in SHOWN.iter().zip(before).zip(after) {
        assert_eq!(before, after, "{what}: {sql}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_to_the_other_server_with_all_it_has() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    whole(&cluster).await;
    let client = connect(&cluster).await;
    for sql in MADE {
        let made = client.batch_execute(sql).await;
        made.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    }
    let before = shown(&client).await;
    let values = "SELECT currval('base_id_seq'), currval('pg_temp.t_n_seq'), lastval()";
    assert_eq!(rows(&client, values).await, ["20|2|20"]);
    protected(&cluster).await;

    moved_when_ready(&cluster).await;
    same(&before, &shown(&client).await, "planned");
    holds(&cluster).await;
    assert_eq!(rows(&client, values).await, ["20|2|20"]);

    // Inside a transaction, and as a crash.
    let status = whole(&cluster).await;
    client
        .batch_execute("BEGIN; INSERT INTO t (m) VALUES ('b')")
        .await
        .unwrap();
    let inside = shown(&client).await;
    protected(&cluster).await;
    crash(primary(&status));
    same(&inside, &shown(&client).await, "crash");
    let epoch = status.epoch;
    let after = until(&cluster, "failover", |s| {
        s.epoch > epoch && s.phase == "steady"
    })
    .await;
    assert_ne!(primary(&after).name, primary(&status).name);
    client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(rows(&client, "SELECT count(*) FROM t").await, ["3"]);
    holds(&cluster).await;
    // Given back as often as it was taken.
    let back = "SELECT pg_advisory_unlock(7), pg_advisory_unlock(7), pg_advisory_unlock_shared(7)";
    assert_eq!(rows(&client, back).await, ["t|t|t"]);
    // The value of before the transaction, or none.
    match client.query_one("SELECT currval('base_id_seq')", &[]).await {
        Ok(row) => assert_eq!(row.get::<_, i64>(0), 20),
        Err(e) => assert_eq!(e.code().unwrap().code(), "55000"),
    }
    cluster.shutdown().await;
}
