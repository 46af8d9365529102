//! Temporary tables, sequences and views: the statements that make them again on another server.
//!
//! Pure. The catalogs tell what there is (`temporary.sql`); what they do not tell, or what these
//! statements would not make again, is a reason why the session cannot be moved. The invariant:
//! nothing is left out silently.
//!
//! What ON COMMIT does to a table is in no catalog (`on_commits` in
//! `src/backend/commands/tablecmds.c`). A table that has a page outside a transaction keeps its
//! rows; for others the statement that made them must have been seen ([`OnCommit`]).

use std::collections::BTreeMap;

use squawk_syntax::ast::AstNode as _;
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::grammar::bare;
use crate::state::literal;

/// Runs in front of the questions, in the same transaction: names come out qualified, as the
/// session's login, and nothing of the session's settings stands in the way.
pub const SETTINGS: &str = "SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), \
     pg_catalog.set_config('role', 'none', true), \
     pg_catalog.set_config('statement_timeout', '0', true), \
     pg_catalog.set_config('client_min_messages', 'error', true)";

/// What runs in front of the statements of [`Objects`] on a fresh server, in one transaction with
/// them. No default of a role stands in their way, and nobody waits for a disk or a standby: what
/// they make does not outlive the backend.
pub const BEFORE_RESTORE: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
     SET LOCAL synchronous_commit = off; SET LOCAL statement_timeout = 0; \
     SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL client_min_messages = error";

/// What runs behind them. Setting a sequence counts as having used it, for `currval` and `lastval`;
/// the session of before had not, or its value is told to be gone.
pub const AFTER_RESTORE: &str = "DISCARD SEQUENCES; COMMIT";

/// The query that [`Objects::add_row`] takes the rows of; behind [`SETTINGS`].
pub const OBJECTS_QUERY: &str = include_str!("temporary.sql");

/// The query that tells whether anything may have changed; behind [`SETTINGS`]. Its first column is
/// the same as long as no object has changed, its second as long as nobody has written rows or used a
/// sequence; the third tells how many bytes the tables have. What this backend has written is counted
/// in the statistics once they are flushed, which [`FLUSH_QUERY`] sees to (`pgstat_report_stat` in
/// `src/backend/utils/activity/pgstat.c`).
pub const FINGERPRINT_QUERY: &str = "\
SELECT coalesce(string_agg(concat_ws(' ', c.oid, c.xmin, c.relfilenode, s.xmin, \
(SELECT concat_ws(' ', count(*), sum(a.xmin::text::int8)) FROM pg_attribute a \
WHERE a.attrelid = c.oid), \
(SELECT sum(r.xmin::text::int8) FROM pg_rewrite r WHERE r.ev_class = c.oid), \
(SELECT count(*) FROM pg_description d WHERE d.objoid = c.oid)), ',' ORDER BY c.oid), ''), \
coalesce(string_agg(concat_ws(' ', pg_relation_size(c.oid), pg_stat_get_tuples_inserted(c.oid), \
pg_stat_get_tuples_updated(c.oid), pg_stat_get_tuples_deleted(c.oid), \
pg_sequence_last_value(s.seqrelid)), ',' ORDER BY c.oid), '') \
|| ' ' || current_setting('track_counts'), \
coalesce(sum(pg_table_size(c.oid)) FILTER (WHERE c.relkind = 'r'), 0)::text \
FROM pg_class c LEFT JOIN pg_sequence s ON s.seqrelid = c.oid \
WHERE c.relnamespace = pg_my_temp_schema()";

/// Has the backend report its statistics when the transaction of this query has ended.
pub const FLUSH_QUERY: &str = "SELECT pg_catalog.pg_stat_force_next_flush()";

/// A step of making temporary objects again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A statement.
    Run(String),
    /// The rows of a table come here.
    Fill {
        /// As it is written in SQL.
        table: String,
        /// The columns that are not computed, as they are written in SQL.
        columns: String,
    },
    /// The position of a sequence is set here.
    Set {
        /// As it is written in SQL.
        sequence: String,
    },
}

impl Step {
    /// The query that gives the rows of a table as binary copy data.
    #[must_use]
    pub fn copy_out(table: &str, columns: &str) -> String {
        format!("COPY {table} ({columns}) TO STDOUT (FORMAT binary)")
    }

    /// The query that takes them.
    #[must_use]
    pub fn copy_in(table: &str, columns: &str) -> String {
        format!("COPY {table} ({columns}) FROM STDIN (FORMAT binary)")
    }

    /// The query for the position of a sequence: a row of the last value, and whether it was handed
    /// out.
    #[must_use]
    pub fn position(sequence: &str) -> String {
        format!("SELECT last_value, is_called FROM {sequence}")
    }

    /// The statement that sets it.
    #[must_use]
    pub fn set_position(sequence: &str, last: &str, called: &str) -> String {
        let (sequence, last) = (literal(sequence), literal(last));
        format!(
            "SELECT pg_catalog.setval({sequence}, {last}::pg_catalog.int8, {})",
            called == "t"
        )
    }
}

/// What ON COMMIT does to the rows of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnCommit {
    /// Nothing, the default.
    Preserve,
    /// They go.
    DeleteRows,
}

/// The temporary objects of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// What makes them, in this order.
    pub steps: Vec<Step>,
    /// Why they cannot be made again.
    pub unmovable: Vec<String>,
}

