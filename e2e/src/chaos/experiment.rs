//! One experiment: fresh tables, clients, faults, the wait for the cluster, the verdict.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use helios_api::control::LostCommits;
use helios_local::OperationKind;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::checker::{Anomaly, Finding};
use super::cluster::{Cluster, redundant, serving};
use super::fault::{Done, Injector, Network};
use super::notes::{Notes, Tally};
use super::plan::Plan;
use super::workload::{Setting, Verdict, Worker, judge};
use crate::Result;

/// A client without an answer for so long hangs. The proxy's own limit on an outage is 60 s.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(75);
/// How long the cluster may take to be redundant again; a fresh clone may be needed.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(90);
/// Limit on a query of the judge's.
const JUDGE_LIMIT: Duration = Duration::from_secs(60);

/// How long clients go on behind the last fault.
const AFTERWARDS: Duration = Duration::from_millis(400);

/// How often tables are tried to be made.
const SET_UPS: u32 = 5;

/// What came of it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The plan.
    pub plan: Plan,
    /// What was done when.
    pub faults: Vec<String>,
    /// What of it hit nothing, or did not lead to what it has to lead to.
    pub missed: Vec<String>,
    /// The messages at which sessions were hit, by name.
    pub messages: Vec<String>,
    /// How requests ended.
    pub tally: Tally,
    /// Acknowledged and lost, where that is allowed.
    pub lost: u64,
    /// What is wrong; empty when all is well.
    pub findings: Vec<Finding>,
    /// Seconds, from the first client to the verdict.
    pub seconds: f64,
    /// What the clients wrote down.
    #[serde(skip)]
    pub notes: Notes,
}

/// Runs one; a client without an answer for `limit` hangs.
///
/// # Errors
/// The harness itself could not go on; what the product does wrong is a finding.
pub async fn run(cluster: &Arc<Cluster>, plan: &Plan, limit: Duration) -> Result<Report> {
    let schema = format!("x{}", plan.seed);
    set_up(cluster, plan, &schema).await?;
    let network = match plan.fault.is_network() {
        true => Network::install(cluster).await?,
        false => Network::default(),
    };
    let before = cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
    let clock = Instant::now();
    let setting = Setting {
        target: cluster.target().clone(),
        schema: schema.clone(),
        workload: plan.workload,
        level: plan.level,
        seed: plan.seed,
        limit,
        extra: plan.fault.extra_states().to_vec(),
        clock,
        ids: Arc::new(AtomicU64::new(1)),
        stop: CancellationToken::new(),
    };
    let mut clients = JoinSet::new();
    for client in 0..plan.clients {
        clients.spawn(Worker::new(setting.clone(), client).run());
    }
    let injector = Injector::new(Arc::clone(cluster), network, clock);
    let faults = Box::pin(injector.run(&plan.steps)).await;
    let left = plan.duration.saturating_sub(clock.elapsed());
    tokio::time::sleep(left.max(AFTERWARDS)).await;
    setting.stop.cancel();
    let (notes, mut findings) = finish(clients, limit).await;
    let faults = faults.unwrap_or_else(|error| {
        findings.push(Finding::new(Anomaly::Hung, error.to_string()));
        Vec::new()
    });
    let judged = Box::pin(verdict(cluster, plan, &schema, &notes)).await;
    let verdict = judged.unwrap_or_else(|error| Judged {
        epoch: None,
        findings: {
            let mut findings = notes.violations.clone();
            let what = format!("after the faults: {error}");
            findings.push(Finding::new(Anomaly::Hung, what));
            findings
        },
        lost: 0,
    });
    findings.extend(verdict.findings);
    Ok(Report {
        plan: plan.clone(),
        missed: missed(plan, before.epoch.0, verdict.epoch, &faults),
        messages: faults
            .iter()
            .flat_map(|done| done.messages.clone())
            .collect(),
        faults: faults.into_iter().map(|done| done.what).collect(),
        tally: notes.tally,
        lost: verdict.lost,
        findings,
        seconds: clock.elapsed().as_secs_f64(),
        notes,
    })
}

/// Makes the tables, through the proxy like any client. A busy machine may stand still so long that
/// the cluster moves by itself: then once more.
async fn set_up(cluster: &Cluster, plan: &Plan, schema: &str) -> Result<()> {
    let sql = format!(
        "DROP SCHEMA IF EXISTS {schema} CASCADE; CREATE SCHEMA {schema}; {}",
        plan.workload.tables(schema)
    );
    let mut attempts = 0;
    loop {
        cluster.wait("redundant", RECOVERY_LIMIT, redundant).await?;
        let made = async {
            let proxy = connect(cluster).await?;
            timeout(JUDGE_LIMIT, proxy.batch_execute(&sql)).await??;
            Result::Ok(())
        };
        attempts += 1;
        match made.await {
            Ok(()) => return Ok(()),
            Err(error) if attempts == SET_UPS => {
                let why = error.source().map(ToString::to_string).unwrap_or_default();
                return Err(format!("could not make the tables: {error}: {why}").into());
            }
            Err(_) => {}
        }
    }
}

