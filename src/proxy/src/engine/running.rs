//! Ids of marked statements that run for long.
//!
//! The log that holds a statement's mark may be recycled while the statement runs. So the primary
//! is asked for the transaction id of every backend whose marked statement has run for a while; the
//! id's status is evidence without the log. The invariant: an id is kept for a statement only when
//! its backend ran that statement, and nothing else, before and after the question.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use helios_api::SessionId;
use helios_session::evidence::Gtid;

use super::link::Link;
use super::registry::Entry;
use super::replay::{ReplayError, simple};
use super::shared::Shared;

/// Most backends that are asked about at once.
const MAX_ASKED: usize = 1000;

/// The marked statement that a session's backend runs.
#[derive(Debug, Default)]
pub struct Running {
    /// Its number in the session, 0 for none; only while it is alone in flight, or in front.
    number: AtomicU64,
    backend: AtomicI32,
    /// Number (its lower half) and transaction id of one that was asked about.
    known: AtomicU64,
}

/// The part of a global id that tells the statements of a session apart.
fn number(gtid: Gtid) -> u64 {
    u64::try_from(gtid.0 & u128::from(u64::MAX)).unwrap_or(0)
}

fn pair(number: u64, xid: u32) -> u64 {
    number << 32 | u64::from(xid)
}

impl Running {
    /// A marked statement is about to be sent, with nothing in flight before it.
    pub(super) fn begin(&self, gtid: Gtid, backend: i32) {
        self.backend.store(backend, Ordering::Relaxed);
        self.number.store(number(gtid), Ordering::Release);
    }

    /// Nothing is in flight.
    pub(super) fn end(&self) {
        self.number.store(0, Ordering::Release);
    }

    /// The transaction id of a statement, as log records show it, if it was asked for.
    pub(super) fn id_of(&self, gtid: Gtid) -> Option<u32> {
        let known = self.known.load(Ordering::Acquire);
        let xid = u32::try_from(known & u64::from(u32::MAX)).ok()?;
        (xid != 0 && known == pair(number(gtid), xid)).then_some(xid)
    }

    fn learn(&self, of: u64, xid: u32) -> bool {
        let still = self.number.load(Ordering::Acquire) == of;
        if still {
            self.known.store(pair(of, xid), Ordering::Release);
        }
        still
    }
}

/// Asks for the ids of what was running the last time already; `seen` is what runs now.
///
/// # Errors
/// The connection's.
pub(super) async fn ask_ids(
    shared: &Shared,
    link: &mut Link,
    seen: &mut HashMap<SessionId, u64>,
) -> Result<(), ReplayError> {
    let mut now = HashMap::new();
    let mut asked: HashMap<i32, (Arc<Entry>, u64)> = HashMap::new();
    for entry in shared.registry.all() {
        let number = entry.running.number.load(Ordering::Acquire);
        if number == 0 {
            continue;
        }
        now.insert(entry.id, number);
        let known =
            entry.running.known.load(Ordering::Relaxed) >> 32 == number & u64::from(u32::MAX);
        if seen.get(&entry.id) == Some(&number) && !known && asked.len() < MAX_ASKED {
            let backend = entry.running.backend.load(Ordering::Relaxed);
            asked.insert(backend, (entry, number));
        }
    }
    *seen = now;
    if asked.is_empty() {
        return Ok(());
    }
    let pids: Vec<String> = asked.keys().map(i32::to_string).collect();
    let sql = format!(
        "SELECT pid::pg_catalog.text, backend_xid::pg_catalog.text \
         FROM pg_catalog.pg_stat_activity WHERE backend_xid IS NOT NULL \
         AND pid OPERATOR(pg_catalog.=) ANY ('{{{}}}'::pg_catalog.int4[])",
        pids.join(",")
    );
    let rows = simple(link, &sql).await?;
    // Their marks are flushed with a commit of ours, which waits for no standby: after a restart in
    // place an id of which nothing was flushed may be given to another transaction.
    let flush = "SELECT pg_catalog.pg_logical_emit_message(true, 'helios', '')";
    simple(link, flush).await?;
    for row in rows {
        let [Some(pid), Some(xid)] = row.as_slice() else {
            continue;
        };
        let (Ok(pid), Ok(xid)) = (pid.parse::<i32>(), xid.parse::<u32>()) else {
            continue;
        };
        if let Some((entry, number)) = asked.get(&pid)
            && entry.running.learn(*number, xid)
        {
            // Nobody has to read the log back to it any more.
            entry.mark_floor.store(u64::MAX, Ordering::Relaxed);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_kept_for_the_statement_that_still_runs() {
        let running = Running::default();
        let gtid = |n: u64| Gtid(7 << 64 | u128::from(n));
        assert_eq!(running.id_of(gtid(1)), None);
        running.begin(gtid(1), 5);
        assert!(running.learn(1, 99));
        assert_eq!(running.id_of(gtid(1)), Some(99));
        running.begin(gtid(2), 5);
        assert!(!running.learn(1, 100), "another one runs by now");
        assert_eq!(running.id_of(gtid(2)), None);
        running.end();
        assert!(!running.learn(2, 101));
        assert_eq!(running.id_of(gtid(1)), Some(99));
    }
}
