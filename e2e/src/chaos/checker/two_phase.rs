//! Two-phase commit: what was acknowledged of PREPARE TRANSACTION, COMMIT PREPARED and ROLLBACK
//! PREPARED is so in the end.

use serde::Serialize;

use super::{Anomaly, Finding};
use crate::chaos::history::Outcome;

/// How a prepared transaction was to be ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// COMMIT PREPARED.
    Commit,
    /// ROLLBACK PREPARED.
    Rollback,
}

/// A transaction as its coordinator knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Branch {
    /// Its global identifier.
    pub gid: String,
    /// Who ran it.
    pub client: usize,
    /// Rows that it inserts.
    pub rows: usize,
    /// The answer to PREPARE TRANSACTION.
    pub prepare: Outcome,
    /// What was asked for then, and the answer.
    pub decision: Option<(Decision, Outcome)>,
    /// When it began and when the last answer came, in microseconds.
    pub when: (u64, u64),
}

impl std::fmt::Display for Branch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            gid,
            client,
            prepare,
            when,
            ..
        } = self;
        write!(
            f,
            "\"{gid}\" (client {client}, {}..{} us): prepare {prepare:?}",
            when.0, when.1
        )?;
        match self.decision {
            Some((decision, outcome)) => write!(f, ", {decision:?} {outcome:?}"),
            None => write!(f, ", not decided"),
        }
    }
}

/// What the database says of it in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// It stands in `pg_prepared_xacts`.
    pub prepared: bool,
    /// Rows of it that are visible.
    pub rows: usize,
}

/// Judges one transaction.
#[must_use]
pub fn check(branch: &Branch, found: Found) -> Option<Finding> {
    let all = found.rows == branch.rows;
    let anomaly = if found.rows > branch.rows {
        Anomaly::Duplicate
    } else if found.rows > 0 && (!all || found.prepared) {
        Anomaly::Fractured
    } else if found.rows > 0 {
        // Committed: somebody must have asked for it, and nobody be told that it failed.
        match (branch.prepare, branch.decision) {
            (Outcome::Ok | Outcome::Unknown, Some((Decision::Commit, outcome)))
                if outcome != Outcome::Failed =>
            {
                return None;
            }
            _ => Anomaly::FailedButPresent,
        }
    } else {
        let may_be_prepared =
            branch.prepare != Outcome::Failed && !matches!(branch.decision, Some((_, Outcome::Ok)));
        let may_be_gone = match (branch.prepare, branch.decision) {
            (Outcome::Failed, _) => true,
            (_, Some((Decision::Rollback, outcome))) => outcome != Outcome::Failed,
            // An unknown PREPARE may have failed; then COMMIT PREPARED finds nothing.
            (Outcome::Unknown, Some((Decision::Commit, outcome))) => outcome != Outcome::Ok,
            (Outcome::Unknown, None) => true,
            (Outcome::Ok, _) => false,
        };
        match found.prepared {
            true if may_be_prepared => return None,
            false if may_be_gone => return None,
            true => Anomaly::FailedButPresent,
            false => Anomaly::Lost,
        }
    };
    let there = format!(
        "in the end: prepared {}, rows {}",
        found.prepared, found.rows
    );
    let finding = Finding::new(anomaly, format!("prepared transaction \"{}\"", branch.gid));
    Some(finding.with([branch.to_string(), there]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Decision::{Commit, Rollback};
    use Outcome::{Failed, Ok, Unknown};

    fn kind(
        prepare: Outcome,
        decision: Option<(Decision, Outcome)>,
        prepared: bool,
        rows: usize,
    ) -> Option<Anomaly> {
        let branch = Branch {
            gid: "g".into(),
            client: 0,
            rows: 2,
            prepare,
            decision,
            when: (0, 0),
        };
        check(&branch, Found { prepared, rows }).map(|f| f.anomaly)
    }

    #[test]
    fn acknowledged_is_true() {
        assert_eq!(kind(Ok, None, true, 0), None);
        assert_eq!(kind(Ok, None, false, 0), Some(Anomaly::Lost));
        assert_eq!(kind(Ok, None, false, 2), Some(Anomaly::FailedButPresent));
        assert_eq!(kind(Ok, Some((Commit, Ok)), false, 2), None);
        assert_eq!(kind(Ok, Some((Commit, Ok)), false, 0), Some(Anomaly::Lost));
        let still = kind(Ok, Some((Commit, Ok)), true, 0);
        assert_eq!(still, Some(Anomaly::FailedButPresent));
        assert_eq!(kind(Ok, Some((Rollback, Ok)), false, 0), None);
        let undone = kind(Ok, Some((Rollback, Ok)), false, 2);
        assert_eq!(undone, Some(Anomaly::FailedButPresent));
    }

    #[test]
    fn unknown_is_either_and_failed_is_not() {
        for (prepared, rows) in [(true, 0), (false, 2)] {
            assert_eq!(kind(Ok, Some((Commit, Unknown)), prepared, rows), None);
        }
        let gone = kind(Ok, Some((Commit, Unknown)), false, 0);
        assert_eq!(gone, Some(Anomaly::Lost));
        assert_eq!(kind(Ok, Some((Commit, Failed)), true, 0), None);
        assert_eq!(kind(Unknown, None, true, 0), None);
        assert_eq!(kind(Unknown, None, false, 0), None);
        assert_eq!(kind(Failed, None, false, 0), None);
        assert_eq!(kind(Failed, None, true, 0), Some(Anomaly::FailedButPresent));
    }

    #[test]
    fn all_rows_or_none() {
        let half = kind(Ok, Some((Commit, Ok)), false, 1);
        assert_eq!(half, Some(Anomaly::Fractured));
        let twice = kind(Ok, Some((Commit, Ok)), false, 3);
        assert_eq!(twice, Some(Anomaly::Duplicate));
    }
}
