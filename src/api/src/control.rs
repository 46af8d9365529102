//! The control API's messages: what agents and proxies are told, and what they report.
//!
//! HTTP/JSON, versioned by path (`/v1/...`). Every command carries the epoch it belongs to and is
//! idempotent; a receiver that has seen a later epoch refuses it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::protection::Unprotected;
use crate::{Endpoint, Epoch, InstanceName, Lsn, SessionId, Timeline, Xid};

/// An instance as a proxy addresses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backend {
    /// Name of the instance.
    pub name: InstanceName,
    /// Where it listens.
    pub endpoint: Endpoint,
}

/// What commit resolution needs to know of one promotion; taken by the agent before the new
/// primary admits any write.
///
/// A transaction of the epoch before this one has committed only if its id lies below
/// [`Fence::xid`] and `pg_xact_status` says `committed`: ids at or above it are handed out anew on
/// the new timeline.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The epoch that began with this promotion.
    pub epoch: Epoch,
    /// The timeline that began with it.
    pub timeline: Timeline,
    /// Where the new timeline left the old one.
    pub fork: Lsn,
    /// First id that was not completed when recovery ended, read in recovery after the last record
    /// was replayed. `None` when that could not be proven: outcomes are then unknown.
    pub xid: Option<Xid>,
    /// Whether commits that clients were told of are missing on the new timeline.
    #[serde(default)]
    pub lost: LostCommits,
}

/// What is known, at a promotion, of the commits that were acknowledged before it.
///
/// Commits that a session itself made with `synchronous_commit` off or local never count: nobody
/// promised to keep those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LostCommits {
    /// Proven: every one of them is on the new timeline.
    None,
    /// Some may be missing: replication was asynchronous and the old primary wrote past the fork
    /// (or nobody can tell), or a person asked for a promotion without proof.
    #[default]
    Possible,
}

/// The primary of an epoch, with the evidence of the promotions that led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The epoch.
    pub epoch: Epoch,
    /// The timeline that the primary writes.
    pub timeline: Timeline,
    /// The primary.
    pub primary: Backend,
    /// The last promotions, oldest first.
    pub fences: Vec<Fence>,
}

impl Topology {
    /// Whether commits acknowledged in `epoch` may be missing on this primary: a promotion since
    /// could not prove that it kept them.
    #[must_use]
    pub fn may_have_lost(&self, epoch: Epoch) -> bool {
        let mut since = self.fences.iter().filter(|fence| fence.epoch > epoch);
        since.any(|fence| fence.lost == LostCommits::Possible)
    }
}

/// Asks a proxy to hold new transactions and to freeze the open ones (design section 6, *drain*).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainRequest {
    /// The epoch that is about to end.
    pub epoch: Epoch,
    /// How long sessions that cannot be moved may take to finish, before anybody is held.
    pub timeout_ms: u64,
}

/// Asks a proxy to open sessions on the instance that will be primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareRequest {
    /// Current epoch.
    pub epoch: Epoch,
    /// Who will be primary.
    pub candidate: Backend,
    /// How long to wait, before anything is opened, for sessions that cannot be moved. Asked of
    /// several proxies, which all hold their clients later on: none of them may wait then.
    #[serde(default)]
    pub wait_ms: u64,
}

/// Tells a proxy who is to be promoted should the primary fail, as far as can be told beforehand.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeirRequest {
    /// Current epoch.
    pub epoch: Epoch,
    /// That standby; `None`: nobody could be now.
    pub heir: Option<Backend>,
}

/// How far sessions go behind a change of primary, before those of other proxies have come as far
/// (design rule 5.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// They have left the old primary and stand.
    Gathered,
    /// Those have replayed that set sequences back, while nobody else replays anywhere.
    Turn,
    /// All have replayed what was completed.
    Replayed,
    /// What was in flight has been sent again.
    Sent,
    /// New work is let in.
    Open,
}

/// Asks a proxy to leave the old primary and to stand, until it is told to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatherRequest {
    /// The new primary.
    pub topology: Topology,
    /// Without a word for so long, it goes on by itself, without a turn.
    pub patience_ms: u64,
}

/// What a proxy stands with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gathered {
    /// Some of its sessions have to set sequences back.
    pub wants_turn: bool,
    /// It has let new work in on this primary already: nobody may set a sequence back any more.
    pub has_worked: bool,
}

/// Asks a gathered proxy to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdvanceRequest {
    /// The epoch that it has gathered in.
    pub epoch: Epoch,
    /// How far.
    pub to: Stage,
    /// Of a turn: it ends so long after the proxy had gathered, whenever this arrives.
    #[serde(default)]
    pub turn_ms: u64,
}

/// Asks a proxy to undo a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbortRequest {
    /// Current epoch.
    pub epoch: Epoch,
}

