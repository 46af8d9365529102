//! Which temporary objects a statement can reach: those that have to be there before it runs.
//!
//! Behind a move they are made again one by one, and a statement is not kept waiting for those that
//! it has nothing to do with. Pure: the names that a text has, and whether it is of a kind that
//! reaches a relation by its name alone. What the names stand for (functions, triggers, views) only
//! the catalogs know; the engine asks them. The invariant: when in doubt, everything is needed.

use std::collections::BTreeSet;

use crate::grammar::{Kind, statements};
use crate::reads::names;

/// Longer names are cut off by PostgreSQL (`NAMEDATALEN`): another name than it seems.
const MAX_NAME: usize = 63;

/// The query for the names of all that is in `pg_temp`; behind
/// [`SETTINGS`](crate::temporary::SETTINGS). [`name_of`] takes its rows.
pub const NAMES_QUERY: &str = "\
SELECT 'name', relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() \
UNION SELECT 'name', typname FROM pg_type WHERE typnamespace = pg_my_temp_schema() \
UNION SELECT 'name', proname FROM pg_proc WHERE pronamespace = pg_my_temp_schema()";

/// The name in a row of [`NAMES_QUERY`], if it is one.
#[must_use]
pub fn name_of(row: Vec<Option<String>>) -> Option<String> {
    match <[_; 2]>::try_from(row) {
        Ok([Some(kind), Some(name)]) if kind == "name" => Some(name),
        _ => None,
    }
}

/// What a text needs to be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Needs {
    /// Whatever there is.
    Everything,
    /// At most what one of these words names, as PostgreSQL folds them, and what that leads to.
    Named(BTreeSet<String>),
}

impl Needs {
    /// Nothing at all.
    #[must_use]
    pub fn nothing() -> Self {
        Self::Named(BTreeSet::new())
    }

    /// Both.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::Named(mut words), Self::Named(more)) => {
                words.extend(more);
                Self::Named(words)
            }
            _ => Self::Everything,
        }
    }
}

/// What running a text needs. Only what reads and writes rows, alone or in a row: whatever opens a
/// transaction block, defines, prepares, calls, or looks at the catalogs may reach anything.
#[must_use]
pub fn to_run(sql: &str) -> Needs {
    let rows = |k: &Kind| {
        matches!(
            k,
            Kind::Empty | Kind::Read | Kind::LockingRead | Kind::Write
        )
    };
    let kinds = statements(sql);
    if !kinds.iter().all(rows) {
        return Needs::Everything;
    }
    let makes_table = kinds.iter().any(|k| *k != Kind::Write);
    match to_prepare(sql) {
        // SELECT … INTO.
        Needs::Named(words) if makes_table && words.contains("into") => Needs::Everything,
        needs => needs,
    }
}

/// What preparing a text needs: its names are looked up then, nothing is run.
#[must_use]
pub fn to_prepare(sql: &str) -> Needs {
    // Others are folded by the locale.
    if !sql.is_ascii() {
        return Needs::Everything;
    }
    match names(sql) {
        Some(words) if !words.iter().any(|w| reaches(w)) => Needs::Named(words),
        _ => Needs::Everything,
    }
}

/// Whether this word may stand for something that finds relations by other means than a name in the
/// text: PostgreSQL's catalogs and the functions over them, types and functions that take a name as
/// a value, the schema of temporary objects itself.
fn reaches(word: &str) -> bool {
    const WORDS: &[&str] = &[
        "information_schema",
        "regclass",
        "regproc",
        "regprocedure",
        "regoper",
        "regoperator",
        "regtype",
        "regrole",
        "regnamespace",
        "regcollation",
        "regconfig",
        "regdictionary",
        "refcursor",
        "current_schema",
        "current_schemas",
        "copy",
        "cursor",
        "fetch",
        "move",
    ];
    word.len() > MAX_NAME
        || word.starts_with("pg_")
        || word.starts_with("_pg_")
        || word.starts_with("has_")
        || WORDS.contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(words: &[&str]) -> Needs {
        Needs::Named(words.iter().map(|w| (*w).to_owned()).collect())
    }

    #[test]
    fn rows_are_reached_by_name() {
        let table = [
            (
                "select count(*) from t1",
                &["select", "count", "from", "t1"][..],
            ),
            ("SELECT 1", &["select"]),
            (
                "select a from \"T 1\" where b = 'pg_class' -- pg_temp",
                &["select", "a", "from", "T 1", "where", "b"],
            ),
            ("delete from x", &["delete", "from", "x"]),
            ("", &[]),
        ];
        for (sql, words) in table {
            assert_eq!(to_run(sql), named(words), "{sql}");
        }
        assert!(
            matches!(to_run("insert into a values (1); update b set c = 2"), Needs::Named(w)
            if w.contains("a") && w.contains("b"))
        );
    }

    #[test]
    fn what_may_reach_anything_needs_everything() {
        for sql in [
            "begin",
            "begin; select 1; commit",
            "commit",
            "savepoint a",
            "do $$ begin perform 1; end $$",
            "call p()",
            "execute p (1)",
            "prepare p as select 1",
            "deallocate p",
            "discard temp",
            "discard all",
            "set search_path = a",
            "reset all",
            "show all",
            "listen a",
            "create table t (a int)",
            "create temp table t (a int)",
            "alter table t add b int",
            "drop table t",
            "truncate t",
            "analyze",
            "vacuum t",
            "lock table t",
            "declare c cursor for select 1",
            "declare c cursor with hold for select 1",
            "fetch all from c",
            "copy t to stdout",
            "copy t from stdin",
            "copy (select 1) to stdout",
            "explain select 1",
            "select * from pg_temp.t",
            "select * from pg_temp_3.t",
            "select * from pg_class",
            "select * from information_schema.tables",
            "select 't'::regclass",
            "select has_table_privilege('t', 'select')",
            "select pg_relation_size('t')",
            "select current_schemas(true)",
            "select * from \u{e9}t\u{e9}",
            "select U&\"d\\0061ta\"",
            "select 1 into temp x",
            "select 1 into x; insert into y values (1)",
            "select this is no sql (",
            "select * from a_name_that_is_longer_than_postgresql_keeps_and_so_stands_for_another_one",
        ] {
            assert_eq!(to_run(sql), Needs::Everything, "{sql}");
        }
    }

    #[test]
    fn preparing_looks_names_up_and_runs_nothing() {
        assert_eq!(to_prepare("select f(1)"), named(&["select", "f"]));
        assert_eq!(to_prepare("select 't'::regclass"), Needs::Everything);
        assert_eq!(to_prepare("select * from pg_temp.t"), Needs::Everything);
    }
}
