//! Bringing a fresh backend to a session's state, and running its journal again.
//!
//! Works on a connection that no client sees yet. The invariant: nothing here can commit. The
//! journal holds only exchanges that left a transaction open, and what is in flight is not sent
//! before its outcome is known.

use std::collections::BTreeSet;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use helios_session::TxnStatus;
use helios_session::expect::Violation;
use helios_session::journal::Record;
use helios_session::locks::{Locks, take_again_sql};
use helios_session::state::{Prepared, Snapshot, literal};
use helios_session::tracker::{ServerStep, Tracker};
use helios_wire::message::{front, read};
use helios_wire::{FrameError, backend, peek_header};
use tokio::sync::Semaphore;

use super::ahead::{self, Blueprint};
use super::feed::feed_all;
use super::gather::gather;
use super::kept::{self, Kept};
use super::link::Link;
use super::progress::UnderWay;
use super::shared::EngineOptions;
use super::turn::Turn;
use super::verify::verify;

/// Why a session could not be rebuilt.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReplayError {
    /// The connection broke: it may be tried again.
    #[error("connection to the new primary broke: {0}")]
    Connection(#[from] io::Error),
    /// The server sent what nothing explains.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The server sent a broken frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The session's state cannot be had again.
    #[error("session state could not be restored: {0}")]
    State(String),
    /// A session advisory lock cannot be had again.
    #[error("session advisory lock {lock} is lost: {why}")]
    Lock {
        /// Which one.
        lock: String,
        /// What the server said.
        why: String,
    },
    /// A run of statements took other values of a sequence than the client has seen: to be tried
    /// again, one statement at a time.
    #[error("statements took values of a sequence that nobody has seen")]
    Unseen,
    /// The replay gave something else than the client has seen.
    #[error("replay differs in statement {statement}: {what}")]
    Different {
        /// Number of the exchange in the transaction, from 1.
        statement: usize,
        /// What differs.
        what: String,
    },
}

impl ReplayError {
    /// Whether another attempt may succeed.
    #[must_use]
    pub(super) fn is_transient(&self) -> bool {
        matches!(self, Self::Connection(_) | Self::Unseen)
    }

    /// The same where acknowledged commits may be missing: the likeliest reason of a difference.
    #[must_use]
    fn after_loss(self) -> Self {
        match self {
            Self::Different { statement, what } => Self::Different {
                statement,
                what: format!(
                    "{what}, and commits that it has read may have been lost with the old primary"
                ),
            },
            other => other,
        }
    }
}

pub(super) fn ended() -> ReplayError {
    ReplayError::Connection(io::ErrorKind::UnexpectedEof.into())
}

/// Runs a simple query of our own on a connection that owes nothing; rows as text.
///
/// # Errors
/// The connection's, or the server's error as [`ReplayError::State`].
pub(super) async fn simple(
    link: &mut Link,
    sql: &str,
) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
    front::query(&mut link.output, sql.as_bytes())
        .map_err(|e| ReplayError::State(e.to_string()))?;
    link.flush().await?;
    let mut rows = Vec::new();
    let mut error = None;
    loop {
        let (tag, frame) = next_frame(link).await?;
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            backend::READY_FOR_QUERY => break,
            backend::ERROR_RESPONSE => error = Some(describe_error(body)),
            backend::DATA_ROW => rows.push(text_row(body)),
            _ => {}
        }
    }
    match error {
        Some(error) => Err(ReplayError::State(error)),
        None => Ok(rows),
    }
}

fn note_parameter(link: &mut Link, tag: u8, frame: &[u8]) {
    let body = frame.get(5..).unwrap_or_default();
    if tag == backend::PARAMETER_STATUS
        && let Ok((name, value)) = read::parameter_status(body)
    {
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        link.parameters.insert(text(name), text(value));
    }
}

/// The warning that a commit did not wait for the standbys to the end: it stands on this server,
/// and perhaps nowhere else (`SyncRepWaitForLSN` in `src/backend/replication/syncrep.c`). Known by
/// where it comes from, not by its text, which is translated.
#[must_use]
pub(super) fn is_unconfirmed_commit(tag: u8, frame: &[u8]) -> bool {
    let body = frame.get(5..).unwrap_or_default();
    tag == backend::NOTICE_RESPONSE
        && body
            .split(|b| *b == 0)
            .any(|field| field == b"RSyncRepWaitForLSN")
}

