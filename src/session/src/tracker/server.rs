//! What a server's message means: whose it is, what it ends, what it tells of ids and state.

use helios_api::protection::Unprotected;
use helios_api::{Lsn, Xid};
use helios_wire::backend;

use super::{MAX_CUSTOM, Named, ServerStep, Tracker};
use crate::expect::{Expect, Explained, Owner, Violation};
use crate::grammar::{self, Kind};
use crate::keyword::{tag_lets_go, tag_touches_session};
use crate::locks::Calls;
use crate::{ReplayMode, TxnStatus};

impl Tracker {
    /// Takes a server's frame.
    ///
    /// # Errors
    /// [`Violation`] for a message that nothing explains.
    pub fn server_frame(&mut self, tag: u8, frame: &[u8]) -> Result<ServerStep, Violation> {
        let explained = self.expect.explain(tag)?;
        for _ in 0..self.expect.take_dropped_named() {
            self.named.pop_front();
        }
        for _ in 0..self.expect.take_dropped_own() {
            self.inline_answered();
        }
        match explained {
            Explained::Asynchronous => Ok(ServerStep::Forward),
            Explained::Unsolicited => Ok(ServerStep::Unsolicited),
            Explained::Reply {
                owner: Owner::Mark,
                to,
                ..
            } => Ok(self.mark_answered(tag, to, frame)),
            Explained::Reply {
                owner: Owner::Gid,
                to,
                ..
            } => Ok(self.gid_answered(tag, to, frame)),
            Explained::Ready { owner: Owner::Gid } => Ok(ServerStep::OwnReady),
            Explained::Reply {
                owner: Owner::Converted,
                to,
                last,
            } => {
                if matches!(
                    tag,
                    backend::PARSE_COMPLETE
                        | backend::BIND_COMPLETE
                        | backend::NO_DATA
                        | backend::CLOSE_COMPLETE
                ) {
                    return Ok(ServerStep::Own(to));
                }
                // It answers the client's Query, which is about no named statement.
                self.client_reply(tag, Expect::Query, last, frame);
                Ok(self.sync_when_over(tag))
            }
            Explained::Reply {
                owner: Owner::Proxy,
                to,
                ..
            } => {
                self.own_reply(tag, to, frame);
                Ok(ServerStep::Own(to))
            }
            Explained::Ready {
                owner: Owner::Proxy | Owner::Mark | Owner::Converted,
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
                owner: Owner::Client | Owner::Converted,
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

    pub(super) fn client_reply(&mut self, tag: u8, to: Expect, last: bool, frame: &[u8]) {
        let dropped = self.expect.take_dropped_syncs();
        let open = self.status != TxnStatus::Idle || self.projected_open;
        if last && to.is_named() {
            self.named_done(tag, frame);
        }
        let Some(exchange) = self.journal.in_flight_mut().front_mut() else {
            return;
        };
        exchange.ready_owed = exchange.ready_owed.saturating_sub(dropped);
        if exchange.ready_owed == 0 && dropped > 0 {
            exchange.closed = false;
            exchange.copy_tail = false;
        }
        exchange.copies += u32::from(tag == backend::COPY_IN_RESPONSE);
        if tag == backend::COMMAND_COMPLETE {
            let text = frame
                .get(5..frame.len().saturating_sub(1))
                .unwrap_or_default();
            exchange.touches |= tag_touches_session(text) || (self.holds && tag_lets_go(text));
        }
        if open && self.mode.replays() {
            exchange.reply.keep(tag, frame);
        }
        if self.mode != ReplayMode::None {
            exchange.reply.add(tag, frame);
        }
    }

    pub(super) fn named_done(&mut self, tag: u8, frame: &[u8]) {
        match self.named.pop_front() {
            Some(Named::Parse(name, mut statement)) => {
                // Until the session is idle again: an exchange that leaves a transaction open is
                // a record, and its replay prepares the statement itself.
                statement.made_inside = true;
                self.prepared.insert(name, statement);
            }
            Some(Named::CloseStatement(name)) => self.prepared.remove(&name),
            Some(Named::Describe(name)) if tag == backend::ROW_DESCRIPTION => {
                self.prepared.described(&name, frame);
            }
            _ => {}
        }
    }

    pub(super) fn own_reply(&mut self, tag: u8, to: Expect, frame: &[u8]) {
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
                self.inline_answered();
            }
            _ => {}
        }
    }

    fn asked_answered(&mut self) {
        if let Some(Some(transaction)) = self.asked.pop_front() {
            self.asked_no_more(transaction);
        }
    }

    fn inline_answered(&mut self) {
        if let Some(transaction) = self.inline_asked.pop_front() {
            self.asked_no_more(transaction);
        }
    }

    fn asked_no_more(&mut self, transaction: u64) {
        if let Some(x) = self.xids.iter_mut().find(|x| x.transaction == transaction) {
            x.pending = x.pending.saturating_sub(1);
        }
    }

    pub(super) fn xid_answer(&mut self, transaction: u64, xid: Option<Xid>) {
        if let Some(x) = self.xids.iter_mut().find(|x| x.transaction == transaction) {
            x.answered = true;
            x.known = xid.or(x.known);
        }
    }

    pub(super) fn wal_answer(&mut self, wal: Option<Lsn>) {
        if let Some(exchange) = self.journal.in_flight_mut().front_mut() {
            exchange.wal = wal;
        } else {
            self.journal.note_wal(wal);
        }
    }

    pub(super) fn ready(&mut self, frame: &[u8]) -> Result<ServerStep, Violation> {
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
        let alone = front.alone(self.status, status);
        self.finish(status);
        let touched = status == TxnStatus::Idle && std::mem::take(&mut self.touched);
        Ok(ServerStep::Completed {
            status,
            touched,
            alone,
        })
    }

    /// Remembers the custom settings and the calls of advisory lock functions that the exchange in
    /// front names.
    pub(super) fn note_texts(&mut self) {
        let Some(front) = self.journal.in_flight().front().filter(|e| e.touches) else {
            return;
        };
        let messages = self.journal.exchange_bytes(front);
        let texts = self.texts_of(messages);
        let mut names: Vec<_> = texts
            .iter()
            .flat_map(|t| grammar::custom_settings(t))
            .collect();
        if texts.iter().any(|t| grammar::binds_setting(t)) {
            names.extend(self.bound_names(messages));
        }
        let calls = match front.cut {
            true => Calls::Many,
            false => Calls::of(&texts, &front.reply),
        };
        self.calls = self.calls.and(calls);
        self.note_temporary(&texts);
        let room = MAX_CUSTOM.saturating_sub(self.custom.len());
        self.custom.extend(names.into_iter().take(room));
    }

    /// Whether the session holds state that cannot be moved: it is then watched for letting go.
    pub fn set_holds(&mut self, holds: bool) {
        self.holds = holds;
    }

    /// Custom settings that statements of this session may have set.
    pub fn custom_settings(&self) -> impl Iterator<Item = &str> {
        self.custom.iter().map(String::as_str)
    }

    /// The exchange in front is answered: moves journal, ids and statements on.
    pub(super) fn finish(&mut self, status: TxnStatus) {
        self.note_end_inside(status);
        self.note_commit_behind_error(status);
        self.note_texts();
        self.note_changes(status);
        let Some(exchange) = self.journal.complete(status) else {
            return;
        };
        self.status = status;
        self.touched |= exchange.touches;
        if status == TxnStatus::Idle {
            self.chained = false;
            self.prepared.settle();
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

    /// COMMIT or ROLLBACK was answered and a transaction is still open: AND CHAIN, or several
    /// statements in one query. What went before must not be replayed.
    pub(super) fn note_end_inside(&mut self, status: TxnStatus) {
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
            let chain = |k: &Kind| matches!(k, Kind::Chain | Kind::CommitAndChain);
            let unknown = |k: &Kind| matches!(k, Kind::Opaque | Kind::Unread);
            let ends = |k: &Kind| chain(k) || unknown(k) || *k == Kind::Rollback;
            if !kinds.iter().any(ends) {
                return;
            }
        }
        self.chained = true;
        let reason = Unprotected::Chained;
        self.journal.lose(reason, reason.text().into());
        self.xids.clear();
        self.project(true);
    }
}

/// FunctionCallResponse with a binary 8-byte result; `None` for NULL.
fn function_result(body: &[u8]) -> Option<u64> {
    let (len, value) = body.split_at_checked(4)?;
    (len == 8_u32.to_be_bytes()).then(|| value.try_into().ok().map(u64::from_be_bytes))?
}

/// The first column of a DataRow as a number in text.
pub(super) fn text_column(body: &[u8]) -> Option<u64> {
    let len = i32::from_be_bytes(body.get(2..6)?.try_into().ok()?);
    let value = body.get(6..6 + usize::try_from(len).ok()?)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}
