//! What goes wrong around an instance: its agent dies, its directory is not what it should be, its
//! port is taken, its disk is full, it freezes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test fails by panicking

mod common;

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{
    FIRST, LIMIT, Node, config, crash, folder, insert, kill_instance, numbers, pair, postmaster,
    processes, shows, wait_for,
};
use helios_agent::client::{AgentClient, ClientError};
use helios_agent::record::RecordFile;
use helios_agent::{AgentConfig, AgentFailure};
use helios_api::Epoch;
use helios_api::agent::{AgentCommand, AgentError, AgentRequest, InstanceState, StopMode};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio_util::sync::CancellationToken;

/// An agent in a process of its own; it and its instance are killed on drop.
struct Process {
    child: Child,
    config: AgentConfig,
    client: AgentClient,
}

impl Process {
    async fn start(config: &AgentConfig) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "agent_process", "--nocapture"])
            .env("AGENT_CONFIG", serde_json::to_string(config).unwrap())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap();
        let client = AgentClient::new(&config.control_socket);
        let process = Self {
            child,
            config: config.clone(),
            client,
        };
        wait_for(|| async { process.client.state().await.is_ok() }).await;
        process
    }

    async fn command(&self, epoch: u64, command: AgentCommand) {
        let epoch = Epoch(epoch);
        let request = AgentRequest { epoch, command };
        self.client.command(request, LIMIT).await.unwrap();
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        kill_instance(&self.config);
    }
}

