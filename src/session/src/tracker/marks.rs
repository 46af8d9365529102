//! Marks in front of what commits by itself, and the extended form of simple queries.
//!
//! The invariant: a mark goes in front of the first statement of an implicit transaction that may
//! write, and of nothing that PostgreSQL refuses to run behind another statement.

use helios_api::Lsn;
use helios_wire::{backend, frontend};

use super::texts::until_zero;
use super::{Before, Form, Lead, ServerStep, Tracker};
use crate::evidence::Mark;
use crate::expect::{Expect, Owner};
use crate::journal::Exchange;
use crate::keyword::{Hint, Unit, drops_statements, names_parameter, unit};
use crate::reply::sqlstate;

/// SQLSTATE of a prepared statement that is not there.
const UNDEFINED_STATEMENT: &[u8; 5] = b"26000";

/// Whether the backend has the mark's statement prepared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Marking {
    /// Not, or perhaps not any more.
    #[default]
    Unknown,
    /// Its Parse has been sent.
    Sent,
    /// It has been answered.
    Prepared,
}

impl Tracker {
    /// What goes in front of a frame outside a transaction block.
    pub(super) fn lead(&mut self, tag: u8, frame: &[u8], floor: Lsn) -> Before {
        if self.marks_refused || self.expect.awaits_sync() {
            return Before::Go;
        }
        if tag == frontend::SYNC {
            return self.flush_before_commit();
        }
        if self.has_mark(tag) {
            return Before::Go;
        }
        let form = match (tag, self.unit_of(tag, frame)) {
            (frontend::QUERY, Unit::Writes) => Form::Extended,
            (frontend::QUERY, Unit::Copies) => Form::ExtendedCopy,
            (_, Unit::Writes | Unit::Copies) => Form::AsIs,
            _ => return Before::Go,
        };
        let lead = Lead {
            mark: Mark {
                gtid: self.gtids.next_id(),
                floor,
            },
            form,
            prepare: self.marking != Marking::Prepared,
        };
        self.lead = Some(lead);
        if lead.prepare {
            self.marking = Marking::Sent;
            self.expect.push(Expect::Close, Owner::Mark);
            self.expect.push(Expect::Parse, Owner::Mark);
        }
        self.expect.push(Expect::Bind, Owner::Mark);
        self.expect.push(Expect::Execute, Owner::Mark);
        Before::Lead(lead)
    }

    /// A reply to what belongs to a mark.
    pub(super) fn mark_answered(&mut self, tag: u8, to: Expect, frame: &[u8]) -> ServerStep {
        if tag == backend::ERROR_RESPONSE {
            self.mark_refused(frame);
            return ServerStep::MarkRefused;
        }
        if tag == backend::PARSE_COMPLETE && self.marking == Marking::Sent {
            self.marking = Marking::Prepared;
        }
        ServerStep::Own(to)
    }

    /// What is about to be sent may end the mark's prepared statement, with all others: DISCARD,
    /// DEALLOCATE. One that is hidden in a function is found out by the mark's error.
    pub(super) fn note_end_of_statements(
        &mut self,
        hint: Option<Hint>,
        frame: &[u8],
        several: bool,
    ) {
        if hint == Some(Hint::Session) || (several && drops_statements(frame)) {
            self.marking = Marking::Unknown;
        }
    }

    /// What is marked is answered but for its Sync, and being committed; nothing of the reply, nor
    /// anything before it, is left to be written to the client.
    #[must_use]
    pub fn awaits_commit(&self) -> bool {
        let unseen = |e: &Exchange| e.closed && e.mark.is_some() && e.unseen_from() == Some(0);
        self.expect.only_sync_is_owed() && self.journal.in_flight().front().is_some_and(unseen)
    }

    /// What has been answered is about to be written to the client.
    pub fn shows(&mut self) {
        if let Some(front) = self.journal.in_flight_mut().front_mut() {
            front.shown |= front.reply.messages > 0 || front.reply.inside_message();
        }
    }

    /// A Sync that the server reads in copy mode commits nothing, and what it answers comes only
    /// behind the end of the data: that one may be the first of two, sent before the copy began.
    fn flush_before_commit(&self) -> Before {
        let open = self.journal.in_flight().back();
        let marked = open.is_some_and(|e| (!e.closed || e.copy_tail) && e.mark.is_some());
        if marked && !self.expect.ignores_sync() {
            Before::Flush
        } else {
            Before::Go
        }
    }

    fn has_mark(&self, tag: u8) -> bool {
        let open = self.journal.in_flight().back();
        !self.opens_exchange(tag) && open.is_some_and(|e| e.mark.is_some())
    }

