//! What one client writes down, and what all of them wrote together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::checker::effects::Effect;
use super::checker::sequences::Draw;
use super::checker::two_phase::Branch;
use super::checker::{Anomaly, Finding};
use super::history::{Outcome, Txn};

/// How many requests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Acknowledged.
    pub ok: u64,
    /// Told that nothing has happened, by an error of the list.
    pub failed: u64,
    /// Outcome unknown (08007).
    pub unknown: u64,
    /// Ended for want of a primary (57P03, 08006).
    pub no_primary: u64,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: Self) {
        self.ok += other.ok;
        self.failed += other.failed;
        self.unknown += other.unknown;
        self.no_primary += other.no_primary;
    }
}

/// The notes.
#[derive(Debug, Default, Serialize)]
pub struct Notes {
    /// Counts.
    pub tally: Tally,
    /// The longest that an answer took, in milliseconds.
    pub longest_ms: u64,
    /// Errors of the list, by their text, how often.
    pub told: BTreeMap<String, u64>,
    /// List-append transactions.
    pub txns: Vec<Txn>,
    /// Requests that leave rows.
    pub effects: Vec<Effect>,
    /// Sums of all balances, with who read them.
    pub sums: Vec<(i64, String)>,
    /// Values of sequences.
    pub draws: Vec<Draw>,
    /// Prepared transactions.
    pub branches: Vec<Branch>,
    /// What no client must ever get.
    pub violations: Vec<Finding>,
}

impl Notes {
    /// Takes over another client's.
    pub fn merge(&mut self, other: Self) {
        let Self {
            tally,
            longest_ms,
            told,
            txns,
            effects,
            sums,
            draws,
            branches,
            violations,
        } = other;
        self.tally.add(tally);
        self.longest_ms = self.longest_ms.max(longest_ms);
        for (text, count) in told {
            *self.told.entry(text).or_default() += count;
        }
        self.txns.extend(txns);
        self.effects.extend(effects);
        self.sums.extend(sums);
        self.draws.extend(draws);
        self.branches.extend(branches);
        self.violations.extend(violations);
    }

    /// Counts an end.
    pub fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Ok => self.tally.ok += 1,
            Outcome::Failed => self.tally.failed += 1,
            Outcome::Unknown => self.tally.unknown += 1,
        }
    }

    /// Something that must not be.
    pub fn violation(&mut self, kind: Anomaly, what: String) {
        self.violations.push(Finding::new(kind, what));
    }
}
