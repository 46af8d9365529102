//! Which records one setting back of sequences serves, and what is set back for them.
//!
//! Columns are mapped to sequences by the catalogs, names of sequences inside the session, where its
//! `search_path` is in force. The invariant: of a sequence that is set back nothing is taken but what
//! the client has seen, or nothing of that replay counts (`helios_session::sequences::run` says why).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use helios_session::sequences::Seen;
use helios_session::sequences::run::{Ahead, Apart, Drawn, Run};
use helios_session::tracker::Tracker;

use super::link::Link;
use super::replay::ReplayError;
use super::sequences::Keeper;
use super::set_back::{Sequence, Stands, Wanted};
use super::verify::regclass;

/// Records of a journal, by number.
#[derive(Debug, Default)]
pub(super) struct Records {
    /// Those whose values of sequences come again.
    pub(super) wanted: BTreeSet<usize>,
    /// Those that stand in no run with others; `None`: no record does.
    pub(super) apart: Option<Arc<Apart>>,
    /// Wanted are all whose values were seen.
    pub(super) whole: bool,
}

/// What sequences are set back for.
#[derive(Debug, Default)]
pub(super) struct Taken {
    /// The first record.
    pub(super) from: usize,
    /// So many records.
    pub(super) records: usize,
    pub(super) wanted: Vec<Wanted>,
}

/// Sequences by name, as the session means them where it stands.
pub(super) type Names = BTreeMap<String, Option<Sequence>>;

impl Taken {
    /// Behind the records, with where their sequences stood: each must have given the last value that
    /// was seen, and no other behind it, which may be somebody else's. A single record may have taken
    /// fewer: its client chose the value. A sequence that could not be set back is not there; of that
    /// one the comparison with what was seen tells enough.
    ///
    /// # Errors
    /// [`ReplayError::Unseen`] where records may do better one by one, else
    /// [`ReplayError::Different`].
    pub(super) fn check(&self, stood: &[Stands]) -> Result<(), ReplayError> {
        for (number, value, called) in stood {
            let Some(wanted) = self.wanted.get(*number) else {
                continue;
            };
            let beyond = match wanted.sequence.increment > 0 {
                true => *value > wanted.last,
                false => *value < wanted.last,
            };
            if self.records > 1 && !(*called && *value == wanted.last) {
                return Err(ReplayError::Unseen);
            }
            if *called && beyond {
                return Err(ReplayError::Different {
                    statement: self.from + 1,
                    what: "it took values of a sequence that nobody has seen".into(),
                });
            }
        }
        Ok(())
    }
}

