//! A running local cluster, as an application holds it.

use helios_api::InstanceName;
use helios_api::control::{MigrationEvent, SessionInfo};
use helios_cluster::{OperationRecord, Outcome};
use tokio::sync::broadcast;

use crate::error::LocalError;
use crate::options::{LocalBuilder, LocalOptions};
use crate::status::{LocalStatus, MaintenanceReport, Progress};

/// A cluster that runs until [`Self::shutdown`], or until it is dropped.
#[derive(Debug)]
pub struct LocalCluster {
    _options: LocalOptions,
    events: broadcast::Sender<MigrationEvent>,
    progress: broadcast::Sender<Progress>,
}

impl LocalCluster {
    /// Options, call by call.
    #[must_use]
    pub fn builder() -> LocalBuilder {
        LocalBuilder::default()
    }

    /// Creates the cluster, or resumes it from what is durable; returns when clients can connect.
    ///
    /// # Errors
    /// See [`LocalError`]: each names what to do.
    pub async fn start(options: LocalOptions) -> Result<Self, LocalError> {
        options.check()?;
        Err(LocalError::NotRunning {
            path: options.data_dir,
        })
    }

    /// For libpq, with the password when there is one.
    #[must_use]
    pub fn connection_string(&self) -> String {
        String::new()
    }

    /// What happens to sessions from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<MigrationEvent> {
        self.events.subscribe()
    }

    /// Steps of operations from now on.
    #[must_use]
    pub fn progress(&self) -> broadcast::Receiver<Progress> {
        self.progress.subscribe()
    }

    /// The cluster at a glance.
    pub async fn status(&self) -> LocalStatus {
        unreachable!()
    }

    /// The proxy's sessions.
    pub async fn sessions(&self) -> Vec<SessionInfo> {
        Vec::new()
    }

    /// Moves the primary, to `to` or to the best standby.
    ///
    /// # Errors
    /// [`LocalError::Refused`] when nothing was started, [`LocalError::Aborted`] when it ended on
    /// the old primary.
    pub async fn switchover(
        &self,
        to: Option<InstanceName>,
    ) -> Result<OperationRecord, LocalError> {
        Err(LocalError::Refused(format!("{to:?}")))
    }

    /// Moves all sessions away from the primary so that it can be worked on.
    ///
    /// # Errors
    /// As [`Self::switchover`].
    pub async fn migrate_for_maintenance(&self) -> Result<MaintenanceReport, LocalError> {
        Err(LocalError::Refused(String::new()))
    }

    /// Stops an instance and keeps it stopped.
    ///
    /// # Errors
    /// [`LocalError::Refused`] with the reason.
    pub async fn fence(&self, name: InstanceName) -> Result<(), LocalError> {
        Err(LocalError::Refused(name.to_string()))
    }

    /// Lets an instance come back.
    ///
    /// # Errors
    /// [`LocalError::Refused`] with the reason.
    pub async fn unfence(&self, name: InstanceName) -> Result<(), LocalError> {
        Err(LocalError::Refused(name.to_string()))
    }

    /// Returns when somebody asked for a stop over the control socket; call [`Self::shutdown`] then.
    pub async fn stop_requested(&self) {}

    /// Stops proxy, servers and agents, in that order, each within a limit.
    pub async fn shutdown(self) {}
}

/// Success only when the operation did what was asked for.
pub(crate) fn judged(operation: OperationRecord) -> Result<OperationRecord, LocalError> {
    match &operation.outcome {
        Outcome::Succeeded => Ok(operation),
        Outcome::Aborted { reason } => {
            Err(LocalError::Aborted(format!("switchover aborted: {reason}")))
        }
        Outcome::Diverted { reason } => Err(LocalError::Aborted(format!(
            "primary is now \"{}\", not the instance asked for: {reason}",
            operation.to
        ))),
    }
}

/// Removes a data directory and everything in it; refused while the cluster runs.
///
/// # Errors
/// [`LocalError::InUse`], [`LocalError::NotACluster`] and [`LocalError::Io`].
pub async fn destroy(data_dir: &std::path::Path) -> Result<(), LocalError> {
    Err(LocalError::NotRunning {
        path: data_dir.to_owned(),
    })
}
