//! What a client is told when its transaction cannot go on as if nothing had happened.
//!
//! The invariant: the truth, once; afterwards the session is usable.

use bytes::BytesMut;
use helios_session::TxnStatus;
use helios_session::grammar::Kind;
use helios_session::journal::Exchange;
use helios_session::tracker::Alone;
use helios_telemetry::metrics::CommitOutcome;
use helios_wire::message::back;
use helios_wire::{ErrorFields, SqlState, frontend, peek_header};

use super::rebuild::Attempt;
use super::registry::lock;
use super::session::{End, Rerun, Session};

/// Why something is lost that came behind a change of the session that nobody had asked for yet.
pub(super) const STATE_UNKNOWN: &str = "the session's new state was not known yet";

impl Session {
    /// A COMMIT is known to have committed: the client gets what is still missing of its answer.
    pub(super) fn deliver_commit(&mut self) -> Result<(), Attempt> {
        let journal = self.tracker.journal();
        let Some(front) = journal.in_flight().front() else {
            return Ok(());
        };
        let kinds = self.tracker.kinds(front);
        let chain = kinds.is_some_and(|k| k.contains(&Kind::CommitAndChain));
        let Some(reply) = self.rest_of_commit(front) else {
            return self.outcome_unknown("the transaction has committed, results of it are lost");
        };
        self.client.output.extend_from_slice(&reply);
        self.forget_rerun();
        if !chain {
            self.finish_front();
            return Ok(());
        }
        // The next transaction, which has nothing in it, went with the old backend.
        back::ready_for_query(&mut self.client.output, TxnStatus::Open.byte());
        self.resolved_front();
        if self.tracker.is_between() {
            self.tracker.abandon(TxnStatus::Open);
            return Ok(());
        }
        self.answer_in_flight(&retryable("the transaction was begun by COMMIT AND CHAIN"))
    }

    /// A COMMIT behind messages whose answer is known has committed: answers all of them. False
    /// where that cannot be done.
    pub(super) fn deliver_closes(&mut self, before: usize) -> bool {
        if self.skip.is_some() || !self.tracker.only_closes_before(before) {
            return false;
        }
        for _ in 0..before {
            for _ in 0..self.tracker.answer_closes() {
                self.client.output.extend_from_slice(b"3\0\0\0\x04");
            }
            let status = self.tracker.status().byte();
            back::ready_for_query(&mut self.client.output, status);
        }
        true
    }

    /// What the client has not got yet of the answer to an exchange that ended with a COMMIT;
    /// `None` where it cannot be known.
    fn rest_of_commit(&self, front: &Exchange) -> Option<BytesMut> {
        let bytes = self.tracker.journal().exchange_bytes(front);
        let mut kinds = self.tracker.kinds(front)?;
        kinds.retain(|k| *k != Kind::Empty);
        if !front.closed {
            return None;
        }
        let tag = match self.tracker.ends_prepared(front) {
            Some((_, true)) => "COMMIT PREPARED",
            Some((_, false)) => "ROLLBACK PREPARED",
            None if self.tracker.prepares_transaction(front).is_some() => "PREPARE TRANSACTION",
            None => "COMMIT",
        };
        if kinds.len() == 1 {
            let delivered = self.skip.map_or(front.reply.messages, |s| s.messages);
            return Some(committed_reply(bytes, delivered, tag));
        }
        // Several statements in one query: all but the COMMIT must have been answered.
        let answered = front.reply.commands.len() + 1 == kinds.len() && self.skip.is_none();
        let simple = bytes.first() == Some(&frontend::QUERY);
        (answered && simple).then(|| committed_reply(bytes, 0, tag))
    }

    /// The exchange in front is over, and its client has everything but ReadyForQuery.
    pub(super) fn finish_front(&mut self) {
        back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
        self.resolved_front();
    }

    /// The same, for one whose answer was counted.
    pub(super) fn finish_counted(&mut self) {
        self.forget_rerun();
        self.finish_front();
    }

