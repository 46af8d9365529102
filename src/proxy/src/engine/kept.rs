//! What makes again what only a session's backend has: temporary objects, cursors WITH HOLD, the last
//! values of sequences. How it is read, held and run.
//!
//! Touches one backend at a time. The invariant: what is larger than its room, or refused by a
//! server, is not kept, and the connection stays usable.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Mutex;

use helios_session::last_values::{self, LastValue};
use helios_session::temporary::{
    AFTER_RESTORE, BEFORE_RESTORE, FLUSH_QUERY, OTHERS_QUERY, Objects, SETTINGS, Step,
    fingerprint_query,
};
use helios_wire::backend;
use helios_wire::message::front;
use tokio::sync::Semaphore;

use super::asking::{Answer, Asking, Failure, Rows, SMALL};
use super::cursors::{self, Standing};
use super::groups::Groups;
use super::link::{HIGH_WATER, Link};
use super::making::{look_at_objects, restore_some};
use super::registry::lock;
use super::replay::{ReplayError, describe_error, next_frame, text_row};
use super::shared::Shared;

/// What there is to be kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Has {
    /// Something in `pg_temp`.
    pub objects: bool,
    /// Cursors WITH HOLD.
    pub cursors: bool,
    /// Somebody has asked for `currval` or `lastval`.
    pub last_values: bool,
}

/// What makes the session's own again.
#[derive(Debug)]
pub(super) struct Kept {
    steps: Vec<Made>,
    rows: Rows,
    /// What there is, for the next reading of its rows.
    objects: Vec<Step>,
    cursors: Vec<Standing>,
    last_values: Vec<LastValue>,
    /// The backend that it was read from does not have it any more.
    used_up: bool,
    /// What of it belongs together.
    groups: Groups,
    /// As of when it was read, or made again last.
    state: Mutex<State>,
}

/// What tells whether something has changed since.
#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// The same as long as no object has.
    objects: String,
    /// The same as long as no row and no sequence has.
    rows: String,
    /// The same as long as nothing has that is no relation, where there is such.
    others: Option<String>,
    /// What tells the cursors apart, in their order.
    cursors: String,
}

impl State {
    /// From the rows of [`fingerprint_query`], and the one of [`OTHERS_QUERY`] where that was asked;
    /// the state, and the bytes of the tables.
    fn from_rows(rows: Vec<Vec<Option<String>>>) -> (Self, usize) {
        let mut state = Self::default();
        let mut bytes = usize::MAX;
        for row in rows {
            let mut columns = row.into_iter().map(Option::unwrap_or_default);
            let mut next = || columns.next();
            match (next(), next(), next(), next(), next()) {
                (Some(objects), Some(rows), Some(size), Some(cursors), None) => {
                    (state.objects, state.rows, state.cursors) = (objects, rows, cursors);
                    bytes = size.parse().unwrap_or(usize::MAX);
                }
                (Some(others), None, ..) => state.others = Some(others),
                _ => {}
            }
        }
        (state, bytes)
    }

    fn same_objects(&self, other: &Self) -> bool {
        self.objects == other.objects && self.others == other.others
    }

    /// Whether it tells of changes of rows, which are not counted where that is switched off.
    fn counts(&self) -> bool {
        self.rows.ends_with(" on")
    }
}

/// A step of it.
#[derive(Debug)]
pub(super) enum Made {
    /// A statement.
    Run(String),
    /// Rows of a table: the statement that takes them, the copy messages, and their number.
    Rows(String, Range<usize>, Vec<u8>),
}

impl Kept {
    /// What makes it again, in order.
    pub(super) fn steps(&self) -> &[Made] {
        &self.steps
    }

    /// Rows of a table.
    pub(super) fn bytes(&self, range: &Range<usize>) -> &[u8] {
        self.rows.bytes().get(range.clone()).unwrap_or_default()
    }

    /// Which of the steps belong together.
    pub(super) fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Whether the session can go on without some of it for now.
    pub(super) fn may_wait(&self) -> bool {
        self.cursors.is_empty() && self.last_values.is_empty()
    }

