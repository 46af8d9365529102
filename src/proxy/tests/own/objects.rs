//! All kinds of temporary objects, as the catalogs show them.

use tokio_postgres::Client;

use crate::support::{MOVES, alone, bench, move_it, protected, refused, rows};

const SCHEMA: &str = "CREATE TABLE base (a int DEFAULT 5, b text); CREATE ROLE reader; \
                      CREATE TABLE done (n int)";

const MADE: &[&str] = &[
    "CREATE TYPE pg_temp.mood AS ENUM ('a', 'b''c')",
    "ALTER TYPE pg_temp.mood ADD VALUE 'z' BEFORE 'a'",
    "CREATE DOMAIN pg_temp.pos AS int DEFAULT 3 NOT NULL CONSTRAINT above CHECK (VALUE > 0)",
    "CREATE DOMAIN pg_temp.word AS text COLLATE \"C\" CHECK (VALUE <> '')",
    "CREATE TYPE pg_temp.pair AS (m pg_temp.mood, p pg_temp.pos, w text COLLATE \"C\")",
    "CREATE FUNCTION pg_temp.twice(n int DEFAULT 2) RETURNS int IMMUTABLE STRICT LANGUAGE sql \
     AS 'SELECT n * 2'",
    "CREATE TEMP TABLE t (a pg_temp.mood DEFAULT 'a', b pg_temp.pair, c pg_temp.pos[], \
     id serial PRIMARY KEY, x text UNIQUE WITH (fillfactor = 80), \
     d int DEFAULT pg_temp.twice(4) CHECK (d > pg_temp.twice(0)))",
    "INSERT INTO t (a, b, c, x) SELECT 'b''c', ROW('z'::pg_temp.mood, n::pg_temp.pos, 'w'::text)::pg_temp.pair, ARRAY[n], n::text \
     FROM generate_series(1, 100) n",
    "CREATE FUNCTION pg_temp.f(x t, y pg_temp.mood DEFAULT 'a') RETURNS SETOF pg_temp.pair \
     LANGUAGE sql STABLE AS 'SELECT $1.b'",
    "CREATE FUNCTION pg_temp.count_t() RETURNS bigint LANGUAGE plpgsql SET work_mem = '8MB' \
     AS $$ BEGIN RETURN (SELECT count(*) FROM t); END $$",
    "CREATE PROCEDURE pg_temp.add(n int) LANGUAGE sql AS 'INSERT INTO done VALUES (n)'",
    "CREATE VIEW pg_temp.v WITH (security_barrier, check_option = cascaded) AS \
     SELECT id, x FROM t WHERE id < 50",
    "ALTER VIEW v ALTER x SET DEFAULT 'of the view'",
    "CREATE VIEW pg_temp.grouped AS SELECT id, x, (pg_temp.f(t)).p FROM t GROUP BY id",
    "CREATE STATISTICS pg_temp.st (ndistinct, dependencies) ON a, id FROM t",
    "CREATE TEMP TABLE q (n int REFERENCES t ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED, \
     m int)",
    "INSERT INTO q SELECT n, n FROM generate_series(1, 10) n",
    "ALTER TABLE q ADD CHECK (m > 5) NOT VALID",
    "ALTER TABLE q ALTER m SET STATISTICS 20, ALTER m SET (n_distinct = 5)",
    "ALTER TABLE t ALTER x SET STORAGE external",
    "CREATE INDEX q_m ON q (m)",
    "ALTER TABLE q CLUSTER ON q_m",
    "GRANT SELECT, INSERT ON q TO PUBLIC; GRANT UPDATE ON q TO reader WITH GRANT OPTION",
    "COMMENT ON TABLE q IS 'it''s'; COMMENT ON COLUMN q.m IS 'm'; COMMENT ON VIEW v IS 'v'; \
     COMMENT ON CONSTRAINT q_n_fkey ON q IS 'fk'; COMMENT ON INDEX q_m IS 'index'",
    "CREATE FUNCTION pg_temp.stamp() RETURNS trigger LANGUAGE plpgsql \
     AS $$ BEGIN NEW.m := NEW.m + 100; RETURN NEW; END $$",
    "CREATE TRIGGER stamp BEFORE INSERT ON q FOR EACH ROW WHEN (NEW.m > 0) \
     EXECUTE FUNCTION pg_temp.stamp()",
    "CREATE TEMP TABLE p (a int, b int NOT NULL, PRIMARY KEY (a, b)) PARTITION BY RANGE (a)",
    "CREATE TEMP TABLE p1 PARTITION OF p (b DEFAULT 3) FOR VALUES FROM (1) TO (30)",
    "CREATE TEMP TABLE p2 PARTITION OF p DEFAULT PARTITION BY HASH (b)",
    "CREATE TEMP TABLE p21 PARTITION OF p2 FOR VALUES WITH (MODULUS 1, REMAINDER 0)",
    "CREATE INDEX ON p (b)",
    "INSERT INTO p SELECT n, n FROM generate_series(1, 60) n",
    "CREATE TEMP TABLE mother (a int DEFAULT 1 CHECK (a > 0), b text)",
    "CREATE TEMP TABLE kid (c int, d int NOT NULL) INHERITS (mother)",
    "ALTER TABLE kid ALTER a SET DEFAULT 7, ALTER b SET NOT NULL",
    "INSERT INTO kid (b, d) VALUES ('k', 1); INSERT INTO mother VALUES (2, 'm')",
    "CREATE TEMP TABLE of_base (c int) INHERITS (base)",
    "INSERT INTO of_base VALUES (1, 'x', 2)",
    "CREATE TEMP TABLE excluding (r int4range, EXCLUDE USING gist (r WITH &&))",
    "CREATE TEMP TABLE later (a int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED) \
     ON COMMIT DELETE ROWS",
    "ANALYZE t; ANALYZE p",
];

