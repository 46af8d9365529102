//! Readers of message bodies. They borrow from the body and check all of it.

use super::front::Target;
use super::{ParseError, Reader};

/// The tag of a CommandComplete (`INSERT 0 1`), without its zero byte.
///
/// # Errors
///
/// The body is malformed.
pub fn command_complete(body: &[u8]) -> Result<&[u8], ParseError> {
    let mut reader = Reader::new("CommandComplete", body);
    let tag = reader.cstr()?;
    reader.end()?;
    Ok(tag)
}

/// The row count at the end of a command tag; `None` for commands that have none.
#[must_use]
pub fn tag_rows(tag: &[u8]) -> Option<u64> {
    let last = tag.rsplit(|&b| b == b' ').next()?;
    if last.is_empty() || !last.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(last).ok()?.parse().ok()
}

/// Name and value of a ParameterStatus.
///
/// # Errors
///
/// The body is malformed.
pub fn parameter_status(body: &[u8]) -> Result<(&[u8], &[u8]), ParseError> {
    let mut reader = Reader::new("ParameterStatus", body);
    let pair = (reader.cstr()?, reader.cstr()?);
    reader.end()?;
    Ok(pair)
}

/// The transaction status of a ReadyForQuery: `I`, `T` or `E`.
///
/// # Errors
///
/// The body is malformed.
#[inline]
pub fn ready_for_query(body: &[u8]) -> Result<u8, ParseError> {
    match body {
        &[status @ (b'I' | b'T' | b'E')] => Ok(status),
        _ => Err(ParseError::new("ReadyForQuery", "unknown status")),
    }
}

/// Process id and secret of a BackendKeyData.
///
/// # Errors
///
/// The body is malformed.
pub fn backend_key_data(body: &[u8]) -> Result<(i32, &[u8]), ParseError> {
    let mut reader = Reader::new("BackendKeyData", body);
    let pid = reader.i32()?;
    let secret = reader.rest();
    if secret.len() < 4 || secret.len() > crate::startup::MAX_CANCEL_KEY {
        return Err(reader.error("the key must have 4 to 256 bytes"));
    }
    Ok((pid, secret))
}

/// An Authentication* request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authentication<'a> {
    /// The login is accepted.
    Ok,
    /// A clear password is asked for.
    CleartextPassword,
    /// A password hashed with MD5 and this salt is asked for.
    Md5Password([u8; 4]),
    /// SASL with one of these mechanisms: texts with zero bytes, one after the other.
    Sasl(SaslMechanisms<'a>),
    /// The server's next SASL message.
    SaslContinue(&'a [u8]),
    /// The server's last SASL message.
    SaslFinal(&'a [u8]),
    /// Another method (GSS, SSPI, Kerberos ...).
    Other(u32),
}

/// The mechanisms of an AuthenticationSASL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SaslMechanisms<'a>(&'a [u8]);

impl SaslMechanisms<'_> {
    /// Whether the server offers this one.
    #[must_use]
    pub fn offers(&self, name: &str) -> bool {
        self.0.split(|&b| b == 0).any(|m| m == name.as_bytes())
    }
}

/// Reads an Authentication* message.
///
/// # Errors
///
/// The body is malformed.
pub fn authentication(body: &[u8]) -> Result<Authentication<'_>, ParseError> {
    let mut reader = Reader::new("Authentication", body);
    Ok(match reader.u32()? {
        0 => Authentication::Ok,
        3 => Authentication::CleartextPassword,
        5 => {
            let salt = reader.u32()?;
            Authentication::Md5Password(salt.to_be_bytes())
        }
        10 => Authentication::Sasl(SaslMechanisms(reader.rest())),
        11 => Authentication::SaslContinue(reader.rest()),
        12 => Authentication::SaslFinal(reader.rest()),
        other => Authentication::Other(other),
    })
}

/// Mechanism and data of a SASLInitialResponse; no data when the client sent none.
///
/// # Errors
///
/// The body is malformed.
pub fn sasl_initial_response(body: &[u8]) -> Result<(&[u8], Option<&[u8]>), ParseError> {
    let mut reader = Reader::new("SASLInitialResponse", body);
    let parts = (reader.cstr()?, reader.value()?);
    reader.end()?;
    Ok(parts)
}

/// The statement of a Query, without its zero byte.
///
/// # Errors
///
/// The body is malformed.
pub fn query(body: &[u8]) -> Result<&[u8], ParseError> {
    let mut reader = Reader::new("Query", body);
    let sql = reader.cstr()?;
    reader.end()?;
    Ok(sql)
}

/// A Parse message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parse<'a> {
    /// Name of the statement; empty for the unnamed one.
    pub name: &'a [u8],
    /// The statement.
    pub sql: &'a [u8],
    /// Types of the parameters that the client gave.
    pub types: Oids<'a>,
}

/// Type OIDs as the message holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Oids<'a>(&'a [u8]);

impl<'a> Oids<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / 4
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.0
            .chunks_exact(4)
            .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }
}

/// Reads a Parse message.
///
/// # Errors
///
/// The body is malformed.
pub fn parse(body: &[u8]) -> Result<Parse<'_>, ParseError> {
    let mut reader = Reader::new("Parse", body);
    let (name, sql) = (reader.cstr()?, reader.cstr()?);
    let types = usize::from(reader.u16()?);
    let types = Oids(reader.take(types * 4)?);
    reader.end()?;
    Ok(Parse { name, sql, types })
}

/// A Bind message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bind<'a> {
    /// Name of the portal; empty for the unnamed one.
    pub portal: &'a [u8],
    /// Name of the statement; empty for the unnamed one.
    pub statement: &'a [u8],
    /// Formats of the parameters: none (all text), one for all, or one each.
    pub param_formats: Formats<'a>,
    /// Values of the parameters.
    pub params: Values<'a>,
    /// Formats asked for the result's columns: none (all text), one for all, or one each.
    pub result_formats: Formats<'a>,
}

