//! Marks in front of CALL, and of DO that may end transactions while it runs.
//!
//! Before version 18 they are set like all others. From 18 on, what follows a statement of the same
//! exchange is in an implicit transaction block (`start_xact_command` in
//! `src/backend/tcop/postgres.c`, once an Execute is over), in which procedures may not commit. But
//! a Bind alone begins the transaction too, and reads its parameter by the input function of the
//! type: that of a temporary domain whose check writes the logical message. The invariant: a server
//! that refuses the domain, or the mark, costs the evidence and no statement.

use std::collections::BTreeMap;

use helios_wire::frontend;
use serde::{Deserialize, Serialize};

use super::marks::Marking;
use super::texts::until_zero;
use super::{Before, Tracker};
use crate::keyword::{Unit, first_word, unit};

/// Refused marks of one session after which no more are set by binding.
const MAX_REFUSED: u8 = 2;

/// How marks are set in front of what may end transactions while it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum CallMarks {
    /// The server's version is not known.
    #[default]
    Unknown,
    /// Like in front of other statements.
    Executed,
    /// By the value of a temporary domain.
    Bound {
        /// The backend has the domain.
        made: bool,
        /// Marks of the session that were refused.
        refused: u8,
    },
    /// They are refused.
    Refused,
}

impl CallMarks {
    /// On the session's next backend.
    pub(super) fn afresh(self) -> Self {
        match self {
            Self::Bound { refused, .. } => Self::Bound {
                made: false,
                refused,
            },
            other => other,
        }
    }

    /// The domain has to be made first.
    pub(super) fn lacks_domain(self) -> bool {
        matches!(self, Self::Bound { made: false, .. })
    }

    /// There is a way.
    pub(super) fn can(self) -> bool {
        matches!(self, Self::Executed | Self::Bound { .. })
    }

    /// They are set by binding.
    pub(super) fn binds(self) -> bool {
        matches!(self, Self::Bound { .. })
    }

    /// They can be set by binding at once.
    pub(super) fn can_bind(self) -> bool {
        matches!(self, Self::Bound { made: true, .. })
    }

    fn after_refusal(self) -> Self {
        match self {
            Self::Bound { refused, .. } if refused + 1 < MAX_REFUSED => Self::Bound {
                made: false,
                refused: refused + 1,
            },
            _ => Self::Refused,
        }
    }
}

impl Tracker {
    /// On a server with these parameters.
    #[must_use]
    pub fn on(mut self, parameters: &BTreeMap<String, String>) -> Self {
        let digits = |v: &String| {
            let end = v.find(|c: char| !c.is_ascii_digit()).unwrap_or(v.len());
            v.get(..end).and_then(|v| v.parse::<u32>().ok())
        };
        let major = parameters.get("server_version").and_then(digits);
        self.call_marks = match (major, self.call_marks) {
            (None, _) => CallMarks::Unknown,
            (Some(..18), _) => CallMarks::Executed,
            (Some(18..), CallMarks::Unknown | CallMarks::Executed) => CallMarks::Bound {
                made: false,
                refused: 0,
            },
            (Some(18..), known) => known.afresh(),
        };
        self
    }

    /// What is done about the domain in front of a message that runs a call, or leads to one.
    /// Once an exchange has begun, it is too late.
    pub(super) fn make_domain(&self, tag: u8) -> Before {
        if !self.opens_exchange(tag) {
            Before::Go
        } else if self.is_between() && self.is_quiet() {
            Before::MakeDomain
        } else {
            Before::Wait
        }
    }

    /// A Parse that leads to a call whose mark needs the domain. Of most texts no more than the first
    /// word is looked at.
    pub(super) fn prepares_call(&self, tag: u8, frame: &[u8]) -> bool {
        if tag != frontend::PARSE || self.marks_refused || !self.call_marks.lacks_domain() {
            return false;
        }
        let body = frame.get(5..).unwrap_or_default();
        let text = body.get(until_zero(body).len() + 1..).unwrap_or_default();
        let word = first_word(text);
        let may_call = word.eq_ignore_ascii_case(b"call") || word.eq_ignore_ascii_case(b"do");
        may_call && unit(until_zero(text)) == Unit::Calls
    }

    /// The domain that [`super::Before::MakeDomain`] asks for is there, or was refused.
    pub fn domain_made(&mut self, made: bool) {
        self.call_marking = Marking::Unknown;
        self.call_marks = match self.call_marks {
            CallMarks::Bound { refused, .. } if made => CallMarks::Bound { made, refused },
            _ => CallMarks::Refused,
        };
    }

    /// A mark that was bound was refused: the domain may be gone.
    pub(super) fn bound_mark_refused(&mut self) {
        self.call_marks = self.call_marks.after_refusal();
    }

    /// Temporary objects of the backend may be gone, the domain among them.
    pub(super) fn domain_may_be_gone(&mut self) {
        self.call_marks = self.call_marks.afresh();
    }
}
