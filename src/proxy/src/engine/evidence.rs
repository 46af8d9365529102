//! Marks in the write-ahead log: whether they can be found again, and finding them.
//!
//! A mark is a transactional logical message in front of an autocommit statement
//! (`helios_session::evidence`). It is looked for with `pg_walinspect`, between a position that the
//! log had before it was sent and the end of its timeline. The invariant: a transaction is said not
//! to have committed only when all of the log that could hold its mark has been read, or its own
//! status says so.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use helios_api::control::Topology;
use helios_api::{Epoch, Lsn, SessionId, Timeline, Xid};
use helios_session::evidence::{Ended, Fate, Gtid, Mark, described, full_id};
use helios_session::state::literal;

use super::counting::Changes;
use super::gate::{GateState, Phase};
use super::link::Link;
use super::registry::lock;
use super::replay::{ReplayError, simple};
use super::resolve::{Outcome, resolve};
use super::restarts::{Life, judged, next_id};
use super::running::ask_ids;
use super::shared::Shared;
use crate::backend;

/// How often the log's position is read: what a look-up reads at most beside what was written while
/// the statement ran.
const INTERVAL: Duration = Duration::from_millis(500);

/// Schema that the extension is put in, where it is not there yet.
const SCHEMA: &str = "helios";

/// The connection that marks are looked for with, and those that were found between two positions
/// of a timeline that has ended.
#[derive(Debug)]
pub(super) struct Found {
    epoch: Epoch,
    pub(super) link: Link,
    read: Option<((Epoch, Timeline), Lsn)>,
    log: Log,
    /// What marked transactions did, once that was asked.
    pub(super) changes: Option<Changes>,
}

/// What a part of the log tells.
#[derive(Debug, Default)]
struct Log {
    marks: HashMap<Gtid, u32>,
    /// The primary was stopped, or came up after a crash: where, and the first id that it handed
    /// out afterwards.
    restarts: Vec<(Lsn, Xid)>,
}

/// Where a log ends that a mark may be in.
enum Until {
    /// At the fork of the timeline.
    Fork(Lsn),
    /// The timeline goes on.
    Now,
    /// Nobody knows.
    Unknown,
}

impl Shared {
    /// A position that the log of the primary of `epoch` has passed; `None` while marks could not
    /// be found again.
    pub(super) fn floor(&self, topology: &Topology, epoch: Epoch) -> Option<Lsn> {
        if let Some(position) = lock(&self.positions).last(epoch) {
            return Some(position.at);
        }
        // Nobody has read it yet in this epoch, but it began at the fork.
        let fence = topology.fences.iter().find(|f| f.epoch == epoch);
        fence.filter(|_| topology.epoch == epoch).map(|f| f.fork)
    }
}

/// Reads the log's position again and again, once it is sure that marks can be found.
pub async fn watch_log(shared: Arc<Shared>) {
    let mut gate = shared.gate.watch();
    let mut link: Option<(Epoch, Link)> = None;
    let mut refused = 0_u32;
    let mut seen = HashMap::new();
    loop {
        let state = gate.borrow_and_update().clone();
        if state.phase == Phase::Open {
            let old = link.take().filter(|(e, _)| *e == state.topology.epoch);
            let (limit, began) = (shared.options.connect_timeout, shared.now_micros());
            match tokio::time::timeout(limit, look(&shared, &state, old, &mut seen)).await {
                Ok(Ok((fresh, at))) => {
                    let epoch = state.topology.epoch;
                    let times = (began, shared.now_micros());
                    lock(&shared.positions).note(epoch, times, at);
                    link = Some((epoch, fresh));
                    refused = 0;
                }
                Ok(Err(ReplayError::State(why))) => {
                    refused = refused.saturating_add(1);
                    // The first time it may be another proxy that makes the same extension.
                    if refused == 2 {
                        tracing::warn!(
                            why,
                            "outcomes of autocommit statements will be unknown after a crash"
                        );
                    }
                }
                Ok(Err(_)) | Err(_) => {}
            }
        }
        let _ = tokio::time::timeout(INTERVAL, gate.changed()).await;
    }
}

/// Reads the log's position, and asks for the ids of marked statements that run for long.
async fn look(
    shared: &Shared,
    state: &GateState,
    old: Option<(Epoch, Link)>,
    seen: &mut HashMap<SessionId, u64>,
) -> Result<(Link, Lsn), ReplayError> {
    let (mut link, at) = read_position(shared, state, old).await?;
    ask_ids(shared, &mut link, seen).await?;
    Ok((link, at))
}

