//! The client's side of an exchange.

use std::fmt;

use base64::Engine as _;
use subtle::ConstantTimeEq as _;

use super::{
    BASE64, MAX_ITERATIONS, MECHANISM, MECHANISM_PLUS, ScramError, ScramKeys, attribute,
    decode_key, hmac, is_nonce, new_nonce, salted_password, utf8, xor_into,
};

/// What the client proves its identity with.
#[derive(Clone, Copy)]
pub enum Secret<'a> {
    /// The clear password.
    Password(&'a str),
    /// Keys of an earlier exchange with the same verifier.
    Keys(&'a ScramKeys),
}

impl fmt::Debug for Secret<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How the exchange is tied to the connection beneath.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binding {
    /// Not at all: the connection is not encrypted, or its certificate cannot be hashed.
    None,
    /// We could, but the server did not offer it.
    NotOffered,
    /// By the hash of the server's certificate.
    EndPoint(Vec<u8>),
}

/// A client that has sent its first message.
pub struct Client<'a> {
    secret: Secret<'a>,
    binding: Binding,
    bare: String,
    nonce: String,
}

impl fmt::Debug for Client<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client(..)")
    }
}

impl<'a> Client<'a> {
    /// Begins an exchange.
    #[must_use]
    pub fn new(secret: Secret<'a>, binding: Binding) -> Self {
        // PostgreSQL takes the user from the startup packet and ignores this one.
        Self::with_nonce(secret, binding, "", new_nonce())
    }

    pub(super) fn with_nonce(
        secret: Secret<'a>,
        binding: Binding,
        user: &str,
        nonce: String,
    ) -> Self {
        let bare = format!("n={user},r={nonce}");
        Self {
            secret,
            binding,
            bare,
            nonce,
        }
    }

    /// The mechanism to name in SASLInitialResponse.
    #[must_use]
    pub fn mechanism(&self) -> &'static str {
        match self.binding {
            Binding::EndPoint(_) => MECHANISM_PLUS,
            Binding::None | Binding::NotOffered => MECHANISM,
        }
    }

    /// The data of SASLInitialResponse.
    #[must_use]
    pub fn first(&self) -> String {
        format!("{}{}", self.header(), self.bare)
    }

    fn header(&self) -> &'static str {
        match self.binding {
            Binding::None => "n,,",
            Binding::NotOffered => "y,,",
            Binding::EndPoint(_) => "p=tls-server-end-point,,",
        }
    }

    /// Takes the server's first message; the answer goes into SASLResponse.
    ///
    /// # Errors
    ///
    /// The message is malformed.
    pub fn finish(self, server_first: &[u8]) -> Result<(ClientFinal, String), ScramError> {
        let server_first = utf8(server_first)?;
        let mut rest = server_first;
        let nonce = attribute(&mut rest, 'r')?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() || !is_nonce(nonce) {
            return Err(ScramError::Malformed("nonce does not match"));
        }
        let salt = BASE64
            .decode(attribute(&mut rest, 's')?)
            .map_err(|_| ScramError::Malformed("malformed salt"))?;
        let iterations: u32 = attribute(&mut rest, 'i')?
            .parse()
            .ok()
            .filter(|i| (1..=MAX_ITERATIONS).contains(i))
            .ok_or(ScramError::Malformed("malformed iteration count"))?;
        let keys = match self.secret {
            Secret::Keys(keys) => keys.clone(),
            Secret::Password(password) => {
                ScramKeys::from_salted(&salted_password(password, &salt, iterations))
            }
        };
        let mut bound = self.header().as_bytes().to_vec();
        if let Binding::EndPoint(hash) = &self.binding {
            bound.extend(hash);
        }
        let without_proof = format!("c={},r={nonce}", BASE64.encode(bound));
        let auth_message = format!("{},{server_first},{without_proof}", self.bare);
        let mut proof = hmac(&keys.stored_key, &[auth_message.as_bytes()]);
        xor_into(&mut proof, &keys.client_key);
        let answer = format!("{without_proof},p={}", BASE64.encode(proof));
        Ok((ClientFinal { keys, auth_message }, answer))
    }
}

/// A client that waits for the server's proof.
pub struct ClientFinal {
    keys: ScramKeys,
    auth_message: String,
}

impl fmt::Debug for ClientFinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientFinal(..)")
    }
}

impl ClientFinal {
    /// Checks that the server knows the verifier.
    ///
    /// # Errors
    ///
    /// It does not, it reports an error, or the message is malformed.
    pub fn verify(self, server_final: &[u8]) -> Result<ScramKeys, ScramError> {
        let server_final = utf8(server_final)?;
        let mut rest = server_final;
        if let Ok(error) = attribute(&mut rest, 'e') {
            return Err(ScramError::Server(error.to_owned()));
        }
        let signature = decode_key(attribute(&mut rest, 'v')?)
            .ok_or(ScramError::Malformed("malformed server signature"))?;
        let expected = hmac(&self.keys.server_key, &[self.auth_message.as_bytes()]);
        if bool::from(expected.ct_eq(&signature)) {
            Ok(self.keys)
        } else {
            Err(ScramError::ServerSignature)
        }
    }
}
