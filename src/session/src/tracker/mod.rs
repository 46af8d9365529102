//! Follows one session message by message: expected replies, journal, transaction ids, state.
//!
//! The engine hands over every frame before it forwards it. The tracker says whether it goes on,
//! and when the proxy should ask the server something of its own, in the same flight.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use helios_api::protection::Unprotected;
use helios_api::{Lsn, Xid};
use helios_wire::frontend;

use crate::evidence::GtidSource;
use crate::expect::{ExpectQueue, Violation};
use crate::journal::{Exchange, Journal, SyncOwed};
use crate::keyword::{Hint, Unit};
use crate::locks::Calls;
use crate::reply::Reply;
use crate::state::{Change, Prepared, PreparedStatements};
use crate::temporary::OnCommit;
use crate::{ReplayMode, TxnStatus};

mod calls;
mod carried;
mod client;
mod endings;
mod marks;
mod named;
mod plain;
mod server;
mod steps;
mod temporary;
mod texts;

use calls::CallMarks;
pub use carried::Carried;
use marks::Marking;
pub use plain::Runs;
pub use steps::{Alone, Ask, Before, ClientStep, Form, Lead, Learns, ServerStep};
pub use texts::until_zero;

/// Most custom settings that one session is followed for.
const MAX_CUSTOM: usize = 1000;

/// What is known of the id of one (projected) transaction.
#[derive(Debug, Default, Clone, Copy)]
struct XidKnowledge {
    transaction: u64,
    known: Option<Xid>,
    pending: u32,
    asked: bool,
    answered: bool,
    /// A statement was sent behind the last question.
    dirty: bool,
}

/// A Parse, Describe or Close that waits for its reply.
#[derive(Debug)]
enum Named {
    Parse(Vec<u8>, Prepared),
    Describe(Vec<u8>),
    CloseStatement(Vec<u8>),
    ClosePortal,
}

/// Follows a session. See the module's head.
#[derive(Debug)]
pub struct Tracker {
    mode: ReplayMode,
    expect: ExpectQueue,
    journal: Journal,
    prepared: PreparedStatements,
    named: VecDeque<Named>,
    status: TxnStatus,
    /// Whether a transaction will be open when everything sent has been run.
    projected_open: bool,
    transaction: u64,
    xids: VecDeque<XidKnowledge>,
    /// Transactions whose id was asked for by function call, in order; `None`: WAL position.
    asked: VecDeque<Option<u64>>,
    inline_asked: VecDeque<u64>,
    sequence: u64,
    /// The open transaction may have changed session state.
    touched: bool,
    chained: bool,
    /// Custom settings that statements of this session may have set.
    custom: BTreeSet<String>,
    /// Calls of advisory lock functions since somebody took note.
    calls: Calls,
    /// Temporary tables that statements of this session have made.
    temporary: BTreeMap<String, OnCommit>,
    /// Statements of this session have asked for the last value of a sequence.
    asks_last_values: bool,
    gtids: GtidSource,
    /// What goes in front of the client's next frame.
    lead: Option<Lead>,
    marks_refused: bool,
    call_marks: CallMarks,
    call_marking: Marking,
    /// Simple queries of this backend that were sent in the extended form because of their marks.
    unflushed: u16,
    /// The session holds state that cannot be moved.
    holds: bool,
    marking: Marking,
    /// Identifier of a prepared transaction that is to be asked about.
    gid: Option<String>,
    /// What the open transaction has prepared and given up by SQL.
    changes: Vec<Change>,
}

impl Tracker {
    /// For a session in `mode`.
    #[must_use]
    pub fn new(mode: ReplayMode) -> Self {
        Self {
            mode,
            expect: ExpectQueue::default(),
            journal: Journal::default(),
            prepared: PreparedStatements::default(),
            named: VecDeque::new(),
            status: TxnStatus::Idle,
            projected_open: false,
            transaction: 0,
            xids: VecDeque::new(),
            asked: VecDeque::new(),
            inline_asked: VecDeque::new(),
            sequence: 0,
            touched: false,
            chained: false,
            custom: BTreeSet::new(),
            calls: Calls::None,
            temporary: BTreeMap::new(),
            asks_last_values: false,
            gtids: GtidSource::default(),
            lead: None,
            marks_refused: false,
            call_marks: CallMarks::default(),
            call_marking: Marking::default(),
            unflushed: 0,
            holds: false,
            marking: Marking::default(),
            gid: None,
            changes: Vec::new(),
        }
    }

