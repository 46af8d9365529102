//! SCRAM-SHA-256 (RFC 5802, RFC 7677) without clear passwords.

use std::fmt;

/// Keys that a successful exchange leaves.
#[derive(Clone)]
pub struct ScramKeys {
    /// ClientKey: proves the client's identity to any server that holds the verifier.
    pub client_key: [u8; 32],
    /// StoredKey: hash of the ClientKey.
    pub stored_key: [u8; 32],
    /// ServerKey: checks the server's signature.
    pub server_key: [u8; 32],
}

impl fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScramKeys(..)")
    }
}
