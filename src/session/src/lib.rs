//! What a session is: expected replies, tracked state, journal, replay planner and verifier.
//!
//! Pure: bytes and times come in, decisions come out. No socket, no clock, no runtime. The
//! invariant of the crate: every backend message is explained by the head of the expected-reply
//! queue, and what cannot be explained or proven is an error, never a guess.

pub mod cursors;
pub mod decide;
pub mod evidence;
pub mod expect;
pub mod grammar;
pub mod journal;
pub mod kept;
pub mod keyword;
pub mod last_values;
pub mod locks;
mod log;
pub mod needs;
pub mod plain;
pub mod reads;
pub mod rehearsal;
pub mod reply;
pub mod script;
pub mod sequences;
pub mod state;
pub mod tables;
pub mod temporary;
pub mod tracker;
pub mod verify;

/// Transaction status of a ReadyForQuery message
/// (<https://www.postgresql.org/docs/current/protocol-message-formats.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TxnStatus {
    /// `I`: not in a transaction block.
    #[default]
    Idle,
    /// `T`: in a transaction block.
    Open,
    /// `E`: in a failed transaction block, waiting for ROLLBACK.
    Failed,
}

impl TxnStatus {
    /// The status of a ReadyForQuery byte.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            b'I' => Some(Self::Idle),
            b'T' => Some(Self::Open),
            b'E' => Some(Self::Failed),
            _ => None,
        }
    }

    /// The byte of a ReadyForQuery.
    #[must_use]
    pub fn byte(self) -> u8 {
        match self {
            Self::Idle => b'I',
            Self::Open => b'T',
            Self::Failed => b'E',
        }
    }
}

/// What a failover does for an open transaction (`[transaction_replay] mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplayMode {
    /// A failover ends the connection, as without the proxy.
    None,
    /// Session state is rebuilt; an open transaction gets an error.
    Session,
    /// Statements are replayed; tags, row counts, error codes, RETURNING and locking reads are
    /// compared.
    #[default]
    Transaction,
    /// Every result is compared too.
    Select,
}

impl ReplayMode {
    /// Whether open transactions are journaled.
    #[must_use]
    pub fn replays(self) -> bool {
        matches!(self, Self::Transaction | Self::Select)
    }
}
