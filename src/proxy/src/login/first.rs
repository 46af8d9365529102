//! The untyped first packets of a connection.
//!
//! Exactly as many bytes are read as a packet has: bytes that a man in the middle sent before the
//! encryption must not be taken for what came encrypted (CVE-2021-23214).

use std::io;

use helios_wire::message::ParseError;
use helios_wire::startup::{FirstPacket, MAX_STARTUP_PACKET, packet_len, parse};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::TlsAcceptor;

use super::{Deadline, LoginError};
use crate::stream::Stream;
use crate::tls::Shown;

/// First byte of a TLS handshake record.
const TLS_HANDSHAKE: u8 = 0x16;

/// What a client's first real packet is, with the stream that it goes on with.
pub(super) struct First {
    pub(super) stream: Stream,
    pub(super) packet: Result<FirstPacket, NoPacket>,
}

/// Why there is no first packet, for somebody to tell the client.
pub(super) enum NoPacket {
    /// It is malformed.
    Malformed(ParseError),
    /// It did not come in time.
    Late,
}

/// Reads up to the first packet that is no request for encryption.
///
/// # Errors
///
/// The connection's. A time limit that ends in a TLS handshake is one too: inside of it nothing
/// can be told.
pub(super) async fn first_packet(
    mut stream: Stream,
    tls: Option<&Shown>,
    deadline: Deadline,
) -> Result<First, LoginError> {
    if let (Some(tls), Stream::Tcp(socket)) = (tls, &stream) {
        let mut byte = [0];
        let Ok(peeked) = deadline.hold(socket.peek(&mut byte)).await else {
            let packet = Err(NoPacket::Late);
            return Ok(First { stream, packet });
        };
        // PostgreSQL 17's direct TLS: no request beforehand.
        if peeked? == 1 && byte[0] == TLS_HANDSHAKE {
            stream = deadline.hold(direct_tls(stream, tls)).await??;
        }
    }
    // Each request may be made once, as in PostgreSQL.
    let (mut asked_tls, mut asked_gss) = (stream.is_tls(), false);
    loop {
        let packet = match deadline.hold(read_packet(&mut stream)).await {
            Ok(packet) => packet?.map_err(NoPacket::Malformed),
            Err(_) => Err(NoPacket::Late),
        };
        match packet {
            Ok(FirstPacket::SslRequest) if !asked_tls => {
                asked_tls = true;
                stream = match tls {
                    Some(tls) if matches!(stream, Stream::Tcp(_)) => {
                        answer(&mut stream, b'S').await?;
                        deadline.hold(switch_to_tls(stream, tls)).await??
                    }
                    _ => {
                        answer(&mut stream, b'N').await?;
                        stream
                    }
                };
            }
            Ok(FirstPacket::GssEncRequest) if !asked_gss => {
                asked_gss = true;
                answer(&mut stream, b'N').await?;
            }
            packet => return Ok(First { stream, packet }),
        }
    }
}

async fn answer(stream: &mut Stream, byte: u8) -> io::Result<()> {
    stream.write_all(&[byte]).await?;
    stream.flush().await
}

async fn read_packet(stream: &mut Stream) -> Result<Result<FirstPacket, ParseError>, LoginError> {
    let mut packet = vec![0; 4];
    // Closed without a byte: a port check.
    if stream.read(&mut packet[..1]).await? == 0 {
        return Err(LoginError::Closed);
    }
    stream.read_exact(&mut packet[1..]).await?;
    let len = match packet_len(&packet) {
        Ok(len) => len.unwrap_or(4).min(MAX_STARTUP_PACKET),
        Err(error) => return Ok(Err(error)),
    };
    packet.resize(len, 0);
    stream.read_exact(&mut packet[4..]).await?;
    Ok(parse(&packet))
}

async fn switch_to_tls(stream: Stream, tls: &Shown) -> Result<Stream, LoginError> {
    let Stream::Tcp(socket) = stream else {
        return Err(LoginError::Protocol("TLS inside of TLS".to_owned()));
    };
    let session = TlsAcceptor::from(tls.config()).accept(socket).await?;
    Ok(Stream::TlsServer(Box::new(session)))
}

async fn direct_tls(stream: Stream, tls: &Shown) -> Result<Stream, LoginError> {
    let stream = switch_to_tls(stream, tls).await?;
    if let Stream::TlsServer(session) = &stream
        && session.get_ref().1.alpn_protocol().is_none()
    {
        // PostgreSQL's rule: without ALPN another protocol's bytes could be taken for ours.
        let why = "direct TLS without ALPN protocol negotiation".to_owned();
        return Err(LoginError::Protocol(why));
    }
    Ok(stream)
}
