//! What a local cluster says of itself, over the control socket and in the library.

use std::path::PathBuf;

use helios_api::agent::InstanceState;
use helios_api::control::ProxyStatus;
use helios_api::{Endpoint, Epoch, InstanceName, Timeline};
use helios_cluster::{OperationRecord, Phase};
use serde::{Deserialize, Serialize};

/// A local cluster at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalStatus {
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Process id of the supervisor.
    pub pid: u32,
    /// For libpq; without a password when the proxy trusts.
    pub connection_string: String,
    /// Address of the proxy's HTTP endpoints.
    pub http: Option<String>,
    /// Current epoch.
    pub epoch: Epoch,
    /// Timeline that the primary writes.
    pub timeline: Option<Timeline>,
    /// The primary.
    pub primary: Option<InstanceName>,
    /// `bootstrap`, `steady`, or the operation that is under way.
    pub phase: String,
    /// The step of that operation.
    pub step: Option<Phase>,
    /// Standbys that acknowledged commits may be waiting on.
    pub synchronous: Vec<InstanceName>,
    /// The servers.
    pub instances: Vec<InstanceStatus>,
    /// The proxy; `None` while it is not up.
    pub proxy: Option<ProxyStatus>,
    /// The last operations, newest last.
    pub operations: Vec<OperationRecord>,
}

/// One server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    /// Its name.
    pub name: InstanceName,
    /// `primary`, `standby` or `none`.
    pub role: String,
    /// What its agent reports; `None` while the agent does not answer.
    pub state: Option<InstanceState>,
    /// Where it listens.
    pub endpoint: Endpoint,
    /// What stands in its way: why its agent ended, or what its last command failed with.
    #[serde(default)]
    pub trouble: Option<String>,
    /// Whether a person has fenced it.
    pub fenced: bool,
    /// Whether commits wait for it.
    pub synchronous: bool,
    /// Bytes of WAL that it has not received yet.
    pub lag_bytes: Option<u64>,
    /// Process id of its postmaster, from the data directory.
    pub postmaster_pid: Option<i32>,
}

/// One line of the progress of an operation, as JSON lines on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "progress", rename_all = "snake_case")]
pub enum Progress {
    /// A phase began.
    Phase {
        /// The phase.
        phase: Phase,
        /// Since the operation began, in microseconds.
        elapsed_micros: u64,
    },
    /// The operation ended; its outcome is in the record.
    Finished {
        /// What there is to say about it.
        operation: Box<OperationRecord>,
    },
    /// Nothing was started, or it cannot be known how it ended.
    Refused {
        /// Why.
        reason: String,
    },
}

/// What [`crate::LocalCluster::migrate_for_maintenance`] came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaintenanceReport {
    /// Sessions that were moved.
    pub moved: u64,
    /// Sessions that got an error.
    pub failed: u64,
    /// From the drain to the resume, in microseconds.
    pub pause_micros: u64,
    /// The operation in full.
    pub operation: OperationRecord,
}

/// The answer to a request that failed, on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ControlError {
    /// What went wrong.
    pub error: String,
}