    /// Bytes of rows.
    pub(super) fn size(&self) -> usize {
        self.rows.bytes().len()
    }

    /// Nothing is known of the rows that have changed since it was made again.
    pub(super) fn forget_rows(&self) {
        lock(&self.state).rows.clear();
    }

    /// Nothing is known of what has changed since it was made again.
    pub(super) fn forget_state(&self) {
        let mut state = lock(&self.state);
        // That there are any is known for good.
        let others = state.others.as_ref().map(|_| String::new());
        *state = State {
            others,
            ..State::default()
        };
    }
}

/// Takes note of what tells whether anything has changed since now.
///
/// # Errors
/// The connection's.
pub(super) async fn note_state(asking: &mut Asking<'_>, kept: &Kept) -> Result<(), Failure> {
    let (state, _) = state(asking, Some(kept)).await?;
    *lock(&kept.state) = state;
    Ok(())
}

/// What tells whether anything was written, and how large the tables are.
async fn state(asking: &mut Asking<'_>, last: Option<&Kept>) -> Result<(State, usize), Failure> {
    asking.rows(FLUSH_QUERY).await?;
    let fingerprint = fingerprint_query();
    let others = last.is_some_and(|l| lock(&l.state).others.is_some());
    let rows = match others {
        true => asking.all_rows(&[&fingerprint, OTHERS_QUERY]).await?,
        false => asking.rows(&fingerprint).await?,
    };
    Ok(State::from_rows(rows))
}

/// Reads everything, but for what has not changed since `last`; for `good` also what is used up by
/// that ([`Kept::used_up`]).
///
/// # Errors
/// Why not.
pub(super) async fn keep(
    asking: &mut Asking<'_>,
    shared: &Shared,
    has: Has,
    (last, good): (Option<Kept>, bool),
    objects: impl Fn(&[Vec<Option<String>>]) -> Objects,
) -> Result<Kept, Failure> {
    let last_values = match has.last_values {
        true => keep_last_values(asking).await?,
        false => Vec::new(),
    };
    if !has.objects && !has.cursors {
        return Ok(Kept {
            last_values,
            ..Kept::nothing(shared)
        });
    }
    let (state, bytes) = state(asking, last.as_ref()).await?;
    let known = last.as_ref().map_or_else(Vec::new, Kept::known_cursors);
    let mut kept = match last {
        Some(last) if last.is_still(&state) => {
            *lock(&last.state) = state;
            last
        }
        last if has.objects => keep_objects(asking, shared, last, (state, bytes), objects).await?,
        _ => Kept {
            state: Mutex::new(state),
            ..Kept::nothing(shared)
        },
    };
    // Last: it may use them up.
    (kept.cursors, kept.used_up) = match has.cursors {
        true => cursors::keep(asking, shared, &known, good).await?,
        false => (Vec::new(), false),
    };
    kept.last_values = last_values;
    Ok(kept)
}

/// The last values of sequences. Where they cannot be asked for they stay undefined on the next
/// backend.
async fn keep_last_values(asking: &mut Asking<'_>) -> Result<Vec<LastValue>, Failure> {
    let [ask, tell] = last_values::questions();
    match asking.rows_of(&[&ask, &tell]).await {
        Ok(rows) => Ok(rows
            .iter()
            .filter_map(|r| last_values::from_row(r))
            .collect()),
        Err(Failure::Not(why) | Failure::Later(why)) => {
            tracing::debug!(why, "last values of sequences cannot be kept");
            Ok(Vec::new())
        }
        Err(gone @ Failure::Gone(_)) => Err(gone),
    }
}

impl Kept {
    fn nothing(shared: &Shared) -> Self {
        Self {
            steps: Vec::new(),
            rows: Rows::new(shared),
            objects: Vec::new(),
            groups: Groups::default(),
            cursors: Vec::new(),
            last_values: Vec::new(),
            used_up: false,
            state: Mutex::default(),
        }
    }

    /// Whether the backend that it was read from is to be left: reading has used it up.
    pub(super) fn used_up(&self) -> bool {
        self.used_up
    }

