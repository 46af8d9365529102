//! Instances that never come up, disks that are full, data that are gone: what is said, what goes
//! on, and what a person can do. Judged by the data.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test that cannot go on has failed

mod common;

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{
    Notes, Obstacle, Writers, builder, connect, crash, instance, is_whole, ledger, primary, sound,
    until, whole,
};
use helios_api::control::LostCommits;
use helios_local::client::LocalClient;
use helios_local::{LocalCluster, LocalError, LocalStatus, OperationKind};
use tempfile::TempDir;

fn data(dir: &Path, name: &str) -> PathBuf {
    dir.join("instances").join(name).join("data")
}

async fn create_ledger(cluster: &LocalCluster) {
    let sql = "create table ledger (id bigint not null)";
    connect(cluster).await.batch_execute(sql).await.unwrap();
}

async fn trouble(cluster: &LocalCluster, name: &str, says: &str) -> LocalStatus {
    let said = |s: &LocalStatus| instance(s, name).trouble.clone().unwrap_or_default();
    let status = until(cluster, says, |s| said(s).contains(says)).await;
    println!("{name}: {}", said(&status));
    status
}

/// Some commits, now.
async fn commits(cluster: &LocalCluster) -> Notes {
    let writers = Writers::go_on(&cluster.connection_string(), 2);
    writers.more(10).await;
    writers.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_cluster_that_cannot_start_says_why_at_once() {
    let dir = TempDir::new().unwrap();
    let wrong = builder(dir.path())
        .parameter("shared_buffers", "banana")
        .start_timeout(Duration::from_secs(250));
    let error = wrong.start().await.unwrap_err();
    let text = error.to_string();
    println!("{text}");
    assert!(matches!(error, LocalError::NotUp { .. }));
    for part in [
        "\"pg-1\"",
        "invalid value for parameter \"shared_buffers\"",
        "postgres.log",
        "hint: ",
    ] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    assert!(
        !text.contains("have passed"),
        "waited for the limit: {text}"
    );
    // Nothing half-made is in the way.
    let cluster = builder(dir.path()).start().await.unwrap();
    whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_that_cannot_be_saved_refuses_what_is_asked() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    create_ledger(&cluster).await;
    let before = whole(&cluster).await;
    // In the way of the next save, for root too.
    let obstacle = Obstacle::put(dir.path());
    let error = cluster.switchover(None).await.unwrap_err();
    println!("{error}");
    assert!(matches!(error, LocalError::Refused(_)));
    assert!(error.to_string().contains("could not be saved"), "{error}");
    let after = cluster.status().await;
    assert_eq!(
        (after.epoch, &after.primary),
        (before.epoch, &before.primary)
    );
    commits(&cluster).await;
    obstacle.remove();
    let moved = cluster.switchover(None).await.unwrap();
    assert_ne!(Some(moved.to), before.primary);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_does_not_come_up_holds_nobody_else_up() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    create_ledger(&cluster).await;
    whole(&cluster).await;
    cluster.shutdown().await;

    // A stranger on the standby's socket.
    let socket = helios_local::Layout::new(dir.path())
        .instance_sockets(&"pg-2".parse().unwrap())
        .join(".s.PGSQL.5432");
    let _ = std::fs::remove_file(&socket);
    let stranger = UnixListener::bind(&socket).unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    trouble(&cluster, "pg-2", "another server listens").await;
    let mut notes = commits(&cluster).await;
    drop(stranger);
    let status = whole(&cluster).await;
    assert_eq!(instance(&status, "pg-2").trouble, None);
    cluster.shutdown().await;

    // Rights that PostgreSQL does not accept.
    let rights = |mode| {
        let mode = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(data(dir.path(), "pg-2"), mode).unwrap();
    };
    rights(0o777);
    let cluster = builder(dir.path()).start().await.unwrap();
    trouble(&cluster, "pg-2", "invalid permissions").await;
    notes
        .acknowledged
        .extend(commits(&cluster).await.acknowledged);
    rights(0o700);
    let status = whole(&cluster).await;
    assert_eq!(status.primary.as_ref().unwrap().as_str(), "pg-1");
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_primary_whose_data_are_gone_is_replaced_by_itself_when_nothing_can_be_lost() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    create_ledger(&cluster).await;
    whole(&cluster).await;
    let notes = commits(&cluster).await;
    cluster.shutdown().await;
    // Everything is stopped: the standby has nobody to follow.
    std::fs::remove_dir_all(data(dir.path(), "pg-1")).unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    let status = whole(&cluster).await;
    assert_eq!(status.primary.as_ref().unwrap().as_str(), "pg-2");
    let operation = status.operations.last().unwrap();
    assert_eq!(operation.kind, OperationKind::Failover);
    assert_eq!(operation.lost, LostCommits::None);
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_lose_commits_takes_a_persons_word() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).start().await.unwrap();
    create_ledger(&cluster).await;
    whole(&cluster).await;
    let kept = commits(&cluster).await;
    let refusal = cluster.failover_accepting_loss().await.unwrap_err();
    assert!(refusal.to_string().contains("is up"), "{refusal}");
    let standby: helios_api::InstanceName = "pg-2".parse().unwrap();
    cluster.fence(standby.clone()).await.unwrap();
    let alone = until(&cluster, "primary alone", |s| s.synchronous.is_empty()).await;
    let lost = commits(&cluster).await;
    crash(primary(&alone));
    std::fs::remove_dir_all(data(dir.path(), "pg-1")).unwrap();
    // The standby is back, and lacks what was acknowledged without it: nobody decides that.
    let control = LocalClient::new(dir.path());
    control.unfence(&standby).await.unwrap();
    until(&cluster, "standby", |s| {
        instance(s, "pg-2").role == "standby"
    })
    .await;
    let status = cluster.status().await;
    assert_eq!(status.primary.as_ref().unwrap().as_str(), "pg-1");
    assert_eq!(status.phase, "restart");
    assert!(instance(&status, "pg-1").trouble.is_some(), "{status:#?}");

    let operation = control.failover_accepting_loss(|_| ()).await.unwrap();
    assert_eq!(operation.to, standby);
    assert_eq!(operation.lost, LostCommits::Possible);
    assert!(operation.cause.starts_with("forced"), "{}", operation.cause);
    let status = whole(&cluster).await;
    let held = ledger(primary(&status)).await;
    assert!(kept.acknowledged.iter().all(|id| held.contains(id)));
    assert!(!lost.acknowledged.iter().any(|id| held.contains(id)));
    let more = commits(&cluster).await;
    sound(&cluster, &more).await;
    cluster.shutdown().await;
}