/// A row's columns as text.
#[must_use]
pub(super) fn text_row(body: &[u8]) -> Vec<Option<String>> {
    let text = |v: &[u8]| String::from_utf8_lossy(v).into_owned();
    read::data_row(body)
        .map(|row| row.iter().map(|v| v.map(text)).collect())
        .unwrap_or_default()
}

/// An error's message and SQLSTATE.
pub(super) fn describe_error(body: &[u8]) -> String {
    helios_wire::ErrorFields::parse(body).map_or_else(
        |e| e.to_string(),
        |f| format!("{} ({})", f.message, f.sqlstate.as_str()),
    )
}

/// The next whole frame of a connection that only we use.
pub(super) async fn next_frame(link: &mut Link) -> Result<(u8, bytes::BytesMut), ReplayError> {
    loop {
        if let Some(header) = peek_header(&link.input)?
            && link.input.len() >= header.len
        {
            let frame = link.input.split_to(header.len);
            note_parameter(link, header.tag, &frame);
            return Ok((header.tag, frame));
        }
        if !link.read_more().await? {
            return Err(ended());
        }
    }
}

/// How long a restored session waits for one of its advisory locks, in milliseconds: backends that
/// are about to end may still hold it. Well below the barrier's limit.
const LOCK_WAIT_MS: u32 = 2000;

/// Takes session advisory locks again, as often as they were held.
async fn take_locks(link: &mut Link, locks: &Locks) -> Result<(), ReplayError> {
    if locks.is_empty() {
        return Ok(());
    }
    let names = locks.keys().map(|l| Some(l.to_string()));
    let names = std::iter::once(None).chain(names).chain([None]);
    for (sql, lock) in take_again_sql(locks, LOCK_WAIT_MS).iter().zip(names) {
        match (simple(link, sql).await, lock) {
            (Ok(_), _) => {}
            (Err(ReplayError::State(why)), Some(lock)) => {
                return Err(ReplayError::Lock { lock, why });
            }
            (Err(e), _) => return Err(e),
        }
    }
    Ok(())
}

/// Restores what the session was outside its transaction: locks, temporary objects, settings, role,
/// statements, in this order (design rule 5.3), in one flight. What was restored ahead of time, and is
/// still the same, is not restored again where that is `usable`; locks want a backend without it.
///
/// # Errors
/// [`ReplayError::State`] when the server refuses something, or a statement's columns changed.
pub(super) async fn restore(
    link: &mut Link,
    (restored, usable): (Option<&Blueprint>, bool),
    state: &Snapshot,
    temporary: Option<(&Kept, &BTreeSet<usize>, &Semaphore)>,
    prepared: &[(Vec<u8>, Prepared)],
) -> Result<(), ReplayError> {
    let bare = !state.locks.is_empty() || !usable;
    let wanted = Blueprint::of(state, prepared);
    let there = ahead::is_there(link, restored, (!bare).then_some(&wanted)).await?;
    take_locks(link, &state.locks).await?;
    if let Some((kept, later, makers)) = temporary {
        // They belong to who has logged in, and no setting may stand in their way.
        if let Some(user) = state.session_authorization.as_ref().filter(|_| !there) {
            simple(
                link,
                &format!("SET SESSION AUTHORIZATION {}", literal(user)),
            )
            .await?;
        }
        kept::restore(link, (kept, later), makers).await?;
    }
    // The unnamed statement last: nothing behind it may end it.
    let (unnamed, named): (Vec<_>, Vec<_>) = prepared.iter().partition(|(n, _)| n.is_empty());
    if there {
        restore_state(link, &state.listen_sql(), &unnamed).await
    } else {
        let all: Vec<_> = named.into_iter().chain(unnamed).collect();
        let mut sql = state.restore_sql();
        sql.extend(state.listen_sql());
        restore_state(link, &sql, &all).await
    }
}

