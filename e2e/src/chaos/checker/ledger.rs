//! The bank: every balance is what the ledger makes of it, and no money comes or goes.

use std::collections::BTreeMap;

use super::{Anomaly, Finding};

/// What each account begins with.
pub const INITIAL: i64 = 1000;

/// A line of the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Account that pays.
    pub source: i64,
    /// Account that is paid.
    pub target: i64,
    /// How much.
    pub amount: i64,
}

/// Compares balances with the ledger, and the sums that clients read with the only one possible.
#[must_use]
pub fn check(
    balances: &BTreeMap<i64, i64>,
    ledger: &[Transfer],
    sums: &[(i64, String)],
) -> Vec<Finding> {
    let mut expected: BTreeMap<i64, i64> = balances.keys().map(|&id| (id, INITIAL)).collect();
    for line in ledger {
        *expected.entry(line.source).or_default() -= line.amount;
        *expected.entry(line.target).or_default() += line.amount;
    }
    let mut findings = Vec::new();
    for (id, want) in &expected {
        let found = balances.get(id).copied().unwrap_or_default();
        if found != *want {
            let what = format!("account {id} holds {found}, the ledger makes {want}");
            findings.push(Finding::new(Anomaly::Altered, what));
        }
    }
    let total = INITIAL * i64::try_from(balances.len()).unwrap_or(i64::MAX);
    let held: i64 = balances.values().sum();
    if held != total {
        let what = format!("all accounts hold {held}, not {total}");
        findings.push(Finding::new(Anomaly::Altered, what));
    }
    if let Some((sum, reader)) = sums.iter().find(|(sum, _)| *sum != total) {
        let what = format!("a client read the sum {sum}, which must be {total}");
        findings.push(Finding::new(Anomaly::Fractured, what).with([reader.clone()]));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(source: i64, target: i64, amount: i64) -> Transfer {
        Transfer {
            source,
            target,
            amount,
        }
    }

    fn kinds(balances: [i64; 2], ledger: &[Transfer], sum: i64) -> Vec<Anomaly> {
        let balances = balances.into_iter().enumerate();
        let balances = balances
            .map(|(id, b)| (i64::try_from(id).unwrap(), b))
            .collect();
        let findings = check(&balances, ledger, &[(sum, "reader".to_owned())]);
        findings.iter().map(|f| f.anomaly).collect()
    }

    #[test]
    fn money_stays() {
        let ledger = [transfer(0, 1, 30), transfer(1, 0, 10)];
        assert_eq!(kinds([980, 1020], &ledger, 2000), []);
        assert_eq!(kinds([1000, 1000], &[], 2000), []);
    }

    #[test]
    fn money_that_comes_goes_or_is_seen_in_between() {
        let ledger = [transfer(0, 1, 30)];
        assert!(!kinds([940, 1060], &ledger, 2000).is_empty(), "moved twice");
        assert!(!kinds([970, 1000], &ledger, 2000).is_empty(), "half");
        assert_eq!(kinds([970, 1030], &ledger, 1970), [Anomaly::Fractured]);
    }
}
