//! Transfers between common accounts, each with a line in the ledger that names its request.

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::checker::effects::Effect;
use crate::chaos::checker::ledger::INITIAL;
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;
use crate::chaos::wire::Trouble;

const ACCOUNTS: i64 = 24;

pub(super) fn tables(schema: &str) -> String {
    format!(
        "CREATE TABLE {schema}.accounts (id int PRIMARY KEY, balance bigint NOT NULL);
         INSERT INTO {schema}.accounts SELECT n, {INITIAL} FROM generate_series(1, {ACCOUNTS}) n;
         CREATE TABLE {schema}.rows (request bigint NOT NULL, item text NOT NULL)"
    )
}

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    if worker.rng.random_bool(0.12) {
        return sum(worker).await;
    }
    let chain = worker.rng.random_bool(0.1);
    let (outcome, result) = one(worker, true, chain).await;
    result?;
    if chain && outcome == Outcome::Ok {
        return one(worker, false, false).await.1;
    }
    Ok(())
}

/// One transfer. `begin`: the transaction is not open yet; `chain`: it ends with COMMIT AND CHAIN.
async fn one(worker: &mut Worker, begin: bool, chain: bool) -> (Outcome, Result<(), Gone>) {
    let id = worker.id();
    let (source, target) = pair(worker);
    let amount = worker.rng.random_range(1..50_i64);
    let mut effect = Effect {
        id,
        client: worker.client,
        rows: vec![format!("{source},{target},{amount}")],
        outcome: Outcome::Failed,
        sent: format!("transfer {amount} from {source} to {target}, begin {begin}, chain {chain}"),
        when: (worker.now(), 0),
    };
    let done = match transfer(worker, id, (source, target, amount), begin).await {
        Ok(()) if chain => worker.end_in("COMMIT AND CHAIN", "COMMIT", b'T').await,
        Ok(()) => worker.end("COMMIT", "COMMIT").await,
        Err(trouble) => {
            let what = effect.sent.clone();
            worker.failed(&trouble, At::Statement, &what).await
        }
    };
    effect.outcome = done.0;
    effect.when.1 = worker.now();
    worker.notes.effects.push(effect);
    done
}

/// Two different accounts.
fn pair(worker: &mut Worker) -> (i64, i64) {
    let source = worker.rng.random_range(1..=ACCOUNTS);
    let other = worker.rng.random_range(1..ACCOUNTS);
    (source, if other < source { other } else { other + 1 })
}

async fn transfer(
    worker: &mut Worker,
    id: u64,
    (source, target, amount): (i64, i64, i64),
    begin: bool,
) -> Result<(), Stopped> {
    let schema = worker.schema();
    if begin {
        worker.begin().await?;
    }
    worker.think().await;
    // Locks in one order: no deadlocks but those that a replay might make.
    let mut moves = [(source, -amount), (target, amount)];
    moves.sort_unstable();
    let update = format!(
        "UPDATE {schema}.accounts SET balance = balance + $2::bigint WHERE id = $1::int RETURNING balance"
    );
    for (account, by) in moves {
        let answer = worker
            .ask(&update, &[account.to_string(), by.to_string()])
            .await?;
        expect_tag(&answer, "UPDATE 1")?;
        answer.one::<i64>(0)?;
        worker.think().await;
    }
    let insert = format!("INSERT INTO {schema}.rows VALUES ($1::bigint, $2)");
    if worker.rng.random_bool(0.1) {
        aside(worker, &insert, id).await?;
    }
    let item = format!("{source},{target},{amount}");
    let answer = worker.ask(&insert, &[id.to_string(), item]).await?;
    expect_tag(&answer, "INSERT 0 1")?;
    worker.think().await;
    Ok(())
}

/// A savepoint with a line that is taken back.
async fn aside(worker: &mut Worker, insert: &str, id: u64) -> Result<(), Trouble> {
    worker.conn()?.simple("SAVEPOINT a", 1).await?;
    let values = [id.to_string(), "taken back".to_owned()];
    worker.ask(insert, &values).await?;
    worker.think().await;
    worker.conn()?.simple("ROLLBACK TO a", 1).await.map(drop)
}

/// Reads the sum of all balances, alone or in a transaction.
async fn sum(worker: &mut Worker) -> Result<(), Gone> {
    let sql = format!(
        "SELECT sum(balance)::bigint FROM {}.accounts",
        worker.schema()
    );
    let in_transaction = worker.rng.random_bool(0.5);
    let at = if in_transaction {
        At::Statement
    } else {
        At::Read
    };
    match read_sum(worker, &sql, in_transaction).await {
        Ok(sum) => {
            let reader = format!("client {} at {} us", worker.client, worker.now());
            worker.notes.sums.push((sum, reader));
            match in_transaction {
                true => worker.end("COMMIT", "COMMIT").await.1,
                false => Ok(()),
            }
        }
        Err(trouble) => worker.failed(&trouble, at, &sql).await.1,
    }
}

async fn read_sum(worker: &mut Worker, sql: &str, begin: bool) -> Result<i64, Stopped> {
    if begin {
        worker.begin().await?;
    }
    let sum = worker.ask(sql, &[]).await?.one(0)?;
    if begin {
        worker.think().await;
    }
    Ok(sum)
}
