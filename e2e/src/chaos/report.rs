//! What runs came to, for people, for programs and for the documentation. Results of several runs
//! add up; each keeps the commit that it ran on.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::checker::Anomaly;
use super::experiment::Report;
use super::fault::FaultKind;
use super::notes::Tally;
use super::workload::Workload;
use crate::Result;

/// One pair of workload and fault.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cell {
    /// Experiments.
    pub experiments: u64,
    /// Those of them whose fault hit nothing, or not all that it should have.
    pub missed: u64,
    /// Their requests.
    pub tally: Tally,
    /// Acknowledged, lost and reported so, under asynchronous replication.
    pub reported: u64,
    /// Experiments with a violation.
    pub violations: u64,
    /// Findings: acknowledged and lost, or partly.
    pub lost: u64,
    /// Findings: executed twice.
    pub doubled: u64,
    /// Findings: anomalies that the level forbids, and data that nobody wrote.
    pub anomalies: u64,
    /// Findings: errors outside of the list, broken protocol.
    pub errors: u64,
    /// Findings: no answer within the limit, or a cluster that does not come back.
    pub hung: u64,
    /// The longest that an answer took, in milliseconds.
    pub longest_ms: u64,
    /// Errors of the list by their SQLSTATE.
    pub told: BTreeMap<String, u64>,
}

impl Cell {
    fn of(report: &Report) -> Self {
        let mut cell = Self {
            experiments: 1,
            missed: u64::from(!report.missed.is_empty()),
            tally: report.tally,
            reported: report.lost,
            violations: u64::from(!report.findings.is_empty()),
            longest_ms: report.notes.longest_ms,
            ..Self::default()
        };
        for finding in &report.findings {
            let count = match finding.anomaly {
                Anomaly::Lost | Anomaly::Fractured => &mut cell.lost,
                Anomaly::Duplicate => &mut cell.doubled,
                Anomaly::Client => &mut cell.errors,
                Anomaly::Hung => &mut cell.hung,
                _ => &mut cell.anomalies,
            };
            *count += 1;
        }
        for (text, count) in &report.notes.told {
            *cell.told.entry(sqlstate(text)).or_default() += count;
        }
        cell
    }

    fn add(&mut self, other: &Self) {
        let Self {
            experiments,
            missed,
            tally,
            reported,
            violations,
            lost,
            doubled,
            anomalies,
            errors,
            hung,
            longest_ms,
            told,
        } = other;
        self.experiments += experiments;
        self.missed += missed;
        self.tally.add(*tally);
        self.reported += reported;
        self.violations += violations;
        self.lost += lost;
        self.doubled += doubled;
        self.anomalies += anomalies;
        self.errors += errors;
        self.hung += hung;
        self.longest_ms = self.longest_ms.max(*longest_ms);
        for (state, count) in told {
            *self.told.entry(state.clone()).or_default() += count;
        }
    }

    fn told(&self) -> String {
        let each = self.told.iter().map(|(state, n)| format!("{state} × {n}"));
        each.collect::<Vec<_>>().join(", ")
    }

    fn lost(&self) -> String {
        match self.reported {
            0 => self.lost.to_string(),
            n => format!("{} (and {n} reported)", self.lost),
        }
    }
}

/// `ERROR 40001: ...`
fn sqlstate(text: &str) -> String {
    let state = text.split([' ', ':']).nth(1);
    state.filter(|s| s.len() == 5).unwrap_or("none").to_owned()
}

/// A pair with its cell.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Line {
    workload: Workload,
    fault: FaultKind,
    #[serde(flatten)]
    cell: Cell,
}

/// Runs, added up.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Summary {
    cells: Vec<Line>,
    /// What clients were told, word by word.
    told: BTreeMap<String, u64>,
    /// At which messages sessions were hit.
    messages: BTreeMap<String, u64>,
    /// Seeds by the commit that they ran on.
    seeds: BTreeMap<String, BTreeSet<u64>>,
    /// Time of all runs together.
    seconds: f64,
    failed_seeds: Vec<u64>,
}

