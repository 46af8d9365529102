//! SCRAM-SHA-256 (RFC 5802, RFC 7677) without ever holding a clear password.
//!
//! The server's side works from the verifier that PostgreSQL keeps in `pg_authid.rolpassword`. A
//! client's proof, together with the verifier, yields its ClientKey; with that the client's side
//! can log in to any server that holds the same verifier, as PostgreSQL 18 does for
//! `postgres_fdw` (`scram_client_key`). Keys are wiped on drop and never printed.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize as _, Zeroizing};

mod client;
mod server;

pub use client::{Binding, Client, ClientFinal, Secret};
pub use server::{Server, ServerFinal, Verifier};

/// Name of the mechanism.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// Name of the mechanism with channel binding.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// Iterations of verifiers that PostgreSQL makes by default.
pub const DEFAULT_ITERATIONS: u32 = 4096;
/// A peer may ask for at most so many; each costs a hash.
const MAX_ITERATIONS: u32 = 10_000_000;
/// Random bytes in a nonce (`SCRAM_RAW_NONCE_LEN`).
const NONCE_LEN: usize = 18;

type Key = [u8; 32];

/// Why an exchange failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScramError {
    /// The peer's message is malformed or out of place.
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    /// The proof is wrong, or there is no such user.
    #[error("SCRAM authentication failed")]
    Denied,
    /// The server does not know the verifier: it is not who it claims to be.
    #[error("incorrect server signature")]
    ServerSignature,
    /// The server's error attribute.
    #[error("server reported a SCRAM error: {0}")]
    Server(String),
    /// The text is no SCRAM-SHA-256 verifier.
    #[error("not a SCRAM-SHA-256 verifier")]
    Verifier,
}

/// The keys of a successful exchange: enough to log in as the client anywhere its verifier is
/// known, and to check such a server.
#[derive(Clone, PartialEq, Eq)]
pub struct ScramKeys {
    /// ClientKey: proves the client's identity.
    pub client_key: [u8; 32],
    /// StoredKey: the hash of it.
    pub stored_key: [u8; 32],
    /// ServerKey: checks the server's signature.
    pub server_key: [u8; 32],
}

impl ScramKeys {
    fn from_salted(salted: &Key) -> Self {
        let client_key = hmac(salted, &[b"Client Key"]);
        Self {
            stored_key: sha256(&client_key),
            server_key: hmac(salted, &[b"Server Key"]),
            client_key,
        }
    }
}

impl Drop for ScramKeys {
    fn drop(&mut self) {
        self.client_key.zeroize();
        self.stored_key.zeroize();
        self.server_key.zeroize();
    }
}

impl fmt::Debug for ScramKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ScramKeys(..)")
    }
}

/// The verifier of a password, as PostgreSQL stores it.
#[must_use]
pub fn build_verifier(password: &str, salt: &[u8], iterations: u32) -> String {
    let keys = ScramKeys::from_salted(&salted_password(password, salt, iterations));
    format!(
        "{MECHANISM}${iterations}:{}${}:{}",
        BASE64.encode(salt),
        BASE64.encode(keys.stored_key),
        BASE64.encode(keys.server_key)
    )
}

/// `Hi(Normalize(password), salt, i)`: PBKDF2 with one block.
fn salted_password(password: &str, salt: &[u8], iterations: u32) -> Zeroizing<Key> {
    // As PostgreSQL does: what SASLprep prohibits is used as it is.
    let normal = stringprep::saslprep(password).unwrap_or(password.into());
    let mut block = hmac(normal.as_bytes(), &[salt, &[0, 0, 0, 1]]);
    let mut sum = Zeroizing::new(block);
    let keyed = keyed(normal.as_bytes());
    for _ in 1..iterations {
        let mut mac = keyed.clone();
        mac.update(&block);
        block = mac.finalize().into_bytes().into();
        xor_into(&mut sum, &block);
    }
    block.zeroize();
    sum
}

fn keyed(key: &[u8]) -> Hmac<Sha256> {
    // HMAC takes keys of every length; the error type stems from a general trait.
    Hmac::new_from_slice(key).unwrap_or_else(|_| Hmac::new(&Default::default()))
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = keyed(key);
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn sha256(data: &[u8]) -> Key {
    Sha256::digest(data).into()
}

fn xor_into(target: &mut Key, other: &Key) {
    target.iter_mut().zip(other).for_each(|(a, b)| *a ^= b);
}

fn new_nonce() -> String {
    let mut raw = [0; NONCE_LEN];
    rand::fill(&mut raw);
    BASE64.encode(raw)
}

/// A nonce is printable ASCII without a comma.
fn is_nonce(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| (0x21..=0x7E).contains(&b) && b != b',')
}

fn decode_key(text: &str) -> Option<Key> {
    BASE64.decode(text).ok()?.try_into().ok()
}

fn utf8(message: &[u8]) -> Result<&str, ScramError> {
    std::str::from_utf8(message).map_err(|_| ScramError::Malformed("not UTF-8"))
}

/// Takes the value of `name=` from the front of `rest`, up to the next comma.
fn attribute<'a>(rest: &mut &'a str, name: char) -> Result<&'a str, ScramError> {
    let value = rest
        .strip_prefix(name)
        .and_then(|r| r.strip_prefix('='))
        .ok_or(ScramError::Malformed("an attribute is missing"))?;
    let (value, after) = value.split_once(',').unwrap_or((value, ""));
    *rest = after;
    Ok(value)
}

#[cfg(test)]
mod tests;
