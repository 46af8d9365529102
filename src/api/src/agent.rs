//! The agent's half of the control API: what an instance is told, and what it reports.
//!
//! `POST /v1/command` takes an [`AgentRequest`] and answers an [`AgentReply`] or an
//! [`AgentError`]; `GET /v1/state` answers an [`AgentState`]; `GET /v1/state?after=<revision>`
//! answers as soon as the revision is newer (long poll), so that a dead postmaster is known within
//! a millisecond.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::control::{Backend, Fence};
use crate::{Epoch, InstanceName, Lsn, Timeline, fingerprint};

/// What of PostgreSQL's configuration may change while an instance lives.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerSettings {
    /// PostgreSQL's parameters, over the agent's defaults.
    pub parameters: BTreeMap<String, String>,
    /// Lines for `pg_hba.conf`, behind the agent's own.
    pub hba: Vec<String>,
}

impl ServerSettings {
    /// Tells one from another, the same in every build.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut text = String::new();
        let Self { parameters, hba } = self;
        // Lengths in front: no two lists look the same when written one behind the other.
        let parts = parameters.iter().flat_map(|(name, value)| [name, value]);
        for part in parts.chain([&String::new()]).chain(hba) {
            text.push_str(&part.len().to_string());
            text.push(':');
            text.push_str(part);
        }
        fingerprint(text.as_bytes())
    }
}

/// What became of the settings that an agent was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsReport {
    /// Fingerprint of the last ones.
    pub told: String,
    /// Why they are not in force, in PostgreSQL's words: the ones before them are.
    #[serde(default)]
    pub refused: Option<String>,
    /// Parameters that count from the next start.
    #[serde(default)]
    pub restart: Vec<String>,
    /// Parameters that stay higher than asked for: a standby may not have less than its primary's
    /// WAL was written with.
    #[serde(default)]
    pub kept: Vec<String>,
}

/// A command with its fencing token. An agent refuses one that is older than what it has seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRequest {
    /// The epoch on whose behalf the command is given.
    pub epoch: Epoch,
    /// What to do.
    pub command: AgentCommand,
}

/// How a server is stopped for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// PostgreSQL's fast shutdown: WAL is sent to the standbys to the end.
    Fast,
    /// Killed.
    Immediate,
    /// Its processes stand still at once, and are killed when those that take over have had the
    /// processors to themselves. Only where nobody is told of a commit that the candidate lacks,
    /// whoever should wake a process up meanwhile: synchronous replication, and everybody who may
    /// confirm a commit stops receiving.
    Halt,
}

/// What an agent can be told. All are idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum AgentCommand {
    /// `initdb` an empty data directory and start it as primary.
    Bootstrap,
    /// Start the data directory as primary without changing its timeline (restart of a cluster).
    StartPrimary,
    /// Start a stopped standby as it is, without a primary to stream from: it may have to take
    /// over.
    StartStandby,
    /// Stopped: say what the data directory holds.
    Survey,
    /// Start as a standby of `primary`, after the fork-point check: directly when the WAL does not
    /// reach past the fork, else `pg_rewind`, else a fresh clone. Also clones an empty directory,
    /// and re-points a running standby.
    Follow {
        /// The primary to stream from.
        primary: Backend,
        /// The timeline that the primary writes.
        timeline: Timeline,
        /// Where that timeline began; `None` for the first one.
        fork: Option<Lsn>,
    },
    /// `CHECKPOINT` (on a standby a restartpoint), so that a later stop or promotion is short.
    Checkpoint,
    /// Stop for good: until a command of a later epoch no process of this instance can commit.
    Fence {
        /// How it stops.
        mode: StopMode,
    },
    /// Standby: stop the WAL receiver cleanly and report final positions.
    StopReceiver,
    /// Stopped: does the WAL of `timeline` go on at `at`, where a record begins if it does?
    WalBeyond {
        /// The timeline.
        timeline: Timeline,
        /// The position.
        at: Lsn,
    },
    /// Standby: replay everything received, record the fence, promote, wait for the first commit.
    Promote,
    /// Primary: who must confirm commits; empty switches synchronous replication off.
    SetSynchronous {
        /// Standbys that count, in order of preference.
        standbys: Vec<InstanceName>,
        /// How many of them must confirm.
        number: u32,
    },
    /// New settings: checked by PostgreSQL first, then in force as far as a reload goes. What came
    /// of it stands in the [`AgentState`].
    Configure {
        /// The settings.
        settings: ServerSettings,
    },
    /// Primary: forget the slot of a standby that is gone for good.
    DropSlot {
        /// The standby, stopped.
        standby: InstanceName,
    },
    /// Stop the postmaster (fast) and end the agent.
    Shutdown,
}

