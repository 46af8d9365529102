//! What makes the temporary objects of a session again: how it is read, held and run.
//!
//! Touches one backend at a time, and memory or a file without a name for rows. The invariant: what
//! is larger than its room, or refused by a server, is not kept, and the connection stays usable.

use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use bytes::BytesMut;
use helios_journal::{Account, SpillFile};
use helios_session::journal::Spill as _;
use helios_session::temporary::{
    AFTER_RESTORE, BEFORE_RESTORE, FINGERPRINT_QUERY, FLUSH_QUERY, OBJECTS_QUERY, Objects,
    SETTINGS, Step,
};
use helios_wire::backend;
use helios_wire::message::front;
use tokio::sync::Semaphore;

use super::link::{HIGH_WATER, Link};
use super::own;
use super::registry::lock;
use super::replay::{ReplayError, describe_error, is_fatal, next_frame, text_row};
use super::shared::Shared;

/// A backend that says nothing for so long is given up. One that goes on sending rows is not, however
/// many they are: its tables would be lost with it.
const SILENCE: Duration = Duration::from_secs(60);

/// Rows up to this size are kept in memory.
const SMALL: usize = 256 * 1024;

/// What makes the objects of a session again.
#[derive(Debug)]
pub(super) struct Kept {
    steps: Vec<Made>,
    rows: Rows,
    /// What there is, for the next reading of its rows.
    objects: Vec<Step>,
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
}

impl State {
    /// From the rows of [`FINGERPRINT_QUERY`]; the state, and the bytes of the tables.
    fn from_rows(rows: Vec<Vec<Option<String>>>) -> (Self, usize) {
        let last = rows.into_iter().last().unwrap_or_default();
        let mut columns = last.into_iter().map(Option::unwrap_or_default);
        let mut next = || columns.next().unwrap_or_default();
        let (objects, rows, bytes) = (next(), next(), next());
        (Self { objects, rows }, bytes.parse().unwrap_or(usize::MAX))
    }

    /// Whether it tells of changes of rows, which are not counted where that is switched off.
    fn counts(&self) -> bool {
        self.rows.ends_with(" on")
    }
}

/// A step of it.
#[derive(Debug)]
enum Made {
    Run(String),
    /// Rows of a table: the statement that takes them, the copy messages, and their number.
    Rows(String, Range<usize>, Vec<u8>),
}

/// Copy messages, as they came.
#[derive(Debug)]
struct Rows {
    memory: Vec<u8>,
    disk: Option<SpillFile>,
    accounts: [Account; 2],
}

/// Why the objects could not be read.
pub(super) enum Failure {
    /// The backend is gone, with these last words.
    Gone(Option<BytesMut>),
    /// It goes on, and they are not kept.
    Not(String),
}

impl From<std::io::Error> for Failure {
    fn from(_: std::io::Error) -> Self {
        Self::Gone(None)
    }
}

impl From<ReplayError> for Failure {
    fn from(_: ReplayError) -> Self {
        Self::Gone(None)
    }
}

impl Rows {
    fn new(shared: &Shared) -> Self {
        let disk = shared.options.spill.as_ref().map_or(0, |s| s.max_bytes);
        Self {
            memory: Vec::new(),
            disk: None,
            accounts: [
                shared.pool.account(shared.options.max_journal_bytes),
                shared.disk.account(disk),
            ],
        }
    }

    fn bytes(&self) -> &[u8] {
        self.disk.as_ref().map_or(&self.memory, |disk| disk.bytes())
    }

    fn append(&mut self, frame: &[u8], shared: &Shared) -> Result<(), String> {
        let size = self.bytes().len() + frame.len();
        let full = |_| format!("no room for {size} bytes of rows");
        if self.disk.is_none()
            && size > SMALL
            && let Some(spill) = &shared.options.spill
        {
            let file = SpillFile::create(&spill.folder, spill.max_bytes);
            let folder = spill.folder.display();
            let mut file = file.map_err(|e| format!("no file for them in \"{folder}\": {e}"))?;
            file.append(&self.memory)?;
            self.memory = Vec::new();
            self.disk = Some(file);
            // Less than before always fits.
            let _ = self.accounts[0].set(0);
        }
        match &mut self.disk {
            None => {
                self.accounts[0].set(size).map_err(full)?;
                self.memory.extend_from_slice(frame);
                Ok(())
            }
            Some(disk) => {
                self.accounts[1].set(size).map_err(full)?;
                disk.append(frame)
            }
        }
    }
}

/// The session's own backend, between two exchanges of its client.
pub(super) struct Asking<'a> {
    pub link: &'a mut Link,
    /// What is not ours goes to the client.
    pub client: &'a mut BytesMut,
}