/// Everything that catalogs and tables tell. Names of schemas and OIDs are others afterwards.
const SHOWN: &[&str] = &[
    "SELECT relname, relkind, reloptions, relhassubclass, relispartition, \
     pg_get_partkeydef(oid), pg_get_expr(relpartbound, oid), relchecks, relhastriggers FROM pg_class \
     WHERE relnamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT relname, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, \
     attgenerated, attcollation, attislocal, attinhcount, attstorage, attstattarget, attoptions, \
     pg_get_expr(adbin, adrelid) FROM pg_attribute JOIN pg_class c ON c.oid = attrelid \
     LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum \
     WHERE relnamespace = pg_my_temp_schema() AND attnum > 0 ORDER BY relname, attnum",
    "SELECT pg_get_indexdef(c.oid), indisclustered, indisvalid, indimmediate, obj_description(c.oid) \
     FROM pg_class c JOIN pg_index ON indexrelid = c.oid \
     WHERE relnamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT conrelid::regclass, contypid::regtype, conname, contype, conislocal, coninhcount, \
     convalidated, pg_get_constraintdef(oid), obj_description(oid, 'pg_constraint') \
     FROM pg_constraint WHERE connamespace = pg_my_temp_schema() ORDER BY 1, 2, 3",
    "SELECT inhrelid::regclass::text, inhparent::regclass, inhseqno FROM pg_inherits \
     JOIN pg_class c ON c.oid = inhrelid WHERE relnamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT typname, typtype, typnotnull, typdefault, typcollation, typbasetype::regtype, \
     (SELECT string_agg(enumlabel, ',' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid) \
     FROM pg_type t WHERE typnamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT tgname, pg_get_triggerdef(t.oid) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid \
     WHERE relnamespace = pg_my_temp_schema() AND NOT tgisinternal ORDER BY 1",
    "SELECT pg_get_statisticsobjdef(oid) FROM pg_statistic_ext \
     WHERE stxnamespace = pg_my_temp_schema() ORDER BY 1",
    "SELECT relname, d.objsubid, description FROM pg_description d JOIN pg_class c \
     ON c.oid = d.objoid AND classoid = 'pg_class'::regclass \
     WHERE relnamespace = pg_my_temp_schema() ORDER BY 1, 2",
    "SELECT relname, a.* FROM pg_class, aclexplode(relacl) a \
     WHERE relnamespace = pg_my_temp_schema() ORDER BY 1, 2, 3, 4",
    "SELECT relname, pg_get_viewdef(oid) FROM pg_class \
     WHERE relnamespace = pg_my_temp_schema() AND relkind = 'v' ORDER BY 1",
    "SELECT stxname, stxdndistinct::text FROM pg_statistic_ext \
     JOIN pg_statistic_ext_data ON stxoid = oid WHERE stxnamespace = pg_my_temp_schema()",
    "SELECT relname, attname, stadistinct, stanullfrac FROM pg_statistic \
     JOIN pg_class c ON c.oid = starelid JOIN pg_attribute ON attrelid = c.oid \
     AND attnum = staattnum WHERE relnamespace = pg_my_temp_schema() ORDER BY 1, 2, 3, 4",
    "SELECT * FROM t",
    "SELECT * FROM q",
    "SELECT tableoid::regclass, * FROM p ORDER BY 2",
    "SELECT tableoid::regclass, * FROM mother ORDER BY 2",
    "SELECT tableoid::regclass, * FROM base ORDER BY 2",
    "SELECT * FROM grouped ORDER BY 1",
    "SELECT pg_temp.count_t(), pg_temp.twice()",
    "SELECT pg_sequence_last_value('t_id_seq'), pg_get_serial_sequence('t', 'id') \
     = (SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()) || '.t_id_seq'",
];

