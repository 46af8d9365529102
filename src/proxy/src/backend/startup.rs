//! From the start-up packet to the first ReadyForQuery.

use std::collections::BTreeMap;

use bytes::Bytes;
use helios_api::Endpoint;
use helios_wire::message::read::{self, Authentication, SaslMechanisms};
use helios_wire::message::{BuildError, ParseError, front};
use helios_wire::scram::{self, Binding, Client, ClientFinal, ScramError, Secret};
use helios_wire::startup::startup_message;
use helios_wire::{ErrorFields, backend, body};

use super::open::Opened;
use super::{BackendConn, BackendError, Credentials, Login};
use crate::framed::{Framed, ReadError};

/// Longest message of a login.
const MAX_MESSAGE: usize = 1 << 20;
/// Notices of a login that are kept.
const MAX_NOTICES: usize = 16;

/// A login under way.
struct Handshake<'a> {
    framed: Framed,
    endpoint: &'a Endpoint,
    credentials: &'a Credentials,
    end_point: Option<Vec<u8>>,
    notices: Vec<Bytes>,
}

pub(super) async fn log_in(
    opened: Opened,
    endpoint: &Endpoint,
    login: &Login,
) -> Result<BackendConn, BackendError> {
    let mut handshake = Handshake {
        framed: Framed::new(opened.stream),
        endpoint,
        credentials: &login.credentials,
        end_point: opened.end_point,
        notices: Vec::new(),
    };
    let named = [("user", &login.user), ("database", &login.database)];
    let named = named.into_iter().map(|(n, v)| (n, v.as_str()));
    let params = login.params.iter().map(|(n, v)| (n.as_str(), v.as_str()));
    startup_message(&mut handshake.framed.out, 0, named.chain(params))
        .map_err(|e| handshake.build(e))?;
    handshake.flush().await?;
    handshake.authenticate().await?;
    handshake.ready().await
}

