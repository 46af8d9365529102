//! What it costs to give a transaction the values of sequences again that its client has seen.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::time::{Duration, Instant};

use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::Client;

const ROUNDS: usize = 5;

/// What the sessions do in their transactions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Statements that return values of a sequence; each session's follow each other.
    Apart,
    /// The same; sessions draw in turns.
    InTurns,
    /// The same as `Apart`, with half as many other statements behind.
    AndMore,
    /// No sequence.
    Updates,
}

async fn step(client: &Client, work: Work, row: usize) {
    let sql = match work {
        Work::Updates => format!("UPDATE u SET v = v + 1 WHERE id = {row}"),
        _ => "INSERT INTO t (v) VALUES (1) RETURNING id".to_owned(),
    };
    client.simple_query(&sql).await.unwrap();
}

/// The whole planned move, and how many sessions went on after it.
async fn moved(sessions: usize, each: usize, work: Work) -> (Duration, usize) {
    let schema = "CREATE TABLE t (id serial PRIMARY KEY, v int); \
                  CREATE TABLE u (id int PRIMARY KEY, v int); \
                  INSERT INTO u SELECT n, 0 FROM generate_series(0, 100) n";
    let mut bench = Bench::start(EngineOptions::default(), schema)
        .await
        .unwrap();
    let mut clients = Vec::new();
    for _ in 0..sessions {
        let client = bench.client().await.unwrap();
        client.batch_execute("BEGIN").await.unwrap();
        clients.push(client);
    }
    if work == Work::InTurns {
        for _ in 0..each {
            for (row, client) in clients.iter().enumerate() {
                step(client, work, row).await;
            }
        }
    } else {
        for (row, client) in clients.iter().enumerate() {
            for _ in 0..each {
                step(client, work, row).await;
            }
            for _ in 0..each / 2 {
                if work == Work::AndMore {
                    step(client, Work::Updates, row).await;
                }
            }
        }
    }
    let began = Instant::now();
    bench.switchover().await.unwrap();
    let took = began.elapsed();
    let mut went_on = 0;
    for client in &clients {
        went_on += usize::from(client.batch_execute("COMMIT").await.is_ok());
    }
    (took, went_on)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn how_long_a_planned_move_takes() {
    for (sessions, each, work) in [
        (20, 1, Work::Updates),
        (20, 1, Work::Apart),
        (20, 10, Work::Apart),
        (20, 50, Work::Updates),
        (20, 50, Work::Apart),
        (20, 50, Work::InTurns),
        (20, 50, Work::AndMore),
        (1, 1500, Work::Updates),
        (1, 1500, Work::Apart),
    ] {
        let (mut took, mut went_on) = (Vec::new(), 0);
        for _ in 0..ROUNDS {
            let (time, ok) = moved(sessions, each, work).await;
            took.push(time.as_millis());
            went_on += ok;
        }
        took.sort_unstable();
        eprintln!(
            "{sessions} sessions, {each} each, {work:?}: median {} ms of {took:?}; {went_on} of {} went on",
            took[ROUNDS / 2],
            sessions * ROUNDS,
        );
    }
}