    fn is_still(&self, state: &State) -> bool {
        let before = lock(&self.state);
        state.counts() && before.same_objects(state) && before.rows == state.rows
    }

    /// The cursors, by what tells them apart on the backend that it was made again on last.
    fn known_cursors(&self) -> Vec<(String, Standing)> {
        let state = lock(&self.state);
        let identities = state.cursors.split(' ').map(str::to_owned);
        identities.zip(self.cursors.iter().cloned()).collect()
    }
}

/// Reads the temporary objects.
async fn keep_objects(
    asking: &mut Asking<'_>,
    shared: &Shared,
    last: Option<Kept>,
    (mut state, bytes): (State, usize),
    objects: impl Fn(&[Vec<Option<String>>]) -> Objects,
) -> Result<Kept, Failure> {
    let room = shared.options.spill.as_ref().map_or(SMALL, |s| s.max_bytes);
    if bytes > room {
        let why = format!("{bytes} bytes, of which {room} can be kept");
        return Err(Failure::Not(why));
    }
    let (steps, groups) = match last.filter(|last| lock(&last.state).same_objects(&state)) {
        Some(last) => (last.objects, last.groups),
        None => {
            let (others, steps, groups) = look_at_objects(asking, objects).await?;
            state.others = others;
            (steps, groups)
        }
    };
    let mut kept = Kept {
        objects: steps.clone(),
        groups,
        state: Mutex::new(state),
        ..Kept::nothing(shared)
    };
    for step in steps {
        let made = match step {
            Step::Run(sql) => Made::Run(sql),
            Step::Set { sequence } => {
                let rows = asking.rows(&Step::position(&sequence)).await?;
                let row = rows.into_iter().last().unwrap_or_default();
                let [Some(last), Some(called)] = row.as_slice() else {
                    let why = format!("sequence {sequence} has no position");
                    return Err(Failure::Not(why));
                };
                Made::Run(Step::set_position(&sequence, last, called))
            }
            Step::Fill { table, columns } => {
                let from = kept.rows.bytes().len();
                let mut count = Vec::new();
                let sql = Step::copy_out(&table, &columns);
                let piece = |_, answer: Answer<'_>| match answer {
                    Answer::Copy(frame) => kept.rows.append(frame, shared),
                    Answer::Complete(frame) => {
                        count = frame.to_vec();
                        Ok(())
                    }
                    Answer::Row(_) | Answer::Columns(_) => Ok(()),
                };
                asking.run(&[&sql], piece).await?;
                let range = from..kept.rows.bytes().len();
                Made::Rows(Step::copy_in(&table, &columns), range, count)
            }
        };
        kept.steps.push(made);
    }
    Ok(kept)
}

/// Sessions whose objects are made again side by side. Each is told of what all others change in the
/// catalogs, so more of them together would take longer than one after the other.
pub(super) const MAKERS: usize = 16;

/// Makes what was kept again, on a fresh backend, but for the groups that can wait, in one
/// transaction and one flight: a thousand sessions may want to behind a promotion, which are served
/// in turn.
///
/// # Errors
/// The connection's, or [`ReplayError::State`] when the server refuses something or takes another
/// number of rows than there were.
pub(super) async fn restore(
    link: &mut Link,
    (kept, later): (&Kept, &BTreeSet<usize>),
    makers: &Semaphore,
) -> Result<(), ReplayError> {
    if !later.is_empty() {
        return restore_some(link, (kept, later), makers).await;
    }
    let values = last_values::restore(&kept.last_values);
    let makes = !kept.steps.is_empty() || !kept.cursors.is_empty();
    if !makes && values.is_none() {
        return Ok(());
    }
    let _turn = makers.acquire().await;
    let mut flight = Flight {
        link,
        cycles: Vec::new(),
        batch: String::new(),
    };
    if makes {
        flight.make(kept).await?;
    }
    if let Some(sql) = values {
        flight.run(&sql);
        flight.query()?;
    }
    if makes {
        // Who changes nothing need not be read again.
        flight.run(FLUSH_QUERY);
        flight.query()?;
        flight.run(SETTINGS);
        flight.run(&fingerprint_query());
        if lock(&kept.state).others.is_some() {
            flight.run(OTHERS_QUERY);
        }
        flight.query()?;
    }
    let rows = flight.answers().await?;
    if makes {
        *lock(&kept.state) = State::from_rows(rows).0;
    }
    Ok(())
}

