//! Why certificates cannot be used.

use std::path::PathBuf;

/// A part of what makes a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The authorities that are believed.
    Authority,
    /// The certificate that is shown.
    Certificate,
    /// Its key.
    Key,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Authority => "authority",
            Self::Certificate => "certificate",
            Self::Key => "key",
        })
    }
}

/// Certificates that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or does not hold what it should.
    #[error("could not use \"{}\": {why}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A certificate and a key that do not belong together.
    #[error("certificate \"{}\" and key \"{}\" cannot be used together: {why}", .certificate.display(), .key.display())]
    Pair {
        /// File of the certificate.
        certificate: PathBuf,
        /// File of the key.
        key: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A text does not hold what it should.
    #[error("{part}: {why}")]
    Part {
        /// What it should hold.
        part: Part,
        /// What is wrong.
        why: String,
    },
    /// What was read does not fit together.
    #[error("certificates cannot be used: {0}")]
    Material(String),
    /// A name that no certificate can carry.
    #[error("\"{0}\" is not a name that a certificate can carry")]
    Name(String),
}
