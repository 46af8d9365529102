//! How clients prove who they are: trust, SCRAM-SHA-256 or a certificate.
//!
//! No clear password is ever asked for. Whatever the method, a user who does not exist looks like
//! one whose proof is wrong.

mod verifiers;

pub use verifiers::{LookupError, VerifierCache};

/// The method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AuthMethod {
    /// Not at all.
    Trust,
    /// SCRAM-SHA-256 against the verifier in the server's catalog.
    #[default]
    ScramSha256,
    /// A TLS client certificate whose common name is the user.
    Cert,
}
