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
use std::sync::LazyLock;

use squawk_syntax::ast::AstNode as _;
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::grammar::bare;
use crate::state::literal;

/// Runs in front of the questions, in the same transaction: names come out qualified, as the
/// session's login, in one encoding, and nothing of the session's settings stands in the way.
pub const SETTINGS: &str = "SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), \
     pg_catalog.set_config('role', 'none', true), \
     pg_catalog.set_config('statement_timeout', '0', true), \
     pg_catalog.set_config('client_min_messages', 'error', true), \
     pg_catalog.set_config('client_encoding', 'UTF8', true)";

/// What runs in front of the statements of [`Objects`] on a fresh server, in one transaction with
/// them. No default of a role stands in their way, and nobody waits for a disk or a standby: what
/// they make does not outlive the backend.
pub const BEFORE_RESTORE: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
     SET LOCAL synchronous_commit = off; SET LOCAL statement_timeout = 0; \
     SET LOCAL search_path = pg_catalog, pg_temp; SET LOCAL client_min_messages = error; \
     SET LOCAL client_encoding = 'UTF8'; SET LOCAL check_function_bodies = off";

/// What runs behind them. Setting a sequence counts as having used it, for `currval` and `lastval`;
/// the session of before had not, or its value is told to be gone.
pub const AFTER_RESTORE: &str = "DISCARD SEQUENCES; COMMIT";

/// Queries for what there is, by name (`temporary.sql`).
static SECTIONS: LazyLock<BTreeMap<&'static str, &'static str>> = LazyLock::new(|| {
    let parts = include_str!("temporary.sql").split("\n-- ## ").skip(1);
    let named = |part: &'static str| {
        let (head, sql) = part.split_once('\n')?;
        let name = head.split(':').next().unwrap_or(head);
        Some((name.trim(), sql.trim()))
    };
    parts.filter_map(named).collect()
});

/// The query that tells whether anything may have changed; behind [`SETTINGS`]. Its first column is
/// the same as long as no object has changed, its second as long as nobody has written rows or used a
/// sequence; the third tells how many bytes the tables have. What this backend has written is counted
/// in the statistics once they are flushed, which [`FLUSH_QUERY`] sees to (`pgstat_report_stat` in
/// `src/backend/utils/activity/pgstat.c`). The fourth tells cursors apart.
const FINGERPRINT: &str = "\
SELECT concat((SELECT concat(count(*), ' ', sum(objid::int8)) FROM pg_depend WHERE refclassid = 'pg_namespace'::regclass AND refobjid = pg_my_temp_schema() \
AND NOT EXISTS (SELECT FROM pg_type t WHERE classid = 'pg_type'::regclass AND t.oid = objid AND typname = '_helios_mark')), string_agg(concat_ws(' ', c.oid, c.xmin, c.relfilenode, s.xmin, \
(SELECT concat(count(*), ' ', sum(a.xmin::text::int8)) FROM pg_attribute a WHERE a.attrelid = c.oid), \
(SELECT concat(count(*), ' ', sum(x.xmin::text::int8), ' ', sum(i.xmin::text::int8)) FROM pg_index i JOIN pg_class x ON x.oid = i.indexrelid WHERE i.indrelid = c.oid), \
(SELECT concat(count(*), ' ', sum(k.xmin::text::int8)) FROM pg_constraint k WHERE k.conrelid = c.oid), \
(SELECT concat(count(*), ' ', sum(r.xmin::text::int8)) FROM pg_rewrite r WHERE r.ev_class = c.oid), \
(SELECT concat(count(*), ' ', sum(t.xmin::text::int8)) FROM pg_trigger t WHERE t.tgrelid = c.oid), \
(SELECT concat(count(*), ' ', sum(e.xmin::text::int8)) FROM pg_description e WHERE e.objoid = c.oid)), ',' ORDER BY c.oid)), \
concat(string_agg(concat_ws(' ', pg_relation_size(c.oid), pg_stat_get_tuples_inserted(c.oid), \
pg_stat_get_tuples_updated(c.oid), pg_stat_get_tuples_deleted(c.oid), pg_stat_get_last_analyze_time(c.oid), \
pg_sequence_last_value(s.seqrelid)), ',' ORDER BY c.oid), ' ', current_setting('track_counts')), \
coalesce(sum(pg_table_size(c.oid)) FILTER (WHERE c.relkind = 'r'), 0)::text, {cursors} \
FROM pg_depend d JOIN pg_class c ON c.oid = d.objid LEFT JOIN pg_sequence s ON s.seqrelid = c.oid \
WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_namespace'::regclass AND d.refobjid = pg_my_temp_schema()";

