//! PostgreSQL v3 protocol: framing, the messages we look into, SCRAM.
//!
//! Pure: bytes in, values and bytes out. No socket, no clock, no task. The invariant of the crate:
//! whatever comes off the network, a parser answers with a value or an error; it never panics,
//! never reads past its slice and never allocates more than the slice it was given.
//!
//! Message formats: <https://www.postgresql.org/docs/current/protocol-message-formats.html>.

pub mod frame;
pub mod message;
pub mod scram;
pub mod startup;

pub use frame::{FrameError, Header, backend, body, frontend, peek_header};
pub use message::error::{ErrorFields, Severity, SqlState};
