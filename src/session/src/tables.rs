//! The tables of the schema `helios_proxy`, which no server has: where a statement names one, a
//! source of rows takes its place, and the server runs the statement as usual.
//!
//! Pure text and bytes. A query gets the rows as a literal; a statement that is prepared gets a
//! further parameter, so that each Bind brings the rows of its moment. Both are journaled as they
//! are sent, so a replay finds the same rows. The invariant: only names of tables and columns are
//! replaced, never a part of a literal, a comment or a quoted name.

use std::sync::LazyLock;

use helios_wire::frontend;
use memchr::memmem::Finder;
use squawk_syntax::ast::AstNode;
use squawk_syntax::{SourceFile, SyntaxKind};

use crate::grammar::bare;
use crate::keyword::first_word;
use crate::tracker::until_zero;

/// The schema's name.
pub const SCHEMA: &str = "helios_proxy";

/// Type `text`: its text and binary forms are the same bytes.
const TEXT: u32 = 25;

/// A table of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// The last migrations.
    SessionMigrations,
    /// The protection report.
    Protection,
}

type Columns = &'static [(&'static str, &'static str)];

impl Table {
    const ALL: [Self; 2] = [Self::SessionMigrations, Self::Protection];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SessionMigrations => "session_migrations",
            Self::Protection => "protection",
        }
    }

    /// Its columns with their types, in the order of the rows' values.
    #[must_use]
    pub fn columns(self) -> Columns {
        match self {
            Self::SessionMigrations => &[
                ("session_id", "int8"),
                ("migration_time", "timestamptz"),
                ("datname", "text"),
                ("usename", "text"),
                ("application_name", "text"),
                ("kind", "text"),
                ("reason", "text"),
                ("outcome", "text"),
                ("duration", "interval"),
                ("state_bytes", "int8"),
                ("statements_replayed", "int8"),
                ("epoch", "int8"),
                ("sqlstate", "text"),
                ("error", "text"),
            ],
            Self::Protection => &[
                ("datname", "text"),
                ("usename", "text"),
                ("application_name", "text"),
                ("protected", "bool"),
                ("reason", "text"),
                ("transactions", "int8"),
                ("statements", "int8"),
                ("transaction_seconds", "float8"),
                ("idle_seconds", "float8"),
            ],
        }
    }

    fn letter(self) -> char {
        match self {
            Self::SessionMigrations => 'm',
            Self::Protection => 'p',
        }
    }

    /// What stands for the table in a FROM list, with or without an alias behind it: a join in
    /// parentheses shows the names in it, until an alias hides them. `rows` is an expression of
    /// type text, a JSON array of arrays.
    fn source(self, rows: &str, occurrence: usize) -> String {
        let columns: Vec<String> = self
            .columns()
            .iter()
            .enumerate()
            .map(|(at, (name, kind))| {
                format!("(r OPERATOR(pg_catalog.->>) {at})::pg_catalog.{kind} AS {name}")
            })
            .collect();
        format!(
            "((SELECT {} FROM pg_catalog.jsonb_array_elements({rows}::pg_catalog.jsonb) AS r) \
             AS {} CROSS JOIN (SELECT) AS helios_proxy_{occurrence})",
            columns.join(", "),
            self.name()
        )
    }
}

/// Whether a message may name the schema; cheap enough for every statement.
#[must_use]
pub fn mentions(bytes: &[u8]) -> bool {
    static LOWER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("helios_proxy"));
    static UPPER: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("HELIOS_PROXY"));
    LOWER.find(bytes).is_some() || UPPER.find(bytes).is_some()
}

struct Token {
    kind: SyntaxKind,
    start: usize,
    end: usize,
}

fn tokens(sql: &str) -> Vec<Token> {
    let tree = SourceFile::parse(sql).tree();
    let all = tree.syntax().descendants_with_tokens();
    all.filter_map(|e| e.into_token())
        .filter(|t| !matches!(t.kind(), SyntaxKind::WHITESPACE | SyntaxKind::COMMENT))
        .map(|t| Token {
            kind: t.kind(),
            start: t.text_range().start().into(),
            end: t.text_range().end().into(),
        })
        .collect()
}

