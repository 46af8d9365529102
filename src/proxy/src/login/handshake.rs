//! From the start-up packet to a login: versions, options, limits.

use std::time::Duration;

use bytes::BytesMut;
use helios_wire::message::back;
use helios_wire::startup::{FirstPacket, Startup};
use helios_wire::{ErrorFields, SqlState};
use tokio::io::AsyncWriteExt as _;

use super::authenticate::authenticate;
use super::first::{First, NoPacket, first_packet};
use super::{Accepted, ClientLogin, Deadline, EdgeContext, LoginError};
use crate::backend::Login;
use crate::framed::Framed;
use crate::listener::{Admission, Incoming};
use crate::stream::Stream;
use crate::tls::ServerTls;

/// Newest minor version of protocol 3 that we speak.
const NEWEST_MINOR: u16 = 2;
/// How long, and for how many bytes, a refused client may take to hang up.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 256 * 1024;
/// Longest name of a user or database in bytes (`NAMEDATALEN` - 1).
const MAX_NAME: usize = 63;

pub(super) async fn handshake(
    incoming: Incoming,
    ctx: &EdgeContext,
    deadline: Deadline,
) -> Result<Accepted, LoginError> {
    let Incoming {
        stream,
        peer,
        admission,
    } = incoming;
    let tls = ctx.tls.as_ref().map(ServerTls::now);
    let First { stream, packet } = first_packet(stream, tls.as_deref(), deadline).await?;
    if let Ok(FirstPacket::Cancel(key)) = packet {
        return Ok(Accepted::Cancel { key, stream });
    }
    let mut client = Framed::new(stream);
    let startup = startup_of(&mut client, packet, ctx, deadline).await?;
    let negotiated = match negotiate(startup) {
        Ok(negotiated) => negotiated,
        Err(error) => return Err(refuse(&mut client, *error).await),
    };
    let Admission::Granted(place) = admission else {
        let why = "sorry, too many clients already";
        let error = ErrorFields::fatal(SqlState::TOO_MANY_CONNECTIONS, why);
        return Err(refuse(&mut client, error).await);
    };
    let Negotiated {
        minor,
        refused_options,
        announce,
        mut login,
    } = negotiated;
    if announce {
        let options: Vec<&str> = refused_options.iter().map(String::as_str).collect();
        back::negotiate_protocol_version(&mut client.out, minor, &options);
    }
    let proven = authenticate(&mut client, &login.user, ctx, tls.as_deref());
    login.credentials = match deadline.hold(proven).await {
        Ok(credentials) => credentials?,
        Err(_) => return Err(too_late(&mut client, deadline).await),
    };
    // Behind the proof: nobody can use up another user's places.
    let Some(user_place) = ctx.limits.user(&login.user) else {
        let why = format!("too many connections for role \"{}\"", login.user);
        let error = ErrorFields::fatal(SqlState::TOO_MANY_CONNECTIONS, why);
        return Err(refuse(&mut client, error).await);
    };
    back::authentication_ok(&mut client.out);
    client.flush().await?;
    let (stream, buf) = client.into_parts();
    Ok(Accepted::Session(Box::new(ClientLogin {
        stream,
        buf,
        login,
        protocol_minor: minor,
        peer,
        permits: (place, user_place),
    })))
}

/// The start-up message of a client that may go on.
async fn startup_of(
    client: &mut Framed,
    packet: Result<FirstPacket, NoPacket>,
    ctx: &EdgeContext,
    deadline: Deadline,
) -> Result<Startup, LoginError> {
    let startup = match packet {
        Ok(FirstPacket::Cancel(_)) => return Err(LoginError::Closed),
        Ok(FirstPacket::Startup(startup)) => startup,
        Ok(FirstPacket::SslRequest | FirstPacket::GssEncRequest) => {
            let why = "encryption was asked for twice";
            let error = ErrorFields::fatal(SqlState::PROTOCOL_VIOLATION, why);
            return Err(refuse(client, error).await);
        }
        Err(NoPacket::Late) => return Err(too_late(client, deadline).await),
        Err(NoPacket::Malformed(error)) => {
            let error = ErrorFields::fatal(SqlState::PROTOCOL_VIOLATION, error.to_string())
                .hint("this port speaks PostgreSQL's protocol, version 3");
            return Err(refuse(client, error).await);
        }
    };
    if ctx.tls_required && matches!(client.stream, Stream::Tcp(_)) {
        let why = "connections without TLS are not allowed";
        let error = ErrorFields::fatal(SqlState::INVALID_AUTHORIZATION, why)
            .hint("connect with sslmode=require or a stronger one");
        return Err(refuse(client, error).await);
    }
    Ok(startup)
}

/// Tells the client that its time is up. PostgreSQL says so in its log only, because it interrupts
/// itself with a signal there; the words are its own.
async fn too_late(client: &mut Framed, deadline: Deadline) -> LoginError {
    let why = "canceling authentication due to timeout";
    let error = ErrorFields::fatal(SqlState::QUERY_CANCELED, why);
    refuse(client, error).await;
    LoginError::Timeout(deadline.limit)
}

