//! Giving a fresh backend all the values of sequences that its long transaction has shown its client.
//!
//! Where setting sequences back for one record after the other would take too long, the backend takes
//! all values at once into its own cache (`helios_session::sequences::preallocate`), while its proxy
//! is alone and in its turn; it runs the transaction again afterwards, beside others, for as long as
//! that takes. For a moment the sequence's row in `pg_sequence` says that so many values are cached,
//! in a transaction of that very backend which is rolled back: nobody else ever sees it, while what
//! `nextval` moves and what a backend remembers are not rolled back (`nextval_internal` and `SeqTable`
//! in `src/backend/commands/sequence.c`). That takes a superuser's right, which a function lends it
//! that the proxy makes in the temporary schema of its own connection: it does this once, for the
//! backend of this process id, and is gone with that connection. The sequence is set back and forward
//! by the statement that always does it ([`super::set_back`]).
//!
//! The invariants: a backend that may have taken values runs the transaction again with them, or is
//! left; and it goes on with its client only when it has given out all of them.

use std::fmt::Write as _;

use helios_session::sequences::preallocate::{Plan, Stop};
use helios_session::sequences::run::{Ahead, Span};
use helios_session::tracker::Tracker;
use helios_wire::backend;
use helios_wire::message::{front, read};
use tokio::sync::watch;

use super::gate::Phase;
use super::link::Link;
use super::replay::{ReplayError, next_frame, simple};
use super::runs::{Names, Records};
use super::sequences::Keeper;
use super::session::{Server, Session};
use super::set_back::{CLASS, Sequence, TAKING, Wanted};
use super::turn::Turn;
use super::verify::call;

/// Fewer records that have drawn are not looked at.
const FEW: usize = 256;

/// Calls that are sent together.
const TOGETHER: u64 = 256;

/// `nextval(regclass)`.
const NEXTVAL: u32 = 1574;
/// `currval(regclass)`.
const CURRVAL: u32 = 1575;
/// `pg_backend_pid()`.
const BACKEND_PID: u32 = 2026;
/// `has_sequence_privilege(oid, text)`.
const HAS_SEQUENCE_PRIVILEGE: u32 = 2186;

/// What is called in front of the function, in its transaction: it writes, whatever the session's
/// defaults are.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; \
    SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '1s'";

/// Values that a backend has in its own cache.
#[derive(Debug)]
pub(super) struct TakenAhead {
    spans: Vec<Wanted>,
    /// In the order of the records.
    stops: std::iter::Peekable<std::vec::IntoIter<Stop>>,
}

impl TakenAhead {
    /// Whether it is to be seen to in front of this record where the backend stands.
    pub(super) fn stops_at(&mut self, record: usize) -> bool {
        self.stops.peek().is_some_and(|stop| stop.record == record)
    }

    /// In front of this record, everything before it being answered: passes over what others took.
    ///
    /// # Errors
    /// [`ReplayError::Unseen`] when the backend stands where it should not; the connection's.
    pub(super) async fn stand(
        &mut self,
        link: &mut Link,
        record: usize,
    ) -> Result<(), ReplayError> {
        while let Some(stop) = self.stops.next_if(|stop| stop.record == record) {
            let span = self.spans.get(stop.sequence);
            let sequence = &span.ok_or(ReplayError::Unseen)?.sequence;
            let stands = number(link, CURRVAL, sequence).await?;
            if stands == Some(stop.behind) {
                continue;
            }
            let passes = stands == Some(stop.stands);
            if !passes || pass_over(link, sequence, &stop).await? != Some(stop.behind) {
                return Err(ReplayError::Unseen);
            }
        }
        Ok(())
    }

    /// Whether all of them were given out: one that is left would be given to the client next, who
    /// has it already.
    ///
    /// # Errors
    /// [`ReplayError::Unseen`] if not; the connection's.
    pub(super) async fn is_used_up(&self, link: &mut Link) -> Result<(), ReplayError> {
        for Span { sequence, last, .. } in &self.spans {
            let stands = number(link, CURRVAL, sequence).await?;
            let up = sequence.increment > 0;
            if !stands.is_some_and(|stands| if up { stands >= *last } else { stands <= *last }) {
                return Err(ReplayError::Unseen);
            }
        }
        Ok(())
    }
}

impl Keeper {
    /// For a transaction that is long enough, on a backend that has not begun it: takes all values
    /// that it has shown. The unnamed statement is gone then.
    ///
    /// # Errors
    /// The connection's. [`ReplayError::Unseen`] when the backend may have taken some of them only.
    pub(super) async fn take_ahead(
        &mut self,
        link: &mut Link,
        old: &Tracker,
        new: &Tracker,
    ) -> Result<Option<TakenAhead>, ReplayError> {
        let Some(plan) = self.plan(link, old, new).await? else {
            return Ok(None);
        };
        let sets_back = self.set_back_all(&plan.spans).await?;
        let taken = match sets_back {
            true => self.take_all(link, &plan.spans).await,
            false => Ok(false),
        };
        // Whatever has happened.
        self.set_forward().await?;
        match taken {
            Ok(true) => Ok(Some(TakenAhead {
                spans: plan.spans,
                stops: plan.stops.into_iter().peekable(),
            })),
            Ok(false) => Ok(None),
            Err(ReplayError::State(why)) => {
                tracing::debug!(why, "values of sequences could not be taken ahead");
                Err(ReplayError::Unseen)
            }
            Err(e) => Err(e),
        }
    }

