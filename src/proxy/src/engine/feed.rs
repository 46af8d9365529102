//! Sending what a journal holds, of any size, in bounded memory.
//!
//! The invariant: not more than [`HIGH_WATER`] and one message waits to be sent.

use std::future::poll_fn;
use std::task::Poll;

use helios_session::journal::Record;
use helios_session::tracker::Tracker;
use helios_wire::peek_header;

use super::link::{HIGH_WATER, Link};
use super::own;
use super::replay::{ReplayError, ended, strayed, take_replies};
use super::room::keep_small;
use super::shared::EngineOptions;

/// Writes what can be written, and waits until more can be sent: copy data is not answered.
async fn make_room(
    link: &mut Link,
    new: &mut Tracker,
    records: &[Record],
) -> Result<(), ReplayError> {
    poll_fn(|cx| {
        if let Poll::Ready(Err(e)) = link.poll_write(cx) {
            return Poll::Ready(Err(e));
        }
        match link.poll_read(cx) {
            Poll::Pending if link.output.len() < HIGH_WATER => Poll::Ready(Ok(())),
            other => other,
        }
    })
    .await?;
    if link.ended {
        return Err(ended());
    }
    take_replies(link, new)?;
    strayed(records, new).map_or(Ok(()), Err)
}

/// Sends a record, piece by piece: it may be a copy of any size.
pub(super) async fn feed_all(
    link: &mut Link,
    new: &mut Tracker,
    records: &[Record],
    mut bytes: &[u8],
    at_micros: u64,
    options: &EngineOptions,
) -> Result<(), ReplayError> {
    while !bytes.is_empty() {
        keep_small(options, new.journal_mut());
        while link.output.len() >= HIGH_WATER {
            make_room(link, new, records).await?;
        }
        bytes = feed(link, new, bytes, at_micros)?;
    }
    Ok(())
}

/// Takes recorded messages, with the questions of our own that go with them, as long as not too
/// much waits to be sent; returns the rest.
///
/// # Errors
/// A recorded message that the tracker would not have let through.
fn feed<'a>(
    link: &mut Link,
    tracker: &mut Tracker,
    mut bytes: &'a [u8],
    at_micros: u64,
) -> Result<&'a [u8], ReplayError> {
    while link.output.len() < HIGH_WATER {
        let Some(header) = peek_header(bytes)? else {
            // Not even a header: nothing of it can be sent.
            return Ok(&[]);
        };
        let (frame, rest) = bytes.split_at_checked(header.len).unwrap_or((bytes, &[]));
        let step = tracker.client_frame(header.tag, frame, at_micros)?;
        link.output.extend_from_slice(frame);
        if let Some(ask) = step.ask_after {
            own::ask(&mut link.output, ask);
        }
        bytes = rest;
    }
    Ok(bytes)
}
