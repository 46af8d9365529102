//! Values of sequences that clients have seen: they are what the database holds, and nobody else's.

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::checker::effects::Effect;
use crate::chaos::checker::sequences::Draw;
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;

pub(super) fn tables(schema: &str) -> String {
    format!(
        "CREATE SEQUENCE {schema}.s;
         CREATE TABLE {schema}.rows (request bigint NOT NULL, item text NOT NULL);
         CREATE TABLE {schema}.serials (id bigserial, request bigint NOT NULL)"
    )
}

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    if worker.rng.random_bool(0.15) {
        return alone(worker).await;
    }
    let id = worker.id();
    let first = worker.notes.draws.len();
    let mut effect = Effect {
        id,
        client: worker.client,
        rows: Vec::new(),
        outcome: Outcome::Failed,
        sent: "values of sequences".to_owned(),
        when: (worker.now(), 0),
    };
    let result = match draw(worker, &mut effect).await {
        Ok(()) => {
            let (outcome, result) = worker.end("COMMIT", "COMMIT").await;
            effect.outcome = outcome;
            result
        }
        Err(trouble) => {
            let what = format!("values {:?}", effect.rows);
            worker.failed(&trouble, At::Statement, &what).await.1
        }
    };
    effect.when.1 = worker.now();
    for draw in worker.notes.draws.iter_mut().skip(first) {
        draw.outcome = effect.outcome;
    }
    effect.sent = format!("values {:?}", effect.rows);
    worker.notes.effects.push(effect);
    result
}

fn note(worker: &mut Worker, txn: u64, sequence: &str, value: i64, outcome: Outcome) {
    let draw = Draw {
        sequence: sequence.to_owned(),
        value,
        txn,
        client: worker.client,
        outcome,
        at: worker.now(),
    };
    worker.notes.draws.push(draw);
}

/// A transaction that draws, writes down what it saw, and lets a serial column draw.
async fn draw(worker: &mut Worker, effect: &mut Effect) -> Result<(), Stopped> {
    let (schema, id) = (worker.schema(), effect.id);
    worker.begin().await?;
    for _ in 0..worker.rng.random_range(1..=3) {
        worker.think().await;
        if worker.rng.random_bool(0.5) {
            let sql = format!("SELECT nextval('{schema}.s')");
            let value: i64 = worker.ask(&sql, &[]).await?.one(0)?;
            note(worker, id, "s", value, Outcome::Failed);
            worker.think().await;
            let item = format!("s {value}");
            let sql = format!("INSERT INTO {schema}.rows VALUES ($1::bigint, $2)");
            let answer = worker.ask(&sql, &[id.to_string(), item.clone()]).await?;
            expect_tag(&answer, "INSERT 0 1")?;
            effect.rows.push(item);
        } else {
            let sql =
                format!("INSERT INTO {schema}.serials (request) VALUES ($1::bigint) RETURNING id");
            let value: i64 = worker.ask(&sql, &[id.to_string()]).await?.one(0)?;
            note(worker, id, "serial", value, Outcome::Failed);
            effect.rows.push(format!("serial {value}"));
        }
    }
    worker.think().await;
    Ok(())
}

/// `nextval` by itself: what was answered is the client's.
async fn alone(worker: &mut Worker) -> Result<(), Gone> {
    let sql = format!("SELECT nextval('{}.s')", worker.schema());
    let answer = worker.ask(&sql, &[]).await;
    match answer.and_then(|answer| answer.one::<i64>(0)) {
        Ok(value) => {
            let txn = worker.id();
            note(worker, txn, "s", value, Outcome::Ok);
            worker.notes.count(Outcome::Ok);
            Ok(())
        }
        Err(trouble) => worker.failed(&trouble, At::Autocommit, &sql).await.1,
    }
}