    /// What a frame runs; [`Unit::Other`] for one that runs nothing, or where a mark would not
    /// speak for it.
    fn unit_of(&self, tag: u8, frame: &[u8]) -> Unit {
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            frontend::QUERY if self.opens_exchange(tag) => {
                let header = helios_wire::peek_header(frame);
                let whole = header.is_ok_and(|h| h.is_some_and(|h| h.len == frame.len()));
                let sql = until_zero(body);
                if whole && !names_parameter(sql) {
                    unit(sql)
                } else {
                    Unit::Other
                }
            }
            frontend::BIND => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                self.statement(name).map_or(Unit::Other, |s| s.unit)
            }
            _ => Unit::Other,
        }
    }

    /// Expects the replies to a simple query in its extended form: Parse, Bind, Describe, Execute,
    /// Close, Flush, Sync; for a COPY Parse, Bind, Execute; held back: without Sync.
    pub(super) fn push_converted(&mut self, form: Form) {
        let copy = form == Form::ExtendedCopy;
        let held = form == Form::ExtendedHeld;
        for (e, always) in [
            (Expect::Parse, true),
            (Expect::Bind, true),
            (Expect::DescribePortal, false),
            (Expect::Execute, true),
            (Expect::Close, false),
        ] {
            if always || !copy {
                self.expect.push(e, Owner::Converted);
            }
        }
        if !copy && !held {
            self.expect.push(Expect::Sync, Owner::Client);
        }
    }

    /// The reply of the simple query that [`Before::Lead`] was answered for is to be looked at
    /// before its commit.
    pub fn hold_commit(&mut self) {
        if let Some(lead) = self.lead.as_mut().filter(|l| l.form == Form::Extended) {
            lead.form = Form::ExtendedHeld;
        }
    }

    /// ReadyForQuery would end the exchange in front.
    #[must_use]
    pub fn ready_ends_front(&self) -> bool {
        let front = self.journal.in_flight().front();
        !self.expect.head_is_own() && front.is_some_and(|e| e.ready_owed <= 1)
    }

    /// Behind a reply whose Sync was held back: when the statement is over, the server waits for
    /// it. A COPY's goes behind the client's end of data, unless it is over before.
    pub(super) fn sync_when_over(&mut self, tag: u8) -> ServerStep {
        let over = matches!(tag, backend::ERROR_RESPONSE | backend::COMMAND_COMPLETE);
        let front = self.journal.in_flight_mut().front_mut();
        let Some(front) = front.filter(|e| over && e.sync_owed) else {
            return ServerStep::Forward;
        };
        front.sync_owed = false;
        self.expect.push(Expect::Sync, Owner::Client);
        ServerStep::ForwardThenSync
    }

    /// The server refused the mark: the exchange in front was not done. Where its statement was
    /// not there any more, or the server is going away, the next backend gets it again.
    fn mark_refused(&mut self, frame: &[u8]) {
        let state = sqlstate(frame);
        let away = state.starts_with(b"57P") || state.starts_with(b"08");
        self.marks_refused |= &state != UNDEFINED_STATEMENT && !away;
        if let Some(front) = self.journal.in_flight_mut().front_mut() {
            front.undone = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplayMode;
    use helios_wire::message::front;

    fn query(sql: &str) -> Vec<u8> {
        let mut out = bytes::BytesMut::new();
        front::query(&mut out, sql.as_bytes()).unwrap();
        out.to_vec()
    }

    /// What goes in front of a query, which is then sent.
    fn send(tracker: &mut Tracker, sql: &str) -> Option<Lead> {
        let frame = query(sql);
        let before = tracker.before(frontend::QUERY, &frame, Some(Lsn(1)));
        tracker.client_frame(frontend::QUERY, &frame, 0).unwrap();
        match before {
            Before::Lead(lead) => Some(lead),
            _ => None,
        }
    }

    fn answer(tracker: &mut Tracker, tags: &[u8]) -> Vec<ServerStep> {
        let frame = |tag: u8| match tag {
            b'Z' => b"Z\0\0\0\x05I".to_vec(),
            b'C' => b"C\0\0\0\x0fINSERT 0 1\0".to_vec(),
            b'E' => b"E\0\0\0\x0cC26000\0\0".to_vec(),
            tag => vec![tag, 0, 0, 0, 4],
        };
        let each = tags.iter().map(|t| tracker.server_frame(*t, &frame(*t)));
        each.map(Result::unwrap).collect()
    }

    #[test]
    fn the_mark_is_prepared_once_and_again_when_it_may_be_gone() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        assert!(send(&mut t, "insert into t values (1)").unwrap().prepare);
        // Not answered yet: it may have been skipped.
        assert!(send(&mut t, "insert into t values (2)").unwrap().prepare);
        answer(&mut t, b"312C12nC3Z312C12nC3Z");
        assert!(!send(&mut t, "insert into t values (3)").unwrap().prepare);
        answer(&mut t, b"2C12nC");
        assert!(!t.awaits_commit(), "its place in the output is not known");
        answer(&mut t, b"3Z");
        for gone in ["discard all", "select 1; deallocate all", "set a.b = 1"] {
            assert_eq!(send(&mut t, gone), None);
            assert!(send(&mut t, "insert into t values (4)").unwrap().prepare);
            answer(&mut t, b"CZ312C12nC3Z");
            assert!(!send(&mut t, "insert into t values (5)").unwrap().prepare);
            answer(&mut t, b"2C12nC3Z");
        }
    }

    #[test]
    fn a_server_that_goes_away_does_not_end_marks() {
        for (state, ends) in [("57P01", false), ("57P02", false), ("42501", true)] {
            let mut t = Tracker::new(ReplayMode::Transaction);
            send(&mut t, "insert into t values (1)");
            let frame = [b"E\0\0\0\x0cC", state.as_bytes(), b"\0\0"].concat();
            let step = t.server_frame(b'E', &frame).unwrap();
            assert_eq!(step, ServerStep::MarkRefused);
            let lead = send(&mut t.successor(&[]), "insert into t values (2)");
            assert_eq!(lead.is_none(), ends, "{state}");
        }
    }

    #[test]
    fn a_statement_that_is_gone_does_not_end_marks() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        send(&mut t, "insert into t values (1)");
        answer(&mut t, b"312C12nC3Z");
        send(&mut t, "insert into t values (2)");
        assert_eq!(answer(&mut t, b"E"), [ServerStep::MarkRefused]);
        assert!(t.journal().in_flight()[0].undone);
        let mut next = t.successor(&[]);
        assert!(send(&mut next, "insert into t values (2)").unwrap().prepare);
    }
}