async fn shown(client: &Client) -> Vec<Vec<String>> {
    let mut all = Vec::new();
    for sql in SHOWN {
        all.push(rows(client, sql).await);
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn all_kinds_of_objects_move() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        for sql in MADE {
            let made = client.batch_execute(sql).await;
            made.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
        }
        let before = shown(&client).await;
        assert!(before.iter().all(|rows| !rows.is_empty()));
        protected(&bench).await;
        for _ in 0..2 {
            move_it(&mut bench, how).await;
            let after = shown(&client).await;
            for ((sql, before), after) in SHOWN.iter().zip(&before).zip(&after) {
                assert_eq!(before, after, "{how:?}: {sql}");
            }
            protected(&bench).await;
        }
        works(&client).await;
        let done = bench.column("SELECT n FROM done").await.unwrap();
        assert_eq!(done, ["8"], "{how:?}");
        bench.column("TRUNCATE done").await.unwrap();
        drop(client);
        alone(&bench).await;
    }
}

/// What was made again does what it should.
async fn works(client: &Client) {
    let sql = "INSERT INTO t (x) VALUES ('new') RETURNING id, a, d; \
               INSERT INTO q VALUES (101, 6) RETURNING m; \
               DELETE FROM t WHERE id = 101; SELECT count(*) FROM q WHERE n = 101; \
               INSERT INTO p VALUES (29, 99), (99, 99) RETURNING tableoid::regclass; \
               CALL pg_temp.add(pg_temp.twice(4)); \
               INSERT INTO later VALUES (1); SELECT count(*) FROM later; \
               INSERT INTO kid (b, d) VALUES ('k', 1) RETURNING a";
    let want = ["101|a|8", "106", "0", "p1", "p21", "1", "7"];
    assert_eq!(rows(client, sql).await, want);
    assert_eq!(rows(client, "SELECT count(*) FROM later").await, ["0"]);
    for (sql, code) in [
        ("INSERT INTO q VALUES (5000, 6)", "23503"),
        ("INSERT INTO q VALUES (1, -6)", "23514"),
        ("INSERT INTO t (a) VALUES ('no')", "22P02"),
        ("INSERT INTO t (c) VALUES ('{-1}')", "23514"),
        ("INSERT INTO t (x) VALUES ('1')", "23505"),
        ("INSERT INTO v VALUES (777, 'over')", "44000"),
        ("INSERT INTO excluding VALUES ('[1,3]'), ('[2,4]')", "23P01"),
        ("INSERT INTO p VALUES (1, 1)", "23505"),
        ("INSERT INTO kid (b) VALUES ('k')", "23502"),
    ] {
        assert_eq!(refused(client, sql).await, code, "{sql}");
    }
}