/// Prepares the unnamed statement again, which a query of ours has ended.
///
/// # Errors
/// As [`restore`].
pub(super) async fn prepare_unnamed(
    link: &mut Link,
    prepared: &[(Vec<u8>, Prepared)],
) -> Result<(), ReplayError> {
    let unnamed: Vec<_> = prepared.iter().filter(|(n, _)| n.is_empty()).collect();
    restore_state(link, &[], &unnamed).await
}

/// Restores on a standby what can be had there already.
///
/// # Errors
/// As [`restore`].
pub(super) async fn restore_ahead(
    link: &mut Link,
    blueprint: &Blueprint,
) -> Result<(), ReplayError> {
    let prepared: Vec<_> = blueprint.prepared.iter().collect();
    restore_state(link, &blueprint.state.restore_sql(), &prepared).await
}

/// Runs statements of ours and prepares the client's, in one flight.
async fn restore_state(
    link: &mut Link,
    sql: &[String],
    prepared: &[&(Vec<u8>, Prepared)],
) -> Result<(), ReplayError> {
    let mut cycles = 0;
    let too_long = |e: helios_wire::message::BuildError| ReplayError::State(e.to_string());
    for sql in sql {
        front::query(&mut link.output, sql.as_bytes()).map_err(too_long)?;
        cycles += 1;
    }
    for (name, statement) in prepared {
        link.output.extend_from_slice(&statement.parse);
        if statement.columns.is_some() {
            front::describe(&mut link.output, front::Target::Statement, name).map_err(too_long)?;
        }
        front::sync(&mut link.output);
        cycles += 1;
    }
    if cycles == 0 {
        return Ok(());
    }
    let described = collect(link, cycles).await?;
    let described = described.get(sql.len()..).unwrap_or_default();
    for ((_, statement), seen) in prepared.iter().zip(described) {
        if statement.columns.is_some() && statement.columns != *seen {
            return Err(ReplayError::State(
                "columns of a prepared statement changed".into(),
            ));
        }
    }
    Ok(())
}

/// Reads the replies to `cycles` request cycles; the hash of the row description of each.
async fn collect(link: &mut Link, cycles: usize) -> Result<Vec<Option<u128>>, ReplayError> {
    let mut described = Vec::with_capacity(cycles);
    let mut columns = None;
    let mut error = None;
    while described.len() < cycles {
        exchange_bytes(link).await?;
        while let Some(header) = peek_header(&link.input)?
            && link.input.len() >= header.len
        {
            let frame = link.input.split_to(header.len);
            note_parameter(link, header.tag, &frame);
            match header.tag {
                backend::READY_FOR_QUERY => described.push(columns.take()),
                backend::ROW_DESCRIPTION => {
                    columns = Some(helios_session::reply::row_description_hash(&frame));
                }
                backend::ERROR_RESPONSE => {
                    error = error.or_else(|| Some(describe_error(frame.get(5..)?)));
                }
                _ => {}
            }
        }
    }
    match error {
        Some(error) => Err(ReplayError::State(error)),
        None => Ok(described),
    }
}

/// Writes what can be written and waits until something has been read.
async fn exchange_bytes(link: &mut Link) -> Result<(), ReplayError> {
    poll_fn(|cx| {
        if let Poll::Ready(Err(e)) = link.poll_write(cx) {
            return Poll::Ready(Err(e));
        }
        link.poll_read(cx)
    })
    .await?;
    if link.ended { Err(ended()) } else { Ok(()) }
}

/// How a journal is run again.
#[derive(Debug, Clone, Copy)]
pub(super) struct How<'a> {
    /// Commits that it may have read are perhaps not on this primary.
    pub lossy: bool,
    /// The session's thread has nothing to do for clients: see [`gather`].
    pub held: &'a AtomicBool,
    /// The proxy's options.
    pub options: &'a EngineOptions,
}

