//! Settings by every way they can be made, as `pg_settings` shows all of them.

use tokio_postgres::Client;

use crate::support::{MOVES, alone, bench, client_as, move_it, rows};

const SCHEMA: &str = "\
CREATE ROLE app LOGIN; CREATE ROLE other; GRANT other TO app; \
ALTER ROLE app SET work_mem = '5MB'; ALTER ROLE app SET datestyle = 'German, DMY'; \
ALTER ROLE app SET app.tenant = 'of the role'; \
ALTER DATABASE postgres SET statement_timeout = '77s'; \
ALTER ROLE app IN DATABASE postgres SET lock_timeout = '66s'; \
CREATE FUNCTION inside(text) RETURNS void LANGUAGE sql \
AS 'SELECT set_config(''extra_float_digits'', $1, false)'; \
CREATE TABLE t (n int); GRANT ALL ON t TO app, other";

/// All settings, and those that no view lists.
async fn shown(client: &Client) -> Vec<String> {
    let listed = "SELECT name, setting, source, reset_val FROM pg_settings ORDER BY name";
    let mut all = rows(client, listed).await;
    let others = "SELECT current_setting('app.tenant', true), current_setting('app.own', true), \
                  current_setting('app.local', true), current_user, session_user";
    all.extend(rows(client, others).await);
    all
}

fn same(before: &[String], after: &[String], what: &str) {
    for (before, after) in before.iter().zip(after) {
        assert_eq!(before, after, "{what}");
    }
    assert_eq!(before.len(), after.len(), "{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_setting_is_what_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    let ways: &[&[&str]] = &[
        &["SELECT 1"],
        &[
            "SET search_path = app, \"Odd, name\", pg_temp",
            "SET app.own = 'it''s \\'",
            "SET TIME ZONE INTERVAL '+05:30' HOUR TO MINUTE",
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
            "SET NAMES 'LATIN1'",
            "SET work_mem TO DEFAULT",
        ],
        &[
            "SET work_mem = '9MB'",
            "RESET work_mem",
            "SET lock_timeout = '1s'",
            "RESET ALL",
            "SET app.tenant = 'own'",
            "RESET app.tenant",
        ],
        &[
            "SELECT inside('3')",
            "SELECT set_config('app.own', 'x', false), set_config('work_mem', '3MB', true)",
            "SET ROLE other",
        ],
        &[
            "BEGIN; SET LOCAL work_mem = '1MB'; SET application_name = 'kept'; COMMIT",
            "BEGIN; SET lock_timeout = '1s'; ROLLBACK",
            "BEGIN; SAVEPOINT s; SET geqo = off; ROLLBACK TO s; SET jit = off; COMMIT",
        ],
        &[
            "SET work_mem = '9MB'; SET app.own = 'gone'; SET ROLE other",
            "DISCARD ALL",
            "SET statement_timeout = '5s'",
        ],
    ];
    for how in MOVES {
        for way in ways {
            let client = client_as(&bench, "app").await;
            for sql in *way {
                client.batch_execute(sql).await.unwrap();
            }
            let before = shown(&client).await;
            for _ in 0..2 {
                move_it(&mut bench, how).await;
                same(&before, &shown(&client).await, &format!("{how:?}: {way:?}"));
            }
            drop(client);
            alone(&bench).await;
        }
    }
}

/// Inside a transaction, at their levels.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_a_transaction_are_what_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(&folder, SCHEMA).await;
    for how in MOVES {
        let client = client_as(&bench, "app").await;
        let begin = "SET app.own = 'session'; SET work_mem = '7MB'; \
                     BEGIN ISOLATION LEVEL REPEATABLE READ; SET LOCAL work_mem = '1MB'; \
                     SET LOCAL app.local = 'inside'; SET jit = off; \
                     SELECT set_config('app.own', 'inside', true)";
        for sql in begin.split("; ") {
            client.batch_execute(sql).await.unwrap();
        }
        let inside = "SAVEPOINT s; SET LOCAL ROLE other; SET LOCAL geqo = off";
        for sql in inside.split("; ") {
            client.batch_execute(sql).await.unwrap();
        }
        let before = shown(&client).await;
        move_it(&mut bench, how).await;
        same(&before, &shown(&client).await, &format!("{how:?}: inside"));
        let back = "ROLLBACK TO s; SHOW work_mem; SHOW geqo; SELECT current_user";
        assert_eq!(rows(&client, back).await, ["1MB", "on", "app"], "{how:?}");
        client.batch_execute("COMMIT").await.unwrap();
        let behind = "SHOW work_mem; SHOW app.own; SHOW jit";
        assert_eq!(
            rows(&client, behind).await,
            ["7MB", "session", "off"],
            "{how:?}"
        );
        drop(client);
        alone(&bench).await;
    }
}
