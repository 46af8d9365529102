//! What goes along when a session that stands between exchanges is followed by another process.
//!
//! The invariant: what is not carried is what a tracker begins with; a session of which anything
//! else is known is not carried. The backend stays the same, so nothing of it has to be restored.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::calls::CallMarks;
use super::client::look_at_parse;
use super::{Named, Tracker};
use crate::evidence::GtidSource;
use crate::locks::Calls;
use crate::{ReplayMode, TxnStatus};

/// What a tracker knows outside a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    prepared: Vec<Statement>,
    custom: Vec<String>,
    calls: Calls,
    asks_last_values: bool,
    marks_refused: bool,
    call_marks: CallMarks,
    holds: bool,
}

/// A prepared statement: what else is known of it follows from its Parse message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Statement {
    parse: Vec<u8>,
    /// In hexadecimal.
    columns: Option<String>,
    description: Option<Vec<u8>>,
}

impl Tracker {
    /// What another process needs to follow the session from here; `None` where it does not stand
    /// outside a transaction with everything answered and known.
    #[must_use]
    pub fn carried(&self) -> Option<Carried> {
        let Self {
            mode: _,
            expect,
            journal,
            prepared,
            named,
            status,
            projected_open,
            transaction: _,
            xids,
            asked,
            inline_asked,
            sequence: _,
            touched,
            chained,
            custom,
            calls,
            temporary,
            asks_last_values,
            // The next ids have other random bits.
            gtids: _,
            lead,
            marks_refused,
            call_marks,
            holds,
            // They are prepared anew, behind a Close.
            marking: _,
            call_marking: _,
            unflushed: _,
            gid,
            changes,
        } = self;
        let answered = expect.is_empty()
            && journal.in_flight().is_empty()
            && named.is_empty()
            && asked.is_empty()
            && inline_asked.is_empty()
            && lead.is_none()
            && gid.is_none();
        let outside = *status == TxnStatus::Idle
            && !projected_open
            && !chained
            && journal.records().is_empty()
            && journal.lost_reason().is_none()
            && prepared.is_settled()
            && xids.is_empty()
            && changes.is_empty();
        if !answered || !outside || *touched || !temporary.is_empty() {
            return None;
        }
        let statement = |(_, p): (&[u8], &crate::state::Prepared)| Statement {
            parse: p.parse.to_vec(),
            columns: p.columns.map(|hash| format!("{hash:x}")),
            description: p.description.as_deref().map(<[u8]>::to_vec),
        };
        Some(Carried {
            prepared: prepared.now().map(statement).collect(),
            custom: custom.iter().cloned().collect(),
            calls: *calls,
            asks_last_values: *asks_last_values,
            marks_refused: *marks_refused,
            call_marks: *call_marks,
            holds: *holds,
        })
    }

    /// Follows a session from where another process has left it; `None` where what was carried
    /// makes no sense.
    #[must_use]
    pub fn taken_over(mode: ReplayMode, gtids: GtidSource, carried: Carried) -> Option<Self> {
        let Carried {
            prepared,
            custom,
            calls,
            asks_last_values,
            marks_refused,
            call_marks,
            holds,
        } = carried;
        let mut tracker = Self::new(mode).with_ids(gtids);
        for statement in prepared {
            let (name, known) = statement.known()?;
            tracker.prepared.insert(name, known);
        }
        tracker.prepared.settle();
        tracker.custom = custom.into_iter().collect();
        tracker.calls = calls;
        tracker.asks_last_values = asks_last_values;
        tracker.marks_refused = marks_refused;
        tracker.call_marks = call_marks;
        tracker.holds = holds;
        Some(tracker)
    }
}

impl Statement {
    fn known(self) -> Option<(Vec<u8>, crate::state::Prepared)> {
        let Some(Named::Parse(name, mut known)) =
            look_at_parse(&self.parse, self.parse.get(5..)?).named
        else {
            return None;
        };
        known.columns = match self.columns {
            Some(hash) => Some(u128::from_str_radix(&hash, 16).ok()?),
            None => None,
        };
        known.description = self.description.map(Arc::from);
        Some((name, known))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Prepared;

    fn parse(name: &str, sql: &str) -> Vec<u8> {
        let mut frame = b"P".to_vec();
        let len = u32::try_from(4 + name.len() + 1 + sql.len() + 1 + 2).unwrap();
        frame.extend_from_slice(&len.to_be_bytes());
        for text in [name, sql] {
            frame.extend_from_slice(text.as_bytes());
            frame.push(0);
        }
        frame.extend_from_slice(&[0, 0]);
        frame
    }

    fn prepared(frame: &[u8]) -> Prepared {
        match look_at_parse(frame, &frame[5..]).named {
            Some(Named::Parse(_, known)) => known,
            _ => unreachable!(),
        }
    }

    #[test]
    fn what_is_carried_is_known_again() {
        let mut tracker = Tracker::new(ReplayMode::Transaction);
        let frame = parse("s", "UPDATE t SET v = 1");
        let mut statement = prepared(&frame);
        statement.columns = Some(u128::MAX);
        statement.description = Some(Arc::from(&b"T"[..]));
        tracker.prepared.insert(b"s".to_vec(), statement.clone());
        tracker.prepared.settle();
        tracker.custom.insert("app.user".to_owned());
        tracker.calls = Calls::One;
        tracker.holds = true;
        let carried = tracker.carried().unwrap();
        let ids = GtidSource::new(1);
        let next = Tracker::taken_over(ReplayMode::Transaction, ids, carried.clone()).unwrap();
        let known = next.prepared.get(b"s").unwrap();
        assert_eq!(known.parse, statement.parse);
        assert_eq!(
            (known.hint, known.unit, known.columns),
            (statement.hint, statement.unit, statement.columns)
        );
        assert_eq!(known.description, statement.description);
        assert_eq!(next.carried(), Some(carried));
    }

    #[test]
    fn what_stands_elsewhere_is_not_carried() {
        let mut busy = Tracker::new(ReplayMode::Transaction);
        busy.push_own_exchange(1);
        assert_eq!(busy.carried(), None, "a question is under way");
        let mut open = Tracker::new(ReplayMode::Transaction);
        open.project(true);
        assert_eq!(open.carried(), None, "a transaction is open");
        let mut failed = Tracker::new(ReplayMode::Transaction);
        failed.fail();
        assert_eq!(failed.carried(), None, "a transaction has failed");
        let mut touched = Tracker::new(ReplayMode::Transaction);
        touched.touched = true;
        assert_eq!(touched.carried(), None, "its state is not known");
    }
}