/// Runs the journal of `old` again with `new` as its tracker, and compares.
///
/// # Errors
/// [`ReplayError::Different`] when something differs that the client may not see differ.
pub(super) async fn replay(
    link: &mut Link,
    old: &Tracker,
    new: &mut Tracker,
    turn: &mut Turn,
    progress: &UnderWay<'_>,
    how: How<'_>,
) -> Result<(), ReplayError> {
    let (lossy, options) = (how.lossy, how.options);
    let records = old.journal().records();
    let mut next = 0;
    while next < records.len() {
        turn.at(next);
        if let Some(taken) = turn.taken()
            && taken.stops_at(next)
        {
            settle(link, new, records, next, progress, how.held).await?;
            taken.stand(link, next).await?;
        }
        let mut keeper = turn.keeper().filter(|k| k.wants(next));
        let mut run = 1;
        if let Some(keeper) = &mut keeper {
            settle(link, new, records, next, progress, how.held).await?;
            run = keeper.set_back(link, old, new, next).await?;
        }
        for record in records.iter().skip(next).take(run) {
            let bytes = old.journal().record_bytes(record);
            feed_all(link, new, records, bytes, record.at_micros, options).await?;
            progress.at(new.journal().records().len());
        }
        next += run;
        if let Some(keeper) = keeper {
            settle(link, new, records, next, progress, how.held).await?;
            keeper.set_forward().await?;
        }
    }
    turn.at(next);
    settle(link, new, records, records.len(), progress, how.held).await?;
    if let Some(taken) = turn.taken() {
        taken.is_used_up(link).await?;
    }
    // What is asked from here on draws from no sequence.
    turn.end();
    let verified = verify(link, old, new, lossy).await;
    verified.map_err(|e| if lossy { e.after_loss() } else { e })
}

/// Waits until `count` records are answered and the server owes nothing.
async fn settle(
    link: &mut Link,
    new: &mut Tracker,
    records: &[Record],
    count: usize,
    progress: &UnderWay<'_>,
    held: &AtomicBool,
) -> Result<(), ReplayError> {
    while new.journal().records().len() < count || !new.is_quiet() {
        if held.load(Ordering::Relaxed) {
            gather(link, new);
        }
        advance(link, new, records).await?;
        progress.at(new.journal().records().len());
    }
    Ok(())
}

pub(super) async fn advance(
    link: &mut Link,
    new: &mut Tracker,
    records: &[Record],
) -> Result<(), ReplayError> {
    exchange_bytes(link).await?;
    take_replies(link, new)?;
    strayed(records, new).map_or(Ok(()), Err)
}

pub(super) fn take_replies(link: &mut Link, tracker: &mut Tracker) -> Result<(), ReplayError> {
    while let Some(header) = peek_header(&link.input)?
        && link.input.len() >= header.len
    {
        let frame = link.input.split_to(header.len);
        note_parameter(link, header.tag, &frame);
        if is_fatal(header.tag, &frame) {
            return Err(ended());
        }
        if tracker.server_frame(header.tag, &frame)? == ServerStep::Unsolicited {
            return Err(ended());
        }
    }
    Ok(())
}

/// Whether a frame is an error that ends the connection, or the warning that announces it.
#[must_use]
pub(super) fn is_fatal(tag: u8, frame: &[u8]) -> bool {
    let body = frame.get(5..).unwrap_or_default();
    match tag {
        backend::ERROR_RESPONSE => {
            body.starts_with(b"SFATAL")
                || body.starts_with(b"SPANIC")
                || helios_wire::message::error::error_fields(body)
                    .any(|f| matches!(f, Ok((b'V', b"FATAL" | b"PANIC"))))
        }
        // quickdie() in src/backend/tcop/postgres.c sends these as warnings and exits.
        backend::NOTICE_RESPONSE => {
            matches!(&helios_session::reply::sqlstate(frame), b"57P01" | b"57P02")
        }
        _ => false,
    }
}

/// A replayed transaction that ended where the original did not cannot be compared further.
pub(super) fn strayed(records: &[Record], new: &Tracker) -> Option<ReplayError> {
    let done = new.journal().records().len();
    let idle = new.status() == TxnStatus::Idle && new.journal().in_flight().is_empty();
    (idle && done < records.len() && new.is_quiet()).then(|| ReplayError::Different {
        statement: done + 1,
        what: "the transaction ended".into(),
    })
}
