//! Two-phase commit with this client as coordinator.

use rand::RngExt;

use super::worker::expect_tag;
use super::{Gone, Stopped, Worker};
use crate::chaos::checker::two_phase::{Branch, Decision};
use crate::chaos::errors::At;
use crate::chaos::history::Outcome;

pub(super) async fn step(worker: &mut Worker) -> Result<(), Gone> {
    let id = worker.id();
    let mut branch = Branch {
        gid: format!("{}-{id}", worker.schema()),
        client: worker.client,
        rows: worker.rng.random_range(1..=3),
        prepare: Outcome::Failed,
        decision: None,
        when: (worker.now(), 0),
    };
    let result = run(worker, id, &mut branch).await;
    branch.when.1 = worker.now();
    worker.notes.branches.push(branch);
    result
}

async fn run(worker: &mut Worker, id: u64, branch: &mut Branch) -> Result<(), Gone> {
    if let Err(trouble) = work(worker, id, branch.rows).await {
        let what = format!("work of \"{}\"", branch.gid);
        return worker.failed(&trouble, At::Statement, &what).await.1;
    }
    let sql = format!("PREPARE TRANSACTION '{}'", branch.gid);
    let (outcome, result) = worker.end(&sql, "PREPARE TRANSACTION").await;
    branch.prepare = outcome;
    result?;
    worker.think().await;
    if outcome != Outcome::Ok {
        return Ok(());
    }
    let (decision, verb) = match worker.rng.random_range(0..10) {
        0..7 => (Decision::Commit, "COMMIT PREPARED"),
        7..9 => (Decision::Rollback, "ROLLBACK PREPARED"),
        _ => return Ok(()),
    };
    // As long as there is no answer the truth may be either.
    branch.decision = Some((decision, Outcome::Unknown));
    let sql = format!("{verb} '{}'", branch.gid);
    let (outcome, result) = worker.end(&sql, verb).await;
    branch.decision = Some((decision, outcome));
    result
}

async fn work(worker: &mut Worker, id: u64, rows: usize) -> Result<(), Stopped> {
    let schema = worker.schema();
    worker.begin().await?;
    let sql = format!("INSERT INTO {schema}.rows VALUES ($1::bigint, $2)");
    for n in 0..rows {
        worker.think().await;
        let answer = worker.ask(&sql, &[id.to_string(), n.to_string()]).await?;
        expect_tag(&answer, "INSERT 0 1")?;
    }
    worker.think().await;
    Ok(())
}