impl Summary {
    /// Reads one from a file; an empty one when there is no such file.
    ///
    /// # Errors
    /// The file holds something else.
    pub fn read(file: &Path) -> Result<Self> {
        if !file.exists() {
            return Ok(Self::default());
        }
        let named = |error| format!("{} holds no results: {error}", file.display());
        Ok(serde_json::from_slice(&std::fs::read(file)?).map_err(named)?)
    }

    /// Writes it to a file, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let fresh = file.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec_pretty(self)?)?;
        Ok(std::fs::rename(fresh, file)?)
    }

    /// Adds an experiment of a commit.
    pub fn add(&mut self, commit: &str, report: &Report) {
        let plan = &report.plan;
        let cell = Cell::of(report);
        for (text, count) in &report.notes.told {
            *self.told.entry(text.clone()).or_default() += count;
        }
        for message in &report.messages {
            *self.messages.entry(message.clone()).or_default() += 1;
        }
        let seeds = self.seeds.entry(commit.to_owned()).or_default();
        seeds.insert(plan.seed);
        if cell.violations > 0 {
            self.failed_seeds.push(plan.seed);
        }
        self.put(plan.workload, plan.fault, &cell);
    }

    fn put(&mut self, workload: Workload, fault: FaultKind, cell: &Cell) {
        let key = (workload, fault);
        match self
            .cells
            .binary_search_by_key(&key, |l| (l.workload, l.fault))
        {
            Ok(at) => {
                if let Some(line) = self.cells.get_mut(at) {
                    line.cell.add(cell);
                }
            }
            Err(at) => {
                let cell = cell.clone();
                let line = Line {
                    workload,
                    fault,
                    cell,
                };
                self.cells.insert(at, line);
            }
        }
    }

    /// Adds the results of other runs.
    ///
    /// # Errors
    /// An experiment would be counted twice: the same seed on the same commit.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        for (commit, seeds) in other.seeds {
            let known = self.seeds.entry(commit.clone()).or_default();
            if let Some(seed) = seeds.intersection(known).next() {
                return Err(format!("seed {seed} is there twice on commit {commit}").into());
            }
            known.extend(seeds);
        }
        for line in &other.cells {
            self.put(line.workload, line.fault, &line.cell);
        }
        for (text, count) in other.told {
            *self.told.entry(text).or_default() += count;
        }
        for (message, count) in other.messages {
            *self.messages.entry(message).or_default() += count;
        }
        self.seconds += other.seconds;
        self.failed_seeds.extend(other.failed_seeds);
        Ok(())
    }

    /// Whether this experiment is in it.
    #[must_use]
    pub fn has(&self, commit: &str, seed: u64) -> bool {
        self.seeds
            .get(commit)
            .is_some_and(|seeds| seeds.contains(&seed))
    }

    /// How long another run took.
    pub fn took(&mut self, seconds: f64) {
        self.seconds += seconds;
    }

    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failed_seeds.is_empty()
    }

    fn total(&self) -> Cell {
        let mut total = Cell::default();
        self.cells.iter().for_each(|line| total.add(&line.cell));
        total
    }

    /// A table for a terminal, with what clients were told.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<12} {:<23} {:>5} {:>6} {:>7} {:>7} {:>7} {:>8} {:>5} {:>7} {:>9} {:>6} {:>4} {:>9}\n",
            "workload",
            "fault",
            "runs",
            "missed",
            "ok",
            "failed",
            "unknown",
            "reported",
            "lost",
            "doubled",
            "anomalies",
            "errors",
            "hung",
            "longest"
        );
        let mut row = |workload: &str, fault: &str, cell: &Cell| {
            let Tally {
                ok,
                failed,
                unknown,
                ..
            } = cell.tally;
            let _ = writeln!(
                text,
                "{workload:<12} {fault:<23} {:>5} {:>6} {ok:>7} {failed:>7} {unknown:>7} {:>8} {:>5} {:>7} {:>9} {:>6} {:>4} {:>6} ms",
                cell.experiments,
                cell.missed,
                cell.reported,
                cell.lost,
                cell.doubled,
                cell.anomalies,
                cell.errors,
                cell.hung,
                cell.longest_ms
            );
        };
        for line in &self.cells {
            row(line.workload.name(), line.fault.name(), &line.cell);
        }
        row("all", "", &self.total());
        text.push_str("\nwhat clients were told:\n");
        for (what, count) in &self.told {
            let _ = writeln!(text, "{count:>7}  {what}");
        }
        text.push_str("\nsessions hit behind:\n");
        for (what, count) in &self.messages {
            let _ = writeln!(text, "{count:>7}  {what}");
        }
        let experiments = self.total().experiments.max(1);
        #[allow(clippy::cast_precision_loss)] // a count of experiments
        let each = self.seconds / experiments as f64;
        let _ = writeln!(text, "\n{:.0} s, {each:.1} s an experiment", self.seconds);
        text
    }

    /// The tables for the documentation: all runs, by workload and fault.
    #[must_use]
    pub fn markdown(&self) -> String {
        let commits = self
            .seeds
            .iter()
            .map(|(commit, seeds)| format!("{} on commit {commit}", seeds.len()));
        let total = self.total();
        let mut text = format!(
            "{} experiments ({}), {} violations.\n\n",
            total.experiments,
            commits.collect::<Vec<_>>().join(", "),
            total.violations,
        );
        text.push_str(
            "| workload | fault | runs | fault missed | acknowledged | lost | doubled | anomalies | unexpected errors | hung | honest errors | longest answer |\n\
             |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---:|\n",
        );
        let mut row = |workload: &str, fault: &str, cell: &Cell| {
            let _ = writeln!(
                text,
                "| {workload} | {fault} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} ms |",
                cell.experiments,
                cell.missed,
                cell.tally.ok,
                cell.lost(),
                cell.doubled,
                cell.anomalies,
                cell.errors,
                cell.hung,
                cell.told(),
                cell.longest_ms
            );
        };
        for line in &self.cells {
            row(line.workload.name(), line.fault.name(), &line.cell);
        }
        row("**all**", "", &total);
        let hits = self
            .messages
            .iter()
            .map(|(what, n)| format!("{what} × {n}"));
        let hits: Vec<String> = hits.collect();
        let _ = writeln!(
            text,
            "\nSessions were hit right behind these messages: {}.",
            hits.join(", ")
        );
        text
    }

    /// One JSON object.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let mut json = serde_json::to_value(self).unwrap_or_default();
        if let Some(object) = json.as_object_mut() {
            let total = serde_json::to_value(self.total()).unwrap_or_default();
            object.insert("total".to_owned(), total);
        }
        json
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(seed: u64, reported: u64) -> Summary {
        let mut summary = Summary::default();
        let mut cell = Cell {
            experiments: 1,
            reported,
            ..Cell::default()
        };
        cell.told.insert("40001".into(), 2);
        summary.put(Workload::Bank, FaultKind::Crash, &cell);
        let seeds = summary.seeds.entry("abc".into()).or_default();
        seeds.insert(seed);
        summary
    }

    #[test]
    fn results_add_up_and_survive_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("results.json");
        let mut sum = Summary::read(&file).unwrap();
        sum.merge(one(1, 0)).unwrap();
        sum.merge(one(2, 3)).unwrap();
        sum.write(&file).unwrap();
        let read = Summary::read(&file).unwrap();
        assert_eq!(read.total(), sum.total());
        assert!(read.has("abc", 2) && !read.has("abc", 3) && !read.has("def", 2));
        let row =
            "| bank | crash | 2 | 0 | 0 | 0 (and 3 reported) | 0 | 0 | 0 | 0 | 40001 × 4 | 0 ms |";
        assert!(read.markdown().contains(row), "{}", read.markdown());
    }

    #[test]
    fn nothing_is_counted_twice() {
        let mut sum = one(1, 0);
        assert!(sum.merge(one(1, 0)).is_err());
    }

    #[test]
    fn states_of_texts() {
        assert_eq!(sqlstate("ERROR 40001: the transaction"), "40001");
        assert_eq!(sqlstate("connection closed: x"), "none");
    }
}
