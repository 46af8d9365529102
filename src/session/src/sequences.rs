//! Values of sequences that a client has seen: found in what its statements returned.
//!
//! Pure. Which sequence a column takes its values from is for the server's catalogs to say; here
//! are the columns, by table and number, their values, and the one literal argument of `nextval`.
//! A guess too many costs a question: the replay is compared with what the client saw all the same.

pub mod preallocate;
pub mod run;

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helios_wire::message::read;
use helios_wire::{frontend, peek_header};

use crate::grammar;
use crate::kept::inserts;
use crate::reply::{Outcome, Reply};
use crate::state::PreparedStatements;
use crate::tracker::{Tracker, until_zero};

/// int8, int2, int4 (`src/include/catalog/pg_type.dat`).
const INTEGERS: [u32; 3] = [20, 21, 23];

/// An integer column of what one command returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenColumn {
    /// OID of the table that it comes from, or 0.
    pub table: u32,
    /// Its number in that table, or 0.
    pub attribute: u16,
    /// Its values, row by row.
    pub values: Vec<i64>,
}

/// What one command returned of integers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its integer columns without NULLs.
    pub columns: Vec<SeenColumn>,
    /// The argument of the only `nextval` in its text.
    pub nextval: Option<String>,
}

/// The records (by number) of the open transaction that may have returned values of sequences.
#[must_use]
pub fn candidates(tracker: &Tracker) -> BTreeSet<usize> {
    let mentions = mentions_by_record(tracker);
    let records = tracker.journal().records().iter().zip(mentions).enumerate();
    records
        .filter(|(_, (record, mentions))| {
            let reply = tracker.journal().reply(record);
            !reply.kept.is_empty()
                && (mentions.nextval
                    || mentions.insert
                    || reply
                        .kept
                        .commands()
                        .iter()
                        .any(|c| made_rows(&reply, c.index)))
        })
        .map(|(index, _)| index)
        .collect()
}

/// The records (by number) whose text calls `nextval`: what they read is no plain read, because
/// `currval` may have been used since.
#[must_use]
pub fn drawing(tracker: &Tracker) -> BTreeSet<usize> {
    let mentions = mentions_by_record(tracker).into_iter().enumerate();
    mentions
        .filter(|(_, m)| m.nextval)
        .map(|(i, _)| i)
        .collect()
}

/// Words in the statements of a record.
#[derive(Debug, Clone, Copy, Default)]
struct Mentions {
    nextval: bool,
    insert: bool,
    /// Something that may move a sequence, or have a name mean another one.
    moves: bool,
}

impl Mentions {
    fn of(text: &[u8]) -> Self {
        let any = |words: &[&[u8]]| words.iter().any(|word| has_word(text, word));
        Self {
            nextval: has_word(text, b"nextval"),
            insert: has_word(text, b"insert"),
            // EXECUTE runs what stands elsewhere.
            moves: any(&[b"setval", b"set_config", b"execute"]),
        }
    }

    fn add(&mut self, other: Self) {
        self.nextval |= other.nextval;
        self.insert |= other.insert;
        self.moves |= other.moves;
    }
}

/// Whether a text has this word, in any case.
fn has_word(text: &[u8], word: &[u8]) -> bool {
    let Some(first) = word.first() else {
        return false;
    };
    let part = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    memchr::memchr2_iter(*first, first.to_ascii_uppercase(), text).any(|at| {
        let found = text.get(at..at + word.len());
        found.is_some_and(|found| found.eq_ignore_ascii_case(word))
            && !part(at.checked_sub(1).and_then(|before| text.get(before)))
            && !part(text.get(at + word.len()))
    })
}

fn mentions_by_record(tracker: &Tracker) -> Vec<Mentions> {
    let parse = |body: &[u8]| {
        let name = until_zero(body);
        let text = until_zero(body.get(name.len() + 1..).unwrap_or_default());
        (name.to_vec(), Mentions::of(text))
    };
    let begin = tracker.prepared().at_begin();
    let mut prepared: BTreeMap<Vec<u8>, Mentions> = begin
        .map(|(_, p)| parse(p.parse.get(5..).unwrap_or_default()))
        .collect();
    let journal = tracker.journal();
    let of_record = |record| {
        let mut found = Mentions::default();
        for (tag, body) in messages(journal.record_bytes(record)) {
            match tag {
                frontend::QUERY => found.add(Mentions::of(body)),
                frontend::PARSE => prepared.extend([parse(body)]),
                frontend::BIND => {
                    let name = read::bind_names(body).map_or(&b""[..], |(_, name)| name);
                    found.add(prepared.get(name).copied().unwrap_or_default());
                }
                // By its number, which may be that of setval.
                frontend::FUNCTION_CALL => found.moves = true,
                _ => {}
            }
        }
        found
    };
    journal.records().iter().map(of_record).collect()
}

fn made_rows(reply: &Reply, index: usize) -> bool {
    let outcome = reply.commands.get(index).map(|c| c.outcome);
    matches!(outcome, Some(Outcome::Complete(tag)) if inserts(tag.as_bytes()))
}

