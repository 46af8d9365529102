//! Has a fresh backend's transaction block fail, as its client knows it.
//!
//! Works on a connection that no client sees yet. The invariant: nothing here can commit.

use helios_session::tracker::Tracker;

use super::feed::feed_all;
use super::link::Link;
use super::replay::{ReplayError, advance, simple};
use super::shared::EngineOptions;

/// Begins the transaction of `old` again, and has it fail.
///
/// # Errors
/// The connection's.
pub(super) async fn begin_and_fail(
    link: &mut Link,
    old: &Tracker,
    new: &mut Tracker,
    options: &EngineOptions,
) -> Result<(), ReplayError> {
    let records = old.journal().records();
    if let Some(begin) = records.first() {
        let bytes = old.journal().record_bytes(begin);
        feed_all(link, new, records, bytes, begin.at_micros, options).await?;
        while new.journal().records().is_empty() || !new.is_quiet() {
            advance(link, new, records).await?;
        }
    }
    fail_block(link).await?;
    new.fail();
    Ok(())
}

/// Puts a fresh backend into a failed transaction block: what an aborted transaction leaves.
///
/// # Errors
/// The connection's.
pub(super) async fn fail_transaction(link: &mut Link) -> Result<(), ReplayError> {
    simple(link, "BEGIN").await?;
    fail_block(link).await
}

/// Has an open transaction block fail.
async fn fail_block(link: &mut Link) -> Result<(), ReplayError> {
    match simple(link, "ROLLBACK TO SAVEPOINT helios_aborted").await {
        Err(ReplayError::State(_)) => Ok(()),
        Err(e) => Err(e),
        Ok(_) => Err(ReplayError::State(
            "the transaction block did not fail".into(),
        )),
    }
}
