//! Writers with open transactions, and the count of what became of what they were told.
//!
//! Each transaction writes two rows and reads them back. A writer remembers a number only when its
//! COMMIT was answered; afterwards the table has to hold exactly those numbers, twice each. Writers
//! that may lose their connection come again, and leave a COMMIT that was not answered open: it may
//! be there whole, or not at all.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::Result;

/// How long a writer waits inside its transaction: long enough for most moves to hit some.
const THINK: Duration = Duration::from_millis(8);

/// Transactions that take so long are remembered one by one: on an idle machine only those that a
/// move stands in the way of.
pub const LONG: Duration = Duration::from_millis(100);

/// What one writer saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Numbers whose COMMIT was answered.
    pub committed: Vec<i64>,
    /// Errors, in words.
    pub errors: Vec<String>,
    /// Numbers whose COMMIT was cut off.
    pub unknown: Vec<i64>,
    /// Connections that were lost, in words.
    pub lost: Vec<String>,
    /// The longest transaction.
    pub slowest: Duration,
    /// Transactions that took [`LONG`] or more.
    pub long: Vec<Duration>,
}

/// What writers were told, and the table holds.
#[derive(Debug)]
pub struct Settled {
    /// Transactions that are there, and were told of.
    pub count: usize,
    /// The longest of them.
    pub slowest: Duration,
    /// Those that took [`LONG`] or more, the longest first.
    pub long: Vec<Duration>,
    /// Transactions whose COMMIT was cut off, and how many of them are there.
    pub unknown: (usize, usize),
    /// Connections that were lost, in words.
    pub lost: Vec<String>,
}

impl Settled {
    /// The quantiles of so many waits, one for each writer and event: the longest transactions that
    /// there were, in words.
    #[must_use]
    pub fn waits(&self, events: usize) -> String {
        let waits = self.long.get(..events).unwrap_or(&self.long);
        let at = |part: usize| waits.get(events * part / 100).copied().unwrap_or(LONG);
        format!(
            "{} transactions; of {events} waits p50 {:?}, p95 {:?}, p99 {:?}, max {:?}",
            self.count,
            at(50),
            at(5),
            at(1),
            self.slowest
        )
    }
}

/// Writers at work.
#[derive(Debug)]
pub struct Ledger {
    config: tokio_postgres::Config,
    stop: CancellationToken,
    first: i32,
    writers: Vec<JoinHandle<Seen>>,
}

