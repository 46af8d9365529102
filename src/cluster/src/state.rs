//! The durable state of a cluster: what a new executor must know to go on.
//!
//! Saved before any action that follows from it. Every list in it is bounded.

use std::collections::{BTreeMap, BTreeSet};

use helios_api::agent::ServerSettings;
use helios_api::control::{Backend, DrainReport, Fence, LostCommits, ResumeReport, Topology};
use helios_api::{Epoch, InstanceName, Lsn, Timeline};
use serde::{Deserialize, Serialize};

use crate::lease::LeaseState;
use crate::observe::{Action, Observation};
use crate::operation::{Durability, OperationKind, OperationRecord, Phase, PhaseDuration, Time};

/// Version of the durable form.
pub const FORMAT: u32 = 1;
/// Promotions that are remembered for commit resolution.
pub const MAX_FENCES: usize = 64;
/// Operations that are remembered for people.
pub const MAX_OPERATIONS: usize = 10;

/// What the cluster is to be like; not durable, given with every decision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Whether commits wait for a standby.
    pub synchronous: bool,
    /// What happens to them when none is left.
    pub durability: Durability,
    /// Given to proxies with a drain.
    pub drain_timeout_ms: u64,
    /// A standby further behind is no target for a switchover and joins no synchronous set.
    pub max_lag_bytes: u64,
    /// A postmaster silent for longer is taken for dead when a second witness agrees.
    pub unresponsive_ms: u64,
    /// A synchronous standby may be gone for so long before it stops counting, and the candidate of
    /// a switchover before that is given up.
    pub standby_grace_ms: u64,
    /// After the fence, wait so long for candidates that are missing.
    pub choose_patience_ms: u64,
    /// An old primary that does not come up within this is given up for a standby.
    pub restart_patience_ms: u64,
    /// A slow primary is not moved away from sooner after the last operation.
    pub slow_interval_ms: u64,
    /// PostgreSQL's settings, where agents are told of changes; `None`: they know them already.
    pub server: Option<ServerSettings>,
    /// A primary that has failed is tried where it is for so long before a standby takes over; 0:
    /// a standby takes over at once.
    pub failover_delay_ms: u64,
    /// For how long a grant of the primary's lease holds; `None`: primaries hold none, and nobody
    /// is promoted beside one whose agent is silent.
    pub lease_ms: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            synchronous: true,
            durability: Durability::Preferred,
            drain_timeout_ms: 30_000,
            max_lag_bytes: 16 << 20,
            unresponsive_ms: 3_000,
            standby_grace_ms: 2_000,
            choose_patience_ms: 3_000,
            restart_patience_ms: 15_000,
            slow_interval_ms: 600_000,
            server: None,
            failover_delay_ms: 0,
            lease_ms: None,
        }
    }
}

/// The durable state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterState {
    /// [`FORMAT`].
    pub format: u32,
    /// Current epoch; 0 before the first primary.
    pub epoch: Epoch,
    /// The instances.
    pub members: BTreeMap<InstanceName, Member>,
    /// The primary, or the last one while it changes.
    pub primary: Option<Primary>,
    /// Whose confirmation acknowledged commits can rest on.
    pub sync: SyncState,
    /// What is being done.
    pub mode: Mode,
    /// The last promotions, oldest first; at most [`MAX_FENCES`].
    pub fences: Vec<Fence>,
    /// The last operations, oldest first; at most [`MAX_OPERATIONS`].
    pub operations: Vec<OperationRecord>,
    /// Number of the next operation.
    pub next_operation: u64,
    /// When the last operation ended, or the first primary was there.
    #[serde(default)]
    pub settled: Option<Time>,
    /// What the primary's lease is held under.
    #[serde(default)]
    pub lease: LeaseState,
    /// Who is to be the first primary.
    #[serde(default)]
    pub first: Option<InstanceName>,
}

