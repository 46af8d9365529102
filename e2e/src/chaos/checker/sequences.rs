//! Values of sequences: what one client holds in a committed transaction, no other ever gets.
//!
//! A value that an aborted transaction has seen may come again: PostgreSQL itself forgets it in a
//! crash.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Anomaly, Finding};
use crate::chaos::history::Outcome;

/// A value that a client got.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Draw {
    /// The sequence.
    pub sequence: String,
    /// The value.
    pub value: i64,
    /// The transaction it came in, unique in the history.
    pub txn: u64,
    /// Who got it.
    pub client: usize,
    /// How that transaction ended.
    pub outcome: Outcome,
    /// When the answer came, in microseconds.
    pub at: u64,
}

/// Values that were handed out twice; `committed` says of an unknown transaction whether it is in
/// the database.
#[must_use]
pub fn check(draws: &[Draw], committed: impl Fn(u64) -> bool) -> Vec<Finding> {
    let mut holders: BTreeMap<(&str, i64), Vec<&Draw>> = BTreeMap::new();
    let lasting = draws.iter().filter(|d| match d.outcome {
        Outcome::Ok => true,
        Outcome::Unknown => committed(d.txn),
        Outcome::Failed => false,
    });
    for draw in lasting {
        let holder = holders.entry((&draw.sequence, draw.value)).or_default();
        holder.push(draw);
    }
    let twice = holders.into_iter().filter(|(_, draws)| draws.len() > 1);
    let finding = |((sequence, value), draws): ((&str, i64), Vec<&Draw>)| {
        let what = format!("value {value} of sequence {sequence} was handed out twice");
        let lines = draws.iter().map(|d| {
            let Draw {
                txn,
                client,
                outcome,
                at,
                ..
            } = d;
            format!("transaction {txn} of client {client} ({outcome:?}) got it at {at} us")
        });
        Finding::new(Anomaly::Duplicate, what).with(lines)
    };
    twice.map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(txn: u64, value: i64, outcome: Outcome) -> Draw {
        Draw {
            sequence: "s".into(),
            value,
            txn,
            client: 0,
            outcome,
            at: 0,
        }
    }

    #[test]
    fn a_value_that_lasts_is_handed_out_once() {
        use Outcome::{Failed, Ok, Unknown};
        let twice =
            |a, b, known: bool| !check(&[draw(1, 5, a), draw(2, 5, b)], |_| known).is_empty();
        assert!(twice(Ok, Ok, true));
        assert!(twice(Ok, Unknown, true));
        assert!(!twice(Ok, Unknown, false));
        assert!(!twice(Ok, Failed, true));
        assert!(check(&[draw(1, 5, Ok), draw(2, 6, Ok)], |_| true).is_empty());
    }
}