/// Statements that are prepared where a record runs.
trait Statements {
    /// The statement of this name.
    fn find(&mut self, name: &[u8]) -> Option<Statement<'_>>;

    /// One was found to return these columns (a RowDescription).
    fn learn(&mut self, _tail: &[u8], _columns: &[u8]) {}
}

/// A prepared statement.
struct Statement<'a> {
    /// Its Parse message behind the name: the text, and types of parameters.
    tail: &'a [u8],
    described: Option<Arc<[u8]>>,
}

impl Statements for &PreparedStatements {
    fn find(&mut self, name: &[u8]) -> Option<Statement<'_>> {
        let prepared = self.get(name)?;
        Some(Statement {
            tail: tail_of(prepared.parse.get(5..).unwrap_or_default()),
            described: prepared.description.clone(),
        })
    }
}

/// The body of a Parse message behind the name.
fn tail_of(parse: &[u8]) -> &[u8] {
    parse.get(until_zero(parse).len() + 1..).unwrap_or_default()
}

/// The integers that a record returned; `now` are the statements that are prepared where it is
/// about to run again.
#[must_use]
pub fn seen(record: &[u8], reply: &Reply, mut now: &PreparedStatements) -> Vec<Seen> {
    seen_with(record, reply, &mut now)
}

fn seen_with(record: &[u8], reply: &Reply, now: &mut impl Statements) -> Vec<Seen> {
    let runs = runs(record, now);
    let mut last_columns = None;
    let mut out = Vec::new();
    for command in reply.kept.commands() {
        last_columns = command.columns.or(last_columns);
        let run = match runs.as_slice() {
            // One query may hold several statements.
            [query] if query.formats.is_none() => Some(query),
            _ => runs.get(command.index),
        };
        let described = run.and_then(|r| r.described.as_deref());
        let its = command.columns.or(described);
        let Some(columns) = its.or(last_columns) else {
            continue;
        };
        if let (Some(run), Some(its)) = (run.filter(|r| r.formats.is_some()), its) {
            now.learn(&run.tail, its);
        }
        let formats = run.and_then(|r| r.formats.as_deref());
        let columns = integers(columns, &command.rows, formats);
        // Reading the text takes longer than all the rest.
        let text = run
            .map(Run::text)
            .filter(|text| has_word(text.as_bytes(), b"nextval"));
        let nextval = text.and_then(|text| grammar::nextval_literal(&text));
        out.push(Seen { columns, nextval });
    }
    out
}

/// A statement that a record runs.
struct Run<'a> {
    /// The text, and what else its Parse message says.
    tail: Cow<'a, [u8]>,
    described: Option<Arc<[u8]>>,
    /// Result formats of its portal; `None` for a simple query.
    formats: Option<Vec<u16>>,
}

impl Run<'_> {
    fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(until_zero(&self.tail))
    }
}

/// The statements that a record runs, one for each Execute.
fn runs<'a>(record: &'a [u8], now: &mut impl Statements) -> Vec<Run<'a>> {
    let mut parsed: BTreeMap<&[u8], &[u8]> = BTreeMap::new();
    let mut portals: BTreeMap<&[u8], (&[u8], Vec<u16>)> = BTreeMap::new();
    let mut runs = Vec::new();
    for (tag, body) in messages(record) {
        match tag {
            frontend::QUERY => runs.push(Run {
                tail: body.into(),
                described: None,
                formats: None,
            }),
            frontend::PARSE => {
                parsed.insert(until_zero(body), tail_of(body));
            }
            frontend::BIND => {
                if let Ok(bind) = read::bind(body) {
                    let formats = bind.result_formats.iter().collect();
                    portals.insert(bind.portal, (bind.statement, formats));
                }
            }
            frontend::EXECUTE => {
                let portal = portals.get(until_zero(body));
                let (name, formats) = portal.cloned().unwrap_or_default();
                let (tail, described) = match parsed.get(name) {
                    Some(here) => (Cow::from(*here), None),
                    None => now.find(name).map_or_else(Default::default, |statement| {
                        (statement.tail.to_vec().into(), statement.described)
                    }),
                };
                runs.push(Run {
                    tail,
                    described,
                    formats: Some(formats),
                });
            }
            _ => {}
        }
    }
    runs
}

fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let header = peek_header(bytes).ok().flatten()?;
        let (frame, rest) = bytes.split_at_checked(header.len)?;
        bytes = rest;
        Some((header.tag, frame.get(5..).unwrap_or_default()))
    })
}

