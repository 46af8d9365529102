//! What a failover would cost, known before it happens: reasons, and the report that counts them.
//!
//! The reasons are a closed set with stable names, so that metrics, SQL and JSON agree. The
//! invariant: a reason names what stands in the way, never who.

use serde::{Deserialize, Serialize};

/// Why a failover would cost a session, its transaction or its statement an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Unprotected {
    /// The mode is `none`.
    ReplayOff,
    /// A transaction is open, and the mode is `session`.
    TransactionsNotReplayed,
    /// The transaction outgrew its journal.
    JournalLimit,
    /// The journals of all sessions together reached their limit.
    JournalTotalLimit,
    /// The transaction began behind the end of another: AND CHAIN, or inside one query.
    Chained,
    /// A request failed in front of its own COMMIT: run again, it might not fail.
    CommitBehindError,
    /// The transaction was aborted by an earlier move and waits for its ROLLBACK.
    AbortedByMove,
    /// Settings were changed, and are not captured.
    SettingsNotCaptured,
    /// Statements were prepared, and are not captured.
    StatementsNotCaptured,
    /// A WITH HOLD cursor.
    CursorWithHold,
    /// The server could not be asked for its state.
    StateUnknown,
    /// Session-level advisory locks that could not be counted, or are too many.
    AdvisoryLock,
    /// A temporary table or another object in `pg_temp`.
    TemporaryObject,
    /// A statement outside a transaction block whose outcome could not be found after a crash.
    OutcomeUnknowable,
}

impl Unprotected {
    /// All reasons, in the order of their discriminants.
    pub const ALL: [Self; 14] = [
        Self::ReplayOff,
        Self::TransactionsNotReplayed,
        Self::JournalLimit,
        Self::JournalTotalLimit,
        Self::Chained,
        Self::CommitBehindError,
        Self::AbortedByMove,
        Self::SettingsNotCaptured,
        Self::StatementsNotCaptured,
        Self::CursorWithHold,
        Self::StateUnknown,
        Self::AdvisoryLock,
        Self::TemporaryObject,
        Self::OutcomeUnknowable,
    ];

    /// Its name, as metrics, SQL and JSON have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ReplayOff => "replay_off",
            Self::TransactionsNotReplayed => "transactions_not_replayed",
            Self::JournalLimit => "journal_limit",
            Self::JournalTotalLimit => "journal_total_limit",
            Self::Chained => "chained",
            Self::CommitBehindError => "commit_behind_error",
            Self::AbortedByMove => "aborted_by_move",
            Self::SettingsNotCaptured => "settings_not_captured",
            Self::StatementsNotCaptured => "statements_not_captured",
            Self::CursorWithHold => "cursor_with_hold",
            Self::StateUnknown => "state_unknown",
            Self::AdvisoryLock => "advisory_lock",
            Self::TemporaryObject => "temporary_object",
            Self::OutcomeUnknowable => "outcome_unknowable",
        }
    }

    /// What it means, for people.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::ReplayOff => "replay is switched off",
            Self::TransactionsNotReplayed => "replay of transactions is switched off",
            Self::JournalLimit => "journal over the session's limit",
            Self::JournalTotalLimit => "journals over the proxy's limit",
            Self::Chained => "the transaction was begun by AND CHAIN or inside one query",
            Self::CommitBehindError => {
                "a request failed in front of its own COMMIT, and might commit if it ran again"
            }
            Self::AbortedByMove => "the transaction was aborted by an earlier failover",
            Self::SettingsNotCaptured => "settings, which are not captured",
            Self::StatementsNotCaptured => "prepared statements, which are not captured",
            Self::CursorWithHold => "cursor WITH HOLD",
            Self::StateUnknown => "its state, for which the server could not be asked",
            Self::AdvisoryLock => "session advisory locks that cannot be counted",
            Self::TemporaryObject => "temporary object",
            Self::OutcomeUnknowable => "its outcome could not be found after a crash",
        }
    }
}

/// What was protected, and what was not and why, since the proxy started.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ProtectionReport {
    /// When the counting began: seconds since the Unix epoch.
    pub since: f64,
    /// A row for each database, user, application name and reason that occurred.
    pub rows: Vec<ProtectionRow>,
}

/// One row of the report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProtectionRow {
    /// Database; `other` for all beyond the limit of what is told apart.
    pub database: String,
    /// Role that logged in.
    pub user: String,
    /// `application_name` of the login.
    pub application: String,
    /// Why not; `None` for what was protected.
    pub reason: Option<Unprotected>,
    /// Transaction blocks, by the first reason in their life.
    pub transactions: u64,
    /// Statements outside a transaction block.
    pub statements: u64,
    /// Seconds that sessions spent so inside a transaction block.
    pub transaction_seconds: f64,
    /// Seconds that sessions spent so outside of one.
    pub idle_seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_json_and_in_order() {
        for (at, reason) in Unprotected::ALL.into_iter().enumerate() {
            assert_eq!(reason as usize, at);
            let json = serde_json::to_string(&reason).unwrap_or_default();
            assert_eq!(json, format!("\"{}\"", reason.name()));
        }
    }
}
