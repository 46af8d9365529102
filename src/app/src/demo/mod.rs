//! `helios demo`: a throw-away cluster, clients with open transactions, a primary that moves under
//! them, and the count of what that cost.
//!
//! This module runs the sequence; what it decides from is in [`plan`], what it measures in
//! [`record`] and [`windows`], the verdict in [`check`] and [`report`]. Invariant: whatever
//! happens after the cluster has started, it is stopped before this returns.

mod bank;
mod check;
mod client;
mod cluster;
mod crash;
mod disk;
mod plan;
mod progress;
#[cfg(test)]
mod proxy_tests;
mod record;
mod report;
mod slow;
#[cfg(test)]
mod tests;
mod windows;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::runtime::Runtime;
use tokio::task::JoinHandle;
use tokio_postgres::{Config, NoTls};
use tokio_util::sync::CancellationToken;

use crate::cli::DemoArgs;
use crate::failure::Failure;
use check::Findings;
use client::{Outcome, Shared};
use cluster::{DemoCluster, redundant};
use disk::Probe;
use plan::{EventKind, PlannedEvent};
use progress::Progress;
use record::Live;
use report::{Done, Phases, Report, Run};

pub(crate) use cluster::Workspace;

/// How long the clients run before the first event and after the last.
const WARM_UP: Duration = Duration::from_secs(2);
/// Limit on a move as such.
const MOVE_LIMIT: Duration = Duration::from_secs(60);
/// Limit on being redundant again after it: a fresh clone may be needed.
const SETTLE_LIMIT: Duration = Duration::from_secs(120);
/// Limit on a client's end once it was told to stop.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Runs the demo; the error carries the exit status.
pub(crate) async fn run(args: &DemoArgs, workspace: &Workspace) -> Result<(), Failure> {
    let progress = Progress::new(args.switchovers + args.crashes, Arc::default());
    progress.line(&format!(
        "starting {} PostgreSQL servers and a proxy in {}",
        args.instances,
        workspace.path().display()
    ));
    let result = Box::pin(with_cluster(args, workspace, &progress)).await;
    progress.finish();
    let good = result.as_ref().is_ok_and(Report::ok);
    let interrupted = result.as_ref().is_err_and(Failure::is_interrupt);
    if args.keep || !(good || interrupted) {
        crate::out::note(&format!(
            "data and logs are kept in {}",
            workspace.path().display()
        ));
    } else {
        workspace.remove();
    }
    let report = result?;
    if args.json {
        let json = report
            .json()
            .map_err(|e| Failure::failed(format!("could not write the report: {e}")))?;
        crate::out::print(&json);
    } else {
        crate::out::print(&report.table());
    }
    if good {
        Ok(())
    } else {
        Err(Failure::silent(1))
    }
}

/// Starts the cluster, and stops it whatever comes of the run.
async fn with_cluster(
    args: &DemoArgs,
    workspace: &Workspace,
    progress: &Progress,
) -> Result<Report, Failure> {
    let cluster = tokio::select! {
        cluster = DemoCluster::start(workspace, args.instances, args.mode.as_str()) => cluster?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::interrupted()),
    };
    let result = tokio::select! {
        result = Box::pin(session(args, workspace, &cluster, progress)) => result,
        _ = tokio::signal::ctrl_c() => Err(Failure::interrupted()),
    };
    progress.now("stopping");
    cluster.shutdown().await;
    result
}

async fn session(
    args: &DemoArgs,
    workspace: &Workspace,
    cluster: &DemoCluster,
    progress: &Progress,
) -> Result<Report, Failure> {
    let begun = Instant::now();
    let proxy = cluster.proxy()?;
    set_up(&proxy, args.clients).await?;
    cluster.wait("redundant", SETTLE_LIMIT, redundant).await?;
    let probe = Probe::start(workspace.path())
        .map_err(|e| Failure::failed(format!("could not measure the disk: {e}")))?;
    let plan = plan::events(args.seed, args.switchovers, args.crashes);
    let crowd = Crowd::start(&proxy, args, Arc::clone(progress.live()))?;
    progress.line(&format!(
        "{} clients at work; {} switchovers and {} crashes to come, seed {}",
        args.clients, args.switchovers, args.crashes, args.seed
    ));
    tokio::time::sleep(WARM_UP).await;
    let mut done = Vec::new();
    let mut faults = Vec::new();
    for (number, event) in plan.iter().enumerate() {
        match one_event(cluster, event, &crowd.shared, progress).await {
            Ok((what, result)) => {
                progress.event(number + 1, plan.len(), &what);
                done.push(result);
            }
            Err(failure) => {
                let text = format!(
                    "event {} ({}) failed: {failure}",
                    number + 1,
                    event.kind.label()
                );
                progress.line(&text);
                faults.push(text);
                break;
            }
        }
    }
    tokio::time::sleep(WARM_UP).await;
    progress.now("clients finish");
    let shared = crowd.shared.clone();
    let (outcomes, unfinished) = crowd.finish().await;
    faults.extend(unfinished);
    let disk = probe
        .finish()
        .map_err(|e| faults.push(format!("could not measure the disk: {e}")))
        .ok();
    progress.now("counting");
    let findings = judge(cluster, &outcomes).await.unwrap_or_else(|failure| {
        faults.push(format!("could not check the ledger: {failure}"));
        Findings::default()
    });
    Ok(Report::new(&Run {
        seed: args.seed,
        mode: args.mode.as_str(),
        planned: (args.switchovers, args.crashes),
        seconds: begun.elapsed().as_secs_f64(),
        windows: &shared.windows.all(),
        done: &done,
        outcomes: &outcomes,
        findings: &findings,
        disk: disk.as_ref(),
        faults,
    }))
}

