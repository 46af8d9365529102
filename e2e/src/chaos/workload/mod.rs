//! What clients do, at every isolation level: each workload has its statements, and a way to judge
//! them in the end.

mod bank;
mod copy;
mod insert;
mod judge;
mod list_append;
mod sequences;
mod temporary;
mod two_phase;
mod worker;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use judge::{Verdict, judge};
pub use worker::{Setting, Worker};

use super::wire::Trouble;

/// Which workload.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Workload {
    /// Transfers between accounts, with a ledger and unique ids
    Bank,
    /// Lists that are appended to and read: the isolation levels' anomalies
    ListAppend,
    /// Unique rows by autocommit statements, multi-statement queries and pipelines
    Insert,
    /// Loads by COPY FROM STDIN, alone and in transactions
    Copy,
    /// Values of sequences and serial columns that clients have seen
    Sequences,
    /// PREPARE TRANSACTION, COMMIT PREPARED, ROLLBACK PREPARED
    TwoPhase,
    /// Temporary tables, and what transactions derive from them
    Temporary,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Bank,
        Self::ListAppend,
        Self::Insert,
        Self::Copy,
        Self::Sequences,
        Self::TwoPhase,
        Self::Temporary,
    ];

    /// For tables and the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Bank => "bank",
            Self::ListAppend => "list-append",
            Self::Insert => "insert",
            Self::Copy => "copy",
            Self::Sequences => "sequences",
            Self::TwoPhase => "two-phase",
            Self::Temporary => "temporary",
        }
    }

    /// Its tables, in the schema that is already there.
    #[must_use]
    pub fn tables(self, schema: &str) -> String {
        match self {
            Self::Bank => bank::tables(schema),
            Self::ListAppend => list_append::tables(schema),
            Self::Insert => insert::tables(schema),
            Self::Copy | Self::TwoPhase | Self::Temporary => rows_table(schema),
            Self::Sequences => sequences::tables(schema),
        }
    }

    /// One request or transaction of a client.
    ///
    /// # Errors
    /// The connection is of no more use.
    pub(super) async fn step(self, worker: &mut Worker) -> Result<(), Gone> {
        match self {
            Self::Bank => bank::step(worker).await,
            Self::ListAppend => list_append::step(worker).await,
            Self::Insert => insert::step(worker).await,
            Self::Copy => copy::step(worker).await,
            Self::Sequences => sequences::step(worker).await,
            Self::TwoPhase => two_phase::step(worker).await,
            Self::Temporary => temporary::step(worker).await,
        }
    }
}

/// The connection has ended; what there was to note has been noted.
#[derive(Debug)]
pub(super) struct Gone;

/// How a transaction ended that did not come to its COMMIT.
pub(super) type Stopped = Trouble;

/// Rows that name their request. No key: a doubled row has to show.
fn rows_table(schema: &str) -> String {
    format!("CREATE TABLE {schema}.rows (request bigint NOT NULL, item text NOT NULL)")
}
