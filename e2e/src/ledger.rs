//! Writers with open transactions, and the count of what became of what they were told.
//!
//! Each transaction writes two rows and reads them back. A writer remembers a number only when its
//! COMMIT was answered; afterwards the table has to hold exactly those numbers, twice each.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::Result;

/// How long a writer waits inside its transaction: long enough for most moves to hit some.
const THINK: Duration = Duration::from_millis(8);

/// What one writer saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// Numbers whose COMMIT was answered.
    pub committed: Vec<i64>,
    /// Errors, in words.
    pub errors: Vec<String>,
    /// The longest transaction.
    pub slowest: Duration,
}

/// Writers at work.
#[derive(Debug)]
pub struct Ledger {
    config: tokio_postgres::Config,
    stop: CancellationToken,
    writers: Vec<JoinHandle<Seen>>,
}

/// Connects and leaves the connection to itself.
pub async fn connect(config: &tokio_postgres::Config) -> Result<Client> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

impl Ledger {
    /// Makes the table and starts the writers.
    pub async fn start(config: tokio_postgres::Config, writers: i32) -> Result<Self> {
        connect(&config)
            .await?
            .batch_execute(
                "create table if not exists ledger (writer int, number bigint, half int)",
            )
            .await?;
        let stop = CancellationToken::new();
        let mut tasks = Vec::new();
        for writer in 0..writers {
            let client = connect(&config).await?;
            tasks.push(tokio::spawn(write(client, writer, stop.clone())));
        }
        Ok(Self {
            config,
            stop,
            writers: tasks,
        })
    }

    /// Ends the writers and compares the table with what they were told. Returns how many
    /// transactions there were, and the longest of them.
    pub async fn settle(self) -> Result<(usize, Duration)> {
        self.stop.cancel();
        let mut problems = Vec::new();
        let mut told: BTreeMap<(i32, i64), ()> = BTreeMap::new();
        let mut slowest = Duration::ZERO;
        for (writer, task) in (0..).zip(self.writers) {
            let seen = task.await?;
            problems.extend(
                seen.errors
                    .into_iter()
                    .map(|e| format!("writer {writer}: {e}")),
            );
            told.extend(seen.committed.into_iter().map(|n| ((writer, n), ())));
            slowest = slowest.max(seen.slowest);
        }
        let client = connect(&self.config).await?;
        let rows = client
            .query(
                "select writer, number, count(*), count(distinct half) from ledger group by 1, 2",
                &[],
            )
            .await?;
        let mut found = BTreeMap::new();
        for row in rows {
            let key: (i32, i64) = (row.get(0), row.get(1));
            let counts: (i64, i64) = (row.get(2), row.get(3));
            if counts != (2, 2) {
                problems.push(format!("{key:?} is there {counts:?} times, not (2, 2)"));
            }
            found.insert(key, ());
        }
        problems.extend(
            told.keys()
                .filter(|k| !found.contains_key(k))
                .map(|k| format!("{k:?} was lost")),
        );
        problems.extend(
            found
                .keys()
                .filter(|k| !told.contains_key(k))
                .map(|k| format!("{k:?} was not told of")),
        );
        if !problems.is_empty() {
            problems.truncate(20);
            return Err(problems.join("\n").into());
        }
        Ok((told.len(), slowest))
    }
}

async fn write(mut client: Client, writer: i32, stop: CancellationToken) -> Seen {
    let mut seen = Seen::default();
    let mut number = 0;
    while !stop.is_cancelled() && seen.errors.len() < 5 {
        number += 1;
        let began = Instant::now();
        match transaction(&mut client, writer, number).await {
            Ok(()) => seen.committed.push(number),
            Err(error) => seen.errors.push(match error.as_db_error() {
                Some(db) => format!("{number}: {} {}", db.code().code(), db.message()),
                None => format!("{number}: {error:?}"),
            }),
        }
        seen.slowest = seen.slowest.max(began.elapsed());
    }
    seen
}

async fn transaction(
    client: &mut Client,
    writer: i32,
    number: i64,
) -> std::result::Result<(), tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    let insert = "insert into ledger values ($1, $2, $3)";
    transaction
        .execute(insert, &[&writer, &number, &1_i32])
        .await?;
    tokio::time::sleep(THINK).await;
    transaction
        .execute(insert, &[&writer, &number, &2_i32])
        .await?;
    tokio::time::sleep(THINK).await;
    transaction.commit().await
}
