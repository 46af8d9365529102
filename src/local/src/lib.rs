//! A whole cluster on one machine, without Kubernetes; the embedding API.
//!
//! [`LocalCluster`] runs PostgreSQL servers under agents, a proxy in front of them, and the
//! controller that executes what `helios_cluster` decides; everything lives under one data
//! directory and resumes from it.

pub mod client;
mod cluster;
pub mod credentials;
mod error;
mod files;
mod layout;
mod options;
mod status;

pub use cluster::{LocalCluster, destroy};
pub use credentials::Credentials;
pub use error::LocalError;
pub use helios_cluster::{
    Durability, OperationKind, OperationRecord, Outcome, Phase, PhaseDuration,
};
pub use layout::Layout;
pub use options::{AgentMode, LocalBuilder, LocalOptions, ProxyAuth};
pub use status::{InstanceStatus, LocalStatus, MaintenanceReport, Progress};
