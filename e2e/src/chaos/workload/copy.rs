//! Loads by COPY FROM STDIN in several pieces, alone and in transactions: all rows or none, once.

use std::time::Duration;

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::checker::effects::Effect;
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    let id = worker.id();
    let in_transaction = worker.rng.random_bool(0.5);
    let count = worker.rng.random_range(1..=120_usize);
    let rows: Vec<String> = (0..count).map(|n| format!("{n}")).collect();
    let where_to = if in_transaction {
        "in a transaction"
    } else {
        "alone"
    };
    let mut effect = Effect {
        id,
        client: worker.client,
        sent: format!("COPY of {count} rows {where_to}"),
        rows,
        outcome: Outcome::Failed,
        when: (worker.now(), 0),
    };
    let at = if in_transaction {
        At::Statement
    } else {
        At::Autocommit
    };
    let result = match load(worker, &effect, in_transaction).await {
        Ok(()) if in_transaction => {
            let (outcome, result) = worker.end("COMMIT", "COMMIT").await;
            effect.outcome = outcome;
            result
        }
        Ok(()) => {
            effect.outcome = Outcome::Ok;
            worker.notes.count(Outcome::Ok);
            Ok(())
        }
        Err(trouble) => {
            let what = effect.sent.clone();
            let (outcome, result) = worker.failed(&trouble, at, &what).await;
            effect.outcome = outcome;
            result
        }
    };
    effect.when.1 = worker.now();
    worker.notes.effects.push(effect);
    result
}

async fn load(worker: &mut Worker, effect: &Effect, begin: bool) -> Result<(), Stopped> {
    let sql = format!("COPY {}.rows FROM STDIN", worker.schema());
    if begin {
        worker.begin().await?;
        worker.think().await;
    }
    let size = worker.rng.random_range(1..=effect.rows.len());
    let line = |item: &String| format!("{}\t{item}\n", effect.id);
    let chunks: Vec<String> = effect
        .rows
        .chunks(size.max(effect.rows.len() / 5))
        .map(|items| items.iter().map(line).collect())
        .collect();
    let pause = Duration::from_millis(worker.rng.random_range(0..15));
    let answer = worker.conn()?.copy_in(&sql, &chunks, pause).await?;
    expect_tag(&answer, &format!("COPY {}", effect.rows.len()))?;
    if begin {
        worker.think().await;
    }
    Ok(())
}
