//! The statements behind messages, read with the grammar; never on the forwarding path.

use helios_wire::frontend;

use super::Tracker;
use crate::TxnStatus;
use crate::decide::{Evidence, InFlight, MarkState};
use crate::grammar::{self, Kind};
use crate::journal::Exchange;
use crate::locks::Calls;
use crate::reply::{CommandResult, Outcome};

impl Tracker {
    /// The statements of an exchange, read with the grammar; `None` when its text was not kept.
    #[must_use]
    pub fn kinds(&self, exchange: &Exchange) -> Option<Vec<Kind>> {
        if exchange.cut {
            return None;
        }
        Some(self.kinds_of(self.journal.exchange_bytes(exchange)))
    }

    /// Whether the transaction was begun by a query of its own, has failed, and nothing that its
    /// client may ask for brings back a part of it: no savepoint was set, and nothing was done to
    /// the session that outlasts a rollback, as far as texts tell. Reads all of them.
    #[must_use]
    pub fn has_failed_for_good(&self) -> bool {
        use Kind::{CopyIn, Empty, LockingRead, Read, Write};
        let lost = |k: &Kind| matches!(k, Empty | Read | LockingRead | Write | CopyIn);
        let Some((begin, others)) = self.journal.records().split_first() else {
            return false;
        };
        let messages = self.journal.record_bytes(begin);
        let mut named = self.prepared.now().filter(|(_, p)| p.made_inside);
        self.status == TxnStatus::Failed
            && !self.touched
            && self.calls == Calls::None
            && named.all(|(name, _)| name.is_empty())
            && messages.first() == Some(&frontend::QUERY)
            && self.kinds_of(messages) == [Kind::Begin]
            && others.iter().all(|record| {
                let messages = self.journal.record_bytes(record);
                self.kinds_of(messages).iter().all(lost)
            })
    }

    /// Where the exchange in front has failed for certain, and all that its client has not been told
    /// of that is ReadyForQuery: the status that it would tell. What was skipped behind the error does
    /// not run, and must not be run again: it may not fail then, and a COMMIT may be in it.
    #[must_use]
    pub fn lacks_only_ready(&self) -> Option<TxnStatus> {
        let front = self.journal.in_flight().front()?;
        let over = front.closed
            && front.has_told_error()
            && !front.reply.inside_message()
            && self.ready_ends_front();
        let kinds = self.kinds(front).filter(|_| over)?;
        let error = |c: &CommandResult| matches!(c.outcome, Outcome::Error(_));
        let at = front.reply.commands.iter().position(error)?;
        status_behind_error(self.status, &kinds, at)
    }

    /// The statements that a sequence of client messages runs.
    #[must_use]
    pub fn kinds_of(&self, messages: &[u8]) -> Vec<Kind> {
        self.kinds_behind(&mut Vec::new(), messages)
    }

