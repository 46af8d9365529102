//! The journal of one session: what its client sent since the open transaction began, and what it
//! was answered.
//!
//! One byte log holds the client's messages as they came; exchanges are ranges of it. Answered
//! exchanges of the open transaction are records, the rest is in flight. What they were answered is
//! in a second log, packed. The logs are memory until they are given places elsewhere ([`Spill`]);
//! they come back with the end of the transaction. The invariant: records and exchanges cover the
//! first log without a gap, in order, and records the second.

use std::collections::VecDeque;
use std::ops::Range;

use helios_api::Lsn;
use helios_api::protection::Unprotected;

use crate::TxnStatus;
use crate::evidence::{Ended, Fate, Mark};
use crate::log::Log;
pub use crate::log::Spill;
use crate::reply::Reply;
use crate::script::Speaks;
use crate::tracker::{Alone, Runs};

/// Bytes of one exchange in flight that are kept although its transaction's journal is lost.
const KEEP_IN_FLIGHT: usize = 16 * 1024;

/// Capacity that the log keeps between transactions.
const KEEP: usize = 16 * 1024;

/// An exchange that was answered completely, inside the open transaction.
#[derive(Debug)]
pub struct Record {
    range: Range<usize>,
    /// What the client was answered, in the log of answers.
    answer: Range<usize>,
    /// Number of the exchange in its session, from 1.
    pub sequence: u64,
    /// When it began, in microseconds since the session did.
    pub at_micros: u64,
    /// WAL position of the server behind it, where it was asked for.
    pub wal: Option<Lsn>,
}

/// An exchange that was sent, at least in part, and not answered completely.
#[derive(Debug, Default)]
pub struct Exchange {
    start: usize,
    end: usize,
    /// Number of the exchange in its session, from 1.
    pub sequence: u64,
    /// When it began, in microseconds since the session did.
    pub at_micros: u64,
    /// ReadyForQuery messages that will end it.
    pub ready_owed: u32,
    /// Its messages were too large to keep.
    pub cut: bool,
    /// Its last message has been sent.
    pub closed: bool,
    /// Copy data came after its Sync: the next Sync belongs to it as well.
    pub copy_tail: bool,
    /// A Parse or Query hinted at a write.
    pub writes: bool,
    /// It may have changed session state.
    pub touches: bool,
    /// Number of the transaction that it runs in, as projected.
    pub transaction: u64,
    /// The server has undone it (planned move: cancelled by us).
    pub undone: bool,
    /// Outside a transaction block: the mark that went in front of its first writing statement.
    pub mark: Option<Mark>,
    /// How much of it the mark speaks for.
    pub speaks: Speaks,
    /// The mark is set by its Bind.
    pub bound: bool,
    /// Number of statements, where it is a simple query of several with a mark in front.
    pub statements: usize,
    /// Whether it is one plain statement, and nothing else.
    pub plain: Runs,
    /// What became of the transaction with the mark, once it was looked for.
    pub fate: Option<Fate>,
    /// It ends a prepared transaction: what the server told of that one in front, its id as log
    /// records and locks show it; the inner `None`: there was none of this name.
    pub ends: Option<Option<u32>>,
    /// Whether it was found to have ended it.
    pub ended: Option<Ended>,
    /// Copies into the server that have begun.
    pub copies: u32,
    /// Copies into the server whose data the client has ended.
    pub copies_ended: u32,
    /// What the Sync waits for that ends the extended form which the proxy gave it.
    pub sync_owed: SyncOwed,
    /// Outside a transaction block and without a mark: whether it is proven that it cannot have
    /// written, once that was asked.
    pub only_reads: Option<bool>,
    /// It runs something.
    pub runs: bool,
    /// It runs something that reads only if it is marked, or proven to: its outcome rests on that.
    pub doubtful: bool,
    /// Something in it may begin or end a transaction: the mark does not speak for all of it.
    pub mixed: bool,
    /// What has been delivered to the client.
    pub reply: Reply,
    /// Where the reply begins in what is to be written to the client, if that is known.
    pub reply_at: Option<usize>,
    /// Something of the reply may have been written to the client.
    pub shown: bool,
    /// WAL position behind it, where it was asked for.
    pub wal: Option<Lsn>,
}