impl Asking<'_> {
    /// Runs a query of ours behind the settings that all have; `on_row` gets rows and copy messages.
    /// The rest of an answer is read when `on_row` refuses one, too: the connection stays usable.
    ///
    /// Not as a simple query, which would end the client's unnamed statement.
    async fn run(
        &mut self,
        sql: &str,
        mut on_row: impl FnMut(u8, &[u8]) -> Result<(), String>,
    ) -> Result<(), Failure> {
        let statements = [SETTINGS.to_owned(), sql.to_owned()];
        own::statements(&mut self.link.output, &statements);
        self.link.flush().await?;
        let mut refused = Ok(());
        loop {
            let next = tokio::time::timeout(SILENCE, next_frame(self.link)).await;
            let (tag, frame) = next.map_err(|_| Failure::Gone(None))??;
            if is_fatal(tag, &frame) {
                return Err(Failure::Gone(Some(frame)));
            }
            match tag {
                backend::READY_FOR_QUERY => return refused.map_err(Failure::Not),
                backend::DATA_ROW | backend::COPY_DATA | backend::COMMAND_COMPLETE => {
                    refused = refused.and_then(|()| on_row(tag, &frame));
                }
                backend::ERROR_RESPONSE => {
                    refused = Err(describe_error(frame.get(5..).unwrap_or_default()));
                }
                backend::NOTIFICATION_RESPONSE | backend::PARAMETER_STATUS => {
                    self.client.extend_from_slice(&frame);
                }
                _ => {}
            }
        }
    }

    async fn rows(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Failure> {
        let mut rows = Vec::new();
        let row = |tag, frame: &[u8]| {
            if tag == backend::DATA_ROW {
                rows.push(text_row(frame.get(5..).unwrap_or_default()));
            }
            Ok(())
        };
        self.run(sql, row).await?;
        Ok(rows)
    }

    /// What tells whether anything was written, and how large the tables are.
    async fn state(&mut self) -> Result<(State, usize), Failure> {
        self.rows(FLUSH_QUERY).await?;
        Ok(State::from_rows(self.rows(FINGERPRINT_QUERY).await?))
    }
}

/// Reads everything, unless nothing has changed since `last`.
///
/// # Errors
/// Why not.
pub(super) async fn keep(
    asking: &mut Asking<'_>,
    shared: &Shared,
    last: Option<Kept>,
    objects: impl Fn(&[Vec<Option<String>>]) -> Objects,
) -> Result<Kept, Failure> {
    let (state, bytes) = asking.state().await?;
    let last = match last {
        Some(last) if state.counts() && *lock(&last.state) == state => return Ok(last),
        last => last,
    };
    let room = shared.options.spill.as_ref().map_or(SMALL, |s| s.max_bytes);
    if bytes > room {
        let why = format!("{bytes} bytes, of which {room} can be kept");
        return Err(Failure::Not(why));
    }
    let same = |last: &Kept| lock(&last.state).objects == state.objects;
    let steps = match last.filter(same) {
        Some(last) => last.objects,
        None => {
            let objects = objects(&asking.rows(OBJECTS_QUERY).await?);
            if let Some(why) = objects.unmovable.into_iter().next() {
                return Err(Failure::Not(why));
            }
            objects.steps
        }
    };
    let mut kept = Kept {
        steps: Vec::new(),
        rows: Rows::new(shared),
        objects: steps.clone(),
        state: Mutex::new(state),
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
                let piece = |tag, frame: &[u8]| match tag {
                    backend::COPY_DATA => kept.rows.append(frame, shared),
                    backend::COMMAND_COMPLETE => {
                        count = frame.to_vec();
                        Ok(())
                    }
                    _ => Ok(()),
                };
                asking.run(&sql, piece).await?;
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

/// Makes what was kept again, on a fresh backend, in one transaction and one flight: a thousand
/// sessions may want to behind a promotion, which are served in turn.
///
/// # Errors
/// The connection's, or [`ReplayError::State`] when the server refuses something or takes another
/// number of rows than there were.
pub(super) async fn restore(
    link: &mut Link,
    kept: &Kept,
    makers: &Semaphore,
) -> Result<(), ReplayError> {
    let _turn = makers.acquire().await;
    let mut cycles = Vec::new();
    let mut batch = BEFORE_RESTORE.to_owned();
    for step in &kept.steps {
        match step {
            Made::Run(sql) => {
                batch.push(';');
                batch.push_str(sql.trim_end().trim_end_matches(';'));
            }
            Made::Rows(sql, range, count) => {
                ask(link, &mut cycles, &std::mem::take(&mut batch), None)?;
                ask(link, &mut cycles, sql, Some(count))?;
                let bytes = kept.rows.bytes().get(range.clone()).unwrap_or_default();
                for piece in bytes.chunks(HIGH_WATER) {
                    link.output.extend_from_slice(piece);
                    link.flush().await?;
                }
                front::copy_done(&mut link.output);
            }
        }
    }
    batch.push(';');
    batch.push_str(AFTER_RESTORE);
    ask(link, &mut cycles, &batch, None)?;
    // Who changes nothing need not be read again.
    ask(link, &mut cycles, FLUSH_QUERY, None)?;
    let state = format!("{SETTINGS}; {FINGERPRINT_QUERY}");
    ask(link, &mut cycles, &state, None)?;
    link.flush().await?;
    *lock(&kept.state) = State::from_rows(answers(link, &cycles).await?).0;
    Ok(())
}

/// Appends a query whose answer is one of `cycles`: with this CommandComplete, where one is given.
fn ask<'a>(
    link: &mut Link,
    cycles: &mut Vec<Option<&'a [u8]>>,
    sql: &str,
    complete: Option<&'a [u8]>,
) -> Result<(), ReplayError> {
    if sql.is_empty() {
        return Ok(());
    }
    let too_long = |e: helios_wire::message::BuildError| ReplayError::State(e.to_string());
    front::query(&mut link.output, sql.as_bytes()).map_err(too_long)?;
    cycles.push(complete);
    Ok(())
}

/// Reads the answers to all of `cycles`; the rows of the last.
async fn answers(
    link: &mut Link,
    cycles: &[Option<&[u8]>],
) -> Result<Vec<Vec<Option<String>>>, ReplayError> {
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
                backend::COMMAND_COMPLETE if complete.is_some_and(|c| *c != *frame) => {
                    error.get_or_insert_with(|| "another number of rows than before".to_owned());
                }
                _ => {}
            }
        }
    }
    match error {
        Some(e) => Err(ReplayError::State(format!("temporary table: {e}"))),
        None => Ok(rows),
    }
}
