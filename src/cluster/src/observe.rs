//! What decisions are made from, and what they come to.
//!
//! An observation is whatever the executor knows at a moment; nothing in it is trusted to be
//! complete. An action is one command to one agent or proxy; giving it twice does no harm.

use std::collections::{BTreeMap, BTreeSet};

use helios_api::agent::{AgentCommand, AgentReply, AgentRequest, AgentState};
use helios_api::control::{
    Backend, DrainReport, DrainRequest, ProxyStatus, ResumeReport, Topology,
};
use helios_api::{Endpoint, Epoch, InstanceName};
use serde::{Deserialize, Serialize};

use crate::lease::Leased;

/// What the executor knows at a moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observation {
    /// Every instance that the cluster is to have.
    pub instances: BTreeMap<InstanceName, InstanceView>,
    /// Every proxy, by a name of the executor's choice; `None`: it does not answer.
    pub proxies: BTreeMap<String, Option<ProxyStatus>>,
    /// Actions that are being carried out.
    pub running: Vec<Action>,
    /// Actions that ended since the last decision. States beside them are not older than they are.
    pub finished: Vec<Finished>,
    /// What somebody asks for.
    pub request: Option<Request>,
    /// Standbys that are about to be stopped: no commit is to wait for them, and no planned move
    /// goes to them.
    pub aside: BTreeSet<InstanceName>,
    /// Instances that the cluster is to have no longer: stopped, then forgotten.
    pub removed: BTreeSet<InstanceName>,
    /// Instances whose volume is older than the cluster: they may hold data, and are asked before
    /// there is a first primary.
    pub kept: BTreeSet<InstanceName>,
}

impl Observation {
    /// The agent's report, when it answers.
    #[must_use]
    pub fn agent(&self, name: &InstanceName) -> Option<&AgentState> {
        match self.instances.get(name).map(|view| &view.contact) {
            Some(Contact::Answers(state)) => Some(state),
            _ => None,
        }
    }

    /// The instance as proxies and standbys address it.
    #[must_use]
    pub fn backend(&self, name: &InstanceName) -> Option<Backend> {
        self.instances.get(name).map(|view| Backend {
            name: name.clone(),
            endpoint: view.endpoint.clone(),
        })
    }
}

/// One instance as the executor sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceView {
    /// Where its server listens.
    pub endpoint: Endpoint,
    /// What its agent says.
    pub contact: Contact,
    /// What is known of its lease.
    pub lease: Leased,
}

/// Whether an agent answers, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Contact {
    /// Its latest report.
    Answers(Box<AgentState>),
    /// It does not answer.
    Silent {
        /// For how long, in milliseconds.
        for_ms: u64,
        /// Whether it is proven that no process of the instance is left.
        proven_dead: bool,
    },
}

/// What people can ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Move the primary.
    Switchover {
        /// Where to; `None`: the best standby.
        to: Option<InstanceName>,
    },
    /// Replace a primary that does not come back by the most advanced standby there is, although
    /// that one may lack acknowledged commits. Only ever by a person's word.
    Failover,
    /// Stop an instance and keep it stopped.
    Fence {
        /// Which.
        instance: InstanceName,
    },
    /// Stop the primary and keep it stopped, although nobody takes its place.
    FencePrimary {
        /// Which.
        instance: InstanceName,
    },
    /// Let it come back.
    Unfence {
        /// Which.
        instance: InstanceName,
    },
    /// A removed instance is gone for good.
    Forget {
        /// Which.
        instance: InstanceName,
    },
}