    /// Ids of this session's transactions come from here.
    #[must_use]
    pub fn with_ids(mut self, gtids: GtidSource) -> Self {
        self.gtids = gtids;
        self
    }

    /// Whether a frame may be sent now. A COMMIT waits until the id of its transaction is known, or
    /// known not to be there (design rule 4): it is asked for behind the first statement that
    /// writes, so the answer is there as a rule. What commits by itself gets a mark in front, if the
    /// position of the log is known (`floor`).
    pub fn before(&mut self, tag: u8, frame: &[u8], floor: Option<Lsn>) -> Before {
        if !self.projected_open && self.mode.replays() {
            if self.waits_for_sync(tag) {
                return Before::Wait;
            }
            if self.asks_gid(tag, frame) {
                return Before::AskGid;
            }
            if self.prepares_call(tag, frame) {
                return self.make_domain(tag);
            }
            return floor.map_or(Before::Go, |floor| self.lead(tag, frame, floor));
        }
        let may_end = matches!(tag, frontend::QUERY | frontend::BIND);
        if !may_end || !self.projected_open || !self.mode.replays() {
            return Before::Go;
        }
        if self.status == TxnStatus::Failed || self.expect.awaits_sync() {
            return Before::Go;
        }
        let Some(last) = self.xids.back().filter(|x| x.known.is_none()) else {
            return Before::Go;
        };
        let (pending, dirty) = (last.pending > 0, last.dirty);
        if !(pending || dirty) || self.look(tag, frame).hint != Some(Hint::Commit) {
            return Before::Go;
        }
        if !pending {
            let ask = if self.opens_exchange(tag) {
                Ask::ByFunctionCall
            } else {
                Ask::Inline
            };
            self.push_ask(ask);
            return Before::Ask(ask);
        }
        if self.asked.is_empty() && self.inline_asked.is_empty() {
            // The question was skipped with a statement that failed: nothing can commit.
            return Before::Go;
        }
        Before::Wait
    }

    /// Takes a client's frame (its first bytes, when it is a large one) that is about to be sent.
    ///
    /// # Errors
    /// [`Violation`] for a message that no client may send here.
    pub fn client_frame(
        &mut self,
        tag: u8,
        frame: &[u8],
        now_micros: u64,
    ) -> Result<ClientStep, Violation> {
        let kind = frame.get(5).copied().unwrap_or(0);
        let expect = ExpectQueue::of_client(tag, kind)?;
        if matches!(
            tag,
            frontend::COPY_DATA | frontend::COPY_DONE | frontend::COPY_FAIL
        ) {
            return Ok(self.copy_frame(tag, expect, frame));
        }
        let mut step = ClientStep::default();
        if tag == frontend::SYNC && self.expect.ignores_sync() {
            self.client_more(frame);
            return Ok(step);
        }
        let lead = self.lead.take();
        let opens = self.opens_exchange(tag);
        let mut looked = self.look(tag, frame);
        if opens {
            self.sequence += 1;
            self.journal
                .open(self.sequence, now_micros, self.transaction);
        }
        let form = lead.map(|l| l.form).unwrap_or_default();
        if form == Form::AsIs {
            self.push_request(expect, looked.named.take());
        } else {
            self.push_converted(form);
        }
        if let (Some(lead), Some(last)) = (lead, self.journal.in_flight_mut().back_mut()) {
            last.mark = Some(lead.mark);
            last.speaks = lead.speaks;
            last.bound = lead.bound;
            let whole = tag == frontend::QUERY && form == Form::AsIs;
            last.statements = lead.script.map_or(usize::from(whole), |s| s.statements);
            last.touches |= lead.script.is_some_and(|s| s.session);
            last.sync_owed = form.sync_owed();
            if tag == frontend::QUERY {
                // The mark speaks for it.
                looked.unit = Some(Unit::Writes);
            }
        }
        self.note_plain(tag, frame, lead);
        self.note(tag, frame, &looked);
        step.closed = self.back_closed();
        if step.closed && self.wants_ask_after() {
            self.push_ask(Ask::ByFunctionCall);
            step.ask_after = Some(Ask::ByFunctionCall);
        }
        Ok(step)
    }

