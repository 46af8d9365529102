//! The messages that we read and make; all others are forwarded unread.
//!
//! Readers ([`read`]) take the *body* of a frame ([`crate::body`]) and borrow from it. Builders
//! ([`front`] for what a client sends, [`back`] for what a server sends) append whole frames.

use bytes::{BufMut, BytesMut};

use crate::frame::MAX_LENGTH_WORD;

pub mod back;
pub mod error;
pub mod front;
pub mod read;

/// A body that does not have its message's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed {message} message: {why}")]
pub struct ParseError {
    /// The message's type.
    pub message: &'static str,
    /// What is wrong with it.
    pub why: &'static str,
}

impl ParseError {
    pub(crate) fn new(message: &'static str, why: &'static str) -> Self {
        Self { message, why }
    }
}

/// A message that the protocol cannot express. Nothing was appended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// Text ends at a zero byte, so it cannot hold one.
    #[error("text holds a zero byte")]
    ZeroByte,
    /// Over PostgreSQL's limit for a message or for the number of its parts.
    #[error("message is too long")]
    TooLong,
}

/// Appends a frame whose size is known to be small.
pub(crate) fn framed(out: &mut BytesMut, tag: u8, body: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_u8(tag);
    out.put_u32(0);
    body(out);
    // What is built this way is far below 4 GiB; saturating keeps it well-defined all the same.
    let length = u32::try_from(out.len() - start - 1).unwrap_or(u32::MAX);
    out[start + 1..start + 5].copy_from_slice(&length.to_be_bytes());
}

/// Appends a frame whose parts are the caller's; takes it back when it cannot be expressed.
pub(crate) fn try_framed(
    out: &mut BytesMut,
    tag: u8,
    body: impl FnOnce(&mut BytesMut) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let start = out.len();
    let mut done = Ok(());
    framed(out, tag, |out| done = body(out));
    if done.is_ok() && out.len() - start - 1 > MAX_LENGTH_WORD {
        done = Err(BuildError::TooLong);
    }
    if done.is_err() {
        out.truncate(start);
    }
    done
}

/// Appends our own text and its zero byte. A zero byte inside would end the field early and turn
/// the rest into fields of its own: it is left out.
pub(crate) fn put_text(out: &mut BytesMut, text: &str) {
    for part in text.as_bytes().split(|&b| b == 0) {
        out.put_slice(part);
    }
    out.put_u8(0);
}

/// Appends the caller's text and its zero byte.
pub(crate) fn put_cstr(out: &mut BytesMut, text: &[u8]) -> Result<(), BuildError> {
    if text.contains(&0) {
        return Err(BuildError::ZeroByte);
    }
    out.put_slice(text);
    out.put_u8(0);
    Ok(())
}

/// Appends a 16-bit count.
pub(crate) fn put_count(out: &mut BytesMut, count: usize) -> Result<(), BuildError> {
    out.put_u16(u16::try_from(count).map_err(|_| BuildError::TooLong)?);
    Ok(())
}

/// Appends a value with its 32-bit length, −1 for NULL.
pub(crate) fn put_value(out: &mut BytesMut, value: Option<&[u8]>) -> Result<(), BuildError> {
    match value {
        None => out.put_i32(-1),
        Some(bytes) => {
            out.put_i32(i32::try_from(bytes.len()).map_err(|_| BuildError::TooLong)?);
            out.put_slice(bytes);
        }
    }
    Ok(())
}

/// Takes a body apart from front to back.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader<'a> {
    message: &'static str,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(message: &'static str, body: &'a [u8]) -> Self {
        Self {
            message,
            rest: body,
        }
    }

    pub(crate) fn error(&self, why: &'static str) -> ParseError {
        ParseError::new(self.message, why)
    }

    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], ParseError> {
        let (head, rest) = self
            .rest
            .split_at_checked(n)
            .ok_or(self.error("it ends too early"))?;
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (head, rest) = self
            .rest
            .split_first_chunk::<N>()
            .ok_or(self.error("it ends too early"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, ParseError> {
        self.array::<1>().map(|[b]| b)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ParseError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ParseError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn i32(&mut self) -> Result<i32, ParseError> {
        self.array().map(i32::from_be_bytes)
    }

    /// Text up to a zero byte, without it.
    pub(crate) fn cstr(&mut self) -> Result<&'a [u8], ParseError> {
        let end = self
            .rest
            .iter()
            .position(|&b| b == 0)
            .ok_or(self.error("text without its final zero byte"))?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        Ok(text)
    }

    /// A value with its 32-bit length; `None` for NULL (−1).
    pub(crate) fn value(&mut self) -> Result<Option<&'a [u8]>, ParseError> {
        match self.i32()? {
            -1 => Ok(None),
            length => {
                let length = usize::try_from(length)
                    .map_err(|_| self.error("negative length of a value"))?;
                self.take(length).map(Some)
            }
        }
    }

    /// What has not been read yet.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), ParseError> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(self.error("bytes are left over"))
        }
    }
}
