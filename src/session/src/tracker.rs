//! Follows one session message by message: expected replies, journal, transaction ids, state.
//!
//! The engine hands over every frame before it forwards it. The tracker says whether it goes on,
//! and when the proxy should ask the server something of its own, in the same flight.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use helios_api::{Lsn, Xid};
use helios_wire::{backend, frontend};

use crate::decide::{Evidence, InFlight};
use crate::expect::{Expect, ExpectQueue, Explained, Owner, Violation};
use crate::grammar::{self, Kind};
use crate::journal::{Exchange, Journal};
use crate::keyword::{Hint, hint, tag_touches_session, touches_session};
use crate::reply::Reply;
use crate::state::{Prepared, PreparedStatements};
use crate::{ReplayMode, TxnStatus};

/// A question that the proxy asks the server on its own behalf, in the flight of a client's
/// message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// By FunctionCall: `pg_current_xact_id_if_assigned()`, then `pg_current_wal_insert_lsn()`.
    /// Only between exchanges; disturbs neither the unnamed statement nor portals.
    ByFunctionCall,
    /// The transaction id by Parse, Bind, Execute, Close, Flush: inside an extended exchange.
    Inline,
}

/// What the engine does with a client's frame.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClientStep {
    /// Ask this first.
    pub ask_before: Option<Ask>,
    /// Ask this behind it.
    pub ask_after: Option<Ask>,
    /// The frame ends an exchange.
    pub closed: bool,
}

/// What the engine does with a server's frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerStep {
    /// Forward.
    Forward,
    /// An answer to the proxy; keep it from the client.
    Own(Expect),
    /// ReadyForQuery of the proxy's own exchange; keep it from the client.
    OwnReady,
    /// ReadyForQuery that ends the client's exchange: forward it, the session stands between
    /// exchanges or goes on with the next one in flight.
    Completed {
        /// Status that the server reports.
        status: TxnStatus,
        /// The session's state may have changed and has to be asked for before the client goes on.
        touched: bool,
    },
    /// An error outside any exchange: the server ends the connection.
    Unsolicited,
}

/// Most custom settings that one session is followed for.
const MAX_CUSTOM: usize = 1000;