fn integers(description: &[u8], rows: &[&[u8]], formats: Option<&[u16]>) -> Vec<SeenColumn> {
    let body = description.get(5..).unwrap_or_default();
    let columns: Vec<_> = read::row_description(body).map_while(Result::ok).collect();
    let mut out = Vec::new();
    for (at, column) in columns.iter().enumerate() {
        if !INTEGERS.contains(&column.type_oid) {
            continue;
        }
        let format = match formats {
            None => column.format,
            Some([]) => 0,
            Some([all]) => *all,
            Some(each) => each.get(at).copied().unwrap_or(0),
        };
        let values = rows.iter().map(|row| {
            let row = read::data_row(row.get(5..)?).ok()?;
            let value = (row.len() == columns.len()).then(|| row.iter().nth(at))?;
            integer(value??, format)
        });
        if let Some(values) = values.collect() {
            let seen = SeenColumn {
                table: column.table,
                attribute: column.attribute,
                values,
            };
            // A column that is returned twice, as SQLAlchemy does with ids, was drawn once.
            if seen.table == 0 || !out.contains(&seen) {
                out.push(seen);
            }
        }
    }
    out
}

fn integer(value: &[u8], format: u16) -> Option<i64> {
    if format == 0 {
        return std::str::from_utf8(value).ok()?.parse().ok();
    }
    match value.len() {
        2 => Some(i16::from_be_bytes(value.try_into().ok()?).into()),
        4 => Some(i32::from_be_bytes(value.try_into().ok()?).into()),
        8 => Some(i64::from_be_bytes(value.try_into().ok()?)),
        _ => None,
    }
}

/// Whether `values` are what a sequence with this increment gives one after the other.
#[must_use]
pub fn consecutive(values: &[i64], increment: i64) -> bool {
    !values.is_empty()
        && values
            .windows(2)
            .all(|w| w[0].checked_add(increment) == Some(w[1]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_wire::message::front;

    fn framed(tag: u8, body: &[u8]) -> Vec<u8> {
        let mut out = vec![tag];
        out.extend_from_slice(&u32::try_from(body.len() + 4).unwrap().to_be_bytes());
        out.extend_from_slice(body);
        out
    }

    fn description(table: u32, kind: u32, format: u16) -> Vec<u8> {
        let mut body = vec![0, 1, b'a', 0];
        body.extend_from_slice(&table.to_be_bytes());
        body.extend_from_slice(&2_u16.to_be_bytes());
        body.extend_from_slice(&kind.to_be_bytes());
        body.extend_from_slice(&[0; 6]);
        body.extend_from_slice(&format.to_be_bytes());
        framed(b'T', &body)
    }

    fn row(value: &[u8]) -> Vec<u8> {
        let mut body = vec![0, 1];
        body.extend_from_slice(&u32::try_from(value.len()).unwrap().to_be_bytes());
        body.extend_from_slice(value);
        framed(b'D', &body)
    }

    fn reply(description: &[u8], values: &[&[u8]], tag: &[u8]) -> Reply {
        let mut reply = Reply::default();
        let mut complete = tag.to_vec();
        complete.push(0);
        let rows = values.iter().map(|v| row(v));
        let frames = std::iter::once(description.to_vec())
            .chain(rows)
            .chain([framed(b'C', &complete)]);
        for frame in frames {
            reply.keep(frame[0], &frame);
            reply.add(frame[0], &frame);
        }
        reply
    }

    #[test]
    fn text_and_binary_values() {
        let mut record = bytes::BytesMut::new();
        front::query(&mut record, b"insert into t default values returning a").unwrap();
        let found = seen(
            &record,
            &reply(&description(77, 23, 0), &[b"5", b"-6"], b"INSERT 0 2"),
            &PreparedStatements::default(),
        );
        let column = SeenColumn {
            table: 77,
            attribute: 2,
            values: vec![5, -6],
        };
        assert_eq!(found[0].columns, [column]);
        let binary = 9_i64.to_be_bytes();
        let mut record = bytes::BytesMut::new();
        front::parse(&mut record, b"", b"select nextval('s''x')", &[]).unwrap();
        let formats = [front::Format::Binary];
        front::bind(&mut record, b"", b"", &[], &[], &formats).unwrap();
        front::execute(&mut record, b"", 0).unwrap();
        let found = seen(
            &record,
            &reply(&description(0, 20, 0), &[&binary], b"SELECT 1"),
            &PreparedStatements::default(),
        );
        assert_eq!(found[0].columns[0].values, [9]);
        assert_eq!(found[0].nextval.as_deref(), Some("s'x"));
    }

    #[test]
    fn other_types_do_not_count() {
        let mut record = bytes::BytesMut::new();
        front::query(&mut record, b"insert into t values (1) returning a").unwrap();
        let found = seen(
            &record,
            &reply(&description(77, 25, 0), &[b"5"], b"INSERT 0 1"),
            &PreparedStatements::default(),
        );
        assert!(found[0].columns.is_empty());
    }

    #[test]
    fn words() {
        assert!(has_word(b"with x as (INSERT into t) select 1", b"insert"));
        assert!(!has_word(
            b"select inserted_at, last_insert from t",
            b"insert"
        ));
    }

    #[test]
    fn runs_of_values() {
        assert!(consecutive(&[1, 2, 3], 1));
        assert!(consecutive(&[-1, -3], -2));
        assert!(consecutive(&[7], 50));
        assert!(!consecutive(&[1, 3], 1));
        assert!(!consecutive(&[], 1));
    }
}