/// What the Sync waits for that ends the extended form of a simple query.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SyncOwed {
    /// Nothing: it has been sent, or there is none to send.
    #[default]
    No,
    /// The reply, which is looked at before the commit.
    BehindReply,
    /// The end of the copy data, or an error.
    BehindData,
}

impl Exchange {
    /// Where the reply begins that can still be taken back: the client has seen nothing of it.
    #[must_use]
    pub fn unseen_from(&self) -> Option<usize> {
        self.reply_at.filter(|_| !self.shown)
    }

    /// The client has been given an error in it. What runs again is compared first, and is not
    /// given to anybody meanwhile.
    #[must_use]
    pub fn has_told_error(&self) -> bool {
        self.reply.failed() && self.reply_at.is_some()
    }

    /// A simple query of several statements, all of which have been answered.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        self.statements > 0 && self.reply.commands.len() >= self.statements
    }

    /// The server waits for copy data, or for their end.
    #[must_use]
    pub fn is_copying(&self) -> bool {
        self.copies > self.copies_ended
    }

    /// What it ran outside a transaction block, when it took the session from one status to the
    /// other.
    #[must_use]
    pub fn alone(&self, before: TxnStatus, after: TxnStatus) -> Alone {
        if !self.runs || before != TxnStatus::Idle || after != TxnStatus::Idle {
            return Alone::Nothing;
        }
        let marked = self.mark.is_some() && !self.mixed && self.speaks == Speaks::All;
        if marked || !(self.doubtful || self.mark.is_some()) {
            Alone::Provable
        } else {
            Alone::InDoubt
        }
    }
}

/// The journal.
#[derive(Debug, Default)]
pub struct Journal {
    log: Log,
    answers: Log,
    records: Vec<Record>,
    in_flight: VecDeque<Exchange>,
    /// Messages of the transaction or exchange are not kept any more, and why.
    lost: Option<(Unprotected, String)>,
    /// Why the place of the log has not taken a message.
    refused: Option<Box<str>>,
}

impl Journal {
    /// Opens an exchange.
    pub fn open(&mut self, sequence: u64, at_micros: u64, transaction: u64) -> &mut Exchange {
        let at = self.log.len();
        self.in_flight.push_back(Exchange {
            start: at,
            end: at,
            sequence,
            at_micros,
            transaction,
            ..Exchange::default()
        });
        let last = self.in_flight.len() - 1;
        &mut self.in_flight[last]
    }

    /// Appends bytes of the exchange that was opened last.
    pub fn append(&mut self, bytes: &[u8]) {
        let Some(exchange) = self.in_flight.back_mut() else {
            return;
        };
        if exchange.cut {
            return;
        }
        if self.lost.is_some() && exchange.end - exchange.start + bytes.len() > KEEP_IN_FLIGHT {
            self.log.truncate(exchange.start);
            exchange.end = exchange.start;
            exchange.cut = true;
            return;
        }
        match self.log.append(bytes) {
            Ok(()) => exchange.end = self.log.len(),
            Err(why) => {
                self.refused = Some(why.into());
                self.log.truncate(exchange.start);
                exchange.end = exchange.start;
                exchange.cut = true;
            }
        }
    }

    /// Moves messages and answers to other places than memory.
    ///
    /// # Errors
    /// A place takes less than there is; what is not in its place yet stays where it is.
    pub fn spill(&mut self, log: Box<dyn Spill>, answers: Box<dyn Spill>) -> Result<(), String> {
        self.answers.spill(answers)?;
        self.log.spill(log)
    }

    /// Whether anything of it is elsewhere.
    #[must_use]
    pub fn is_spilled(&self) -> bool {
        !self.log.is_memory() || !self.answers.is_memory()
    }

