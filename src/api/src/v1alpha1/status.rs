//! Status: what people read, and the durable state that decisions go on from.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a cluster is, as the operator last saw it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HeliosClusterStatus {
    /// Generation of the spec that this status is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// In a word: `Creating`, `Ready`, `Degraded`, `Switchover`, `Failover`, `Restart`, `Invalid`,
    /// `Paused`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<String>,
    /// `Ready`, `Valid`, `SwitchoverAccepted` and the like, with the reason for each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The instance that takes writes, or the last one that did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current_primary: Option<String>,
    /// The instance that is to take writes when the running operation has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_primary: Option<String>,
    /// Grows by one with every change of primary.
    #[serde(default)]
    pub epoch: i64,
    /// The timeline that the primary writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<i64>,
    /// Instances that exist.
    #[serde(default)]
    pub instances_total: i32,
    /// Those that serve in their role.
    #[serde(default)]
    pub instances_ready: i32,
    /// Selects the instances' Pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Each instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub instances: Vec<InstanceStatus>,
    /// Each proxy.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub proxies: Vec<ProxyReport>,
    /// What is being done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<RunningOperation>,
    /// The last ten operations, oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub last_operations: Vec<FinishedOperation>,
    /// For the operator alone: the durable state of its decisions, as JSON.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<String>,
}

/// Types of conditions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConditionType {
    /// The primary takes writes through the proxies, and all instances serve.
    Ready,
    /// The spec can be carried out.
    Valid,
    /// The last request for a switchover was taken.
    SwitchoverAccepted,
    /// The API server offers everything that is wanted of it.
    ApisAvailable,
    /// Every instance's Pod is as the spec has it.
    UpToDate,
    /// PostgreSQL's parameters are in force.
    ParametersApplied,
    /// Instances are fenced by the annotation.
    Fenced,
    /// The first primary was made, and the application's role and database with the user's SQL.
    Bootstrapped,
    /// Every volume is there, in the size that is asked for.
    VolumesReady,
    /// Every certificate of the cluster's own authority is valid, and renewed in time.
    CertificatesValid,
}

impl ConditionType {
    /// The type as it stands in the status.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "Ready",
            Self::Valid => "Valid",
            Self::SwitchoverAccepted => "SwitchoverAccepted",
            Self::ApisAvailable => "ApisAvailable",
            Self::UpToDate => "UpToDate",
            Self::ParametersApplied => "ParametersApplied",
            Self::Fenced => "Fenced",
            Self::Bootstrapped => "Bootstrapped",
            Self::VolumesReady => "VolumesReady",
            Self::CertificatesValid => "CertificatesValid",
        }
    }
}

/// One instance.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InstanceStatus {
    /// Its name, which is that of its StatefulSet.
    pub name: String,
    /// `primary`, `replica`, `fenced`, or what it is doing instead.
    pub role: String,
    /// Whether it serves in that role.
    pub ready: bool,
    /// Primary: end of the WAL written. Standby: end of the WAL replayed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// Bytes that a standby is behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<i64>,
    /// Whether commits wait for it.
    #[serde(default)]
    pub synchronous: bool,
}

/// One proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProxyReport {
    /// Its Pod.
    pub name: String,
    /// `running`, `draining`, `held`, `resuming`, `leaving`; `silent` when it does not answer.
    pub phase: String,
    /// Client sessions, rounded down to what changes the picture: the proxy's metrics are exact.
    pub sessions: i64,
    /// Sessions that a failover now would not cost an error.
    pub protected: i64,
    /// Sessions that are held, because the primary changes.
    #[serde(default)]
    pub held: i64,
}

/// What is being done.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunningOperation {
    /// Number of the operation.
    pub id: i64,
    /// `switchover`, `failover` or `restart`.
    pub kind: String,
    /// The step it is at.
    pub step: String,
    /// What started it.
    pub cause: String,
    /// When it began.
    pub started: Time,
}

/// An operation that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FinishedOperation {
    /// Number of the operation.
    pub id: i64,
    /// `switchover`, `failover` or `restart`.
    pub kind: String,
    /// Primary before.
    pub from: String,
    /// Primary after.
    pub to: String,
    /// Epoch after.
    pub epoch: i64,
    /// What started it.
    pub cause: String,
    /// `succeeded`, `aborted` or `diverted`.
    pub outcome: String,
    /// Why it did not end as it was meant to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// When it began.
    pub started: Time,
    /// What sessions may have noticed, in milliseconds.
    pub pause_ms: i64,
    /// Where the time went.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub phases: Vec<PhaseMillis>,
    /// Sessions whose open transaction was replayed.
    #[serde(default)]
    pub replayed: i64,
    /// Sessions that got an error.
    #[serde(default)]
    pub failed: i64,
}

/// How long a phase took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PhaseMillis {
    /// The phase.
    pub phase: String,
    /// Its duration in milliseconds.
    pub ms: i64,
}
