//! Cursors WITH HOLD: rows, positions, and what `pg_cursors` shows.

use tokio_postgres::Client;

use crate::support::{MOVES, Move, alone, bench, move_it, protected, refused, rows, until_said};

const SCHEMA: &str = "CREATE TABLE t (n int); INSERT INTO t SELECT generate_series(1, 30)";

const SHOWN: &str = "SELECT name, is_holdable, is_binary, is_scrollable FROM pg_cursors ORDER BY 1";

async fn open(client: &Client, sql: &str) {
    let sql = format!("BEGIN; {sql}; COMMIT");
    client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cursors_move_with_rows_and_positions() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        open(
            &client,
            "DECLARE a CURSOR WITH HOLD FOR SELECT n, 'v' || n AS \"My v\" FROM t ORDER BY n; \
             DECLARE \"B \"\"c\" BINARY SCROLL CURSOR WITH HOLD FOR SELECT n, md5(n::text)::uuid \
             FROM t ORDER BY n DESC; \
             DECLARE behind SCROLL CURSOR WITH\n HOLD FOR SELECT n::numeric(6,2), NULL::text AS x, \
             ARRAY[n, NULL] AS r, n::text::varchar(7), 'x'::\"char\" FROM t WHERE n <= 3 ORDER BY t.n; \
             DECLARE first SCROLL CURSOR WITH HOLD FOR SELECT n FROM t ORDER BY n; \
             DECLARE nothing SCROLL CURSOR WITH HOLD FOR SELECT n FROM t WHERE n < 0; \
             DECLARE unread SCROLL CURSOR WITH HOLD FOR SELECT FROM t",
        )
        .await;
        client
            .batch_execute("FETCH 7 FROM a; MOVE FORWARD ALL IN behind; FETCH first")
            .await
            .unwrap();
        client.query("FETCH 2 FROM \"B \"\"c\"", &[]).await.unwrap();
        let before = rows(&client, SHOWN).await;
        assert_eq!(before.len(), 6);
        protected(&bench).await;
        // What they hold is of before.
        bench.column("UPDATE t SET n = n + 100").await.unwrap();
        for round in 0..2 {
            move_it(&mut bench, how).await;
            assert_eq!(rows(&client, SHOWN).await, before, "{how:?}");
            let next = "FETCH 2 FROM a; FETCH BACKWARD 3 FROM a; FETCH ABSOLUTE 30 FROM a; \
                        MOVE ABSOLUTE 7 IN a";
            let want = ["8|v8", "9|v9", "8|v8", "7|v7", "6|v6", "30|v30"];
            assert_eq!(rows(&client, next).await, want, "{how:?} {round}");
            let next = "FETCH behind; FETCH BACKWARD 2 FROM behind; MOVE FORWARD ALL IN behind; \
                        FETCH RELATIVE 0 FROM first; FETCH BACKWARD first; FETCH first; \
                        FETCH nothing; MOVE FORWARD ALL IN nothing";
            let want = ["3.00|null|{3,NULL}|3|x", "2.00|null|{2,NULL}|2|x", "1", "1"];
            assert_eq!(rows(&client, next).await, want, "{how:?} {round}");
            let binary = "FETCH RELATIVE 0 FROM \"B \"\"c\"";
            let row = client.query_one(binary, &[]).await.unwrap();
            assert_eq!(row.get::<_, i32>(0), 29, "{how:?}");
            // Closes its statement.
            drop(row);
            let all = client.simple_query("MOVE FORWARD ALL IN unread; MOVE ABSOLUTE 0 IN unread");
            let moved = all.await.unwrap();
            assert!(
                matches!(
                    moved[0],
                    tokio_postgres::SimpleQueryMessage::CommandComplete(30)
                ),
                "{moved:?}"
            );
            protected(&bench).await;
        }
        let closed = "CLOSE a; CLOSE ALL";
        client.batch_execute(closed).await.unwrap();
        assert!(rows(&client, SHOWN).await.is_empty());
        bench.column("UPDATE t SET n = n - 100").await.unwrap();
        drop(client);
        alone(&bench).await;
    }
}

/// A transaction that is open goes on with a cursor of before, beside a temporary table.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_goes_on_with_a_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        open(
            &client,
            "DECLARE a SCROLL CURSOR WITH HOLD FOR SELECT n FROM t ORDER BY n; \
             CREATE TEMP TABLE seen (n int)",
        )
        .await;
        assert_eq!(rows(&client, "FETCH 3 FROM a").await, ["1", "2", "3"]);
        client.batch_execute("BEGIN").await.unwrap();
        assert_eq!(rows(&client, "FETCH 2 FROM a").await, ["4", "5"]);
        client
            .batch_execute("INSERT INTO seen VALUES (5)")
            .await
            .unwrap();
        protected(&bench).await;
        move_it(&mut bench, how).await;
        assert_eq!(rows(&client, "FETCH 2 FROM a").await, ["6", "7"], "{how:?}");
        move_it(&mut bench, how).await;
        let rest = "FETCH BACKWARD 1 FROM a; SELECT * FROM seen; COMMIT; FETCH 1 FROM a";
        assert_eq!(rows(&client, rest).await, ["6", "5", "7"], "{how:?}");
        drop(client);
        alone(&bench).await;
    }
}