/// Format codes as the message holds them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Formats<'a>(&'a [u8]);

impl<'a> Formats<'a> {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / 2
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One after the other.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u16> + use<'a> {
        self.0
            .chunks_exact(2)
            .map(|b| u16::from_be_bytes([b[0], b[1]]))
    }
}

/// Values with their lengths (parameters of a Bind, columns of a DataRow), checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Values<'a> {
    count: u16,
    bytes: &'a [u8],
}

impl<'a> Values<'a> {
    /// Reads `count` values; `rest` is where they begin.
    fn read(reader: &mut Reader<'a>) -> Result<Self, ParseError> {
        let count = reader.u16()?;
        let whole = reader.rest;
        for _ in 0..count {
            reader.value()?;
        }
        let bytes = &whole[..whole.len() - reader.rest.len()];
        Ok(Self { count, bytes })
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// One after the other; `None` is NULL.
    pub fn iter(&self) -> impl Iterator<Item = Option<&'a [u8]>> + use<'a> {
        let mut reader = Reader::new("values", self.bytes);
        (0..self.count).map_while(move |_| reader.value().ok())
    }
}

/// Reads a Bind message.
///
/// # Errors
///
/// The body is malformed.
pub fn bind(body: &[u8]) -> Result<Bind<'_>, ParseError> {
    let mut reader = Reader::new("Bind", body);
    let (portal, statement) = (reader.cstr()?, reader.cstr()?);
    let formats = |reader: &mut Reader<'_>| reader.u16().map(|n| usize::from(n) * 2);
    let n = formats(&mut reader)?;
    let param_formats = Formats(reader.take(n)?);
    let params = Values::read(&mut reader)?;
    let n = formats(&mut reader)?;
    let result_formats = Formats(reader.take(n)?);
    reader.end()?;
    Ok(Bind {
        portal,
        statement,
        param_formats,
        params,
        result_formats,
    })
}

/// Portal and statement names of a Bind, without looking at its values.
///
/// # Errors
///
/// The names are malformed.
#[inline]
pub fn bind_names(body: &[u8]) -> Result<(&[u8], &[u8]), ParseError> {
    let mut reader = Reader::new("Bind", body);
    Ok((reader.cstr()?, reader.cstr()?))
}

/// Kind and name of a Describe or Close.
///
/// # Errors
///
/// The body is malformed.
pub fn describe_or_close(body: &[u8]) -> Result<(Target, &[u8]), ParseError> {
    let mut reader = Reader::new("Describe or Close", body);
    let target = match reader.u8()? {
        b'S' => Target::Statement,
        b'P' => Target::Portal,
        _ => return Err(reader.error("unknown subtype")),
    };
    let name = reader.cstr()?;
    reader.end()?;
    Ok((target, name))
}

/// Portal and maximal number of rows (0: all) of an Execute.
///
/// # Errors
///
/// The body is malformed.
pub fn execute(body: &[u8]) -> Result<(&[u8], i32), ParseError> {
    let mut reader = Reader::new("Execute", body);
    let parts = (reader.cstr()?, reader.i32()?);
    reader.end()?;
    Ok(parts)
}

/// The result of a FunctionCallResponse; `None` is NULL.
///
/// # Errors
///
/// The body is malformed.
pub fn function_call_response(body: &[u8]) -> Result<Option<&[u8]>, ParseError> {
    let mut reader = Reader::new("FunctionCallResponse", body);
    let value = reader.value()?;
    reader.end()?;
    Ok(value)
}

/// The columns of a DataRow.
///
/// # Errors
///
/// The body is malformed.
pub fn data_row(body: &[u8]) -> Result<Values<'_>, ParseError> {
    let mut reader = Reader::new("DataRow", body);
    let values = Values::read(&mut reader)?;
    reader.end()?;
    Ok(values)
}

/// One column of a RowDescription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// OID of the table it comes from, or 0.
    pub table: u32,
    /// Its number in that table, or 0.
    pub attribute: u16,
    /// OID of its type.
    pub type_oid: u32,
    /// Size of its type; negative for variable.
    pub type_size: i16,
    /// Its type's modifier.
    pub type_modifier: i32,
    /// Its format code.
    pub format: u16,
}

/// The columns of a RowDescription, one after the other; ends at the first malformed one.
pub fn row_description(body: &[u8]) -> impl Iterator<Item = Result<Column<'_>, ParseError>> {
    let mut reader = Reader::new("RowDescription", body);
    let mut left = reader.u16();
    std::iter::from_fn(move || match left {
        Ok(0) => None,
        Ok(n) => {
            let column = column(&mut reader);
            left = if column.is_ok() { Ok(n - 1) } else { Ok(0) };
            Some(column)
        }
        Err(error) => {
            left = Ok(0);
            Some(Err(error))
        }
    })
}

fn column<'a>(reader: &mut Reader<'a>) -> Result<Column<'a>, ParseError> {
    Ok(Column {
        name: reader.cstr()?,
        table: reader.u32()?,
        attribute: reader.u16()?,
        type_oid: reader.u32()?,
        type_size: reader.u16()?.cast_signed(),
        type_modifier: reader.i32()?,
        format: reader.u16()?,
    })
}

/// Process id, channel and payload of a NotificationResponse.
///
/// # Errors
///
/// The body is malformed.
pub fn notification(body: &[u8]) -> Result<(i32, &[u8], &[u8]), ParseError> {
    let mut reader = Reader::new("NotificationResponse", body);
    let parts = (reader.i32()?, reader.cstr()?, reader.cstr()?);
    reader.end()?;
    Ok(parts)
}