impl Handshake<'_> {
    fn protocol(&self, why: impl Into<String>) -> BackendError {
        BackendError::protocol(self.endpoint, why)
    }

    fn unsupported(&self, why: &str) -> BackendError {
        BackendError::auth(self.endpoint, why)
    }

    fn parse(&self, error: ParseError) -> BackendError {
        self.protocol(error.to_string())
    }

    fn build(&self, error: BuildError) -> BackendError {
        self.protocol(error.to_string())
    }

    fn scram(&self, error: ScramError) -> BackendError {
        self.protocol(error.to_string())
    }

    async fn flush(&mut self) -> Result<(), BackendError> {
        let flushed = self.framed.flush().await;
        flushed.map_err(|e| BackendError::io(self.endpoint, e))
    }

    /// The next message that is neither an error nor a notice.
    async fn next(&mut self) -> Result<(u8, Bytes), BackendError> {
        loop {
            let (tag, frame) = match self.framed.read(MAX_MESSAGE).await {
                Ok(message) => message,
                Err(ReadError::Io(e)) => return Err(BackendError::io(self.endpoint, e)),
                Err(other) => return Err(self.protocol(other.to_string())),
            };
            match tag {
                backend::ERROR_RESPONSE => {
                    let fields = ErrorFields::parse(body(&frame)).map_err(|e| self.parse(e))?;
                    return Err(BackendError::Refused {
                        endpoint: self.endpoint.clone(),
                        fields,
                        frame,
                    });
                }
                backend::NOTICE_RESPONSE if self.notices.len() < MAX_NOTICES => {
                    self.notices.push(frame);
                }
                // We ask for 3.0 without options: there is nothing to negotiate.
                backend::NOTICE_RESPONSE | backend::NEGOTIATE_PROTOCOL_VERSION => {}
                _ => return Ok((tag, frame)),
            }
        }
    }

    async fn next_authentication(&mut self) -> Result<Bytes, BackendError> {
        let (tag, frame) = self.next().await?;
        if tag == backend::AUTHENTICATION {
            Ok(frame)
        } else {
            let tag = tag.escape_ascii();
            Err(self.protocol(format!("message \"{tag}\" in place of an authentication")))
        }
    }

    async fn authenticate(&mut self) -> Result<(), BackendError> {
        let frame = self.next_authentication().await?;
        let request = read::authentication(body(&frame)).map_err(|e| self.parse(e))?;
        match request {
            Authentication::Ok => Ok(()),
            Authentication::Sasl(offer) => {
                self.sasl(offer).await?;
                // Only behind a verified signature of the server's.
                let frame = self.next_authentication().await?;
                match read::authentication(body(&frame)) {
                    Ok(Authentication::Ok) => Ok(()),
                    _ => Err(self.protocol("no AuthenticationOk behind the SASL exchange")),
                }
            }
            Authentication::CleartextPassword | Authentication::Md5Password(_) => Err(self
                .unsupported(
                    "it asks for a clear or MD5 password; the proxy never holds one: use \
                     scram-sha-256 in its pg_hba.conf",
                )),
            Authentication::Other(code) => {
                Err(self.unsupported(&format!("it asks for authentication method {code}")))
            }
            Authentication::SaslContinue(_) | Authentication::SaslFinal(_) => {
                Err(self.protocol("SASL message without a SASL exchange"))
            }
        }
    }

    async fn sasl(&mut self, offer: SaslMechanisms<'_>) -> Result<(), BackendError> {
        let secret = match self.credentials {
            Credentials::Scram(keys) => Secret::Keys(keys),
            Credentials::Password(password) => Secret::Password(password),
            Credentials::None => {
                return Err(self.unsupported(
                    "it asks for a password, but the client's login left no keys: use \
                     scram-sha-256 towards clients, or trust the proxy in pg_hba.conf",
                ));
            }
        };
        let (plus, scram) = (scram::MECHANISM_PLUS, scram::MECHANISM);
        let binding = match self.end_point.take() {
            Some(hash) if offer.offers(plus) => Binding::EndPoint(hash),
            _ if !offer.offers(scram) => {
                return Err(self.unsupported("it offers no SCRAM-SHA-256"));
            }
            Some(_) => Binding::NotOffered,
            None => Binding::None,
        };
        let client = Client::new(secret, binding);
        let (mechanism, first) = (client.mechanism(), client.first());
        front::sasl_initial_response(&mut self.framed.out, mechanism, first.as_bytes())
            .map_err(|e| self.build(e))?;
        self.flush().await?;
        let client = self.sasl_continue(client).await?;
        let frame = self.next_authentication().await?;
        match read::authentication(body(&frame)).map_err(|e| self.parse(e))? {
            Authentication::SaslFinal(data) => {
                client.verify(data).map_err(|e| self.scram(e))?;
                Ok(())
            }
            _ => Err(self.protocol("the SASL exchange has no end")),
        }
    }

    async fn sasl_continue(&mut self, client: Client<'_>) -> Result<ClientFinal, BackendError> {
        let frame = self.next_authentication().await?;
        let Authentication::SaslContinue(data) =
            read::authentication(body(&frame)).map_err(|e| self.parse(e))?
        else {
            return Err(self.protocol("the SASL exchange does not go on"));
        };
        let (client, proof) = client.finish(data).map_err(|e| self.scram(e))?;
        front::sasl_response(&mut self.framed.out, proof.as_bytes()).map_err(|e| self.build(e))?;
        self.flush().await?;
        Ok(client)
    }

    /// Reads the server's parameters up to its first ReadyForQuery.
    async fn ready(mut self) -> Result<BackendConn, BackendError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut parameters = BTreeMap::new();
        let mut key = None;
        loop {
            let (tag, frame) = self.next().await?;
            match tag {
                backend::PARAMETER_STATUS => {
                    let pair = read::parameter_status(body(&frame)).map_err(|e| self.parse(e))?;
                    parameters.insert(text(pair.0), text(pair.1));
                }
                backend::BACKEND_KEY_DATA => {
                    let data = read::backend_key_data(body(&frame)).map_err(|e| self.parse(e))?;
                    key = Some((data.0, Bytes::copy_from_slice(data.1)));
                }
                backend::READY_FOR_QUERY => break,
                other => {
                    let other = other.escape_ascii();
                    return Err(self.protocol(format!("message \"{other}\" in the login")));
                }
            }
        }
        // Servers behind some poolers send no key: they cannot be cancelled.
        let (pid, secret) = key.unwrap_or_default();
        let (stream, buf) = self.framed.into_parts();
        Ok(BackendConn {
            stream,
            buf,
            pid,
            secret,
            notices: self.notices,
            parameters,
            endpoint: self.endpoint.clone(),
        })
    }
}
