//! How clients prove who they are.

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

/// SCRAM verifiers, fetched from the primary's catalog.
#[derive(Debug, Default)]
pub struct VerifierCache {}