/// More rows than are fetched at a time, and than are held in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_cursor_moves() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    let client = bench.client().await.unwrap();
    open(
        &client,
        "DECLARE a SCROLL CURSOR WITH HOLD FOR SELECT n, repeat('x', n % 50) \
         FROM generate_series(1, 25000) n",
    )
    .await;
    client.batch_execute("MOVE 12345 IN a").await.unwrap();
    for how in MOVES {
        protected(&bench).await;
        move_it(&mut bench, how).await;
        let next = "FETCH RELATIVE 0 FROM a; FETCH LAST FROM a; FETCH ABSOLUTE 12345 FROM a";
        let want = [12345_usize, 25000, 12345].map(|n| format!("{n}|{}", "x".repeat(n % 50)));
        assert_eq!(rows(&client, next).await, want, "{how:?}");
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// One that only goes forward is used up by reading: a planned move reads what is left of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_that_only_goes_forward_moves_as_planned() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    let client = bench.client().await.unwrap();
    open(
        &client,
        "DECLARE f NO SCROLL CURSOR WITH HOLD FOR SELECT n FROM t ORDER BY n; \
         DECLARE s SCROLL CURSOR WITH HOLD FOR SELECT n FROM t ORDER BY n",
    )
    .await;
    client
        .batch_execute("FETCH 5 FROM f; FETCH 8 FROM s")
        .await
        .unwrap();
    let before = rows(&client, SHOWN).await;
    for from in [6, 8] {
        until_said(&bench, |why| {
            why.is_some_and(|w| w.contains("\"f\" can only scan forward"))
        })
        .await;
        bench.switchover().await.unwrap();
        assert_eq!(rows(&client, SHOWN).await, before);
        let want = [from, from + 1].map(|n: i32| n.to_string());
        assert_eq!(rows(&client, "FETCH 2 FROM f").await, want);
        assert_eq!(rows(&client, "FETCH RELATIVE 0 FROM s").await, ["8"]);
    }
    // A crash costs it, and the client is told.
    move_it(&mut bench, Move::Crash).await;
    assert_eq!(refused(&client, "FETCH 2 FROM f").await, "40001");
    assert_eq!(refused(&client, "FETCH 2 FROM f").await, "34000");
}

/// A move that is given up leaves such a cursor where it was, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_move_that_is_given_up_costs_no_cursor() {
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&folder, SCHEMA).await;
    let client = bench.client().await.unwrap();
    open(
        &client,
        "DECLARE f NO SCROLL CURSOR WITH HOLD FOR SELECT n FROM t ORDER BY n",
    )
    .await;
    client.batch_execute("FETCH 5 FROM f").await.unwrap();
    bench.drain().await.unwrap();
    bench.proxy.abort(helios_api::Epoch(1)).await.unwrap();
    assert_eq!(rows(&client, "FETCH 2 FROM f").await, ["6", "7"]);
}

/// What no table can have is known beforehand.
#[tokio::test(flavor = "multi_thread")]
async fn cursors_that_cannot_be_brought_are_known_beforehand() {
    let folder = tempfile::tempdir().unwrap();
    let schema = format!(
        "{SCHEMA}; CREATE ROLE plain LOGIN; GRANT SELECT ON t TO plain; \
                          REVOKE TEMP ON DATABASE postgres FROM PUBLIC"
    );
    let bench = bench(&folder, &schema).await;
    for (user, select, expected) in [
        (
            "postgres",
            "SELECT ROW(n, n) AS r FROM t",
            "of a kind that no table has",
        ),
        (
            "postgres",
            "SELECT '{=r/postgres}'::aclitem[]::text, '=r/postgres'::aclitem FROM t",
            "binary",
        ),
        ("plain", "SELECT n FROM t", "may not make temporary tables"),
    ] {
        let client = crate::support::client_as(&bench, user).await;
        open(
            &client,
            &format!("DECLARE c SCROLL CURSOR WITH HOLD FOR {select}"),
        )
        .await;
        assert!(!rows(&client, "FETCH 1 FROM c").await.is_empty());
        until_said(&bench, |why| why.is_some_and(|w| w.contains(expected))).await;
        // It goes on where it was.
        assert_eq!(rows(&client, "FETCH 1 FROM c").await.len(), 1);
        let moved = client.simple_query("MOVE BACKWARD ALL IN c").await.unwrap();
        assert!(
            matches!(
                moved[0],
                tokio_postgres::SimpleQueryMessage::CommandComplete(1)
            ),
            "{moved:?}"
        );
        drop(client);
        alone(&bench).await;
    }
}