async fn read_position(
    shared: &Shared,
    state: &GateState,
    old: Option<(Epoch, Link)>,
) -> Result<(Link, Lsn), ReplayError> {
    let mut link = match old {
        Some((_, link)) => link,
        None => {
            let mut link = connect(shared, &state.topology).await?;
            prepare(&mut link).await?;
            link
        }
    };
    // What is not flushed may be gone after a crash, and its place in the log taken by others.
    let at = flush_position(&mut link).await?;
    Ok((link, at))
}

/// Makes sure that the log can be read: the extension is there and may be used.
async fn prepare(link: &mut Link) -> Result<(), ReplayError> {
    // A standby that is away must not hold this up.
    simple(link, "SET synchronous_commit = local").await?;
    if schema(link).await?.is_none() {
        simple(link, &format!("CREATE SCHEMA IF NOT EXISTS {SCHEMA}")).await?;
        let create = format!("CREATE EXTENSION IF NOT EXISTS pg_walinspect SCHEMA {SCHEMA}");
        simple(link, &create).await?;
    }
    let Some(schema) = schema(link).await? else {
        return Err(ReplayError::State("pg_walinspect is not there".into()));
    };
    let probe = format!(
        "SELECT 1 FROM (SELECT pg_catalog.pg_current_wal_flush_lsn() AS at) AS now \
         WHERE pg_catalog.has_function_privilege('{schema}.pg_get_wal_records_info(pg_lsn,pg_lsn)', \
         'EXECUTE')"
    );
    match simple(link, &probe).await?.len() {
        0 => Err(ReplayError::State("pg_walinspect may not be used".into())),
        _ => Ok(()),
    }
}

/// The extension's schema, as an identifier.
pub(super) async fn schema(link: &mut Link) -> Result<Option<String>, ReplayError> {
    let sql = "SELECT pg_catalog.quote_ident(n.nspname) FROM pg_catalog.pg_extension AS e \
               JOIN pg_catalog.pg_namespace AS n ON n.oid = e.extnamespace \
               WHERE e.extname = 'pg_walinspect'";
    Ok(first(&simple(link, sql).await?))
}

/// A connection of the proxy's own to the primary.
///
/// # Errors
/// Whatever is in the way of it.
pub(super) async fn connect(shared: &Shared, topology: &Topology) -> Result<Link, ReplayError> {
    let at = &topology.primary.endpoint;
    let limit = shared.options.connect_timeout;
    let conn = backend::connect(at, &shared.tls, &shared.service, limit)
        .await
        .map_err(|e| ReplayError::Connection(std::io::Error::other(e.to_string())))?;
    Ok(Link::new(conn.stream, conn.buf))
}

/// What became of a marked transaction that ran in `ran_on`, on a backend that is gone; `known` is
/// its id, if that was asked for while it ran.
///
/// # Errors
/// The connection's; it may be tried again.
pub(super) async fn fate(
    shared: &Shared,
    topology: &Topology,
    ran_on: (Epoch, Timeline),
    mark: Mark,
    known: Option<u32>,
) -> Result<Fate, ReplayError> {
    let mut slot = shared.found.lock().await;
    let mut found = Found::take(&mut slot, shared, topology).await?;
    let fate = match known {
        Some(id) => by_record(&mut found.link, topology, ran_on, id).await?,
        None => found.fate(shared, topology, ran_on, mark).await?,
    };
    *slot = Some(found);
    Ok(fate)
}

/// [`resolve`], for an id whose transaction ran in `life`: no status is believed that another one
/// may have by now, under the same id.
///
/// # Errors
/// The connection's; it may be tried again.
pub(super) async fn outcome(
    shared: &Shared,
    (topology, link): (&Topology, &mut Link),
    (ran_on, life): ((Epoch, Timeline), Life),
    xid: Xid,
    prepares: Option<&str>,
) -> Result<Outcome, ReplayError> {
    let outcome = resolve(link, topology, ran_on, xid, prepares).await?;
    let unread = match outcome {
        Outcome::Committed => Outcome::Unknown,
        // Whosever it is, it will end.
        Outcome::InProgress => Outcome::InProgress,
        Outcome::Aborted | Outcome::Unknown => return Ok(outcome),
    };
    let Some(from) = life.from(&lock(&shared.positions)) else {
        return Ok(unread);
    };
    let mut slot = shared.found.lock().await;
    let mut found = Found::take(&mut slot, shared, topology).await?;
    let all = found.read(shared, topology, ran_on, from.at, false).await?;
    let mut behind = found.log.restarts.iter().filter(|(at, _)| *at >= from.at);
    let restarted = behind.next().map(|(_, next)| *next);
    *slot = Some(found);
    Ok(match all {
        true => judged(outcome, xid, from, restarted),
        false => unread,
    })
}

