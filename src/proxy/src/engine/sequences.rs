//! Values of sequences that a client has seen come again in a replay.
//!
//! `nextval` gives another value on the new primary. Where a statement of the open transaction
//! returned values of a sequence, the sequence is set back to the first of them just before the
//! statement runs again, and forward behind every value that was given, right afterwards
//! ([`set_back`]). `setval` acts at once and is not undone by a rollback; it is done as the proxy's
//! own user.
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
use super::set_back::{self, Baton, Sequence, SetBack, Wanted};
use super::shared::Shared;
use super::turn::turn_ends;
use super::verify::regclass;
use crate::backend::{self, BackendError, Login};

/// The lock that all replays hold, with the connection that the last one used.
pub(super) type ReplayLock = Arc<RwLock<Option<Service>>>;

/// How long the connection is kept for the next replay.
const KEEP_OPEN: Duration = Duration::from_secs(2);

/// A connection of the proxy's own to one database.
#[derive(Debug)]
pub(super) struct Service {
    endpoint: Endpoint,
    database: String,
    link: Link,
    baton: Baton,
    /// The server has set sequences back, and waits for the baton.
    waits: bool,
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
    set_back: Vec<SetBack>,
    /// A statement that sets back was sent, and is not known to have ended.
    begun: bool,
    /// This one only cleans up.
    cleans: bool,
    /// By the server's clock, in seconds: nothing is set back later, however late the server gets
    /// to know.
    until: Option<f64>,
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
            set_back: Vec::new(),
            begun: false,
            cleans: false,
            until: None,
        };
        match keeper.connect().await {
            Ok(()) => keeper.until = turn_ends(shared, &mut keeper).await?,
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
        let wanted: Vec<Wanted> = values
            .into_iter()
            .filter(|(sequence, values)| consecutive(values, sequence.increment))
            .filter_map(|(s, values)| Some((s, *values.first()?, *values.last()?)))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let mut service = self.service()?;
        self.begun = true;
        let (link, noted) = (&mut service.link, &mut self.set_back);
        // An error takes the connections with it: the server sets forward then.
        service.waits = set_back::begin(link, &service.baton, &wanted, self.until, noted).await?;
        self.begun = service.waits || !self.set_back.is_empty();
        self.put_back(service);
        Ok(())
    }

    /// Behind the record: sets forward what was set back.
    ///
    /// # Errors
    /// The connection's; what is left is set forward when the keeper goes.
    pub(super) async fn set_forward(&mut self) -> Result<(), ReplayError> {
        if !self.begun {
            return Ok(());
        }
        // Not a reason to go on with a sequence that is set back.
        let broken = |e: ReplayError| ReplayError::Connection(std::io::Error::other(e.to_string()));
        let mut service = self.service()?;
        if std::mem::take(&mut service.waits) {
            service.baton.give().await?;
            set_back::end(&mut service.link).await.map_err(broken)?;
            service.baton.take_back().await?;
            self.put_back(service);
            self.set_back.clear();
        } else {
            self.put_back(service);
            self.ask(&set_back::wait_for_others())
                .await
                .map_err(broken)?;
            while let Some(sql) = self.set_back.last().map(SetBack::forward) {
                self.ask(&sql).await.map_err(broken)?;
                self.set_back.pop();
            }
        }
        self.begun = false;
        Ok(())
    }

    /// Taken out while it is used: a question that is broken off leaves no half-read answer.
    fn service(&mut self) -> Result<Service, ReplayError> {
        let service = self.guard.as_deref_mut().and_then(Option::take);
        service.ok_or_else(|| ReplayError::Connection(std::io::ErrorKind::NotConnected.into()))
    }

    fn put_back(&mut self, service: Service) {
        if let Some(slot) = self.guard.as_deref_mut() {
            *slot = Some(service);
        }
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

    pub(super) async fn ask(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        let mut service = self.service()?;
        let result = replay::simple(&mut service.link, sql).await;
        if !matches!(&result, Err(e) if e.is_transient()) {
            self.put_back(service);
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
        let connect = || backend::connect(&self.endpoint, &self.shared.tls, &login, limit);
        let (conn, second) = tokio::try_join!(connect(), connect())?;
        let baton = Baton::take(Link::new(second.stream, second.buf)).await;
        *slot = Some(Service {
            endpoint: self.endpoint.clone(),
            database: self.database.clone(),
            link: Link::new(conn.stream, conn.buf),
            baton: baton.map_err(|e| BackendError::Io {
                endpoint: self.endpoint.clone(),
                source: std::io::Error::other(e.to_string()),
            })?,
            waits: false,
        });
        Ok(())
    }

    /// Sets forward what a broken replay has left behind, on a fresh connection if need be. When
    /// the primary is elsewhere then, what was set back may have got there.
    async fn clean_up(mut self) {
        let limit = self.shared.options.max_replay_time;
        let _ = tokio::time::timeout(limit, self.set_forward_at_last()).await;
        for one in std::mem::take(&mut self.set_back) {
            let sequence = &one.sequence.name;
            tracing::warn!(sequence, "sequence could not be set forward after a replay");
        }
    }

    async fn set_forward_at_last(&mut self) {
        while self.connect().await.is_err() || self.set_forward().await.is_err() {
            let topology = self.shared.gate.now().topology;
            self.endpoint = topology.primary.endpoint.clone();
            tokio::time::sleep(self.shared.options.replay_backoff).await;
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let Some(guard) = self.guard.take() else {
            return;
        };
        // A runtime that ends drops at once what it is given.
        if self.cleans && self.begun {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if self.set_back.is_empty() && !self.begun {
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
            set_back: std::mem::take(&mut self.set_back),
            begun: self.begun,
            cleans: true,
            until: self.until,
        };
        runtime.spawn(rest.clean_up());
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
        ("statement_timeout", "10s"),
        ("client_min_messages", "notice"),
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
