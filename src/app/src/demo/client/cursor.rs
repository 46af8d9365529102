//! The long-running client: one transaction of tens of seconds, a cursor that is read in steps,
//! transfers in between.

use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::text::{Style, known_changes};
use super::{Worker, numbers};
use crate::demo::bank::ITEMS;
use crate::demo::plan::ClientKind;
use crate::demo::record::{Phase, Trouble};

/// How long the transaction stays open.
const OPEN_FOR: Duration = Duration::from_secs(20);
/// Rows a FETCH asks for.
const STEP: i64 = 5;

/// One long transaction. It ends early, with its COMMIT, when the run ends.
pub(super) async fn transaction(w: &mut Worker, db: &Client) -> Result<(), Trouble> {
    let style = Style::of(ClientKind::Cursor);
    let begun = Instant::now();
    let mut first = None;
    w.ask(Phase::Begin, db.simple_query("BEGIN")).await?;
    let declare = "DECLARE steps CURSOR FOR SELECT id FROM items ORDER BY id";
    w.ask(Phase::Read, db.simple_query(declare)).await?;
    let mut next = 1;
    while begun.elapsed() < OPEN_FOR && !w.stop.is_cancelled() && next + STEP <= ITEMS {
        step(w, db, &style, next, &mut first).await?;
        next += STEP;
        w.think(60..140).await;
    }
    w.ask(Phase::Read, db.simple_query("CLOSE steps")).await?;
    if let Some(first) = first {
        w.notes.attempt(first);
    }
    w.ask(Phase::Commit, db.simple_query("COMMIT")).await?;
    if let Some(first) = first {
        w.acknowledge(first);
    }
    Ok(())
}

/// Reads the next rows, which must follow the ones before, and makes every second time a transfer.
async fn step(
    w: &mut Worker,
    db: &Client,
    style: &Style,
    next: i64,
    first: &mut Option<i64>,
) -> Result<(), Trouble> {
    let fetch = format!("FETCH {STEP} FROM steps");
    let rows = w.ask(Phase::Fetch, db.simple_query(&fetch)).await?;
    let got = numbers(&rows);
    if !got.iter().copied().eq(next..next + STEP) {
        return Err(w.wrong(
            Phase::Fetch,
            format!(
                "cursor returned {got:?}, must be {next} to {}",
                next + STEP - 1
            ),
        ));
    }
    if (next / STEP) % 2 == 1 {
        return Ok(());
    }
    let transfer = w.notes.begin(w.accounts, &mut w.rng);
    first.get_or_insert(transfer.n);
    // The balances as this transaction sees them; a new connection reads the committed ones.
    w.known = known_changes(w, db, transfer, style).await?;
    let sql = transfer.ledger_sql();
    w.ask(Phase::Ledger, db.simple_query(&sql)).await?;
    Ok(())
}