/// The statement with sources of rows in the place of tables; `rows` gives the expression for one.
/// `None` where it names none.
pub fn replace(sql: &str, mut rows: impl FnMut(Table) -> String) -> Option<String> {
    let tokens = tokens(sql);
    let text = |at: usize| {
        tokens
            .get(at)
            .and_then(|t| sql.get(t.start..t.end))
            .unwrap_or("")
    };
    let is = |at: usize, word: &str| text(at).eq_ignore_ascii_case(word);
    let mut out = String::new();
    let (mut done, mut occurrence) = (0, 0);
    for at in 0..tokens.len() {
        let names = bare(text(at)) == SCHEMA && text(at + 1) == ".";
        let table = Table::ALL
            .into_iter()
            .find(|t| bare(text(at + 2)) == t.name());
        let (true, Some(table)) = (names, table) else {
            continue;
        };
        let before = at.checked_sub(1);
        let behind = |word: &str| before.is_some_and(|b| is(b, word));
        let begin = tokens[at].start;
        if text(at + 3) == "." {
            // A column's name: what stands for the table goes by its name alone.
            out.push_str(sql.get(done..begin)?);
            done = tokens[at + 2].start;
            continue;
        }
        let deleted = at >= 2 && is(at - 2, "delete");
        let listed = [",", "(", "join", "only"].iter().any(|w| behind(w));
        let (begin, head) = match () {
            () if at == 1 && behind("table") => (tokens[0].start, "SELECT * FROM "),
            () if listed || (behind("from") && !deleted) => (begin, ""),
            () => continue,
        };
        occurrence += 1;
        out.push_str(sql.get(done..begin)?);
        out.push_str(head);
        out.push_str(&table.source(&rows(table), occurrence));
        done = tokens[at + 2].end;
    }
    if done == 0 {
        return None;
    }
    out.push_str(sql.get(done..)?);
    Some(out)
}

/// Whether a statement may have parameters; others get their rows as literals.
fn takes_parameters(sql: &str) -> bool {
    const WORDS: [&[u8]; 8] = [
        b"select", b"with", b"values", b"table", b"insert", b"update", b"delete", b"merge",
    ];
    let first = first_word(sql.as_bytes());
    WORDS.iter().any(|w| first.eq_ignore_ascii_case(w))
}

/// A comment at the end of a prepared text says which rows its Binds have to bring.
fn marker(tables: &[Table]) -> String {
    let letters: String = tables.iter().map(|t| t.letter()).collect();
    format!("\n/*{SCHEMA}={letters}*/")
}

/// The tables whose rows a Bind of this text has to bring, in order.
#[must_use]
pub fn wanted(sql: &[u8]) -> &'static [Table] {
    use Table::{Protection as P, SessionMigrations as M};
    const KNOWN: [&[Table]; 4] = [&[M], &[P], &[M, P], &[P, M]];
    let of = |tables: &&&[Table]| sql.ends_with(marker(tables).as_bytes());
    KNOWN.iter().find(of).copied().unwrap_or(&[])
}

/// A message whose rows are to be brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// Query.
    Query,
    /// Parse.
    Parse,
}

/// A Query or Parse frame with sources of rows in the place of tables. `literal` gives the rows as
/// a literal. `None` where the frame names no table (or is none of these).
pub fn rewrite(
    message: Message,
    frame: &[u8],
    literal: impl FnMut(Table) -> String,
) -> Option<Vec<u8>> {
    let body = frame.get(5..)?;
    match message {
        Message::Query => {
            let sql = replace(std::str::from_utf8(until_zero(body)).ok()?, literal)?;
            framed(frontend::QUERY, &[sql.as_bytes(), b"\0"])
        }
        Message::Parse => {
            let name = until_zero(body);
            let rest = body.get(name.len() + 1..)?;
            let sql = until_zero(rest);
            let types = rest.get(sql.len() + 1..)?;
            let text = std::str::from_utf8(sql).ok()?;
            let (sql, types) = if takes_parameters(text) {
                with_parameters(text, types)?
            } else {
                (replace(text, literal)?, types.to_vec())
            };
            framed(
                frontend::PARSE,
                &[name, b"\0", sql.as_bytes(), b"\0", &types],
            )
        }
    }
}

/// The text with a parameter behind those it has for each table, and the types to go with it.
fn with_parameters(sql: &str, types: &[u8]) -> Option<(String, Vec<u8>)> {
    let numbers = tokens(sql).into_iter().filter_map(|t| {
        let text = sql.get(t.start..t.end)?;
        let digits = text
            .strip_prefix('$')
            .filter(|_| t.kind == SyntaxKind::POSITIONAL_PARAM);
        digits?.parse::<u16>().ok()
    });
    let (count, given) = types.split_at_checked(2)?;
    let count = u16::from_be_bytes(count.try_into().ok()?);
    let last = numbers.max().unwrap_or(0).max(count);
    let mut tables: Vec<Table> = Vec::new();
    let mut text = replace(sql, |table| {
        let at = tables.iter().position(|t| *t == table).unwrap_or_else(|| {
            tables.push(table);
            tables.len() - 1
        });
        format!("${}", usize::from(last) + at + 1)
    })?;
    text.push_str(&marker(&tables));
    let ours = u16::try_from(tables.len()).ok()?;
    let mut all = last.checked_add(ours)?.to_be_bytes().to_vec();
    all.extend_from_slice(given);
    for _ in count..last {
        all.extend_from_slice(&0_u32.to_be_bytes());
    }
    for _ in 0..ours {
        all.extend_from_slice(&TEXT.to_be_bytes());
    }
    Some((text, all))
}

