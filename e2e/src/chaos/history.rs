//! What clients know when an experiment is over: transactions, what they saw, how they ended.
//!
//! Plain data. A history holds nothing that its client did not send or receive.

use serde::{Deserialize, Serialize};

/// Isolation level of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// PostgreSQL treats it as READ COMMITTED.
    ReadUncommitted,
    /// A snapshot a statement.
    ReadCommitted,
    /// Snapshot isolation.
    RepeatableRead,
    /// Serializable snapshot isolation.
    Serializable,
}

impl Level {
    /// All levels.
    pub const ALL: [Self; 4] = [
        Self::ReadUncommitted,
        Self::ReadCommitted,
        Self::RepeatableRead,
        Self::Serializable,
    ];

    /// As SQL names it.
    #[must_use]
    pub fn sql(self) -> &'static str {
        match self {
            Self::ReadUncommitted => "READ UNCOMMITTED",
            Self::ReadCommitted => "READ COMMITTED",
            Self::RepeatableRead => "REPEATABLE READ",
            Self::Serializable => "SERIALIZABLE",
        }
    }

    /// Whether all statements of a transaction share one snapshot.
    #[must_use]
    pub fn is_snapshot(self) -> bool {
        matches!(self, Self::RepeatableRead | Self::Serializable)
    }
}

/// How a request that may have committed something ended, for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Acknowledged: it has committed.
    Ok,
    /// Told, or certain, that it has not committed.
    Failed,
    /// Nobody told (08007, or no answer): either.
    Unknown,
}

/// Key of a list.
pub type Key = u32;
/// What is appended; unique in a history.
pub type Value = u64;

/// One statement of a list-append transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// `value` was put at the end of the list.
    Append {
        /// The list.
        key: Key,
        /// What was appended.
        value: Value,
    },
    /// The whole list was read.
    Read {
        /// The list.
        key: Key,
        /// What it held.
        list: Vec<Value>,
        /// When the statement was sent, in microseconds of the experiment.
        sent: u64,
    },
}

/// A list-append transaction: the statements that were answered, or, for a write, sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Txn {
    /// Its number, unique in the history.
    pub id: u64,
    /// Who ran it.
    pub client: usize,
    /// Its level.
    pub level: Level,
    /// Its statements in order.
    pub ops: Vec<Op>,
    /// How it ended.
    pub outcome: Outcome,
    /// When its first statement that takes a snapshot was sent, in microseconds.
    pub began: u64,
    /// When its end was known, in microseconds.
    pub ended: u64,
}

impl Txn {
    /// Values that it appends to a key, in order.
    pub fn appends_to(&self, wanted: Key) -> impl Iterator<Item = Value> {
        self.ops.iter().filter_map(move |op| match op {
            Op::Append { key, value } if *key == wanted => Some(*value),
            _ => None,
        })
    }

    /// All that it appends.
    pub fn appends(&self) -> impl Iterator<Item = (Key, Value)> {
        self.ops.iter().filter_map(|op| match op {
            Op::Append { key, value } => Some((*key, *value)),
            Op::Read { .. } => None,
        })
    }
}

impl std::fmt::Display for Txn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "T{} (client {}, {}, {:?}, {}..{} us):",
            self.id,
            self.client,
            self.level.sql(),
            self.outcome,
            self.began,
            self.ended
        )?;
        for op in &self.ops {
            match op {
                Op::Append { key, value } => write!(f, " append({key}, {value})")?,
                Op::Read { key, list, .. } => write!(f, " read({key}) = {}", tail(list))?,
            }
        }
        Ok(())
    }
}

/// A list with its last values: the first ones rarely matter, and lists get long.
fn tail(list: &[Value]) -> String {
    const SHOWN: usize = 6;
    let hidden = list.len().saturating_sub(SHOWN);
    let shown: Vec<String> = list.iter().skip(hidden).map(ToString::to_string).collect();
    match hidden {
        0 => format!("[{}]", shown.join(" ")),
        n => format!("[{n} more, {}]", shown.join(" ")),
    }
}
