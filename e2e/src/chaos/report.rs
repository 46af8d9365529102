//! What a run came to, for people, for programs and for the documentation.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use super::experiment::Report;
use super::fault::FaultKind;
use super::notes::Tally;
use super::workload::Workload;

/// One pair of workload and fault.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Cell {
    /// Experiments.
    pub experiments: u64,
    /// Their requests.
    pub tally: Tally,
    /// Acknowledged and lost under asynchronous replication.
    pub lost: u64,
    /// Experiments with a violation.
    pub violations: u64,
    /// The longest that an answer took, in milliseconds.
    pub longest_ms: u64,
}

impl Cell {
    fn add(&mut self, other: &Self) {
        self.experiments += other.experiments;
        self.tally.add(other.tally);
        self.lost += other.lost;
        self.violations += other.violations;
        self.longest_ms = self.longest_ms.max(other.longest_ms);
    }
}

/// A run.
#[derive(Debug, Default)]
pub struct Summary {
    cells: BTreeMap<(Workload, FaultKind), Cell>,
    told: BTreeMap<String, u64>,
    seconds: f64,
    failed_seeds: Vec<u64>,
}

/// For programs.
#[derive(Debug, Serialize)]
struct Line {
    workload: &'static str,
    fault: &'static str,
    #[serde(flatten)]
    cell: Cell,
}

impl Summary {
    /// Adds an experiment.
    pub fn add(&mut self, report: &Report) {
        let key = (report.plan.workload, report.plan.fault);
        let violated = !report.findings.is_empty();
        self.cells.entry(key).or_default().add(&Cell {
            experiments: 1,
            tally: report.tally,
            lost: report.lost,
            violations: u64::from(violated),
            longest_ms: report.notes.longest_ms,
        });
        for (text, count) in &report.notes.told {
            *self.told.entry(text.clone()).or_default() += count;
        }
        if violated {
            self.failed_seeds.push(report.plan.seed);
        }
    }

    /// How long the run took.
    pub fn took(&mut self, seconds: f64) {
        self.seconds = seconds;
    }

    /// Whether nothing was wrong.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failed_seeds.is_empty()
    }

    fn total(&self) -> Cell {
        let mut total = Cell::default();
        self.cells.values().for_each(|cell| total.add(cell));
        total
    }

    fn lines(&self) -> impl Iterator<Item = Line> {
        let line = |(&(workload, fault), &cell): (&(Workload, FaultKind), &Cell)| Line {
            workload: workload.name(),
            fault: fault.name(),
            cell,
        };
        self.cells.iter().map(line)
    }

    /// A table for a terminal, with what clients were told.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:<12} {:<20} {:>5} {:>9} {:>7} {:>8} {:>5} {:>9} {:>10}\n",
            "workload", "fault", "runs", "ok", "failed", "unknown", "lost", "longest", "violations"
        );
        let mut row = |workload: &str, fault: &str, cell: &Cell| {
            let Cell {
                experiments,
                tally,
                lost,
                violations,
                longest_ms,
            } = cell;
            let Tally {
                ok,
                failed,
                unknown,
                ..
            } = tally;
            let _ = writeln!(
                text,
                "{workload:<12} {fault:<20} {experiments:>5} {ok:>9} {failed:>7} {unknown:>8} {lost:>5} {longest_ms:>6} ms {violations:>10}"
            );
        };
        for line in self.lines() {
            row(line.workload, line.fault, &line.cell);
        }
        row("all", "", &self.total());
        text.push_str("\nwhat clients were told:\n");
        for (what, count) in &self.told {
            let _ = writeln!(text, "{count:>7}  {what}");
        }
        let experiments = self.total().experiments.max(1);
        #[allow(clippy::cast_precision_loss)] // a count of experiments
        let each = self.seconds / experiments as f64;
        let _ = writeln!(text, "\n{:.0} s, {each:.1} s an experiment", self.seconds);
        text
    }

    /// The table for the documentation.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| workload | fault | experiments | ok | failed | unknown | longest answer | violations |\n\
             |---|---|---:|---:|---:|---:|---:|---:|\n",
        );
        let mut row = |workload: &str, fault: &str, cell: &Cell| {
            let Cell {
                experiments,
                tally,
                violations,
                longest_ms,
                ..
            } = cell;
            let Tally {
                ok,
                failed,
                unknown,
                ..
            } = tally;
            let _ = writeln!(
                text,
                "| {workload} | {fault} | {experiments} | {ok} | {failed} | {unknown} | {longest_ms} ms | {violations} |"
            );
        };
        for line in self.lines() {
            row(line.workload, line.fault, &line.cell);
        }
        row("all", "", &self.total());
        text
    }

    /// One JSON object.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "cells": self.lines().collect::<Vec<_>>(),
            "total": self.total(),
            "told": self.told,
            "seconds": self.seconds,
            "failed_seeds": self.failed_seeds,
        })
    }
}
