//! ErrorResponse and NoticeResponse: the fields that we read and the ones that we make.

use std::fmt;

use bytes::{BufMut, BytesMut};

use super::{ParseError, Reader, framed, put_text};
use crate::frame::backend;

/// A five-character SQLSTATE code
/// (<https://www.postgresql.org/docs/current/errcodes-appendix.html>).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SqlState(pub [u8; 5]);

impl SqlState {
    /// successful_completion.
    pub const SUCCESS: Self = Self(*b"00000");
    /// warning.
    pub const WARNING: Self = Self(*b"01000");
    /// protocol_violation.
    pub const PROTOCOL_VIOLATION: Self = Self(*b"08P01");
    /// connection_failure.
    pub const CONNECTION_FAILURE: Self = Self(*b"08006");
    /// transaction_resolution_unknown.
    pub const TRANSACTION_RESOLUTION_UNKNOWN: Self = Self(*b"08007");
    /// feature_not_supported.
    pub const FEATURE_NOT_SUPPORTED: Self = Self(*b"0A000");
    /// read_only_sql_transaction.
    pub const READ_ONLY_SQL_TRANSACTION: Self = Self(*b"25006");
    /// idle_in_transaction_session_timeout.
    pub const IDLE_IN_TRANSACTION_TIMEOUT: Self = Self(*b"25P03");
    /// in_failed_sql_transaction.
    pub const IN_FAILED_SQL_TRANSACTION: Self = Self(*b"25P02");
    /// invalid_authorization_specification.
    pub const INVALID_AUTHORIZATION: Self = Self(*b"28000");
    /// invalid_password.
    pub const INVALID_PASSWORD: Self = Self(*b"28P01");
    /// invalid_catalog_name: the database does not exist.
    pub const INVALID_CATALOG_NAME: Self = Self(*b"3D000");
    /// serialization_failure.
    pub const SERIALIZATION_FAILURE: Self = Self(*b"40001");
    /// out_of_memory.
    pub const OUT_OF_MEMORY: Self = Self(*b"53200");
    /// too_many_connections.
    pub const TOO_MANY_CONNECTIONS: Self = Self(*b"53300");
    /// program_limit_exceeded.
    pub const PROGRAM_LIMIT_EXCEEDED: Self = Self(*b"54000");
    /// query_canceled.
    pub const QUERY_CANCELED: Self = Self(*b"57014");
    /// admin_shutdown.
    pub const ADMIN_SHUTDOWN: Self = Self(*b"57P01");
    /// crash_shutdown.
    pub const CRASH_SHUTDOWN: Self = Self(*b"57P02");
    /// cannot_connect_now.
    pub const CANNOT_CONNECT_NOW: Self = Self(*b"57P03");
    /// idle_session_timeout.
    pub const IDLE_SESSION_TIMEOUT: Self = Self(*b"57P05");
    /// internal_error.
    pub const INTERNAL_ERROR: Self = Self(*b"XX000");

    /// The code as text; a byte that is no ASCII (which PostgreSQL never sends) shows as `?`s.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or("?????")
    }

    /// The first two characters: the class.
    #[must_use]
    pub fn class(&self) -> [u8; 2] {
        [self.0[0], self.0[1]]
    }
}

impl fmt::Display for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for SqlState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How grave it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Severity {
    /// The statement failed.
    Error,
    /// The session ends.
    Fatal,
    /// All sessions end.
    Panic,
    /// A notice of something that may be wrong.
    Warning,
    /// A notice.
    Notice,
    /// Developer's information.
    Debug,
    /// Information that the client asked for.
    Info,
    /// Meant for the server's log.
    Log,
}

impl Severity {
    /// The keyword, as the untranslated field `V` has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "ERROR",
            Self::Fatal => "FATAL",
            Self::Panic => "PANIC",
            Self::Warning => "WARNING",
            Self::Notice => "NOTICE",
            Self::Debug => "DEBUG",
            Self::Info => "INFO",
            Self::Log => "LOG",
        }
    }

    fn from_bytes(text: &[u8]) -> Option<Self> {
        Some(match text {
            b"ERROR" => Self::Error,
            b"FATAL" => Self::Fatal,
            b"PANIC" => Self::Panic,
            b"WARNING" => Self::Warning,
            b"NOTICE" => Self::Notice,
            b"DEBUG" => Self::Debug,
            b"INFO" => Self::Info,
            b"LOG" => Self::Log,
            _ => return None,
        })
    }
}

