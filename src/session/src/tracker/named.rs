//! Statements that a session prepares and gives up by SQL inside a transaction.
//!
//! PostgreSQL takes neither back when the transaction is rolled back (`prepare.sgml`), so one that
//! a move costs must not take them back either. Read with the grammar, behind an answer that says
//! so; never on the forwarding path.

use std::collections::BTreeSet;

use helios_wire::frontend;

use super::Tracker;
use super::texts::until_zero;
use crate::TxnStatus;
use crate::grammar;
use crate::reply::{Outcome, Reply};
use crate::state::Change;

impl Tracker {
    /// What the open transaction, and what is answered of the exchange in front, has prepared and
    /// given up by SQL.
    #[must_use]
    pub fn changes(&self) -> Vec<Change> {
        let mut all = self.changes.clone();
        if let Some(front) = self.journal.in_flight().front() {
            let messages = self.journal.exchange_bytes(front);
            all.extend(self.changes_in(messages, &front.reply).0);
        }
        all
    }

    /// What is sent now may find another state than the one that is known: something in flight
    /// may change it, outside a transaction block.
    #[must_use]
    pub fn changes_state(&self) -> bool {
        let touches = || self.journal.in_flight().iter().any(|e| e.touches);
        !self.projected_open && (self.touched || touches())
    }

    /// Notes what the exchange in front, which is answered, has prepared and given up.
    pub(super) fn note_changes(&mut self, status: TxnStatus) {
        if status == TxnStatus::Idle {
            // The server is asked.
            self.changes.clear();
            return;
        }
        let Some(front) = self.journal.in_flight().front().filter(|e| e.touches) else {
            return;
        };
        let messages = self.journal.exchange_bytes(front);
        let (changes, gone) = self.changes_in(messages, &front.reply);
        for name in gone {
            self.prepared.remove(&name);
        }
        self.changes.extend(changes);
    }

    /// What a sequence of client messages has changed, by its answer; and which of the protocol's
    /// statements were given up by it and not prepared anew behind that.
    fn changes_in(&self, messages: &[u8], reply: &Reply) -> (Vec<Change>, BTreeSet<Vec<u8>>) {
        let mut answered = reply
            .commands
            .iter()
            .filter(|c| names_statement(&c.outcome));
        let (mut changes, mut gone) = (Vec::new(), BTreeSet::new());
        let mut parsed: Vec<(&[u8], &[u8])> = Vec::new();
        let mut portals: Vec<(&[u8], &[u8])> = Vec::new();
        let mut rest = messages;
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let (frame, tail) = rest.split_at_checked(header.len).unwrap_or((rest, &[]));
            rest = tail;
            let body = frame.get(5..).unwrap_or_default();
            let first = until_zero(body);
            let second = until_zero(body.get(first.len() + 1..).unwrap_or_default());
            let text = match header.tag {
                frontend::QUERY => first,
                frontend::PARSE => {
                    parsed.push((first, second));
                    gone.remove(first);
                    continue;
                }
                frontend::BIND => {
                    let here = parsed.iter().rev().find(|(name, _)| *name == second);
                    let text = here.map(|(_, text)| *text);
                    let text = text.or_else(|| self.prepared_text(second));
                    portals.push((first, text.unwrap_or_default()));
                    continue;
                }
                frontend::EXECUTE => {
                    let portal = portals.iter().rev().find(|(name, _)| *name == first);
                    portal.map_or(&b""[..], |(_, text)| *text)
                }
                _ => continue,
            };
            for change in grammar::changes(&String::from_utf8_lossy(text)) {
                if answered.next().is_none() {
                    return (changes, gone);
                }
                match &change {
                    Change::Prepared(..) => {}
                    Change::Deallocated(name) => drop(gone.insert(name.clone().into_bytes())),
                    Change::AllDeallocated => {
                        gone.extend(self.prepared.now().map(|(name, _)| name.to_vec()));
                    }
                }
                changes.push(change);
            }
        }
        (changes, gone)
    }
}

