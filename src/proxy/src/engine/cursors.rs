//! The rows of a session's cursors WITH HOLD: read from its backend, given to the next one.
//!
//! Touches one backend at a time. The invariant: a cursor that was read stands where it stood, or
//! its backend is left; and what is opened again has the rows that there were, in their order.

use std::sync::Arc;

use helios_session::cursors::{
    COPY_HEADER, COPY_TRAILER, Column, Cursor, QUERY, counted, types_query,
};
use helios_wire::message::read;
use helios_wire::{backend, frontend};

use super::asking::{Answer, Asking, Failure, Rows};
use super::shared::Shared;

/// How often a cursor is told to go where it stood before its backend is given up.
const TRIES: usize = 3;

/// A cursor with all its rows. They never change.
#[derive(Debug)]
struct Held {
    shape: Shape,
    /// Copy messages.
    rows: Rows,
    count: u64,
}

/// A cursor and what rows it gives.
#[derive(Debug)]
struct Shape {
    cursor: Cursor,
    columns: Vec<Column>,
    /// Those of the columns, as they are written in SQL.
    types: Vec<String>,
}

/// A cursor, and where it stands.
#[derive(Debug, Clone)]
pub(super) struct Standing {
    held: Arc<Held>,
    position: u64,
}

/// What is sent to open a cursor again, in this order.
pub(super) struct Opening<'a> {
    pub table: String,
    pub copy: String,
    pub rows: &'a [u8],
    /// The CommandComplete that answers the copy.
    pub complete: Vec<u8>,
    pub declare: String,
    /// Behind the end of the transaction.
    pub go: Option<String>,
}

impl Standing {
    /// What opens it again as the session's cursor of this number.
    pub(super) fn opening(&self, number: usize) -> Opening<'_> {
        let held = &self.held;
        let shape = &held.shape;
        let complete = format!("COPY {}", held.count);
        Opening {
            table: Cursor::table(number, &shape.types),
            copy: Cursor::copy_in(number),
            rows: held.rows.bytes(),
            complete: message(
                backend::COMMAND_COMPLETE,
                &[complete.as_bytes(), b"\0"].concat(),
            ),
            declare: shape.cursor.declare(number, &shape.columns),
            go: (self.position > 0).then(|| shape.cursor.go_to(self.position)),
        }
    }
}

/// Reads all cursors. `last` are those that were read before, by what tells them apart: their rows
/// are not read again. Those that reading uses up are read only for `good`: the backend is left then,
/// which the answer says.
///
/// # Errors
/// Why not.
pub(super) async fn keep(
    asking: &mut Asking<'_>,
    shared: &Shared,
    last: &[(String, Standing)],
    good: bool,
) -> Result<(Vec<Standing>, bool), Failure> {
    let mut cursors = Vec::new();
    for row in asking.rows(QUERY).await? {
        let Some(cursor) = Cursor::from_row(&row) else {
            return Err(Failure::Not("it cannot be told from others".into()));
        };
        if !cursor.may_have_table {
            return Err(Failure::Not(
                "its user may not make temporary tables".into(),
            ));
        }
        let known = last
            .iter()
            .find(|(identity, _)| *identity == cursor.identity);
        let known = known.map(|(_, standing)| Arc::clone(&standing.held));
        let held = match known.filter(|_| cursor.scrolls) {
            Some(held) => Ok(held),
            None => Err(shape(asking, cursor.clone()).await?),
        };
        cursors.push((cursor, held));
    }
    if let Some((cursor, _)) = cursors.iter().find(|(c, _)| !c.scrolls && !good) {
        let why = format!("\"{}\" can only scan forward", cursor.name);
        return Err(Failure::Later(why));
    }
    // Those first that may be refused without a loss.
    cursors.sort_by_key(|(cursor, _)| !cursor.scrolls);
    let (mut all, mut used_up) = (Vec::new(), false);
    for (cursor, held) in cursors {
        all.push(match cursor.scrolls {
            true => keep_one(asking, shared, &cursor, held).await?,
            false => {
                used_up = true;
                use_up(asking, shared, &cursor, held).await?
            }
        });
    }
    all.sort_by(|a, b| a.held.shape.cursor.name.cmp(&b.held.shape.cursor.name));
    Ok((all, used_up))
}

/// Reads a cursor that only goes forward. What fails then has cost it rows: the backend is of no use
/// any more.
async fn use_up(
    asking: &mut Asking<'_>,
    shared: &Shared,
    cursor: &Cursor,
    held: Result<Arc<Held>, Shape>,
) -> Result<Standing, Failure> {
    let gone = |failure| match failure {
        Failure::Gone(words) => Failure::Gone(words),
        Failure::Not(why) | Failure::Later(why) => {
            tracing::warn!(cursor = cursor.name, why, "a cursor could not be read");
            Failure::Gone(None)
        }
    };
    let held = match held {
        Ok(held) => held,
        Err(shape) => Arc::new(read(asking, shared, shape).await.map_err(gone)?),
    };
    Ok(Standing { held, position: 0 })
}

