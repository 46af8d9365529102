//! Why an agent cannot run at all. What goes wrong with a single command is an
//! [`AgentError`] and leaves the agent running.

use std::path::{Path, PathBuf};

use helios_api::agent::AgentError;

/// Why an agent ended, or could not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentFailure {
    /// A value of the configuration is wrong.
    #[error("invalid agent configuration: {0}")]
    Config(String),
    /// Another agent is in charge of the same data directory.
    #[error("another agent is in charge of \"{}\" already", .0.display())]
    AlreadyRunning(PathBuf),
    /// A file or folder that the agent cannot do without.
    #[error("{doing} \"{}\": {error}", .path.display())]
    File {
        /// What was tried: `could not read`, ...
        doing: &'static str,
        /// With which file.
        path: PathBuf,
        /// What came of it.
        error: std::io::Error,
    },
    /// The state file is not what an agent writes.
    #[error(
        "state file \"{}\" is damaged: {why}; restore it, or remove it together with the data directory",
        .path.display()
    )]
    StateFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

impl AgentFailure {
    pub(crate) fn file(doing: &'static str, path: &Path, error: std::io::Error) -> Self {
        Self::File {
            doing,
            path: path.to_owned(),
            error,
        }
    }
}

impl From<AgentFailure> for AgentError {
    fn from(failure: AgentFailure) -> Self {
        failed(failure)
    }
}

/// It was tried and did not work; it may be tried again.
pub(crate) fn failed(reason: impl std::fmt::Display) -> AgentError {
    AgentError::Failed {
        reason: reason.to_string(),
    }
}

/// It makes no sense in this state.
pub(crate) fn refused(reason: impl std::fmt::Display) -> AgentError {
    AgentError::Refused {
        reason: reason.to_string(),
    }
}

/// A file operation of a command that failed.
pub(crate) fn file_failed(
    doing: &'static str,
    path: &Path,
) -> impl FnOnce(std::io::Error) -> AgentError {
    move |error| failed(format_args!("{doing} \"{}\": {error}", path.display()))
}
