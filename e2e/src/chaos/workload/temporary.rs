//! Temporary tables: what a client has written to its own is there for as long as nobody has told it
//! that it is lost, and what a transaction derives from it is right.

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::checker::effects::Effect;
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;
use crate::chaos::wire::Trouble;

/// Rows of a client's table.
type Rows = Vec<i64>;

/// What a client knows of its table.
#[derive(Debug, Clone, Default)]
pub(super) enum Table {
    /// There is none.
    #[default]
    None,
    /// It holds this.
    Holds(Rows),
    /// It was told that an outcome is unknown: one or the other.
    Either(Rows, Rows),
}

const INSERT: &str = "INSERT INTO w VALUES ($1::bigint)";
const LOOK: &str = "SELECT count(*), coalesce(sum(v), 0), coalesce(max(v), 0) FROM w";

/// What [`LOOK`] gives for such a table.
fn seen(rows: &Rows) -> [i64; 3] {
    let count = i64::try_from(rows.len()).unwrap_or(i64::MAX);
    [
        count,
        rows.iter().sum(),
        rows.iter().copied().max().unwrap_or(0),
    ]
}

/// Whether a client was told that its temporary table is lost.
pub(super) fn tells_loss(trouble: &Trouble) -> bool {
    matches!(trouble, Trouble::Sql { text, .. } if text.contains("temporary object"))
}

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    match std::mem::take(&mut worker.table) {
        Table::None => make(worker).await,
        Table::Holds(rows) if worker.rng.random_bool(0.3) => alone(worker, rows).await,
        Table::Holds(rows) => transaction(worker, rows).await,
        Table::Either(one, other) => look(worker, vec![one, other]).await,
    }
}

/// A request failed: what is known of the table behind it.
async fn failed(
    worker: &mut Worker,
    trouble: &Trouble,
    at: At,
    (before, after): (Rows, Rows),
    what: &str,
) -> (Outcome, Result<(), Gone>) {
    let (outcome, result) = worker.failed(trouble, at, what).await;
    let lost = tells_loss(trouble) || result.is_err();
    worker.table = match outcome {
        _ if lost => Table::None,
        Outcome::Ok => Table::Holds(after),
        Outcome::Failed => Table::Holds(before),
        Outcome::Unknown => Table::Either(before, after),
    };
    (outcome, result)
}

async fn make(worker: &mut Worker) -> Result<(), Gone> {
    // What is left of one whose making has an unknown outcome goes first, and statements that may
    // have gone with it.
    worker.forget_prepared();
    for sql in [
        "DEALLOCATE ALL",
        "DROP TABLE IF EXISTS pg_temp.w",
        "CREATE TEMPORARY TABLE w (v bigint PRIMARY KEY)",
    ] {
        let made = match worker.conn() {
            Ok(conn) => conn.simple(sql, 1).await.map(drop),
            Err(trouble) => Err(trouble),
        };
        if let Err(trouble) = made {
            return worker.failed(&trouble, At::Autocommit, sql).await.1;
        }
    }
    worker.table = Table::Holds(Vec::new());
    Ok(())
}

/// Compares what is there with what may be.
async fn look(worker: &mut Worker, may: Vec<Rows>) -> Result<(), Gone> {
    let answer = worker.ask(LOOK, &[]).await;
    let got = answer.and_then(|a| Ok([a.one::<i64>(0)?, a.one(1)?, a.one(2)?]));
    match got {
        Ok(got) => {
            let is = may.iter().find(|rows| seen(rows) == got).cloned();
            if is.is_none() {
                let might: Vec<_> = may.iter().map(seen).collect();
                worker.violation(&format!(
                    "temporary table holds {got:?}, not one of {might:?}"
                ));
            }
            worker.table = is.map_or(Table::None, Table::Holds);
            Ok(())
        }
        Err(trouble) => {
            let (one, other) = (may.first().cloned(), may.last().cloned());
            let both = (one.unwrap_or_default(), other.unwrap_or_default());
            let same = may.len() == 1;
            let (_, result) = failed(worker, &trouble, At::Read, both.clone(), LOOK).await;
            // A read has changed nothing, whatever became of it.
            if !matches!(worker.table, Table::None) {
                worker.table = match same {
                    true => Table::Holds(both.0),
                    false => Table::Either(both.0, both.1),
                };
            }
            result
        }
    }
}

