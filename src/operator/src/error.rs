//! What can go wrong, sorted by what to do about it.

use helios_api::v1alpha1::valid::Invalid;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// The registry of metrics refuses one: a bug.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The API server refused or could not be reached; tried again.
    #[error("API server: {0}")]
    Api(#[from] kube::Error),
    /// The configuration of the client cannot be had.
    #[error("no API server is configured: {0}")]
    Config(#[from] kube::config::InferConfigError),
    /// The object is wrong; nothing is tried until it changes.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A certificate cannot be made.
    #[error("could not make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// Certificates do not fit together.
    #[error(transparent)]
    Tls(#[from] helios_control::TlsError),
    /// A Secret does not hold what it should.
    #[error(
        "secret \"{secret}\" holds no \"{key}\" that can be used; delete it to have it made anew"
    )]
    Secret {
        /// Its name.
        secret: String,
        /// The missing key.
        key: String,
    },
    /// The durable state in the status cannot be read. Nothing is guessed.
    #[error("status.state of \"{cluster}\" cannot be read: {why}")]
    State {
        /// The cluster.
        cluster: String,
        /// What is wrong.
        why: String,
    },
    /// Somebody else has decided something about the cluster.
    #[error("another operator is at work on \"{0}\"")]
    Overtaken(String),
    /// A port cannot be had.
    #[error("could not listen on {address}: {why}")]
    Listen {
        /// The port.
        address: std::net::SocketAddr,
        /// What the system said.
        why: std::io::Error,
    },
    /// SQL on the primary failed.
    #[error("{0}")]
    Sql(String),
    /// Another replica may lead by now.
    #[error("the lease was lost")]
    LeaseLost,
    /// An object cannot be written as JSON.
    #[error("could not write an object: {0}")]
    Json(#[from] serde_json::Error),
}
