//! Failovers of real clusters under clients that write, judged by the data: three instances,
//! durability, asynchronous replication, frozen servers.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test that cannot go on has failed

mod common;

use std::time::{Duration, Instant};

use common::{
    Writers, builder, compare, crash, direct, instance, is_whole, moved_when_ready, primary,
    signal_all, sound, standbys, streaming, until, whole,
};
use helios_api::control::LostCommits;
use helios_local::{InstanceStatus, LocalStatus, OperationKind};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread")]
async fn three_instances_switch_over_and_fail_over_twice_in_a_row() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).instances(3).start().await.unwrap();
    whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;
    let target = "pg-3".parse().unwrap();
    let operation = cluster.switchover(Some(target)).await.unwrap();
    assert_eq!(operation.to.as_str(), "pg-3");
    assert_eq!(operation.lost, LostCommits::None);
    writers.more(20).await;
    let before = whole(&cluster).await;

    // Two in a row: the second one while the first victim is still on its way back.
    crash(primary(&before));
    let after = until(&cluster, "failover", |s| {
        s.epoch > before.epoch && s.phase == "steady" && !s.synchronous.is_empty()
    });
    let after = after.await;
    crash(primary(&after));
    let last = until(&cluster, "second failover", |s| {
        s.operations.len() >= 3 && is_whole(s)
    })
    .await;
    writers.more(20).await;
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    for operation in &last.operations[1..3] {
        println!(
            "{:?} {:?} {:?}",
            operation.kind, operation.to, operation.phases
        );
        assert_eq!(operation.lost, LostCommits::None);
    }
    assert_eq!(last.operations[1].kind, OperationKind::Failover);
    let status = sound(&cluster, &notes).await;
    // A machine that is too slow to choose in time starts the old primary again.
    let promotions = last.operations.iter().filter(|o| o.from != o.to).count();
    assert_eq!(
        status.timeline.map(|timeline| timeline.0 as usize),
        Some(1 + promotions),
        "{:#?}",
        last.operations
    );
    cluster.shutdown().await;
}

/// The process that receives WAL on a standby.
async fn receiver(standby: &InstanceStatus) -> Pid {
    let sql = "select pid from pg_stat_activity where backend_type = 'walreceiver'";
    let row = direct(standby).await.query_one(sql, &[]).await.unwrap();
    Pid::from_raw(row.get(0))
}

/// Peers' bug: the target was chosen before the old primary had stopped, and what was acknowledged
/// in between was lost. Here the chosen one stops receiving the moment the move begins.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_11114_target_is_chosen_after_the_old_primary_has_stopped() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).instances(3).start().await.unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;

    let target = instance(&before, "pg-2").clone();
    let frozen = receiver(&target).await;
    let freeze = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        kill(frozen, Signal::SIGSTOP).unwrap();
    };
    let (moved, ()) = tokio::join!(cluster.switchover(Some(target.name.clone())), freeze);
    println!("switchover: {:?}", moved.map(|o| o.outcome));
    let _ = kill(frozen, Signal::SIGCONT);
    writers.more(20).await;
    let status = whole(&cluster).await;

    // A standby that stands still falls behind; commits go on with the other one, which is the
    // only one that may take over. The frozen one wakes up when the primary is dead.
    let slow = standbys(&status)[0].clone();
    let other = standbys(&status)[1].name.clone();
    signal_all(&slow, Signal::SIGSTOP);
    let alone = until(&cluster, "set without the frozen standby", |s| {
        s.synchronous == std::slice::from_ref(&other)
    });
    alone.await;
    writers.more(50).await;
    crash(primary(&status));
    signal_all(&slow, Signal::SIGCONT);
    let after = until(&cluster, "failover", |s| {
        s.epoch > status.epoch && s.phase == "steady"
    });
    assert_eq!(after.await.primary, Some(other));
    writers.more(20).await;
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

