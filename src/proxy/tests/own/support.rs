//! Moves, and what is asked of sessions.
#![allow(unreachable_pub)] // a module of one test program

use std::time::{Duration, Instant};

use helios_proxy::engine::room::SpillOptions;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

/// What a step may take on a machine that is busy with other things.
pub const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Move {
    Planned,
    Crash,
}

pub const MOVES: [Move; 2] = [Move::Planned, Move::Crash];

pub async fn bench(folder: &tempfile::TempDir, schema: &str) -> Bench {
    let options = EngineOptions {
        spill: Some(std::sync::Arc::new(SpillOptions {
            folder: folder.path().to_owned(),
            max_bytes: 64 << 20,
            max_total_bytes: 64 << 20,
        })),
        ..EngineOptions::default()
    };
    let bench = Bench::start(options, schema).await.unwrap();
    bench.known().await.unwrap();
    bench
}

pub async fn move_it(bench: &mut Bench, how: Move) {
    match how {
        Move::Planned => bench.switchover().await.unwrap(),
        Move::Crash => {
            bench.crash().await.unwrap();
            bench.resume().await.unwrap();
        }
    }
}

/// A client that logs in as another role.
pub async fn client_as(bench: &Bench, user: &str) -> Client {
    let conninfo = bench
        .conninfo()
        .replace("user=postgres", &format!("user={user}"));
    let (client, connection) = tokio_postgres::connect(&conninfo, NoTls).await.unwrap();
    tokio::spawn(async move { connection.await.ok() });
    client
}

/// Waits until the list of sessions says this of the only one.
pub async fn until_said(bench: &Bench, said: impl Fn(Option<&str>) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let sessions = bench.proxy.sessions();
        let [one] = sessions.as_slice() else {
            panic!("{sessions:?}");
        };
        if said(one.unprotected.as_deref()) {
            return;
        }
        assert!(Instant::now() < deadline, "{:?}", one.unprotected);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the list of sessions calls the only one protected.
pub async fn protected(bench: &Bench) {
    until_said(bench, |why| why.is_none()).await;
}

/// Waits until all sessions have ended.
pub async fn alone(bench: &Bench) {
    let deadline = Instant::now() + PATIENCE;
    while !bench.proxy.sessions().is_empty() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// All rows of all statements, as text.
pub async fn rows(client: &Client, sql: &str) -> Vec<String> {
    let messages = client.simple_query(sql).await;
    let messages = messages.unwrap_or_else(|e| panic!("{sql}: {e:?}"));
    let row = |m: SimpleQueryMessage| match m {
        SimpleQueryMessage::Row(row) => {
            let values = (0..row.len()).map(|at| row.get(at).unwrap_or("null").to_owned());
            Some(values.collect::<Vec<_>>().join("|"))
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// The SQLSTATE that a statement is refused with.
pub async fn refused(client: &Client, sql: &str) -> String {
    let error = client.simple_query(sql).await.err();
    let code = error.as_ref().and_then(|e| e.code());
    code.map_or_else(|| format!("{error:?}"), |c| c.code().to_owned())
}
