//! A primary that is up and slow: its sessions go on elsewhere, and nothing goes round.

#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests are tests

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::*;
use helios_local::{InstanceStatus, LocalCluster, LocalStatus, OperationRecord};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio_postgres::Client;

/// Between two moves for latency.
const INTERVAL: Duration = Duration::from_secs(8);

const CONFIG: &str = r#"
[proxy]
listen_address = "127.0.0.1:0"
auth = "trust"

[backends]
service_user = "helios"

[migration_triggers]
on_high_latency = true
latency_threshold = "200ms"
latency_duration = "2s"
latency_interval = "8s"
"#;

/// A server that stands still for most of the time: up by every sign, and slow.
struct Slow {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Slow {
    fn make(instance: &InstanceStatus) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (until, instance) = (Arc::clone(&stop), instance.clone());
        let thread = std::thread::spawn(move || {
            while !until.load(Ordering::Relaxed) {
                signal_all(&instance, Signal::SIGSTOP);
                std::thread::sleep(Duration::from_millis(500));
                signal_all(&instance, Signal::SIGCONT);
                std::thread::sleep(Duration::from_millis(60));
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for Slow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

/// When an operation ended, in microseconds since 1970.
fn ended(record: &OperationRecord) -> u64 {
    let rejoin = |p: &&helios_cluster::PhaseDuration| p.phase != helios_cluster::Phase::Rejoin;
    let phases = record.phases.iter().filter(rejoin).map(|p| p.micros);
    record.started.0 + phases.sum::<u64>()
}

async fn results(client: &Client) -> Vec<(i32, String)> {
    let rows = client
        .query("SELECT n, note FROM result ORDER BY note", &[])
        .await
        .unwrap();
    rows.iter().map(|r| (r.get(0), r.get(1))).collect()
}

/// Makes the primary slow until it has been left.
async fn left(cluster: &LocalCluster, old: &InstanceStatus, before: &LocalStatus) -> LocalStatus {
    let slow = Slow::make(old);
    let after = until(cluster, "move away from a slow primary", |s| {
        s.phase == "steady" && s.epoch > before.epoch
    });
    let after = after.await;
    drop(slow);
    after
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_leave_a_slow_primary_and_do_not_go_round() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("proxy.toml");
    std::fs::write(&file, CONFIG).unwrap();
    let data = dir.path().join("data");
    let cluster = builder(&data)
        .proxy_config(Some(file))
        .start()
        .await
        .unwrap();
    let before = whole(&cluster).await;
    let old = primary(&before).clone();
    let writers = Writers::start(&cluster, 2).await;
    let open = connect(&cluster).await;
    open.batch_execute(
        "SET app.note = 'kept'; CREATE TEMP TABLE mine (n int); INSERT INTO mine VALUES (7); \
         CREATE TABLE result (n int, note text)",
    )
    .await
    .unwrap();
    open.batch_execute("BEGIN; INSERT INTO result SELECT n, 'begun' FROM mine")
        .await
        .unwrap();

    let after = left(&cluster, &old, &before).await;
    let first = after.operations.last().unwrap().clone();
    assert_ne!(after.primary.as_ref(), Some(&old.name));
    assert_eq!(first.kind, helios_cluster::OperationKind::Switchover);
    assert!(
        first.cause.starts_with("primary is slow: "),
        "{}",
        first.cause
    );
    open.batch_execute(
        "INSERT INTO result SELECT n, current_setting('app.note') FROM mine; COMMIT",
    )
    .await
    .unwrap();

    // The new one gets as slow. Commits go on where they are until the interval is over.
    let again = left(&cluster, primary(&after), &after).await;
    let since: Vec<_> = again
        .operations
        .iter()
        .filter(|o| o.id >= first.id)
        .collect();
    let [first, second] = since[..] else {
        panic!("{since:#?}");
    };
    assert!(
        second.cause.starts_with("primary is slow: "),
        "{}",
        second.cause
    );
    let apart = second.started.0.saturating_sub(ended(first));
    assert!(
        u128::from(apart) >= INTERVAL.as_micros(),
        "{apart} us apart"
    );

    whole(&cluster).await;
    writers.more(10).await;
    let notes = writers.stop().await;
    assert!(notes.errors.is_empty(), "{:?}", notes.errors);
    sound(&cluster, &notes).await;
    let rows = results(&open).await;
    assert_eq!(rows, [(7, "begun".to_owned()), (7, "kept".to_owned())]);
    cluster.shutdown().await;
}