impl Objects {
    /// Takes a row of [`OBJECTS_QUERY`]; `seen` is what was seen to be made, by table.
    pub fn add_row(
        &mut self,
        kind: &str,
        name: &str,
        text: &str,
        seen: &BTreeMap<String, OnCommit>,
    ) {
        match kind {
            "x" => self.unmovable.push(format!("{name} cannot be made again")),
            "d" => self.steps.push(Step::Run(text.to_owned())),
            "e" => match seen.get(name) {
                Some(OnCommit::Preserve) => {}
                Some(OnCommit::DeleteRows) => self.delete_on_commit(text),
                None => self.unmovable.push(format!(
                    "table \"{name}\" is empty, and what ON COMMIT does to it is not known"
                )),
            },
            "t" if text.is_empty() => {}
            "t" => self.steps.push(Step::Fill {
                table: name.to_owned(),
                columns: text.to_owned(),
            }),
            "s" => self.steps.push(Step::Set {
                sequence: name.to_owned(),
            }),
            _ => {}
        }
    }

    fn delete_on_commit(&mut self, table: &str) {
        let begins = format!("CREATE TABLE {table} (");
        for step in &mut self.steps {
            if let Step::Run(sql) = step
                && sql.starts_with(&begins)
            {
                sql.push_str(" ON COMMIT DELETE ROWS");
            }
        }
    }
}

/// The temporary tables that a text makes, with what ON COMMIT does to them.
#[must_use]
pub fn made(sql: &str) -> Vec<(String, OnCommit)> {
    let mentions = |word: &[u8]| {
        sql.as_bytes()
            .windows(4)
            .any(|w| w.eq_ignore_ascii_case(word))
    };
    if !mentions(b"temp") {
        return Vec::new();
    }
    let parse = SourceFile::parse(sql);
    let tree = parse.tree();
    tree.syntax()
        .children()
        .filter_map(|n| table_made(&n))
        .collect()
}

fn table_made(node: &squawk_syntax::SyntaxNode) -> Option<(String, OnCommit)> {
    let tokens = node
        .descendants_with_tokens()
        .filter_map(|e| e.into_token());
    let blank = |kind| matches!(kind, SyntaxKind::WHITESPACE | SyntaxKind::COMMENT);
    let words: Vec<String> = tokens
        .filter(|t| !blank(t.kind()))
        .map(|t| t.text().to_owned())
        .collect();
    let is = |at: usize, word: &str| words.get(at).is_some_and(|w| w.eq_ignore_ascii_case(word));
    let temporary = |at| is(at, "temp") || is(at, "temporary");
    if !is(0, "create") {
        return None;
    }
    let mut at = 1;
    if is(at, "global") || is(at, "local") {
        at += 1;
    }
    if !temporary(at) || !is(at + 1, "table") {
        return None;
    }
    at += 2;
    if is(at, "if") && is(at + 1, "not") && is(at + 2, "exists") {
        at += 3;
    }
    if words.get(at + 1).is_some_and(|w| w == ".") {
        at += 2;
    }
    let name = bare(words.get(at)?);
    let on_commit = (at..words.len()).find(|at| is(*at, "on") && is(at + 1, "commit"));
    match on_commit {
        None => Some((name, OnCommit::Preserve)),
        Some(at) if is(at + 2, "preserve") => Some((name, OnCommit::Preserve)),
        Some(at) if is(at + 2, "delete") => Some((name, OnCommit::DeleteRows)),
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_seen_with_what_on_commit_does() {
        let one = |name: &str, does| vec![(name.to_owned(), does)];
        let preserve = |name| one(name, OnCommit::Preserve);
        for (sql, expected) in [
            ("create temp table t (a int)", preserve("t")),
            (
                "CREATE LOCAL TEMPORARY TABLE IF NOT EXISTS \"My T\" AS SELECT 1",
                preserve("My T"),
            ),
            (
                "create temp table pg_temp.T (a int) on commit preserve rows",
                preserve("t"),
            ),
            (
                "create /* x */ temp table t (a int) on  commit delete rows;",
                one("t", OnCommit::DeleteRows),
            ),
            ("create temp table t (a int) on commit drop", vec![]),
            ("create table t (a int)", vec![]),
            ("select 'create temp table t'", vec![]),
            ("create temp view t as select 1", vec![]),
        ] {
            assert_eq!(made(sql), expected, "{sql}");
        }
        assert_eq!(
            made("begin; create temp table a(); create temp table b()").len(),
            2
        );
    }

    #[test]
    fn rows_become_steps_and_reasons() {
        let mut seen = BTreeMap::new();
        seen.insert("gone".to_owned(), OnCommit::DeleteRows);
        let mut objects = Objects::default();
        for (kind, name, text) in [
            ("d", "pg_temp.gone", "CREATE TABLE pg_temp.gone (a integer)"),
            ("e", "gone", "pg_temp.gone"),
            ("t", "pg_temp.gone", "a"),
            ("s", "pg_temp.s", ""),
        ] {
            objects.add_row(kind, name, text, &seen);
        }
        let made = "CREATE TABLE pg_temp.gone (a integer) ON COMMIT DELETE ROWS";
        let (table, columns) = ("pg_temp.gone".to_owned(), "a".to_owned());
        let sequence = "pg_temp.s".to_owned();
        let steps = [
            Step::Run(made.to_owned()),
            Step::Fill { table, columns },
            Step::Set { sequence },
        ];
        assert_eq!(objects.steps, steps);
        assert!(objects.unmovable.is_empty());
        objects.add_row("e", "other", "pg_temp.other", &seen);
        objects.add_row("x", "triggers or foreign keys of \"t\"", "", &seen);
        assert_eq!(objects.unmovable.len(), 2);
    }
}