/// A statement by itself.
async fn alone(worker: &mut Worker, rows: Rows) -> Result<(), Gone> {
    let value = i64::try_from(worker.id()).unwrap_or(i64::MAX);
    let mut after = rows.clone();
    after.push(value);
    let answer = worker.ask(INSERT, &[value.to_string()]).await;
    match answer.and_then(|a| expect_tag(&a, "INSERT 0 1")) {
        Ok(()) => {
            worker.notes.count(Outcome::Ok);
            worker.table = Table::Holds(after.clone());
            worker.think().await;
            look(worker, vec![after]).await
        }
        Err(trouble) => {
            failed(worker, &trouble, At::Autocommit, (rows, after), INSERT)
                .await
                .1
        }
    }
}

/// A transaction that changes the table and writes down what it derives from it.
async fn transaction(worker: &mut Worker, before: Rows) -> Result<(), Gone> {
    let mut after = before.clone();
    let mut effect = Effect {
        id: worker.id(),
        client: worker.client,
        rows: Vec::new(),
        outcome: Outcome::Failed,
        sent: "from a temporary table".to_owned(),
        when: (worker.now(), 0),
    };
    let result = match change(worker, &mut after, &mut effect).await {
        Ok(()) => commit(worker, &mut effect, (before, after)).await,
        Err(trouble) => {
            // Rolled back, the table is what it was.
            let both = (before.clone(), before);
            failed(worker, &trouble, At::Statement, both, "temporary")
                .await
                .1
        }
    };
    effect.when.1 = worker.now();
    worker.notes.effects.push(effect);
    result
}

async fn change(worker: &mut Worker, rows: &mut Rows, effect: &mut Effect) -> Result<(), Stopped> {
    let schema = worker.schema();
    worker.begin().await?;
    for _ in 0..worker.rng.random_range(1..=3) {
        worker.think().await;
        if rows.len() > 5 && worker.rng.random_bool(0.3) {
            let sql = "DELETE FROM w WHERE v <= $1::bigint";
            let (low, all) = (rows.iter().copied().min().unwrap_or(0), rows.len());
            rows.retain(|v| *v > low);
            let answer = worker.ask(sql, &[low.to_string()]).await?;
            expect_tag(&answer, &format!("DELETE {}", all - rows.len()))?;
        } else {
            let value = i64::try_from(worker.id()).unwrap_or(i64::MAX);
            rows.push(value);
            let answer = worker.ask(INSERT, &[value.to_string()]).await?;
            expect_tag(&answer, "INSERT 0 1")?;
        }
    }
    let [count, sum, _] = seen(rows);
    effect.rows.push(format!("{count} {sum}"));
    let sql = format!(
        "INSERT INTO {schema}.rows SELECT $1::bigint, concat_ws(' ', count(*), coalesce(sum(v), 0)) \
         FROM w"
    );
    let answer = worker.ask(&sql, &[effect.id.to_string()]).await?;
    expect_tag(&answer, "INSERT 0 1")?;
    worker.think().await;
    Ok(())
}

async fn commit(
    worker: &mut Worker,
    effect: &mut Effect,
    (before, after): (Rows, Rows),
) -> Result<(), Gone> {
    let answer = match worker.conn() {
        Ok(conn) => conn.simple("COMMIT", 1).await,
        Err(trouble) => Err(trouble),
    };
    match answer.and_then(|a| expect_tag(&a, "COMMIT")) {
        Ok(()) => {
            worker.notes.count(Outcome::Ok);
            effect.outcome = Outcome::Ok;
            worker.table = Table::Holds(after.clone());
            look(worker, vec![after]).await
        }
        Err(trouble) => {
            let (outcome, result) =
                failed(worker, &trouble, At::Commit, (before, after), "COMMIT").await;
            effect.outcome = outcome;
            result
        }
    }
}
