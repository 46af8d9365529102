//! Where one message ends and the next one begins.
//!
//! A typed message is a tag byte, a length word that counts itself but not the tag, and a body.
//! Looking at a header is all that most forwarded messages ever get, so it costs no allocation.

/// Longest message that PostgreSQL takes or sends: `PQ_LARGE_MESSAGE_LIMIT` (`MaxAllocSize`),
/// 1 GiB − 1. It limits the length word.
pub const MAX_LENGTH_WORD: usize = 0x3FFF_FFFF;

/// Bytes of tag and length word.
pub const HEADER_LEN: usize = 5;

/// Tag and size of a typed message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The message's type.
    pub tag: u8,
    /// Bytes of the whole frame, tag and length word included.
    pub len: usize,
}

/// A length word that no PostgreSQL server or client would send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Less than the length word itself.
    #[error("invalid message length {length} in message type \"{}\"", tag.escape_ascii())]
    TooShort {
        /// The message's type.
        tag: u8,
        /// The length word.
        length: u32,
    },
    /// Over [`MAX_LENGTH_WORD`].
    #[error("message length {length} in message type \"{}\" exceeds the limit of 1 GB", tag.escape_ascii())]
    TooLong {
        /// The message's type.
        tag: u8,
        /// The length word.
        length: u32,
    },
}

/// Reads the header of the typed message that `buf` begins with; `None` until it is all there.
///
/// # Errors
///
/// The length word is impossible. The connection is out of step and cannot be used any more.
#[inline]
pub fn peek_header(buf: &[u8]) -> Result<Option<Header>, FrameError> {
    let &[tag, a, b, c, d, ..] = buf else {
        return Ok(None);
    };
    let length = u32::from_be_bytes([a, b, c, d]);
    let size = length as usize;
    if size < 4 {
        return Err(FrameError::TooShort { tag, length });
    }
    if size > MAX_LENGTH_WORD {
        return Err(FrameError::TooLong { tag, length });
    }
    Ok(Some(Header { tag, len: size + 1 }))
}

/// The body of a complete frame; empty when the frame is shorter than its header.
#[inline]
#[must_use]
pub fn body(frame: &[u8]) -> &[u8] {
    frame.get(HEADER_LEN..).unwrap_or_default()
}

/// Tags of the messages that a client sends.
pub mod frontend {
    /// Bind.
    pub const BIND: u8 = b'B';
    /// Close of a statement or portal.
    pub const CLOSE: u8 = b'C';
    /// Describe of a statement or portal.
    pub const DESCRIBE: u8 = b'D';
    /// Execute.
    pub const EXECUTE: u8 = b'E';
    /// FunctionCall.
    pub const FUNCTION_CALL: u8 = b'F';
    /// Flush.
    pub const FLUSH: u8 = b'H';
    /// Parse.
    pub const PARSE: u8 = b'P';
    /// Query.
    pub const QUERY: u8 = b'Q';
    /// Sync.
    pub const SYNC: u8 = b'S';
    /// Terminate.
    pub const TERMINATE: u8 = b'X';
    /// CopyData, in either direction.
    pub const COPY_DATA: u8 = b'd';
    /// CopyDone, in either direction.
    pub const COPY_DONE: u8 = b'c';
    /// CopyFail.
    pub const COPY_FAIL: u8 = b'f';
    /// PasswordMessage, SASLInitialResponse, SASLResponse, GSSResponse.
    pub const PASSWORD: u8 = b'p';
}

/// Tags of the messages that a server sends.
pub mod backend {
    /// Authentication*.
    pub const AUTHENTICATION: u8 = b'R';
    /// BackendKeyData.
    pub const BACKEND_KEY_DATA: u8 = b'K';
    /// BindComplete.
    pub const BIND_COMPLETE: u8 = b'2';
    /// CloseComplete.
    pub const CLOSE_COMPLETE: u8 = b'3';
    /// CommandComplete.
    pub const COMMAND_COMPLETE: u8 = b'C';
    /// CopyBothResponse.
    pub const COPY_BOTH_RESPONSE: u8 = b'W';
    /// CopyData, in either direction.
    pub const COPY_DATA: u8 = b'd';
    /// CopyDone, in either direction.
    pub const COPY_DONE: u8 = b'c';
    /// CopyInResponse.
    pub const COPY_IN_RESPONSE: u8 = b'G';
    /// CopyOutResponse.
    pub const COPY_OUT_RESPONSE: u8 = b'H';
    /// DataRow.
    pub const DATA_ROW: u8 = b'D';
    /// EmptyQueryResponse.
    pub const EMPTY_QUERY_RESPONSE: u8 = b'I';
    /// ErrorResponse.
    pub const ERROR_RESPONSE: u8 = b'E';
    /// FunctionCallResponse.
    pub const FUNCTION_CALL_RESPONSE: u8 = b'V';
    /// NegotiateProtocolVersion.
    pub const NEGOTIATE_PROTOCOL_VERSION: u8 = b'v';
    /// NoData.
    pub const NO_DATA: u8 = b'n';
    /// NoticeResponse.
    pub const NOTICE_RESPONSE: u8 = b'N';
    /// NotificationResponse.
    pub const NOTIFICATION_RESPONSE: u8 = b'A';
    /// ParameterDescription.
    pub const PARAMETER_DESCRIPTION: u8 = b't';
    /// ParameterStatus.
    pub const PARAMETER_STATUS: u8 = b'S';
    /// ParseComplete.
    pub const PARSE_COMPLETE: u8 = b'1';
    /// PortalSuspended.
    pub const PORTAL_SUSPENDED: u8 = b's';
    /// ReadyForQuery.
    pub const READY_FOR_QUERY: u8 = b'Z';
    /// RowDescription.
    pub const ROW_DESCRIPTION: u8 = b'T';
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_when_they_are_complete() {
        for short in 0..5 {
            assert_eq!(peek_header(&b"Q\0\0\0\x05"[..short]), Ok(None));
        }
        let header = Header {
            tag: frontend::QUERY,
            len: 6,
        };
        assert_eq!(peek_header(b"Q\0\0\0\x05\0"), Ok(Some(header)));
        assert_eq!(peek_header(b"Q\0\0\0\x05"), Ok(Some(header)));
    }

    #[test]
    fn impossible_lengths_are_refused() {
        let (tag, length) = (b'Q', 3);
        let short = FrameError::TooShort { tag, length };
        assert_eq!(peek_header(b"Q\0\0\0\x03"), Err(short));
        assert!(peek_header(b"Q\x3F\xFF\xFF\xFF").is_ok());
        let length = 0x4000_0000;
        let long = FrameError::TooLong { tag, length };
        assert_eq!(peek_header(b"Q\x40\0\0\0"), Err(long));
        assert!(peek_header(b"Q\xFF\xFF\xFF\xFF").is_err());
    }
}