/// Tells the client why it is refused.
pub(super) async fn refuse(client: &mut Framed, error: ErrorFields) -> LoginError {
    error.write_error(&mut client.out);
    // One that has gone needs not be told.
    let _ = client.flush().await;
    let _ = client.stream.shutdown().await;
    // Closing with unread bytes resets the connection, and the error could be lost on its way.
    let linger = async {
        let (mut rest, mut left) = (BytesMut::new(), LINGER_BYTES);
        while let Ok(n @ 1..) = client.stream.fill(&mut rest, 4096).await {
            rest.clear();
            left = left.saturating_sub(n);
            if left == 0 {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(LINGER, linger).await;
    LoginError::Refused(error)
}

/// What came of the start-up packet.
#[derive(Debug)]
struct Negotiated {
    minor: u16,
    refused_options: Vec<String>,
    /// Whether the client has to be told that it does not get all that it asked for.
    announce: bool,
    login: Login,
}

fn negotiate(startup: Startup) -> Result<Negotiated, Box<ErrorFields>> {
    let fatal = |state, why: String| Err(Box::new(ErrorFields::fatal(state, why)));
    let (major, minor) = (startup.major, startup.minor);
    if major != 3 {
        let why = format!(
            "unsupported frontend protocol {major}.{minor}: server supports 3.0 to 3.{NEWEST_MINOR}"
        );
        return fatal(SqlState::FEATURE_NOT_SUPPORTED, why);
    }
    if startup.get("replication").is_some_and(asks_for_replication) {
        let error = ErrorFields::fatal(
            SqlState::FEATURE_NOT_SUPPORTED,
            "replication connections are not supported by this proxy",
        )
        .hint("connect to the instance itself");
        return Err(Box::new(error));
    }
    let user = cut(startup.get("user").unwrap_or_default());
    if user.is_empty() {
        let why = "no PostgreSQL user name specified in startup packet".to_owned();
        return fatal(SqlState::INVALID_AUTHORIZATION, why);
    }
    // As PostgreSQL: the database is called like the user when none is named.
    let database = match startup.get("database") {
        None | Some("") => user.clone(),
        Some(name) => cut(name),
    };
    let (options, params): (Vec<_>, Vec<_>) = startup
        .params
        .into_iter()
        .filter(|(name, _)| !matches!(name.as_str(), "user" | "database" | "replication"))
        .partition(|(name, _)| name.starts_with("_pq_."));
    let refused_options: Vec<String> = options.into_iter().map(|(name, _)| name).collect();
    Ok(Negotiated {
        // There never was a 3.1: who asks for it gets 3.0, without further ado as in PostgreSQL.
        minor: if minor >= NEWEST_MINOR {
            NEWEST_MINOR
        } else {
            0
        },
        announce: minor > NEWEST_MINOR || !refused_options.is_empty(),
        refused_options,
        login: Login {
            user,
            database,
            params,
            credentials: Default::default(),
        },
    })
}

/// A name as PostgreSQL takes it at a login and stores it: what is too long is cut, without a word.
/// PostgreSQL cuts it inside of a character too, and does not find such a role; we do.
fn cut(name: &str) -> String {
    name[..name.floor_char_boundary(MAX_NAME)].to_owned()
}

/// Everything but a false value: `database`, a true value, or something that the server would
/// refuse anyway.
fn asks_for_replication(value: &str) -> bool {
    !matches!(
        value.to_ascii_lowercase().as_str(),
        "false" | "off" | "no" | "0" | "f" | "n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn startup(minor: u16, params: &[(&str, &str)]) -> Startup {
        let own = |(n, v): &(&str, &str)| ((*n).to_owned(), (*v).to_owned());
        Startup {
            major: 3,
            minor,
            params: params.iter().map(own).collect(),
        }
    }

    #[test]
    fn versions_are_negotiated() {
        for (asked, given, announce) in
            [(0, 0, false), (1, 0, false), (2, 2, false), (9999, 2, true)]
        {
            let got = negotiate(startup(asked, &[("user", "u")])).unwrap();
            assert_eq!((got.minor, got.announce), (given, announce), "3.{asked}");
        }
        let mut old = startup(0, &[]);
        old.major = 2;
        let error = negotiate(old).unwrap_err();
        assert_eq!(error.sqlstate, SqlState::FEATURE_NOT_SUPPORTED);
    }

    #[test]
    fn parameters_are_sorted_out() {
        let asked = [
            ("user", "u"),
            ("_pq_.magic", "1"),
            ("application_name", "a"),
            ("replication", "off"),
            ("options", "-c work_mem=1MB"),
        ];
        let got = negotiate(startup(0, &asked)).unwrap();
        assert_eq!(got.login.database, "u");
        let names: Vec<&str> = got.login.params.iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["application_name", "options"]);
        assert_eq!(got.refused_options, ["_pq_.magic"]);
        assert!(got.announce);
        assert!(negotiate(startup(0, &[("database", "d")])).is_err());
        let (long, wide) = ("n".repeat(64), "ö".repeat(32));
        let got = negotiate(startup(0, &[("user", &wide), ("database", &long)])).unwrap();
        assert_eq!(got.login.database, "n".repeat(63));
        assert_eq!(got.login.user, "ö".repeat(31));
        for value in ["database", "true", "1", "on"] {
            let asked = startup(0, &[("user", "u"), ("replication", value)]);
            let error = negotiate(asked).unwrap_err();
            assert_eq!(error.sqlstate, SqlState::FEATURE_NOT_SUPPORTED, "{value}");
        }
    }
}