impl Keeper {
    /// From record `from` of `old` on: how many records one setting back serves, at least 1, and what
    /// is to be set back.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn run(
        &mut self,
        link: &mut Link,
        old: &Tracker,
        new: &Tracker,
        from: usize,
    ) -> Result<(usize, Vec<Wanted>), ReplayError> {
        let journal = old.journal();
        let Some(first) = journal.records().get(from) else {
            return Ok((1, Vec::new()));
        };
        let (mut ahead, mut names) = (Ahead::of(new.prepared()), Names::new());
        let bytes = journal.record_bytes(first);
        let its = ahead.all_seen(bytes, &journal.reply(first));
        let Some(drawn) = self.drawn(link, its, &mut names).await? else {
            return Ok((1, Vec::new()));
        };
        let mut run = Run::begin(&drawn, first.at_micros, bytes.len());
        ahead.pass(bytes);
        let apart = self.records.apart.clone();
        let goes_alone = |at: usize| apart.as_ref().is_none_or(|a| a.records.contains(&at));
        if goes_alone(from) {
            return Ok((1, run.into_spans()));
        }
        let behind = journal.records().iter().enumerate().skip(from + 1);
        let mut behind = behind.take_while(|(at, _)| !goes_alone(*at));
        while !run.is_closed()
            && let Some((at, record)) = behind.next()
        {
            let bytes = journal.record_bytes(record);
            let mut drawn = Vec::new();
            if self.wants(at) {
                let Some(its) = ahead.seen(bytes, &journal.reply(record)) else {
                    break;
                };
                let Some(its) = self.drawn(link, its, &mut names).await? else {
                    break;
                };
                drawn = its;
            }
            if !run.take(&drawn, record.at_micros, bytes.len()) {
                break;
            }
            ahead.pass(bytes);
        }
        Ok((run.records(), run.into_spans()))
    }

    /// The values of each sequence that a record returned, in order; `None` where that could not be
    /// looked up.
    pub(super) async fn drawn(
        &mut self,
        link: &mut Link,
        seen: Vec<Seen>,
        names: &mut Names,
    ) -> Result<Option<Vec<Drawn<Sequence>>>, ReplayError> {
        match self.values(link, seen, names).await {
            Ok(drawn) => Ok(Some(drawn)),
            Err(ReplayError::State(why)) => {
                tracing::debug!(why, "sequences could not be looked up");
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    async fn values(
        &mut self,
        link: &mut Link,
        seen: Vec<Seen>,
        names: &mut Names,
    ) -> Result<Vec<Drawn<Sequence>>, ReplayError> {
        self.look_up(&seen).await?;
        let mut found: Vec<Drawn<Sequence>> = Vec::new();
        let mut add = |sequence: Sequence, values: Vec<i64>| match found
            .iter_mut()
            .find(|d| d.sequence == sequence)
        {
            Some(drawn) => drawn.values.extend(values),
            None => found.push(Drawn {
                increment: sequence.increment,
                sequence,
                values,
            }),
        };
        for command in seen {
            let mut others = Vec::new();
            let mut own = Vec::new();
            for column in command.columns {
                match self.columns.get(&(column.table, column.attribute)) {
                    Some(Some(sequence)) => {
                        own.push(sequence.oid);
                        add(sequence.clone(), column.values);
                    }
                    _ => others.push(column.values),
                }
            }
            if let (Some(name), 1) = (command.nextval, others.len())
                && let Some(sequence) = self.named(link, name, names).await?
                && !own.contains(&sequence.oid)
            {
                add(sequence, others.swap_remove(0));
            }
        }
        Ok(found)
    }

    /// Asks the catalogs for the sequences of columns that are not known yet.
    pub(super) async fn look_up(&mut self, seen: &[Seen]) -> Result<(), ReplayError> {
        let columns = seen.iter().flat_map(|s| &s.columns);
        let new: BTreeSet<(u32, u16)> = columns
            .map(|c| (c.table, c.attribute))
            .filter(|key| key.0 != 0 && !self.columns.contains_key(key))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let rows = self.ask(&columns_query(&new)).await?;
        self.columns.extend(new.into_iter().map(|key| (key, None)));
        for row in rows {
            let number = |at: usize| row.get(at)?.as_deref()?.parse::<u32>().ok();
            if let (Some(table), Some(attribute)) = (number(0), number(1))
                && let Ok(attribute) = u16::try_from(attribute)
                && let Some(sequence) = row.get(2..).and_then(sequence)
            {
                self.columns.insert((table, attribute), Some(sequence));
            }
        }
        Ok(())
    }

    /// The sequence of a column that was looked up: OID, increment, name.
    pub(super) fn sequence_of(&self, table: u32, attribute: u16) -> Option<(u32, i64, &str)> {
        let known = self.columns.get(&(table, attribute))?.as_ref()?;
        Some((known.oid, known.increment, &known.name))
    }

    /// The sequence of this name, as the session resolves it where it stands.
    async fn named(
        &mut self,
        link: &mut Link,
        name: String,
        names: &mut Names,
    ) -> Result<Option<Sequence>, ReplayError> {
        if let Some(known) = names.get(&name) {
            return Ok(known.clone());
        }
        let mut found = None;
        if let Some(oid) = regclass(link, &name).await? {
            let sql =
                format!("SELECT {SEQUENCE} FROM {SEQUENCES} WHERE s.seqrelid = {oid} AND {USABLE}");
            let rows = self.ask(&sql).await?;
            found = rows.first().and_then(|row| sequence(row));
        }
        names.insert(name, found.clone());
        Ok(found)
    }
}

const SEQUENCE: &str = "s.seqrelid, s.seqincrement, \
    pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname)";

const SEQUENCES: &str = "pg_catalog.pg_sequence s \
    JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid \
    JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace";

/// A session's cache of values knows nothing of `setval`; a cycle has no highest value.
const USABLE: &str = "s.seqcache = 1 AND NOT s.seqcycle AND c.relpersistence <> 't'";

/// Table, column number and sequence of columns; a default's sequence comes last and counts.
fn columns_query(columns: &BTreeSet<(u32, u16)>) -> String {
    let keys: Vec<String> = columns.iter().map(|(t, a)| format!("({t}, {a})")).collect();
    let keys = keys.join(", ");
    format!(
        "SELECT k.t, k.a, {SEQUENCE} FROM (VALUES {keys}) AS k(t, a) \
         JOIN (SELECT refobjid AS t, refobjsubid AS a, objid AS sequence, 1 AS rank \
         FROM pg_catalog.pg_depend WHERE deptype IN ('a', 'i') \
         AND classid = 'pg_catalog.pg_class'::pg_catalog.regclass \
         AND refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass \
         UNION ALL SELECT f.adrelid, f.adnum, d.refobjid, 2 FROM pg_catalog.pg_attrdef f \
         JOIN pg_catalog.pg_depend d ON d.objid = f.oid \
         AND d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass \
         AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass) x \
         ON x.t = k.t::pg_catalog.oid AND x.a = k.a \
         JOIN ({SEQUENCES}) ON s.seqrelid = x.sequence WHERE {USABLE} ORDER BY x.rank"
    )
}

fn sequence(row: &[Option<String>]) -> Option<Sequence> {
    let [Some(oid), Some(increment), Some(name)] = row else {
        return None;
    };
    Some(Sequence {
        oid: oid.parse().ok()?,
        increment: increment.parse().ok().filter(|i| *i != 0)?,
        name: name.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is said of records whose sequence stood there behind them; the last value seen is 7.
    fn said(records: usize, increment: i64, value: i64, called: bool) -> &'static str {
        let sequence = Sequence {
            oid: 1,
            increment,
            name: "s".into(),
        };
        let wanted = vec![Wanted {
            sequence,
            first: 7,
            last: 7,
        }];
        let from = 4;
        let taken = Taken {
            from,
            records,
            wanted,
        };
        match taken.check(&[(0, value, called)]) {
            Ok(()) => "fine",
            Err(ReplayError::Unseen) => "one by one",
            Err(ReplayError::Different { statement: 5, .. }) => "different",
            Err(_) => "something else",
        }
    }

    #[test]
    fn what_was_taken() {
        for (value, called, of_one, of_many) in [
            (7, true, "fine", "fine"),
            // Chosen by the client: nothing was drawn, or not as much.
            (7, false, "fine", "one by one"),
            (6, true, "fine", "one by one"),
            (8, true, "different", "one by one"),
        ] {
            assert_eq!(said(1, 1, value, called), of_one, "{value} {called}");
            assert_eq!(said(2, 1, value, called), of_many, "{value} {called}");
            let mirrored = 14 - value;
            assert_eq!(said(1, -1, mirrored, called), of_one, "{value} {called}");
            assert_eq!(said(2, -1, mirrored, called), of_many, "{value} {called}");
        }
        assert!(Taken::default().check(&[(0, 5, true)]).is_ok());
    }
}
