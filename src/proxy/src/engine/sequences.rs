//! Values of sequences that a client has seen come again in a replay.
//!
//! `nextval` gives another value on the new primary. Where a statement of the open transaction
//! returned values of a sequence, the sequence is set back to the first of them just before the
//! statement runs again, and forward behind every value that was given, right afterwards. `setval`
//! acts at once and is not undone by a rollback; it is done as the proxy's own user.
//!
//! The invariants: while a sequence is set back no other session of this proxy replays (the lock
//! in `Shared`, which every replay holds); and what was set back is set forward again before the
//! lock is given back, also when the replay is broken off.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use helios_api::Endpoint;
use helios_session::reply::Reply;
use helios_session::sequences::{Seen, consecutive, seen};
use helios_session::tracker::Tracker;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

use super::link::Link;
use super::replay::{self, ReplayError};
use super::shared::Shared;
use super::verify::regclass;
use crate::backend::{self, BackendError, Login};

/// The lock that all replays hold, with the connection that the last one used.
pub(super) type ReplayLock = Arc<RwLock<Option<Service>>>;

/// How long the connection is kept for the next replay.
const KEEP_OPEN: Duration = Duration::from_secs(2);

/// Values that lie further ahead of a sequence than so many steps were not given by it.
const MAX_AHEAD: i128 = 1 << 16;

/// How often a sequence is read again because somebody took a value in between.
const MAX_READS: usize = 5;

/// A connection of the proxy's own to one database.
#[derive(Debug)]
pub(super) struct Service {
    endpoint: Endpoint,
    database: String,
    link: Link,
}

/// A sequence whose values can be set: not cached by sessions, not cyclic, not temporary.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Sequence {
    oid: u32,
    increment: i64,
    /// Qualified and quoted.
    name: String,
}

/// A sequence that is set back, or is about to be.
#[derive(Debug)]
struct SetBack {
    sequence: Sequence,
    /// Where it stood: `last_value`, `is_called`.
    stood: (i64, bool),
    /// Last value that the client saw.
    last: i64,
}

/// Sets sequences back and forward, for one replay.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    database: String,
    guard: Option<OwnedRwLockWriteGuard<Option<Service>>>,
    records: BTreeSet<usize>,
    /// What is known of columns, by table and number.
    columns: BTreeMap<(u32, u16), Option<Sequence>>,
    /// Where sequences were left, by OID.
    standing: BTreeMap<u32, (i64, bool)>,
    set_back: Vec<SetBack>,
}

impl Keeper {
    /// With a connection, where the database lets the proxy in; otherwise statements run again as
    /// they are, and a difference is told honestly.
    ///
    /// # Errors
    /// The proxy's own connection cannot be had at the moment.
    pub(super) async fn open(
        shared: &Arc<Shared>,
        endpoint: &Endpoint,
        database: &str,
        records: BTreeSet<usize>,
        guard: OwnedRwLockWriteGuard<Option<Service>>,
    ) -> Result<Self, ReplayError> {
        let mut keeper = Self {
            shared: Arc::clone(shared),
            endpoint: endpoint.clone(),
            database: database.to_owned(),
            guard: Some(guard),
            records,
            columns: BTreeMap::new(),
            standing: BTreeMap::new(),
            set_back: Vec::new(),
        };
        match keeper.connect().await {
            Ok(()) => {}
            Err(e) if e.is_transient() => return Err(std::io::Error::other(e.to_string()).into()),
            Err(e) => {
                tracing::warn!(database, error = %e, "values of sequences cannot be kept");
                keeper.records.clear();
            }
        }
        Ok(keeper)
    }

    /// Whether this record may have returned values of sequences.
    pub(super) fn wants(&self, record: usize) -> bool {
        self.records.contains(&record)
    }

    /// Before a record runs again, everything before it being answered: sets its sequences back.
    ///
    /// # Errors
    /// The connection's.
    pub(super) async fn set_back(
        &mut self,
        link: &mut Link,
        tracker: &Tracker,
        record: &[u8],
        reply: &Reply,
    ) -> Result<(), ReplayError> {
        let seen = seen(record, reply, tracker.prepared());
        let values = match self.values(link, seen).await {
            Err(ReplayError::State(why)) => {
                tracing::debug!(why, "sequences could not be looked up");
                return Ok(());
            }
            other => other?,
        };
        for (sequence, values) in values {
            if consecutive(&values, sequence.increment)
                && let (Some(first), Some(last)) = (values.first(), values.last())
                && let Err(e) = self.set_one_back(sequence, *first, *last).await
            {
                match e {
                    ReplayError::State(why) => tracing::debug!(why, "a sequence stays as it is"),
                    other => return Err(other),
                }
            }
        }
        Ok(())
    }

