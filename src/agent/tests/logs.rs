//! The write-ahead log on a volume of its own, on real servers: every way that a data directory
//! comes into being leaves its log there.

#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

mod common;

use std::path::{Path, PathBuf};

use common::{At, FIRST, Node, crash, folder, insert, shows};
use helios_agent::AgentConfig;
use helios_api::agent::{AgentCommand, InstanceState, Rejoin, StopMode};

fn config(base: &Path, name: &str) -> AgentConfig {
    let mut config = common::config(base, name);
    let volume = base.join(format!("{name}-wal"));
    std::fs::create_dir(&volume).unwrap();
    if let Some(user) = &config.run_as {
        std::os::unix::fs::chown(&volume, Some(user.uid), Some(user.gid)).unwrap();
    }
    config.wal_dir = Some(volume.join("pg"));
    config
}

/// The only folder on the volume, which `pg_wal` leads to and which holds the log.
fn log(node: &Node) -> PathBuf {
    let link = std::fs::read_link(node.config.data_dir.join("pg_wal")).unwrap();
    let volume = node.config.wal_dir.as_ref().unwrap();
    let all: Vec<_> = std::fs::read_dir(volume)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(all, std::slice::from_ref(&link));
    assert!(!segments(&link).is_empty());
    link
}

fn segments(log: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(log).unwrap().map(|e| e.unwrap().path());
    entries.filter(|path| path.is_file()).collect()
}

/// Commits on `a` what `b` does not have, kills it, and promotes `b`.
async fn part(a: &Node, b: &Node, epoch: u64) -> At {
    b.command(epoch, AgentCommand::StopReceiver).await;
    let lost = a.sql().await;
    lost.batch_execute("insert into t select 1000 + i from generate_series(1, 500) i")
        .await
        .unwrap();
    crash(a);
    a.reach(|s| matches!(s, InstanceState::Stopped { crashed: true, .. }))
        .await;
    At::from(&b.promote(epoch).await.0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_cloned_rewound_and_cloned_again() {
    let dir = folder();
    let a = Node::run(config(dir.path(), "a")).await;
    let b = Node::run(config(dir.path(), "b")).await;
    a.command(1, AgentCommand::Bootstrap).await;
    assert_eq!(b.follow(1, &a, &FIRST).await, Rejoin::Cloned);
    let sql = a.sql().await;
    sql.batch_execute("create table t (n int)").await.unwrap();
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    let (of_a, of_b) = (log(&a), log(&b));

    let at = part(&a, &b, 2).await;
    insert(&b, 2).await;
    assert_eq!(a.follow(2, &b, &at).await, Rejoin::Rewound);
    shows(&a, &[1, 2]).await;
    assert_eq!((log(&a), log(&b)), (of_a.clone(), of_b));

    let at = part(&b, &a, 3).await;
    // What pg_rewind would read is gone: it fails, and there is a fresh copy with a log of its own.
    let broken = log(&b);
    for segment in segments(&broken) {
        std::fs::write(segment, vec![0; 1 << 20]).unwrap();
    }
    insert(&a, 3).await;
    assert_eq!(b.follow(3, &a, &at).await, Rejoin::Cloned);
    shows(&b, &[1, 2, 3]).await;
    log(&b);

    // The volume is lost, and an empty one is in its place.
    let stop = AgentCommand::Fence {
        mode: StopMode::Fast,
    };
    b.command(3, stop).await;
    std::fs::remove_dir_all(b.config.wal_dir.as_ref().unwrap()).unwrap();
    assert_eq!(b.follow(3, &a, &at).await, Rejoin::Cloned);
    shows(&b, &[1, 2, 3]).await;
    log(&b);

    // A switchover back: whole enough to take over.
    a.command(
        3,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    let at = At::from(&b.promote(4).await.0);
    assert_eq!(a.follow(4, &b, &at).await, Rejoin::Direct);
    insert(&b, 4).await;
    shows(&a, &[1, 2, 3, 4]).await;
    assert_eq!(log(&a), of_a);
    a.stop().await;
    b.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_primary_whose_log_is_lost_or_elsewhere_does_not_start() {
    let dir = folder();
    let a = Node::run(config(dir.path(), "a")).await;
    a.command(1, AgentCommand::Bootstrap).await;
    let stop = AgentCommand::Fence {
        mode: StopMode::Fast,
    };
    a.command(1, stop.clone()).await;
    let (real, away) = (log(&a), dir.path().join("away"));
    std::fs::rename(&real, &away).unwrap();
    let refused = a.try_command(2, AgentCommand::StartPrimary).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("another one"), "{error}");
    // Nothing was made in its place.
    assert!(!real.exists());
    let link = a.config.data_dir.join("pg_wal");
    std::fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink(&away, &link).unwrap();
    let refused = a.try_command(2, AgentCommand::StartPrimary).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("leads to"), "{error}");
    std::fs::remove_file(&link).unwrap();
    std::fs::rename(&away, &real).unwrap();
    std::os::unix::fs::symlink(&real, &link).unwrap();
    a.command(2, AgentCommand::StartPrimary).await;
    a.stop().await;
}