async fn keep_one(
    asking: &mut Asking<'_>,
    shared: &Shared,
    cursor: &Cursor,
    held: Result<Arc<Held>, Shape>,
) -> Result<Standing, Failure> {
    let mut counts = Vec::new();
    let [on_row, back] = cursor.rewind();
    let count = |_, answer: Answer<'_>| {
        if let Answer::Complete(frame) = answer {
            let tag = frame.get(5..frame.len().saturating_sub(1));
            counts.push(counted(tag.unwrap_or_default()).ok_or("a MOVE without a number")?);
        }
        Ok(())
    };
    let result = asking.run(&[&on_row, &back], count).await;
    let position = match (result, counts.as_slice()) {
        (Ok(()), [on_row, back]) => Cursor::position(*on_row, *back),
        // It cannot be moved, so it has not been.
        (Err(Failure::Not(why)), []) => return Err(Failure::Not(why)),
        (Err(gone @ Failure::Gone(_)), _) => return Err(gone),
        // Nobody knows where it stands.
        _ => return Err(Failure::Gone(None)),
    };
    let went = cursor.go_to(position);
    let held = match held {
        Ok(held) => Ok(held),
        Err(shape) => read(asking, shared, shape).await.map(Arc::new),
    };
    if let Err(Failure::Gone(words)) = held {
        return Err(Failure::Gone(words));
    }
    let mut tries = 0;
    while let Err(failure) = asking.run(&[&went], |_, _| Ok(())).await {
        tries += 1;
        match failure {
            gone @ Failure::Gone(_) => return Err(gone),
            _ if tries < TRIES => {}
            _ => return Err(Failure::Gone(None)),
        }
    }
    held.map(|held| Standing { held, position })
}

/// What rows a cursor gives, without reading one.
async fn shape(asking: &mut Asking<'_>, cursor: Cursor) -> Result<Shape, Failure> {
    let mut columns = Vec::new();
    let take = |_, answer: Answer<'_>| {
        if let Answer::Columns(frame) = answer {
            columns = described(frame)?;
        }
        Ok(())
    };
    asking.describe(&cursor.fetch(), take).await?;
    let types = match columns.is_empty() {
        true => Vec::new(),
        false => asking.rows(&types_query(&columns)).await?,
    };
    let types: Vec<String> = types.into_iter().flatten().flatten().collect();
    if types.len() != columns.len() {
        let why = format!(
            "columns of \"{}\" are of a kind that no table has",
            cursor.name
        );
        return Err(Failure::Not(why));
    }
    Ok(Shape {
        cursor,
        columns,
        types,
    })
}

/// Reads the rows that a cursor gives from where it stands.
async fn read(asking: &mut Asking<'_>, shared: &Shared, shape: Shape) -> Result<Held, Failure> {
    let mut rows = Rows::new(shared);
    let copy_data = |bytes: &[u8]| message(frontend::COPY_DATA, bytes);
    let not = Failure::Not;
    rows.append(&copy_data(COPY_HEADER), shared).map_err(not)?;
    let (mut count, mut last) = (0, u64::MAX);
    let fetch = shape.cursor.fetch();
    while last > 0 {
        last = 0;
        let take = |_, answer: Answer<'_>| {
            if let Answer::Row(frame) = answer {
                // A tuple of binary copy data has the form of a row.
                let mut tuple = frame.to_vec();
                if let Some(tag) = tuple.first_mut() {
                    *tag = frontend::COPY_DATA;
                }
                rows.append(&tuple, shared)?;
                last += 1;
            }
            Ok(())
        };
        asking.run_in_binary(&fetch, take).await?;
        count += last;
    }
    rows.append(&copy_data(COPY_TRAILER), shared).map_err(not)?;
    Ok(Held { shape, rows, count })
}

fn described(frame: &[u8]) -> Result<Vec<Column>, String> {
    let columns = read::row_description(frame.get(5..).unwrap_or_default());
    let column = |c: Result<read::Column<'_>, _>| {
        c.map(|c| Column {
            name: String::from_utf8_lossy(c.name).into_owned(),
            kind: c.type_oid,
            modifier: c.type_modifier,
        })
    };
    let all: Result<Vec<Column>, helios_wire::message::ParseError> = columns.map(column).collect();
    all.map_err(|e| e.to_string())
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let len = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(body);
    out
}
