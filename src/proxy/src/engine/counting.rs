//! Answers that the log can tell: which statements have one, and counting it.
//!
//! A plain statement's answer is a number of rows (`helios_session::plain`). Where its table is as
//! plain as its text, no Flush is needed in front of the commit: when the answer is lost, the rows
//! are counted in the log. Asked once for each statement, beside it, on a connection of the proxy's
//! own; asked again after the crash. The invariant: a number is told only when the catalogs behind
//! the crash, all of the log since the statement was sent, and every change of its transaction
//! agree on it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use helios_api::control::Topology;
use helios_api::{Epoch, Lsn, Timeline};
use helios_session::evidence::{Fate, Mark, PREFIX};
use helios_session::plain::{Change, Counted, Key, Plain, Table, count, in_database, plain};
use helios_session::script::Speaks;
use helios_session::state::literal;
use helios_session::tracker::until_zero;
use tokio::sync::Notify;

use super::answers::committed_reply;
use super::evidence::{Found, flushed, has_ended, schema};
use super::gate::Phase;
use super::link::Link;
use super::own;
use super::reads::{self, Proofs, suspicious};
use super::rebuild::{Attempt, retry};
use super::registry::lock;
use super::replay::{ReplayError, simple};
use super::session::Session;
use super::shared::Shared;

/// Statements that are told apart; the others are flushed.
const STATEMENTS: usize = 4096;

/// After so long everything is looked at anew: a table may have got a trigger, or lost one.
const AGE: Duration = Duration::from_secs(300);

/// Most of the log that is read for answers, in bytes: others wait for it, a second or two.
const LOG: u64 = 256 << 20;

/// Pause after a question that found no answer.
const PAUSE: Duration = Duration::from_millis(500);

/// What is known of statements.
#[derive(Debug, Default)]
pub struct Countable {
    known: RwLock<HashMap<Key, bool>>,
    asked: Mutex<VecDeque<Question>>,
    bell: Notify,
}

/// A statement that nobody has looked at yet.
#[derive(Debug)]
struct Question {
    key: Key,
    database: String,
    text: Vec<u8>,
}

impl Countable {
    /// Whether the log can tell the answer to the statement with this key. The first time it is
    /// asked for, and is not known yet.
    fn knows(&self, database: &str, key: Key, text: impl FnOnce() -> Option<Vec<u8>>) -> bool {
        let key = in_database(key, database);
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(&key) {
            return *known;
        }
        let full = known.len() >= STATEMENTS;
        drop(known);
        if let Some(text) = text().filter(|_| !full) {
            self.note(key, Some(false));
            lock(&self.asked).push_back(Question {
                key,
                database: database.to_owned(),
                text,
            });
            self.bell.notify_one();
        }
        false
    }

    /// Notes what is known, or that nothing is.
    fn note(&self, key: Key, countable: Option<bool>) {
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        match countable {
            Some(countable) => drop(known.insert(key, countable)),
            None => drop(known.remove(&key)),
        }
    }

    fn forget(&self) {
        lock(&self.asked).clear();
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.clear();
    }
}

