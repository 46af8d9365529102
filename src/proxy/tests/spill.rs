//! Journals that outgrow their memory go to disk, and transactions of any size survive a move.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt as _;
use helios_api::control::ReplayProgress;
use helios_proxy::engine::room::SpillOptions;
use helios_proxy::engine::shared::EngineOptions;
use helios_testkit::Bench;
use tokio_postgres::Client;

/// What a journal may hold in memory here.
const MEMORY: usize = 200_000;

async fn bench(folder: &Path, max_bytes: usize) -> Bench {
    let engine = EngineOptions {
        max_journal_bytes: MEMORY,
        spill: Some(Arc::new(SpillOptions {
            folder: folder.to_owned(),
            max_bytes,
            max_total_bytes: max_bytes,
        })),
        ..EngineOptions::default()
    };
    let bench = Bench::start(engine, "CREATE TABLE t (a int, b text)").await;
    let bench = bench.unwrap();
    bench.known().await.unwrap();
    bench
}

/// Rows `from..to`, each by itself.
async fn insert(client: &Client, from: i32, to: i32) {
    let insert = client.prepare("INSERT INTO t VALUES ($1, $2)").await;
    let insert = insert.unwrap();
    for n in from..to {
        let long = n.to_string().repeat(500);
        assert_eq!(client.execute(&insert, &[&n, &long]).await.unwrap(), 1);
    }
}

/// Everything that [`insert`] and [`copy`] have written, and nothing else, is there.
async fn holds(bench: &Bench, rows: i32) {
    let sql = "SELECT count(*) || ' ' || count(DISTINCT a) || ' ' || coalesce(max(a), 0) || ' ' \
               || count(*) FILTER (WHERE b <> repeat(a::text, 500)) FROM t";
    let found = bench.column(sql).await.unwrap();
    assert_eq!(found, [format!("{rows} {rows} {} 0", rows - 1)]);
}

