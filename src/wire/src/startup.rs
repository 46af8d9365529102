//! The untyped first packet of a connection: StartupMessage and the special requests.
//!
//! As PostgreSQL does (`ProcessStartupPacket`), a length out of bounds is refused before anything
//! is read, so a foreign protocol costs nothing.

use bytes::{BufMut, Bytes, BytesMut};

use crate::message::{BuildError, ParseError, Reader, put_cstr};

/// Longest first packet, length word included (`MAX_STARTUP_PACKET_LENGTH`).
pub const MAX_STARTUP_PACKET: usize = 10_000;
/// Longest secret of a cancel request (protocol 3.2).
pub const MAX_CANCEL_KEY: usize = 256;

const CANCEL_CODE: u32 = 1234 << 16 | 5678;
const SSL_CODE: u32 = 1234 << 16 | 5679;
const GSSENC_CODE: u32 = 1234 << 16 | 5680;

/// What a client's first packet asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FirstPacket {
    /// Switch to TLS.
    SslRequest,
    /// Switch to GSSAPI encryption.
    GssEncRequest,
    /// Cancel what another connection is doing.
    Cancel(CancelKey),
    /// Begin a session.
    Startup(Startup),
}

/// Names a connection and proves the right to cancel what it does.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CancelKey {
    /// Process id of BackendKeyData.
    pub pid: i32,
    /// Secret of BackendKeyData.
    pub secret: Bytes,
}

impl std::fmt::Debug for CancelKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CancelKey")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

/// A StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// Major version of the protocol; only 3 exists.
    pub major: u16,
    /// Minor version that the client asks for.
    pub minor: u16,
    /// Parameters in their order: `user`, `database`, settings, `_pq_.` options.
    pub params: Vec<(String, String)>,
}

impl Startup {
    /// The parameter's value; the last one counts when it is given twice, as in PostgreSQL.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.params.iter().rev().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Size of the first packet that `buf` begins with, length word included; `None` until the length
/// word is there.
///
/// # Errors
///
/// The length is out of bounds: this is no PostgreSQL client.
pub fn packet_len(buf: &[u8]) -> Result<Option<usize>, ParseError> {
    let Some(&word) = buf.first_chunk::<4>() else {
        return Ok(None);
    };
    let length = u32::from_be_bytes(word) as usize;
    if !(8..=MAX_STARTUP_PACKET).contains(&length) {
        return Err(ParseError::new(
            "startup",
            "invalid length of startup packet",
        ));
    }
    Ok(Some(length))
}

/// Reads a complete first packet, length word included.
///
/// # Errors
///
/// It is malformed, incomplete, or its text is not UTF-8.
pub fn parse(packet: &[u8]) -> Result<FirstPacket, ParseError> {
    let mut reader = Reader::new("startup", packet);
    if packet_len(packet)? != Some(packet.len()) {
        return Err(reader.error("it is incomplete"));
    }
    reader.u32()?;
    match reader.u32()? {
        CANCEL_CODE => {
            let pid = reader.i32()?;
            let secret = reader.rest();
            if secret.len() < 4 || secret.len() > MAX_CANCEL_KEY {
                return Err(reader.error("the cancel key must have 4 to 256 bytes"));
            }
            let secret = Bytes::copy_from_slice(secret);
            Ok(FirstPacket::Cancel(CancelKey { pid, secret }))
        }
        SSL_CODE => reader.end().map(|()| FirstPacket::SslRequest),
        GSSENC_CODE => reader.end().map(|()| FirstPacket::GssEncRequest),
        version => startup(reader, version).map(FirstPacket::Startup),
    }
}

fn startup(mut reader: Reader<'_>, version: u32) -> Result<Startup, ParseError> {
    let [a, b, c, d] = version.to_be_bytes();
    let (major, minor) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
    // Of another major version nothing more is known than its number.
    let params = if major == 3 {
        parameters(&mut reader)?
    } else {
        Vec::new()
    };
    Ok(Startup {
        major,
        minor,
        params,
    })
}

/// Names and values up to the empty name that ends the packet.
fn parameters(reader: &mut Reader<'_>) -> Result<Vec<(String, String)>, ParseError> {
    let mut params = Vec::new();
    loop {
        let name = reader.cstr()?;
        if name.is_empty() {
            reader.end()?;
            return Ok(params);
        }
        let value = reader.cstr()?;
        params.push((text(reader, name)?, text(reader, value)?));
    }
}

fn text(reader: &Reader<'_>, bytes: &[u8]) -> Result<String, ParseError> {
    let text = std::str::from_utf8(bytes).map_err(|_| reader.error("text is not UTF-8"))?;
    Ok(text.to_owned())
}

/// Appends a StartupMessage of protocol 3.`minor`.
///
/// # Errors
///
/// A text holds a zero byte, a name is empty, or the packet is over PostgreSQL's limit.
pub fn startup_message<'a>(
    out: &mut BytesMut,
    minor: u16,
    params: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<(), BuildError> {
    let mut body = BytesMut::new();
    body.put_u32(3 << 16 | u32::from(minor));
    for (name, value) in params {
        if name.is_empty() {
            return Err(BuildError::ZeroByte);
        }
        put_cstr(&mut body, name.as_bytes())?;
        put_cstr(&mut body, value.as_bytes())?;
    }
    body.put_u8(0);
    packet(out, &body)
}

/// Appends an SSLRequest.
pub fn ssl_request(out: &mut BytesMut) {
    out.put_u32(8);
    out.put_u32(SSL_CODE);
}

/// Appends a CancelRequest.
///
/// # Errors
///
/// The secret is over PostgreSQL's limit.
pub fn cancel_request(out: &mut BytesMut, key: &CancelKey) -> Result<(), BuildError> {
    if key.secret.len() > MAX_CANCEL_KEY {
        return Err(BuildError::TooLong);
    }
    let mut body = BytesMut::with_capacity(8 + key.secret.len());
    body.put_u32(CANCEL_CODE);
    body.put_i32(key.pid);
    body.put_slice(&key.secret);
    packet(out, &body)
}

fn packet(out: &mut BytesMut, body: &[u8]) -> Result<(), BuildError> {
    let length = body.len() + 4;
    if length > MAX_STARTUP_PACKET {
        return Err(BuildError::TooLong);
    }
    out.put_u32(u32::try_from(length).map_err(|_| BuildError::TooLong)?);
    out.put_slice(body);
    Ok(())
}
