//! What happens to a cluster: kinds of faults, the acts that they are made of, who carries them
//! out.

mod inject;
mod network;
mod strike;

use clap::ValueEnum;
use rand::RngExt;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

pub use inject::{Done, Injector};
pub use network::Network;
pub use strike::{Mark, Strike};

use super::cluster::Shape;
use super::plan::Step;
use super::workload::Workload;

/// Kinds of faults.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Nothing happens: what the workload does by itself
    None,
    /// A planned move
    Switchover,
    /// kill -9 of the primary's postmaster and all its processes
    Crash,
    /// kill -9 of one backend: crash recovery in place
    BackendKill,
    /// kill -9 of the primary's agent
    AgentKill,
    /// SIGSTOP of the primary, SIGCONT later
    Freeze,
    /// The primary dies while a planned move is under way
    CrashInSwitchover,
    /// The new primary dies soon after the old one (three servers)
    CrashTwice,
    /// A standby that lags behind takes over, asynchronous replication
    LaggingStandby,
    /// Sessions' connections to the primary are cut, at a message's end or in its middle
    Cut,
    /// Connections to the primary go silent without an end, then go on or break
    HalfOpen,
    /// Connections to the primary become slow
    Slow,
    /// The primary is cut off from proxy and standby for a while
    PartitionPrimary,
    /// The standby is cut off from the primary for a while
    PartitionStandby,
    /// Connections are cut while a planned move is under way
    CutInSwitchover,
    /// The primary's disk is full for a while
    DiskFull,
    /// kill -9 of the standby and all its processes: commits wait for it
    StandbyCrash,
    /// kill -9 of the primary's postmaster alone; its children find out by themselves
    PostmasterKill,
    /// The proxy and the controller are cut off from all servers for a while
    PartitionProxy,
    /// kill -9 of the primary when a session has come to a certain message
    CrashAtMessage,
    /// kill -9 of one backend then
    BackendKillAtMessage,
    /// kill -9 of the primary's agent then
    AgentKillAtMessage,
    /// SIGSTOP of the primary then
    FreezeAtMessage,
    /// A planned move then
    SwitchoverAtMessage,
}

/// Something that is done at a time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "snake_case")]
pub enum Act {
    /// Asks for a planned move, and waits for its end.
    Switchover,
    /// The same, without waiting.
    BeginSwitchover,
    /// Kills the primary, whoever that is then.
    CrashPrimary,
    /// Kills the primary's postmaster and none of its children.
    KillPostmaster,
    /// Strikes when a session has come to a message.
    AtMessage {
        /// Which message.
        mark: Mark,
        /// What is done then.
        strike: Strike,
    },
    /// Kills the first standby.
    CrashStandby,
    /// Kills this many of the clients' backends.
    KillBackends {
        /// How many.
        count: usize,
        /// Which ones.
        pick: u64,
    },
    /// Kills the primary's agent.
    KillAgent,
    /// Stops all processes of the primary for a while.
    Freeze {
        /// How long, in milliseconds.
        millis: u64,
    },
    /// Holds what is sent to the standby, then kills the primary, and drops what was held.
    CrashBehindLag {
        /// How long the standby lags, in milliseconds.
        millis: u64,
    },
    /// Cuts sessions' connections to the primary.
    Cut {
        /// Requests are counted; else answers.
        requests: bool,
        /// Messages are counted; else bytes.
        messages: bool,
        /// The connection ends behind so many.
        after: u64,
        /// Of so many sessions.
        victims: usize,
    },
    /// Holds connections to the primary.
    Hold {
        /// Those of sessions.
        sessions: bool,
        /// Those of the proxy and the controller.
        service: bool,
        /// Those of standbys.
        replication: bool,
        /// How long, in milliseconds.
        millis: u64,
        /// Sessions' connections break then; else they go on.
        close: bool,
        /// Those to all servers, not to the primary alone.
        #[serde(default)]
        everywhere: bool,
    },
    /// Fills the primary's disk.
    FillDisk {
        /// How long, in milliseconds.
        millis: u64,
    },
    /// Slows sessions' connections to the primary.
    Slow {
        /// Each piece of data is so late, in milliseconds.
        delay: u64,
        /// How long, in milliseconds.
        millis: u64,
    },
}

/// A cut of some sessions' connections.
fn cut(rng: &mut StdRng) -> Act {
    let messages = rng.random_bool(0.7);
    Act::Cut {
        requests: rng.random_bool(0.5),
        messages,
        after: rng.random_range(0..if messages { 40 } else { 1500 }),
        victims: rng.random_range(1..=8),
    }
}

