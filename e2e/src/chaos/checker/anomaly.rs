//! What can be wrong with a history, and which isolation level forbids it.
//!
//! Names follow Adya's thesis and the Elle paper (Kingsbury, Alvaro: "Elle", VLDB 2020). What
//! PostgreSQL promises: READ COMMITTED forbids G0 and G1; REPEATABLE READ is snapshot isolation, so
//! it also forbids every cycle without two adjacent anti-dependencies; SERIALIZABLE forbids every
//! cycle.

use serde::Serialize;

use crate::chaos::history::Level;

/// Kinds of anomalies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Anomaly {
    /// A transaction contradicts itself: its own writes are missing from what it reads, or, in a
    /// snapshot, two reads differ.
    Internal,
    /// A value that nobody wrote.
    Garbage,
    /// A value stands twice in a list, a row twice in a table.
    Duplicate,
    /// Two reads of a list are no prefixes of one order.
    IncompatibleOrder,
    /// Acknowledged, and not in the database.
    Lost,
    /// Reported as failed, and in the database.
    FailedButPresent,
    /// A part of a transaction is in the database, another part is not.
    Fractured,
    /// In the database with other contents than were sent or acknowledged.
    Altered,
    /// A read misses what had been acknowledged before it was sent.
    StaleRead,
    /// Aborted read: a committed transaction saw what a failed one wrote.
    G1a,
    /// Intermediate read: seen was not the last that its writer wrote.
    G1b,
    /// Cycle of writes.
    G0,
    /// Cycle of writes and reads.
    G1c,
    /// Two transactions read the same version of one object, and both wrote it.
    LostUpdate,
    /// Cycle with exactly one anti-dependency (read skew).
    GSingle,
    /// Cycle with several anti-dependencies, no two of them adjacent.
    GNonadjacent,
    /// Cycle with adjacent anti-dependencies (write skew).
    G2Item,
    /// The protocol was broken, or a client got what it must never get.
    Client,
    /// No answer within the limit.
    Hung,
}

impl Anomaly {
    /// Whether a level of PostgreSQL forbids it.
    #[must_use]
    pub fn is_forbidden_at(self, level: Level) -> bool {
        match self {
            Self::LostUpdate | Self::GSingle | Self::GNonadjacent => level.is_snapshot(),
            Self::G2Item => level == Level::Serializable,
            _ => true,
        }
    }

    /// For tables and people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Internal => "internal inconsistency",
            Self::Garbage => "value that nobody wrote",
            Self::Duplicate => "doubled",
            Self::IncompatibleOrder => "incompatible order",
            Self::Lost => "acknowledged, but lost",
            Self::FailedButPresent => "reported as failed, but present",
            Self::Fractured => "partly present",
            Self::Altered => "altered",
            Self::StaleRead => "stale read",
            Self::G1a => "G1a (aborted read)",
            Self::G1b => "G1b (intermediate read)",
            Self::G0 => "G0 (write cycle)",
            Self::G1c => "G1c (circular information flow)",
            Self::LostUpdate => "lost update",
            Self::GSingle => "G-single (read skew)",
            Self::GNonadjacent => "G-nonadjacent",
            Self::G2Item => "G2-item (write skew)",
            Self::Client => "client",
            Self::Hung => "hung",
        }
    }
}

/// One anomaly, with the smallest history that shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is.
    pub anomaly: Anomaly,
    /// In one line.
    pub what: String,
    /// The transactions, and the dependencies between them.
    pub history: Vec<String>,
}

impl Finding {
    /// A finding without a history of its own.
    #[must_use]
    pub fn new(anomaly: Anomaly, what: impl Into<String>) -> Self {
        Self {
            anomaly,
            what: what.into(),
            history: Vec::new(),
        }
    }

    /// The same with lines of history.
    #[must_use]
    pub fn with(mut self, history: impl IntoIterator<Item = String>) -> Self {
        self.history.extend(history);
        self
    }
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.anomaly.name(), self.what)?;
        for line in &self.history {
            write!(f, "\n    {line}")?;
        }
        Ok(())
    }
}