/// Queries that are on their way, and what they are to be answered.
struct Flight<'a> {
    link: &'a mut Link,
    /// One for each query: its CommandComplete, where only one will do.
    cycles: Vec<Option<Vec<u8>>>,
    /// The query that is being put together.
    batch: String,
}

impl Flight<'_> {
    async fn make(&mut self, kept: &Kept) -> Result<(), ReplayError> {
        self.run(BEFORE_RESTORE);
        // Whatever was restored ahead of it.
        self.run("SET LOCAL ROLE NONE");
        for step in &kept.steps {
            match step {
                Made::Run(sql) => self.run(sql),
                Made::Rows(sql, range, count) => {
                    let bytes = kept.rows.bytes().get(range.clone());
                    self.copy(sql, bytes.unwrap_or_default(), count.clone())
                        .await?;
                }
            }
        }
        let mut go = Vec::new();
        for (number, cursor) in kept.cursors.iter().enumerate() {
            let opening = cursor.opening(number);
            self.run(&opening.table);
            self.copy(&opening.copy, opening.rows, opening.complete)
                .await?;
            self.run(&opening.declare);
            go.extend(opening.go);
        }
        self.run(AFTER_RESTORE);
        go.iter().for_each(|sql| self.run(sql));
        self.query()
    }

    /// Adds a statement to the query.
    fn run(&mut self, sql: &str) {
        if !self.batch.is_empty() {
            self.batch.push(';');
        }
        self.batch.push_str(sql.trim_end().trim_end_matches(';'));
    }

    /// Sends the query.
    fn query(&mut self) -> Result<(), ReplayError> {
        let sql = std::mem::take(&mut self.batch);
        if !sql.is_empty() {
            self.send(&sql, None)?;
        }
        Ok(())
    }

    fn send(&mut self, sql: &str, complete: Option<Vec<u8>>) -> Result<(), ReplayError> {
        let too_long = |e: helios_wire::message::BuildError| ReplayError::State(e.to_string());
        front::query(&mut self.link.output, sql.as_bytes()).map_err(too_long)?;
        self.cycles.push(complete);
        Ok(())
    }

    /// Sends copy messages to the statement that takes them.
    async fn copy(&mut self, sql: &str, rows: &[u8], count: Vec<u8>) -> Result<(), ReplayError> {
        self.query()?;
        self.send(sql, Some(count))?;
        for piece in rows.chunks(HIGH_WATER) {
            self.link.output.extend_from_slice(piece);
            self.link.flush().await?;
        }
        front::copy_done(&mut self.link.output);
        Ok(())
    }

    /// Reads the answers to all queries; the rows of the last.
    async fn answers(self) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
        let Self { link, cycles, .. } = self;
        link.flush().await?;
        let (mut rows, mut error) = (Vec::new(), None);
        for complete in cycles {
            rows.clear();
            loop {
                let (tag, frame) = next_frame(link).await?;
                let body = frame.get(5..).unwrap_or_default();
                match tag {
                    backend::READY_FOR_QUERY => break,
                    // The first one: the others follow from it.
                    backend::ERROR_RESPONSE => {
                        error.get_or_insert_with(|| describe_error(body));
                    }
                    backend::DATA_ROW => rows.push(text_row(body)),
                    backend::COMMAND_COMPLETE
                        if complete.as_ref().is_some_and(|c| *c != *frame) =>
                    {
                        error
                            .get_or_insert_with(|| "another number of rows than before".to_owned());
                    }
                    _ => {}
                }
            }
        }
        match error {
            Some(e) => Err(ReplayError::State(format!("temporary object: {e}"))),
            None => Ok(rows),
        }
    }
}
