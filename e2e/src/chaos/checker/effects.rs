//! Rows that requests left behind against what their clients know: every acknowledged request
//! exactly once and whole, every failed one not at all, every unknown one whole or not at all.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Anomaly, Finding};
use crate::chaos::history::Outcome;

/// Findings that are reported.
const SHOWN: usize = 10;

/// One request that writes rows of its own, all or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Effect {
    /// Its number, in each of its rows.
    pub id: u64,
    /// Who sent it.
    pub client: usize,
    /// What each of its rows must hold.
    pub rows: Vec<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// What was sent, for people.
    pub sent: String,
    /// When it was sent and when its end was known, in microseconds.
    pub when: (u64, u64),
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "request {} (client {}, {:?}, {}..{} us): {}",
            self.id, self.client, self.outcome, self.when.0, self.when.1, self.sent
        )
    }
}

/// Rows of the database by the number of their request.
pub type Rows = BTreeMap<u64, Vec<String>>;

/// What is wrong, and how many acknowledged requests are not there.
///
/// `loss_allowed`: under asynchronous replication a failover may lose acknowledged requests; they
/// are counted, and nothing else about them is forgiven.
#[must_use]
pub fn check(effects: &[Effect], rows: &Rows, loss_allowed: bool) -> (Vec<Finding>, u64) {
    let known: BTreeMap<u64, &Effect> = effects.iter().map(|e| (e.id, e)).collect();
    let (mut findings, mut lost) = (Vec::new(), 0);
    for id in rows.keys().filter(|id| !known.contains_key(id)) {
        let what = format!("rows of request {id}, which nobody sent");
        findings.push(Finding::new(Anomaly::Garbage, what));
    }
    let none = Vec::new();
    for effect in effects {
        let found = rows.get(&effect.id).unwrap_or(&none);
        let Some((anomaly, what)) = judge(effect, found) else {
            continue;
        };
        if anomaly == Anomaly::Lost {
            lost += 1;
            if loss_allowed {
                continue;
            }
        }
        if findings.len() < SHOWN {
            let found = format!("found: {found:?}");
            let finding = Finding::new(anomaly, what);
            findings.push(finding.with([effect.to_string(), found]));
        }
    }
    (findings, lost)
}

fn judge(effect: &Effect, found: &[String]) -> Option<(Anomaly, String)> {
    let count = |rows: &[String]| {
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for row in rows {
            *counts.entry(row.clone()).or_default() += 1;
        }
        counts
    };
    let (wanted, there) = (count(&effect.rows), count(found));
    let id = effect.id;
    if found.is_empty() {
        let lost = effect.outcome == Outcome::Ok && !effect.rows.is_empty();
        return lost.then(|| (Anomaly::Lost, format!("request {id}")));
    }
    if let Some(row) = there.keys().find(|row| !wanted.contains_key(*row)) {
        let what = format!("request {id} has row {row}, sent were {:?}", effect.rows);
        return Some((Anomaly::Altered, what));
    }
    if let Some((row, n)) = there.iter().find(|(row, n)| wanted.get(*row) < Some(n)) {
        let what = format!("row {row} of request {id} is there {n} times");
        return Some((Anomaly::Duplicate, what));
    }
    if there != wanted {
        let what = format!(
            "{} of {} rows of request {id}",
            found.len(),
            effect.rows.len()
        );
        return Some((Anomaly::Fractured, what));
    }
    let failed = effect.outcome == Outcome::Failed;
    failed.then(|| (Anomaly::FailedButPresent, format!("request {id}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn effect(outcome: Outcome) -> Effect {
        Effect {
            id: 7,
            client: 1,
            rows: vec!["a".into(), "b".into()],
            outcome,
            sent: "insert".into(),
            when: (0, 1),
        }
    }

    fn kinds(outcome: Outcome, found: &[&str]) -> Vec<Anomaly> {
        let mut rows = Rows::new();
        if !found.is_empty() {
            rows.insert(7, found.iter().map(ToString::to_string).collect());
        }
        let (findings, _) = check(&[effect(outcome)], &rows, false);
        findings.iter().map(|f| f.anomaly).collect()
    }

    #[test]
    fn all_or_nothing_once() {
        use Outcome::{Failed, Ok, Unknown};
        assert_eq!(kinds(Ok, &["b", "a"]), []);
        assert_eq!(kinds(Ok, &[]), [Anomaly::Lost]);
        assert_eq!(kinds(Failed, &[]), []);
        assert_eq!(kinds(Failed, &["a", "b"]), [Anomaly::FailedButPresent]);
        assert_eq!(kinds(Unknown, &[]), []);
        assert_eq!(kinds(Unknown, &["a", "b"]), []);
        for outcome in [Ok, Failed, Unknown] {
            assert_eq!(kinds(outcome, &["a"]), [Anomaly::Fractured]);
            assert_eq!(kinds(outcome, &["a", "b", "b"]), [Anomaly::Duplicate]);
            assert_eq!(kinds(outcome, &["a", "c"]), [Anomaly::Altered]);
        }
    }

    #[test]
    fn strangers_are_seen() {
        let rows = Rows::from([(9, vec!["a".into()])]);
        let (findings, _) = check(&[], &rows, true);
        assert_eq!(findings[0].anomaly, Anomaly::Garbage);
    }

    #[test]
    fn loss_is_counted_where_it_is_allowed_and_nothing_else_is() {
        let (findings, lost) = check(&[effect(Outcome::Ok)], &Rows::new(), true);
        assert_eq!((findings.len(), lost), (0, 1));
        let twice = Rows::from([(7, vec!["a".into(), "a".into(), "b".into()])]);
        let (findings, lost) = check(&[effect(Outcome::Ok)], &twice, true);
        assert_eq!((findings.len(), lost), (1, 0));
    }
}