/// Makes the tables, through the proxy like any client.
async fn set_up(proxy: &Config, clients: usize) -> Result<(), Failure> {
    let failed = |e: tokio_postgres::Error| {
        Failure::failed(format!("could not create the demo's tables: {e}"))
    };
    let (client, connection) = proxy.connect(NoTls).await.map_err(failed)?;
    // Ends with the client.
    tokio::spawn(connection);
    client
        .batch_execute(&bank::schema(clients))
        .await
        .map_err(failed)
}

/// The clients at work, on a runtime of their own: their work and the proxy's do not share worker
/// threads, as it would be with real clients.
struct Crowd {
    runtime: Option<Runtime>,
    clients: Vec<JoinHandle<Outcome>>,
    shared: Shared,
}

impl Crowd {
    fn start(proxy: &Config, args: &DemoArgs, live: Arc<Live>) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("demo-clients")
            .enable_all()
            .build()
            .map_err(|e| Failure::failed(format!("could not start threads: {e}")))?;
        let shared = Shared {
            windows: Arc::default(),
            live,
            stop: CancellationToken::new(),
        };
        let clients = (0..args.clients)
            .map(|index| {
                runtime.spawn(client::run(
                    proxy.clone(),
                    args.seed,
                    index,
                    args.clients,
                    shared.clone(),
                ))
            })
            .collect();
        Ok(Self {
            runtime: Some(runtime),
            clients,
            shared,
        })
    }

    /// Lets every client end its transaction; returns what they know, and who did not end.
    async fn finish(mut self) -> (Vec<Outcome>, Vec<String>) {
        self.shared.stop.cancel();
        let mut outcomes = Vec::new();
        let mut faults = Vec::new();
        for (index, client) in std::mem::take(&mut self.clients).into_iter().enumerate() {
            match tokio::time::timeout(STOP_LIMIT, client).await {
                Ok(Ok(outcome)) => outcomes.push(outcome),
                Ok(Err(e)) => faults.push(format!("client {index} died: {e}")),
                Err(_) => {
                    faults.push(format!("client {index} did not end within {STOP_LIMIT:?}"));
                }
            }
        }
        (outcomes, faults)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        // A runtime must not be dropped where one is running; this one ends in the background.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Waits until the cluster can take it, then makes one event; returns when it is redundant again.
async fn one_event(
    cluster: &DemoCluster,
    event: &PlannedEvent,
    shared: &Shared,
    progress: &Progress,
) -> Result<(String, Done), Failure> {
    tokio::time::sleep(event.delay).await;
    let before = cluster.wait("redundant", SETTLE_LIMIT, redundant).await?;
    let last = before.operations.last().map_or(0, |o| o.id);
    progress.now(event.kind.label());
    let begun = shared.windows.begin(event.kind);
    match event.kind {
        EventKind::Switchover => {
            tokio::time::timeout(MOVE_LIMIT, cluster.switchover())
                .await
                .map_err(|_| {
                    Failure::failed(format!("switchover is not done after {MOVE_LIMIT:?}"))
                })??;
        }
        EventKind::Crash => {
            let primary = before.primary.as_ref();
            let pid = before
                .instances
                .iter()
                .find(|i| Some(&i.name) == primary)
                .and_then(|i| i.postmaster_pid)
                .ok_or_else(|| Failure::failed("the primary has no postmaster".to_owned()))?;
            crash::kill_server(pid).map_err(Failure::failed)?;
            cluster
                .wait("moved", MOVE_LIMIT, |s| {
                    s.operations.last().is_some_and(|o| o.id > last)
                })
                .await?;
        }
    }
    let moved = begun.elapsed();
    shared.windows.moved();
    progress.now("waiting for redundancy");
    let after = cluster.wait("redundant", SETTLE_LIMIT, redundant).await?;
    shared.windows.settled();
    let operation = after.operations.iter().find(|o| o.id > last);
    let phases: Phases = operation.map_or_else(Vec::new, |o| {
        o.phases
            .iter()
            .map(|p| (p.phase.as_str(), p.micros))
            .collect()
    });
    let way = operation.map_or_else(String::new, |o| format!(" {} -> {}", o.from, o.to));
    let what = format!(
        "{}{way}: moved after {:.0} ms, redundant after {:.1} s",
        event.kind.label(),
        moved.as_secs_f64() * 1000.0,
        begun.elapsed().as_secs_f64()
    );
    Ok((
        what,
        Done {
            kind: event.kind,
            phases,
        },
    ))
}

/// Compares every instance with the clients' notes.
async fn judge(cluster: &DemoCluster, outcomes: &[Outcome]) -> Result<Findings, Failure> {
    let instances = cluster.connect_all().await?;
    let mut total: Option<Findings> = None;
    let Some((_, primary)) = instances.first() else {
        return Err(Failure::failed("there is no instance".to_owned()));
    };
    for (number, (name, db)) in instances.iter().enumerate() {
        if number > 0 {
            check::catch_up(primary, db)
                .await
                .map_err(|e| Failure::failed(format!("\"{name}\": {e}")))?;
        }
        let mut found = check::check(db, outcomes.iter().map(|o| &o.notes))
            .await
            .map_err(|e| Failure::failed(format!("could not read \"{name}\": {e}")))?;
        for detail in &mut found.details {
            *detail = format!("{name}: {detail}");
        }
        match &mut total {
            None => total = Some(found),
            Some(total) => total.merge(found),
        }
    }
    Ok(total.unwrap_or_default())
}