    /// The same behind other messages whose Parses, not answered yet, are in `parsed`.
    fn kinds_behind<'a>(
        &self,
        parsed: &mut Vec<(&'a [u8], Kind)>,
        messages: &'a [u8],
    ) -> Vec<Kind> {
        let mut kinds = Vec::new();
        let before = parsed.len();
        let mut rest = messages;
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let frame = rest.get(..header.len).unwrap_or(rest);
            let body = frame.get(5..).unwrap_or_default();
            match header.tag {
                frontend::QUERY => kinds.extend(grammar::statements(&text(until_zero(body)))),
                frontend::FUNCTION_CALL => kinds.push(Kind::Opaque),
                frontend::PARSE => parsed.push(parse_kind(frame)),
                frontend::BIND => {
                    let portal = until_zero(body);
                    let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                    let here = parsed.iter().rposition(|(n, _)| *n == name);
                    let known = || self.prepared.get(name).map(|p| parse_kind(&p.parse).1);
                    let here = here.and_then(|at| {
                        let kind = parsed.get(at)?.1;
                        // It may have been refused, because there is one of this name.
                        let refused = at < before && !name.is_empty();
                        let other = refused.then(known).flatten().filter(|k| *k != kind);
                        Some(other.map_or(kind, |_| Kind::Opaque))
                    });
                    let gone = || self.prepared.at_begin().find(|(n, _)| *n == name);
                    let kind = here
                        .or_else(known)
                        .or_else(|| gone().map(|p| parse_kind(&p.1.parse).1));
                    kinds.push(kind.unwrap_or(Kind::Opaque));
                }
                // Continues a portal that is open already.
                frontend::EXECUTE if !kinds.is_empty() || parsed.len() > before => {}
                frontend::EXECUTE => kinds.push(Kind::Read),
                _ => {}
            }
            rest = rest.get(header.len..).unwrap_or_default();
        }
        kinds
    }

    /// The statements' texts that a sequence of client messages runs.
    #[must_use]
    pub fn texts_of(&self, messages: &[u8]) -> Vec<String> {
        let mut texts = Vec::new();
        let mut rest = messages;
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let frame = rest.get(..header.len).unwrap_or(rest);
            let body = frame.get(5..).unwrap_or_default();
            match header.tag {
                frontend::QUERY => texts.push(text(until_zero(body)).into_owned()),
                frontend::PARSE => texts.push(parse_text(frame).into_owned()),
                frontend::BIND => {
                    let portal = until_zero(body);
                    let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                    texts.extend(
                        self.prepared
                            .get(name)
                            .map(|p| parse_text(&p.parse).into_owned()),
                    );
                }
                _ => {}
            }
            rest = rest.get(header.len..).unwrap_or_default();
        }
        texts
    }

    /// Bound values of a sequence of client messages that could be the name of a custom setting
    /// (`a.b`); text has the same bytes in both formats.
    pub(super) fn bound_names(&self, messages: &[u8]) -> Vec<String> {
        let mut names = Vec::new();
        let mut rest = messages;
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            let frame = rest.get(..header.len).unwrap_or(rest);
            if header.tag == frontend::BIND
                && let Ok(bind) = helios_wire::message::read::bind(helios_wire::body(frame))
            {
                let values = bind.params.iter().flatten();
                let texts = values.filter_map(|v| std::str::from_utf8(v).ok());
                names.extend(texts.filter(|t| is_custom_name(t)).map(str::to_owned));
            }
            rest = rest.get(header.len..).unwrap_or_default();
        }
        names
    }

    /// The identifier, where the last statement of an exchange is PREPARE TRANSACTION.
    #[must_use]
    pub fn prepares_transaction(&self, exchange: &Exchange) -> Option<String> {
        let texts = self.texts_of(self.journal.exchange_bytes(exchange));
        grammar::prepared_transaction(texts.last()?)
    }

    /// What is in flight, for the decision.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        let exchanges = self.journal.in_flight().iter().enumerate();
        let mut parsed = Vec::new();
        let mut kinds = |e: &Exchange| {
            let messages = self.journal.exchange_bytes(e);
            (!e.cut).then(|| self.kinds_behind(&mut parsed, messages))
        };
        exchanges
            .map(|(at, e)| InFlight {
                kinds: kinds(e),
                commit_answered: e.reply.completed(b"COMMIT")
                    || e.reply.completed(b"PREPARE TRANSACTION"),
                failed: e.reply.failed(),
                undone: e.undone,
                evidence: self.evidence(e.transaction),
                only_reads: e.only_reads,
                ended: e.ended,
                copy_ended: e.copies_ended > 0,
                answered: at == 0
                    && e.closed
                    && (self.expect.only_sync_is_owed() || e.all_answered()),
                speaks: e.speaks,
                mark: match (e.mark, e.fate) {
                    (None, _) => MarkState::None,
                    (Some(_), _) if e.mixed => MarkState::Mixed,
                    (Some(_), None) => MarkState::Sent,
                    (Some(_), Some(fate)) => MarkState::Found(fate),
                },
            })
            .collect()
    }

    pub(super) fn evidence(&self, transaction: u64) -> Evidence {
        let mut known = None;
        let mut written = false;
        for x in self.xids.iter().filter(|x| x.transaction <= transaction) {
            known = known.or(x.known);
            written |= x.dirty || x.pending > 0 || (x.asked && !x.answered);
        }
        match known {
            Some(xid) => Evidence::Known(xid),
            None if written || self.xids.is_empty() => Evidence::Unknown,
            None => Evidence::NothingWritten,
        }
    }
}

