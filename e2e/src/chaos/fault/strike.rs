//! Faults at a certain message: a session is stopped behind it, and what happens then is known to
//! happen between that message and the next one.

use helios_testkit::interpose::Way;
use rand::RngExt;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

/// Transactions of the workloads have up to so many messages in either way.
const LONGEST: u64 = 40;

/// A message of a session's, counted from when the order was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Requests are counted; else answers.
    pub requests: bool,
    /// The session stops behind so many.
    pub after: u64,
}

impl Mark {
    /// Any message, each as likely as another.
    pub(super) fn draw(rng: &mut StdRng) -> Self {
        Self {
            requests: rng.random_bool(0.5),
            after: rng.random_range(1..LONGEST),
        }
    }

    pub(super) fn way(self) -> Way {
        match self.requests {
            true => Way::ToServer,
            false => Way::FromServer,
        }
    }

    /// A message by its name.
    pub(super) fn name(self, tag: Option<u8>) -> String {
        let (way, name) = match self.requests {
            true => ("to the server", tag.map(|tag| (tag, request(tag)))),
            false => ("to the client", tag.map(|tag| (tag, answer(tag)))),
        };
        match name {
            None => format!("start-up {way}"),
            Some((_, Some(name))) => format!("{name} {way}"),
            Some((tag, None)) => format!("{:?} {way}", char::from(tag)),
        }
    }
}

/// What is done while a session is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "strike", rename_all = "snake_case")]
pub enum Strike {
    /// kill -9 of the primary and all its processes.
    Crash,
    /// kill -9 of one backend, which makes the postmaster end all others.
    KillBackend {
        /// Which one.
        pick: u64,
    },
    /// kill -9 of the primary's agent.
    KillAgent,
    /// SIGSTOP of the primary, SIGCONT later.
    Freeze {
        /// How long, in milliseconds.
        millis: u64,
    },
    /// A planned move; the session stays stopped until it is over, or may not wait for it.
    Switchover,
}

impl Strike {
    /// The same with its random part.
    pub(super) fn draw(self, rng: &mut StdRng) -> Self {
        match self {
            Self::KillBackend { .. } => Self::KillBackend { pick: rng.random() },
            Self::Freeze { .. } => Self::Freeze {
                millis: rng.random_range(100..2500),
            },
            other => other,
        }
    }
}

fn request(tag: u8) -> Option<&'static str> {
    Some(match tag {
        b'Q' => "Query",
        b'P' => "Parse",
        b'B' => "Bind",
        b'D' => "Describe",
        b'E' => "Execute",
        b'S' => "Sync",
        b'C' => "Close",
        b'H' => "Flush",
        b'd' => "CopyData",
        b'c' => "CopyDone",
        b'f' => "CopyFail",
        b'F' => "FunctionCall",
        b'p' => "password",
        b'X' => "Terminate",
        _ => return None,
    })
}

fn answer(tag: u8) -> Option<&'static str> {
    Some(match tag {
        b'R' => "Authentication",
        b'S' => "ParameterStatus",
        b'K' => "BackendKeyData",
        b'1' => "ParseComplete",
        b'2' => "BindComplete",
        b'3' => "CloseComplete",
        b't' => "ParameterDescription",
        b'T' => "RowDescription",
        b'n' => "NoData",
        b'D' => "DataRow",
        b'C' => "CommandComplete",
        b'I' => "EmptyQueryResponse",
        b'G' => "CopyInResponse",
        b'E' => "ErrorResponse",
        b'N' => "NoticeResponse",
        b'V' => "FunctionCallResponse",
        b'Z' => "ReadyForQuery",
        _ => return None,
    })
}
