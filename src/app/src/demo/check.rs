//! The judge: compares what a database holds with what the clients noted.
//!
//! Reads over a direct connection to one instance, never through the proxy, and trusts neither
//! the proxy nor the cluster. Invariant: every acknowledged transfer stands in the ledger exactly
//! once and unchanged, nothing stands there whose COMMIT was never sent, and every balance is what
//! the ledger makes it.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::bank::{Fate, INITIAL, Notes, Transfer};

/// How long a standby may take to apply what the primary has.
const CATCH_UP_LIMIT: Duration = Duration::from_secs(30);
/// Transfers that a finding names.
const NAMED: usize = 10;

/// What was found on one instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Findings {
    pub(crate) acknowledged: u64,
    /// Acknowledged and not in the ledger.
    pub(crate) lost: u64,
    /// In the ledger more than once.
    pub(crate) duplicated: u64,
    /// In the ledger with other contents than the client sent.
    pub(crate) altered: u64,
    /// In the ledger, though no client sent a COMMIT for it.
    pub(crate) phantom: u64,
    /// In the ledger, COMMIT sent, never acknowledged: allowed, the client got an error.
    pub(crate) unacknowledged: u64,
    /// Balances agree with the ledger, and their sum with the beginning.
    pub(crate) balanced: bool,
    /// For people: which ones, and what else.
    pub(crate) details: Vec<String>,
}

impl Findings {
    pub(crate) fn good(&self) -> bool {
        self.lost == 0
            && self.duplicated == 0
            && self.altered == 0
            && self.phantom == 0
            && self.balanced
    }

    /// The worse of each, for a verdict over several instances.
    pub(crate) fn merge(&mut self, other: Self) {
        self.acknowledged = self.acknowledged.max(other.acknowledged);
        self.lost = self.lost.max(other.lost);
        self.duplicated = self.duplicated.max(other.duplicated);
        self.altered = self.altered.max(other.altered);
        self.phantom = self.phantom.max(other.phantom);
        self.unacknowledged = self.unacknowledged.max(other.unacknowledged);
        self.balanced &= other.balanced;
        self.details.extend(other.details);
    }

    fn name(&mut self, what: &str, id: (i32, i64)) {
        if self.details.len() < NAMED {
            self.details
                .push(format!("client {} transfer {}: {what}", id.0, id.1));
        }
    }
}

/// Checks the instance behind `db` against the clients' notes.
pub(crate) async fn check<'a>(
    db: &Client,
    notes: impl Iterator<Item = &'a Notes>,
) -> Result<Findings, tokio_postgres::Error> {
    let mut findings = compare(&ledger(db).await?, notes);
    let wrong: i64 = db
        .query_one(
            "SELECT count(*) FROM accounts a LEFT JOIN (
                 SELECT id, sum(by) AS by FROM (
                     SELECT source AS id, -amount AS by FROM ledger
                     UNION ALL SELECT target, amount FROM ledger) m
                 GROUP BY id) m USING (id)
             WHERE a.balance <> $1::bigint + coalesce(m.by, 0)",
            &[&INITIAL],
        )
        .await?
        .try_get(0)?;
    let off: i64 = db
        .query_one(
            "SELECT (sum(balance) - count(*) * $1::bigint)::bigint FROM accounts",
            &[&INITIAL],
        )
        .await?
        .try_get(0)?;
    findings.balanced = wrong == 0 && off == 0;
    if wrong != 0 {
        findings.details.push(format!(
            "{wrong} accounts hold another balance than the ledger makes"
        ));
    }
    if off != 0 {
        findings
            .details
            .push(format!("the sum of all balances is off by {off}"));
    }
    Ok(findings)
}

type Ledger = HashMap<(i32, i64), (Transfer, u64)>;

async fn ledger(db: &Client) -> Result<Ledger, tokio_postgres::Error> {
    let mut ledger = Ledger::new();
    for row in db
        .query("SELECT client, n, source, target, amount FROM ledger", &[])
        .await?
    {
        let transfer = Transfer {
            client: row.try_get(0)?,
            n: row.try_get(1)?,
            source: row.try_get(2)?,
            target: row.try_get(3)?,
            amount: row.try_get(4)?,
        };
        ledger
            .entry((transfer.client, transfer.n))
            .or_insert((transfer, 0))
            .1 += 1;
    }
    Ok(ledger)
}

/// Pure part of [`check`].
fn compare<'a>(ledger: &Ledger, notes: impl Iterator<Item = &'a Notes>) -> Findings {
    let mut findings = Findings {
        balanced: true,
        ..Findings::default()
    };
    let mut known = 0;
    for note in notes.flat_map(Notes::lines) {
        let id = (note.transfer.client, note.transfer.n);
        if note.fate == Fate::Acknowledged {
            findings.acknowledged += 1;
        }
        let Some((row, count)) = ledger.get(&id) else {
            if note.fate == Fate::Acknowledged {
                findings.lost += 1;
                findings.name("acknowledged, but not in the ledger", id);
            }
            continue;
        };
        known += 1;
        match note.fate {
            Fate::Begun => {
                findings.phantom += 1;
                findings.name("in the ledger, but COMMIT was never sent", id);
            }
            Fate::Attempted => findings.unacknowledged += 1,
            Fate::Acknowledged => {}
        }
        if *count > 1 {
            findings.duplicated += 1;
            findings.name("in the ledger more than once", id);
        }
        if *row != note.transfer {
            findings.altered += 1;
            findings.name("in the ledger with other contents", id);
        }
    }
    let strangers = ledger.len().saturating_sub(known);
    if strangers > 0 {
        findings.phantom += strangers as u64;
        findings
            .details
            .push(format!("{strangers} transfers in the ledger are nobody's"));
    }
    findings
}

/// Waits until the standby behind `standby` has applied what the primary behind `primary` holds.
pub(crate) async fn catch_up(primary: &Client, standby: &Client) -> Result<(), String> {
    let text = |e: tokio_postgres::Error| e.to_string();
    let position: String = primary
        .query_one("SELECT pg_current_wal_flush_lsn()::text", &[])
        .await
        .and_then(|row| row.try_get(0))
        .map_err(text)?;
    let deadline = Instant::now() + CATCH_UP_LIMIT;
    while Instant::now() < deadline {
        let there: Option<bool> = standby
            .query_one(
                "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn",
                &[&position],
            )
            .await
            .and_then(|row| row.try_get(0))
            .map_err(text)?;
        if there == Some(true) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(format!(
        "standby did not reach {position} within {CATCH_UP_LIMIT:?}"
    ))
}