impl Found {
    /// The one in `slot`, if it is of this epoch. It is taken out while it is used: a question that
    /// is broken off leaves no half-read answer.
    pub(super) async fn take(
        slot: &mut Option<Self>,
        shared: &Shared,
        topology: &Topology,
    ) -> Result<Self, ReplayError> {
        if let Some(found) = slot.take().filter(|f| f.epoch == topology.epoch) {
            return Ok(found);
        }
        Ok(Self {
            epoch: topology.epoch,
            link: connect(shared, topology).await?,
            read: None,
            log: Log::default(),
            changes: None,
        })
    }

    /// The id of the transaction with a mark, as log records and locks show it.
    ///
    /// # Errors
    /// The connection's; it may be tried again.
    pub(super) async fn record_of(
        &mut self,
        shared: &Shared,
        topology: &Topology,
        ran_on: (Epoch, Timeline),
        mark: Mark,
    ) -> Result<Option<u32>, ReplayError> {
        let all = self
            .read(shared, topology, ran_on, mark.floor, true)
            .await?;
        Ok(self.log.marks.get(&mark.gtid).copied().filter(|_| all))
    }

    async fn fate(
        &mut self,
        shared: &Shared,
        topology: &Topology,
        ran_on: (Epoch, Timeline),
        mark: Mark,
    ) -> Result<Fate, ReplayError> {
        if !self
            .read(shared, topology, ran_on, mark.floor, true)
            .await?
        {
            return Ok(Fate::Unknown);
        }
        match self.log.marks.get(&mark.gtid) {
            Some(record) => by_record(&mut self.link, topology, ran_on, *record).await,
            None => Ok(Fate::NotCommitted),
        }
    }

    /// Reads the log from `floor` to its end, with what has committed up to now if `flush`; `false`
    /// when not all of it can be read any more.
    async fn read(
        &mut self,
        shared: &Shared,
        topology: &Topology,
        ran_on: (Epoch, Timeline),
        floor: Lsn,
        flush: bool,
    ) -> Result<bool, ReplayError> {
        let usable = |(at, from): (_, Lsn)| at == ran_on && from <= floor;
        match until(topology, ran_on) {
            Until::Unknown => Ok(false),
            Until::Fork(_) if self.read.is_some_and(usable) => Ok(true),
            Until::Fork(end) => {
                // One reading serves all sessions, unless it would have to go back too far.
                let mut from = shared.registry.lowest_mark().min(floor);
                if !self.scan(from, end).await? {
                    from = floor;
                    if !self.scan(from, end).await? {
                        return Ok(false);
                    }
                }
                self.read = Some((ran_on, from));
                Ok(true)
            }
            Until::Now => {
                self.read = None;
                let end = match flush {
                    true => flushed(&mut self.link).await?,
                    false => flush_position(&mut self.link).await?,
                };
                self.scan(floor, end).await
            }
        }
    }

    /// Reads the log between two positions; `false` when not all of it can be read any more.
    async fn scan(&mut self, from: Lsn, end: Lsn) -> Result<bool, ReplayError> {
        self.read = None;
        let found = scan(&mut self.link, from, end).await?;
        let all = found.is_some();
        self.log = found.unwrap_or_default();
        Ok(all)
    }
}

/// Whether the log of a primary has come to its end: none of its transactions goes on.
pub(super) fn has_ended(topology: &Topology, ran_on: (Epoch, Timeline)) -> bool {
    matches!(until(topology, ran_on), Until::Fork(_))
}

fn until(topology: &Topology, ran_on: (Epoch, Timeline)) -> Until {
    if topology.epoch == ran_on.0 || topology.timeline == ran_on.1 {
        return Until::Now;
    }
    let after = topology.fences.iter().filter(|f| f.epoch > ran_on.0);
    match after.min_by_key(|f| f.epoch) {
        Some(fence) if fence.epoch == ran_on.0.next() => Until::Fork(fence.fork),
        _ => Until::Unknown,
    }
}

/// Everything that has committed up to now is in the log up to this position, and readable.
pub(super) async fn flushed(link: &mut Link) -> Result<Lsn, ReplayError> {
    simple(link, "SET synchronous_commit = local").await?;
    // A commit of our own flushes all that came before, those without a wait among it.
    simple(
        link,
        "SELECT pg_catalog.pg_logical_emit_message(true, 'helios', '')",
    )
    .await?;
    // What is asked next may have to wait for the standbys.
    simple(link, "RESET synchronous_commit").await?;
    flush_position(link).await
}