    /// Whether a message could not be kept ([`Self::take_refusal`]).
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.refused.is_some()
    }

    /// Why a message could not be kept, once: the journal is to be given up ([`Self::lose`]).
    pub fn take_refusal(&mut self) -> Option<String> {
        self.refused.take().map(String::from)
    }

    /// Ends the exchange in front; its messages stay while a transaction is open.
    pub fn complete(&mut self, status: TxnStatus) -> Option<Exchange> {
        let mut exchange = self.in_flight.pop_front()?;
        if status == TxnStatus::Idle {
            self.forget_to(exchange.end);
            return Some(exchange);
        }
        if self.lost.is_some() {
            self.drain_to(exchange.end);
        } else {
            self.keep(&mut exchange);
        }
        Some(exchange)
    }

    /// Makes a record of an exchange; where its answer finds no place, the journal is given up.
    fn keep(&mut self, exchange: &mut Exchange) {
        let mut reply = std::mem::take(&mut exchange.reply);
        reply.kept.settle();
        let start = self.answers.len();
        if let Err(why) = self.answers.append_with(|to| reply.pack(to)) {
            self.lose(Unprotected::JournalLimit, why.clone());
            self.refused = Some(why.into());
            return;
        }
        self.records.push(Record {
            range: exchange.start..exchange.end,
            answer: start..self.answers.len(),
            sequence: exchange.sequence,
            at_micros: exchange.at_micros,
            wal: exchange.wal,
        });
    }

    /// Forgets the records: the transaction is over. Later exchanges stay.
    fn forget_to(&mut self, end: usize) {
        self.records.clear();
        self.records.shrink_to(KEEP / size_of::<Record>());
        self.answers.clear(KEEP);
        if self.in_flight.is_empty() {
            self.lost = None;
            self.log.clear(KEEP);
            return;
        }
        self.drain_to(end);
    }

    fn drain_to(&mut self, end: usize) {
        self.log.drop_front(end);
        for exchange in &mut self.in_flight {
            exchange.start = exchange.start.saturating_sub(end);
            exchange.end = exchange.end.saturating_sub(end);
        }
    }

    /// Gives up keeping records: frees their memory, remembers why until the transaction is over.
    /// Small exchanges in flight stay, so that a COMMIT among them can still be recognised.
    pub fn lose(&mut self, reason: Unprotected, why: String) {
        self.lost.get_or_insert((reason, why));
        self.records = Vec::new();
        self.answers = Log::default();
        let front = self.in_flight.front().map_or(self.log.len(), |e| e.start);
        self.drain_to(front);
        if let Some(last) = self.in_flight.back_mut()
            && last.end - last.start > KEEP_IN_FLIGHT
        {
            self.log.truncate(last.start);
            last.end = last.start;
            last.cut = true;
        }
        self.log.shrink_to(KEEP);
    }

    /// Forgets everything: records, what is in flight, and why anything was lost.
    pub fn abandon(&mut self) {
        *self = Self::default();
    }

    /// Notes the server's WAL position behind the last record.
    pub fn note_wal(&mut self, wal: Option<Lsn>) {
        if let Some(record) = self.records.last_mut() {
            record.wal = wal.max(record.wal);
        }
    }

    /// Why messages are not kept, if so.
    #[must_use]
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_ref().map(|(_, why)| why.as_str())
    }

    /// The reason's name.
    #[must_use]
    pub fn lost_reason(&self) -> Option<Unprotected> {
        self.lost.as_ref().map(|(reason, _)| *reason)
    }

    /// Answered exchanges of the open transaction.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Exchanges in flight.
    #[must_use]
    pub fn in_flight(&self) -> &VecDeque<Exchange> {
        &self.in_flight
    }

    /// Exchanges in flight, to change.
    pub fn in_flight_mut(&mut self) -> &mut VecDeque<Exchange> {
        &mut self.in_flight
    }

    /// Drops the exchange in front without a record (it was answered with an error of ours).
    pub fn drop_front(&mut self) -> Option<Exchange> {
        self.in_flight.pop_front()
    }

    /// The messages of a record.
    #[must_use]
    pub fn record_bytes(&self, record: &Record) -> &[u8] {
        let range = record.range.clone();
        self.log.bytes().get(range).unwrap_or_default()
    }

    /// What the client was answered to a record.
    #[must_use]
    pub fn reply(&self, record: &Record) -> Reply {
        Reply::unpack(self.answer_bytes(record))
    }

    /// The same, packed: equal bytes are equal replies.
    #[must_use]
    pub fn answer_bytes(&self, record: &Record) -> &[u8] {
        let range = record.answer.clone();
        self.answers.bytes().get(range).unwrap_or_default()
    }

    /// The messages of an exchange in flight.
    #[must_use]
    pub fn exchange_bytes(&self, exchange: &Exchange) -> &[u8] {
        let range = exchange.start..exchange.end;
        self.log.bytes().get(range).unwrap_or_default()
    }

    /// Bytes held in memory: messages, records and their answers.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let logs = self.log.in_memory() + self.answers.in_memory();
        logs + self.records.len() * size_of::<Record>()
    }

    /// Bytes held elsewhere.
    #[must_use]
    pub fn spilled_bytes(&self) -> usize {
        [&self.log, &self.answers]
            .iter()
            .map(|log| log.len() - log.in_memory())
            .sum()
    }

    /// Highest WAL position that the open transaction was told.
    #[must_use]
    pub fn wal(&self) -> Option<Lsn> {
        let records = self.records.iter().filter_map(|r| r.wal);
        records
            .chain(self.in_flight.iter().filter_map(|e| e.wal))
            .max()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipeline_over_a_commit_keeps_what_comes_after() {
        let mut j = Journal::default();
        for (n, text) in [b"begin".as_slice(), b"write", b"commit", b"begin2"]
            .iter()
            .enumerate()
        {
            j.open(n as u64 + 1, 0, 0);
            j.append(text);
        }
        j.complete(TxnStatus::Open);
        j.complete(TxnStatus::Open);
        assert_eq!(j.records().len(), 2);
        assert_eq!(j.record_bytes(&j.records()[1]), b"write");
        j.complete(TxnStatus::Idle);
        assert!(j.records().is_empty());
        assert_eq!(j.exchange_bytes(&j.in_flight()[0]), b"begin2");
        j.complete(TxnStatus::Open);
        assert_eq!(j.record_bytes(&j.records()[0]), b"begin2");
        assert_eq!(j.bytes(), 6 + ANSWER + size_of::<Record>());
    }

    /// Bytes of an answer without a message.
    const ANSWER: usize = 20;

    /// A place for a few bytes.
    #[derive(Debug)]
    struct Small(usize, Vec<u8>);

    impl Spill for Small {
        fn append(&mut self, bytes: &[u8]) -> Result<(), String> {
            self.1.extend_from_slice(bytes);
            match self.1.len() > self.0 {
                true => Err(format!("no more than {}", self.0)),
                false => Ok(()),
            }
        }

        fn truncate(&mut self, len: usize) {
            self.1.truncate(len);
        }

        fn bytes(&self) -> &[u8] {
            &self.1
        }
    }

    /// Places for so many bytes of messages and of answers.
    fn spill(journal: &mut Journal, log: usize, answers: usize) -> Result<(), String> {
        let place = |limit| Box::new(Small(limit, Vec::new()));
        journal.spill(place(log), place(answers))
    }

    #[test]
    fn a_log_that_went_elsewhere_is_the_same_and_comes_back() {
        let mut j = Journal::default();
        for (n, text) in [b"begin".as_slice(), b"write"].iter().enumerate() {
            j.open(n as u64 + 1, 0, 0);
            j.append(text);
            j.complete(TxnStatus::Open);
        }
        spill(&mut j, 20, 100).unwrap();
        assert_eq!(j.bytes(), 2 * size_of::<Record>());
        assert_eq!(j.spilled_bytes(), 10 + 2 * ANSWER);
        j.open(3, 0, 0);
        j.append(b"commit");
        assert_eq!(j.record_bytes(&j.records()[1]), b"write");
        assert_eq!(j.exchange_bytes(&j.in_flight()[0]), b"commit");
        assert_eq!(j.spilled_bytes(), 16 + 2 * ANSWER);
        // What is behind the commit is in memory again.
        j.open(4, 0, 0);
        j.append(b"next");
        j.complete(TxnStatus::Idle);
        assert_eq!((j.bytes(), j.spilled_bytes()), (4, 0));
        assert_eq!(j.exchange_bytes(&j.in_flight()[0]), b"next");
    }

    #[test]
    fn what_finds_no_place_is_told_and_not_half_kept() {
        let mut j = Journal::default();
        j.open(1, 0, 0);
        j.append(b"begin");
        j.complete(TxnStatus::Open);
        spill(&mut j, 20, 100).unwrap();
        j.open(2, 0, 0);
        j.append(b"too much for it");
        assert_eq!(j.take_refusal(), None);
        j.append(b"!");
        assert_eq!(j.take_refusal().as_deref(), Some("no more than 20"));
        assert_eq!(j.take_refusal(), None);
        assert!(j.in_flight()[0].cut);
        assert_eq!(j.spilled_bytes(), 5 + ANSWER);
        j.lose(Unprotected::JournalLimit, "full".into());
        assert_eq!((j.bytes(), j.spilled_bytes()), (0, 0));
        // One that does not take what there is changes nothing.
        let mut j = Journal::default();
        j.open(1, 0, 0);
        j.append(&[7; 30]);
        assert!(spill(&mut j, 20, 100).is_err());
        assert_eq!(j.exchange_bytes(&j.in_flight()[0]), [7; 30]);
    }

    #[test]
    fn an_answer_that_finds_no_place_gives_the_journal_up() {
        let mut j = Journal::default();
        for n in 1..=2 {
            j.open(n, 0, 0);
            j.append(b"write");
        }
        j.complete(TxnStatus::Open);
        spill(&mut j, 100, ANSWER).unwrap();
        j.complete(TxnStatus::Open);
        assert!(j.records().is_empty());
        assert_eq!(j.lost(), Some("no more than 20"));
        assert_eq!(j.take_refusal().as_deref(), Some("no more than 20"));
        assert_eq!((j.bytes(), j.spilled_bytes()), (0, 0));
    }

    #[test]
    fn answers_are_those_of_their_records() {
        let mut j = Journal::default();
        for n in 1..=3_u8 {
            j.open(n.into(), 0, 0).reply.add(b'D', &[n; 30]);
            if n == 2 {
                spill(&mut j, 100, 1000).unwrap();
            }
            j.complete(TxnStatus::Open);
        }
        for (n, record) in (1..).zip(j.records()) {
            let mut reply = Reply::default();
            reply.add(b'D', &[n; 30]);
            assert_eq!(j.reply(record), reply);
        }
    }

    #[test]
    fn what_is_lost_is_lost_until_the_transaction_ends() {
        let mut j = Journal::default();
        j.open(1, 0, 0);
        j.append(b"begin");
        j.complete(TxnStatus::Open);
        j.lose(Unprotected::JournalLimit, "full".into());
        assert_eq!(j.bytes(), 0);
        j.open(2, 0, 0);
        j.append(b"write");
        assert_eq!(j.exchange_bytes(&j.in_flight()[0]), b"write");
        j.append(&[0; KEEP_IN_FLIGHT]);
        assert!(j.in_flight()[0].cut);
        assert_eq!(j.bytes(), 0);
        j.complete(TxnStatus::Open);
        assert!(j.records().is_empty());
        assert_eq!(j.lost(), Some("full"));
        j.open(3, 0, 0);
        j.complete(TxnStatus::Idle);
        assert_eq!(j.lost(), None);
    }
}
