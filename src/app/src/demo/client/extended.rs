//! Transfers over the extended protocol: named prepared statements that live as long as the
//! connection, one request after the other or all at once.

use futures_util::future::join5;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};

use super::Worker;
use crate::demo::record::{Phase, Trouble};

/// The prepared statements of a connection.
pub(super) struct Statements {
    lock: Statement,
    change: Statement,
    ledger: Statement,
}

impl Statements {
    pub(super) async fn prepare(w: &mut Worker, db: &Client) -> Result<Self, Trouble> {
        let lock = "SELECT balance FROM accounts WHERE id = $1 FOR UPDATE";
        let change = "UPDATE accounts SET balance = balance + $2 WHERE id = $1 RETURNING balance";
        let ledger = "INSERT INTO ledger (client, n, source, target, amount) \
                      VALUES ($1, $2, $3, $4, $5)";
        Ok(Self {
            lock: w.ask(Phase::Prepare, db.prepare(lock)).await?,
            change: w.ask(Phase::Prepare, db.prepare(change)).await?,
            ledger: w.ask(Phase::Prepare, db.prepare(ledger)).await?,
        })
    }
}

fn balance(row: Option<&Row>) -> Option<i64> {
    row?.try_get(0).ok()
}

/// One transfer, each request sent when the one before it was answered.
pub(super) async fn prepared(w: &mut Worker, db: &Client, s: &Statements) -> Result<(), Trouble> {
    let t = w.notes.begin(w.accounts, &mut w.rng);
    w.ask(Phase::Begin, db.batch_execute("BEGIN")).await?;
    for (id, by) in t.changes() {
        let rows = w.ask(Phase::Read, db.query(&s.lock, &[&id])).await?;
        let Some(before) = balance(rows.first()) else {
            return Err(w.wrong(Phase::Read, format!("account {id} is missing")));
        };
        let rows = w
            .ask(Phase::Write, db.query(&s.change, &[&id, &by]))
            .await?;
        w.expect(Phase::Write, balance(rows.first()), before + by)?;
    }
    let row: [&(dyn ToSql + Sync); 5] = [&t.client, &t.n, &t.source, &t.target, &t.amount];
    let inserted = w.ask(Phase::Ledger, db.execute(&s.ledger, &row)).await?;
    w.expect(Phase::Ledger, i64::try_from(inserted).ok(), 1)?;
    w.notes.attempt(t.n);
    w.ask(Phase::Commit, db.batch_execute("COMMIT")).await?;
    w.acknowledge(t.n);
    Ok(())
}

/// One transfer, everything sent at once; the answers are awaited together and count as one
/// request.
pub(super) async fn pipelined(w: &mut Worker, db: &Client, s: &Statements) -> Result<(), Trouble> {
    let t = w.notes.begin(w.accounts, &mut w.rng);
    let [(id1, by1), (id2, by2)] = t.changes();
    // COMMIT goes out with the rest.
    w.notes.attempt(t.n);
    let all = async {
        // join5 polls its futures in order, and a request is sent when it is first polled.
        let (begun, first, second, inserted, committed) = join5(
            db.batch_execute("BEGIN"),
            db.query(&s.change, &[&id1, &by1]),
            db.query(&s.change, &[&id2, &by2]),
            db.execute(
                &s.ledger,
                &[&t.client, &t.n, &t.source, &t.target, &t.amount],
            ),
            db.batch_execute("COMMIT"),
        )
        .await;
        begun?;
        let counts = (first?.len(), second?.len(), inserted?);
        committed?;
        Ok(counts)
    };
    let counts = w.ask(Phase::Pipeline, all).await?;
    if counts != (1, 1, 1) {
        return Err(w.wrong(
            Phase::Pipeline,
            format!("row counts are {counts:?}, each must be 1"),
        ));
    }
    w.acknowledge(t.n);
    Ok(())
}
