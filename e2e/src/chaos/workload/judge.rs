//! Reads what is in the database, past the proxy, and has the checkers judge it.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use super::Workload;
use crate::Result;
use crate::chaos::checker::effects::{self, Rows};
use crate::chaos::checker::ledger::{self, Transfer};
use crate::chaos::checker::list_append::{self, Final};
use crate::chaos::checker::two_phase::{self, Found};
use crate::chaos::checker::{Finding, sequences};
use crate::chaos::history::{Key, Value};
use crate::chaos::notes::Notes;

/// What came of an experiment.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// Acknowledged requests that are not there, where that is allowed.
    pub lost: u64,
}

/// Judges an experiment by the data behind `db`; nobody writes any more.
///
/// # Errors
/// The data could not be read.
pub async fn judge(
    workload: Workload,
    db: &Client,
    schema: &str,
    notes: &Notes,
    loss_allowed: bool,
) -> Result<Verdict> {
    let mut verdict = Verdict {
        findings: notes.violations.clone(),
        lost: 0,
    };
    if workload == Workload::ListAppend {
        let last = lists(db, schema).await?;
        verdict
            .findings
            .extend(list_append::forbidden(&notes.txns, &last));
        return Ok(verdict);
    }
    if workload == Workload::TwoPhase {
        verdict.findings.extend(prepared(db, schema, notes).await?);
        return Ok(verdict);
    }
    let mut rows = rows(db, schema).await?;
    if workload == Workload::Sequences {
        let sql = format!("SELECT request, id FROM {schema}.serials");
        for row in db.query(&sql, &[]).await? {
            let id: i64 = row.try_get(1)?;
            let item = format!("serial {id}");
            rows.entry(number(row.try_get(0)?)).or_default().push(item);
        }
        let present = |txn: u64| rows.contains_key(&txn);
        if !loss_allowed {
            let twice = sequences::check(&notes.draws, present);
            verdict.findings.extend(twice);
        }
    }
    let (findings, lost) = effects::check(&notes.effects, &rows, loss_allowed);
    verdict.findings.extend(findings);
    verdict.lost = lost;
    if workload == Workload::Bank {
        let balances = balances(db, schema).await?;
        let found = ledger::check(&balances, &transfers(&rows), &notes.sums);
        verdict.findings.extend(found);
    }
    Ok(verdict)
}

fn number(id: i64) -> u64 {
    u64::try_from(id).unwrap_or(u64::MAX)
}

async fn rows(db: &Client, schema: &str) -> Result<Rows> {
    let mut rows = Rows::new();
    let sql = format!("SELECT request, item FROM {schema}.rows");
    for row in db.query(&sql, &[]).await? {
        let request = number(row.try_get(0)?);
        rows.entry(request).or_default().push(row.try_get(1)?);
    }
    Ok(rows)
}

async fn balances(db: &Client, schema: &str) -> Result<BTreeMap<i64, i64>> {
    let sql = format!("SELECT id::bigint, balance FROM {schema}.accounts");
    let mut balances = BTreeMap::new();
    for row in db.query(&sql, &[]).await? {
        balances.insert(row.try_get(0)?, row.try_get(1)?);
    }
    Ok(balances)
}

/// The ledger's lines as they are in the database, doubled ones too.
fn transfers(rows: &Rows) -> Vec<Transfer> {
    let parse = |item: &String| {
        let mut numbers = item.split(',').map(|n| n.parse().ok());
        Some(Transfer {
            source: numbers.next()??,
            target: numbers.next()??,
            amount: numbers.next()??,
        })
    };
    rows.values().flatten().filter_map(parse).collect()
}

async fn lists(db: &Client, schema: &str) -> Result<Final> {
    let mut lists = Final::new();
    let sql = format!("SELECT key, list FROM {schema}.lists");
    for row in db.query(&sql, &[]).await? {
        let list: Vec<i64> = row.try_get(1)?;
        let list: Vec<Value> = list.into_iter().map(number).collect();
        lists.insert(Key::try_from(row.try_get::<_, i32>(0)?)?, list);
    }
    Ok(lists)
}

async fn prepared(db: &Client, schema: &str, notes: &Notes) -> Result<Vec<Finding>> {
    let rows = rows(db, schema).await?;
    let waiting = db.query("SELECT gid FROM pg_prepared_xacts", &[]).await?;
    let waiting: Vec<String> = waiting
        .iter()
        .map(|row| row.try_get(0))
        .collect::<std::result::Result<_, _>>()?;
    let find = |gid: &String| {
        let id = gid.rsplit('-').next().and_then(|id| id.parse().ok());
        let rows = id.and_then(|id: u64| rows.get(&id)).map_or(0, Vec::len);
        Found {
            prepared: waiting.contains(gid),
            rows,
        }
    };
    let judged = notes.branches.iter();
    Ok(judged
        .filter_map(|b| two_phase::check(b, find(&b.gid)))
        .collect())
}