/// Why a request is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(tag = "refusal", rename_all = "snake_case")]
pub enum Refusal {
    /// There is no primary yet.
    #[error("the cluster has no primary yet")]
    NotReady,
    /// Something else is being done.
    #[error("another operation is under way; try again when it has finished")]
    UnderWay,
    /// No such instance.
    #[error("there is no instance \"{instance}\"")]
    Unknown {
        /// The name given.
        instance: InstanceName,
    },
    /// The target is where the primary is.
    #[error("instance \"{instance}\" is the primary already")]
    AlreadyPrimary {
        /// The name given.
        instance: InstanceName,
    },
    /// Nothing to move to.
    #[error("there is no standby to switch over to: {why}")]
    NoStandby {
        /// What each instance lacks.
        why: String,
    },
    /// The target cannot take over.
    #[error("instance \"{instance}\" cannot take over: {why}")]
    NotReadyToTakeOver {
        /// The name given.
        instance: InstanceName,
        /// What it lacks.
        why: String,
    },
    /// Fencing the primary is not a way to move it.
    #[error("instance \"{instance}\" is the primary; switch over first")]
    IsPrimary {
        /// The name given.
        instance: InstanceName,
    },
    /// Commits may still rest on it.
    #[error("commits may still rest on instance \"{instance}\"")]
    StillCounts {
        /// The name given.
        instance: InstanceName,
    },
    /// A forced failover is for a primary that is gone.
    #[error("the primary \"{instance}\" is up; switch over instead, which loses nothing")]
    PrimaryUp {
        /// The primary.
        instance: InstanceName,
    },
    /// The primary is down; a failover or restart comes first.
    #[error("the primary is not up: {why}")]
    PrimaryDown {
        /// What was seen.
        why: String,
    },
}

/// One command to one receiver.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", rename_all = "snake_case")]
pub enum Action {
    /// To an instance's agent.
    Agent {
        /// The instance.
        instance: InstanceName,
        /// The command with its epoch.
        request: AgentRequest,
    },
    /// To a proxy.
    Proxy {
        /// Its name in [`Observation::proxies`].
        proxy: String,
        /// The command.
        command: ProxyCommand,
    },
}

impl Action {
    /// A command to an agent.
    #[must_use]
    pub fn agent(instance: &InstanceName, epoch: Epoch, command: AgentCommand) -> Self {
        Self::Agent {
            instance: instance.clone(),
            request: AgentRequest { epoch, command },
        }
    }

    /// A command to a proxy.
    #[must_use]
    pub fn proxy(proxy: &str, command: ProxyCommand) -> Self {
        Self::Proxy {
            proxy: proxy.to_owned(),
            command,
        }
    }
}

/// What a proxy can be told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "snake_case")]
pub enum ProxyCommand {
    /// Open and restore sessions on the candidate ahead of time.
    Prepare {
        /// Current epoch.
        epoch: Epoch,
        /// Who will be primary.
        candidate: Backend,
        /// How long to wait beforehand for sessions that cannot be moved.
        #[serde(default)]
        wait_ms: u64,
    },
    /// Hold new transactions, freeze the open ones. The executor answers it only when a synchronous
    /// commit behind all of them has been confirmed as well: sessions may have committed with
    /// `synchronous_commit = off`, and the primary may be stopped at once afterwards.
    Drain(DrainRequest),
    /// Move all sessions to this primary, or let them go on there. There is no other proxy.
    Resume(Topology),
    /// The same together with others, none of which goes on before all have come as far: the
    /// executor takes all of them through one [`crate::barrier::Barrier`].
    Together {
        /// The primary.
        topology: Topology,
        /// How many were told.
        of: usize,
    },
    /// The same where others may have gone on already.
    Join(Topology),
    /// Undo a drain.
    Abort {
        /// Current epoch.
        epoch: Epoch,
    },
}

/// An action that ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// The action.
    pub action: Action,
    /// What it came to.
    pub result: Result<Reply, Failure>,
}

/// A good end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Of an agent.
    Agent(AgentReply),
    /// Of a proxy's prepare or abort.
    Done,
    /// Of a proxy's drain.
    Drained(DrainReport),
    /// Of a proxy's resume.
    Resumed(ResumeReport),
}

/// A bad end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The receiver has seen a later epoch.
    #[error("epoch {seen} has begun")]
    Stale {
        /// That epoch.
        seen: Epoch,
    },
    /// The receiver is not in a state for it.
    #[error("{0}")]
    Refused(String),
    /// It was tried and failed, or nothing is known of how it ended.
    #[error("{0}")]
    Failed(String),
}