/// Bytes up to the first zero (or all).
#[must_use]
pub fn until_zero(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes.get(..end).unwrap_or_default()
}

fn text(sql: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(sql)
}

fn parse_kind(frame: &[u8]) -> (&[u8], Kind) {
    let body = frame.get(5..).unwrap_or_default();
    let name = until_zero(body);
    let sql = until_zero(body.get(name.len() + 1..).unwrap_or_default());
    (name, grammar::single(&text(sql)))
}

fn parse_text(frame: &[u8]) -> std::borrow::Cow<'_, str> {
    let body = frame.get(5..).unwrap_or_default();
    let name = until_zero(body);
    text(until_zero(body.get(name.len() + 1..).unwrap_or_default()))
}

/// Whether PostgreSQL would take it as the name of a custom setting (`valid_custom_variable_name`
/// in guc.c): identifiers, and dots between them.
fn is_custom_name(text: &str) -> bool {
    let begins = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
    let goes_on = |c: char| begins(c) || c.is_ascii_digit() || c == '$';
    let identifier = |part: &str| part.starts_with(begins) && part.chars().all(goes_on);
    text.len() <= MAX_NAME && text.contains('.') && text.split('.').all(identifier)
}

/// Longest name of a custom setting that is looked for.
const MAX_NAME: usize = 256;
/// The status behind an error in the statement of this number, of an exchange that began with
/// `status`; `None` where what was run cannot be told. A COMMIT that fails leaves nothing open.
fn status_behind_error(status: TxnStatus, kinds: &[Kind], at: usize) -> Option<TxnStatus> {
    let mut open = status != TxnStatus::Idle;
    let run: Vec<Kind> = kinds
        .iter()
        .copied()
        .filter(|k| *k != Kind::Empty)
        .collect();
    for kind in run.iter().take(at) {
        match kind {
            Kind::Begin => open = true,
            Kind::Commit | Kind::Rollback => open = false,
            Kind::Unread if open => return None,
            _ => {}
        }
    }
    match run.get(at) {
        Some(Kind::Unread) if open => None,
        Some(Kind::Commit | Kind::CommitAndChain) => Some(TxnStatus::Idle),
        _ if open => Some(TxnStatus::Failed),
        _ => Some(TxnStatus::Idle),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_an_error_leaves_a_transaction() {
        use Kind::{Begin, Commit, Empty, Opaque, Rollback, Unread, Write};
        use TxnStatus::{Failed, Idle, Open};
        for (status, kinds, at, wanted) in [
            (Idle, &[Write][..], 0, Some(Idle)),
            (Idle, &[Write, Write, Commit], 1, Some(Idle)),
            (Idle, &[Begin, Write, Commit], 1, Some(Failed)),
            (Idle, &[Empty, Begin, Write, Commit], 1, Some(Failed)),
            (Idle, &[Begin, Write, Commit], 2, Some(Idle)),
            (Idle, &[Begin, Write, Commit, Write], 3, Some(Idle)),
            (Open, &[Write, Commit], 0, Some(Failed)),
            (Open, &[Commit], 0, Some(Idle)),
            (Open, &[Rollback, Write], 1, Some(Idle)),
            (Failed, &[Write], 0, Some(Failed)),
            (Idle, &[Opaque], 0, Some(Idle)),
            (Open, &[Opaque], 0, Some(Failed)),
            (Idle, &[Begin, Opaque, Commit], 1, Some(Failed)),
            (Idle, &[Unread], 1, Some(Idle)),
            (Open, &[Unread], 0, None),
            (Open, &[Unread], 1, None),
        ] {
            let found = status_behind_error(status, kinds, at);
            assert_eq!(found, wanted, "{status:?} {kinds:?} {at}");
        }
    }
}