/// A small file system on an instance's folder; `None`: not permitted here.
struct Small(PathBuf);

impl Small {
    fn mount(folder: &Path) -> Option<Self> {
        Self::mount_of(folder, "size=120m,mode=755")
    }

    fn mount_of(folder: &Path, options: &str) -> Option<Self> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "none"])
            .arg(folder)
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(folder.to_owned()));
        }
        let _ = writeln!(
            std::io::stderr(),
            "skipped: mounting a small file system needs root"
        );
        None
    }

    fn resize(&self, options: &str) {
        let options = format!("remount,{options}");
        let mut mount = Command::new("mount");
        mount.args(["-o", &options]).arg(&self.0);
        assert!(mount.status().unwrap().success());
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Takes all the room there is.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.filler()).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_at_initdb_is_said_and_leaves_nothing_half_made() {
    let dir = TempDir::new().unwrap();
    let Some(small) = Small::mount_of(dir.path(), "size=12m,mode=755") else {
        return;
    };
    let new = builder(dir.path()).instances(1);
    let error = new.start().await.unwrap_err();
    let text = error.to_string();
    println!("{text}");
    for part in ["\"pg-1\"", "initdb", "No space left on device"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    assert!(
        !text.contains("have passed"),
        "waited for the limit: {text}"
    );
    assert!(!data(dir.path(), "pg-1").join("PG_VERSION").exists());
    small.resize("size=300m");
    let cluster = builder(dir.path()).instances(1).start().await.unwrap();
    create_ledger(&cluster).await;
    let notes = commits(&cluster).await;
    let held = ledger(primary(&cluster.status().await)).await;
    assert!(notes.acknowledged.iter().all(|id| held.contains(id)));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_of_another_version_is_refused_and_left_alone() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path()).instances(1).start().await.unwrap();
    create_ledger(&cluster).await;
    let notes = commits(&cluster).await;
    cluster.shutdown().await;
    let version = data(dir.path(), "pg-1").join("PG_VERSION");
    let own = std::fs::read_to_string(&version).unwrap();
    std::fs::write(&version, "9.6\n").unwrap();
    let error = builder(dir.path()).instances(1).start().await.unwrap_err();
    let text = error.to_string();
    println!("{text}");
    for part in ["was created by PostgreSQL 9.6", "of version", "PG_BINDIR"] {
        assert!(text.contains(part), "{part} is missing in {text}");
    }
    std::fs::write(&version, own).unwrap();
    let cluster = builder(dir.path()).instances(1).start().await.unwrap();
    let held = ledger(primary(&cluster.status().await)).await;
    assert!(notes.acknowledged.iter().all(|id| held.contains(id)));
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_fails_over_and_blocks_nothing_once_there_is_room() {
    let dir = TempDir::new().unwrap();
    let cluster = builder(dir.path())
        .parameter("wal_keep_size", "4MB")
        .parameter("max_wal_size", "16MB")
        .parameter("min_wal_size", "4MB")
        .start()
        .await
        .unwrap();
    create_ledger(&cluster).await;
    let standby: helios_api::InstanceName = "pg-2".parse().unwrap();
    whole(&cluster).await;
    cluster.fence(standby.clone()).await.unwrap();
    until(&cluster, "fence", |s| instance(s, "pg-2").role == "none").await;
    let home = dir.path().join("instances/pg-2");
    let record = std::fs::read(home.join("agent.json")).unwrap();
    let Some(small) = Small::mount(&home) else {
        return cluster.shutdown().await;
    };
    std::fs::write(home.join("agent.json"), record).unwrap();

    // The clone does not fit: it is said, the half of it is gone, the primary goes on.
    small.fill();
    cluster.unfence(standby.clone()).await.unwrap();
    trouble(&cluster, "pg-2", "No space left").await;
    let mut notes = commits(&cluster).await;
    assert!(!data(dir.path(), "pg-2").exists());
    std::fs::remove_file(small.filler()).unwrap();
    whole(&cluster).await;

    // It becomes primary, and its disk fills up under clients that write.
    cluster.switchover(Some(standby.clone())).await.unwrap();
    let before = whole(&cluster).await;
    let writers = Writers::go_on(&cluster.connection_string(), 3);
    writers.more(10).await;
    let server = common::direct(primary(&before)).await;
    small.fill();
    // Tables cannot grow, which is an error and no more; without room for WAL the server dies.
    let wal = "select pg_logical_emit_message(false, 'test', repeat('x', 500000))";
    let deadline = Instant::now() + common::LIMIT;
    while server.batch_execute(wal).await.is_ok() || !server.is_closed() {
        assert!(Instant::now() < deadline, "there is still room");
    }
    let after = until(&cluster, "failover", |s| s.epoch > before.epoch).await;
    println!("{}", after.operations.last().map_or("", |o| &o.cause));
    writers.more(20).await;
    assert_eq!(cluster.status().await.primary.unwrap().as_str(), "pg-1");
    let deadline = Instant::now() + common::LIMIT;
    loop {
        let status = cluster.status().await;
        if let Some(trouble) = &status.instances[1].trouble {
            break println!("{trouble}");
        }
        assert!(Instant::now() < deadline, "nothing is said: {status:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::remove_file(small.filler()).unwrap();
    let status = until(&cluster, "whole cluster", is_whole).await;
    assert_eq!(instance(&status, "pg-2").trouble, None);
    let more = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        more.acknowledged.len(),
        more.errors
    );
    notes.acknowledged.extend(more.acknowledged);
    sound(&cluster, &notes).await;
    cluster.shutdown().await;
}