    /// What is to be taken, if it is worth it and nothing stands in its way.
    async fn plan(
        &mut self,
        link: &mut Link,
        old: &Tracker,
        new: &Tracker,
    ) -> Result<Option<Plan<Sequence>>, ReplayError> {
        let Records {
            wanted,
            apart,
            whole,
        } = &self.records;
        if !whole || wanted.len() < FEW || apart.as_ref().is_none_or(|apart| apart.moves) {
            return Ok(None);
        }
        let journal = old.journal();
        let (mut ahead, mut names) = (Ahead::of(new.prepared()), Names::new());
        let mut plan = Plan::default();
        for (number, record) in journal.records().iter().enumerate() {
            let bytes = journal.record_bytes(record);
            if self.wants(number) {
                let Some(seen) = ahead.seen(bytes, &journal.reply(record)) else {
                    return Ok(None);
                };
                let drawn = self.drawn(link, seen, &mut names).await?;
                if !drawn.is_some_and(|drawn| plan.take(number, &drawn)) {
                    return Ok(None);
                }
            }
            ahead.pass(bytes);
        }
        if !plan.is_worth_it(journal.records().len()) {
            return Ok(None);
        }
        for Span { sequence, .. } in &plan.spans {
            let oid = sequence.oid.to_string();
            let arguments = [Some(oid.as_bytes()), Some(&b"USAGE"[..])];
            let may = call(link, HAS_SEQUENCE_PRIVILEGE, &arguments).await?;
            if may.as_deref() != Some(&[1]) {
                return Ok(None);
            }
        }
        Ok(Some(plan))
    }

    /// The sequences being set back: has the backend take them; `false`: nothing was tried.
    async fn take_all(&mut self, link: &mut Link, spans: &[Wanted]) -> Result<bool, ReplayError> {
        let pid = call(link, BACKEND_PID, &[]).await?;
        let pid = pid.and_then(|pid| pid.try_into().ok().map(i32::from_be_bytes));
        let Some((pid, text)) = pid.and_then(|pid| Some((pid, function(pid, spans)?))) else {
            return Ok(false);
        };
        let made = self.on_baton(&text).await?;
        let made = made
            .first()
            .and_then(|row| row.first()?.as_deref()?.parse().ok());
        let Some(function) = made else {
            return Ok(false);
        };
        simple(link, BEGIN).await?;
        let taken = call(link, function, &[]).await?;
        simple(link, "ROLLBACK").await?;
        tracing::debug!(
            pid,
            sequences = spans.len(),
            taken = taken.is_some(),
            "values are taken ahead"
        );
        self.on_baton(DROP).await?;
        match taken.as_deref() {
            Some([1]) => Ok(true),
            _ => Err(ReplayError::State("the server refused it".into())),
        }
    }
}

impl Session {
    /// Takes ahead what the transaction draws, where that is worth it: it is not in its turn any more
    /// then.
    ///
    /// # Errors
    /// The connection's, also when the barrier falls meanwhile; as [`Keeper::take_ahead`] says.
    pub(super) async fn take_ahead(
        &mut self,
        server: &mut Server,
        turn: &mut Turn,
        next: &Tracker,
        barrier: &mut watch::Receiver<bool>,
    ) -> Result<Option<TakenAhead>, ReplayError> {
        let Some(keeper) = turn.keeper() else {
            return Ok(None);
        };
        let taken = tokio::select! {
            biased;
            _ = barrier.wait_for(|up| !up) => {
                Err(ReplayError::Connection(std::io::ErrorKind::TimedOut.into()))
            }
            taken = keeper.take_ahead(&mut server.link, &self.tracker, next) => taken,
        };
        self.late |= taken.is_err() && !*barrier.borrow();
        if matches!(taken, Ok(Some(_))) {
            // Nothing is set back any more.
            keeper.end();
        }
        taken
    }

    /// Who needs no turn any more says so, and lets the others have theirs first: what is left may
    /// draw unseen.
    pub(super) async fn wait_for_turns(&mut self) {
        let mut gate = self.shared.gate.watch();
        if self.gate.phase == Phase::Turn {
            self.member.acknowledge(self.gate.step);
            let _ = gate.wait_for(|now| now.phase != Phase::Turn).await;
        }
    }
}

/// What takes the function away, and the right to find it.
const DROP: &str = "DROP FUNCTION pg_temp.helios_take_ahead(); \
    DO $$ BEGIN EXECUTE pg_catalog.format('REVOKE USAGE ON SCHEMA %s FROM PUBLIC', \
    pg_catalog.pg_my_temp_schema()::pg_catalog.regnamespace); END $$";

