//! `chaos`: randomised experiments from a seed, on real servers behind the proxy.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use helios_e2e::Result;
use helios_e2e::chaos::experiment::ANSWER_LIMIT;
use helios_e2e::chaos::fault::FaultKind;
use helios_e2e::chaos::history::Level;
use helios_e2e::chaos::plan::{Choices, Plan};
use helios_e2e::chaos::report::Summary;
use helios_e2e::chaos::runner::{Options, run};
use helios_e2e::chaos::workload::Workload;

/// Randomised experiments: clients work through the proxy while servers, agents and connections
/// fail, and a checker judges what they saw and what the database holds.
///
/// Experiment n has the seed SEED + n; the same seed with the same choices is the same workload,
/// isolation level, faults and times. Stops at the first violation, with a minimal history and the
/// cluster's files kept.
#[derive(Debug, Parser)]
#[command(
    name = "chaos",
    after_help = "Exit status:\n  0  nothing was violated\n  1  a violation, or the experiments could not go on\n  2  an option is wrong"
)]
struct Cli {
    /// Experiments
    #[arg(long, value_name = "N", default_value_t = 20)]
    runs: u64,
    /// Seed of the first one
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Clients of each
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=64))]
    clients: u64,
    /// Seconds that the clients of each work
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    duration: u64,
    /// Experiments side by side, each on clusters of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=32))]
    jobs: u64,
    /// Only these workloads
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    workload: Vec<Workload>,
    /// Only these faults
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    fault: Vec<FaultKind>,
    /// Only these isolation levels
    #[arg(long, value_name = "NAME", value_enum, value_delimiter = ',')]
    level: Vec<LevelArg>,
    /// Run these experiments instead: plans, or reports that were kept
    #[arg(long, value_name = "FILE", num_args = 1..)]
    plan: Vec<PathBuf>,
    /// Go on behind a violation, on a new cluster
    #[arg(long)]
    keep_going: bool,
    /// Say what was done when in every experiment
    #[arg(long)]
    verbose: bool,
    /// Seconds without an answer after which a client hangs; the proxy's own limit is 60
    #[arg(long, value_name = "SECONDS", default_value_t = ANSWER_LIMIT.as_secs(), value_parser = clap::value_parser!(u64).range(1..=3600))]
    limit: u64,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
    /// Add the results to those of this file, behind every experiment; what it already has of the
    /// same commit is not run again
    #[arg(long, value_name = "FILE")]
    append: Option<PathBuf>,
    /// Run nothing: add up the results of these files
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["plan", "append"])]
    merge: Vec<PathBuf>,
    /// The commit that helios was built from; what git says of this directory by default
    #[arg(long, value_name = "ID")]
    commit: Option<String>,
    /// Write the result's table to this file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// The helios program; the one beside this program by default
    #[arg(long, value_name = "FILE", env = "HELIOS")]
    helios: Option<PathBuf>,
}

/// Isolation levels as the command line names them.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LevelArg {
    /// The same as read committed in PostgreSQL
    ReadUncommitted,
    /// The default of PostgreSQL
    ReadCommitted,
    /// Snapshot isolation
    RepeatableRead,
    /// Serializable snapshot isolation
    Serializable,
}

impl From<LevelArg> for Level {
    fn from(level: LevelArg) -> Self {
        match level {
            LevelArg::ReadUncommitted => Self::ReadUncommitted,
            LevelArg::ReadCommitted => Self::ReadCommitted,
            LevelArg::RepeatableRead => Self::RepeatableRead,
            LevelArg::Serializable => Self::Serializable,
        }
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match chaos(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            note(&format!("chaos: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn chaos(cli: &Cli) -> Result<bool> {
    if !cli.merge.is_empty() {
        let mut summary = Summary::default();
        for file in &cli.merge {
            summary.merge(Summary::read(file)?)?;
        }
        publish(cli, &summary)?;
        return Ok(summary.is_good());
    }
    let options = options(cli)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let seed = options.plans.first().map_or(cli.seed, |plan| plan.seed);
    note(&format!("{} experiments, seed {seed}", options.plans.len()));
    let summary = runtime.block_on(Box::pin(run(&options, &mut |line| note(line))))?;
    publish(cli, &summary)?;
    Ok(summary.is_good())
}

fn options(cli: &Cli) -> Result<Options> {
    let program = match &cli.helios {
        Some(program) => program.clone(),
        None => std::env::current_exe()?.with_file_name("helios"),
    };
    if !program.is_file() {
        let path = program.display();
        return Err(
            format!("there is no program \"{path}\"; build it, or name it with --helios").into(),
        );
    }
    Ok(Options {
        plans: plans(cli)?,
        program,
        keep_going: cli.keep_going,
        limit: Duration::from_secs(cli.limit),
        verbose: cli.verbose,
        commit: cli.commit.clone().unwrap_or_else(commit),
        jobs: usize::try_from(cli.jobs)?,
        append: cli.append.clone(),
    })
}

/// The commit that is checked out here; a build of something else has to name its own.
fn commit() -> String {
    let asked = std::process::Command::new("git")
        .args([
            "describe",
            "--always",
            "--dirty",
            "--exclude",
            "*",
            "--abbrev=12",
        ])
        .output();
    let said = asked.ok().filter(|said| said.status.success());
    let name = said.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_owned());
    name.filter(|name| !name.is_empty())
        .unwrap_or_else(|| "unknown".to_owned())
}

fn plans(cli: &Cli) -> Result<Vec<Plan>> {
    if !cli.plan.is_empty() {
        return cli.plan.iter().map(|file| Plan::read(file)).collect();
    }
    let choices = Choices {
        workloads: or_all(&cli.workload, &Workload::ALL),
        faults: or_all(&cli.fault, &FaultKind::ALL),
        levels: match cli.level.as_slice() {
            [] => Level::ALL.to_vec(),
            some => some.iter().map(|level| Level::from(*level)).collect(),
        },
        clients: usize::try_from(cli.clients)?,
        duration: Duration::from_secs(cli.duration),
    };
    let draw = |number| Plan::draw(cli.seed.wrapping_add(number), &choices);
    let plans: Option<Vec<Plan>> = (0..cli.runs).map(draw).collect();
    Ok(plans.ok_or("no workload and fault fit together")?)
}

fn or_all<T: Copy>(chosen: &[T], all: &[T]) -> Vec<T> {
    if chosen.is_empty() { all } else { chosen }.to_vec()
}

fn publish(cli: &Cli, summary: &Summary) -> Result<()> {
    if let Some(file) = &cli.markdown {
        std::fs::write(file, summary.markdown())?;
    }
    let mut out = std::io::stdout().lock();
    if cli.json {
        writeln!(out, "{:#}", summary.json())?;
    } else {
        write!(out, "\n{}", summary.table())?;
    }
    Ok(())
}

/// Progress and remarks.
fn note(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}