    /// The transaction of the exchange in front has ended on the backend that is gone.
    fn resolved_front(&mut self) {
        self.tracker.committed_front();
        self.ended_by_us();
        if self.tracker.take_touched() {
            // What it changed in the session went with its backend.
            let fields = retryable(STATE_UNKNOWN);
            self.failed(&fields, "state unknown");
            self.refuse = Some(fields);
        }
        self.shared
            .metrics
            .commit_resolution(CommitOutcome::Committed);
        self.shared.metrics.losses_prevented.inc();
        lock(&self.shared.report).resolved += 1;
    }

    /// What is in front has committed by itself, and what it returned is lost, or is not what the
    /// client was given.
    pub(super) fn results_lost(&mut self) -> Result<(), Attempt> {
        let front = self.tracker.journal().in_flight().front();
        let several = front.is_some_and(|e| e.statements > 1);
        let text = match several {
            true => "the statements were committed, but their results were lost",
            false => "the statement was committed, but its result was lost",
        };
        let fields = ErrorFields::error(
            SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
            format!("{text}, because the primary failed"),
        )
        .hint(match several {
            true => "Do not run them again: they took effect once.",
            false => "Do not run it again: it took effect once.",
        });
        self.failed(&fields, "results lost");
        self.answer_front(&fields)
    }

    /// What is in front is several transactions: the first has committed, and nobody knows how far
    /// the others came.
    pub(super) fn first_committed(&mut self) -> Result<(), Attempt> {
        let fields = ErrorFields::error(
            SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
            "the first transaction of the request was committed, and what became of the rest is \
             unknown, because the primary failed while it ran",
        )
        .detail("Statements, a procedure or a block committed, and may have gone on.")
        .hint("Look in the database how far it came before trying the rest again.");
        self.failed(&fields, "rest unknown");
        self.answer_front(&fields)
    }

    /// Answers the exchange in front, which has committed, with an error; those behind it have
    /// their own outcomes.
    fn answer_front(&mut self, fields: &ErrorFields) -> Result<(), Attempt> {
        let front = self.tracker.journal().in_flight().front();
        let whole = |e: &&Exchange| e.closed && !e.reply.inside_message();
        let Some(front) = front.filter(whole).filter(|_| self.client.passing == 0) else {
            return self.answer_in_flight(fields);
        };
        if !self.knows_of_an_error(front) {
            fields.write_error(&mut self.client.output);
        }
        for _ in 0..front.ready_owed {
            back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
        }
        self.forget_rerun();
        self.resolved_front();
        Ok(())
    }

    pub(super) fn outcome_unknown(&mut self, why: &str) -> Result<(), Attempt> {
        self.shared
            .metrics
            .commit_resolution(CommitOutcome::Unknown);
        let fields = ErrorFields::error(
            SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
            "the outcome of the transaction is unknown, because the primary failed while it ran",
        )
        .detail(why.to_owned())
        .hint("Look in the database whether it took effect before trying it again.");
        self.failed(&fields, "outcome unknown");
        self.answer_in_flight(&fields)
    }

    /// Answers everything in flight with an error; afterwards the session is idle.
    pub(super) fn answer_in_flight(&mut self, fields: &ErrorFields) -> Result<(), Attempt> {
        let mut unfinished = false;
        for (at, exchange) in self.tracker.journal().in_flight().iter().enumerate() {
            if exchange.reply.inside_message() {
                return Err(Attempt::End(End::Fatal(fields.clone())));
            }
            let knows = match at {
                0 => self.knows_of_an_error(exchange),
                _ => exchange.has_told_error(),
            };
            if !knows {
                fields.write_error(&mut self.client.output);
            }
            for _ in 0..exchange.ready_owed {
                back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
            }
            unfinished |= !exchange.closed;
        }
        self.forget_rerun();
        self.discarding = unfinished;
        self.dropping_rest = self.client.passing > 0;
        self.tracker.abandon(TxnStatus::Idle);
        self.ended_by_us();
        self.charge();
        Ok(())
    }

    /// Whether the client has been told an error in the exchange in front, by this backend or by one
    /// before it: it must not be told a second one.
    fn knows_of_an_error(&self, front: &Exchange) -> bool {
        let before = self.skip.is_some_and(|skip| skip.failed);
        self.rerun.told || before || front.has_told_error()
    }

    /// What is in front will not run again.
    fn forget_rerun(&mut self) {
        (self.skip, self.rerun, self.forced) = (None, Rerun::default(), None);
    }