/// Peers' bug: without synchronous replication a failover loses what was acknowledged, and says
/// nothing. It still may; but it is said, and only when it may be so.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_8790_commits_that_may_be_lost_are_marked() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).synchronous(false).start();
    let cluster = cluster.await.unwrap();
    let before = streaming(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;
    let standby = standbys(&before)[0].clone();
    // Nothing reaches the standby any more, and clients are told of commits all the same.
    let frozen = receiver(&standby).await;
    kill(frozen, Signal::SIGSTOP).unwrap();
    writers.more(50).await;
    crash(primary(&before));
    kill(frozen, Signal::SIGKILL).unwrap();
    let after = until(&cluster, "failover", |s| {
        s.epoch > before.epoch && s.phase == "steady"
    });
    let after = after.await;
    let notes = writers.stop().await;
    let (lost, twice) = compare(&after, &notes).await;
    println!("lost {} of {}", lost.len(), notes.acknowledged.len());
    assert!(!lost.is_empty() && twice.is_empty(), "{lost:?} {twice:?}");
    assert_eq!(after.operations.last().unwrap().lost, LostCommits::Possible);

    // Nothing written, nothing lost, nothing said.
    let before = streaming(&cluster).await;
    let count = common::ledger(primary(&before)).await.len();
    level(&before).await;
    crash(primary(&before));
    let after = until(&cluster, "second failover", |s| {
        s.epoch > before.epoch && s.phase == "steady"
    });
    let after = after.await;
    assert_eq!(after.operations.last().unwrap().lost, LostCommits::None);
    assert_eq!(common::ledger(primary(&after)).await.len(), count);

    // A clean stop sends everything first.
    let writers = Writers::go_on(&cluster.connection_string(), 4);
    writers.more(20).await;
    streaming(&cluster).await;
    let moved = moved_when_ready(&cluster).await;
    assert_eq!(moved.lost, LostCommits::None);
    writers.more(20).await;
    let notes = writers.stop().await;
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

/// An open transaction that has read a commit which the crash loses is aborted; one that has read
/// nothing of it goes on.
#[tokio::test(flavor = "multi_thread")]
async fn what_read_lost_commits_is_aborted() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).synchronous(false).start();
    let cluster = cluster.await.unwrap();
    let admin = common::connect(&cluster).await;
    let tables = "create table t as select 1 as v; create table u as select 7 as v";
    admin.batch_execute(tables).await.unwrap();
    let before = streaming(&cluster).await;
    level(&before).await;
    let frozen = receiver(standbys(&before)[0]).await;
    kill(frozen, Signal::SIGSTOP).unwrap();
    // Acknowledged, and on the primary alone.
    admin.batch_execute("update t set v = 2").await.unwrap();
    let (saw, other) = (
        common::connect(&cluster).await,
        common::connect(&cluster).await,
    );
    let read = async |client: &tokio_postgres::Client, table: &str| -> i32 {
        client.batch_execute("begin").await.unwrap();
        let sql = format!("select v from {table}");
        client.query_one(&sql, &[]).await.unwrap().get(0)
    };
    assert_eq!(read(&saw, "t").await, 2);
    assert_eq!(read(&other, "u").await, 7);
    crash(primary(&before));
    kill(frozen, Signal::SIGKILL).unwrap();
    let after = until(&cluster, "failover", |s| {
        s.epoch > before.epoch && s.phase == "steady"
    })
    .await;
    assert_eq!(after.operations.last().unwrap().lost, LostCommits::Possible);
    let there = direct(primary(&after)).await;
    let v: i32 = there
        .query_one("select v from t", &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(v, 1, "the commit was not lost");
    let error = saw
        .batch_execute("insert into u values (2)")
        .await
        .unwrap_err();
    let error = error.as_db_error().unwrap();
    assert_eq!(error.code().code(), "40001");
    let detail = error.detail().unwrap_or_default();
    assert!(detail.contains("may have been lost"), "{detail}");
    saw.batch_execute("rollback").await.unwrap();
    other
        .batch_execute("insert into u values (8); commit")
        .await
        .unwrap();
    let rows = there.query("select v from u order by v", &[]).await;
    let values: Vec<i32> = rows.unwrap().iter().map(|r| r.get(0)).collect();
    assert_eq!(values, [7, 8]);
    cluster.shutdown().await;
}

/// Waits until the standbys have everything that the primary has written; the primary is quiet.
async fn level(status: &LocalStatus) {
    let head = direct(primary(status)).await;
    // Autovacuum and the like would go on writing.
    head.batch_execute("checkpoint").await.unwrap();
    for standby in standbys(status) {
        let there = direct(standby).await;
        let deadline = Instant::now() + common::LIMIT;
        loop {
            let row = head.query_one("select pg_current_wal_flush_lsn()::text", &[]);
            let end: String = row.await.unwrap().get(0);
            let sql = format!("select pg_last_wal_replay_lsn() >= '{end}'");
            if there.query_one(&sql, &[]).await.unwrap().get(0) {
                break;
            }
            assert!(Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
