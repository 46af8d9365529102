//! The server's side of an exchange.

use std::fmt;
use std::str::FromStr;

use subtle::ConstantTimeEq as _;

use super::{
    BASE64, Key, MAX_ITERATIONS, MECHANISM, MECHANISM_PLUS, ScramError, ScramKeys, attribute,
    decode_key, hmac, is_nonce, new_nonce, sha256, utf8, xor_into,
};
use base64::Engine as _;

/// What a server knows of a password.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
    /// Made up for a user who has none: every proof fails.
    mock: bool,
}

impl Verifier {
    /// A verifier that no password fits, for a user who does not exist or has no password. The
    /// same user gets the same salt every time, so that nothing tells him from others. `secret`
    /// must be random and stay the same while the proxy runs; `iterations` are those of the
    /// verifiers that the server makes.
    #[must_use]
    pub fn mock(user: &str, secret: &[u8; 32], iterations: u32) -> Self {
        let derive = |purpose: &[u8]| hmac(secret, &[purpose, user.as_bytes()]);
        Self {
            iterations,
            salt: derive(b"salt")[..16].to_vec(),
            stored_key: derive(b"stored"),
            server_key: derive(b"server"),
            mock: true,
        }
    }
}

impl FromStr for Verifier {
    type Err = ScramError;

    /// Reads `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
    fn from_str(text: &str) -> Result<Self, ScramError> {
        let parse = || {
            let rest = text.strip_prefix(MECHANISM)?.strip_prefix('$')?;
            let (params, keys) = rest.split_once('$')?;
            let (iterations, salt) = params.split_once(':')?;
            let (stored, server) = keys.split_once(':')?;
            let iterations: u32 = iterations.parse().ok()?;
            (1..=MAX_ITERATIONS).contains(&iterations).then_some(())?;
            Some(Self {
                iterations,
                salt: BASE64.decode(salt).ok()?,
                stored_key: decode_key(stored)?,
                server_key: decode_key(server)?,
                mock: false,
            })
        };
        parse().ok_or(ScramError::Verifier)
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier(..)")
    }
}

/// A server that waits for the client's first message.
#[derive(Debug)]
pub struct Server {
    verifier: Verifier,
    /// Hash of our certificate (tls-server-end-point), when the connection can be bound to it.
    end_point: Option<Vec<u8>>,
}

impl Server {
    /// Begins an exchange. `end_point` is the hash of our certificate on TLS connections.
    #[must_use]
    pub fn new(verifier: Verifier, end_point: Option<Vec<u8>>) -> Self {
        Self {
            verifier,
            end_point,
        }
    }

    /// The mechanisms to offer, the preferred one first.
    #[must_use]
    pub fn mechanisms(&self) -> &'static [&'static str] {
        match self.end_point {
            Some(_) => &[MECHANISM_PLUS, MECHANISM],
            None => &[MECHANISM],
        }
    }

    /// Takes the client's first message; the answer goes into AuthenticationSASLContinue.
    ///
    /// # Errors
    ///
    /// The message is malformed, or channel binding does not fit.
    pub fn first(
        self,
        mechanism: &[u8],
        message: &[u8],
    ) -> Result<(ServerFinal, String), ScramError> {
        self.first_with(mechanism, message, &new_nonce())
    }

    pub(super) fn first_with(
        self,
        mechanism: &[u8],
        message: &[u8],
        server_nonce: &str,
    ) -> Result<(ServerFinal, String), ScramError> {
        let plus = match mechanism {
            m if m == MECHANISM.as_bytes() => false,
            m if m == MECHANISM_PLUS.as_bytes() && self.end_point.is_some() => true,
            _ => return Err(ScramError::Malformed("mechanism that was not offered")),
        };
        let message = utf8(message)?;
        let (flag, rest) = split(message)?;
        let (authzid, bare) = split(rest)?;
        if !authzid.is_empty() {
            return Err(ScramError::Malformed(
                "authorization identity is not supported",
            ));
        }
        // The gs2 header, which the client has to repeat, followed by the binding data.
        let mut header = format!("{flag},,").into_bytes();
        match (flag, plus) {
            ("p=tls-server-end-point", true) => {
                header.extend(self.end_point.as_deref().unwrap_or_default());
            }
            ("n", false) => {}
            ("y", false) if self.end_point.is_none() => {}
            // It can bind and thinks that we cannot: somebody took our offer away.
            ("y", false) => return Err(ScramError::Malformed("channel binding was hidden")),
            _ => return Err(ScramError::Malformed("channel binding does not fit")),
        }
        let mut rest = bare;
        // The user is the one of the startup packet; this one is ignored, as in PostgreSQL.
        attribute(&mut rest, 'n')?;
        let client_nonce = attribute(&mut rest, 'r')?;
        if !is_nonce(client_nonce) {
            return Err(ScramError::Malformed("invalid nonce"));
        }
        let nonce = format!("{client_nonce}{server_nonce}");
        let salt = BASE64.encode(&self.verifier.salt);
        let answer = format!("r={nonce},s={salt},i={}", self.verifier.iterations);
        let next = ServerFinal {
            auth_message: format!("{bare},{answer},"),
            binding: BASE64.encode(header),
            nonce,
            verifier: self.verifier,
        };
        Ok((next, answer))
    }
}

fn split(text: &str) -> Result<(&str, &str), ScramError> {
    text.split_once(',')
        .ok_or(ScramError::Malformed("it ends too early"))
}

/// A server that waits for the client's proof.
pub struct ServerFinal {
    verifier: Verifier,
    /// Begin of the AuthMessage: everything but the client's last message.
    auth_message: String,
    binding: String,
    nonce: String,
}

impl fmt::Debug for ServerFinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerFinal(..)")
    }
}

impl ServerFinal {
    /// Takes the client's proof; the answer goes into AuthenticationSASLFinal.
    ///
    /// # Errors
    ///
    /// [`ScramError::Denied`] when the proof is wrong, another one when the message is malformed.
    pub fn finish(self, message: &[u8]) -> Result<(ScramKeys, String), ScramError> {
        let message = utf8(message)?;
        let (without_proof, proof) = message
            .rsplit_once(",p=")
            .ok_or(ScramError::Malformed("no proof"))?;
        let mut rest = without_proof;
        if attribute(&mut rest, 'c')? != self.binding {
            return Err(ScramError::Malformed("channel binding check failed"));
        }
        if attribute(&mut rest, 'r')? != self.nonce {
            return Err(ScramError::Malformed("nonce does not match"));
        }
        let proof = decode_key(proof).ok_or(ScramError::Malformed("malformed proof"))?;
        let Verifier {
            stored_key,
            server_key,
            mock,
            ..
        } = self.verifier;
        let auth_message = self.auth_message + without_proof;
        let mut client_key = hmac(&stored_key, &[auth_message.as_bytes()]);
        xor_into(&mut client_key, &proof);
        let keys = ScramKeys {
            client_key,
            stored_key: sha256(&client_key),
            server_key,
        };
        let matches = bool::from(keys.stored_key.ct_eq(&stored_key));
        if !matches || mock {
            return Err(ScramError::Denied);
        }
        let signature = hmac(&server_key, &[auth_message.as_bytes()]);
        Ok((keys, format!("v={}", BASE64.encode(signature))))
    }
}