/// Makes the function that takes these values into the cache of the backend with this process id, and
/// tells its OID. `None`: a sequence begins where numbers end.
///
/// The sequences must still be set back: once the server has set them forward, as it does when it has
/// waited too long, nobody would do so again. It does not while the function runs ([`TAKING`]).
fn function(pid: i32, spans: &[Wanted]) -> Option<String> {
    let mut body = String::new();
    for Span {
        sequence,
        first,
        last,
    } in spans
    {
        let Sequence {
            oid,
            increment,
            name,
        } = sequence;
        let before = first.checked_sub(*increment)?;
        let far = i128::from(*last) - i128::from(before);
        let values = far / i128::from(*increment) + 1;
        // The value in front of the first is what the backend stands at; it may be out of bounds.
        let _ = writeln!(
            body,
            "UPDATE pg_sequence SET seqcache = {values}, seqmin = least(seqmin, {before}), \
             seqmax = greatest(seqmax, {before}) \
             WHERE seqrelid = {oid} AND seqincrement = {increment} AND seqcache = 1 AND NOT seqcycle;\n\
             IF NOT FOUND THEN RETURN false; END IF;\n\
             PERFORM setval({oid}::oid::regclass, {before}, false) FROM {name} \
             WHERE last_value = {first} AND NOT is_called;\n\
             IF NOT FOUND THEN RETURN false; END IF;\n\
             IF nextval({oid}::oid::regclass) <> {before} THEN RETURN false; END IF;"
        );
    }
    Some(format!(
        "CREATE OR REPLACE FUNCTION pg_temp.helios_take_ahead() RETURNS boolean LANGUAGE plpgsql \
         SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $helios$ BEGIN \
         IF pg_backend_pid() <> {pid} THEN RAISE EXCEPTION 'not for this session'; END IF;\n\
         PERFORM pg_advisory_xact_lock({CLASS}, {TAKING});\n\
         {body}RETURN true; END $helios$; \
         DO $$ BEGIN EXECUTE pg_catalog.format('GRANT USAGE ON SCHEMA %s TO PUBLIC', \
         pg_catalog.pg_my_temp_schema()::pg_catalog.regnamespace); END $$; \
         SELECT 'pg_temp.helios_take_ahead()'::pg_catalog.regprocedure::pg_catalog.oid"
    ))
}

/// Asks for a number of a sequence; `None`: there is none.
async fn number(
    link: &mut Link,
    function: u32,
    sequence: &Sequence,
) -> Result<Option<i64>, ReplayError> {
    let oid = sequence.oid.to_string();
    let value = call(link, function, &[Some(oid.as_bytes())]).await?;
    Ok(value.and_then(|value| value.try_into().ok().map(i64::from_be_bytes)))
}

/// Takes the values that are passed over; the last of them.
async fn pass_over(
    link: &mut Link,
    sequence: &Sequence,
    stop: &Stop,
) -> Result<Option<i64>, ReplayError> {
    let oid = sequence.oid.to_string();
    let (mut left, mut last) = (stop.pass_over, None);
    while left > 0 {
        let now = left.min(TOGETHER);
        for _ in 0..now {
            let (text, binary) = (front::Format::Text, front::Format::Binary);
            let arguments = [Some(oid.as_bytes())];
            front::function_call(&mut link.output, NEXTVAL, text, &arguments, binary)
                .map_err(|e| ReplayError::State(e.to_string()))?;
        }
        link.flush().await?;
        let mut ready = 0;
        while ready < now {
            let (tag, frame) = next_frame(link).await?;
            let body = frame.get(5..).unwrap_or_default();
            match tag {
                backend::READY_FOR_QUERY => ready += 1,
                backend::FUNCTION_CALL_RESPONSE => {
                    let value = read::function_call_response(body).ok().flatten();
                    last = value.and_then(|v| v.try_into().ok().map(i64::from_be_bytes));
                }
                _ => {}
            }
        }
        left -= now;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_function_takes_what_stands_in_front_of_the_first_value_too() {
        let span = |increment, first, last| Span {
            sequence: Sequence {
                oid: 7,
                increment,
                name: "s".into(),
            },
            first,
            last,
        };
        let up = function(42, &[span(1, 1, 5)]).unwrap();
        assert!(up.contains("pg_backend_pid() <> 42 "));
        assert!(up.contains("seqcache = 6, seqmin = least(seqmin, 0)"));
        // Only where it is still set back, and stays so meanwhile.
        assert!(up.contains("FROM s WHERE last_value = 1 AND NOT is_called"));
        assert!(up.find("pg_advisory_xact_lock") < up.find("setval"));
        let down = function(42, &[span(-7, -5, -12)]).unwrap();
        assert!(down.contains("seqcache = 3, ") && down.contains("greatest(seqmax, 2)"));
        assert_eq!(function(42, &[span(1, i64::MIN, 0)]), None);
    }
}