/// An error or a notice in PostgreSQL's form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorFields {
    /// How grave it is.
    pub severity: Severity,
    /// The code that clients decide by.
    pub sqlstate: SqlState,
    /// The primary message.
    pub message: String,
    /// More about it.
    pub detail: Option<String>,
    /// What to do about it.
    pub hint: Option<String>,
}

impl ErrorFields {
    /// An error or notice without detail and hint.
    pub fn new(severity: Severity, sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self {
            severity,
            sqlstate,
            message: message.into(),
            detail: None,
            hint: None,
        }
    }

    /// An `ERROR`.
    pub fn error(sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, sqlstate, message)
    }

    /// A `FATAL` error.
    pub fn fatal(sqlstate: SqlState, message: impl Into<String>) -> Self {
        Self::new(Severity::Fatal, sqlstate, message)
    }

    /// Adds the detail.
    #[must_use]
    pub fn detail(mut self, detail: impl Into<String>) -> Self {
        self.detail = Some(detail.into());
        self
    }

    /// Adds the hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Appends an ErrorResponse.
    pub fn write_error(&self, out: &mut BytesMut) {
        self.write(backend::ERROR_RESPONSE, out);
    }

    /// Appends a NoticeResponse.
    pub fn write_notice(&self, out: &mut BytesMut) {
        self.write(backend::NOTICE_RESPONSE, out);
    }

    fn write(&self, tag: u8, out: &mut BytesMut) {
        framed(out, tag, |out| {
            let mut field = |kind: u8, text: &str| {
                out.put_u8(kind);
                put_text(out, text);
            };
            field(b'S', self.severity.as_str());
            field(b'V', self.severity.as_str());
            field(b'C', self.sqlstate.as_str());
            field(b'M', &self.message);
            if let Some(detail) = &self.detail {
                field(b'D', detail);
            }
            if let Some(hint) = &self.hint {
                field(b'H', hint);
            }
            out.put_u8(0);
        });
    }

    /// Reads the body of an ErrorResponse or NoticeResponse. Text that is not UTF-8 (another
    /// client encoding) is shown with replacement characters.
    ///
    /// # Errors
    ///
    /// The body is malformed, or lacks severity or SQLSTATE.
    pub fn parse(body: &[u8]) -> Result<Self, ParseError> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut fields = Self::new(Severity::Error, SqlState::SUCCESS, "");
        let (mut severity, mut localized, mut sqlstate) = (None, None, None);
        for field in error_fields(body) {
            let (kind, value) = field?;
            match kind {
                b'S' => localized = Severity::from_bytes(value),
                b'V' => severity = Severity::from_bytes(value),
                b'C' => sqlstate = <[u8; 5]>::try_from(value).ok().map(SqlState),
                b'M' => fields.message = text(value),
                b'D' => fields.detail = Some(text(value)),
                b'H' => fields.hint = Some(text(value)),
                _ => {}
            }
        }
        // Field V exists since PostgreSQL 9.6; S may be translated.
        fields.severity = severity.or(localized).unwrap_or(Severity::Error);
        fields.sqlstate = sqlstate.ok_or(ParseError::new("ErrorResponse", "no SQLSTATE"))?;
        Ok(fields)
    }
}

impl fmt::Display for ErrorFields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = self.severity.as_str();
        write!(f, "{severity} {}: {}", self.sqlstate, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, "; {detail}")?;
        }
        Ok(())
    }
}

/// The SQLSTATE of an ErrorResponse's body, without reading the rest.
///
/// # Errors
///
/// The body is malformed, or has no SQLSTATE.
pub fn sqlstate(body: &[u8]) -> Result<SqlState, ParseError> {
    for field in error_fields(body) {
        if let (b'C', value) = field? {
            return <[u8; 5]>::try_from(value)
                .map(SqlState)
                .map_err(|_| ParseError::new("ErrorResponse", "SQLSTATE is not 5 bytes"));
        }
    }
    Err(ParseError::new("ErrorResponse", "no SQLSTATE"))
}

/// The fields of an ErrorResponse's or NoticeResponse's body: kind and value.
pub fn error_fields(body: &[u8]) -> impl Iterator<Item = Result<(u8, &[u8]), ParseError>> {
    let mut reader = Reader::new("ErrorResponse", body);
    let mut done = false;
    std::iter::from_fn(move || {
        if done {
            return None;
        }
        let kind = match reader.u8() {
            Ok(0) => {
                done = true;
                return None;
            }
            Ok(kind) => kind,
            Err(error) => {
                done = true;
                return Some(Err(error));
            }
        };
        let value = reader.cstr();
        done = value.is_err();
        Some(value.map(|value| (kind, value)))
    })
}
