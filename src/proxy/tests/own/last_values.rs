//! `currval` and `lastval` before and after a move, and that no sequence moves for them.

use crate::support::{MOVES, Move, bench, client_as, move_it, protected, refused, rows};

const SCHEMA: &str = "CREATE TABLE t (id serial, n int); CREATE SEQUENCE other INCREMENT -3; \
                      CREATE SEQUENCE cached CACHE 10; CREATE SEQUENCE unused; \
                      CREATE TABLE child (of int, n int)";

const ASKED: &str = "SELECT currval('t_id_seq'), currval('other'), currval('cached'), \
                     currval('mine'), lastval()";

/// Where all sequences stand.
const STANDING: &str = "SELECT (SELECT concat_ws(' ', last_value, is_called) FROM t_id_seq) || \
                        (SELECT concat_ws(' ', last_value, is_called) FROM other) || \
                        (SELECT concat_ws(' ', last_value, is_called) FROM cached)";

#[tokio::test(flavor = "multi_thread")]
async fn last_values_are_true_behind_a_move() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        let draw = "INSERT INTO t (n) VALUES (1), (2); SELECT nextval('other'), nextval('other'); \
                    CREATE TEMP SEQUENCE mine START 70; SELECT nextval('mine'), nextval('cached'); \
                    SELECT nextval('other')";
        client.batch_execute(draw).await.unwrap();
        let before = rows(&client, ASKED).await;
        // Others draw too.
        bench
            .column("SELECT nextval('other'), nextval('t_id_seq')")
            .await
            .unwrap();
        let stood = bench.column(STANDING).await.unwrap();
        for _ in 0..2 {
            bench.proxy.prepare(&bench.candidate().unwrap()).await;
            protected(&bench).await;
            move_it(&mut bench, how).await;
            assert_eq!(rows(&client, ASKED).await, before, "{how:?}");
            assert_eq!(refused(&client, "SELECT currval('unused')").await, "55000");
        }
        if how == Move::Planned {
            assert_eq!(bench.column(STANDING).await.unwrap(), stood);
        }
        // What is drawn next is new, and what it says of itself is true.
        let next = bench
            .column("SELECT last_value + 1 FROM t_id_seq")
            .await
            .unwrap();
        let drawn = "INSERT INTO t (n) VALUES (3) RETURNING id = (SELECT max(id) FROM t) + 1 \
                     OR id > (SELECT max(id) FROM t), id = currval('t_id_seq'), id = lastval(), id";
        let drawn = rows(&client, drawn).await;
        assert_eq!(drawn, [format!("t|t|t|{}", next[0])], "{how:?}");
        let twice = "SELECT count(*) FROM (SELECT id FROM t GROUP BY id HAVING count(*) > 1) x";
        assert_eq!(bench.column(twice).await.unwrap(), ["0"], "{how:?}");
        drop(client);
        crate::support::alone(&bench).await;
    }
}

/// An open transaction goes on with a value of before it.
#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_goes_on_with_a_last_value_of_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        let insert = "INSERT INTO t (n) VALUES (1) RETURNING id";
        let id = rows(&client, insert).await.remove(0);
        assert_eq!(
            rows(&client, "SELECT lastval()").await,
            std::slice::from_ref(&id)
        );
        client.batch_execute("BEGIN").await.unwrap();
        let child = "INSERT INTO child VALUES (currval('t_id_seq'), 1) RETURNING of";
        assert_eq!(rows(&client, child).await, std::slice::from_ref(&id));
        move_it(&mut bench, how).await;
        let child = "INSERT INTO child VALUES (lastval(), 2) RETURNING of";
        assert_eq!(
            rows(&client, child).await,
            std::slice::from_ref(&id),
            "{how:?}"
        );
        client.batch_execute("COMMIT").await.unwrap();
        let children = format!("SELECT n FROM child WHERE of = {id} ORDER BY 1");
        assert_eq!(
            bench.column(&children).await.unwrap(),
            ["1", "2"],
            "{how:?}"
        );
        drop(client);
        crate::support::alone(&bench).await;
    }
}

/// A value that was drawn since it was read is undefined behind a crash, or true; never an older one.
#[tokio::test(flavor = "multi_thread")]
async fn a_last_value_is_true_or_undefined() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    let client = bench.client().await.unwrap();
    for _ in 0..3 {
        client
            .batch_execute("INSERT INTO t (n) VALUES (1); SELECT lastval()")
            .await
            .unwrap();
        bench.proxy.prepare(&bench.candidate().unwrap()).await;
        let id = rows(&client, "INSERT INTO t (n) VALUES (2) RETURNING id")
            .await
            .remove(0);
        move_it(&mut bench, Move::Crash).await;
        match client.query_one("SELECT lastval()", &[]).await {
            Ok(row) => assert_eq!(row.get::<_, i64>(0).to_string(), id),
            Err(e) => assert_eq!(e.code().unwrap().code(), "55000"),
        }
    }
}

/// A sequence that another open transaction has drawn from, or that is somebody else's, is left
/// alone: its last value is undefined, the others are there.
#[tokio::test(flavor = "multi_thread")]
async fn a_sequence_that_may_not_be_touched_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let schema = format!(
        "{SCHEMA}; CREATE ROLE plain LOGIN; GRANT ALL ON SCHEMA public TO plain; \
         GRANT USAGE ON SEQUENCE other TO plain"
    );
    let mut bench = bench(&folder, &schema).await;
    let client = client_as(&bench, "plain").await;
    let draw = "CREATE SEQUENCE own_one; CREATE SEQUENCE own_two; SELECT nextval('other'), \
                nextval('own_one'), nextval('own_two'), lastval()";
    client.batch_execute(draw).await.unwrap();
    bench.proxy.prepare(&bench.candidate().unwrap()).await;
    let hold = "BEGIN; SELECT nextval('own_two')";
    bench.direct.batch_execute(hold).await.unwrap();
    move_it(&mut bench, Move::Planned).await;
    assert_eq!(rows(&client, "SELECT currval('own_one')").await, ["1"]);
    for undefined in ["currval('other')", "currval('own_two')", "lastval()"] {
        let sql = format!("SELECT {undefined}");
        assert_eq!(refused(&client, &sql).await, "55000", "{undefined}");
    }
    bench.direct.batch_execute("COMMIT").await.unwrap();
    assert_eq!(
        rows(&client, "SELECT nextval('own_two'), lastval()").await,
        ["3|3"]
    );
}
