//! Runs: records whose values of sequences follow each other, so that one setting back serves all
//! of them, and they run again one behind the other as any others do.
//!
//! Why that gives what the client saw. A sequence gives each value once, as long as it is only drawn
//! from. The values that a run has shown of it follow each other without a gap: so nobody drew from
//! it between the first and the last of them, no other session, and nothing unseen of this one (a
//! trigger, a default that was not returned, a statement that failed, a savepoint that was rolled
//! back: none of them gives a value back). On the new primary the sequence is set back to the first
//! value, this session alone draws, in the same order, and gets the same values. What may move a
//! sequence otherwise, or have a name mean another one, stands in no run with others
//! ([`apart`]): `setval`, TRUNCATE … RESTART IDENTITY, ALTER SEQUENCE, everything that is no plain
//! statement. A function may do such things where nobody sees it. Then the values that follow
//! mostly do not continue those before, which ends the run in front of it; where they do, the replay
//! does the same once more.
//!
//! What it does not say. Something unseen may have drawn behind the last value, in the same record;
//! with several sequences in a run also in front of the first value of one of them, or in records
//! behind its last; and a value that was seen may have been chosen by the client, not drawn. What
//! draws so draws once more, from a sequence that is set back: a value that may be somebody else's.
//! So who replays a run asks where each sequence stands behind it. It must be exactly the last value
//! of the run; else nothing of that replay counts, and records go one by one. Of a single record
//! it must not be beyond that. (A client that chooses just the value that something unseen of its own
//! draws at the same time is not found out.)

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helios_wire::frontend;

use super::{
    Seen, Statement, Statements, consecutive, mentions_by_record, messages, seen_with, tail_of,
};
use crate::reply::{Outcome, Reply};
use crate::state::PreparedStatements;
use crate::tracker::{Tracker, until_zero};

/// Most records of a run. The server sets forward by itself when a run takes too long.
const RECORDS: usize = 256;
/// Most bytes of their messages.
const BYTES: usize = 128 * 1024;
/// Longest time between their beginnings when they ran first, in microseconds.
const MICROS: u64 = 1_000_000;
/// Most values of a run: far fewer than a sequence may be ahead of where it stands.
const VALUES: usize = 16 * 1024;

/// Values of one sequence that a record returned, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drawn<S> {
    /// Which.
    pub sequence: S,
    /// Its increment.
    pub increment: i64,
    /// The values.
    pub values: Vec<i64>,
}

/// A sequence in a run: the first and the last value that the client saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span<S> {
    /// Which.
    pub sequence: S,
    /// The first value.
    pub first: i64,
    /// The last value.
    pub last: i64,
}

/// A run as it grows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run<S> {
    spans: Vec<Span<S>>,
    values: usize,
    /// Records that were looked at, and bytes of their messages.
    looked: usize,
    bytes: usize,
    /// When the first began, in microseconds.
    began: u64,
    /// Records up to the last one with values.
    records: usize,
    /// No other record goes with it.
    closed: bool,
}

impl<S: Clone + PartialEq> Run<S> {
    /// With what its first record returned, which began then and has so many bytes. A sequence whose
    /// values do not follow each other is not set back.
    #[must_use]
    pub fn begin(drawn: &[Drawn<S>], at_micros: u64, bytes: usize) -> Self {
        let mut run = Self {
            spans: Vec::new(),
            values: 0,
            looked: 1,
            bytes,
            began: at_micros,
            records: 1,
            closed: drawn.is_empty(),
        };
        for one in drawn {
            run.closed |= !run.continues(std::slice::from_ref(one));
        }
        run
    }

    /// Takes the next record, with what it returned, if anything; `false`: it does not belong to the
    /// run, nor does any behind it.
    #[must_use]
    pub fn take(&mut self, drawn: &[Drawn<S>], at_micros: u64, bytes: usize) -> bool {
        self.looked += 1;
        self.bytes += bytes;
        self.closed = self.closed
            || self.looked > RECORDS
            || self.bytes > BYTES
            || at_micros.saturating_sub(self.began) > MICROS
            || !self.continues(drawn);
        if !self.closed && !drawn.is_empty() {
            self.records = self.looked;
        }
        !self.closed
    }

    /// Takes values, if all of them follow those before; if not, nothing has changed.
    fn continues(&mut self, drawn: &[Drawn<S>]) -> bool {
        let fits = drawn.iter().all(|one| {
            let before = self.spans.iter().find(|s| s.sequence == one.sequence);
            consecutive(&one.values, one.increment)
                && before.is_none_or(|span| {
                    span.last.checked_add(one.increment) == one.values.first().copied()
                })
        });
        let more: usize = drawn.iter().map(|one| one.values.len()).sum();
        if !fits || (self.looked > 1 && self.values + more > VALUES) {
            return false;
        }
        self.values += more;
        for one in drawn {
            let (Some(first), Some(last)) = (one.values.first(), one.values.last()) else {
                continue;
            };
            match self.spans.iter_mut().find(|s| s.sequence == one.sequence) {
                Some(span) => span.last = *last,
                None => self.spans.push(Span {
                    sequence: one.sequence.clone(),
                    first: *first,
                    last: *last,
                }),
            }
        }
        true
    }

