//! A whole cluster on one machine, without Kubernetes; the embedding API.
//!
//! [`LocalCluster`] runs PostgreSQL servers under agents, a proxy in front of them, and the
//! controller that executes what `helios_cluster` decides; everything lives under one data
//! directory and resumes from it.

mod agents;
pub mod client;
mod cluster;
mod control;
mod controller;
pub mod credentials;
mod destroy;
mod error;
mod files;
mod flush;
mod layout;
mod lock;
mod options;
pub mod postgres;
mod proxy;
mod report;
mod sessions;
mod setup;
mod status;

pub use cluster::LocalCluster;
pub use credentials::Credentials;
pub use destroy::destroy;
pub use error::LocalError;
pub use helios_cluster::{
    Durability, OperationKind, OperationRecord, Outcome, Phase, PhaseDuration,
};
pub use layout::Layout;
pub use options::{AgentMode, LocalBuilder, LocalOptions, ProxyAuth};
pub use sessions::{BoxFuture, MoveSessions};
pub use status::{InstanceStatus, LocalStatus, MaintenanceReport, Progress};
