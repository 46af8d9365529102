//! What the controller needs of a proxy.
//!
//! A trait, so that the controller can be tested with a stand-in and a proxy in another process
//! can take the place of the one in this one.

use std::pin::Pin;
use std::time::Duration;

use helios_api::Epoch;
use helios_api::control::{
    Backend, DrainReport, DrainRequest, MigrationEvent, ProxyStatus, ResumeReport, SessionInfo,
    Topology,
};
use helios_api::protection::ProtectionReport;
use tokio::sync::broadcast;

/// A future that a trait object can return.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Moves sessions from one primary to another.
pub trait MoveSessions: Send + Sync + std::fmt::Debug {
    /// Opens connections to the candidate ahead of time.
    fn prepare(&self, epoch: Epoch, candidate: Backend) -> BoxFuture<'_, Result<(), String>>;
    /// Says who is to be promoted should the primary fail.
    fn set_heir(&self, heir: Option<Backend>);
    /// Holds new transactions and freezes the open ones.
    fn drain(&self, request: DrainRequest) -> BoxFuture<'_, Result<DrainReport, String>>;
    /// Replays all sessions on the new primary and lets work in.
    fn resume(&self, topology: Topology) -> BoxFuture<'_, Result<ResumeReport, String>>;
    /// Undoes a drain.
    fn abort(&self, epoch: Epoch) -> BoxFuture<'_, Result<(), String>>;
    /// The proxy at a glance.
    fn status(&self) -> BoxFuture<'_, ProxyStatus>;
    /// Its sessions.
    fn sessions(&self) -> BoxFuture<'_, Vec<SessionInfo>>;
    /// What was protected, and what was not and why.
    fn protection(&self) -> BoxFuture<'_, ProtectionReport>;
    /// Migration events from now on.
    fn subscribe(&self) -> broadcast::Receiver<MigrationEvent>;
    /// Ends all sessions, those in a transaction after `grace` at the latest.
    fn shutdown(&self, grace: Duration) -> BoxFuture<'_, ()>;
    /// Address that clients connect to, `host:port`.
    fn address(&self) -> String;
    /// Address of the HTTP endpoints.
    fn http_address(&self) -> Option<String>;
}