    /// Whether no further record goes with it.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// How many records it has; at least 1, and the last one has values.
    #[must_use]
    pub fn records(&self) -> usize {
        self.records
    }

    /// What is to be set back.
    #[must_use]
    pub fn into_spans(self) -> Vec<Span<S>> {
        self.spans
    }
}

/// Records of the open transaction that go with no others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Apart {
    /// Those that stand in no run with others, by number.
    pub records: BTreeSet<usize>,
    /// Whether any of them may move a sequence, or have a name mean another one.
    pub moves: bool,
}

/// Finds them.
#[must_use]
pub fn apart(tracker: &Tracker) -> Apart {
    let journal = tracker.journal();
    let mut apart = Apart::default();
    let records = journal.records().iter().zip(mentions_by_record(tracker));
    for (number, (record, mentions)) in records.enumerate() {
        apart.moves |= mentions.moves;
        if mentions.moves || !is_plain(&journal.reply(record)) {
            apart.records.insert(number);
        }
    }
    apart
}

/// Whether a record did nothing but what these commands do, as the server itself told. They draw
/// from sequences at most; a savepoint that is rolled back takes no value back.
fn is_plain(reply: &Reply) -> bool {
    const PLAIN: [&[u8]; 13] = [
        b"INSERT",
        b"SELECT",
        b"UPDATE",
        b"DELETE",
        b"MERGE",
        b"COPY",
        b"FETCH",
        b"MOVE",
        b"DECLARE CURSOR",
        b"CLOSE CURSOR",
        b"SAVEPOINT",
        b"RELEASE",
        b"ROLLBACK",
    ];
    reply.commands.iter().all(|command| match &command.outcome {
        Outcome::Complete(tag) => {
            let text = tag.as_bytes();
            let end = text.iter().position(u8::is_ascii_digit);
            let name = text.get(..end.unwrap_or(text.len())).unwrap_or_default();
            PLAIN.contains(&name.trim_ascii_end())
        }
        Outcome::Error(_) | Outcome::Suspended | Outcome::Empty => true,
    })
}

/// The statements that will be prepared where records run that are looked at ahead of their turn.
#[derive(Debug)]
pub struct Ahead<'a> {
    /// What is prepared now.
    now: &'a PreparedStatements,
    /// What records on the way prepare, by name; `None`: it is given up.
    since: BTreeMap<Vec<u8>, Option<Vec<u8>>>,
    /// Columns of what statements on the way return, by their text and parameters.
    columns: BTreeMap<Vec<u8>, Arc<[u8]>>,
}

impl<'a> Ahead<'a> {
    /// From where these are prepared.
    #[must_use]
    pub fn of(now: &'a PreparedStatements) -> Self {
        Self {
            now,
            since: BTreeMap::new(),
            columns: BTreeMap::new(),
        }
    }

    /// The integers that the record in front returned, as far as they are known.
    #[must_use]
    pub fn all_seen(&mut self, record: &[u8], reply: &Reply) -> Vec<Seen> {
        seen_with(record, reply, self)
    }

    /// The integers that the record in front returned; `None` where that is not known before its
    /// turn.
    #[must_use]
    pub fn seen(&mut self, record: &[u8], reply: &Reply) -> Option<Vec<Seen>> {
        let seen = seen_with(record, reply, self);
        (seen.len() == reply.kept.commands().len()).then_some(seen)
    }

    /// Goes on behind a record.
    pub fn pass(&mut self, record: &[u8]) {
        for (tag, body) in messages(record) {
            match tag {
                frontend::PARSE => {
                    let (name, tail) = (until_zero(body).to_vec(), tail_of(body).to_vec());
                    self.since.insert(name, Some(tail));
                }
                frontend::CLOSE if body.first() == Some(&b'S') => {
                    let name = until_zero(body.get(1..).unwrap_or_default());
                    self.since.insert(name.to_vec(), None);
                }
                frontend::QUERY => {
                    self.since.insert(Vec::new(), None);
                }
                _ => {}
            }
        }
    }
}

impl Statements for Ahead<'_> {
    fn find(&mut self, name: &[u8]) -> Option<Statement<'_>> {
        let Some(since) = self.since.get(name) else {
            return self.now.find(name);
        };
        let tail = since.as_deref()?;
        Some(Statement {
            tail,
            described: self.columns.get(tail).cloned(),
        })
    }

    fn learn(&mut self, tail: &[u8], columns: &[u8]) {
        if !self.columns.contains_key(tail) {
            self.columns.insert(tail.to_vec(), Arc::from(columns));
        }
    }
}

#[cfg(test)]
mod tests;