/// Not a test: what [`Process`] runs.
#[tokio::test]
#[ignore = "run by the other tests as a process"]
async fn agent_process() {
    let Ok(text) = std::env::var("AGENT_CONFIG") else {
        return;
    };
    let config = serde_json::from_str(&text).unwrap();
    Box::pin(helios_agent::run(config, CancellationToken::new()))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_agent_is_succeeded_by_one_that_knows() {
    let dir = folder();
    let config = config(dir.path(), "a");
    let mut first = Process::start(&config).await;
    first.command(3, AgentCommand::Bootstrap).await;
    let running = postmaster(&config);
    first.kill();
    assert!(processes(&config).contains(&running));
    // The running postmaster is taken over, and its end is noticed.
    let mut second = Process::start(&config).await;
    assert_eq!(postmaster(&config), running);
    let mut state = second.client.state().await.unwrap();
    assert_eq!(state.epoch, Epoch(3));
    while !matches!(state.instance, InstanceState::Primary { .. }) {
        state = second.client.watch(state.revision).await.unwrap();
    }
    kill(Pid::from_raw(running), Signal::SIGKILL).unwrap();
    while !matches!(state.instance, InstanceState::Stopped { crashed: true, .. }) {
        state = second.client.watch(state.revision).await.unwrap();
    }
    assert!(processes(&config).is_empty());
    second.command(3, AgentCommand::StartPrimary).await;
    let running = postmaster(&config);
    // A fence outlives the agent that was told of it: whatever still runs is killed.
    second.kill();
    let path = config.data_dir.parent().unwrap().join("agent.json");
    let (mut file, record) = RecordFile::open::<serde_json::Value>(path).unwrap();
    let mut record = record.unwrap();
    record["fenced_at"] = 3.into();
    file.write(&record).unwrap();
    let third = Process::start(&config).await;
    let state = third.client.state().await.unwrap();
    assert!(state.fenced);
    assert!(
        matches!(state.instance, InstanceState::Stopped { .. }),
        "{state:?}"
    );
    assert!(!processes(&config).contains(&running));
    // A second agent on the same directory is turned away.
    let other = Box::pin(helios_agent::run(config.clone(), CancellationToken::new())).await;
    assert!(
        matches!(other, Err(AgentFailure::AlreadyRunning(_))),
        "{other:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_whose_parent_has_gone_stops_its_server() {
    let dir = folder();
    let mut config = config(dir.path(), "a");
    config.parent_watch = true;
    let mut process = Process::start(&config).await;
    process.command(1, AgentCommand::Bootstrap).await;
    drop(process.child.stdin.take());
    let began = Instant::now();
    while process.child.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(processes(&config).is_empty());
    assert!(!config.control_socket.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_is_known_at_once_and_survived() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    let state = a.state().await;
    let watching = tokio::spawn({
        let client = a.client.clone();
        let mut revision = state.revision;
        async move {
            loop {
                let state = client.watch(revision).await.unwrap();
                if let InstanceState::Stopped { crashed, .. } = state.instance {
                    return (crashed, Instant::now());
                }
                revision = state.revision;
            }
        }
    });
    let began = Instant::now();
    crash(&a);
    let (crashed, at) = watching.await.unwrap();
    assert!(crashed);
    println!("crash known after {:?}", at - began);
    a.command(1, AgentCommand::StartPrimary).await;
    shows(&b, &[1]).await;
    assert_eq!(numbers(&a).await, [1]);
    insert(&a, 2).await;
    shows(&b, &[1, 2]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_server_is_unresponsive_and_can_be_fenced() {
    let dir = folder();
    let a = Node::start(dir.path(), "a").await;
    a.command(1, AgentCommand::Bootstrap).await;
    a.reach(|s| matches!(s, InstanceState::Primary { .. }))
        .await;
    for pid in processes(&a.config) {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    }
    a.reach(|s| matches!(s, InstanceState::Unresponsive { .. }))
        .await;
    let began = Instant::now();
    a.command(
        1,
        AgentCommand::Fence {
            mode: StopMode::Immediate,
        },
    )
    .await;
    println!("frozen server fenced after {:?}", began.elapsed());
    // Killed when the fence is answered, gone when anything else is.
    let nothing = a.try_command(1, AgentCommand::Checkpoint).await;
    assert!(nothing.is_err(), "{nothing:?}");
    assert!(processes(&a.config).is_empty());
}

async fn fails(node: &Node, command: AgentCommand, says: &str) {
    match node.try_command(1, command).await {
        Err(ClientError::Agent(
            error @ (AgentError::Refused { .. } | AgentError::Failed { .. }),
        )) => {
            let text = error.to_string();
            println!("{text}");
            assert!(text.contains(says), "{text}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn directories_that_are_not_ours_are_left_alone() {
    let dir = folder();
    let a = Node::start(dir.path(), "a").await;
    let data = &a.config.data_dir;
    std::fs::create_dir(data).unwrap();
    std::fs::write(data.join("holiday.jpg"), "x").unwrap();
    fails(&a, AgentCommand::Bootstrap, "not a data directory").await;
    std::fs::write(data.join("PG_VERSION"), "9\n").unwrap();
    fails(&a, AgentCommand::Bootstrap, "is of PostgreSQL 9").await;
    fails(&a, AgentCommand::StartPrimary, "pg_upgrade").await;
    assert!(data.join("holiday.jpg").exists());

    let mut wrong = config(dir.path(), "b");
    wrong.bin_dir = dir.path().to_owned();
    let failure = Box::pin(helios_agent::run(wrong, CancellationToken::new())).await;
    let text = failure.unwrap_err().to_string();
    println!("{text}");
    assert!(text.contains("bin_dir"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clusters_data_is_not_overwritten() {
    let dir = folder();
    let a = Node::start(dir.path(), "a").await;
    let b = Node::start(dir.path(), "b").await;
    a.command(1, AgentCommand::Bootstrap).await;
    b.command(1, AgentCommand::Bootstrap).await;
    b.command(
        1,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    fails(&b, common::follow(&a, &FIRST), "another cluster").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_named() {
    let dir = folder();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut config = config(dir.path(), "a");
    config.port = taken.local_addr().unwrap().port();
    config.listen_addresses = vec!["127.0.0.1".into()];
    let a = Node::run(config).await;
    fails(&a, AgentCommand::Bootstrap, "could not listen on port").await;
    assert!(matches!(
        a.state().await.instance,
        InstanceState::Stopped { .. }
    ));
    drop(taken);
    a.command(1, AgentCommand::Bootstrap).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_at_initdb_leaves_nothing_behind() {
    let dir = folder();
    let config = config(dir.path(), "a");
    let home = config.data_dir.parent().unwrap().to_owned();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=8m,mode=755", "none"])
        .arg(&home)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        let _ = writeln!(
            std::io::stderr(),
            "skipped: mounting a small file system needs root"
        );
        return;
    }
    let _unmount = Unmount(home.clone());
    if let Some(user) = &config.run_as {
        std::os::unix::fs::chown(&home, Some(user.uid), Some(user.gid)).unwrap();
    }
    let a = Node::run(config).await;
    fails(&a, AgentCommand::Bootstrap, "No space left on device").await;
    assert_eq!(a.state().await.instance, InstanceState::Empty);
    assert!(!home.join("data.new").exists() && !home.join("data").exists());
    let grown = Command::new("mount")
        .args(["-o", "remount,size=200m"])
        .arg(&home)
        .status();
    assert!(grown.unwrap().success());
    a.command(1, AgentCommand::Bootstrap).await;
    a.stop().await;
}

struct Unmount(std::path::PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_overtakes_a_clone() {
    let dir = folder();
    let a = Node::start(dir.path(), "a").await;
    let b = Node::start(dir.path(), "b").await;
    a.command(1, AgentCommand::Bootstrap).await;
    let follow = common::follow(&a, &FIRST);
    let cloning = b.try_command(1, follow.clone());
    let fencing = async {
        b.reach(|s| matches!(s, InstanceState::Starting { step } if step == "base backup"))
            .await;
        b.command(
            1,
            AgentCommand::Fence {
                mode: StopMode::Fast,
            },
        )
        .await
    };
    let (cloned, _) = tokio::join!(cloning, fencing);
    assert!(
        matches!(cloned, Err(ClientError::Agent(AgentError::Failed { .. }))),
        "{cloned:?}"
    );
    assert_eq!(b.state().await.instance, InstanceState::Empty);
    b.command(1, follow).await;
    assert!(b.state().await.fenced);
    assert!(b.try_command(1, AgentCommand::Promote).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_without_a_primary_is_quiet_and_finds_it_again() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    a.command(
        1,
        AgentCommand::Fence {
            mode: StopMode::Fast,
        },
    )
    .await;
    let log = b.config.log_file();
    let lines = || std::fs::read_to_string(&log).unwrap().lines().count();
    // It looks often at first, for the sake of a primary that is only restarted.
    let conf = b.config.data_dir.join("helios-dynamic.conf");
    let hushed = || {
        std::fs::read_to_string(&conf)
            .unwrap()
            .contains("wal_retrieve_retry_interval")
    };
    wait_for(|| async { hushed() }).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = lines();
    tokio::time::sleep(Duration::from_secs(3)).await;
    let written = lines() - before;
    // Two tries of two or three lines; every 10 ms it would be 600.
    assert!(written < 30, "{written} lines in 3 s");
    a.command(2, AgentCommand::StartPrimary).await;
    insert(&a, 2).await;
    shows(&b, &[1, 2]).await;
    wait_for(|| async { !hushed() }).await;
    a.stop().await;
    b.stop().await;
}

/// The state letter of a process (`proc_pid_stat(5)`); `None` when it is gone.
fn letter(pid: i32) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

/// The worst that can happen to processes that were halted: somebody wakes them up. A commit that no
/// standby has confirmed is told to nobody even so, and they are gone soon without a command.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halted_server_acknowledges_nothing_though_somebody_wakes_it_up() {
    let dir = folder();
    let (a, b) = pair(dir.path()).await;
    let synchronous = AgentCommand::SetSynchronous {
        standbys: vec![b.config.name.clone()],
        number: 1,
    };
    a.command(1, synchronous).await;
    insert(&a, 1).await;
    shows(&b, &[1]).await;
    // From here on nobody confirms.
    b.command(1, AgentCommand::StopReceiver).await;
    let (client, other) = (a.sql().await, a.sql().await);
    let commit = tokio::spawn(async move { client.execute("insert into t values (2)", &[]).await });
    let watcher = a.sql().await;
    wait_for(|| async {
        let sql = "select count(*) from pg_stat_activity where wait_event = 'SyncRep'";
        watcher.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;

    let mode = StopMode::Halt;
    let began = Instant::now();
    a.command(1, AgentCommand::Fence { mode }).await;
    let mut halted = processes(&a.config);
    // This one is killed.
    halted.retain(|pid| *pid != postmaster(&a.config));
    let in_time = began.elapsed() < Duration::from_millis(900);
    assert!(halted.len() >= 3 || !in_time, "{halted:?}");
    // At once, but for one that the disk holds in the kernel.
    let still = |pid: &i32| !matches!(letter(*pid), Some('R' | 'S' | 'D'));
    wait_for(|| async { halted.iter().all(still) }).await;
    let asked = other.query_one("select 1", &[]);
    let answer = tokio::time::timeout(Duration::from_millis(100), asked).await;
    assert!(!matches!(answer, Ok(Ok(_))), "{answer:?}");
    for pid in &halted {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGCONT);
    }
    let told = commit.await.unwrap();
    assert!(told.is_err(), "{told:?} was acknowledged");
    wait_for(|| async { processes(&a.config).is_empty() }).await;
    let (fence, _) = b.promote(2).await;
    assert_eq!(numbers(&b).await, [1]);
    a.follow(2, &b, &(&fence).into()).await;
    shows(&a, &[1]).await;
}

/// Whoever has work for the instance does not wait for the end that is set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_halted_server_is_buried_by_the_next_command_or_agent() {
    let dir = folder();
    let config = config(dir.path(), "a");
    let mut a = Process::start(&config).await;
    a.command(1, AgentCommand::Bootstrap).await;
    let mode = StopMode::Halt;
    a.command(1, AgentCommand::Fence { mode }).await;
    a.command(2, AgentCommand::StartPrimary).await;
    let mut state = a.client.state().await.unwrap();
    while !matches!(state.instance, InstanceState::Primary { .. }) {
        state = a.client.watch(state.revision).await.unwrap();
    }
    let began = Instant::now();
    a.command(2, AgentCommand::Fence { mode }).await;
    // The agent dies before it has killed them; its successor finds them.
    a.kill();
    assert!(!processes(&config).is_empty() || began.elapsed() > Duration::from_millis(900));
    let a = Process::start(&config).await;
    wait_for(|| async { processes(&config).is_empty() }).await;
    a.command(3, AgentCommand::StartPrimary).await;
    assert!(!processes(&config).is_empty());
}
