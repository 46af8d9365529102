//! Making some groups of a session's temporary objects, on a fresh backend or on one that it uses.
//!
//! Touches one backend at a time. The invariant: all of the groups are there, or the backend is to be
//! left; the session's unnamed statement outlives it.

use std::collections::BTreeSet;

use helios_session::needs::{NAMES_QUERY, name_of};
use helios_session::temporary::{
    AFTER_RESTORE, BEFORE_RESTORE, Inventory, OTHERS_QUERY, Objects, Step,
};
use helios_wire::backend;
use helios_wire::message::front;
use tokio::sync::Semaphore;

use super::asking::{Asking, Failure};
use super::groups::{Groups, tokens};
use super::kept::{Kept, Made};
use super::link::{HIGH_WATER, Link};
use super::replay::{ReplayError, describe_error, ended, is_fatal, next_frame};

/// Words of the statements that make these groups.
pub(super) fn words_of(kept: &Kept, groups: &BTreeSet<usize>) -> BTreeSet<String> {
    let among = |at: usize| kept.groups().of(at).is_some_and(|g| groups.contains(&g));
    let steps = kept.steps().iter().enumerate().filter(|(at, _)| among(*at));
    let text = steps.map(|(_, step)| match step {
        Made::Run(sql) | Made::Rows(sql, ..) => sql,
    });
    text.flat_map(|sql| tokens(sql))
        .map(str::to_owned)
        .collect()
}

/// As [`super::kept::restore`], where some groups are made later.
///
/// # Errors
/// The same.
pub(super) async fn restore_some(
    link: &mut Link,
    (kept, later): (&Kept, &BTreeSet<usize>),
    makers: &Semaphore,
) -> Result<(), ReplayError> {
    let all = 0..kept.groups().len();
    let now: BTreeSet<usize> = all.filter(|group| !later.contains(group)).collect();
    kept.forget_state();
    if now.is_empty() {
        return Ok(());
    }
    let _turn = makers.acquire().await;
    // Nobody listens on a fresh backend.
    let client = &mut bytes::BytesMut::new();
    let made = make(&mut Asking { link, client }, kept, &now, None).await;
    made.map_err(|failure| match failure {
        Failure::Gone(_) => ended(),
        Failure::Not(why) | Failure::Later(why) => ReplayError::State(why),
    })
}

/// Makes groups of what was kept, in one transaction. `lived`: the session has run something on this
/// backend already; its unnamed statement is prepared again, which a simple query ends.
///
/// # Errors
/// The connection's, or what the server refuses.
pub(super) async fn make(
    asking: &mut Asking<'_>,
    kept: &Kept,
    groups: &BTreeSet<usize>,
    lived: Option<Option<&[u8]>>,
) -> Result<(), Failure> {
    let mut cycles = Vec::new();
    // As whoever has logged in, and read as they were written.
    let mut batch = format!(
        "{BEFORE_RESTORE}; SET LOCAL ROLE NONE; SET LOCAL array_nulls = on; \
         SET LOCAL transform_null_equals = off"
    );
    for (at, step) in kept.steps().iter().enumerate() {
        if kept.groups().of(at).is_some_and(|g| !groups.contains(&g)) {
            continue;
        }
        match step {
            Made::Run(sql) => {
                batch.push(';');
                batch.push_str(sql.trim_end().trim_end_matches(';'));
            }
            Made::Rows(sql, range, count) => {
                send(asking.link, &mut cycles, &std::mem::take(&mut batch), None)?;
                send(asking.link, &mut cycles, sql, Some(count))?;
                for piece in kept.bytes(range).chunks(HIGH_WATER) {
                    asking.link.output.extend_from_slice(piece);
                    asking.link.flush().await?;
                }
                front::copy_done(&mut asking.link.output);
            }
        }
    }
    batch.push(';');
    // Where the client may have used sequences, `currval` is his.
    batch.push_str(if lived.is_some() {
        "COMMIT"
    } else {
        AFTER_RESTORE
    });
    send(
        asking.link,
        &mut cycles,
        batch.trim_start_matches(';'),
        None,
    )?;
    if let Some(parse) = lived.flatten() {
        asking.link.output.extend_from_slice(parse);
        front::sync(&mut asking.link.output);
    }
    asking.link.flush().await?;
    answers(asking, &cycles).await?;
    match lived.flatten() {
        // Should it be refused now, its next Bind is.
        Some(_) => answers(asking, &[None])
            .await
            .or_else(|failure| match failure {
                Failure::Not(_) | Failure::Later(_) => Ok(()),
                gone => Err(gone),
            }),
        None => Ok(()),
    }
}

fn send<'a>(
    link: &mut Link,
    cycles: &mut Vec<Option<&'a [u8]>>,
    sql: &str,
    complete: Option<&'a [u8]>,
) -> Result<(), Failure> {
    if sql.is_empty() {
        return Ok(());
    }
    let sent = front::query(&mut link.output, sql.as_bytes());
    sent.map_err(|e| Failure::Not(e.to_string()))?;
    cycles.push(complete);
    Ok(())
}

/// Reads the answers to queries of ours; what is not theirs goes to the client.
async fn answers(asking: &mut Asking<'_>, cycles: &[Option<&[u8]>]) -> Result<(), Failure> {
    let mut error = None;
    for complete in cycles {
        loop {
            let (tag, frame) = next_frame(asking.link).await?;
            if is_fatal(tag, &frame) {
                return Err(Failure::Gone(Some(frame)));
            }
            match tag {
                backend::READY_FOR_QUERY => break,
                backend::ERROR_RESPONSE => {
                    error.get_or_insert_with(|| describe_error(frame.get(5..).unwrap_or_default()));
                }
                backend::COMMAND_COMPLETE if complete.is_some_and(|c| *c != *frame) => {
                    error.get_or_insert_with(|| "another number of rows than before".to_owned());
                }
                backend::NOTIFICATION_RESPONSE => asking.client.extend_from_slice(&frame),
                _ => {}
            }
        }
    }
    match error {
        Some(e) => Err(Failure::Not(format!("temporary table: {e}"))),
        None => Ok(()),
    }
}

/// What makes the objects again, which of them name each other, and the answer to [`OTHERS_QUERY`]
/// where there are such.
///
/// # Errors
/// The connection's, or why they cannot be made again.
pub(super) async fn look_at_objects(
    asking: &mut Asking<'_>,
    objects: impl Fn(&[Vec<Option<String>>]) -> Objects,
) -> Result<(Option<String>, Vec<Step>, Groups), Failure> {
    let mut inventory = Inventory::default();
    let rows = asking.rows(Inventory::query()).await?;
    rows.iter().for_each(|row| inventory.add_row(row));
    let others = match inventory.has_others() {
        true => asking.rows(OTHERS_QUERY).await?.into_iter().next(),
        false => None,
    };
    let others = others.map(|row| row.into_iter().next().flatten().unwrap_or_default());
    let queries = inventory.queries();
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    let objects = objects(&asking.all_rows(&queries).await?);
    if let Some(why) = objects.unmovable.into_iter().next() {
        return Err(Failure::Not(why));
    }
    let names = asking.rows(NAMES_QUERY).await?;
    let names = names.into_iter().filter_map(name_of).collect();
    let groups = Groups::of_steps(&objects.steps, &names);
    Ok((others, objects.steps, groups))
}
