//! What changes of primary are called, how they ended, and where their time went.
//!
//! Plain data that people and metrics read; decisions never look back into it.

use helios_api::agent::Rejoin;
use helios_api::control::{DrainReport, LostCommits, ResumeReport};
use helios_api::{Epoch, InstanceName};
use serde::{Deserialize, Serialize};

/// A moment in microseconds since 1970; comes in as an observation, never from a clock here.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Time(pub u64);

impl Time {
    /// Microseconds from `earlier` to here; 0 when the clock was set back.
    #[must_use]
    pub fn micros_since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Milliseconds from `earlier` to here; 0 when the clock was set back.
    #[must_use]
    pub fn millis_since(self, earlier: Self) -> u64 {
        self.micros_since(earlier) / 1000
    }

    /// The moment `millis` later.
    #[must_use]
    pub fn plus_millis(self, millis: u64) -> Self {
        Self(self.0.saturating_add(millis.saturating_mul(1000)))
    }
}

/// What kind of operation it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OperationKind {
    /// Planned move of the primary.
    Switchover,
    /// The primary failed and a standby took over.
    Failover,
    /// The primary failed and was started again where it was.
    Restart,
}

/// The steps of an operation, in their order (design section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Checkpoints; proxies open sessions on the candidate.
    Prepare,
    /// Proxies hold new transactions and freeze the open ones.
    Drain,
    /// The old primary is stopped for good.
    Fence,
    /// Positions are read again and a candidate is chosen.
    Choose,
    /// The candidate becomes primary.
    Promote,
    /// The old primary is started again where it was.
    Restart,
    /// Proxies replay open transactions and let new work in.
    Replay,
    /// A drain is undone.
    Abort,
    /// The old primary is a standby again.
    Rejoin,
}

impl Phase {
    /// The phase as metrics and the command line call it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Drain => "drain",
            Self::Fence => "fence",
            Self::Choose => "choose",
            Self::Promote => "promote",
            Self::Restart => "restart",
            Self::Replay => "replay",
            Self::Abort => "abort",
            Self::Rejoin => "rejoin",
        }
    }
}

/// How long a phase took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseDuration {
    /// The phase.
    pub phase: Phase,
    /// Its duration in microseconds.
    pub micros: u64,
}

/// How an operation ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// There is a primary, and sessions go on there.
    Succeeded,
    /// Given up before the point of no return; the old primary goes on.
    Aborted {
        /// Why.
        reason: String,
    },
    /// It ended with another primary than was asked for.
    Diverted {
        /// Why.
        reason: String,
    },
}

/// One operation, for people: kept in the state, newest last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperationRecord {
    /// Grows by one with every operation of the cluster.
    pub id: u64,
    /// What it was.
    pub kind: OperationKind,
    /// Primary before.
    pub from: InstanceName,
    /// Primary after.
    pub to: InstanceName,
    /// Epoch after.
    pub epoch: Epoch,
    /// When it began.
    pub started: Time,
    /// What started it: the request, or what was seen of the failure.
    pub cause: String,
    /// How it ended.
    pub outcome: Outcome,
    /// Where the time went, in order; `rejoin` is added when the old primary is back.
    pub phases: Vec<PhaseDuration>,
    /// What the proxies' drains came to, added up.
    pub drained: DrainReport,
    /// What the proxies' replays came to, added up.
    pub resumed: ResumeReport,
    /// How the old primary came back; `None` until it has.
    pub rejoin: Option<Rejoin>,
    /// Whether commits that clients were told of may be missing since.
    #[serde(default)]
    pub lost: LostCommits,
}

impl OperationRecord {
    /// From the end of `prepare` to the end of `replay`: the pause that sessions may have seen.
    #[must_use]
    pub fn pause_micros(&self) -> u64 {
        self.phases
            .iter()
            .filter(|p| !matches!(p.phase, Phase::Prepare | Phase::Rejoin))
            .map(|p| p.micros)
            .sum()
    }
}

/// What happens to synchronous commits when no standby is left to confirm them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// They wait until a standby is back.
    Required,
    /// They go on without; until a standby has caught up again, only the primary itself may serve
    /// as primary. The default of a local cluster.
    #[default]
    Preferred,
}