/// Why a proxy did not do what it was told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum ProxyError {
    /// The command is of an epoch that has ended.
    #[error("command of epoch {given}, but this proxy is at epoch {seen}")]
    Stale {
        /// Epoch of the command.
        given: Epoch,
        /// Epoch of the proxy.
        seen: Epoch,
    },
    /// It was tried and failed; it may be tried again.
    #[error("{reason}")]
    Failed {
        /// What failed.
        reason: String,
    },
}

/// What a drain came to. Afterwards no session of this proxy has a statement in flight.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainReport {
    /// Sessions held with no transaction open.
    pub idle: u64,
    /// Sessions frozen inside a transaction that will be replayed.
    pub frozen: u64,
    /// Sessions whose transaction or state cannot be moved: they will get an error.
    pub unprotected: u64,
    /// Time from the request until all sessions stood still, in microseconds.
    pub micros: u64,
}

/// What moving the sessions came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResumeReport {
    /// Sessions that had a transaction and had it replayed.
    pub replayed: u64,
    /// Transactions whose outcome was found from evidence.
    pub resolved: u64,
    /// Sessions that got an error, by reason.
    pub failed: BTreeMap<String, u64>,
    /// Time from the command until new work was let in, in microseconds.
    pub micros: u64,
}

/// A session as `helios sessions` lists it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Number of the session.
    pub id: SessionId,
    /// What it is doing: `connecting`, `idle`, `active`, `in transaction`, `held`, `migrating`.
    pub state: String,
    /// Role it logged in as.
    pub user: String,
    /// Database.
    pub database: String,
    /// `application_name` of the start-up packet.
    pub application: String,
    /// Client's address.
    pub client: String,
    /// Instance its backend is on.
    pub instance: Option<InstanceName>,
    /// Age of the open transaction in milliseconds.
    pub transaction_age_ms: Option<u64>,
    /// How far the replay of its transaction is, while one is under way.
    #[serde(default)]
    pub replay: Option<ReplayProgress>,
    /// Bytes its journal holds.
    pub journal_bytes: u64,
    /// Moves it has been through.
    pub migrations: u64,
    /// Why a failover now would cost it an error; `None` when it is protected.
    pub unprotected: Option<String>,
    /// The reason's name.
    #[serde(default)]
    pub reason: Option<Unprotected>,
}

/// How far the replay of a transaction is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplayProgress {
    /// Requests of the client that have been answered again.
    pub done: u64,
    /// Requests that its transaction had been answered.
    pub total: u64,
}

/// What a proxy reports of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// Epoch of its topology.
    pub epoch: Epoch,
    /// `running`, `draining`, `held`, `resuming`, `leaving`.
    pub phase: String,
    /// Sessions.
    pub sessions: u64,
    /// Sessions inside a transaction.
    pub in_transaction: u64,
    /// Sessions that a failover now would not cost an error.
    pub protected: u64,
    /// Sessions that are held, because the primary changes.
    #[serde(default)]
    pub held: u64,
    /// Whether the primary answered the last health check.
    pub primary_reachable: bool,
    /// Bytes that all journals hold.
    pub journal_bytes: u64,
    /// How slow the primary is, where that is watched and it is.
    #[serde(default)]
    pub slow: Option<Slowness>,
}

/// A primary that answers a proxy's heartbeats late, and has done so for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slowness {
    /// What was allowed, in milliseconds.
    pub threshold_ms: u64,
    /// Median of the last heartbeats, in milliseconds.
    pub median_ms: u64,
    /// Since it was first found slow, in milliseconds.
    pub for_ms: u64,
}

/// Why sessions move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MoveReason {
    /// A planned switchover.
    Switchover,
    /// The primary failed.
    Failover,
    /// Only the session's connection broke.
    ConnectionLoss,
}

/// One step in the life of a session's migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum MigrationEvent {
    /// The session is held and about to move.
    Started {
        /// The session.
        session: SessionId,
        /// Why it moves.
        reason: MoveReason,
        /// Bytes of journal and state that it has.
        state_bytes: u64,
    },
    /// It goes on where it is now.
    Completed {
        /// The session.
        session: SessionId,
        /// Why it moved.
        reason: MoveReason,
        /// From the hold to the release, in microseconds.
        micros: u64,
        /// Bytes of journal and state that were replayed.
        state_bytes: u64,
    },
    /// Its client got an error, or left before it was through.
    Failed {
        /// The session.
        session: SessionId,
        /// Why it moved.
        reason: MoveReason,
        /// From the hold to the error, in microseconds.
        micros: u64,
        /// Bytes of journal and state that it had.
        state_bytes: u64,
        /// SQLSTATE that the client got; empty when it had left.
        sqlstate: String,
        /// What stood in the way.
        error: String,
    },
}
