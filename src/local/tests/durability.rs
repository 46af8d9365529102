//! What commits wait for, and what a server that stands still does to them. Judged by the data.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test that cannot go on has failed

mod common;

use std::time::{Duration, Instant};

use common::{
    Writers, builder, crash, instance, is_whole, primary, processes, signal_all, sound, standbys,
    until, whole,
};
use helios_api::control::LostCommits;
use helios_local::{Durability, OperationKind};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Commits block rather than be lost, and the failover that follows is right.
#[tokio::test(flavor = "multi_thread")]
async fn required_durability_blocks_and_loses_nothing() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path())
        .durability(Durability::Required)
        .start()
        .await
        .unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;

    // The last standby is held down: nothing is acknowledged any more.
    let standby = standbys(&before)[0].name.clone();
    cluster.fence(standby.clone()).await.unwrap();
    until(&cluster, "stopped standby", |s| {
        instance(s, standby.as_str()).role == "none"
    })
    .await;
    // Whatever was confirmed before has been answered by now.
    let settled = quiet(&writers).await;
    // Much longer than a standby that is gone is waited for with "preferred".
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(writers.count(), settled, "acknowledged without a standby");
    let status = cluster.status().await;
    assert_eq!(status.synchronous, std::slice::from_ref(&standby));

    // The primary dies in that state. Nobody else holds what was acknowledged for certain, so it
    // is started again where it was, and still waits.
    crash(primary(&status));
    let after = until(&cluster, "restart", |s| {
        s.operations.last().is_some_and(|o| o.id == 1) && s.phase == "steady"
    });
    let after = after.await;
    assert_eq!(after.operations[0].kind, OperationKind::Restart);
    assert_eq!(writers.count(), quiet(&writers).await);

    // With the standby back they go on, and a crash moves the primary there.
    cluster.unfence(standby.clone()).await.unwrap();
    writers.more(20).await;
    let status = whole(&cluster).await;
    crash(primary(&status));
    let after = until(&cluster, "failover", |s| {
        s.epoch > status.epoch && is_whole(s)
    });
    let after = after.await;
    assert_eq!(after.primary, Some(standby));
    assert_eq!(after.operations.last().unwrap().lost, LostCommits::None);
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

/// The count once it has not moved for half a second.
async fn quiet(writers: &Writers) -> i64 {
    let deadline = Instant::now() + common::LIMIT;
    let mut last = (writers.count(), Instant::now());
    while last.1.elapsed() < Duration::from_millis(500) {
        assert!(Instant::now() < deadline, "commits go on");
        tokio::time::sleep(Duration::from_millis(10)).await;
        if writers.count() != last.0 {
            last = (writers.count(), Instant::now());
        }
    }
    last.0
}

/// The documented default: commits go on alone, and then nobody but the primary may be primary.
#[tokio::test(flavor = "multi_thread")]
async fn preferred_durability_goes_on_alone_and_is_never_overtaken() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;
    let standby = standbys(&before)[0].clone();
    cluster.fence(standby.name.clone()).await.unwrap();
    let alone = until(&cluster, "primary alone", |s| s.synchronous.is_empty()).await;
    writers.more(50).await;

    // The standby comes back just when the primary dies: it lacks what was acknowledged since.
    cluster.unfence(standby.name.clone()).await.unwrap();
    crash(primary(&alone));
    writers.more(20).await;
    let status = whole(&cluster).await;
    assert_eq!(status.primary, before.primary);
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

/// A frozen primary is invisible to TCP; silence tells.
///
/// Budget: the agent calls a server unresponsive that has not answered for 750 ms and the cluster
/// takes it for dead after 3 s of silence (`Settings::unresponsive_ms`), asked every 200 ms; the
/// standby's receiver agrees after 2 s without a message (`wal_receiver_timeout`), which lies
/// within. An immediate shutdown that a stopped process does not hear takes 250 ms, SIGKILL,
/// promotion and replay well under 1 s: 4.5 s. Twice that on a machine that is busy with other
/// tests, and as much again before clients notice that they go on: 18 s.
const FROZEN_BUDGET: Duration = Duration::from_secs(18);

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_primary_is_fenced_and_replaced() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;
    let frozen = processes(primary(&before));
    let began = Instant::now();
    signal_all(primary(&before), Signal::SIGSTOP);
    let after = until(&cluster, "failover", |s| {
        s.epoch > before.epoch && s.phase == "steady"
    });
    let after = after.await;
    writers.more(20).await;
    let took = began.elapsed();
    println!("frozen primary replaced after {took:?}");
    assert!(took < FROZEN_BUDGET, "{took:?}");
    assert_ne!(after.primary, before.primary);
    // Waking it up finds nobody: the fence had to kill it before another one was promoted.
    let data = dir.path().canonicalize().unwrap();
    let data = data.join(format!("instances/{}/data", primary(&before).name));
    for pid in &frozen {
        let alive = std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == data);
        assert!(!alive, "process {pid} of the old primary is still there");
        let _ = nix::sys::signal::kill(*pid, Signal::SIGCONT);
    }
    let status = whole(&cluster).await;
    writers.more(20).await;
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    assert_eq!(status.primary, after.primary);
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

/// Synchronous commits have no time-out of their own: a frozen standby would stop them for ever.
///
/// Bound: the primary drops the connection after 2 s (`wal_sender_timeout`), the cluster stops
/// waiting for the standby 2 s later (`Settings::standby_grace_ms`), each looked at every 250 ms:
/// 5 s, three times that on a busy machine.
const STANDBY_BUDGET: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread")]
async fn commits_go_on_without_a_frozen_standby() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::start(&cluster, 4).await;
    writers.more(20).await;
    let standby = standbys(&before)[0].clone();
    let began = Instant::now();
    signal_all(&standby, Signal::SIGSTOP);
    let stuck = quiet(&writers).await;
    writers.more(1).await;
    let took = began.elapsed();
    println!("commits went on after {took:?}, {stuck} before");
    assert!(took < STANDBY_BUDGET, "{took:?}");
    let status = cluster.status().await;
    assert_eq!(status.primary, before.primary);
    assert_eq!(status.epoch, before.epoch);
    // What is committed now is on the primary alone, and the standby must not take over with less.
    signal_all(&standby, Signal::SIGCONT);
    let status = whole(&cluster).await;
    assert_eq!(status.epoch, before.epoch);
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