/// How far the log is flushed.
pub(super) async fn flush_position(link: &mut Link) -> Result<Lsn, ReplayError> {
    let sql = "SELECT pg_catalog.pg_current_wal_flush_lsn()::pg_catalog.text";
    position(&simple(link, sql).await?)
        .ok_or_else(|| ReplayError::State("the log has no position".into()))
}

/// The marks and restarts between two positions; `None` when not all of it can be read any more.
async fn scan(link: &mut Link, from: Lsn, end: Lsn) -> Result<Option<Log>, ReplayError> {
    if from >= end {
        return Ok(Some(Log::default()));
    }
    let Some(schema) = schema(link).await? else {
        return Ok(None);
    };
    let (from, end) = (literal(&from.to_string()), literal(&end.to_string()));
    let sql = format!(
        "SELECT xid::pg_catalog.text, description, start_lsn::pg_catalog.text \
         FROM {schema}.pg_get_wal_records_info({from}, {end}) \
         WHERE resource_manager OPERATOR(pg_catalog.=) 'LogicalMessage' \
         OR record_type OPERATOR(pg_catalog.=) 'CHECKPOINT_SHUTDOWN' \
         ORDER BY start_lsn USING OPERATOR(pg_catalog.<)"
    );
    let rows = match simple(link, &sql).await {
        Ok(rows) => rows,
        Err(ReplayError::State(why)) => {
            tracing::warn!(why, "the log cannot be read back to a transaction's mark");
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    let mut log = Log::default();
    for row in rows {
        let [Some(xid), Some(description), Some(at)] = row.as_slice() else {
            continue;
        };
        match (described(description), xid.parse()) {
            (Some(mark), Ok(xid)) => drop(log.marks.insert(mark, xid)),
            _ if description.ends_with("; shutdown") => {
                let (Ok(at), Some(next)) = (at.parse(), next_id(description)) else {
                    return Ok(None);
                };
                log.restarts.push((at, next));
            }
            _ => {}
        }
    }
    Ok(Some(log))
}

/// Whether the client's statement for the prepared transaction `gid` has ended it. `told` is what
/// the server answered in front of it, if it did: the id, or that there is none of this name.
///
/// # Errors
/// The connection's.
pub(super) async fn ended(
    link: &mut Link,
    topology: &Topology,
    ran_on: (Epoch, Timeline),
    gid: &str,
    told: Option<Option<u32>>,
    commits: bool,
) -> Result<Ended, ReplayError> {
    let sql = format!(
        "SELECT transaction::pg_catalog.text FROM pg_catalog.pg_prepared_xacts \
         WHERE gid OPERATOR(pg_catalog.=) {}",
        literal(gid)
    );
    let stands = first(&simple(link, &sql).await?).and_then(|id| id.parse::<u32>().ok());
    let id = match (told, stands) {
        // It was refused, and will be again.
        (Some(None), _) => return Ok(Ended::No),
        (Some(Some(id)), Some(stands)) if id == stands => return Ok(Ended::No),
        // Under the same name another one may stand by now.
        (Some(Some(id)), _) => id,
        (None, Some(_)) => return Ok(Ended::No),
        (None, None) => return Ok(Ended::Unknown),
    };
    Ok(match by_record(link, topology, ran_on, id).await? {
        Fate::Committed if commits => Ended::Yes,
        Fate::NotCommitted if !commits => Ended::Yes,
        // Somebody else has ended it otherwise.
        Fate::Committed | Fate::NotCommitted => Ended::No,
        Fate::Unknown => Ended::Unknown,
    })
}

async fn by_record(
    link: &mut Link,
    topology: &Topology,
    ran_on: (Epoch, Timeline),
    record: u32,
) -> Result<Fate, ReplayError> {
    let sql =
        "SELECT pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text";
    let next = first(&simple(link, sql).await?).and_then(|x| x.parse().ok());
    let Some(xid) = next.and_then(|next| full_id(record, Xid(next))) else {
        return Ok(Fate::Unknown);
    };
    match resolve(link, topology, ran_on, xid, None).await? {
        Outcome::Committed => Ok(Fate::Committed),
        Outcome::Aborted => Ok(Fate::NotCommitted),
        Outcome::InProgress => Err(ReplayError::Connection(std::io::Error::other(
            "the transaction still runs",
        ))),
        Outcome::Unknown => Ok(Fate::Unknown),
    }
}

fn first(rows: &[Vec<Option<String>>]) -> Option<String> {
    rows.first().and_then(|r| r.first()).cloned().flatten()
}

fn position(rows: &[Vec<Option<String>>]) -> Option<Lsn> {
    first(rows)?.parse().ok()
}
