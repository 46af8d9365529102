//! The experiments of `make chaos`, in small: a good product passes, a bad one is caught, and what
//! failed once is tried again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use helios_e2e::chaos::cluster::Cluster;
use helios_e2e::chaos::experiment::{self, ANSWER_LIMIT};
use helios_e2e::chaos::fault::FaultKind;
use helios_e2e::chaos::history::Level;
use helios_e2e::chaos::plan::{Choices, Plan};
use helios_e2e::chaos::runner::{Options, run};
use helios_e2e::chaos::workload::Workload;
use helios_e2e::{Result, Shown};

/// The product, built beside this test.
fn helios() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.ancestors().nth(2).ok_or("no folder")?.join("helios");
    if path.is_file() {
        return Ok(path);
    }
    let path = path.display();
    Err(format!("there is no program \"{path}\": cargo build -p helios").into())
}

fn plan(seed: u64, workload: Workload, fault: FaultKind) -> Result<Plan> {
    let choices = Choices {
        workloads: vec![workload],
        faults: vec![fault],
        levels: Level::ALL.to_vec(),
        clients: 6,
        duration: Duration::from_secs(3),
    };
    Ok(Plan::draw(seed, &choices).ok_or("no plan")?)
}

#[allow(clippy::print_stdout)] // what a failed test shows
async fn all_good(plans: Vec<Plan>) -> Result<()> {
    let options = Options {
        verbose: true,
        jobs: 2,
        ..Options::new(plans, helios()?, ANSWER_LIMIT)
    };
    let summary = Box::pin(run(&options, &mut |line| println!("{line}"))).await?;
    if summary.is_good() {
        return Ok(());
    }
    Err("a violation, see above".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn crashes_and_switchovers_violate_nothing() -> std::result::Result<(), Shown> {
    let plans = vec![
        plan(1, Workload::Bank, FaultKind::Crash)?,
        plan(2, Workload::ListAppend, FaultKind::Switchover)?,
        plan(3, Workload::ListAppend, FaultKind::Crash)?,
    ];
    Ok(Box::pin(all_good(plans)).await?)
}

/// Without replay a crash ends transactions with errors that are not on the list: a harness that
/// does not see that sees nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_that_does_not_replay_is_caught() -> std::result::Result<(), Shown> {
    let plan = plan(4, Workload::Bank, FaultKind::Crash)?;
    let cluster = Cluster::start(&helios()?, plan.shape, &["--mode", "none"]).await?;
    let cluster = std::sync::Arc::new(cluster);
    let report = Box::pin(experiment::run(&cluster, &plan, ANSWER_LIMIT)).await?;
    if let Ok(cluster) = std::sync::Arc::try_unwrap(cluster) {
        Box::pin(cluster.stop(false)).await;
    }
    if report.findings.is_empty() {
        return Err(Shown::from(Into::<Box<_>>::into("nothing was found")));
    }
    Ok(())
}

/// Experiments that failed once and no longer may.
#[tokio::test(flavor = "multi_thread")]
async fn what_failed_once_is_clean() -> std::result::Result<(), Shown> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("chaos/fixed");
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in folder.read_dir().map_err(Box::from)? {
        files.push(entry.map_err(Box::from)?.path());
    }
    files.retain(|file| file.extension().is_some_and(|e| e == "json"));
    files.sort();
    let plans: Result<Vec<Plan>> = files.iter().map(|file| Plan::read(file)).collect();
    Ok(Box::pin(all_good(plans?)).await?)
}