impl FaultKind {
    /// All of them.
    pub const ALL: [Self; 24] = [
        Self::None,
        Self::Switchover,
        Self::Crash,
        Self::BackendKill,
        Self::AgentKill,
        Self::Freeze,
        Self::CrashInSwitchover,
        Self::CrashTwice,
        Self::LaggingStandby,
        Self::Cut,
        Self::HalfOpen,
        Self::Slow,
        Self::PartitionPrimary,
        Self::PartitionStandby,
        Self::CutInSwitchover,
        Self::DiskFull,
        Self::StandbyCrash,
        Self::PostmasterKill,
        Self::PartitionProxy,
        Self::CrashAtMessage,
        Self::BackendKillAtMessage,
        Self::AgentKillAtMessage,
        Self::FreezeAtMessage,
        Self::SwitchoverAtMessage,
    ];

    /// For tables and the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Switchover => "switchover",
            Self::Crash => "crash",
            Self::BackendKill => "backend-kill",
            Self::AgentKill => "agent-kill",
            Self::Freeze => "freeze",
            Self::CrashInSwitchover => "crash-in-switchover",
            Self::CrashTwice => "crash-twice",
            Self::LaggingStandby => "lagging-standby",
            Self::Cut => "cut",
            Self::HalfOpen => "half-open",
            Self::Slow => "slow",
            Self::PartitionPrimary => "partition-primary",
            Self::PartitionStandby => "partition-standby",
            Self::CutInSwitchover => "cut-in-switchover",
            Self::DiskFull => "disk-full",
            Self::StandbyCrash => "standby-crash",
            Self::PostmasterKill => "postmaster-kill",
            Self::PartitionProxy => "partition-proxy",
            Self::CrashAtMessage => "crash-at-message",
            Self::BackendKillAtMessage => "backend-kill-at-message",
            Self::AgentKillAtMessage => "agent-kill-at-message",
            Self::FreezeAtMessage => "freeze-at-message",
            Self::SwitchoverAtMessage => "switchover-at-message",
        }
    }

    /// Whether a workload's checker can judge what is left after it. Lists that may lose their end
    /// give no order of versions, an acknowledged PREPARE may be lost, and a temporary table is kept
    /// although the transaction that filled it was lost.
    #[must_use]
    pub fn suits(self, workload: Workload) -> bool {
        use Workload::{ListAppend, Temporary, TwoPhase};
        let judged = !matches!(workload, ListAppend | TwoPhase | Temporary);
        self != Self::LaggingStandby || judged
    }

    /// Whether acknowledged commits may be lost: asynchronous replication.
    #[must_use]
    pub fn may_lose(self) -> bool {
        self == Self::LaggingStandby
    }

    /// Whether connections to the servers have to go through a go-between.
    #[must_use]
    pub fn is_network(self) -> bool {
        matches!(
            self,
            Self::Cut
                | Self::HalfOpen
                | Self::Slow
                | Self::PartitionPrimary
                | Self::PartitionStandby
                | Self::CutInSwitchover
                | Self::LaggingStandby
                | Self::PartitionProxy
        ) || self.strike_kind().is_some()
    }

    /// How many times the primary has to change, or the fault has not happened.
    #[must_use]
    pub fn moves(self) -> u64 {
        match self {
            // The second crash may come within the first failover, which then ends elsewhere.
            Self::CrashTwice
            | Self::Switchover
            | Self::Crash
            | Self::CrashInSwitchover
            | Self::CutInSwitchover
            | Self::LaggingStandby
            | Self::PostmasterKill
            | Self::CrashAtMessage
            | Self::SwitchoverAtMessage => 1,
            _ => 0,
        }
    }

    /// What is done at a message, if that is its kind.
    fn strike_kind(self) -> Option<Strike> {
        match self {
            Self::CrashAtMessage => Some(Strike::Crash),
            Self::BackendKillAtMessage => Some(Strike::KillBackend { pick: 0 }),
            Self::AgentKillAtMessage => Some(Strike::KillAgent),
            Self::FreezeAtMessage => Some(Strike::Freeze { millis: 0 }),
            Self::SwitchoverAtMessage => Some(Strike::Switchover),
            _ => None,
        }
    }

    /// SQLSTATEs that it adds to the list of what clients may be told.
    #[must_use]
    pub fn extra_states(self) -> &'static [&'static str] {
        match self {
            Self::DiskFull => &["53100"],
            _ => &[],
        }
    }

    /// The cluster that it needs.
    #[must_use]
    pub fn shape(self) -> Shape {
        Shape {
            instances: if self == Self::CrashTwice { 3 } else { 2 },
            synchronous: self != Self::LaggingStandby,
            small_disks: self == Self::DiskFull,
        }
    }

    /// What is done when; `first` is the time of the first act in milliseconds.
    #[must_use]
    pub fn steps(self, first: u64, rng: &mut StdRng) -> Vec<Step> {
        let at = |at_ms: u64, act: Act| Step { at_ms, act };
        match self {
            Self::None => Vec::new(),
            Self::Switchover => vec![at(first, Act::Switchover)],
            Self::Crash => vec![at(first, Act::CrashPrimary)],
            Self::BackendKill => {
                let count = rng.random_range(1..=2);
                let pick = rng.random();
                vec![at(first, Act::KillBackends { count, pick })]
            }
            Self::AgentKill => vec![at(first, Act::KillAgent)],
            Self::PostmasterKill => vec![at(first, Act::KillPostmaster)],
            Self::Freeze => {
                let millis = rng.random_range(100..3000);
                vec![at(first, Act::Freeze { millis })]
            }
            Self::CrashInSwitchover => {
                let later = first + rng.random_range(0..250);
                vec![
                    at(first, Act::BeginSwitchover),
                    at(later, Act::CrashPrimary),
                ]
            }
            Self::CrashTwice => {
                let later = first + rng.random_range(50..1200);
                vec![at(first, Act::CrashPrimary), at(later, Act::CrashPrimary)]
            }
            Self::LaggingStandby => {
                let millis = rng.random_range(100..700);
                vec![at(first, Act::CrashBehindLag { millis })]
            }
            Self::StandbyCrash => vec![at(first, Act::CrashStandby)],
            Self::DiskFull => {
                let millis = rng.random_range(300..2500);
                vec![at(first, Act::FillDisk { millis })]
            }
            Self::Cut
            | Self::HalfOpen
            | Self::Slow
            | Self::PartitionPrimary
            | Self::PartitionStandby
            | Self::PartitionProxy
            | Self::CutInSwitchover => self.network_steps(first, rng),
            Self::CrashAtMessage
            | Self::BackendKillAtMessage
            | Self::AgentKillAtMessage
            | Self::FreezeAtMessage
            | Self::SwitchoverAtMessage => {
                let mark = Mark::draw(rng);
                let strike = self.strike_kind().map(|strike| strike.draw(rng));
                let act = strike.map(|strike| Act::AtMessage { mark, strike });
                act.map(|act| at(first, act)).into_iter().collect()
            }
        }
    }

    fn network_steps(self, first: u64, rng: &mut StdRng) -> Vec<Step> {
        let at = |at_ms: u64, act: Act| Step { at_ms, act };
        let hold = |sessions, service, replication, millis, close| Act::Hold {
            sessions,
            service,
            replication,
            millis,
            close,
            everywhere: self == Self::PartitionProxy,
        };
        match self {
            Self::Cut => {
                let again = first + rng.random_range(100..1000);
                vec![at(first, cut(rng)), at(again, cut(rng))]
            }
            Self::HalfOpen => {
                let (millis, close) = (rng.random_range(100..2500), rng.random_bool(0.6));
                let service = rng.random_bool(0.3);
                vec![at(first, hold(true, service, false, millis, close))]
            }
            Self::Slow => {
                let (delay, millis) = (rng.random_range(1..60), rng.random_range(500..2000));
                vec![at(first, Act::Slow { delay, millis })]
            }
            Self::PartitionPrimary => {
                let millis = rng.random_range(200..4000);
                vec![at(first, hold(true, true, true, millis, true))]
            }
            Self::PartitionStandby => {
                let millis = rng.random_range(200..4000);
                vec![at(first, hold(false, false, true, millis, false))]
            }
            Self::PartitionProxy => {
                let (millis, close) = (rng.random_range(200..3000), rng.random_bool(0.5));
                vec![at(first, hold(true, true, false, millis, close))]
            }
            Self::CutInSwitchover => {
                let later = first + rng.random_range(0..300);
                vec![at(first, Act::BeginSwitchover), at(later, cut(rng))]
            }
            _ => Vec::new(),
        }
    }
}