    async fn set_one_back(
        &mut self,
        sequence: Sequence,
        first: i64,
        last: i64,
    ) -> Result<(), ReplayError> {
        let (oid, name) = (sequence.oid, sequence.name.clone());
        let before = self.set_back.len();
        for _ in 0..MAX_READS {
            let stood = match self.standing.remove(&oid) {
                Some(stood) => stood,
                None => {
                    let sql = format!("SELECT last_value, is_called FROM {name}");
                    let rows = self.ask(&sql).await?;
                    let Some(stood) = rows.first().and_then(|r| standing(r)) else {
                        return Ok(());
                    };
                    stood
                }
            };
            let ahead = i128::from(last) - i128::from(stood.0);
            if ahead / i128::from(sequence.increment) > MAX_AHEAD {
                return Ok(());
            }
            // Noted before it is done: an answer may get lost.
            self.set_back.truncate(before);
            self.set_back.push(SetBack {
                sequence: sequence.clone(),
                stood,
                last,
            });
            let sql = format!(
                "SELECT pg_catalog.setval({oid}::pg_catalog.oid::pg_catalog.regclass, {first}, \
                 false) FROM {name} WHERE last_value = {} AND is_called = {}",
                stood.0, stood.1
            );
            match self.ask(&sql).await {
                Ok(rows) if rows.is_empty() => {}
                Err(ReplayError::State(why)) => {
                    self.set_back.truncate(before);
                    return Err(ReplayError::State(why));
                }
                other => return other.map(|_| ()),
            }
        }
        self.set_back.truncate(before);
        Ok(())
    }

    /// Behind the record: sets forward what was set back.
    ///
    /// # Errors
    /// The connection's; what is left is set forward when the keeper goes.
    pub(super) async fn set_forward(&mut self) -> Result<(), ReplayError> {
        while let Some(one) = self.set_back.last() {
            let (oid, sql) = (one.sequence.oid, one.forward());
            match self.ask(&sql).await {
                Ok(rows) => {
                    let stands = rows.first().and_then(|r| standing(r));
                    self.standing.extend(stands.map(|s| (oid, s)));
                    self.set_back.pop();
                }
                // Not a reason to go on with a sequence that is set back.
                Err(e) => {
                    return Err(ReplayError::Connection(std::io::Error::other(
                        e.to_string(),
                    )));
                }
            }
        }
        Ok(())
    }

    /// The values of each sequence that a record returned, in order.
    async fn values(
        &mut self,
        link: &mut Link,
        seen: Vec<Seen>,
    ) -> Result<Vec<(Sequence, Vec<i64>)>, ReplayError> {
        self.look_up(&seen).await?;
        let mut found: Vec<(Sequence, Vec<i64>)> = Vec::new();
        let mut add = |sequence: Sequence, values: Vec<i64>| match found
            .iter_mut()
            .find(|(s, _)| *s == sequence)
        {
            Some((_, all)) => all.extend(values),
            None => found.push((sequence, values)),
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
                && let Some(sequence) = self.named(link, &name).await?
                && !own.contains(&sequence.oid)
            {
                add(sequence, others.swap_remove(0));
            }
        }
        Ok(found)
    }