/// What is over goes back: the driver's last messages may still be in flight.
async fn room_is_empty(bench: &Bench) {
    for _ in 0..200 {
        if bench.proxy.journal_bytes() + bench.proxy.journal_disk_bytes() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let (memory, disk) = (
        bench.proxy.journal_bytes(),
        bench.proxy.journal_disk_bytes(),
    );
    assert_eq!((memory, disk), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_of_many_statements_moves_and_survives_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(folder.path(), 64 << 20).await;
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    insert(&client, 0, 250).await;
    assert!(bench.proxy.journal_bytes() <= MEMORY);
    assert!(bench.proxy.journal_disk_bytes() > 250 * 500);
    assert_eq!(bench.proxy.sessions()[0].unprotected, None);
    bench.switchover().await.unwrap();
    insert(&client, 250, 300).await;
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    insert(&client, 300, 330).await;
    // What was replayed went to disk as well.
    assert!(bench.proxy.journal_bytes() <= MEMORY);
    assert!(bench.proxy.journal_disk_bytes() > 330 * 500);
    client.batch_execute("COMMIT").await.unwrap();
    holds(&bench, 330).await;
    room_is_empty(&bench).await;
    // And nothing that has a name was left.
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A transaction that is open for long has many small statements: fifty thousand fit into what a
/// journal may hold in memory by default, and are run again without a client's round trips.
#[tokio::test(flavor = "multi_thread")]
async fn fifty_thousand_statements_fit_into_memory_and_move() {
    let engine = EngineOptions::default();
    let limit = engine.max_journal_bytes;
    let mut bench = Bench::start(engine, "CREATE TABLE t (a int)")
        .await
        .unwrap();
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let insert = client.prepare("INSERT INTO t VALUES ($1)").await.unwrap();
    let numbers: Vec<i32> = (0..50_000).collect();
    for some in numbers.chunks(1000) {
        let all = some.iter().map(|n| client.execute_raw(&insert, [n]));
        futures_util::future::try_join_all(all).await.unwrap();
    }
    assert_eq!(bench.proxy.sessions()[0].unprotected, None);
    let held = bench.proxy.journal_bytes();
    assert!(held > 0 && held <= limit, "{held} bytes");
    assert_eq!(bench.proxy.journal_disk_bytes(), 0);
    let proxy = bench.proxy.clone();
    let watch = tokio::spawn(async move {
        let mut seen = Vec::new();
        while seen.is_empty() || proxy.sessions()[0].replay.is_some() {
            let session = proxy.sessions().remove(0);
            seen.extend(session.replay.map(|replay| (session.state, replay)));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        seen
    });
    bench.switchover().await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    let seen = watch.await.unwrap();
    // BEGIN, the statement's Parse, and what it ran.
    let whole = |(state, replay): &(String, ReplayProgress)| {
        state == "migrating" && replay.total == 50_002 && replay.done <= replay.total
    };
    assert!(seen.iter().all(whole), "{seen:?}");
    assert!(seen.is_sorted_by_key(|(_, replay)| replay.done), "{seen:?}");
    assert!(
        seen.iter().any(|(_, r)| 0 < r.done && r.done < r.total),
        "{seen:?}"
    );
    let found = bench.column("SELECT count(*) || ' ' || count(DISTINCT a) || ' ' || max(a) FROM t");
    assert_eq!(found.await.unwrap(), ["50000 50000 49999"]);
}

/// Copies rows `from..to`; `meanwhile` happens in the middle, when half of them were sent.
async fn copy(
    client: &Client,
    (from, to): (i32, i32),
    meanwhile: impl AsyncFnOnce(),
) -> Result<u64, tokio_postgres::Error> {
    let rows = |from: i32, to: i32| {
        let row = |n: i32| format!("{n}\t{}\n", n.to_string().repeat(500));
        let pieces: Vec<i32> = (from..to).collect();
        let piece = |ns: &[i32]| Bytes::from(ns.iter().map(|n| row(*n)).collect::<String>());
        pieces.chunks(20).map(piece).collect::<Vec<_>>()
    };
    let middle = from.midpoint(to);
    let sink = client.copy_in("COPY t FROM STDIN").await?;
    let mut sink = std::pin::pin!(sink);
    for piece in rows(from, middle) {
        sink.send(piece).await?;
    }
    meanwhile().await;
    for piece in rows(middle, to) {
        sink.send(piece).await?;
    }
    sink.finish().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_any_size_moves_and_survives_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(folder.path(), 256 << 20).await;
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    let in_the_middle = async || {
        bench.crash().await.unwrap();
        bench.resume().await.unwrap();
    };
    // 15 MB each.
    let copied = copy(&client, (0, 7000), in_the_middle).await.unwrap();
    assert_eq!(copied, 7000);
    assert!(bench.proxy.journal_bytes() <= MEMORY);
    assert!(bench.proxy.journal_disk_bytes() > 7000 * 1500);
    bench.switchover().await.unwrap();
    let planned = async || bench.switchover().await.unwrap();
    let copied = copy(&client, (7000, 14000), planned).await.unwrap();
    assert_eq!(copied, 7000);
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    holds(&bench, 14000).await;
    room_is_empty(&bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_over_the_limit_on_disk_is_unprotected_not_half_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = bench(folder.path(), 200_000).await;
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    insert(&client, 0, 250).await;
    let reason = bench.proxy.sessions()[0].unprotected.clone().unwrap();
    assert!(reason.contains("200000 bytes on disk"), "{reason}");
    assert_eq!(bench.proxy.journal_disk_bytes(), 0);
    bench.crash().await.unwrap();
    bench.resume().await.unwrap();
    let error = client.batch_execute("COMMIT").await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "40001");
    // The session goes on, and the next transaction is protected.
    client.batch_execute("BEGIN").await.unwrap();
    insert(&client, 0, 3).await;
    bench.switchover().await.unwrap();
    client.batch_execute("COMMIT").await.unwrap();
    holds(&bench, 3).await;
    room_is_empty(&bench).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_has_gone_costs_the_transaction_its_protection_alone() {
    let folder = tempfile::tempdir().unwrap();
    let bench = bench(&folder.path().join("gone"), 64 << 20).await;
    let client = bench.client().await.unwrap();
    client.batch_execute("BEGIN").await.unwrap();
    insert(&client, 0, 250).await;
    let reason = bench.proxy.sessions()[0].unprotected.clone().unwrap();
    assert!(reason.contains("gone"), "{reason}");
    client.batch_execute("COMMIT").await.unwrap();
    holds(&bench, 250).await;
    room_is_empty(&bench).await;
}
