//! Builders of the messages that a client sends. The untyped first packet is in
//! [`crate::startup`].

use bytes::{BufMut, BytesMut};

use super::{BuildError, framed, put_count, put_cstr, put_value, try_framed};
use crate::frame::frontend;

/// What Describe and Close are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// A prepared statement.
    Statement,
    /// A portal.
    Portal,
}

impl Target {
    /// Its letter in the message.
    #[must_use]
    pub fn as_byte(self) -> u8 {
        match self {
            Self::Statement => b'S',
            Self::Portal => b'P',
        }
    }
}

/// Text or binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// The type's text form.
    Text,
    /// The type's send/receive form.
    Binary,
}

impl Format {
    /// Its code in the message.
    #[must_use]
    pub fn code(self) -> u16 {
        match self {
            Self::Text => 0,
            Self::Binary => 1,
        }
    }
}

/// Appends Query.
///
/// # Errors
///
/// The text holds a zero byte or is too long.
pub fn query(out: &mut BytesMut, sql: &[u8]) -> Result<(), BuildError> {
    try_framed(out, frontend::QUERY, |out| put_cstr(out, sql))
}

/// Appends Parse.
///
/// # Errors
///
/// A text holds a zero byte, or something is too long.
pub fn parse(
    out: &mut BytesMut,
    name: &[u8],
    sql: &[u8],
    type_oids: &[u32],
) -> Result<(), BuildError> {
    try_framed(out, frontend::PARSE, |out| {
        put_cstr(out, name)?;
        put_cstr(out, sql)?;
        put_count(out, type_oids.len())?;
        type_oids.iter().for_each(|&oid| out.put_u32(oid));
        Ok(())
    })
}

/// Appends Bind. Formats follow the protocol's rule: none means text for all, one is for all,
/// else one each.
///
/// # Errors
///
/// A name holds a zero byte, or something is too long.
pub fn bind(
    out: &mut BytesMut,
    portal: &[u8],
    statement: &[u8],
    param_formats: &[Format],
    params: &[Option<&[u8]>],
    result_formats: &[Format],
) -> Result<(), BuildError> {
    try_framed(out, frontend::BIND, |out| {
        put_cstr(out, portal)?;
        put_cstr(out, statement)?;
        put_formats(out, param_formats)?;
        put_count(out, params.len())?;
        for param in params {
            put_value(out, *param)?;
        }
        put_formats(out, result_formats)
    })
}

fn put_formats(out: &mut BytesMut, formats: &[Format]) -> Result<(), BuildError> {
    put_count(out, formats.len())?;
    formats.iter().for_each(|format| out.put_u16(format.code()));
    Ok(())
}

/// Appends Describe.
///
/// # Errors
///
/// The name holds a zero byte or is too long.
pub fn describe(out: &mut BytesMut, target: Target, name: &[u8]) -> Result<(), BuildError> {
    named(out, frontend::DESCRIBE, target, name)
}

/// Appends Close.
///
/// # Errors
///
/// The name holds a zero byte or is too long.
pub fn close(out: &mut BytesMut, target: Target, name: &[u8]) -> Result<(), BuildError> {
    named(out, frontend::CLOSE, target, name)
}

fn named(out: &mut BytesMut, tag: u8, target: Target, name: &[u8]) -> Result<(), BuildError> {
    try_framed(out, tag, |out| {
        out.put_u8(target.as_byte());
        put_cstr(out, name)
    })
}

/// Appends Execute; `max_rows` 0 means all.
///
/// # Errors
///
/// The name holds a zero byte or is too long.
pub fn execute(out: &mut BytesMut, portal: &[u8], max_rows: i32) -> Result<(), BuildError> {
    try_framed(out, frontend::EXECUTE, |out| {
        put_cstr(out, portal)?;
        out.put_i32(max_rows);
        Ok(())
    })
}

/// Appends FunctionCall of the function with this OID; all arguments in one format.
///
/// # Errors
///
/// Something is too long.
pub fn function_call(
    out: &mut BytesMut,
    oid: u32,
    format: Format,
    args: &[Option<&[u8]>],
    result_format: Format,
) -> Result<(), BuildError> {
    try_framed(out, frontend::FUNCTION_CALL, |out| {
        out.put_u32(oid);
        put_formats(out, &[format])?;
        put_count(out, args.len())?;
        for arg in args {
            put_value(out, *arg)?;
        }
        out.put_u16(result_format.code());
        Ok(())
    })
}

/// Appends Sync.
pub fn sync(out: &mut BytesMut) {
    framed(out, frontend::SYNC, |_| {});
}

/// Appends Flush.
pub fn flush(out: &mut BytesMut) {
    framed(out, frontend::FLUSH, |_| {});
}

/// Appends Terminate.
pub fn terminate(out: &mut BytesMut) {
    framed(out, frontend::TERMINATE, |_| {});
}

/// Appends CopyFail.
///
/// # Errors
///
/// The text holds a zero byte or is too long.
pub fn copy_fail(out: &mut BytesMut, reason: &[u8]) -> Result<(), BuildError> {
    try_framed(out, frontend::COPY_FAIL, |out| put_cstr(out, reason))
}

/// Appends CopyDone.
pub fn copy_done(out: &mut BytesMut) {
    framed(out, frontend::COPY_DONE, |_| {});
}

/// Appends PasswordMessage.
///
/// # Errors
///
/// The text holds a zero byte or is too long.
pub fn password(out: &mut BytesMut, password: &[u8]) -> Result<(), BuildError> {
    try_framed(out, frontend::PASSWORD, |out| put_cstr(out, password))
}

/// Appends SASLInitialResponse.
///
/// # Errors
///
/// The mechanism's name holds a zero byte, or something is too long.
pub fn sasl_initial_response(
    out: &mut BytesMut,
    mechanism: &str,
    data: &[u8],
) -> Result<(), BuildError> {
    try_framed(out, frontend::PASSWORD, |out| {
        put_cstr(out, mechanism.as_bytes())?;
        put_value(out, Some(data))
    })
}

/// Appends SASLResponse.
///
/// # Errors
///
/// The data is too long.
pub fn sasl_response(out: &mut BytesMut, data: &[u8]) -> Result<(), BuildError> {
    try_framed(out, frontend::PASSWORD, |out| {
        out.put_slice(data);
        Ok(())
    })
}
