//! A run of experiments: clusters are used again as long as they are good.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

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
    /// The commit that it was built from.
    pub commit: String,
    /// Goes on behind a violation.
    pub keep_going: bool,
    /// A client without an answer for so long hangs.
    pub limit: Duration,
    /// Says what was done when, for every experiment.
    pub verbose: bool,
    /// Experiments side by side, each on clusters of its own.
    pub jobs: usize,
    /// Results are added to those of this file, behind every experiment.
    pub append: Option<PathBuf>,
}

impl Options {
    /// These experiments, one after the other, until the first violation.
    #[must_use]
    pub fn new(plans: Vec<Plan>, program: PathBuf, limit: Duration) -> Self {
        Self {
            plans,
            program,
            commit: "unknown".to_owned(),
            keep_going: false,
            limit,
            verbose: false,
            jobs: 1,
            append: None,
        }
    }
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

/// What the lanes of a run share.
struct Shared<'a> {
    options: &'a Options,
    next: Cell<usize>,
    stop: Cell<bool>,
    summary: RefCell<Summary>,
    say: RefCell<&'a mut dyn FnMut(&str)>,
    saved: Cell<Instant>,
}

impl Shared<'_> {
    fn say(&self, text: &str) {
        (self.say.borrow_mut())(text);
    }

    /// The next experiment with its number, until somebody said stop.
    fn take(&self) -> Option<(usize, &Plan)> {
        loop {
            let number = self.next.get();
            let plan = self
                .options
                .plans
                .get(number)
                .filter(|_| !self.stop.get())?;
            self.next.set(number + 1);
            if !self.summary.borrow().has(&self.options.commit, plan.seed) {
                return Some((number + 1, plan));
            }
        }
    }

    fn add(&self, report: &Report) -> Result<()> {
        let mut summary = self.summary.borrow_mut();
        summary.add(&self.options.commit, report);
        self.save(&mut summary)
    }

    fn save(&self, summary: &mut Summary) -> Result<()> {
        let since = self.saved.replace(Instant::now());
        summary.took(since.elapsed().as_secs_f64());
        match &self.options.append {
            Some(file) => summary.write(file),
            None => Ok(()),
        }
    }
}

/// Runs all, and adds them to what is in the file to append to; those that are in it already are
/// left out. `say` gets a line an experiment. Everything is stopped when it returns.
///
/// # Errors
/// The harness could not go on: no cluster came up.
pub async fn run(options: &Options, say: &mut dyn FnMut(&str)) -> Result<Summary> {
    let known = match &options.append {
        Some(file) => Summary::read(file)?,
        None => Summary::default(),
    };
    let shared = Shared {
        options,
        next: Cell::new(0),
        stop: Cell::new(false),
        summary: RefCell::new(known),
        say: RefCell::new(say),
        saved: Cell::new(Instant::now()),
    };
    let mut pools: Vec<Pool> = Vec::new();
    pools.resize_with(options.jobs.max(1), Pool::default);
    let lanes = join_all(pools.iter_mut().map(|pool| lane(&shared, pool)));
    let results = tokio::select! {
        results = Box::pin(lanes) => results,
        _ = tokio::signal::ctrl_c() => vec![Err("interrupted".into())],
    };
    for pool in &mut pools {
        pool.stop_all().await;
    }
    let mut summary = shared.summary.take();
    shared.save(&mut summary)?;
    results
        .into_iter()
        .collect::<Result<()>>()
        .map(|()| summary)
}

/// One experiment after the other.
async fn lane(shared: &Shared<'_>, pool: &mut Pool) -> Result<()> {
    let may_mount = disk::is_permitted();
    while let Some((number, plan)) = shared.take() {
        if plan.shape.small_disks && !may_mount {
            let (seed, fault) = (plan.seed, plan.fault.name());
            shared.say(&format!(
                "seed {seed}: {fault} skipped, mounting a tmpfs is not permitted"
            ));
            continue;
        }
        if let Err(error) = Box::pin(one(shared, pool, number, plan)).await {
            shared.stop.set(true);
            return Err(error);
        }
    }
    Ok(())
}

async fn one(shared: &Shared<'_>, pool: &mut Pool, number: usize, plan: &Plan) -> Result<()> {
    let options = shared.options;
    let cluster = pool.take(&options.program, plan.shape).await?;
    let report = match Box::pin(experiment::run(&cluster, plan, options.limit)).await {
        Ok(report) => report,
        Err(error) => {
            let dir = cluster.dir().display().to_string();
            drop(cluster);
            pool.discard(plan.shape, true).await;
            return Err(format!("seed {}: {error}; see \"{dir}\"", plan.seed).into());
        }
    };
    shared.say(&line(number, options.plans.len(), &report));
    if options.verbose {
        for fault in report.faults.iter().chain(&report.missed) {
            shared.say(&format!("          {fault}"));
        }
    }
    shared.add(&report)?;
    if report.findings.is_empty() {
        return Ok(());
    }
    let kept = keep(&cluster, &report)?;
    shared.say(&verdict(&report, &kept));
    drop(cluster);
    // What it has gone through may be what the next experiment would fail of.
    pool.discard(plan.shape, true).await;
    if !options.keep_going {
        shared.stop.set(true);
    }
    Ok(())
}

fn line(number: usize, runs: usize, report: &Report) -> String {
    let Report { plan, tally, .. } = report;
    let mut line = format!(
        "{number:>4}/{runs} seed {:<6} {:<12} {:<17} {:<23} ok {:>5} failed {:>4} unknown {:>3} longest {:>5} ms {:>5.1} s",
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
    if !report.missed.is_empty() {
        line.push_str(" missed");
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
