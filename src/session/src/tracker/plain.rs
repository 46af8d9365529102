//! Which exchanges are one plain statement ([`crate::plain`]), and taking such a one as answered.
//!
//! The invariant: the answer to an exchange that counts as plain follows from its messages and one
//! number of rows.

use helios_wire::{backend, frontend};

use super::texts::until_zero;
use super::{Form, Lead, Tracker};
use crate::journal::Exchange;
use crate::plain::{self, Key, Plain};

/// What an exchange runs, for [`Tracker::plain_key`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Runs {
    /// Nothing yet.
    #[default]
    Nothing,
    /// A plain statement with this key, and nothing else.
    Plain(Key),
    /// Something else, or something beside it.
    More,
}

impl Tracker {
    /// The key of what a mark goes in front of.
    pub(super) fn plain_key_of(&self, tag: u8, frame: &[u8], form: Form) -> Option<Key> {
        let body = frame.get(5..).unwrap_or_default();
        match (tag, form) {
            (frontend::QUERY, Form::Extended) => plain::key(until_zero(body)),
            (frontend::BIND, Form::AsIs) => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                self.statement(name)?.plain
            }
            _ => None,
        }
    }

    /// Notes what a frame of the exchange that was sent last adds to it.
    pub(super) fn note_plain(&mut self, tag: u8, frame: &[u8], lead: Option<Lead>) {
        let Some(last) = self.journal.in_flight_mut().back_mut() else {
            return;
        };
        let key = lead.and_then(|l| l.plain);
        let first = frame.get(5).copied().unwrap_or_default();
        last.plain = match (tag, last.plain, key) {
            (frontend::QUERY | frontend::BIND, Runs::Nothing, Some(key)) => Runs::Plain(key),
            // Statements of the client's are not known behind the answer that it lacks, nor are
            // the types of parameters.
            (frontend::PARSE, Runs::Nothing, _) if first == 0 => Runs::Nothing,
            (frontend::DESCRIBE | frontend::CLOSE, runs, _) if first == b'P' => runs,
            (frontend::EXECUTE | frontend::SYNC | frontend::FLUSH, runs, _) => runs,
            _ => Runs::More,
        };
    }

    /// The key of the plain statement that the exchange sent last is, if it is one and nothing else.
    #[must_use]
    pub fn plain_key(&self) -> Option<Key> {
        match self.journal.in_flight().back()?.plain {
            Runs::Plain(key) => Some(key),
            Runs::Nothing | Runs::More => None,
        }
    }

    /// The text of the plain statement that an exchange is.
    #[must_use]
    pub fn plain_text(&self, exchange: &Exchange) -> Option<Vec<u8>> {
        if exchange.cut || !matches!(exchange.plain, Runs::Plain(_)) {
            return None;
        }
        let mut parsed = None;
        let mut rest = self.journal.exchange_bytes(exchange);
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let frame = rest.get(..header.len)?;
            let body = frame.get(5..)?;
            let name = until_zero(body);
            let second = until_zero(body.get(name.len() + 1..).unwrap_or_default());
            match header.tag {
                frontend::QUERY => return Some(name.to_vec()),
                frontend::PARSE => parsed = Some(second),
                frontend::BIND if second.is_empty() && parsed.is_some() => {
                    return parsed.map(<[u8]>::to_vec);
                }
                frontend::BIND => return self.prepared_text(second).map(<[u8]>::to_vec),
                _ => {}
            }
            rest = &rest[header.len..];
        }
        None
    }

    /// The plain statement that the exchange in front is, when nothing of its answer has come.
    #[must_use]
    pub fn plain_front(&self) -> Option<Plain> {
        let front = self.journal.in_flight().front()?;
        let unanswered = front.closed && front.ready_owed == 1 && front.reply.messages == 0;
        let text = self.plain_text(front).filter(|_| unanswered)?;
        plain::plain(&text)
    }

    /// The client is given the answer to the plain statement in front: what it prepared is
    /// prepared.
    pub fn answer_plain(&mut self) {
        let Some(front) = self.journal.in_flight().front() else {
            return;
        };
        let mut named = 0;
        let mut rest = self.journal.exchange_bytes(front);
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            named += usize::from(matches!(header.tag, frontend::PARSE | frontend::CLOSE));
            rest = rest.get(header.len..).unwrap_or_default();
        }
        for _ in 0..named {
            self.named_done(backend::PARSE_COMPLETE, &[]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplayMode;
    use crate::tracker::{Before, Learns};
    use bytes::BytesMut;
    use helios_api::Lsn;
    use helios_wire::message::front::{self, Target};

    const INSERT: &[u8] = b"insert into t values ($1)";

    /// Sends the messages; the key and text of what the exchange is.
    fn sent(tracker: &mut Tracker, messages: &BytesMut) -> Option<Vec<u8>> {
        let mut rest = &messages[..];
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let (frame, tail) = rest.split_at(header.len);
            let before = tracker.before(header.tag, frame, Some(Lsn(1)));
            assert!(!matches!(before, Before::Wait), "nothing is asked");
            if let Before::Lead(lead) = before {
                tracker.leads(lead, Learns::ByFlush);
            }
            tracker.client_frame(header.tag, frame, 0).unwrap();
            rest = tail;
        }
        let last = tracker.journal().in_flight().back().unwrap();
        let text = tracker.plain_text(last);
        assert_eq!(text.is_some(), tracker.plain_key().is_some());
        let front = tracker.plain_front();
        assert_eq!(text.is_some(), front.is_some());
        text
    }

    fn exchange(build: impl FnOnce(&mut BytesMut)) -> BytesMut {
        let mut out = BytesMut::new();
        build(&mut out);
        out
    }

    fn run(out: &mut BytesMut, name: &[u8]) {
        front::bind(out, b"", name, &[], &[Some(b"1")], &[]).unwrap();
        front::describe(out, Target::Portal, b"").unwrap();
        front::execute(out, b"", 0).unwrap();
    }

    #[test]
    fn one_plain_statement_in_every_form() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        let simple = exchange(|o| front::query(o, b"delete from t").unwrap());
        assert_eq!(sent(&mut t, &simple).unwrap(), b"delete from t");
        let mut t = Tracker::new(ReplayMode::Transaction);
        let unnamed = exchange(|o| {
            front::parse(o, b"", INSERT, &[]).unwrap();
            run(o, b"");
            front::sync(o);
        });
        assert_eq!(sent(&mut t, &unnamed).unwrap(), INSERT);
        t.answer_plain();
        t.committed_front();
        assert_eq!(t.prepared_text(b""), Some(INSERT));
        assert!(t.is_between() && t.is_quiet());
        // What was prepared before.
        let again = exchange(|o| {
            run(o, b"");
            front::sync(o);
        });
        assert_eq!(sent(&mut t, &again).unwrap(), INSERT);
    }

    #[test]
    fn what_has_more_in_it_is_not_one() {
        let named = exchange(|o| {
            front::parse(o, b"s", INSERT, &[]).unwrap();
            run(o, b"s");
            front::sync(o);
        });
        let described = exchange(|o| {
            front::parse(o, b"", INSERT, &[]).unwrap();
            front::describe(o, Target::Statement, b"").unwrap();
            run(o, b"");
            front::sync(o);
        });
        let two = exchange(|o| {
            front::parse(o, b"", INSERT, &[]).unwrap();
            run(o, b"");
            run(o, b"");
            front::sync(o);
        });
        let read_first = exchange(|o| {
            front::parse(o, b"", b"select 1", &[]).unwrap();
            run(o, b"");
            front::parse(o, b"", INSERT, &[]).unwrap();
            run(o, b"");
            front::sync(o);
        });
        let script = exchange(|o| front::query(o, b"delete from t; delete from u").unwrap());
        for messages in [named, described, two, read_first, script] {
            let mut t = Tracker::new(ReplayMode::Transaction);
            assert_eq!(sent(&mut t, &messages), None, "{messages:?}");
        }
    }
}