/// Connects and leaves the connection to itself.
pub async fn connect(config: &tokio_postgres::Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// How long Kubernetes may have a Service without addresses: a node that could not report for 40 s,
/// because the API server was away, counts as not ready until its next report, every 10 s.
const NO_ADDRESS: Duration = Duration::from_secs(20);

/// A connection for who comes afterwards to judge, and may find nobody at the address yet.
async fn connect_at_last(config: &tokio_postgres::Config) -> Result<Client> {
    let deadline = Instant::now() + NO_ADDRESS;
    loop {
        match connect(config).await {
            Err(_) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            result => return result,
        }
    }
}

impl Ledger {
    /// Makes the table and starts the writers.
    pub async fn start(config: tokio_postgres::Config, writers: i32) -> Result<Self> {
        Self::begin(config, writers, 0, false).await
    }

    /// The same with writers that come again when their connection ends; their numbers begin with
    /// `first`.
    pub async fn start_again_and_again(
        config: tokio_postgres::Config,
        writers: i32,
        first: i32,
    ) -> Result<Self> {
        Self::begin(config, writers, first, true).await
    }

    async fn begin(
        config: tokio_postgres::Config,
        writers: i32,
        first: i32,
        again: bool,
    ) -> Result<Self> {
        connect(&config)
            .await?
            .batch_execute(
                "create table if not exists ledger (writer int, number bigint, half int)",
            )
            .await?;
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        for writer in first..first + writers {
            let client = connect(&config).await?;
            let again = again.then(|| config.clone());
            tasks.push(tokio::spawn(write(client, writer, stop.clone(), again)));
        }
        Ok(Self {
            config,
            stop,
            first,
            writers: tasks,
        })
    }

    /// Ends the writers and compares the table with what they were told. Returns how many
    /// transactions there were, and the longest of them.
    pub async fn settle(self) -> Result<(usize, Duration)> {
        let settled = self.account().await?;
        Ok((settled.count, settled.slowest))
    }

    /// The same, with all that is to be said of it.
    pub async fn account(self) -> Result<Settled> {
        self.stop.cancel();
        let mut problems = Vec::new();
        let (mut told, mut unknown) = (BTreeSet::new(), BTreeSet::new());
        let (mut slowest, mut lost) = (Duration::ZERO, Vec::new());
        let mut long = Vec::new();
        let writers = self.first..;
        let count = self.writers.len();
        for (writer, task) in writers.zip(self.writers) {
            let seen = task.await?;
            let named = |e: String| format!("writer {writer}: {e}");
            problems.extend(seen.errors.into_iter().map(named));
            lost.extend(seen.lost.into_iter().map(named));
            told.extend(seen.committed.into_iter().map(|n| (writer, n)));
            unknown.extend(seen.unknown.into_iter().map(|n| (writer, n)));
            slowest = slowest.max(seen.slowest);
            long.extend(seen.long);
        }
        long.sort_unstable_by(|a, b| b.cmp(a));
        let client = connect_at_last(&self.config).await?;
        let last = self.first + i32::try_from(count)?;
        let rows = client
            .query(
                "select writer, number, count(*), count(distinct half) from ledger \
                 where writer >= $1 and writer < $2 group by 1, 2",
                &[&self.first, &last],
            )
            .await?;
        let mut found = BTreeSet::new();
        for row in rows {
            let key: (i32, i64) = (row.get(0), row.get(1));
            let counts: (i64, i64) = (row.get(2), row.get(3));
            if counts != (2, 2) {
                problems.push(format!("{key:?} is there {counts:?} times, not (2, 2)"));
            }
            found.insert(key);
        }
        let said = |what: &'static str| move |k: &(i32, i64)| format!("{k:?} {what}");
        problems.extend(told.difference(&found).map(said("was lost")));
        let untold = found
            .iter()
            .filter(|k| !told.contains(k) && !unknown.contains(k));
        problems.extend(untold.map(said("was not told of")));
        if !problems.is_empty() {
            problems.truncate(20);
            return Err(problems.join("\n").into());
        }
        let there = unknown.intersection(&found).count();
        Ok(Settled {
            count: told.len(),
            slowest,
            long,
            unknown: (unknown.len(), there),
            lost,
        })
    }
}

async fn write(
    mut client: Client,
    writer: i32,
    stop: CancellationToken,
    again: Option<tokio_postgres::Config>,
) -> Seen {
    let mut seen = Seen::default();
    let mut number = 0;
    while !stop.is_cancelled() && seen.errors.len() < 5 {
        number += 1;
        let began = Instant::now();
        let result = transaction(&mut client, writer, number).await;
        let took = began.elapsed();
        seen.slowest = seen.slowest.max(took);
        if took >= LONG {
            seen.long.push(took);
        }
        let Err((at_commit, error)) = result else {
            seen.committed.push(number);
            continue;
        };
        let words = match error.as_db_error() {
            Some(db) => format!("{number}: {} {}", db.code().code(), db.message()),
            None => format!("{number}: {error:?}"),
        };
        let Some(config) = again.as_ref().filter(|_| ends_connection(&error)) else {
            seen.errors.push(words);
            continue;
        };
        // 57P01 says that nothing of it has happened.
        if at_commit && error.code() != Some(&SqlState::ADMIN_SHUTDOWN) {
            seen.unknown.push(number);
        }
        seen.lost.push(words);
        match come_again(config).await {
            Ok(fresh) => client = fresh,
            Err(error) => seen
                .errors
                .push(format!("{number}: cannot come again: {error}")),
        }
    }
    seen
}

/// How long a writer tries to come again.
const AGAIN: Duration = Duration::from_secs(30);

async fn come_again(config: &tokio_postgres::Config) -> Result<Client> {
    let deadline = Instant::now() + AGAIN;
    loop {
        match connect(config).await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// Whether an error is the end of the connection: it closed, or the proxy says that it does.
fn ends_connection(error: &tokio_postgres::Error) -> bool {
    match error.code() {
        Some(code) => {
            *code == SqlState::ADMIN_SHUTDOWN || *code == SqlState::TRANSACTION_RESOLUTION_UNKNOWN
        }
        None => true,
    }
}

/// Runs one transaction; with an error, whether its COMMIT had been sent.
async fn transaction(
    client: &mut Client,
    writer: i32,
    number: i64,
) -> std::result::Result<(), (bool, tokio_postgres::Error)> {
    let before = |error| (false, error);
    let transaction = client.transaction().await.map_err(before)?;
    let insert = "insert into ledger values ($1, $2, $3)";
    for half in [1_i32, 2] {
        let row: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&writer, &number, &half];
        transaction.execute(insert, &row).await.map_err(before)?;
        tokio::time::sleep(THINK).await;
    }
    transaction.commit().await.map_err(|error| (true, error))
}
