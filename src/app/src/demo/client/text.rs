//! Transfers as SQL text over the simple protocol, at any isolation level, with or without
//! thinking in between.

use std::ops::Range;

use tokio_postgres::Client;

use super::{Worker, numbers};
use crate::demo::bank::Transfer;
use crate::demo::plan::ClientKind;
use crate::demo::record::{Phase, Trouble};

/// What makes the text clients differ.
pub(super) struct Style {
    begin: &'static str,
    /// Milliseconds between statements.
    think: Option<Range<u64>>,
    /// Read the sum of the client's accounts first and last.
    sums: bool,
}

impl Style {
    pub(super) fn of(kind: ClientKind) -> Self {
        match kind {
            ClientKind::Slow => Self {
                begin: "BEGIN",
                think: Some(50..250),
                sums: false,
            },
            ClientKind::RepeatableRead => Self {
                begin: "BEGIN ISOLATION LEVEL REPEATABLE READ",
                think: Some(5..30),
                sums: true,
            },
            ClientKind::Serializable => Self {
                begin: "BEGIN ISOLATION LEVEL SERIALIZABLE",
                think: Some(5..30),
                sums: true,
            },
            ClientKind::Plain
            | ClientKind::Prepared
            | ClientKind::Pipelined
            | ClientKind::Cursor => Self {
                begin: "BEGIN",
                think: None,
                sums: false,
            },
        }
    }
}

/// One transfer in one transaction.
pub(super) async fn transfer(w: &mut Worker, db: &Client, style: &Style) -> Result<(), Trouble> {
    let transfer = w.notes.begin(w.accounts, &mut w.rng);
    w.ask(Phase::Begin, db.simple_query(style.begin)).await?;
    pause(w, style).await;
    if style.sums {
        sum(w, db).await?;
    }
    let changed = if w.known.is_empty() {
        locked_changes(w, db, transfer).await?;
        None
    } else {
        Some(known_changes(w, db, transfer, style).await?)
    };
    let sql = transfer.ledger_sql();
    w.ask(Phase::Ledger, db.simple_query(&sql)).await?;
    pause(w, style).await;
    if style.sums {
        sum(w, db).await?;
    }
    w.notes.attempt(transfer.n);
    w.ask(Phase::Commit, db.simple_query("COMMIT")).await?;
    w.acknowledge(transfer.n);
    if let Some(changed) = changed {
        w.known = changed;
    }
    Ok(())
}

async fn pause(w: &mut Worker, style: &Style) {
    if let Some(range) = &style.think {
        w.think(range.clone()).await;
    }
}

/// Transfers among the client's own accounts leave their sum alone.
async fn sum(w: &mut Worker, db: &Client) -> Result<(), Trouble> {
    let sql = format!(
        "SELECT sum(balance)::bigint FROM accounts WHERE id BETWEEN {} AND {}",
        w.accounts.first, w.accounts.last
    );
    let rows = w.ask(Phase::Read, db.simple_query(&sql)).await?;
    w.expect(
        Phase::Read,
        numbers(&rows).first().copied(),
        w.accounts.sum(),
    )
}

/// Changes accounts that others change as well: locks each row, so that the balance after the
/// update follows from the one read.
async fn locked_changes(w: &mut Worker, db: &Client, transfer: Transfer) -> Result<(), Trouble> {
    for (id, by) in transfer.changes() {
        let lock = format!("SELECT balance FROM accounts WHERE id = {id} FOR UPDATE");
        let rows = w.ask(Phase::Read, db.simple_query(&lock)).await?;
        let Some(balance) = numbers(&rows).first().copied() else {
            return Err(w.wrong(Phase::Read, format!("account {id} is missing")));
        };
        let after = change(w, db, id, by).await?;
        w.expect(Phase::Write, after, balance + by)?;
    }
    Ok(())
}

/// Changes accounts of the client's own, whose balances it knows; returns the new ones.
pub(super) async fn known_changes(
    w: &mut Worker,
    db: &Client,
    transfer: Transfer,
    style: &Style,
) -> Result<Vec<i64>, Trouble> {
    let mut known = w.known.clone();
    for (id, by) in transfer.changes() {
        let after = change(w, db, id, by).await?;
        let place = w.place(id);
        let Some(balance) = known.get_mut(place) else {
            return Err(w.wrong(Phase::Write, format!("account {id} is missing")));
        };
        *balance += by;
        w.expect(Phase::Write, after, *balance)?;
        pause(w, style).await;
    }
    Ok(known)
}

async fn change(w: &mut Worker, db: &Client, id: i32, by: i64) -> Result<Option<i64>, Trouble> {
    let sql =
        format!("UPDATE accounts SET balance = balance + ({by}) WHERE id = {id} RETURNING balance");
    let rows = w.ask(Phase::Write, db.simple_query(&sql)).await?;
    Ok(numbers(&rows).first().copied())
}