/// What a command came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum AgentReply {
    /// Done.
    Done,
    /// Answer to [`AgentCommand::Promote`].
    Promoted {
        /// The evidence for commit resolution.
        fence: Fence,
        /// From the command to the first write, in microseconds.
        micros: u64,
    },
    /// Answer to [`AgentCommand::Follow`].
    Following {
        /// How the instance got there.
        how: Rejoin,
    },
    /// Answer to [`AgentCommand::Survey`].
    Held {
        /// Whether it would start as a standby.
        standby: bool,
        /// Whether it was left in the middle of a rewind, and is of no use.
        torn: bool,
        /// The latest timeline of its WAL.
        timeline: Timeline,
        /// Where its last record begins.
        end: Lsn,
    },
    /// Answer to [`AgentCommand::WalBeyond`].
    WalBeyond {
        /// `false` only when it is proven that nothing was flushed past the position.
        beyond: bool,
    },
    /// Answer to [`AgentCommand::StopReceiver`] and [`AgentCommand::Fence`].
    Positions {
        /// End of the WAL that this instance holds, flushed.
        end: Lsn,
        /// The timeline of that position.
        timeline: Timeline,
    },
}

/// How an instance became a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rejoin {
    /// Its WAL did not reach past the fork.
    Direct,
    /// `pg_rewind` took it back.
    Rewound,
    /// A fresh base backup.
    Cloned,
}

/// A command that was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "error", rename_all = "snake_case")]
pub enum AgentError {
    /// The command is of an epoch that has ended.
    #[error("command of epoch {given}, but epoch {seen} has begun")]
    Stale {
        /// Epoch of the command.
        given: Epoch,
        /// Latest epoch that the agent has seen.
        seen: Epoch,
    },
    /// The instance is not in a state for it; retrying without a change is pointless.
    #[error("{reason}")]
    Refused {
        /// Why, with what to do about it.
        reason: String,
    },
    /// It was tried and failed; it may be tried again.
    #[error("{reason}")]
    Failed {
        /// What failed.
        reason: String,
    },
}

/// What an instance is, as its agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// Grows with every change; for the long poll.
    pub revision: u64,
    /// The instance.
    pub name: InstanceName,
    /// Latest epoch that the agent has seen (durable).
    pub epoch: Epoch,
    /// Whether the epoch's fence is on: no start without a command of a later epoch.
    pub fenced: bool,
    /// What the instance is doing.
    pub instance: InstanceState,
    /// Whether the agent was told to end. A primary's waits a while for somebody to take over.
    #[serde(default)]
    pub leaving: bool,
    /// What became of the settings it was told.
    #[serde(default)]
    pub settings: SettingsReport,
}

/// State of the postmaster and its data directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum InstanceState {
    /// The data directory is empty.
    Empty,
    /// A data directory, and no postmaster.
    Stopped {
        /// Whether the postmaster went away by itself or was told to.
        crashed: bool,
        /// Whether `pg_control` says "shut down".
        clean: bool,
        /// Timeline of the last checkpoint.
        timeline: Timeline,
    },
    /// On the way up (or cloning, rewinding).
    Starting {
        /// What it is at, for people: `initdb`, `base backup 40 %`, `recovery`.
        step: String,
    },
    /// Accepts writes.
    Primary {
        /// Timeline it writes.
        timeline: Timeline,
        /// Flushed position.
        position: Lsn,
        /// Standbys that stream, with the position each has flushed.
        standbys: Vec<StandbyPosition>,
    },
    /// In recovery.
    Standby {
        /// Timeline it replays.
        timeline: Timeline,
        /// Received and flushed.
        received: Lsn,
        /// Replayed.
        replayed: Lsn,
        /// Age of the last message from the primary in milliseconds; `None`: no WAL receiver.
        heard_ms: Option<u64>,
    },
    /// The postmaster runs and does not answer.
    Unresponsive {
        /// For how long, in milliseconds.
        for_ms: u64,
    },
}

/// A standby as its primary sees it (`pg_stat_replication`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyPosition {
    /// `application_name`, which is the instance's name.
    pub name: String,
    /// Flushed position.
    pub flushed: Lsn,
    /// Whether it counts as synchronous now.
    pub synchronous: bool,
}