/// A Bind frame with further values, of type text, behind its own. `None` for one that is broken.
#[must_use]
pub fn bind(frame: &[u8], values: &[String]) -> Option<Vec<u8>> {
    let body = frame.get(5..)?;
    let portal = until_zero(body).len() + 1;
    let names = portal + until_zero(body.get(portal..)?).len() + 1;
    let short = |at: usize| -> Option<u16> {
        Some(u16::from_be_bytes(body.get(at..at + 2)?.try_into().ok()?))
    };
    let formats = short(names)?;
    let values_at = names + 2 + 2 * usize::from(formats);
    let count = short(values_at)?;
    let mut end = values_at + 2;
    for _ in 0..count {
        let len = i32::from_be_bytes(body.get(end..end + 4)?.try_into().ok()?);
        end += 4 + usize::try_from(len).unwrap_or(0);
    }
    let ours = u16::try_from(values.len()).ok()?;
    // None or one are for all of them; else each has its own.
    let more = if formats > 1 { ours } else { 0 };
    let mut all = body.get(..names)?.to_vec();
    all.extend_from_slice(&(formats + more).to_be_bytes());
    all.extend_from_slice(body.get(names + 2..values_at)?);
    all.extend(std::iter::repeat_n(0, usize::from(more) * 2));
    all.extend_from_slice(&count.checked_add(ours)?.to_be_bytes());
    all.extend_from_slice(body.get(values_at + 2..end)?);
    for value in values {
        all.extend_from_slice(&u32::try_from(value.len()).ok()?.to_be_bytes());
        all.extend_from_slice(value.as_bytes());
    }
    all.extend_from_slice(body.get(end..)?);
    framed(frontend::BIND, &[&all])
}

/// A ParameterDescription without its last `ours` parameters.
#[must_use]
pub fn described(frame: &[u8], ours: usize) -> Option<Vec<u8>> {
    let count = u16::from_be_bytes(frame.get(5..7)?.try_into().ok()?);
    let left = usize::from(count).checked_sub(ours)?;
    let count = u16::try_from(left).ok()?.to_be_bytes();
    framed(*frame.first()?, &[&count, frame.get(7..7 + 4 * left)?])
}