/// The query that tells whether anything in `pg_temp` has changed since, and how large its tables are.
#[must_use]
pub fn fingerprint_query() -> String {
    FINGERPRINT.replace("{cursors}", crate::cursors::IDENTITIES)
}

/// The same for what can change in place and is no relation; only where there is such
/// ([`Inventory::has_others`]).
pub const OTHERS_QUERY: &str = "\
SELECT coalesce(string_agg(concat_ws(' ', d.objid, p.xmin, t.xmin, s.xmin, \
(SELECT concat(count(*), ' ', sum(e.xmin::text::int8)) FROM pg_enum e WHERE e.enumtypid = t.oid), \
(SELECT concat(count(*), ' ', sum(k.xmin::text::int8)) FROM pg_constraint k \
WHERE k.contypid = t.oid), \
(SELECT sum(c.xmin::text::int8) FROM pg_class c WHERE c.oid = t.typrelid), \
(SELECT concat(count(*), ' ', sum(a.xmin::text::int8)) FROM pg_attribute a \
WHERE a.attrelid = t.typrelid)), ',' ORDER BY d.classid, d.objid), '') \
FROM pg_depend d LEFT JOIN pg_proc p ON d.classid = 'pg_proc'::regclass AND p.oid = d.objid \
LEFT JOIN pg_type t ON d.classid = 'pg_type'::regclass AND t.oid = d.objid \
LEFT JOIN pg_statistic_ext s ON d.classid = 'pg_statistic_ext'::regclass AND s.oid = d.objid \
WHERE d.classid <> 'pg_class'::regclass AND d.refclassid = 'pg_namespace'::regclass \
AND d.refobjid = pg_my_temp_schema() AND t.typname IS DISTINCT FROM '_helios_mark'";

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

/// What kinds of objects there are, and their OIDs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inventory {
    relations: Vec<String>,
    indexes: Vec<String>,
    types: Vec<String>,
    functions: Vec<String>,
    statistics: Vec<String>,
    tables: bool,
    sequences: bool,
    views: bool,
    triggers: bool,
    inherits: bool,
    unknown: bool,
}