impl Default for ClusterState {
    fn default() -> Self {
        Self {
            format: FORMAT,
            epoch: Epoch(0),
            members: BTreeMap::new(),
            primary: None,
            sync: SyncState::default(),
            mode: Mode::Bootstrap,
            fences: Vec::new(),
            operations: Vec::new(),
            next_operation: 1,
            settled: None,
            lease: LeaseState::default(),
            first: None,
        }
    }
}

/// Who is primary.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Primary {
    /// Its name.
    pub name: InstanceName,
    /// The timeline it writes.
    pub timeline: Timeline,
}

/// What is remembered of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The timeline that it follows since it passed the fork-point check.
    pub followed: Option<Timeline>,
    /// What its own `synchronous_standby_names` holds; `None`: unknown.
    pub setting: Option<BTreeSet<InstanceName>>,
    /// Fenced by a person.
    pub fenced: bool,
    /// It is to be removed, and its slot is gone from the primary.
    #[serde(default)]
    pub slot_dropped: bool,
    /// Since when the primary has not seen it stream.
    pub missing_since: Option<Time>,
    /// Background commands that failed in a row.
    pub failures: u32,
    /// No background command before this.
    pub retry_at: Time,
    /// What its data directory holds, while there has never been a primary.
    #[serde(default)]
    pub held: Option<Held>,
}

/// What a data directory holds whose server does not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Whether it is a standby's.
    pub standby: bool,
    /// Whether it is of no use: half of one and half of another.
    pub torn: bool,
    /// Where the last record of its WAL begins.
    pub position: Position,
}

/// Which settings of `synchronous_standby_names` acknowledged commits may have been made under.
///
/// The last one is what the primary has or is being given. Earlier ones stay until the last one is
/// in effect *and* its members have flushed everything written before: until then a commit may
/// have been acknowledged under any of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncState {
    /// Never empty; at most a few, because only standbys come and go.
    pub possible: Vec<BTreeSet<InstanceName>>,
    /// When a checkpoint on the primary proved that all its processes know the last one, and the
    /// revision of its report at that time.
    pub checkpointed: Option<(Time, u64)>,
    /// Position that the members of the last one have to reach.
    pub barrier: Option<Lsn>,
}

impl Default for SyncState {
    fn default() -> Self {
        Self::settled(BTreeSet::new())
    }
}

impl SyncState {
    /// Only this setting is possible.
    #[must_use]
    pub fn settled(setting: BTreeSet<InstanceName>) -> Self {
        Self {
            possible: vec![setting],
            checkpointed: None,
            barrier: None,
        }
    }

    /// The setting that the primary is to have.
    #[must_use]
    pub fn target(&self) -> BTreeSet<InstanceName> {
        self.possible.last().cloned().unwrap_or_default()
    }

    /// Whether nothing is pending.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.possible.len() <= 1
    }

    /// Begins a change to `setting`.
    pub fn aim(&mut self, setting: BTreeSet<InstanceName>) {
        self.possible.retain(|s| *s != setting);
        self.possible.push(setting);
        self.checkpointed = None;
        self.barrier = None;
    }
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Mode {
    /// There has never been a primary.
    Bootstrap,
    /// There is a primary, and nothing but upkeep to do.
    Steady,
    /// The primary changes or is started again.
    Moving(Box<Move>),
}

/// A change of primary under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Number of the operation.
    pub id: u64,
    /// What it is.
    pub kind: OperationKind,
    /// Primary before.
    pub from: InstanceName,
    /// Where somebody wants it, if anybody said so.
    pub wanted: Option<InstanceName>,
    /// What started it.
    pub cause: String,
    /// When it began.
    pub started: Time,
    /// Where it is.
    pub step: Step,
    /// When that step began.
    pub step_started: Time,
    /// What the step still has to do.
    pub todo: Vec<Action>,
    /// Commands that failed in a row in this step.
    pub failures: u32,
    /// No command before this.
    pub retry_at: Time,
    /// Durations of the steps before.
    pub phases: Vec<PhaseDuration>,
    /// Sum of the proxies' drain reports.
    pub drained: DrainReport,
    /// Sum of the proxies' resume reports.
    pub resumed: ResumeReport,
    /// Why it does not end as it was meant to.
    pub diverted: Option<String>,
    /// Since when the candidate of a switchover could not take over, for a reason that may pass.
    #[serde(default)]
    pub doubted: Option<Time>,
    /// A person takes it upon himself that acknowledged commits may be lost.
    #[serde(default)]
    pub forced: bool,
}