/// What is known of the id of one (projected) transaction.
#[derive(Debug, Default, Clone, Copy)]
struct XidKnowledge {
    transaction: u64,
    known: Option<Xid>,
    pending: u32,
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
        }
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
            return Ok(self.copy_frame(expect, frame));
        }
        let mut step = ClientStep::default();
        let opens = self.opens_exchange(tag);
        let looked = self.look(tag, frame);
        if self.mode.replays() && looked.hint == Some(Hint::Commit) && self.should_ask_now() {
            step.ask_before = Some(if opens {
                Ask::ByFunctionCall
            } else {
                Ask::Inline
            });
        }
        if let Some(ask) = step.ask_before {
            self.push_ask(ask);
        }
        if opens {
            self.sequence += 1;
            self.journal
                .open(self.sequence, now_micros, self.transaction);
        }
        self.push_request(expect, looked.named);
        self.note(tag, frame, looked.hint, looked.touches);
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

    fn opens_exchange(&self, tag: u8) -> bool {
        match self.journal.in_flight().back() {
            None => true,
            Some(last) => last.closed && !(last.copy_tail && tag == frontend::SYNC),
        }
    }

    fn back_closed(&self) -> bool {
        self.journal.in_flight().back().is_some_and(|e| e.closed)
    }

    fn copy_frame(&mut self, expect: Option<Expect>, frame: &[u8]) -> ClientStep {
        if let Some(expect) = expect {
            self.expect.push(expect, Owner::Client);
        }
        if let Some(last) = self.journal.in_flight_mut().back_mut() {
            last.copy_tail = last.closed;
        }
        self.client_more(frame);
        ClientStep::default()
    }

    fn push_request(&mut self, expect: Option<Expect>, named: Option<Named>) {
        let Some(expect) = expect else { return };
        if self.expect.push(expect, Owner::Client)
            && let Some(named) = named
        {
            self.named.push_back(named);
        }
    }

    /// Notes what a frame means for the exchange that it belongs to.
    fn note(&mut self, tag: u8, frame: &[u8], hint: Option<Hint>, touches: bool) {
        let statement =
            matches!(hint, Some(Hint::Read | Hint::Write)) || tag == frontend::FUNCTION_CALL;
        if statement && let Some(last) = self.xids.back_mut() {
            last.dirty = true;
        }
        if self.mode != ReplayMode::None {
            self.journal.append(frame);
        }
        match hint {
            Some(Hint::Begin) => self.project(true),
            Some(Hint::Commit | Hint::Rollback) => self.project(false),
            _ => {}
        }
        let Some(exchange) = self.journal.in_flight_mut().back_mut() else {
            return;
        };
        exchange.writes |= hint == Some(Hint::Write) || tag == frontend::FUNCTION_CALL;
        exchange.touches |= touches;
        match tag {
            frontend::QUERY | frontend::FUNCTION_CALL => {
                exchange.closed = true;
                exchange.ready_owed = 1;
                if tag == frontend::QUERY {
                    // A simple query ends the unnamed statement.
                    self.prepared.remove(b"");
                }
            }
            frontend::SYNC => {
                exchange.closed = true;
                exchange.copy_tail = false;
                exchange.ready_owed += 1;
            }
            _ => {}
        }
    }

    fn project(&mut self, open: bool) {
        if open || self.projected_open {
            self.transaction += 1;
            self.xids.push_back(XidKnowledge {
                transaction: self.transaction,
                ..Default::default()
            });
        }
        self.projected_open = open;
    }

    /// Looks into the few messages that carry a statement or a statement's name.
    fn look(&self, tag: u8, frame: &[u8]) -> Looked {
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            frontend::QUERY => {
                let sql = until_zero(body);
                Looked {
                    hint: Some(hint(sql)),
                    touches: touches_session(sql),
                    named: None,
                }
            }
            frontend::PARSE => {
                let name = until_zero(body);
                let sql = until_zero(body.get(name.len() + 1..).unwrap_or_default());
                let (hint, touches) = (hint(sql), touches_session(sql));
                let statement = Prepared {
                    parse: Arc::from(frame),
                    hint,
                    touches,
                    made_inside: false,
                    columns: None,
                };
                let named = Some(Named::Parse(name.to_vec(), statement));
                Looked {
                    hint: None,
                    touches,
                    named,
                }
            }
            frontend::BIND => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                match self.statement(name) {
                    Some(s) => Looked {
                        hint: Some(s.hint),
                        touches: s.touches,
                        named: None,
                    },
                    None => Looked {
                        hint: Some(Hint::Write),
                        touches: true,
                        named: None,
                    },
                }
            }
            frontend::DESCRIBE | frontend::CLOSE => {
                let name = until_zero(body.get(1..).unwrap_or_default()).to_vec();
                let statement = body.first() == Some(&b'S');
                let named = match (tag, statement) {
                    (frontend::DESCRIBE, true) => Some(Named::Describe(name)),
                    (frontend::CLOSE, true) => Some(Named::CloseStatement(name)),
                    (frontend::CLOSE, false) => Some(Named::ClosePortal),
                    _ => None,
                };
                Looked {
                    hint: None,
                    touches: false,
                    named,
                }
            }
            _ => Looked {
                hint: None,
                touches: false,
                named: None,
            },
        }
    }

    /// The statement of this name when everything sent has been run.
    fn statement(&self, name: &[u8]) -> Option<&Prepared> {
        let sent = self.named.iter().rev().find_map(|n| match n {
            Named::Parse(parsed, statement) if parsed == name => Some(statement),
            _ => None,
        });
        sent.or_else(|| self.prepared.get(name))
    }

    /// Whether the transaction's id must be asked for before a COMMIT is sent.
    fn should_ask_now(&self) -> bool {
        self.projected_open
            && self.status != TxnStatus::Failed
            && self
                .xids
                .back()
                .is_some_and(|x| x.known.is_none() && x.dirty)
    }

    /// Whether to ask behind the exchange that was just sent: it wrote, probably.
    fn wants_ask_after(&self) -> bool {
        self.mode.replays()
            && self.projected_open
            && self.journal.in_flight().back().is_some_and(|e| e.writes)
            && self
                .xids
                .back()
                .is_some_and(|x| x.known.is_none() && x.pending == 0)
    }

    fn push_ask(&mut self, ask: Ask) {
        let Some(last) = self.xids.back_mut() else {
            return;
        };
        last.pending += 1;
        last.dirty = false;
        let transaction = last.transaction;
        match ask {
            Ask::ByFunctionCall => {
                for what in [Some(transaction), None] {
                    self.expect.push(Expect::FunctionCall, Owner::Proxy);
                    self.asked.push_back(what);
                }
            }
            Ask::Inline => {
                for e in [Expect::Parse, Expect::Bind, Expect::Execute, Expect::Close] {
                    self.expect.push(e, Owner::Proxy);
                }
                self.inline_asked.push_back(transaction);
            }
        }
    }

    /// Expects an exchange of the proxy's own (Parse, Bind, Execute, Close, Sync), between
    /// exchanges of the client.
    pub fn push_own_exchange(&mut self) {
        for e in [
            Expect::Parse,
            Expect::Bind,
            Expect::Execute,
            Expect::Close,
            Expect::Sync,
        ] {
            self.expect.push(e, Owner::Proxy);
        }
    }

    /// Takes a server's frame.
    ///
    /// # Errors
    /// [`Violation`] for a message that nothing explains.
    pub fn server_frame(&mut self, tag: u8, frame: &[u8]) -> Result<ServerStep, Violation> {
        let explained = self.expect.explain(tag)?;
        for _ in 0..self.expect.take_dropped_named() {
            self.named.pop_front();
        }
        match explained {
            Explained::Asynchronous => Ok(ServerStep::Forward),
            Explained::Unsolicited => Ok(ServerStep::Unsolicited),
            Explained::Reply {
                owner: Owner::Proxy,
                to,
                ..
            } => {
                self.own_reply(tag, to, frame);
                Ok(ServerStep::Own(to))
            }
            Explained::Ready {
                owner: Owner::Proxy,
            } => {
                self.asked_answered();
                Ok(ServerStep::OwnReady)
            }
            Explained::Reply {
                owner: Owner::Client,
                to,
                last,
            } => {
                self.client_reply(tag, to, last, frame);
                Ok(ServerStep::Forward)
            }
            Explained::Ready {
                owner: Owner::Client,
            } => self.ready(frame),
        }
    }

    /// Takes the first bytes of a large row or copy message.
    ///
    /// # Errors
    /// As [`Self::server_frame`].
    pub fn server_large(&mut self, tag: u8, first: &[u8]) -> Result<ServerStep, Violation> {
        match self.expect.explain(tag)? {
            Explained::Reply {
                owner: Owner::Client,
                ..
            } => {
                if let Some(exchange) = self.journal.in_flight_mut().front_mut() {
                    exchange.reply.begin_large(first);
                }
                Ok(ServerStep::Forward)
            }
            Explained::Asynchronous => Ok(ServerStep::Forward),
            _ => Err(Violation {
                tag,
                side: "server",
            }),
        }
    }

    /// Takes a further piece of it.
    pub fn server_more(&mut self, piece: &[u8], last: bool) {
        if let Some(exchange) = self.journal.in_flight_mut().front_mut() {
            exchange.reply.more_large(piece, last);
        }
    }

    fn client_reply(&mut self, tag: u8, to: Expect, last: bool, frame: &[u8]) {
        let dropped = self.expect.take_dropped_syncs();
        let open = self.status != TxnStatus::Idle || self.projected_open;
        if last && to.is_named() {
            self.named_done(tag, frame, open);
        }
        let Some(exchange) = self.journal.in_flight_mut().front_mut() else {
            return;
        };
        exchange.ready_owed = exchange.ready_owed.saturating_sub(dropped);
        if exchange.ready_owed == 0 && dropped > 0 {
            exchange.closed = false;
            exchange.copy_tail = false;
        }
        if tag == backend::COMMAND_COMPLETE {
            let text = frame
                .get(5..frame.len().saturating_sub(1))
                .unwrap_or_default();
            exchange.touches |= tag_touches_session(text);
        }
        if self.mode != ReplayMode::None {
            exchange.reply.add(tag, frame);
        }
    }

    fn named_done(&mut self, tag: u8, frame: &[u8], open: bool) {
        match self.named.pop_front() {
            Some(Named::Parse(name, mut statement)) => {
                statement.made_inside = open;
                self.prepared.insert(name, statement);
            }
            Some(Named::CloseStatement(name)) => self.prepared.remove(&name),
            Some(Named::Describe(name)) if tag == backend::ROW_DESCRIPTION => {
                self.prepared
                    .described(&name, crate::reply::row_description_hash(frame));
            }
            _ => {}
        }
    }

    fn own_reply(&mut self, tag: u8, to: Expect, frame: &[u8]) {
        let body = frame.get(5..).unwrap_or_default();
        match (tag, to) {
            (backend::FUNCTION_CALL_RESPONSE, Expect::FunctionCall) => match self.asked.front() {
                Some(Some(transaction)) => {
                    let transaction = *transaction;
                    self.xid_answer(transaction, function_result(body).map(Xid));
                }
                Some(None) => self.wal_answer(function_result(body).map(Lsn)),
                None => {}
            },
            // Inline: one row with one text column.
            (backend::DATA_ROW, Expect::Execute) => {
                if let Some(transaction) = self.inline_asked.front().copied() {
                    self.xid_answer(transaction, text_column(body).map(Xid));
                }
            }
            (backend::CLOSE_COMPLETE, Expect::Close) => {
                self.inline_asked.pop_front();
            }
            _ => {}
        }
    }

    fn asked_answered(&mut self) {
        if let Some(Some(transaction)) = self.asked.pop_front()
            && let Some(x) = self.xids.iter_mut().find(|x| x.transaction == transaction)
        {
            x.pending = x.pending.saturating_sub(1);
        }
    }

    fn xid_answer(&mut self, transaction: u64, xid: Option<Xid>) {
        if let Some(x) = self.xids.iter_mut().find(|x| x.transaction == transaction) {
            x.answered = true;
            x.known = xid.or(x.known);
        }
    }

    fn wal_answer(&mut self, wal: Option<Lsn>) {
        if let Some(exchange) = self.journal.in_flight_mut().front_mut() {
            exchange.wal = wal;
        } else {
            self.journal.note_wal(wal);
        }
    }

    fn ready(&mut self, frame: &[u8]) -> Result<ServerStep, Violation> {
        let violation = || Violation {
            tag: backend::READY_FOR_QUERY,
            side: "server",
        };
        let status = frame
            .get(5)
            .copied()
            .and_then(TxnStatus::from_byte)
            .ok_or_else(violation)?;
        let front = self
            .journal
            .in_flight_mut()
            .front_mut()
            .ok_or_else(violation)?;
        front.ready_owed = front.ready_owed.saturating_sub(1);
        if front.ready_owed > 0 {
            return Ok(ServerStep::Forward);
        }
        front.reply.status = Some(status);
        self.finish(status);
        let touched = status == TxnStatus::Idle && std::mem::take(&mut self.touched);
        Ok(ServerStep::Completed { status, touched })
    }

    /// Remembers the custom settings that the exchange in front names.
    fn note_custom_settings(&mut self) {
        let Some(front) = self.journal.in_flight().front().filter(|e| e.touches) else {
            return;
        };
        let texts = self.texts_of(self.journal.exchange_bytes(front));
        let names: Vec<_> = texts
            .iter()
            .flat_map(|t| grammar::custom_settings(t))
            .collect();
        let room = MAX_CUSTOM.saturating_sub(self.custom.len());
        self.custom.extend(names.into_iter().take(room));
    }

    /// Custom settings that statements of this session may have set.
    pub fn custom_settings(&self) -> impl Iterator<Item = &str> {
        self.custom.iter().map(String::as_str)
    }

    /// The exchange in front is answered: moves journal, ids and statements on.
    fn finish(&mut self, status: TxnStatus) {
        self.note_end_inside(status);
        self.note_custom_settings();
        let Some(exchange) = self.journal.complete(status) else {
            return;
        };
        self.status = status;
        self.touched |= exchange.touches;
        if status == TxnStatus::Idle {
            self.chained = false;
            self.prepared_settle();
            while self
                .xids
                .front()
                .is_some_and(|x| x.transaction <= exchange.transaction)
            {
                self.xids.pop_front();
            }
        }
        if self.journal.in_flight().is_empty() {
            let open = status != TxnStatus::Idle;
            if open && self.xids.is_empty() {
                // Opened without a word that told so (a function's SET, a multi-statement query).
                self.projected_open = false;
                self.project(true);
                if let Some(last) = self.xids.back_mut() {
                    last.dirty = true;
                }
            }
            if !open {
                self.xids.clear();
            }
            self.projected_open = open;
        }
    }

    fn prepared_settle(&mut self) {
        self.prepared.settle();
    }

    /// COMMIT or ROLLBACK was answered and a transaction is still open: AND CHAIN, or several
    /// statements in one query. What went before must not be replayed.
    fn note_end_inside(&mut self, status: TxnStatus) {
        if status == TxnStatus::Idle {
            return;
        }
        let Some(front) = self.journal.in_flight().front() else {
            return;
        };
        let rollback = front.reply.completed(b"ROLLBACK");
        if !front.reply.completed(b"COMMIT") && !rollback {
            return;
        }
        if rollback {
            let kinds = self.kinds(front).unwrap_or_else(|| vec![Kind::Opaque]);
            let ends = |k: &Kind| matches!(k, Kind::Chain | Kind::Rollback | Kind::Opaque);
            if !kinds.iter().any(ends) {
                return;
            }
        }
        self.chained = true;
        self.journal
            .lose("the transaction was begun by AND CHAIN or inside one query".into());
        self.xids.clear();
        self.project(true);
    }

    /// The statements of an exchange, read with the grammar; `None` when its text was not kept.
    #[must_use]
    pub fn kinds(&self, exchange: &Exchange) -> Option<Vec<Kind>> {
        if exchange.cut {
            return None;
        }
        Some(self.kinds_of(self.journal.exchange_bytes(exchange)))
    }

    /// The statements that a sequence of client messages runs.
    #[must_use]
    pub fn kinds_of(&self, messages: &[u8]) -> Vec<Kind> {
        let mut kinds = Vec::new();
        let mut parsed: Vec<(&[u8], Kind)> = Vec::new();
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
                    let here = parsed
                        .iter()
                        .rev()
                        .find(|(n, _)| *n == name)
                        .map(|(_, k)| *k);
                    let known = || self.prepared.get(name).map(|p| parse_kind(&p.parse).1);
                    let gone = || self.prepared.at_begin().find(|(n, _)| *n == name);
                    let kind = here
                        .or_else(known)
                        .or_else(|| gone().map(|p| parse_kind(&p.1.parse).1));
                    kinds.push(kind.unwrap_or(Kind::Opaque));
                }
                // Continues a portal that is open already.
                frontend::EXECUTE if !kinds.is_empty() || !parsed.is_empty() => {}
                frontend::EXECUTE => kinds.push(Kind::Read),
                _ => {}
            }
            rest = rest.get(header.len..).unwrap_or_default();
        }
        kinds
    }

    /// The statements' texts that a sequence of client messages runs.
    fn texts_of(&self, messages: &[u8]) -> Vec<String> {
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

    /// What is in flight, for the decision.
    #[must_use]
    pub fn in_flight(&self) -> Vec<InFlight> {
        let exchanges = self.journal.in_flight().iter();
        exchanges
            .map(|e| InFlight {
                kinds: self.kinds(e),
                commit_answered: e.reply.completed(b"COMMIT")
                    || e.reply.completed(b"PREPARE TRANSACTION"),
                failed: e.reply.failed(),
                undone: e.undone,
                evidence: self.evidence(e.transaction),
            })
            .collect()
    }

    fn evidence(&self, transaction: u64) -> Evidence {
        let mut known = None;
        let mut written = false;
        for x in self.xids.iter().filter(|x| x.transaction <= transaction) {
            known = known.or(x.known);
            written |= x.dirty || x.pending > 0;
        }
        match known {
            Some(xid) => Evidence::Known(xid),
            None if written || self.xids.is_empty() => Evidence::Unknown,
            None => Evidence::NothingWritten,
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
        next
    }

    /// Whether a transaction will be open when everything sent has been run.
    #[must_use]
    pub fn projects_open(&self) -> bool {
        self.projected_open
    }

    /// The exchange in front was answered by the proxy: its transaction has committed.
    pub fn committed_front(&mut self) {
        self.finish(TxnStatus::Idle);
    }

    /// The open transaction is gone (aborted by us): the status is what the new backend has.
    pub fn abandon(&mut self, status: TxnStatus) {
        self.journal.abandon();
        self.status = status;
        self.projected_open = status != TxnStatus::Idle;
        self.xids.clear();
        self.chained = false;
        self.touched = false;
        self.expect = ExpectQueue::default();
        self.named.clear();
        self.asked.clear();
        self.inline_asked.clear();
        self.prepared.settle();
        if self.projected_open {
            self.project(true);
            self.journal
                .lose("the transaction was aborted by an earlier failover".into());
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
            .is_none_or(|e| e.closed && !e.copy_tail)
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

struct Looked {
    hint: Option<Hint>,
    touches: bool,
    named: Option<Named>,
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

/// FunctionCallResponse with a binary 8-byte result; `None` for NULL.
fn function_result(body: &[u8]) -> Option<u64> {
    let (len, value) = body.split_at_checked(4)?;
    (len == 8_u32.to_be_bytes()).then(|| value.try_into().ok().map(u64::from_be_bytes))?
}

/// The first column of a DataRow as a number in text.
fn text_column(body: &[u8]) -> Option<u64> {
    let len = i32::from_be_bytes(body.get(2..6)?.try_into().ok()?);
    let value = body.get(6..6 + usize::try_from(len).ok()?)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