    /// Takes a further piece of a large client frame.
    pub fn client_more(&mut self, bytes: &[u8]) {
        if self.mode != ReplayMode::None {
            self.journal.append(bytes);
        }
    }

    /// A tracker for the session's next backend, which has these statements prepared.
    #[must_use]
    pub fn successor(&self, prepared: &[(Vec<u8>, Prepared)]) -> Self {
        let mut next = Self::new(self.mode);
        for (name, statement) in prepared {
            next.prepared.insert(name.clone(), statement.clone());
        }
        next.prepared.settle();
        next.custom.clone_from(&self.custom);
        next.temporary.clone_from(&self.temporary);
        next.asks_last_values = self.asks_last_values;
        next.gtids = self.gtids;
        next.marks_refused = self.marks_refused;
        next.call_marks = self.call_marks.afresh();
        next.holds = self.holds;
        next
    }

    /// Whether a transaction will be open when everything sent has been run.
    #[must_use]
    pub fn projects_open(&self) -> bool {
        self.projected_open
    }

    /// The exchange in front was answered by the proxy: its transaction has committed.
    pub fn committed_front(&mut self) {
        let front = self.journal.in_flight().front();
        let unsent = |e: &Exchange| u32::from(e.sync_owed != SyncOwed::No);
        let cycles = front.map_or(0, |e| e.ready_owed.saturating_sub(unsent(e)));
        self.expect.drop_cycles(cycles);
        self.finish(TxnStatus::Idle);
    }

    /// Whether answered exchanges may have changed the session's state, and nobody has asked since.
    pub fn take_touched(&mut self) -> bool {
        std::mem::take(&mut self.touched)
    }

    /// Calls of advisory lock functions since this was asked last.
    pub fn take_calls(&mut self) -> Calls {
        std::mem::take(&mut self.calls)
    }

    /// The block that was opened fails, by what nobody has asked for: its record stays.
    pub fn fail(&mut self) {
        self.status = TxnStatus::Failed;
    }

    /// The open transaction is gone (aborted by us): the status is what the new backend has.
    pub fn abandon(&mut self, status: TxnStatus) {
        self.journal.abandon();
        self.status = status;
        self.projected_open = status != TxnStatus::Idle;
        self.xids.clear();
        self.chained = false;
        self.touched = false;
        self.changes.clear();
        self.calls = Calls::None;
        self.expect = ExpectQueue::default();
        self.named.clear();
        self.asked.clear();
        self.inline_asked.clear();
        self.prepared.settle();
        if self.projected_open {
            self.project(true);
            let reason = Unprotected::AbortedByMove;
            self.journal.lose(reason, reason.text().into());
        }
    }

    /// Status after the last exchange that was answered completely.
    #[must_use]
    pub fn status(&self) -> TxnStatus {
        self.status
    }

    /// The session stands between exchanges.
    #[must_use]
    pub fn is_between(&self) -> bool {
        self.journal.in_flight().is_empty()
    }

    /// The server owes nothing, not even to the proxy.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.expect.is_empty()
    }

    /// Whether the client may send the first message of a new exchange here: the last is closed.
    #[must_use]
    pub fn at_boundary(&self) -> bool {
        self.journal
            .in_flight()
            .back()
            .is_none_or(|e| e.closed && !e.copy_tail && !e.is_copying())
    }

    /// The expected-reply queue.
    #[must_use]
    pub fn expect(&self) -> &ExpectQueue {
        &self.expect
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// The journal, to change.
    pub fn journal_mut(&mut self) -> &mut Journal {
        &mut self.journal
    }

    /// Prepared statements.
    #[must_use]
    pub fn prepared(&self) -> &PreparedStatements {
        &self.prepared
    }

    /// Prepared statements, to change.
    pub fn prepared_mut(&mut self) -> &mut PreparedStatements {
        &mut self.prepared
    }

    /// The mode.
    #[must_use]
    pub fn mode(&self) -> ReplayMode {
        self.mode
    }

    /// What the exchange in front has been answered.
    #[must_use]
    pub fn delivered(&self) -> Option<&Reply> {
        self.journal.in_flight().front().map(|e| &e.reply)
    }
}
