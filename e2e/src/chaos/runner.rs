//! A run of experiments: clusters are used again as long as they are good.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cluster::{Cluster, Shape};
use super::disk;
use super::experiment::{self, Report};
use super::plan::Plan;
use super::report::Summary;
use crate::Result;

/// Experiments that one cluster is used for: its log and WAL stay small.
const USES: u64 = 40;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The experiments in their order.
    pub plans: Vec<Plan>,
    /// The `helios` program.
    pub program: PathBuf,
    /// Goes on behind a violation.
    pub keep_going: bool,
    /// A client without an answer for so long hangs.
    pub limit: Duration,
    /// Says what was done when, for every experiment.
    pub verbose: bool,
}

/// Clusters at hand, by their shape.
#[derive(Debug, Default)]
struct Pool {
    clusters: BTreeMap<Shape, (Arc<Cluster>, u64)>,
}

impl Pool {
    async fn take(&mut self, program: &Path, shape: Shape) -> Result<Arc<Cluster>> {
        match self.clusters.remove(&shape) {
            Some((cluster, uses)) if uses < USES => {
                self.clusters
                    .insert(shape, (Arc::clone(&cluster), uses + 1));
                return Ok(cluster);
            }
            Some((worn, _)) => stop(worn, false).await,
            None => {}
        }
        let cluster = Arc::new(Box::pin(Cluster::start(program, shape, &[])).await?);
        self.clusters.insert(shape, (Arc::clone(&cluster), 1));
        Ok(cluster)
    }

    async fn discard(&mut self, shape: Shape, keep: bool) {
        if let Some((cluster, _)) = self.clusters.remove(&shape) {
            stop(cluster, keep).await;
        }
    }

    async fn stop_all(&mut self) {
        for (_, (cluster, _)) in std::mem::take(&mut self.clusters) {
            stop(cluster, false).await;
        }
    }
}

async fn stop(cluster: Arc<Cluster>, keep: bool) {
    match Arc::try_unwrap(cluster) {
        Ok(cluster) => Box::pin(cluster.stop(keep)).await,
        // Somebody still waits for an answer of it; it ends with its last owner.
        Err(shared) => drop(shared),
    }
}

/// Runs all; `say` gets a line an experiment. Everything is stopped when it returns.
///
/// # Errors
/// The harness could not go on: no cluster came up.
pub async fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Summary> {
    let began = Instant::now();
    let mut pool = Pool::default();
    let mut summary = Summary::default();
    let result = tokio::select! {
        result = Box::pin(all(options, &mut pool, &mut summary, say)) => result,
        _ = tokio::signal::ctrl_c() => Err("interrupted".into()),
    };
    pool.stop_all().await;
    summary.took(began.elapsed().as_secs_f64());
    result.map(|()| summary)
}

async fn all(
    options: &Options,
    pool: &mut Pool,
    summary: &mut Summary,
    say: &mut dyn FnMut(&str),
) -> Result<()> {
    let may_mount = disk::is_permitted();
    for (number, plan) in options.plans.iter().enumerate() {
        let seed = plan.seed;
        if plan.shape.small_disks && !may_mount {
            let fault = plan.fault.name();
            say(&format!(
                "seed {seed}: {fault} skipped, mounting a tmpfs is not permitted"
            ));
            continue;
        }
        let cluster = pool.take(&options.program, plan.shape).await?;
        let report = match Box::pin(experiment::run(&cluster, plan, options.limit)).await {
            Ok(report) => report,
            Err(error) => {
                let dir = cluster.dir().display().to_string();
                drop(cluster);
                pool.discard(plan.shape, true).await;
                return Err(format!("seed {seed}: {error}; see \"{dir}\"").into());
            }
        };
        say(&line(number + 1, options.plans.len(), &report));
        if options.verbose {
            for fault in &report.faults {
                say(&format!("          {fault}"));
            }
        }
        summary.add(&report);
        if report.findings.is_empty() {
            continue;
        }
        let kept = keep(&cluster, &report)?;
        say(&verdict(&report, &kept));
        drop(cluster);
        // What it has gone through may be what the next experiment would fail of.
        pool.discard(plan.shape, true).await;
        if !options.keep_going {
            break;
        }
    }
    Ok(())
}

fn line(number: usize, runs: usize, report: &Report) -> String {
    let Report { plan, tally, .. } = report;
    let mut line = format!(
        "{number:>4}/{runs} seed {:<6} {:<12} {:<17} {:<20} ok {:>5} failed {:>4} unknown {:>3} longest {:>5} ms {:>5.1} s",
        plan.seed,
        plan.workload.name(),
        plan.level.sql().to_lowercase(),
        plan.fault.name(),
        tally.ok,
        tally.failed,
        tally.unknown,
        report.notes.longest_ms,
        report.seconds,
    );
    if report.lost > 0 {
        line.push_str(&format!(" lost {}", report.lost));
    }
    if !report.findings.is_empty() {
        line.push_str("  VIOLATION");
    }
    line
}

/// What was violated, the minimal history, and how to repeat it.
fn verdict(report: &Report, kept: &Path) -> String {
    let Report {
        plan,
        faults,
        findings,
        ..
    } = report;
    let mut text = format!("\nviolation with seed {}\n", plan.seed);
    for fault in faults {
        text.push_str(&format!("  fault at {fault}\n"));
    }
    for finding in findings {
        text.push_str(&format!("  {finding}\n"));
    }
    let dir = kept.parent().unwrap_or(kept).display();
    text.push_str(&format!(
        "  kept: {dir} with servers, logs and the clients' history\n"
    ));
    text.push_str(&format!(
        "  repeat it with: chaos --plan {}\n",
        kept.display()
    ));
    text
}

/// Writes down what was found, beside the cluster's own files.
fn keep(cluster: &Cluster, report: &Report) -> Result<PathBuf> {
    let dir = cluster.dir();
    let seed = report.plan.seed;
    let verdict = dir.join(format!("seed-{seed}-report.json"));
    std::fs::write(&verdict, serde_json::to_vec_pretty(report)?)?;
    let notes = dir.join(format!("seed-{seed}-history.json"));
    std::fs::write(&notes, serde_json::to_vec(&report.notes)?)?;
    Ok(verdict)
}
