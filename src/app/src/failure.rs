//! How a command fails: a message and an exit status.

use std::fmt;

use helios_local::LocalError;

/// A failed command. The statuses are listed in [`crate::cli::EXIT_CODES`].
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    /// Empty when everything has been said already.
    message: String,
}

impl Failure {
    /// It was tried, or checked, and the result is not what was asked for.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: message.into(),
        }
    }

    /// Whoever would have to do it does not answer.
    pub(crate) fn unreachable(message: impl Into<String>) -> Self {
        Self {
            code: 3,
            message: message.into(),
        }
    }

    /// A value on the command line or in a file cannot work.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self {
            code: 2,
            message: message.into(),
        }
    }

    /// The output has said it; only the status remains.
    pub(crate) fn silent(code: u8) -> Self {
        Self {
            code,
            message: String::new(),
        }
    }

    /// Ended by ctrl-C.
    pub(crate) fn interrupted() -> Self {
        Self {
            code: 130,
            message: "interrupted".to_owned(),
        }
    }

    pub(crate) fn is_interrupt(&self) -> bool {
        self.code == 130
    }

    pub(crate) fn code(&self) -> u8 {
        self.code
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<LocalError> for Failure {
    fn from(error: LocalError) -> Self {
        let code = match &error {
            LocalError::Option { .. } => 2,
            LocalError::NotRunning { .. } | LocalError::Control(_) => 3,
            _ => 1,
        };
        Self {
            code,
            message: error.to_string(),
        }
    }
}
