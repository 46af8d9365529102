//! Ends of transactions that have their own kind of evidence: COMMIT PREPARED and ROLLBACK
//! PREPARED, and a COMMIT behind messages whose answer is known beforehand.

use helios_api::protection::Unprotected;
use helios_wire::{backend, frontend};

use super::texts::until_zero;
use super::{ServerStep, Tracker};
use crate::TxnStatus;
use crate::expect::{Expect, Owner};
use crate::grammar::{self, Kind};
use crate::journal::Exchange;
use crate::keyword::ends_prepared;

impl Tracker {
    /// Whether a frame begins an exchange that ends a prepared transaction; the question for it is
    /// expected then. It is asked in front, because afterwards the name is gone.
    pub(super) fn asks_gid(&mut self, tag: u8, frame: &[u8]) -> bool {
        if !matches!(tag, frontend::QUERY | frontend::PARSE | frontend::BIND) {
            return false;
        }
        let body = frame.get(5..).unwrap_or_default();
        let sql = match tag {
            frontend::QUERY => until_zero(body),
            frontend::PARSE => parsed_text(body),
            _ => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                let statement = self.statement(name);
                parsed_text(statement.map_or(&[], |s| s.parse.get(5..).unwrap_or_default()))
            }
        };
        if !ends_prepared(sql) || !self.opens_exchange(tag) || self.expect.awaits_sync() {
            return false;
        }
        let Some((gid, _)) = grammar::ended_prepared(&String::from_utf8_lossy(sql)) else {
            return false;
        };
        self.gid = Some(gid);
        for e in [
            Expect::Parse,
            Expect::Bind,
            Expect::Execute,
            Expect::Close,
            Expect::Sync,
        ] {
            self.expect.push(e, Owner::Gid);
        }
        true
    }

    /// The identifier that [`super::Before::AskGid`] is about.
    pub fn take_gid(&mut self) -> Option<String> {
        self.gid.take()
    }

    /// An answer to the question for a prepared transaction, which belongs to the exchange in
    /// front.
    pub(super) fn gid_answered(&mut self, tag: u8, to: Expect, frame: &[u8]) -> ServerStep {
        if let Some(front) = self.journal.in_flight_mut().front_mut() {
            match tag {
                backend::DATA_ROW => {
                    let id = super::server::text_column(frame.get(5..).unwrap_or_default());
                    front.ends = Some(id.and_then(|id| u32::try_from(id).ok()));
                }
                backend::COMMAND_COMPLETE => front.ends = front.ends.or(Some(None)),
                _ => {}
            }
        }
        ServerStep::Own(to)
    }

    /// The identifier of the prepared transaction that an exchange ends, and whether it commits it.
    #[must_use]
    pub fn ends_prepared(&self, exchange: &Exchange) -> Option<(String, bool)> {
        let texts = self.texts_of(self.journal.exchange_bytes(exchange));
        grammar::ended_prepared(texts.first()?)
    }

    /// The exchange in front failed, and the transaction that it leaves open waits for its end: where
    /// the rest of it, which was skipped, holds a COMMIT, it must not run again. It may have failed of
    /// what is not so any more (a full disk, a lock, another's row), and would commit what its client
    /// knows to have failed.
    pub(super) fn note_commit_behind_error(&mut self, status: TxnStatus) {
        let Some(front) = self.journal.in_flight().front() else {
            return;
        };
        if status == TxnStatus::Idle || !front.reply.failed() || !self.may_hold_commit(front) {
            return;
        }
        let reason = Unprotected::CommitBehindError;
        self.journal.lose(reason, reason.text().into());
    }

    /// Whether a COMMIT may be among the statements of an exchange. Of a text that PostgreSQL could not
    /// read nothing has run, nor will.
    fn may_hold_commit(&self, exchange: &Exchange) -> bool {
        use Kind::{Commit, CommitAndChain, Unread};
        let simple = self.journal.exchange_bytes(exchange).first() == Some(&frontend::QUERY);
        if simple && exchange.reply.is_syntax_error() {
            return false;
        }
        // One whose text was not kept does not run again.
        let kinds = self.kinds(exchange).unwrap_or_default();
        let commits = |k: &Kind| matches!(k, Commit | CommitAndChain | Unread);
        kinds.iter().any(commits)
    }

    /// Whether everything in flight before exchange `at` only closes statements and portals, so that
    /// its answer is known.
    #[must_use]
    pub fn only_closes_before(&self, at: usize) -> bool {
        let mut before = self.journal.in_flight().iter().take(at);
        before.all(|e| self.closes(e).is_some())
    }

    /// Takes the exchange in front, which only closes, as answered; how many CloseComplete are
    /// missing of its answer.
    pub fn answer_closes(&mut self) -> u64 {
        let Some(front) = self.journal.in_flight().front() else {
            return 0;
        };
        let all = self.closes(front).unwrap_or_default();
        let missing = all.saturating_sub(front.reply.messages);
        for _ in 0..missing {
            self.named_done(backend::CLOSE_COMPLETE, &[]);
        }
        self.expect.drop_cycles(1);
        self.finish(self.status);
        missing
    }

    /// The number of Close messages in an exchange that holds nothing else.
    fn closes(&self, exchange: &Exchange) -> Option<u64> {
        if exchange.cut || !exchange.closed || exchange.ready_owed != 1 || exchange.reply.failed() {
            return None;
        }
        let mut count = 0;
        let mut rest = self.journal.exchange_bytes(exchange);
        while let Ok(Some(header)) = helios_wire::peek_header(rest) {
            match header.tag {
                frontend::CLOSE => count += 1,
                frontend::SYNC | frontend::FLUSH => {}
                _ => return None,
            }
            rest = rest.get(header.len..).unwrap_or_default();
        }
        Some(count)
    }
}

/// The text in the body of a Parse message.
fn parsed_text(body: &[u8]) -> &[u8] {
    let name = until_zero(body);
    until_zero(body.get(name.len() + 1..).unwrap_or_default())
}
