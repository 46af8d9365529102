//! Values of labels: small fixed sets, never what a client sends.

/// What a session is doing, as [`super::names::SESSIONS`] counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SessionState {
    /// Start-up and authentication.
    Connecting,
    /// No transaction, nothing in flight.
    Idle,
    /// A request is in flight outside a transaction block.
    Active,
    /// Inside a transaction block.
    InTransaction,
    /// Corked, waiting for a move.
    Held,
    /// Being restored on another backend.
    Migrating,
}

impl SessionState {
    /// All states, in the order of their discriminants.
    pub const ALL: [Self; 6] = [
        Self::Connecting,
        Self::Idle,
        Self::Active,
        Self::InTransaction,
        Self::Held,
        Self::Migrating,
    ];

    /// The value of the label `state`.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Idle => "idle",
            Self::Active => "active",
            Self::InTransaction => "in_transaction",
            Self::Held => "held",
            Self::Migrating => "migrating",
        }
    }
}

/// How a replay of an open transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplayResult {
    /// Replayed and verified.
    Success,
    /// A result differed from what the client saw.
    Mismatch,
    /// A statement or connection failed.
    Error,
    /// It took longer than its limit.
    Timeout,
}

impl ReplayResult {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Success, Self::Mismatch, Self::Error, Self::Timeout];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Mismatch => "mismatch",
            Self::Error => "error",
            Self::Timeout => "timeout",
        }
    }
}

/// What became of a COMMIT that was in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CommitOutcome {
    /// The database shows that it is committed.
    Committed,
    /// The database shows that it is not.
    NotCommitted,
    /// It cannot be known.
    Unknown,
}

impl CommitOutcome {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Committed, Self::NotCommitted, Self::Unknown];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Committed => "committed",
            Self::NotCommitted => "not_committed",
            Self::Unknown => "unknown",
        }
    }
}

/// Why a client was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Its connection failed.
    Connection,
    /// It took longer to log in than it may.
    Timeout,
    /// A limit of connections is reached (SQLSTATE class 53).
    Limit,
    /// A wrong password, an unknown database or the like.
    Refused,
    /// It does not speak the protocol.
    Protocol,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Connection,
        Self::Timeout,
        Self::Limit,
        Self::Refused,
        Self::Protocol,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Timeout => "timeout",
            Self::Limit => "limit",
            Self::Refused => "refused",
            Self::Protocol => "protocol",
        }
    }
}
