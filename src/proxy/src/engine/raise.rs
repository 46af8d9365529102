//! Behind a crash: sequences of the new primary are raised past every value that clients with an
//! open transaction have seen, before anybody draws from them (design rule 5.7).
//!
//! A sequence logs its values ahead, but what was logged last may have been lost with the old
//! primary. A value too many is a gap, so names are looked for generously. The invariant: where a
//! sequence could not be raised, none is set back either, and clients are told of the difference.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use helios_api::Endpoint;
use helios_session::sequences::{Seen, candidates, seen};
use helios_session::state::literal;

use super::registry::{Entry, lock};
use super::replay::ReplayError;
use super::runs::Records;
use super::sequences::Keeper;
use super::session::Session;
use super::shared::Shared;

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(1);

/// As far as a sequence is believed to have been ahead, in steps.
const MAX_AHEAD: i64 = 1 << 16;

impl Session {
    /// What its client has seen of sequences in the open transaction.
    pub(super) fn seen_of_sequences(&self) -> Vec<Seen> {
        let journal = self.tracker.journal();
        let records = candidates(&self.tracker);
        let all = journal.records().iter().enumerate();
        all.filter(|(at, _)| records.contains(at))
            .flat_map(|(_, record)| {
                let bytes = journal.record_bytes(record);
                seen(bytes, &journal.reply(record), self.tracker.prepared())
            })
            .collect()
    }
}

/// Raises what sessions that want a turn have seen.
pub(crate) async fn raise(shared: &Arc<Shared>, at: &Endpoint) {
    let mut databases: BTreeMap<String, Vec<Arc<Entry>>> = BTreeMap::new();
    for entry in shared.registry.all() {
        if entry.wants_turn.load(Ordering::Relaxed) {
            let database = entry.login.database.clone();
            databases.entry(database).or_default().push(entry);
        }
    }
    let raised = databases.into_iter().map(|(database, entries)| async move {
        let done = tokio::time::timeout(LIMIT, raise_in(shared, at, &database, &entries)).await;
        let failed = match done {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it took too long".to_owned(),
        };
        tracing::warn!(
            database,
            failed,
            "sequences could not be raised, and are not set back"
        );
        for entry in entries {
            entry.wants_turn.store(false, Ordering::Relaxed);
        }
    });
    // One after the other: the connection is shared, as the lock is.
    for one in raised {
        one.await;
    }
}

async fn raise_in(
    shared: &Arc<Shared>,
    at: &Endpoint,
    database: &str,
    entries: &[Arc<Entry>],
) -> Result<(), ReplayError> {
    let guard = Arc::clone(&shared.replaying).write_owned().await;
    let none = Records::default();
    let mut keeper = Keeper::open(shared, at, database, none, guard).await?;
    let mut statements = Vec::new();
    for entry in entries {
        let seen = std::mem::take(&mut *lock(&entry.seen));
        keeper.look_up(&seen).await?;
        for command in &seen {
            for column in &command.columns {
                let known = keeper.sequence_of(column.table, column.attribute);
                if let Some((oid, increment, name)) = known {
                    let oid = oid.to_string();
                    statements.extend(past(&column.values, increment > 0, &oid, name));
                } else if let Some(name) = &command.nextval {
                    statements.push(past_named(&column.values, name, &entry.login.user));
                }
            }
        }
    }
    for sql in statements {
        keeper.ask(&sql).await?;
    }
    Ok(())
}

/// Raises one sequence, unless it stands behind the last of `values` already.
fn past(values: &[i64], up: bool, oid: &str, name: &str) -> Option<String> {
    let (last, behind, far) = if up {
        let last = values.iter().max()?;
        (last, "<", format!("{last}::numeric - last_value"))
    } else {
        let last = values.iter().min()?;
        (last, ">", format!("last_value - {last}::numeric"))
    };
    Some(format!(
        "SELECT setval({oid}::oid::regclass, {last}, true) FROM {name} \
         WHERE last_value {behind} {last} AND {far} <= {MAX_AHEAD} * \
         (SELECT abs(seqincrement) FROM pg_sequence WHERE seqrelid = {oid}::oid)"
    ))
}

/// The same for a sequence that a statement named: by that name, in the user's own schema, or in
/// `public`. The session's search path is not known here.
fn past_named(values: &[i64], name: &str, user: &str) -> String {
    let (most, least) = (values.iter().max(), values.iter().min());
    let (most, least) = (most.copied().unwrap_or(0), least.copied().unwrap_or(0));
    format!(
        "SELECT setval(s.seqrelid::regclass, CASE WHEN s.seqincrement > 0 THEN {most} ELSE {least} END, true) \
         FROM pg_sequence s, pg_sequences v, pg_class c, pg_namespace n \
         WHERE c.oid = s.seqrelid AND n.oid = c.relnamespace \
         AND v.schemaname = n.nspname AND v.sequencename = c.relname \
         AND s.seqrelid IN (to_regclass({bare}), to_regclass('public.' || {bare}), \
         to_regclass(quote_ident({user}) || '.' || {bare})) \
         AND CASE WHEN s.seqincrement > 0 \
         THEN coalesce(v.last_value < {most}, true) AND {most}::numeric - coalesce(v.last_value, v.start_value) <= {MAX_AHEAD} * s.seqincrement \
         ELSE coalesce(v.last_value > {least}, true) AND coalesce(v.last_value, v.start_value) - {least}::numeric <= {MAX_AHEAD} * -s.seqincrement END",
        bare = literal(name),
        user = literal(user),
    )
}
