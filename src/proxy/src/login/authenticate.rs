//! A client's proof of who it is.

use std::sync::Arc;

use bytes::Bytes;
use helios_wire::message::{back, read};
use helios_wire::scram::{ScramError, ScramKeys, Server};
use helios_wire::{ErrorFields, SqlState, body, frontend};

use super::handshake::refuse;
use super::{EdgeContext, LoginError};
use crate::auth::AuthMethod;
use crate::backend::Credentials;
use crate::framed::{Framed, ReadError};
use crate::stream::Stream;
use crate::tls::{Shown, common_name};

/// Longest message of an authentication.
const MAX_MESSAGE: usize = 16 * 1024;

/// Why a client is not believed: its own fault and what it is told, or a broken connection.
enum Failure {
    Tell(ErrorFields),
    Gone(LoginError),
}

impl From<ReadError> for Failure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Io(error) => Self::Gone(error.into()),
            other => Self::Tell(violation(other.to_string())),
        }
    }
}

/// Lets the client prove that it is `user`; what is returned proves the same to a server. `tls`:
/// what it was shown, if it is under TLS.
pub(super) async fn authenticate(
    client: &mut Framed,
    user: &str,
    ctx: &EdgeContext,
    tls: Option<&Shown>,
) -> Result<Credentials, LoginError> {
    let proven = match ctx.auth {
        AuthMethod::Trust => Ok(Credentials::None),
        AuthMethod::Cert => certificate(&client.stream, user).map(|()| Credentials::None),
        AuthMethod::ScramSha256 => scram(client, user, ctx, tls)
            .await
            .map(|keys| Credentials::Scram(Arc::new(keys))),
    };
    match proven {
        Ok(credentials) => Ok(credentials),
        Err(Failure::Gone(error)) => Err(error),
        Err(Failure::Tell(error)) => Err(refuse(client, error).await),
    }
}

fn certificate(stream: &Stream, user: &str) -> Result<(), Failure> {
    let refused = |why: String| {
        let error = ErrorFields::fatal(SqlState::INVALID_AUTHORIZATION, why);
        Err(Failure::Tell(error))
    };
    let shown = match stream {
        Stream::TlsServer(session) => session.get_ref().1.peer_certificates(),
        _ => None,
    };
    // rustls has checked the chain against the client authority.
    let Some(certificate) = shown.and_then(|chain| chain.first()) else {
        return refused("connection requires a valid client certificate".to_owned());
    };
    if common_name(certificate).as_deref() == Some(user) {
        Ok(())
    } else {
        refused(format!(
            "certificate authentication failed for user \"{user}\""
        ))
    }
}

async fn scram(
    client: &mut Framed,
    user: &str,
    ctx: &EdgeContext,
    tls: Option<&Shown>,
) -> Result<ScramKeys, Failure> {
    let verifier = ctx.verifiers.lookup(user).await.map_err(|error| {
        tracing::warn!(user, %error, "could not read the user's password verifier");
        let why = "the password cannot be checked now: no primary server is available";
        let error = ErrorFields::fatal(SqlState::CANNOT_CONNECT_NOW, why);
        Failure::Tell(error.hint("try again in a moment"))
    })?;
    let end_point = match (&client.stream, tls) {
        (Stream::TlsServer(_), Some(tls)) => tls.end_point().map(<[u8]>::to_vec),
        _ => None,
    };
    let server = Server::new(verifier, end_point);
    back::authentication_sasl(&mut client.out, server.mechanisms());
    let first = exchange(client).await?;
    let (mechanism, data) = read::sasl_initial_response(body(&first))
        .map_err(|e| Failure::Tell(violation(e.to_string())))?;
    let refused = |error| refusal(user, error);
    let (server, answer) = server
        .first(mechanism, data.unwrap_or_default())
        .map_err(refused)?;
    back::authentication_sasl_continue(&mut client.out, answer.as_bytes());
    let last = exchange(client).await?;
    let (keys, signature) = server.finish(body(&last)).map_err(refused)?;
    back::authentication_sasl_final(&mut client.out, signature.as_bytes());
    Ok(keys)
}

/// Sends what is waiting and takes the client's answer.
async fn exchange(client: &mut Framed) -> Result<Bytes, Failure> {
    client.flush().await.map_err(|e| Failure::Gone(e.into()))?;
    match client.read(MAX_MESSAGE).await? {
        (frontend::PASSWORD, frame) => Ok(frame),
        // libpq hangs up when it has no password to give, and asks its user for one.
        (frontend::TERMINATE, _) => Err(Failure::Gone(LoginError::Closed)),
        (tag, _) => {
            let tag = tag.escape_ascii();
            let why = format!("expected SASL response, got message type \"{tag}\"");
            Err(Failure::Tell(violation(why)))
        }
    }
}

fn refusal(user: &str, error: ScramError) -> Failure {
    Failure::Tell(match error {
        ScramError::Denied => {
            let why = format!("password authentication failed for user \"{user}\"");
            ErrorFields::fatal(SqlState::INVALID_PASSWORD, why)
        }
        other => violation(other.to_string()),
    })
}

fn violation(why: String) -> ErrorFields {
    ErrorFields::fatal(SqlState::PROTOCOL_VIOLATION, why)
}