    /// Asks the catalogs for the sequences of columns that are not known yet.
    async fn look_up(&mut self, seen: &[Seen]) -> Result<(), ReplayError> {
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

    /// The sequence of this name, as the session resolves it where it stands.
    async fn named(
        &mut self,
        link: &mut Link,
        name: &str,
    ) -> Result<Option<Sequence>, ReplayError> {
        let Some(oid) = regclass(link, name).await? else {
            return Ok(None);
        };
        let sql =
            format!("SELECT {SEQUENCE} FROM {SEQUENCES} WHERE s.seqrelid = {oid} AND {USABLE}");
        let rows = self.ask(&sql).await?;
        Ok(rows.first().and_then(|row| sequence(row)))
    }

    async fn ask(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        let gone = || ReplayError::Connection(std::io::ErrorKind::NotConnected.into());
        let slot = self.guard.as_deref_mut().ok_or_else(gone)?;
        // Taken out while it is used: a question that is broken off leaves no half-read answer.
        let mut service = slot.take().ok_or_else(gone)?;
        let result = replay::simple(&mut service.link, sql).await;
        if !matches!(&result, Err(e) if e.is_transient()) {
            *slot = Some(service);
        }
        result
    }

    /// Makes sure of a connection to the right database.
    async fn connect(&mut self) -> Result<(), BackendError> {
        let fits = |s: &Service| s.endpoint == self.endpoint && s.database == self.database;
        let Some(slot) = self.guard.as_deref_mut() else {
            return Ok(());
        };
        if slot.as_ref().is_some_and(fits) {
            return Ok(());
        }
        *slot = None;
        let login = login(&self.shared.service, &self.database);
        let limit = self.shared.options.connect_timeout;
        let conn = backend::connect(&self.endpoint, &self.shared.tls, &login, limit).await?;
        *slot = Some(Service {
            endpoint: self.endpoint.clone(),
            database: self.database.clone(),
            link: Link::new(conn.stream, conn.buf),
        });
        Ok(())
    }

    /// Sets forward what a broken replay has left behind, on a fresh connection if need be. It
    /// ends when the primary is elsewhere: then this server is gone, with what was set back.
    async fn clean_up(mut self) {
        let (shared, at) = (Arc::clone(&self.shared), self.endpoint.clone());
        let mut gate = shared.gate.watch();
        tokio::select! {
            () = self.set_forward_at_last() => {}
            () = tokio::time::sleep(shared.options.max_replay_time) => {}
            _ = gate.wait_for(|g| g.topology.primary.endpoint != at) => {}
        }
        for one in std::mem::take(&mut self.set_back) {
            let sequence = &one.sequence.name;
            tracing::warn!(sequence, "sequence could not be set forward after a replay");
        }
    }

    async fn set_forward_at_last(&mut self) {
        while self.connect().await.is_err() || self.set_forward().await.is_err() {
            tokio::time::sleep(self.shared.options.replay_backoff).await;
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let Some(guard) = self.guard.take() else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if self.set_back.is_empty() {
            let lock = Arc::clone(&self.shared.replaying);
            drop(guard);
            runtime.spawn(async move {
                tokio::time::sleep(KEEP_OPEN).await;
                if let Ok(mut unused) = lock.try_write() {
                    *unused = None;
                }
            });
            return;
        }
        let rest = Self {
            shared: Arc::clone(&self.shared),
            endpoint: self.endpoint.clone(),
            database: std::mem::take(&mut self.database),
            guard: Some(guard),
            records: BTreeSet::new(),
            columns: BTreeMap::new(),
            standing: BTreeMap::new(),
            set_back: std::mem::take(&mut self.set_back),
        };
        runtime.spawn(rest.clean_up());
    }
}

impl SetBack {
    /// Sets the sequence behind where it stood, what the client saw and what was taken since.
    fn forward(&self) -> String {
        let (best, reached) = if self.sequence.increment > 0 {
            ("GREATEST", ">=")
        } else {
            ("LEAST", "<=")
        };
        let (oid, name) = (self.sequence.oid, &self.sequence.name);
        let ((stood, called), seen) = (self.stood, self.last);
        format!(
            "SELECT pg_catalog.setval({oid}::pg_catalog.oid::pg_catalog.regclass, \
             {best}(given, {stood}), called), called FROM (SELECT given, \
             {called} OR given {reached} {stood} AS called FROM (SELECT {best}({seen}, \
             CASE WHEN is_called THEN last_value ELSE {seen} END) AS given FROM {name}) x) y"
        )
    }
}

/// The proxy's own user in a session's database. Waiting for a synchronous standby would be in
/// vain: the new primary may have none yet.
fn login(service: &Login, database: &str) -> Login {
    let mut login = service.clone();
    database.clone_into(&mut login.database);
    for (name, value) in [
        ("search_path", "pg_catalog"),
        ("synchronous_commit", "off"),
        ("lock_timeout", "1s"),
        ("statement_timeout", "5s"),
    ] {
        login.params.push((name.to_owned(), value.to_owned()));
    }
    login
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

fn standing(row: &[Option<String>]) -> Option<(i64, bool)> {
    let [Some(last), Some(called)] = row else {
        return None;
    };
    Some((last.parse().ok()?, called == "t"))
}
