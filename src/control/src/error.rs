//! Why certificates cannot be used.

use std::path::PathBuf;

/// Certificates that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("could not read \"{}\": {why}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        why: String,
    },
    /// What was read is not what it should be, or does not fit together.
    #[error("certificates cannot be used: {0}")]
    Material(String),
    /// A name that no certificate can carry.
    #[error("\"{0}\" is not a name that a certificate can carry")]
    Name(String),
}
