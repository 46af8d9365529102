//! What `currval` and `lastval` give: read from a session's backend, and made true on another.
//!
//! Pure. They stand in no view. `currval` tells them of one sequence, or fails; `lastval` locks the
//! sequence that it speaks of, which `pg_locks` shows. A backend remembers them in its own memory,
//! which no rollback takes back (`SeqTable` in `src/backend/commands/sequence.c`), while ALTER
//! SEQUENCE … RESTART gives a sequence new storage that a rollback takes back whole. So on the new
//! backend each sequence is restarted, set and drawn from in a subtransaction that is rolled back:
//! the backend remembers the value, and nobody else ever saw the sequence move. That takes its
//! owner's right, and a lock that waits for open transactions that have drawn from it.
//!
//! The invariant: a value is made true or left undefined, which PostgreSQL says as an error; it is
//! never another one.

use crate::state::literal;

/// As many sequences of a database are asked about.
const MOST: usize = 300;

/// Longest wait for a sequence's lock at a time, in milliseconds: others wait behind it.
const LOCK_MS: u32 = 10;

/// How often it is tried, and the pause in between, in milliseconds: nobody waits behind that.
const TRIES: u32 = 10;
/// See [`TRIES`].
const PAUSE_MS: u32 = 5;

/// What a sequence gave last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastValue {
    /// Its OID, or its name where it is temporary: that one gets another OID.
    pub sequence: String,
    /// What `currval` gives.
    pub value: i64,
    /// It is what `lastval` gives.
    pub last: bool,
}

/// Whether a text asks for the last value of a sequence, in any case.
#[must_use]
pub fn asks(text: &[u8]) -> bool {
    memchr::memchr2_iter(b'v', b'V', text).any(|at| {
        let word = at.checked_sub(4).and_then(|from| text.get(from..at + 3));
        word.is_some_and(|w| {
            w.eq_ignore_ascii_case(b"currval") || w.eq_ignore_ascii_case(b"lastval")
        })
    })
}

/// The statements that tell them, behind the settings that all questions have: the rows of the last
/// are for [`from_row`]. Errors are caught inside, so that no log has them.
#[must_use]
pub fn questions() -> [String; 2] {
    let ask = format!(
        "DO $helios$ DECLARE r record; told text := ''; v int8; last oid; BEGIN \
         PERFORM set_config('lock_timeout', '{LOCK_MS}', true); \
         BEGIN v := lastval(); SELECT relation INTO last FROM pg_locks \
         WHERE pid = pg_backend_pid() AND locktype = 'relation' AND mode = 'RowExclusiveLock' \
         AND relation IN (SELECT seqrelid FROM pg_sequence); \
         EXCEPTION WHEN OTHERS THEN NULL; END; \
         FOR r IN SELECT c.oid, CASE WHEN relnamespace = pg_my_temp_schema() \
         THEN 'pg_temp.' || quote_ident(relname) ELSE c.oid::text END AS name FROM pg_class c \
         WHERE relkind = 'S' AND NOT pg_is_other_temp_schema(relnamespace) \
         ORDER BY c.oid IS DISTINCT FROM last LIMIT {MOST} LOOP \
         BEGIN v := currval(r.oid); told := told || json_build_array(r.name, v::text, \
         r.oid IS NOT DISTINCT FROM last)::text || ','; \
         EXCEPTION WHEN OTHERS THEN NULL; END; END LOOP; \
         PERFORM set_config('helios.values', told, true); END $helios$"
    );
    let rows = "SELECT r->>0, r->>1, r->>2 FROM json_array_elements(('[' \
         || rtrim(current_setting('helios.values'), ',') || ']')::json) AS r";
    [ask, rows.to_owned()]
}

/// From a row of the last of [`questions`].
#[must_use]
pub fn from_row(row: &[Option<String>]) -> Option<LastValue> {
    let [Some(sequence), Some(value), Some(last)] = row else {
        return None;
    };
    Some(LastValue {
        sequence: sequence.clone(),
        value: value.parse().ok()?,
        last: last == "true",
    })
}

/// The statement that makes them true on a fresh backend; none where there are none. What cannot be
/// made true stays undefined.
#[must_use]
pub fn restore(values: &[LastValue]) -> Option<String> {
    if values.is_empty() {
        return None;
    }
    let rows = values.iter().map(|v| {
        let sequence = literal(&v.sequence);
        format!("({sequence}, '{}'::pg_catalog.int8, {})", v.value, v.last)
    });
    let rows: Vec<String> = rows.collect();
    // lastval follows nextval, not setval.
    Some(format!(
        "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL lock_timeout = {LOCK_MS}; \
         SET LOCAL synchronous_commit = off; SET LOCAL client_min_messages = error; \
         SET LOCAL statement_timeout = 0; \
         DO $helios$ DECLARE r record; s regclass; BEGIN \
         FOR r IN SELECT * FROM (VALUES {}) AS v(name, value, last) ORDER BY last LOOP \
         FOR tries IN 1..{TRIES} LOOP BEGIN \
         s := CASE WHEN r.name ~ '^[0-9]+$' THEN r.name::oid::regclass \
         ELSE r.name::regclass END; \
         IF EXISTS (SELECT FROM pg_locks WHERE locktype = 'relation' AND relation = s \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
         AND pid <> pg_backend_pid() AND mode <> 'AccessShareLock') THEN \
         PERFORM pg_sleep({PAUSE_MS} / 1000.0); CONTINUE; END IF; \
         EXECUTE format('ALTER SEQUENCE %s RESTART', s); \
         PERFORM setval(s, r.value, NOT r.last); \
         IF r.last THEN PERFORM nextval(s); END IF; \
         RAISE EXCEPTION USING ERRCODE = 'HE001'; \
         EXCEPTION WHEN lock_not_available THEN NULL; WHEN OTHERS THEN EXIT; END; \
         END LOOP; END LOOP; END $helios$; COMMIT",
        rows.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_ask() {
        for text in [
            "select currval('s')",
            "SELECT LASTVAL()",
            "insert into t values (CurrVal('s'))",
        ] {
            assert!(asks(text.as_bytes()), "{text}");
        }
        for text in ["select nextval('s')", "insert into t values (1)", "val", ""] {
            assert!(!asks(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn the_last_one_is_drawn_behind_the_others() {
        assert_eq!(restore(&[]), None);
        let value = |sequence: &str, last| LastValue {
            sequence: sequence.to_owned(),
            value: -5,
            last,
        };
        let sql = restore(&[value("1234", true), value("pg_temp.\"it's\"", false)]).unwrap();
        assert!(
            sql.contains("('1234', '-5'::pg_catalog.int8, true)"),
            "{sql}"
        );
        assert!(sql.contains("('pg_temp.\"it''s\"', '-5'"), "{sql}");
    }
}
