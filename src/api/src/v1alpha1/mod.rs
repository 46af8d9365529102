//! The Kubernetes API: HeliosCluster, group `heliosdb.io`, version `v1alpha1`.
//!
//! Plain data with the schema that the API server enforces; [`valid`] turns it into types that
//! hold what the schema cannot say. Touches nothing. Invariant: a field exists only when something
//! acts on it, and every field has a description, and limits where there are any.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod bootstrap;
mod certificates;
pub mod names;
mod placement;
mod postgres;
mod proxy;
mod status;
pub mod unknown;
pub mod valid;

pub use bootstrap::{BaseBackup, Bootstrap, Initdb, KeyOf, SqlSource, SslMode};
pub use certificates::Certificates;
pub use placement::{PodMetadata, Scheduling, ServiceTemplate, ServiceType};
pub use postgres::{DataDurability, Failover, Postgresql, Switchover, Synchronous};
pub use proxy::{
    HealthChecks, LogLevel, MigrationTriggers, ProxyLogs, ProxySpec, ReplayMode, RestoreAhead,
    SessionMigration, TransactionReplay,
};
pub use status::{
    ConditionType, FinishedOperation, HeliosClusterStatus, InstanceStatus, PhaseMillis,
    ProxyReport, RunningOperation,
};

/// A PostgreSQL cluster whose sessions and open transactions survive a change of primary.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "heliosdb.io",
    version = "v1alpha1",
    kind = "HeliosCluster",
    namespaced,
    status = "HeliosClusterStatus",
    shortname = "hc",
    category = "all",
    derive = "PartialEq",
    annotation("helm.sh/resource-policy", "keep"),
    doc = "A PostgreSQL cluster whose sessions and open transactions survive a change of primary.",
    scale(
        spec_replicas_path = ".spec.instances",
        status_replicas_path = ".status.instancesTotal",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Instances", type_ = "integer", json_path = ".spec.instances"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.instancesReady"),
    printcolumn(name = "Primary", type_ = "string", json_path = ".status.currentPrimary"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("self.metadata.name.size() <= 40")
        .message("metadata.name must have at most 40 characters: Pods and Services are named after it"),
    validation = Rule::new("has(self.spec.walStorage) == has(oldSelf.spec.walStorage)")
        .message("spec.walStorage can be neither added nor removed: data directories are laid out by it")
)]
#[serde(rename_all = "camelCase")]
pub struct HeliosClusterSpec {
    /// PostgreSQL servers: one primary, the rest standbys.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 9))]
    pub instances: i32,
    /// A stock PostgreSQL image, 15 to 18, with a user `postgres`. Helios puts its agent into it by
    /// an init container.
    #[schemars(length(min = 1, max = 500))]
    pub image_name: String,
    /// When the kubelet pulls that image.
    #[serde(default)]
    pub image_pull_policy: PullPolicy,
    /// Number of the user and group `postgres` in the image.
    #[serde(default = "postgres_uid")]
    #[schemars(range(min = 1, max = 65535))]
    pub postgres_uid: i64,
    /// Where each instance keeps its data.
    pub storage: Storage,
    /// A second volume for each instance, for its write-ahead log (`pg_wal`). Can be neither added
    /// nor removed later; it stays or goes as `storage.onDeletion` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal_storage: Option<WalStorage>,
    /// CPU and memory of each instance's container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// PostgreSQL itself.
    #[serde(default)]
    pub postgresql: Postgresql,
    /// What the cluster starts from. Counts once, when the first primary is made.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.bootstrap cannot be changed: it counts only once"))]
    pub bootstrap: Bootstrap,
    /// The proxy in front of the instances, which clients connect to.
    #[serde(default)]
    pub proxy: ProxySpec,
    /// When a primary counts as failed.
    #[serde(default)]
    pub failover: Failover,
    /// How a planned move goes.
    #[serde(default)]
    pub switchover: Switchover,
    /// The certificates that operator, proxies and instances show each other.
    #[serde(default)]
    pub certificates: Certificates,
    /// On which nodes Pods of instances run.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// What is added to the metadata of instances' Pods.
    #[serde(default)]
    pub pod_metadata: PodMetadata,
    /// The Service that applications connect to.
    #[serde(default)]
    pub service: ServiceTemplate,
}

fn two() -> i32 {
    2
}

fn postgres_uid() -> i64 {
    999
}

/// When an image is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum PullPolicy {
    /// Each time a container starts.
    Always,
    /// When the node does not have it.
    #[default]
    IfNotPresent,
    /// The node has it.
    Never,
}

impl PullPolicy {
    /// The policy as Kubernetes writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// A volume for each instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Storage {
    /// Its size; may grow where the storage class allows it, never shrink.
    pub size: Quantity,
    /// The storage class; the cluster's default without it. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.storage.storageClass cannot be changed"))]
    pub storage_class: Option<String>,
    /// What happens to the volumes when the HeliosCluster is deleted.
    #[serde(default)]
    pub on_deletion: OnDeletion,
}

/// A volume for each instance's write-ahead log.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct WalStorage {
    /// Its size; may grow where the storage class allows it, never shrink. It has to hold
    /// `max_wal_size`, what standbys that are away have not received (`max_slot_wal_keep_size`, 4 GB
    /// as long as it is not set), and the log of a fresh copy beside that of the one before.
    pub size: Quantity,
    /// The storage class; the cluster's default without it. Cannot be changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.walStorage.storageClass cannot be changed"))]
    pub storage_class: Option<String>,
}

/// What happens to volumes when their cluster is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnDeletion {
    /// They stay; a cluster of the same name finds its data again.
    #[default]
    Retain,
    /// They are deleted with it.
    Delete,
}