fn framed(tag: u8, parts: &[&[u8]]) -> Option<Vec<u8>> {
    let len = 4 + parts.iter().map(|p| p.len()).sum::<usize>();
    let mut frame = vec![tag];
    frame.extend_from_slice(&i32::try_from(len).ok()?.to_be_bytes());
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    Some(frame)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::cast_possible_truncation, reason = "small numbers")]
    use super::*;

    /// Formats, their codes, values; codes that are added.
    type Case<'a> = (u16, &'a [u8], &'a [&'a [u8]], &'a [u8]);

    /// With the sources cut down to what they are for.
    fn replaced(sql: &str) -> Option<String> {
        let mut text = replace(sql, |t| format!("<{}>", t.name()))?;
        while let Some(from) = text.find("((SELECT (r") {
            let rows = from + text[from..].find("ements(")? + 7;
            let to = from + text[from..].find(") AS helios_proxy_").map(|n| n + 19)?;
            let shown = text[rows..rows + text[rows..].find(':')?].to_owned();
            text.replace_range(from..=to, &shown);
        }
        Some(text)
    }

    #[test]
    fn tables_and_columns_are_replaced_and_nothing_else() {
        let cases = [
            (
                "SELECT * FROM helios_proxy.protection",
                "SELECT * FROM <protection>",
            ),
            (
                "select m.* from HELIOS_PROXY.Session_Migrations as m where 'helios_proxy.protection' <> ''",
                "select m.* from <session_migrations> as m where 'helios_proxy.protection' <> ''",
            ),
            (
                "SELECT 1 FROM a, \"helios_proxy\" . protection p JOIN helios_proxy.session_migrations USING (x)",
                "SELECT 1 FROM a, <protection> p JOIN <session_migrations> USING (x)",
            ),
            (
                "SELECT helios_proxy.protection.reason FROM helios_proxy.protection -- helios_proxy.protection",
                "SELECT protection.reason FROM <protection> -- helios_proxy.protection",
            ),
            (
                "TABLE helios_proxy.protection",
                "SELECT * FROM <protection>",
            ),
            (
                "COPY (SELECT * FROM helios_proxy.protection) TO STDOUT",
                "COPY (SELECT * FROM <protection>) TO STDOUT",
            ),
        ];
        for (sql, want) in cases {
            assert_eq!(replaced(sql).as_deref(), Some(want), "{sql}");
        }
        for sql in [
            "SELECT 'helios_proxy.protection'",
            "SELECT $$ FROM helios_proxy.protection $$",
            "SELECT * FROM helios_proxy.nothing",
            "SELECT * FROM x.helios_proxy.protection",
            "SELECT * FROM \"HELIOS_PROXY\".protection",
            "DELETE FROM helios_proxy.protection",
            "INSERT INTO helios_proxy.protection VALUES (1)",
            "DROP TABLE helios_proxy.protection",
            "/* FROM helios_proxy.protection */ SELECT 1",
        ] {
            assert_eq!(replaced(sql), None, "{sql}");
        }
    }

    fn parse(sql: &str, types: &[u32]) -> Vec<u8> {
        let mut tail = (types.len() as u16).to_be_bytes().to_vec();
        types
            .iter()
            .for_each(|t| tail.extend_from_slice(&t.to_be_bytes()));
        framed(frontend::PARSE, &[b"s\0", sql.as_bytes(), b"\0", &tail]).unwrap()
    }

    #[test]
    fn a_prepared_statement_gets_a_parameter_behind_its_own() {
        let sql = "SELECT '$9' FROM helios_proxy.protection a, helios_proxy.session_migrations b, \
                   helios_proxy.protection c WHERE a.reason = $2";
        let frame = rewrite(Message::Parse, &parse(sql, &[23]), |_| unreachable!()).unwrap();
        let text = until_zero(&frame[7..]);
        let shown = String::from_utf8_lossy(text);
        assert_eq!(shown.matches("$3::").count(), 2, "{shown}");
        assert_eq!(shown.matches("$4::").count(), 1, "{shown}");
        assert_eq!(wanted(text), [Table::Protection, Table::SessionMigrations]);
        let types: Vec<u8> = [23_u32, 0, 25, 25]
            .iter()
            .flat_map(|t| t.to_be_bytes())
            .collect();
        assert!(frame.ends_with(&[&[0, 0, 4], &types[..]].concat()));
        assert!(wanted(b"SELECT 1").is_empty());
        let explain = parse("EXPLAIN TABLE x, helios_proxy.protection", &[]);
        let frame = rewrite(Message::Parse, &explain, |_| "'[]'".into()).unwrap();
        assert!(wanted(until_zero(&frame[7..])).is_empty());
    }

    #[test]
    fn values_follow_the_clients_own() {
        let cases: [Case<'_>; 4] = [
            (0, &[], &[b"x"], &[]),
            (1, &[0, 1], &[b"x", b"yy"], &[]),
            (2, &[0, 1, 0, 0], &[b"x", b"yy"], &[0, 0]),
            (0, &[], &[], &[]),
        ];
        for (formats, codes, values, added) in cases {
            let build = |formats: u16, codes: &[&[u8]], values: &[&[u8]]| {
                let mut body = b"p\0s\0".to_vec();
                body.extend(formats.to_be_bytes());
                body.extend(codes.concat());
                body.extend((values.len() as u16).to_be_bytes());
                for v in values {
                    body.extend((v.len() as u32).to_be_bytes());
                    body.extend_from_slice(v);
                }
                body.extend([0, 1, 0, 1]);
                framed(frontend::BIND, &[&body]).unwrap()
            };
            let got = bind(&build(formats, &[codes], values), &["[]".into()]);
            let more = formats + added.len() as u16 / 2;
            let want = build(more, &[codes, added], &[values, &[b"[]"]].concat());
            assert_eq!(got, Some(want));
        }
        assert_eq!(bind(b"B\0\0\0\x08p\0s\0", &["[]".into()]), None);
    }

    #[test]
    fn the_description_is_that_of_the_clients_parameters() {
        let frame = [b"t\0\0\0\x0e\0\x02".as_slice(), &[0, 0, 0, 23, 0, 0, 0, 25]].concat();
        let want = [b"t\0\0\0\x0a\0\x01".as_slice(), &[0, 0, 0, 23]].concat();
        assert_eq!(described(&frame, 1), Some(want));
        assert_eq!(described(&frame, 3), None);
    }
}