/// Whether a command was PREPARE or DEALLOCATE, by its tag.
fn names_statement(outcome: &Outcome) -> bool {
    let named = |tag: &[u8]| tag == b"PREPARE" || tag.starts_with(b"DEALLOCATE");
    matches!(outcome, Outcome::Complete(tag) if named(tag.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ReplayMode;
    use helios_wire::message::front;

    fn exchange(tracker: &mut Tracker, frames: &[bytes::BytesMut], replies: &[(u8, &str)]) {
        for frame in frames {
            tracker.client_frame(frame[0], frame, 0).unwrap();
        }
        for (tag, text) in replies {
            let mut reply = bytes::BytesMut::from(&[*tag][..]);
            let len = 4 + text.len() + usize::from(*tag == b'C');
            reply.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
            reply.extend_from_slice(text.as_bytes());
            if *tag == b'C' {
                reply.extend_from_slice(b"\0");
            }
            tracker.server_frame(*tag, &reply).unwrap();
        }
    }

    fn query(sql: &str) -> bytes::BytesMut {
        let mut out = bytes::BytesMut::new();
        front::query(&mut out, sql.as_bytes()).unwrap();
        out
    }

    fn parse(name: &str, sql: &str) -> bytes::BytesMut {
        let mut out = bytes::BytesMut::new();
        front::parse(&mut out, name.as_bytes(), sql.as_bytes(), &[]).unwrap();
        out
    }

    fn sync() -> bytes::BytesMut {
        let mut out = bytes::BytesMut::new();
        front::sync(&mut out);
        out
    }

    #[test]
    fn what_was_answered_counts_in_order() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        exchange(&mut t, &[query("begin")], &[(b'C', "BEGIN"), (b'Z', "T")]);
        let parse_p = [parse("p", "select 1"), sync()];
        exchange(&mut t, &parse_p, &[(b'1', ""), (b'Z', "T")]);
        let several =
            "prepare a as select 1; deallocate P; deallocate nobody; prepare b as select 2";
        let error = "SERROR\0C26000\0\0";
        let answer = [
            (b'C', "PREPARE"),
            (b'C', "DEALLOCATE"),
            (b'E', error),
            (b'Z', "T"),
        ];
        exchange(&mut t, &[query(several)], &answer);
        let [Change::Prepared(name, _), Change::Deallocated(gone)] = &t.changes()[..] else {
            panic!("{:?}", t.changes());
        };
        assert_eq!((name.as_str(), gone.as_str()), ("a", "p"));
        assert!(t.prepared().get(b"p").is_none());
        // Given up and prepared anew within one exchange: it is there.
        exchange(&mut t, &parse_p, &[(b'1', ""), (b'Z', "T")]);
        let mut both = vec![parse("", "deallocate all")];
        let mut run = bytes::BytesMut::new();
        front::bind(&mut run, b"", b"", &[], &[], &[]).unwrap();
        both.push(run.split());
        front::execute(&mut run, b"", 0).unwrap();
        both.push(run);
        both.extend(parse_p);
        let answer = [
            (b'1', ""),
            (b'2', ""),
            (b'C', "DEALLOCATE ALL"),
            (b'1', ""),
            (b'Z', "T"),
        ];
        exchange(&mut t, &both, &answer);
        assert_eq!(t.changes().last(), Some(&Change::AllDeallocated));
        assert!(t.prepared().get(b"p").is_some());
        exchange(&mut t, &[query("commit")], &[(b'C', "COMMIT"), (b'Z', "I")]);
        assert!(t.changes().is_empty());
    }

    #[test]
    fn nothing_is_sent_behind_what_changes_the_state() {
        let mut t = Tracker::new(ReplayMode::Transaction);
        exchange(&mut t, &[query("select 1")], &[]);
        assert!(!t.changes_state());
        exchange(&mut t, &[], &[(b'C', "SELECT 1"), (b'Z', "I")]);
        exchange(&mut t, &[query("discard all")], &[]);
        assert!(t.changes_state());
    }
}
