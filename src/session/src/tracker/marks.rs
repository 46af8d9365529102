//! Marks in front of what commits by itself, and the extended form of simple queries.
//!
//! The invariant: a mark goes in front of the first statement of an implicit transaction that may
//! write, and of nothing that PostgreSQL refuses to run behind another statement.

use helios_api::Lsn;
use helios_wire::{backend, frontend};

use super::calls::CallMarks;
use super::texts::until_zero;
use super::{Before, Form, Lead, Learns, ServerStep, Tracker};
use crate::evidence::Mark;
use crate::expect::{Expect, Owner};
use crate::journal::{Exchange, SyncOwed};
use crate::keyword::{Hint, Unit, contains_any, drops_statements, names_parameter, unit};
use crate::reply::sqlstate;
use crate::script::{Script, Speaks, script};

/// SQLSTATE of a prepared statement that is not there.
const UNDEFINED_STATEMENT: &[u8; 5] = b"26000";

/// Simple queries in the extended form after which the backend gets the domain of
/// [`CallMarks::Bound`] for theirs too. The form takes a tenth of the throughput of single INSERTs;
/// the domain is made in 0.8 to 1.6 ms, as long as some ten of them take.
const WORTH_A_DOMAIN: u16 = 256;

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
        let Some((form, speaks, script)) = self.marked_form(tag, frame) else {
            return Before::Go;
        };
        let bound = speaks == Speaks::Calls(None) && self.call_marks.binds();
        let plain = self.plain_key_of(tag, frame, form);
        let simple = tag == frontend::QUERY && plain.is_some();
        if self.call_marks.lacks_domain() && (bound || (simple && self.is_worth_a_domain())) {
            return self.make_domain(tag);
        }
        Before::Lead(Lead {
            speaks,
            script,
            mark: Mark {
                gtid: self.gtids.next_id(),
                floor,
            },
            form,
            plain,
            prepare: false,
            bound,
        })
    }

    /// The lead that [`Before::Lead`] was answered with, as it is sent now: `learns` says how the
    /// answer to a simple query is learned in time.
    pub fn leads(&mut self, mut lead: Lead, learns: Learns) -> Lead {
        if lead.form == Form::Extended {
            match learns {
                Learns::ByFlush => {}
                Learns::Compared => lead.form = Form::ExtendedHeld,
                Learns::Counted => self.leave_unflushed(&mut lead),
            }
        }
        lead.prepare = *self.marking_of(lead.bound) != Marking::Prepared;
        if lead.prepare {
            *self.marking_of(lead.bound) = Marking::Sent;
            self.expect.push(Expect::Close, Owner::Mark);
            self.expect.push(Expect::Parse, Owner::Mark);
        }
        self.expect.push(Expect::Bind, Owner::Mark);
        if !lead.bound {
            self.expect.push(Expect::Execute, Owner::Mark);
        }
        self.lead = Some(lead);
        lead
    }

    fn marking_of(&mut self, bound: bool) -> &mut Marking {
        if bound {
            &mut self.call_marking
        } else {
            &mut self.marking
        }
    }

    /// A reply to what belongs to a mark.
    pub(super) fn mark_answered(&mut self, tag: u8, to: Expect, frame: &[u8]) -> ServerStep {
        if tag == backend::ERROR_RESPONSE {
            self.mark_refused(frame);
            return ServerStep::MarkRefused;
        }
        if tag == backend::PARSE_COMPLETE {
            let bound = self.front_is_bound();
            let marking = self.marking_of(bound);
            if *marking == Marking::Sent {
                *marking = Marking::Prepared;
            }
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
            self.call_marking = Marking::Unknown;
            // The text of what is bound was in an earlier message.
            if frame.first() != Some(&frontend::QUERY) || contains_any(frame, &[b"discard"]) {
                self.domain_may_be_gone();
            }
        }
    }

    /// The mark of the exchange in front is set by its Bind.
    fn front_is_bound(&self) -> bool {
        let front = self.journal.in_flight().front();
        front.is_some_and(|e| e.bound)
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

    /// How a frame is sent behind a mark, and what the mark speaks for; `None` for one that runs
    /// nothing, or that has no mark in front.
    fn marked_form(&self, tag: u8, frame: &[u8]) -> Option<(Form, Speaks, Option<Script>)> {
        let body = frame.get(5..).unwrap_or_default();
        let calls = Speaks::Calls(None);
        match tag {
            frontend::QUERY if self.opens_exchange(tag) => {
                let header = helios_wire::peek_header(frame).ok()??;
                let sql = until_zero(body);
                if header.len != frame.len() {
                    return None;
                }
                let unit = unit(sql);
                if unit == Unit::Other {
                    let script = script(sql)?;
                    return Some((Form::AsIs, script.speaks, Some(script)));
                }
                if names_parameter(sql) {
                    return None;
                }
                match unit {
                    Unit::Writes => Some((Form::Extended, Speaks::All, None)),
                    Unit::Copies => Some((Form::ExtendedCopy, Speaks::All, None)),
                    Unit::Calls if self.call_marks.can() => Some((Form::Extended, calls, None)),
                    Unit::Calls | Unit::Reads | Unit::Other => None,
                }
            }
            frontend::BIND => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                match self.statement(name)?.unit {
                    Unit::Writes | Unit::Copies => Some((Form::AsIs, Speaks::All, None)),
                    Unit::Calls if self.call_marks.can() => Some((Form::AsIs, calls, None)),
                    Unit::Calls | Unit::Reads | Unit::Other => None,
                }
            }
            _ => None,
        }
    }

    /// The texts in an exchange that may end transactions while they run.
    #[must_use]
    pub fn calls_of(&self, exchange: &Exchange) -> Vec<String> {
        let mut texts = self.texts_of(self.journal.exchange_bytes(exchange));
        texts.retain(|t| unit(t.as_bytes()) == Unit::Calls);
        texts
    }

    /// Expects the replies to a simple query in its extended form: Parse, Bind, Describe, Execute,
    /// Close, Flush, Sync; for a COPY Parse, Bind, Execute; counted: without Describe and Flush; held
    /// back: without Sync.
    pub(super) fn push_converted(&mut self, form: Form) {
        let copy = form == Form::ExtendedCopy;
        let held = form == Form::ExtendedHeld;
        let described = !copy && form != Form::ExtendedCounted;
        for (e, is_there) in [
            (Expect::Parse, true),
            (Expect::Bind, true),
            (Expect::DescribePortal, described),
            (Expect::Execute, true),
            (Expect::Close, !copy),
        ] {
            if is_there {
                self.expect.push(e, Owner::Converted);
            }
        }
        if !copy && !held {
            self.expect.push(Expect::Sync, Owner::Client);
        }
    }

    /// The answer of a simple query may come behind the commit, because it can be counted. It stays
    /// simple where the server commits it then. From version 18 on a query behind an executed mark is
    /// in an implicit transaction block, which only a Sync ends when the query is a single statement
    /// (`exec_simple_query` in `src/backend/tcop/postgres.c` ends the blocks of several statements).
    fn leave_unflushed(&mut self, lead: &mut Lead) {
        lead.bound = self.call_marks.can_bind();
        if lead.bound || self.call_marks == CallMarks::Executed {
            lead.form = Form::AsIs;
        } else {
            lead.form = Form::ExtendedCounted;
            self.unflushed = self.unflushed.saturating_add(1);
        }
    }

    /// Whether simple queries of this session have paid by now for the domain that their marks could
    /// be bound with, and there is time to make it.
    fn is_worth_a_domain(&self) -> bool {
        self.unflushed >= WORTH_A_DOMAIN && self.is_between() && self.is_quiet()
    }

    /// ReadyForQuery would end the exchange in front.
    #[must_use]
    pub fn ready_ends_front(&self) -> bool {
        let front = self.journal.in_flight().front();
        !self.expect.head_is_own() && front.is_some_and(|e| e.ready_owed <= 1)
    }

    /// Whether a client's frame has to wait for the Sync of the exchange in front of it: sent before,
    /// it would run in the same transaction. The data of a COPY goes in front of its Sync.
    pub(super) fn waits_for_sync(&self, tag: u8) -> bool {
        let Some(last) = self.journal.in_flight().back() else {
            return false;
        };
        let data = matches!(
            tag,
            frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL
        );
        match last.sync_owed {
            SyncOwed::No => false,
            SyncOwed::BehindReply => true,
            // What is sent while the server waits for data is read as part of it.
            SyncOwed::BehindData => !data && last.copies == 0,
        }
    }

    /// Behind a reply whose Sync was held back: when the statement is over, the server waits for
    /// it. A COPY's goes behind the client's end of data, unless it is over before.
    pub(super) fn sync_when_over(&mut self, tag: u8) -> ServerStep {
        let over = matches!(tag, backend::ERROR_RESPONSE | backend::COMMAND_COMPLETE);
        let front = self.journal.in_flight_mut().front_mut();
        let Some(front) = front.filter(|e| over && e.sync_owed != SyncOwed::No) else {
            return ServerStep::Forward;
        };
        front.sync_owed = SyncOwed::No;
        self.expect.push(Expect::Sync, Owner::Client);
        ServerStep::ForwardThenSync
    }

    /// The server refused the mark: the exchange in front was not done. Where its statement was
    /// not there any more, or the server is going away, the next backend gets it again.
    fn mark_refused(&mut self, frame: &[u8]) {
        let state = sqlstate(frame);
        let away = state.starts_with(b"57P") || state.starts_with(b"08");
        let refused = &state != UNDEFINED_STATEMENT && !away;
        if refused && self.front_is_bound() {
            self.bound_mark_refused();
        } else {
            self.marks_refused |= refused;
        }
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
    fn learned(tracker: &mut Tracker, sql: &str, learns: Learns) -> Option<Lead> {
        let frame = query(sql);
        let lead = match tracker.before(frontend::QUERY, &frame, Some(Lsn(1))) {
            Before::Lead(lead) => Some(tracker.leads(lead, learns)),
            _ => None,
        };
        tracker.client_frame(frontend::QUERY, &frame, 0).unwrap();
        lead
    }

    fn send(tracker: &mut Tracker, sql: &str) -> Option<Lead> {
        learned(tracker, sql, Learns::ByFlush)
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
    fn what_a_mark_speaks_for() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        let told = |lead: Option<Lead>| lead.map(|l| (l.form, l.speaks));
        assert_eq!(send(&mut t, "call p()"), None, "the version is not known");
        answer(&mut t, b"CZ");
        for (version, want) in [
            ("15.18 (Debian 15.18-0+deb12u1)", true),
            ("17rc1", true),
            ("18beta1", false),
            ("", false),
        ] {
            let parameters = [("server_version".to_owned(), version.to_owned())];
            t = t.on(&parameters.into());
            assert_eq!(t.call_marks == CallMarks::Executed, want, "{version}");
        }
        // A single statement would not be committed behind a mark, on these and on an unknown one.
        let counted = |t: &mut Tracker| {
            let lead = learned(t, "delete from t", Learns::Counted).unwrap();
            let simple = lead.form == Form::AsIs;
            let tags: &[u8] = if simple { b"2CCZ" } else { b"312C12C3Z" };
            answer(t, tags);
            simple
        };
        assert!(!counted(&mut t));
        t.call_marks = CallMarks::Executed;
        assert!(counted(&mut t));
        let calls = Some((Form::Extended, Speaks::Calls(None)));
        assert_eq!(told(send(&mut t, "call p()")), calls);
        answer(&mut t, b"2C12nC3Z");
        let one = Some((Form::Extended, Speaks::All));
        assert_eq!(told(send(&mut t, "do $$begin; end$$")), one);
        answer(&mut t, b"2C12nC3Z");
        let all = "insert into t values (1); delete from t";
        assert_eq!(told(send(&mut t, all)), Some((Form::AsIs, Speaks::All)));
        assert!(!t.in_flight()[0].answered);
        answer(&mut t, b"2CCC");
        assert!(t.in_flight()[0].answered);
        answer(&mut t, b"Z");
        let first = "delete from t; commit; delete from u";
        assert_eq!(told(send(&mut t, first)), Some((Form::AsIs, Speaks::First)));
        assert_eq!(t.in_flight()[0].speaks, Speaks::First);
        answer(&mut t, b"2CCCCZ");
        assert!(t.is_between() && t.is_quiet());
    }

    fn on_18() -> Tracker {
        let parameters = [("server_version".to_owned(), "18.1".to_owned())];
        Tracker::new(ReplayMode::Transaction).on(&parameters.into())
    }

    #[test]
    fn from_18_on_calls_are_marked_by_the_value_of_a_domain() {
        let mut t = on_18();
        let call = query("call p()");
        let before = |t: &mut Tracker| t.before(frontend::QUERY, &call, Some(Lsn(1)));
        assert!(send(&mut t, "insert into t values (1)").is_some());
        assert_eq!(
            before(&mut t),
            Before::Wait,
            "what is under way comes first"
        );
        answer(&mut t, b"312C12nC3Z");
        assert_eq!(before(&mut t), Before::MakeDomain);
        t.domain_made(true);
        let lead = send(&mut t, "call p()").unwrap();
        assert_eq!(lead.form, Form::Extended);
        assert!(lead.bound && lead.prepare);
        answer(&mut t, b"31212nC3Z");
        assert!(t.is_between() && t.is_quiet());
        // The statement of the other marks is prepared for itself.
        let other = send(&mut t, "insert into t values (1)").unwrap();
        assert!(!other.bound && !other.prepare);
        answer(&mut t, b"2C12nC3Z");
        let lead = send(&mut t, "call p()").unwrap();
        assert!(lead.bound && !lead.prepare);
        answer(&mut t, b"212nC3Z");
        send(&mut t, "set a = 1");
        answer(&mut t, b"CZ");
        assert!(send(&mut t, "call p()").unwrap().prepare);
        answer(&mut t, b"31212nC3Z");
        send(&mut t, "discard temp");
        answer(&mut t, b"CZ");
        assert_eq!(before(&mut t), Before::MakeDomain);
        t.domain_made(false);
        assert_eq!(
            before(&mut t),
            Before::Go,
            "the outcome of this one is not known"
        );
        assert!(send(&mut t, "insert into t values (1)").is_some());
    }

    #[test]
    fn from_18_on_many_simple_statements_are_worth_a_domain() {
        let mut t = on_18();
        let insert = query("insert into t values (1)");
        for n in 0..WORTH_A_DOMAIN {
            let lead = learned(&mut t, "insert into t values (1)", Learns::Counted).unwrap();
            assert_eq!(
                (lead.form, lead.bound),
                (Form::ExtendedCounted, false),
                "{n}"
            );
            let prepared: &[u8] = if n == 0 { b"31" } else { b"" };
            answer(&mut t, prepared);
            answer(&mut t, b"2C12C3Z");
        }
        // Not between two that are under way: the next one can wait for it.
        send(&mut t, "insert into t values (1) returning v");
        assert!(matches!(
            t.before(frontend::QUERY, &insert, Some(Lsn(1))),
            Before::Lead(_)
        ));
        answer(&mut t, b"2C12TDC3Z");
        let returns = query("insert into t values (1) returning v");
        let before = t.before(frontend::QUERY, &returns, Some(Lsn(1)));
        assert!(matches!(before, Before::Lead(_)), "its answer is flushed");
        let before = t.before(frontend::QUERY, &insert, Some(Lsn(1)));
        assert_eq!(before, Before::MakeDomain);
        t.domain_made(true);
        for prepared in ["31", ""] {
            let lead = learned(&mut t, "insert into t values (1)", Learns::Counted).unwrap();
            assert_eq!((lead.form, lead.bound), (Form::AsIs, true));
            answer(&mut t, prepared.as_bytes());
            answer(&mut t, b"2CZ");
            assert!(t.is_between() && t.is_quiet());
        }
        // Compared before the commit, or flushed: in the extended form.
        for learns in [Learns::Compared, Learns::ByFlush] {
            let lead = learned(&mut t, "insert into t values (1)", learns).unwrap();
            assert!(!lead.bound && lead.form != Form::AsIs);
            if learns == Learns::Compared {
                answer(&mut t, b"2C12nC3");
                answer(&mut t, b"Z");
            } else {
                answer(&mut t, b"2C12nC3Z");
            }
        }
        send(&mut t, "discard all");
        answer(&mut t, b"CZ");
        let before = t.before(frontend::QUERY, &insert, Some(Lsn(1)));
        assert_eq!(before, Before::MakeDomain);
        t.domain_made(false);
        let lead = learned(&mut t, "insert into t values (1)", Learns::Counted).unwrap();
        assert_eq!(lead.form, Form::ExtendedCounted, "the domain was refused");
    }

    #[test]
    fn nothing_is_sent_behind_a_statement_that_is_compared() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        learned(&mut t, "insert into t values (1)", Learns::Compared);
        for next in [query("select 1"), b"S\0\0\0\x04".to_vec()] {
            assert_eq!(t.before(next[0], &next, Some(Lsn(1))), Before::Wait);
        }
        assert_eq!(
            answer(&mut t, b"312C12nC").last(),
            Some(&ServerStep::ForwardThenSync)
        );
        let next = query("select 1");
        assert_eq!(t.before(next[0], &next, Some(Lsn(1))), Before::Go);
        send(&mut t, "select 1");
        answer(&mut t, b"3ZTDCZ");
        assert!(t.is_between() && t.is_quiet());
    }

    #[test]
    fn a_bound_mark_is_refused_twice_at_most() {
        let mut t = on_18();
        for tries in [true, false] {
            let frame = query("call p()");
            let before = t.before(frontend::QUERY, &frame, Some(Lsn(1)));
            assert_eq!(before, Before::MakeDomain);
            t.domain_made(true);
            assert!(send(&mut t, "call p()").unwrap().bound);
            let frame = b"E\0\0\0\x0cC42704\0\0";
            let step = t.server_frame(b'E', frame).unwrap();
            assert_eq!(step, ServerStep::MarkRefused);
            let parameters = [("server_version".to_owned(), "18.1".to_owned())];
            t = t.successor(&[]).on(&parameters.into());
            assert_eq!(t.call_marks.lacks_domain(), tries);
        }
        assert_eq!(send(&mut t, "call p()"), None);
        answer(&mut t, b"CZ");
        assert!(send(&mut t, "insert into t values (1)").is_some());
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
