//! Agents and supervisors that are killed or stand still, at every step of a move.

#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)] // a test that cannot go on has failed

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::supervised::{Supervised, agent_pid, postmasters, until};
use common::{Notes, Writers, compare, is_whole, ledger, primary, processes, standbys};
use helios_local::client::LocalClient;
use helios_local::{LocalStatus, Phase, Progress};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// The same rows everywhere, none of them twice, all that was acknowledged.
async fn sound(control: &LocalClient, notes: &Notes) -> LocalStatus {
    let status = until(control, "whole cluster", is_whole).await;
    let (lost, twice) = compare(&status, notes).await;
    assert!(lost.is_empty(), "lost: {lost:?}; errors {:?}", notes.errors);
    assert!(twice.is_empty(), "twice: {twice:?}");
    let rows = ledger(primary(&status)).await;
    for standby in standbys(&status) {
        let deadline = Instant::now() + common::LIMIT;
        while ledger(standby).await != rows {
            assert!(Instant::now() < deadline, "{} differs", standby.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    status
}

fn one_postmaster_each(dir: &Path, status: &LocalStatus) {
    for instance in &status.instances {
        let found = postmasters(dir, instance.name.as_str());
        assert!(found.len() <= 1, "{}: {found:?}", instance.name);
    }
}

async fn create_ledger(supervisor: &Supervised) {
    let client = supervisor.connect().await;
    let sql = "create table ledger (id bigint not null)";
    client.batch_execute(sql).await.unwrap();
}

/// The supervisor is killed the moment each phase of a switchover begins, and a little later. The
/// next one finds its way from what is durable.
#[tokio::test(flavor = "multi_thread")]
async fn a_supervisor_killed_in_any_step_is_succeeded() {
    let dir = TempDir::new().unwrap();
    let control = LocalClient::new(dir.path());
    let mut supervisor = Supervised::start(dir.path());
    until(&control, "whole cluster", is_whole).await;
    create_ledger(&supervisor).await;
    let mut all = Notes::default();
    let mut reached = BTreeSet::new();
    let deaths = [
        (Phase::Prepare, 0),
        (Phase::Drain, 1),
        (Phase::Fence, 0),
        (Phase::Fence, 3),
        (Phase::Promote, 0),
        (Phase::Promote, 7),
        (Phase::Replay, 0),
    ];
    for (phase, later) in deaths {
        let writers = Writers::go_on(&supervisor.address, 3);
        writers.more(20).await;
        let victim = Arc::new(Mutex::new(None));
        let seen = Arc::clone(&victim);
        let pid = supervisor.pid();
        let moved = control.switchover(None, move |step| {
            if matches!(step, Progress::Phase { phase: now, .. } if *now == phase) {
                std::thread::sleep(Duration::from_millis(later));
                kill(pid, Signal::SIGKILL).unwrap();
                *seen.lock().unwrap() = Some(phase);
            }
        });
        let moved = moved.await;
        let killed = *victim.lock().unwrap();
        println!("{phase:?} +{later} ms: {:?}", moved.map(|o| o.outcome));
        supervisor.kill();
        // Its clients lose their connections with it; what they were told counts.
        let notes = writers.stop().await;
        all.acknowledged.extend(notes.acknowledged);
        reached.extend(killed.map(|p| p.as_str()));
        supervisor = Supervised::start(dir.path());
        let status = sound(&control, &all).await;
        one_postmaster_each(dir.path(), &status);
    }
    assert_eq!(reached.len(), 5, "{reached:?}");
    supervisor.kill();
}

/// Agents are killed, with their servers left running or not; nobody is lost, nothing runs twice.
#[tokio::test(flavor = "multi_thread")]
async fn killed_agents_are_started_again_without_a_second_server() {
    let dir = TempDir::new().unwrap();
    let control = LocalClient::new(dir.path());
    let supervisor = Supervised::start(dir.path());
    let before = until(&control, "whole cluster", is_whole).await;
    create_ledger(&supervisor).await;
    let writers = Writers::go_on(&supervisor.address, 3);
    writers.more(20).await;

    // The agents alone: the servers go on, and so do the clients.
    for instance in &before.instances {
        kill(
            agent_pid(dir.path(), instance.name.as_str()),
            Signal::SIGKILL,
        )
        .unwrap();
    }
    let status = answered(&control).await;
    one_postmaster_each(dir.path(), &status);
    assert_eq!(status.epoch, before.epoch);
    let pid = |s: &LocalStatus| {
        s.instances
            .iter()
            .map(|i| i.postmaster_pid)
            .collect::<Vec<_>>()
    };
    assert_eq!(pid(&status), pid(&before));
    writers.more(20).await;

    // Agent and server of the primary at once: a failover.
    let old = primary(&status).clone();
    let victims = processes(&old);
    kill(agent_pid(dir.path(), old.name.as_str()), Signal::SIGKILL).unwrap();
    for pid in victims {
        let _ = kill(pid, Signal::SIGKILL);
    }
    let after = until(&control, "failover", |s| {
        s.epoch > before.epoch && is_whole(s)
    })
    .await;
    assert_ne!(after.primary, before.primary);
    one_postmaster_each(dir.path(), &after);
    writers.more(20).await;

    // The agent dies in the middle of a switchover, that of the candidate and that of the primary.
    for (name, phase) in [(0, Phase::Promote), (1, Phase::Fence)] {
        let status = until(&control, "whole cluster", is_whole).await;
        let roles = [
            standbys(&status)[0].name.clone(),
            primary(&status).name.clone(),
        ];
        let pid = agent_pid(dir.path(), roles[name].as_str());
        let moved = control.switchover(None, |step| {
            if matches!(step, Progress::Phase { phase: now, .. } if *now == phase) {
                let _ = kill(pid, Signal::SIGKILL);
            }
        });
        println!(
            "agent of {} at {phase:?}: {:?}",
            roles[name],
            moved.await.map(|o| o.outcome)
        );
        writers.more(20).await;
        let status = until(&control, "whole cluster", is_whole).await;
        one_postmaster_each(dir.path(), &status);
    }
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    sound(&control, &notes).await;
}

async fn answered(control: &LocalClient) -> LocalStatus {
    // Restarted agents report after a moment; before that the view is empty.
    tokio::time::sleep(Duration::from_millis(100)).await;
    until(control, "agents", |s| {
        s.instances.iter().all(|i| i.state.is_some()) && is_whole(s)
    })
    .await
}

/// Peers' bug: the whole machine stands still for a while (a VM that is moved), and whoever wakes
/// up first takes the others for dead.
#[tokio::test(flavor = "multi_thread")]
async fn cloudnative_pg_10423_a_machine_that_stood_still_fails_nobody_over() {
    let dir = TempDir::new().unwrap();
    let control = LocalClient::new(dir.path());
    let supervisor = Supervised::start(dir.path());
    let before = until(&control, "whole cluster", is_whole).await;
    create_ledger(&supervisor).await;
    let writers = Writers::go_on(&supervisor.address, 3);
    writers.more(20).await;
    let began = Instant::now();
    let mut others = vec![supervisor.pid()];
    for instance in &before.instances {
        others.push(agent_pid(dir.path(), instance.name.as_str()));
    }
    others.extend(processes(standbys(&before)[0]));
    let last = processes(primary(&before));
    signal(&last, Signal::SIGSTOP);
    signal(&others, Signal::SIGSTOP);
    // Longer than anything that counts silence (3 s) or drops a connection (2 s).
    tokio::time::sleep(Duration::from_secs(5)).await;
    // The primary is the last to wake up, a second and a half after the rest.
    signal(&others, Signal::SIGCONT);
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    signal(&last, Signal::SIGCONT);
    println!("asleep and awake {:?}", began.elapsed());
    writers.more(50).await;
    println!("commits go on {:?}", began.elapsed());
    // Long enough for a wrong judgement to come out.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = until(&control, "whole cluster", is_whole).await;
    assert_eq!(
        (after.epoch, &after.primary, after.operations.len()),
        (before.epoch, &before.primary, 0),
        "{:#?}",
        after.operations
    );
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    sound(&control, &notes).await;
}

/// Peers' bug: what keeps the cluster's state cannot be reached, and healthy primaries are demoted
/// for it. Here nothing changes as long as nothing can be written down, and a failover that is due
/// meanwhile takes place afterwards (a failover of theirs stalled for good, 11346).
#[tokio::test(flavor = "multi_thread")]
async fn postgres_operator_354_a_state_that_cannot_be_saved_demotes_nobody() {
    let dir = TempDir::new().unwrap();
    let cluster = common::builder(dir.path()).start().await.unwrap();
    let before = common::whole(&cluster).await;
    let writers = Writers::start(&cluster, 3).await;
    writers.more(20).await;
    // A folder where the state would be written: not even root can.
    let obstacle = common::Obstacle::put(dir.path());
    let refused = cluster.switchover(None);
    let refused = tokio::time::timeout(Duration::from_secs(2), refused).await;
    assert!(!matches!(refused, Ok(Ok(_))), "moved without a record");
    writers.more(50).await;
    let status = cluster.status().await;
    assert_eq!(
        (status.epoch, &status.primary),
        (before.epoch, &before.primary)
    );
    assert_eq!(status.operations.len(), 0);

    common::crash(primary(&before));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = cluster.status().await;
    assert_eq!(
        (status.epoch, &status.primary),
        (before.epoch, &before.primary)
    );
    assert!(
        standbys(&status)[0].role == "standby",
        "acted without a record"
    );
    obstacle.remove();
    common::until(&cluster, "failover", |s| {
        s.epoch > before.epoch && is_whole(s)
    })
    .await;
    writers.more(20).await;
    let notes = writers.stop().await;
    println!(
        "{} commits, errors {:?}",
        notes.acknowledged.len(),
        notes.errors
    );
    common::sound(&cluster, &notes).await;
    cluster.shutdown().await;
}

fn signal(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _ = kill(*pid, signal);
    }
}