/// Looks at statements that clients run, once each.
pub async fn look_at_statements(shared: Arc<Shared>) {
    let mut forget = tokio::time::interval(AGE);
    loop {
        tokio::select! {
            () = shared.countable.bell.notified() => {}
            _ = forget.tick() => shared.countable.forget(),
        }
        // Not kept beyond that: a connection would be in the way of DROP DATABASE.
        let mut slot = None;
        while let Some(question) = next(&shared) {
            let state = shared.gate.now();
            let limit = shared.options.connect_timeout;
            let looked = async {
                let (topology, database) = (&state.topology, &question.database);
                let mut proofs = reads::take(&mut slot, &shared, topology, database).await?;
                let plain = plain(&question.text);
                let table = match &plain {
                    Some(plain) => table(&mut proofs.link, plain).await?,
                    None => None,
                };
                slot = Some(proofs);
                Ok::<_, ReplayError>(table.is_some())
            };
            let found = match state.phase {
                Phase::Open => tokio::time::timeout(limit, looked).await,
                _ => Ok(Err(ReplayError::State("a move is under way".into()))),
            };
            let found = found.ok().and_then(Result::ok);
            shared.countable.note(question.key, found);
            if found.is_none() {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn next(shared: &Shared) -> Option<Question> {
    lock(&shared.countable.asked).pop_front()
}

impl Session {
    /// Has the results of what commits next sent before, unless the log can tell them.
    pub(super) fn flush_uncountable(&mut self) {
        let last = self.tracker.journal().in_flight().back();
        let text = || last.and_then(|e| self.tracker.plain_text(e));
        let database = &self.registered.entry.login.database;
        let knows = |key| self.shared.countable.knows(database, key, text);
        let countable = self.tracker.plain_key().is_some_and(knows);
        if let Some(server) = self.server.as_mut().filter(|_| !countable) {
            own::flush(&mut server.link.output);
        }
    }

    /// Whether the log can tell the answer to a simple query that is about to be sent, of which
    /// `have` bytes are there.
    pub(super) fn is_countable_query(&self, key: Option<Key>, have: usize) -> bool {
        let Some(key) = key else {
            return false;
        };
        let frame = self.client.input.get(5..have).unwrap_or_default();
        let text = || Some(until_zero(frame).to_vec());
        let database = &self.registered.entry.login.database;
        self.shared.countable.knows(database, key, text)
    }

    /// What is in front has committed by itself, and its answer has not come: it is counted, if
    /// that can be done.
    pub(super) async fn deliver_counted(&mut self, topology: &Topology) -> Result<(), Attempt> {
        let fresh = self.skip.is_none() && self.forced.is_none();
        let plain = self.tracker.plain_front().filter(|_| fresh);
        let front = self.tracker.journal().in_flight().front();
        let mark = front.and_then(|e| e.mark.filter(|_| e.speaks == Speaks::All));
        let (Some(plain), Some(mark)) = (plain, mark) else {
            return self.results_lost();
        };
        let entry = &self.registered.entry;
        let known = entry.running.id_of(mark.gtid);
        let ran = ((self.epoch, self.timeline), mark, known);
        let (shared, database) = (Arc::clone(&self.shared), entry.login.database.clone());
        let counted = counted(&shared, topology, &database, ran, &plain).await;
        let counted = counted.map_err(retry)?;
        tracing::debug!(gtid = %mark.gtid, ?counted, "answer of a statement by the log");
        match counted {
            Counted::Unknown => return self.results_lost(),
            Counted::Nothing => {
                // It runs again: what it did before has left no trace.
                if let Some(front) = self.tracker.journal_mut().in_flight_mut().front_mut() {
                    front.fate = Some(Fate::NotCommitted);
                }
            }
            Counted::Rows(rows) => {
                let journal = self.tracker.journal();
                let front = journal.in_flight().front();
                let bytes = front.map(|e| journal.exchange_bytes(e));
                let tag = plain.verb.tag(rows);
                let reply = committed_reply(bytes.unwrap_or_default(), 0, &tag);
                self.client.output.extend_from_slice(&reply);
                self.tracker.answer_plain();
                self.finish_counted();
            }
        }
        Ok(())
    }
}

/// What the transaction with a mark did, by the catalogs and the log.
async fn counted(
    shared: &Shared,
    topology: &Topology,
    database: &str,
    (ran_on, mark, known): ((Epoch, Timeline), Mark, Option<u32>),
    plain: &Plain,
) -> Result<Counted, ReplayError> {
    let mut slot = shared.proofs.lock().await;
    let mut proofs = reads::take(&mut slot, shared, topology, database).await?;
    let ended = has_ended(topology, ran_on);
    let Looked { table, until } = proofs.look(shared, plain, ended).await?;
    *slot = Some(proofs);
    drop(slot);
    // The log is read to behind that: what has changed the table meanwhile is in it.
    let mut slot = shared.found.lock().await;
    let mut found = Found::take(&mut slot, shared, topology).await?;
    let record = match known {
        Some(id) => Some(id),
        None => found.record_of(shared, topology, ran_on, mark).await?,
    };
    let read = read(&mut found, (shared, topology), (ran_on, mark.floor), until).await?;
    let counted = match (&found.changes, record) {
        (Some(changes), Some(record)) if read => {
            let redefined = table
                .as_ref()
                .is_some_and(|t| changes.redefined(t.oid, record));
            let all = changes.of.get(&record).map_or(&[][..], Vec::as_slice);
            count(plain, table.as_ref(), redefined, all)
        }
        _ => Counted::Unknown,
    };
    *slot = Some(found);
    Ok(counted)
}

/// What the log tells of all marked transactions in a part of it.
#[derive(Debug)]
pub(super) struct Changes {
    ran_on: (Epoch, Timeline),
    /// When its end was asked for.
    at: u64,
    from: Lsn,
    to: Lsn,
    of: HashMap<u32, Vec<Change>>,
    /// Where the mark of each transaction is.
    marked: HashMap<u32, Lsn>,
    /// Where each relation was changed last.
    redefined: HashMap<u32, Lsn>,
}

impl Changes {
    /// Whether a relation was changed since a transaction's mark. Relation zero stands for all.
    fn redefined(&self, oid: u32, record: u32) -> bool {
        let Some(mark) = self.marked.get(&record) else {
            return true;
        };
        let mut changes = [oid, 0].into_iter().filter_map(|o| self.redefined.get(&o));
        changes.any(|at| at > mark)
    }
}

/// Reads the log from `floor` to where it stood at `until` or later. Of a timeline that has ended
/// it reads on from what others have read. `false` when not all of it can be read any more.
async fn read(
    found: &mut Found,
    (shared, topology): (&Shared, &Topology),
    (ran_on, floor): ((Epoch, Timeline), Lsn),
    until: u64,
) -> Result<bool, ReplayError> {
    // Of a transaction that goes on, what follows would be missing.
    let ended = has_ended(topology, ran_on);
    let usable = |c: &Changes| ended && c.ran_on == ran_on && c.from <= floor;
    if found
        .changes
        .as_ref()
        .is_some_and(|c| usable(c) && c.at >= until)
    {
        return Ok(true);
    }
    let at = shared.now_micros();
    let end = flushed(&mut found.link).await?;
    let mut changes = match found.changes.take().filter(usable) {
        Some(changes) => changes,
        None => {
            let from = shared.registry.lowest_mark().min(floor);
            Changes {
                ran_on,
                at,
                from,
                to: from,
                of: HashMap::new(),
                marked: HashMap::new(),
                redefined: HashMap::new(),
            }
        }
    };
    let mut all = scan(&mut found.link, &mut changes, end).await?;
    if !all && changes.from < floor {
        (changes.from, changes.to) = (floor, floor);
        changes.of.clear();
        all = scan(&mut found.link, &mut changes, end).await?;
    }
    changes.at = at;
    found.changes = Some(changes).filter(|_| all);
    Ok(all)
}

async fn scan(link: &mut Link, changes: &mut Changes, end: Lsn) -> Result<bool, ReplayError> {
    if changes.to >= end {
        return Ok(true);
    }
    if end.0.saturating_sub(changes.to.0) > LOG {
        return Ok(false);
    }
    let Some(schema) = schema(link).await? else {
        return Ok(false);
    };
    simple(link, "SET search_path = pg_catalog").await?;
    let rows = match simple(link, &changes_query(&schema, changes.to, end)).await {
        Ok(rows) => rows,
        Err(ReplayError::State(why)) => {
            tracing::warn!(why, "the log cannot be read back to a statement");
            return Ok(false);
        }
        Err(e) => return Err(e),
    };
    for row in rows {
        let [xid, Some(named), kind, number] = row.as_slice() else {
            return Ok(false);
        };
        match (xid, kind, number) {
            (Some(xid), Some(kind), Some(number)) => {
                let (Ok(xid), Ok(number)) = (xid.parse(), number.parse()) else {
                    return Ok(false);
                };
                changes.of.entry(xid).or_default().push(Change {
                    file: named.clone(),
                    kind: kind.clone(),
                    count: number,
                });
            }
            (Some(xid), None, None) => {
                let (Ok(xid), Ok(at)) = (xid.parse(), named.parse()) else {
                    return Ok(false);
                };
                changes.marked.insert(xid, at);
            }
            (None, Some(at), None) => {
                let (Ok(oid), Ok(at)) = (named.parse(), at.parse()) else {
                    return Ok(false);
                };
                changes.redefined.insert(oid, at);
            }
            _ => return Ok(false),
        }
    }
    changes.to = end;
    Ok(true)
}

/// Records of marked transactions by relation and type, and the relations that were changed
/// (`standby_desc_invalidations` in `src/backend/access/rmgrdesc/standbydesc.c`). The block
/// references are those of `XLogRecGetBlockRefInfo` in `xlogrecdesc.c`.
fn changes_query(schema: &str, from: Lsn, end: Lsn) -> String {
    let (from, end) = (literal(&from.to_string()), literal(&end.to_string()));
    format!(
        "WITH log AS MATERIALIZED (SELECT xid, resource_manager AS manager, record_type AS kind, \
           description AS told, block_ref AS at, start_lsn AS begin \
           FROM {schema}.pg_get_wal_records_info({from}, {end})), \
         marked AS (SELECT xid, min(begin) AS begin FROM log WHERE manager = 'LogicalMessage' \
           AND told LIKE 'transactional, prefix \"{PREFIX}\"%' GROUP BY xid) \
         SELECT log.xid::text, coalesce(substring(at FROM 'rel ([0-9]+/[0-9]+/[0-9]+)'), ''), \
           manager || ' ' || split_part(kind, '+', 1), count(*)::text \
         FROM log JOIN marked ON marked.xid = log.xid GROUP BY 1, 2, 3 \
         UNION ALL SELECT xid::text, begin::text, NULL, NULL FROM marked \
         UNION ALL SELECT NULL, changed[1], max(begin)::text, NULL FROM log, \
           regexp_matches(told, 'relcache ([0-9]+)', 'g') AS changed \
           WHERE manager IN ('Transaction', 'Standby') GROUP BY 2"
    )
}

/// What was found in the catalogs, and when they had been read.
#[derive(Debug, Clone)]
struct Looked {
    table: Option<Table>,
    until: u64,
}

/// What was found for plain statements.
#[derive(Debug, Default)]
pub(super) struct Tables(HashMap<Plain, Looked>);

impl Proofs {
    /// The table of a plain statement, by catalogs that were read after the statement was sent:
    /// what has changed since is in the log behind its mark. One that `ended` with a primary of
    /// the past was sent before anything was read here.
    async fn look(
        &mut self,
        shared: &Shared,
        plain: &Plain,
        ended: bool,
    ) -> Result<Looked, ReplayError> {
        if let Some(looked) = self.tables.0.get(plain).filter(|_| ended) {
            return Ok(looked.clone());
        }
        let table = table(&mut self.link, plain).await?;
        let until = shared.now_micros();
        let looked = Looked { table, until };
        if self.tables.0.len() >= STATEMENTS {
            self.tables.0.clear();
        }
        self.tables.0.insert(plain.clone(), looked.clone());
        Ok(looked)
    }
}

/// The table of a plain statement, where the statement does nothing but what it says: there is one
/// relation of its name, which is an ordinary table without triggers (but those that check foreign
/// keys), rules, policies or heirs, and nothing that runs with the statement is anybody's own code.
async fn table(link: &mut Link, plain: &Plain) -> Result<Option<Table>, ReplayError> {
    if !simple(link, &suspicious(&plain.words)).await?.is_empty() {
        return Ok(None);
    }
    let rows = simple(link, &table_query(plain)).await?;
    let Some([Some(oid), Some(file), toast]) = rows.first().map(Vec::as_slice) else {
        return Ok(None);
    };
    Ok(oid.parse().ok().map(|oid| Table {
        oid,
        file: file.clone(),
        toast: toast.clone(),
    }))
}

fn table_query(plain: &Plain) -> String {
    let name = literal(&plain.table);
    let schema = match &plain.schema {
        Some(schema) => format!(
            "AND relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = {})",
            literal(schema)
        ),
        None => String::new(),
    };
    let words = reads::array(&plain.words);
    let file = |of: &str| {
        format!(
            "(SELECT coalesce(nullif(f.reltablespace, 0), d.dattablespace) || '/' || d.oid || '/' \
             || pg_relation_filenode(f.oid) FROM pg_class AS f, pg_database AS d \
             WHERE f.oid = {of} AND d.datname = current_database())"
        )
    };
    format!(
        "SELECT c.oid::text, {}, {} FROM pg_class AS c WHERE c.relname = {name} {schema} \
         AND (SELECT count(*) FROM pg_class WHERE relname = {name} {schema}) = 1 \
         AND c.oid >= 16384 AND c.relkind = 'r' AND c.relpersistence = 'p' AND c.relam = 2 \
         AND NOT c.relispartition AND NOT c.relrowsecurity \
         AND NOT EXISTS (SELECT FROM pg_inherits WHERE c.oid IN (inhrelid, inhparent)) \
         AND NOT EXISTS (SELECT FROM pg_rewrite WHERE ev_class = c.oid) \
         AND NOT EXISTS (SELECT FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid \
           WHERE t.tgrelid = c.oid AND NOT (t.tgisinternal AND p.oid < 16384 \
             AND p.proname ~ '^RI_FKey_(check|noaction|restrict)_')) \
         AND NOT EXISTS (SELECT FROM pg_attribute AS a JOIN pg_type AS y ON y.oid = a.atttypid \
           WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
             AND y.oid >= 16384 AND y.typtype <> 'e') \
         AND NOT EXISTS (SELECT FROM pg_attrdef AS e WHERE e.adrelid = c.oid \
           AND pg_get_expr(e.adbin, e.adrelid) ~ '_to_xml') \
         AND NOT EXISTS (SELECT FROM pg_depend AS k WHERE k.refclassid = 'pg_proc'::regclass AND \
           (k.classid = 'pg_attrdef'::regclass AND k.objid IN \
              (SELECT oid FROM pg_attrdef WHERE adrelid = c.oid) \
            OR k.classid = 'pg_constraint'::regclass AND k.objid IN \
              (SELECT oid FROM pg_constraint WHERE conrelid = c.oid) \
            OR k.classid = 'pg_class'::regclass AND k.objid IN \
              (SELECT indexrelid FROM pg_index WHERE indrelid = c.oid))) \
         AND NOT EXISTS (SELECT FROM pg_proc WHERE proretset AND proname::text = ANY ({words})) \
         AND NOT EXISTS (SELECT FROM pg_type WHERE oid >= 16384 AND typtype NOT IN ('e', 'c') \
           AND typelem = 0 AND typname::text = ANY ({words}))",
        file("c.oid"),
        file("c.reltoastrelid"),
    )
}