/// What changes in place is read again, though no relation has changed.
#[tokio::test(flavor = "multi_thread")]
async fn changes_in_place_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    let client = bench.client().await.unwrap();
    let made = "CREATE TEMP TABLE t (n int); CREATE TYPE pg_temp.mood AS ENUM ('a'); \
                CREATE DOMAIN pg_temp.pos AS int CHECK (VALUE > 0); \
                CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
                ALTER TABLE t ADD CONSTRAINT checked CHECK (n > 0) NOT VALID; \
                CREATE INDEX named ON t (n); COMMENT ON TABLE t IS 'one'";
    client.batch_execute(made).await.unwrap();
    for (change, asked, want) in [
        (
            "ALTER TYPE pg_temp.mood ADD VALUE 'b'",
            "SELECT 'b'::pg_temp.mood",
            "b",
        ),
        (
            "ALTER DOMAIN pg_temp.pos ADD CHECK (VALUE < 9)",
            "SELECT count(*) FROM pg_constraint WHERE contypid = 'pg_temp.pos'::regtype",
            "2",
        ),
        (
            "CREATE OR REPLACE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 2'",
            "SELECT pg_temp.f()",
            "2",
        ),
        (
            "ALTER TABLE t VALIDATE CONSTRAINT checked",
            "SELECT convalidated FROM pg_constraint WHERE conname = 'checked' \
             AND conrelid = 't'::regclass",
            "t",
        ),
        (
            "ALTER INDEX named SET (fillfactor = 71)",
            "SELECT reloptions FROM pg_class WHERE oid = 'named'::regclass",
            "{fillfactor=71}",
        ),
        (
            "COMMENT ON TABLE t IS 'two'",
            "SELECT obj_description('t'::regclass)",
            "two",
        ),
        (
            "CREATE TRIGGER quiet BEFORE UPDATE ON t FOR EACH ROW \
             EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 't'::regclass",
            "quiet",
        ),
        (
            "DROP FUNCTION pg_temp.f()",
            "SELECT count(*) FROM pg_proc WHERE pronamespace = pg_my_temp_schema()",
            "0",
        ),
    ] {
        protected(&bench).await;
        client.batch_execute(change).await.unwrap();
        for how in MOVES {
            protected(&bench).await;
            move_it(&mut bench, how).await;
            assert_eq!(rows(&client, asked).await, [want], "{how:?}: {change}");
        }
    }
}

/// Names, rows and cursors are what they were whatever encoding the client has chosen.
#[tokio::test(flavor = "multi_thread")]
async fn encodings_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = bench.client().await.unwrap();
        let made = "SET client_encoding = 'LATIN1'; \
                    CREATE TEMP TABLE t AS SELECT U&'\\00e9\\00fc' AS U&\"\\00e4\"; \
                    BEGIN; DECLARE U&\"c\\00f6\" SCROLL CURSOR WITH HOLD FOR SELECT * FROM t; COMMIT";
        client.batch_execute(made).await.unwrap();
        protected(&bench).await;
        move_it(&mut bench, how).await;
        let asked = "SHOW client_encoding; SET client_encoding = 'UTF8'; SELECT * FROM t; \
                     SELECT attname FROM pg_attribute WHERE attrelid = 't'::regclass AND attnum = 1; \
                     FETCH 1 FROM U&\"c\\00f6\"";
        let want = ["LATIN1", "\u{e9}\u{fc}", "\u{e4}", "\u{e9}\u{fc}"];
        assert_eq!(rows(&client, asked).await, want, "{how:?}");
        drop(client);
        alone(&bench).await;
    }
}