/// Waits for all clients; one that does not end hangs.
async fn finish(mut clients: JoinSet<Notes>, limit: Duration) -> (Notes, Vec<Finding>) {
    let (mut notes, mut findings) = (Notes::default(), Vec::new());
    // A request, the ROLLBACK behind it, and a new connection.
    let deadline = tokio::time::Instant::now() + limit * 3;
    loop {
        match tokio::time::timeout_at(deadline, clients.join_next()).await {
            Ok(None) => break,
            Ok(Some(Ok(one))) => notes.merge(one),
            Ok(Some(Err(error))) => {
                findings.push(Finding::new(
                    Anomaly::Client,
                    format!("client ended: {error}"),
                ));
            }
            Err(_) => {
                let what = format!("{} clients do not end", clients.len());
                findings.push(Finding::new(Anomaly::Hung, what));
                break;
            }
        }
    }
    (notes, findings)
}

/// A verdict, and the epoch that it was given in.
struct Judged {
    findings: Vec<Finding>,
    lost: u64,
    epoch: Option<u64>,
}

/// Waits until clients would be served again, and judges the data.
async fn verdict(cluster: &Cluster, plan: &Plan, schema: &str, notes: &Notes) -> Result<Judged> {
    let status = cluster.wait("serving", RECOVERY_LIMIT, serving).await?;
    let (primary, _) = cluster.roles().await?;
    let db = cluster.connect(&primary).await?;
    let judged = judge(plan.workload, &db, schema, notes, plan.fault.may_lose());
    let Verdict { findings, lost } = timeout(JUDGE_LIMIT, judged).await??;
    let mut verdict = Judged {
        findings,
        lost,
        epoch: Some(status.epoch.0),
    };
    if verdict.lost > 0 && !loss_is_reported(cluster).await? {
        let what = format!(
            "{} acknowledged requests, and the report of the move says nothing",
            verdict.lost
        );
        verdict.findings.push(Finding::new(Anomaly::Lost, what));
    }
    if verdict.findings.is_empty() {
        clean_up(&db, schema).await?;
    }
    // The cluster must be whole again by itself; this is the next experiment's start.
    if let Err(error) = cluster.wait("redundant", RECOVERY_LIMIT, redundant).await {
        let what = error.to_string();
        verdict.findings.push(Finding::new(Anomaly::Hung, what));
    }
    Ok(verdict)
}

/// What hit nothing. A fault that nobody noticed proves nothing: such runs are counted apart.
fn missed(plan: &Plan, before: u64, after: Option<u64>, faults: &[Done]) -> Vec<String> {
    let idle = faults.iter().filter(|done| !done.hit);
    let mut missed: Vec<String> = idle.map(|done| done.what.clone()).collect();
    let moves = after.map_or(0, |after| after.saturating_sub(before));
    let wanted = plan.fault.moves();
    if moves < wanted {
        missed.push(format!(
            "the primary has changed {moves} times, not {wanted}"
        ));
    }
    missed
}

/// Whether the last failover says that it may have lost commits.
async fn loss_is_reported(cluster: &Cluster) -> Result<bool> {
    let status = cluster.status().await?;
    let mut failovers = status.operations.iter().rev();
    let last = failovers.find(|op| op.kind == OperationKind::Failover);
    Ok(last.is_some_and(|op| op.lost == LostCommits::Possible))
}

/// Prepared transactions hold locks; tables cost checkpoints.
async fn clean_up(db: &tokio_postgres::Client, schema: &str) -> Result<()> {
    db.batch_execute("SET statement_timeout = '30s'; SET synchronous_commit = local")
        .await?;
    let waiting = "SELECT gid FROM pg_prepared_xacts WHERE database = current_database()";
    for row in db.query(waiting, &[]).await? {
        let gid: String = row.try_get(0)?;
        db.batch_execute(&format!("ROLLBACK PREPARED '{gid}'"))
            .await?;
    }
    Ok(db
        .batch_execute(&format!("DROP SCHEMA {schema} CASCADE"))
        .await?)
}

async fn connect(cluster: &Cluster) -> Result<tokio_postgres::Client> {
    let config: tokio_postgres::Config = cluster.target().conninfo().parse()?;
    let (client, connection) =
        timeout(JUDGE_LIMIT, config.connect(tokio_postgres::NoTls)).await??;
    // Ends with the client.
    tokio::spawn(connection);
    Ok(client)
}
