//! Transactions that append unique values to lists and read them.

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::errors::At;
use crate::chaos::history::{Key, Op, Outcome, Txn, Value};
use crate::chaos::wire::{Answer, Trouble};

/// Few, so that transactions meet.
const KEYS: Key = 8;

pub(super) fn tables(schema: &str) -> String {
    format!(
        "CREATE TABLE {schema}.lists (key int PRIMARY KEY, list bigint[] NOT NULL DEFAULT '{{}}');
         INSERT INTO {schema}.lists (key) SELECT generate_series(0, {})",
        KEYS - 1
    )
}

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    let mut txn = Txn {
        id: worker.id(),
        client: worker.client,
        level: worker.setting.level,
        ops: Vec::new(),
        outcome: Outcome::Failed,
        began: u64::MAX,
        ended: 0,
    };
    let result = match operations(worker, &mut txn).await {
        Ok(()) => {
            let (outcome, result) = worker.end("COMMIT", "COMMIT").await;
            txn.outcome = outcome;
            result
        }
        Err(trouble) => {
            let what = format!("{:?} behind {txn}", At::Statement);
            worker.failed(&trouble, At::Statement, &what).await.1
        }
    };
    txn.ended = worker.now();
    worker.notes.txns.push(txn);
    result
}

async fn operations(worker: &mut Worker, txn: &mut Txn) -> Result<(), Stopped> {
    worker.begin().await?;
    worker.think().await;
    for _ in 0..worker.rng.random_range(1..=4) {
        let key = worker.rng.random_range(0..KEYS);
        txn.began = txn.began.min(worker.now());
        if worker.rng.random_bool(0.5) {
            append(worker, txn, key).await?;
        } else {
            read(worker, txn, key).await?;
        }
        worker.think().await;
    }
    Ok(())
}

async fn append(worker: &mut Worker, txn: &mut Txn, key: Key) -> Result<(), Trouble> {
    let schema = worker.schema();
    let value = worker.id();
    let known = last_read(txn, key);
    txn.ops.push(Op::Append { key, value });
    let answer = match known {
        // Within a snapshot an update may build on what was read: the level guards it.
        Some(mut list) if txn.level.is_snapshot() && worker.rng.random_bool(0.5) => {
            list.push(value);
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            let list = format!("{{{}}}", list.join(","));
            let sql = format!("UPDATE {schema}.lists SET list = $2::bigint[] WHERE key = $1::int");
            worker.ask(&sql, &[key.to_string(), list]).await?
        }
        // What RETURNING shows is a read behind the append.
        _ if worker.rng.random_bool(0.3) => {
            let sql = format!(
                "UPDATE {schema}.lists SET list = list || $2::bigint WHERE key = $1::int \
                 RETURNING list"
            );
            let sent = worker.now();
            let values = [key.to_string(), value.to_string()];
            let answer = worker.ask(&sql, &values).await?;
            txn.ops.push(list_of(&answer, key, sent)?);
            answer
        }
        _ => {
            let sql =
                format!("UPDATE {schema}.lists SET list = list || $2::bigint WHERE key = $1::int");
            worker
                .ask(&sql, &[key.to_string(), value.to_string()])
                .await?
        }
    };
    expect_tag(&answer, "UPDATE 1")
}

/// The list as the transaction knows it, if it has read it.
fn last_read(txn: &Txn, wanted: Key) -> Option<Vec<Value>> {
    let mut known: Option<Vec<Value>> = None;
    for op in &txn.ops {
        match op {
            Op::Read { key, list, .. } if *key == wanted => known = Some(list.clone()),
            Op::Append { key, value } if *key == wanted => {
                if let Some(list) = &mut known {
                    list.push(*value);
                }
            }
            _ => {}
        }
    }
    known
}

async fn read(worker: &mut Worker, txn: &mut Txn, key: Key) -> Result<(), Trouble> {
    let lock = match worker.rng.random_range(0..12) {
        0 => " FOR UPDATE",
        1 => " FOR SHARE",
        _ => "",
    };
    let schema = worker.schema();
    let sql = format!("SELECT list FROM {schema}.lists WHERE key = $1::int{lock}");
    let sent = worker.now();
    let answer = worker.ask(&sql, &[key.to_string()]).await?;
    txn.ops.push(list_of(&answer, key, sent)?);
    Ok(())
}

/// The list in an answer, as a read.
fn list_of(answer: &Answer, key: Key, sent: u64) -> Result<Op, Trouble> {
    let text: String = answer.one(0)?;
    let list = parse(&text).ok_or_else(|| Trouble::Protocol(format!("no list: {text}")))?;
    Ok(Op::Read { key, list, sent })
}

/// An array of numbers in PostgreSQL's text form.
fn parse(text: &str) -> Option<Vec<Value>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    let values = inner.split(',').filter(|value| !value.is_empty());
    values.map(|value| value.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays() {
        assert_eq!(parse("{}"), Some(vec![]));
        assert_eq!(parse("{1,22}"), Some(vec![1, 22]));
        assert_eq!(parse("1,2"), None);
    }
}