/// The steps of a move, with what each must remember.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "snake_case")]
pub enum Step {
    /// Checkpoints; proxies get ready.
    Prepare {
        /// Who is to take over.
        candidate: InstanceName,
    },
    /// Proxies hold their sessions.
    Drain {
        /// Who is to take over.
        candidate: InstanceName,
    },
    /// The old primary is stopped for good: the point of no return.
    Fence {
        /// Who would best take over.
        preferred: Option<InstanceName>,
        /// Where its WAL ends, when its stop was clean and it said so.
        end: Option<Position>,
        /// Positions of standbys that have stopped receiving meanwhile.
        positions: BTreeMap<InstanceName, Position>,
    },
    /// Positions are read again.
    Choose {
        /// Who would best take over.
        preferred: Option<InstanceName>,
        /// Where the old primary's WAL ends, when its stop was clean and it said so.
        end: Option<Position>,
        /// Final positions of the candidates.
        positions: BTreeMap<InstanceName, Position>,
    },
    /// One is promoted, in a new epoch.
    Promote {
        /// The chosen one.
        candidate: InstanceName,
        /// What is known of acknowledged commits that it lacks.
        #[serde(default)]
        lost: LostCommits,
        /// The old primary's WAL has been found to end here.
        #[serde(default)]
        ends: Option<Lsn>,
    },
    /// A candidate that died while it was promoted is fenced, before the old primary comes back.
    Discard {
        /// The candidate.
        candidate: InstanceName,
    },
    /// The old primary is started where it was.
    Restart,
    /// Sessions are replayed on the primary, whoever that is now.
    Replay,
    /// The drain is undone.
    Abort {
        /// Why.
        reason: String,
    },
}

impl Step {
    /// The phase that its time is counted under.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self {
            Self::Prepare { .. } => Phase::Prepare,
            Self::Drain { .. } => Phase::Drain,
            Self::Fence { .. } | Self::Discard { .. } => Phase::Fence,
            Self::Choose { .. } => Phase::Choose,
            Self::Promote { .. } => Phase::Promote,
            Self::Restart => Phase::Restart,
            Self::Replay => Phase::Replay,
            Self::Abort { .. } => Phase::Abort,
        }
    }
}

/// The end of an instance's WAL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Its timeline.
    pub timeline: Timeline,
    /// Where it ends.
    pub end: Lsn,
}

impl ClusterState {
    /// The primary's name, when there is one.
    #[must_use]
    pub fn primary_name(&self) -> Option<&InstanceName> {
        self.primary.as_ref().map(|p| &p.name)
    }

    /// The move under way.
    #[must_use]
    pub fn moving(&self) -> Option<&Move> {
        match &self.mode {
            Mode::Moving(m) => Some(m),
            Mode::Bootstrap | Mode::Steady => None,
        }
    }

    /// What proxies are told of the primary.
    #[must_use]
    pub fn topology(&self, obs: &Observation) -> Option<Topology> {
        let primary = self.primary.as_ref()?;
        let backend: Backend = obs.backend(&primary.name)?;
        Some(Topology {
            epoch: self.epoch,
            timeline: primary.timeline,
            primary: backend,
            fences: self.fences.clone(),
        })
    }

    /// Where the primary's timeline began; `None` for the first one.
    #[must_use]
    pub fn fork(&self) -> Option<Lsn> {
        let timeline = self.primary.as_ref()?.timeline;
        self.fences
            .iter()
            .rev()
            .find(|f| f.timeline == timeline)
            .map(|f| f.fork)
    }
}
