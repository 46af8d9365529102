//! The protection report for people: what was protected, what was not, and why.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use helios_api::protection::{ProtectionReport, ProtectionRow, Unprotected};

use crate::table;

/// A total and the protected part of it.
#[derive(Debug, Default, Clone, Copy)]
struct Share {
    all: f64,
    protected: f64,
}

impl Share {
    fn add(&mut self, amount: f64, protected: bool) {
        self.all += amount;
        self.protected += if protected { amount } else { 0.0 };
    }

    /// Never 100 % when something was not protected.
    fn percent(self) -> String {
        if self.all <= 0.0 {
            return "-".to_owned();
        }
        let tenths = (self.protected / self.all * 1000.0).floor();
        format!("{:.1} %", tenths / 10.0)
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Shares {
    transactions: Share,
    statements: Share,
    seconds: Share,
}

impl Shares {
    fn add(&mut self, row: &ProtectionRow) {
        let protected = row.reason.is_none();
        #[expect(
            clippy::cast_precision_loss,
            reason = "shown with one decimal of a percent"
        )]
        let count = |n: u64| n as f64;
        self.transactions.add(count(row.transactions), protected);
        self.statements.add(count(row.statements), protected);
        let seconds = row.transaction_seconds + row.idle_seconds;
        self.seconds.add(seconds, protected);
    }
}

fn time(seconds: f64) -> String {
    let whole = Duration::try_from_secs_f64(seconds.round())
        .unwrap_or_default()
        .as_secs();
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, _) => format!("{seconds:.1}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// The report as text.
pub(crate) fn describe(report: &ProtectionReport) -> String {
    let mut total = Shares::default();
    let mut keys: BTreeMap<[&str; 3], Shares> = BTreeMap::new();
    let mut causes = Vec::new();
    for row in &report.rows {
        let key = [&*row.database, &*row.user, &*row.application];
        total.add(row);
        keys.entry(key).or_default().add(row);
        if let Some(reason) = row.reason {
            causes.push(cause(row, reason));
        }
    }
    let mut text = format!(
        "protected since the proxy started: {} of {} transactions, {} of {} statements outside of \
         one, {} of {} of session time\n",
        total.transactions.percent(),
        total.transactions.all,
        total.statements.percent(),
        total.statements.all,
        total.seconds.percent(),
        time(total.seconds.all),
    );
    if keys.is_empty() {
        return text;
    }
    let rows: Vec<Vec<String>> = keys
        .iter()
        .map(|(key, shares)| shown(*key, shares))
        .collect();
    let _ = write!(
        text,
        "\n{}",
        table::render(
            &[
                "DATABASE",
                "USER",
                "APPLICATION",
                "TRANSACTIONS",
                "PROTECTED",
                "STATEMENTS",
                "PROTECTED",
                "TIME",
                "PROTECTED",
            ],
            &rows,
        )
    );
    if !causes.is_empty() {
        let head = [
            "NOT PROTECTED",
            "DATABASE",
            "USER",
            "APPLICATION",
            "TRANSACTIONS",
            "STATEMENTS",
            "TIME",
        ];
        let _ = write!(text, "\n{}", table::render(&head, &causes));
    }
    text
}

fn shown(key: [&str; 3], shares: &Shares) -> Vec<String> {
    let mut row: Vec<String> = key.iter().map(ToString::to_string).collect();
    row.extend([
        shares.transactions.all.to_string(),
        shares.transactions.percent(),
        shares.statements.all.to_string(),
        shares.statements.percent(),
        time(shares.seconds.all),
        shares.seconds.percent(),
    ]);
    row
}

fn cause(row: &ProtectionRow, reason: Unprotected) -> Vec<String> {
    vec![
        reason.text().to_owned(),
        row.database.clone(),
        row.user.clone(),
        row.application.clone(),
        row.transactions.to_string(),
        row.statements.to_string(),
        time(row.transaction_seconds + row.idle_seconds),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(reason: Option<Unprotected>, transactions: u64, seconds: f64) -> ProtectionRow {
        ProtectionRow {
            database: "shop".into(),
            user: "app".into(),
            application: "till".into(),
            reason,
            transactions,
            statements: 0,
            transaction_seconds: 0.0,
            idle_seconds: seconds,
        }
    }

    #[test]
    fn the_report_says_how_much_and_why_not() {
        let report = ProtectionReport {
            since: 0.0,
            rows: vec![
                row(None, 99_999, 7200.0),
                row(Some(Unprotected::TemporaryObject), 1, 90.0),
            ],
        };
        assert_eq!(
            describe(&report),
            "\
protected since the proxy started: 99.9 % of 100000 transactions, - of 0 statements outside of \
one, 98.7 % of 2h01m of session time

DATABASE  USER  APPLICATION  TRANSACTIONS  PROTECTED  STATEMENTS  PROTECTED  TIME   PROTECTED
shop      app   till         100000        99.9 %     0           -          2h01m  98.7 %

NOT PROTECTED     DATABASE  USER  APPLICATION  TRANSACTIONS  STATEMENTS  TIME
temporary object  shop      app   till         1             0           1m30s
"
        );
    }
}