    /// The open transaction is lost, and what is in flight goes to a failed block: the client is
    /// told there, unless it has been told that the transaction was rolled back.
    pub(super) fn give_up_transaction(&mut self, fields: ErrorFields) {
        // The end of a block gives a failed one what it gave the client: that is left out.
        let told = self.skip.is_some_and(|skip| skip.failed);
        if told || self.rerun.differed || !self.ends_block() {
            self.skip = None;
        }
        self.rerun.told |= told;
        if self.skip.is_some_and(|skip| skip.rolled_back) {
            self.instead = None;
            return;
        }
        self.failed(&fields, "not protected");
        self.instead = Some(fields);
    }

    /// Whether a COMMIT may be running.
    pub(super) fn commit_in_flight(&self) -> bool {
        use Kind::{Commit, CommitAndChain, EndPrepared, Unread};
        let ends = |k: &Kind| matches!(k, Commit | CommitAndChain | EndPrepared | Unread);
        let front = self.tracker.journal().in_flight().front();
        front.is_some_and(|e| {
            self.tracker
                .kinds(e)
                .is_none_or(|kinds| kinds.iter().any(ends))
        })
    }

    /// Whether what is in front ends a transaction block and does nothing else.
    fn ends_block(&self) -> bool {
        use Kind::{Chain, Commit, CommitAndChain, Rollback};
        let front = self.tracker.journal().in_flight().front();
        let kinds = front.and_then(|front| self.tracker.kinds(front));
        let ends = |kinds: Vec<Kind>| {
            matches!(
                kinds.as_slice(),
                [Rollback | Chain | Commit | CommitAndChain]
            )
        };
        kinds.is_some_and(ends)
    }

    /// The transaction that was open is over, and no server says so.
    fn ended_by_us(&mut self) {
        self.note_age(TxnStatus::Idle);
        self.count_ended(TxnStatus::Idle, Alone::Nothing);
    }

    pub(super) fn state_lost(&mut self) {
        // The exchange itself was answered; only ReadyForQuery had been held back.
        back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
        self.tracker.abandon(TxnStatus::Idle);
        self.ended_by_us();
        let fields = retryable(STATE_UNKNOWN);
        self.failed(&fields, "state unknown");
        self.refuse = Some(fields);
    }
}

pub(super) fn retryable(reason: &str) -> ErrorFields {
    ErrorFields::error(
        SqlState::SERIALIZATION_FAILURE,
        "the transaction was aborted, because it could not be moved to the new primary",
    )
    .detail(reason.to_owned())
    .hint("Try the transaction again.")
}

/// The reply that a committed exchange would have got, without its first `delivered` messages and
/// without ReadyForQuery.
#[must_use]
pub(super) fn committed_reply(messages: &[u8], delivered: u64, tag: &str) -> BytesMut {
    let mut out = BytesMut::new();
    let mut rest = messages;
    let mut parts: Vec<BytesMut> = Vec::new();
    let mut part = |build: &dyn Fn(&mut BytesMut)| {
        let mut bytes = BytesMut::new();
        build(&mut bytes);
        parts.push(bytes);
    };
    while let Ok(Some(header)) = peek_header(rest) {
        let (frame, tail) = rest.split_at_checked(header.len).unwrap_or((rest, &[]));
        use helios_wire::frontend as f;
        match header.tag {
            f::QUERY => {
                part(&|o| back::command_complete(o, tag));
            }
            f::PARSE => part(&|o| o.extend_from_slice(b"1\0\0\0\x04")),
            f::BIND => part(&|o| o.extend_from_slice(b"2\0\0\0\x04")),
            f::DESCRIBE => {
                if frame.get(5) == Some(&b'S') {
                    part(&|o| o.extend_from_slice(b"t\0\0\0\x06\0\0"));
                }
                part(&|o| o.extend_from_slice(b"n\0\0\0\x04"));
            }
            f::EXECUTE => part(&|o| back::command_complete(o, tag)),
            f::CLOSE => part(&|o| o.extend_from_slice(b"3\0\0\0\x04")),
            _ => {}
        }
        rest = tail;
    }
    let skip = usize::try_from(delivered).unwrap_or(usize::MAX);
    for part in parts.into_iter().skip(skip) {
        out.extend_from_slice(&part);
    }
    out
}