impl Inventory {
    /// The query whose rows [`Self::add_row`] takes; behind [`SETTINGS`].
    #[must_use]
    pub fn query() -> &'static str {
        SECTIONS.get("inventory").copied().unwrap_or_default()
    }

    /// Takes a row.
    pub fn add_row(&mut self, row: &[Option<String>]) {
        let [Some(kind), Some(oid), flags] = row else {
            self.unknown = true;
            return;
        };
        let list = match kind.as_str() {
            "i" | "I" => &mut self.indexes,
            "T" => &mut self.types,
            "F" => &mut self.functions,
            "E" => &mut self.statistics,
            "?" => {
                self.unknown = true;
                return;
            }
            _ => &mut self.relations,
        };
        list.push(oid.clone());
        self.tables |= matches!(kind.as_str(), "r" | "p");
        self.sequences |= kind == "S";
        self.views |= kind == "v";
        let flagged = |word| flags.as_deref().unwrap_or("").split(' ').any(|f| f == word);
        self.triggers |= flagged("triggers");
        self.inherits |= flagged("inherits");
    }

    /// Whether there is something that changes without a trace in the relations.
    #[must_use]
    pub fn has_others(&self) -> bool {
        !(self.types.is_empty() && self.functions.is_empty() && self.statistics.is_empty())
    }

    /// The queries whose rows, together, [`Objects::from_rows`] takes; behind [`SETTINGS`].
    #[must_use]
    pub fn queries(&self) -> Vec<String> {
        let (types, functions) = (!self.types.is_empty(), !self.functions.is_empty());
        let wanted = [
            ("relations", true),
            ("tables", self.tables),
            ("constraints", self.tables),
            ("inheritance", self.inherits),
            ("triggers", self.triggers),
            ("sequences", self.sequences),
            ("views", self.views),
            ("types", types),
            ("functions", functions),
            ("statistics", !self.statistics.is_empty()),
            ("order", types || functions || self.views),
        ];
        let wanted = wanted.into_iter().filter(|(_, wanted)| *wanted);
        let mut queries: Vec<String> = wanted.map(|(name, _)| self.section(name)).collect();
        if self.unknown {
            queries.push("SELECT 0, 0, 'x', 'another object', ''".to_owned());
        }
        queries
    }

    fn section(&self, name: &str) -> String {
        let array = |oids: &[String]| format!("'{{{}}}'::oid[]", oids.join(","));
        let sql = SECTIONS.get(name).copied().unwrap_or_default();
        // What heirs are made with, where there are any.
        let heirs = |name| match self.inherits {
            true => SECTIONS.get(name).copied().unwrap_or_default(),
            false => "NULL",
        };
        sql.replace("{partition}", heirs("partition"))
            .replace("{parents}", heirs("parents"))
            .replace("{relations}", &array(&self.relations))
            .replace("{indexes}", &array(&self.indexes))
            .replace("{types}", &array(&self.types))
            .replace("{functions}", &array(&self.functions))
            .replace("{statistics}", &array(&self.statistics))
    }
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
    /// From the rows of [`Inventory::queries`]; `seen` is what was seen to be made, by table.
    #[must_use]
    pub fn from_rows(rows: &[Vec<Option<String>>], seen: &BTreeMap<String, OnCommit>) -> Self {
        let mut objects = Self::default();
        let mut known = Vec::with_capacity(rows.len());
        for row in rows {
            let [step, at, kind, name, text] = row.as_slice() else {
                objects.unmovable.push("an answer of the server".into());
                continue;
            };
            let number = |n: &Option<String>| n.as_deref().and_then(|n| n.parse::<u64>().ok());
            match (kind.as_deref(), name, text) {
                // Nothing stands in the way of this relation.
                (Some("x"), None, _) => {}
                (Some(kind), Some(name), Some(text)) => {
                    known.push(((number(step), number(at)), kind, name, text));
                }
                _ => objects.unmovable.push("an answer of the server".into()),
            }
        }
        known.sort_by_key(|(place, ..)| *place);
        for (_, kind, name, text) in known {
            objects.add(kind, name, text, seen);
        }
        objects
    }

    fn add(&mut self, kind: &str, name: &str, text: &str, seen: &BTreeMap<String, OnCommit>) {
        match kind {
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
            _ => self.unmovable.push(format!("{name} cannot be made again")),
        }
    }

    fn delete_on_commit(&mut self, table: &str) {
        let begins = format!("CREATE TABLE {table} ");
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

    fn row(step: u32, kind: &str, name: &str, text: &str) -> Vec<Option<String>> {
        let texts = [&step.to_string(), "77", kind, name, text];
        texts.map(|t| Some(t.to_owned())).to_vec()
    }

    #[test]
    fn rows_become_steps_and_reasons() {
        let mut seen = BTreeMap::new();
        seen.insert("gone".to_owned(), OnCommit::DeleteRows);
        let rows = [
            row(15, "s", "pg_temp.s", ""),
            row(6, "t", "pg_temp.gone", "a"),
            row(5, "e", "gone", "pg_temp.gone"),
            row(
                3,
                "d",
                "pg_temp.gone",
                "CREATE TABLE pg_temp.gone (a integer)",
            ),
            vec![
                Some("0".into()),
                Some("1".into()),
                Some("x".into()),
                None,
                Some(String::new()),
            ],
        ];
        let objects = Objects::from_rows(&rows, &seen);
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
        let rows = [
            row(5, "e", "other", "pg_temp.other"),
            row(0, "x", "privileges of \"t\"", ""),
            vec![Some("3".into())],
            row(3, "?", "what nobody knows", ""),
        ];
        assert_eq!(Objects::from_rows(&rows, &seen).unmovable.len(), 4);
    }

    #[test]
    fn only_what_there_is_is_asked_for() {
        let some = |text: &str| Some(text.to_owned());
        let mut inventory = Inventory::default();
        inventory.add_row(&[some("r"), some("16384"), some("")]);
        inventory.add_row(&[some("i"), some("16385"), some("")]);
        let queries = inventory.queries();
        assert_eq!(queries.len(), 3);
        assert!(!inventory.has_others());
        inventory.add_row(&[some("r"), some("16386"), some("triggers inherits")]);
        inventory.add_row(&[some("F"), some("16387"), some("")]);
        inventory.add_row(&[some("?"), some("16388"), some("")]);
        let queries = inventory.queries();
        assert_eq!(queries.len(), 8);
        assert!(inventory.has_others());
        for query in queries {
            assert!(!query.is_empty() && !query.contains("[]{"), "{query}");
            let left = [
                "{relations}",
                "{indexes}",
                "{types}",
                "{partition}",
                "{parents}",
            ];
            assert!(!left.iter().any(|p| query.contains(p)), "{query}");
        }
    }
}
