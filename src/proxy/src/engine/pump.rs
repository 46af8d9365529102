//! Moving bytes between a client and its backend.
//!
//! Only frame headers and the few messages that change state are looked into. The invariant: no
//! frame is forwarded before the tracker has explained it.

use std::sync::atomic::Ordering;

use helios_session::TxnStatus;
use helios_session::expect::{Expect, ExpectQueue, MAX_EXPECTED};
use helios_session::tracker::{Alone, Before, Form, ServerStep, until_zero};
use helios_wire::message::read;
use helios_wire::{ErrorFields, SqlState, backend, frontend, peek_header};

use super::gate::Phase;
use super::later::Awaits;
use super::link::{HIGH_WATER, WHOLE};
use super::lost::LastWords;
use super::own;
use super::replay::{is_fatal, is_unconfirmed_commit};
use super::session::{End, Event, Rerun, Session};

/// Largest message that has to be held whole (a Parse, a row description, an error).
pub(super) const MAX_WHOLE: usize = 64 << 20;

fn violation(message: String) -> Event {
    Event::End(End::Fatal(ErrorFields::fatal(
        SqlState::PROTOCOL_VIOLATION,
        message,
    )))
}

/// What to do with the server's frame under the cursor.
pub(super) enum Verdict {
    Pass,
    Drop,
    Replace(ErrorFields),
    Instead(Vec<u8>),
    /// Leave the server, with what it sent before.
    Leave,
}

impl Session {
    /// Moves what can be moved.
    pub(super) fn pump(&mut self) -> Result<(), Event> {
        self.pump_server()?;
        self.pump_client()
    }

    fn pump_client(&mut self) -> Result<(), Event> {
        loop {
            if self.client.input.is_empty() {
                return self.starved();
            }
            if self
                .server
                .as_ref()
                .is_some_and(|s| s.link.output.len() >= HIGH_WATER)
            {
                return Ok(());
            }
            if self.client.passing > 0 {
                if self.server.is_none() && !self.dropping_rest {
                    return Ok(());
                }
                self.pass_client();
                continue;
            }
            let header = match peek_header(&self.client.input) {
                Ok(Some(header)) => header,
                Ok(None) => return self.starved(),
                Err(e) => return Err(violation(e.to_string())),
            };
            if header.tag == frontend::TERMINATE {
                return Err(Event::End(End::ClientLeft));
            }
            // On its type alone, as PostgreSQL does: the rest of it may never come.
            ExpectQueue::of_client(header.tag, 0).map_err(|e| violation(e.to_string()))?;
            let whole = self.client.input.len() >= header.len;
            if !whole && self.needs_whole(header.tag, header.len)? {
                return self.starved();
            }
            if self.answer_ourselves(header.tag, header.len, whole)? {
                continue;
            }
            if self.corked() || self.tracker.expect().len() >= MAX_EXPECTED {
                return Ok(());
            }
            match self.awaits_objects() {
                Awaits::Nothing => {}
                awaits => return awaits.outcome(),
            }
            let Some(len) = self.bring_rows(header.tag, header.len, whole) else {
                return Ok(());
            };
            let have = len.min(self.client.input.len());
            if self.temporary.is_some() && self.keeps_before(header.tag, have) {
                return Err(Event::Timer);
            }
            let Some(form) = self.before_frame(header.tag, have)? else {
                return Ok(());
            };
            self.client_frame(header.tag, have, len, form)?;
        }
    }

    /// Sends what goes in front of a client's message, of which so many bytes are there; the form that
    /// it is sent in, or `None`: it waits.
    fn before_frame(&mut self, tag: u8, have: usize) -> Result<Option<Form>, Event> {
        let floor = self.floor_for(tag);
        let frame = &self.client.input[..have];
        match self.tracker.before(tag, frame, floor) {
            Before::Go => {}
            Before::Lead(lead) => return Ok(Some(self.set_mark(lead, have))),
            Before::Flush if self.skip.is_some() => return self.hold_sync().map(|()| None),
            Before::Flush => self.flush_uncountable(),
            Before::AskGid => self.ask_gid(),
            Before::MakeDomain => {
                self.domain_due = true;
                return Err(Event::Timer);
            }
            Before::Wait => return Ok(None),
            Before::Ask(ask) => {
                if let Some(server) = self.server.as_mut() {
                    own::ask(&mut server.link.output, ask);
                }
                return Ok(None);
            }
        }
        Ok(Some(Form::AsIs))
    }

    /// No whole message is there: more may come, unless the client has left.
    fn starved(&self) -> Result<(), Event> {
        if self.client.ended {
            Err(Event::End(End::ClientLeft))
        } else {
            Ok(())
        }
    }

    /// Whether to wait for the rest of an incomplete message.
    fn needs_whole(&self, tag: u8, len: usize) -> Result<bool, Event> {
        if len <= WHOLE {
            return Ok(true);
        }
        match tag {
            frontend::QUERY | frontend::BIND | frontend::COPY_DATA | frontend::FUNCTION_CALL => {
                Ok(self.client.input.len() < WHOLE / 16)
            }
            _ if len <= MAX_WHOLE => Ok(true),
            _ => Err(violation(format!(
                "message of {len} bytes is over the limit"
            ))),
        }
    }

    /// Whether the client's next message has to wait.
    fn corked(&self) -> bool {
        if self.server.is_none() || self.asking.is_some() || self.rebuilt {
            return true;
        }
        let boundary = self.tracker.at_boundary();
        if boundary && self.entry().cancel_under_way.load(Ordering::Relaxed) {
            return true;
        }
        // What would run in a state that nobody knows could not run again in the same.
        let due = self.state_due && !self.tracker.projects_open();
        if boundary && (due || self.tracker.changes_state()) {
            return true;
        }
        match self.gate.phase {
            Phase::Open => false,
            Phase::Hold => boundary && !self.tracker.projects_open(),
            // Replays may wait for the locks of its transaction; a new one may take theirs.
            Phase::Gather | Phase::Turn | Phase::Replay | Phase::Send if self.stays => {
                boundary && !self.tracker.projects_open()
            }
            Phase::Freeze | Phase::Cut | Phase::Still => boundary,
            Phase::Gather | Phase::Turn | Phase::Replay => true,
            Phase::Send => self.resend_left == 0,
        }
    }

    /// A log position for a mark, for the few messages that may want one.
    fn floor_for(&self, tag: u8) -> Option<helios_api::Lsn> {
        let may_commit = matches!(tag, frontend::QUERY | frontend::BIND | frontend::SYNC);
        if !may_commit {
            return None;
        }
        self.shared.floor(&self.gate.topology, self.epoch)
    }

    fn client_frame(&mut self, tag: u8, have: usize, len: usize, form: Form) -> Result<(), Event> {
        let began = self.tracker.is_between();
        // The clock is read once an exchange.
        let now = if self.tracker.opens_exchange(tag) {
            self.shared.now_micros()
        } else {
            0
        };
        let frame = &self.client.input[..have];
        let step = self
            .tracker
            .client_frame(tag, frame, now)
            .map_err(|e| violation(e.to_string()))?;
        if began {
            self.entry().set_state(2);
        }
        self.rows_taken();
        let Some(server) = self.server.as_mut() else {
            return Ok(());
        };
        let out = &mut server.link.output;
        if form == Form::AsIs {
            self.client.forward(have, out);
        } else {
            let sql = until_zero(&self.client.input[5..have]);
            let built = match form {
                Form::ExtendedCopy => own::converted_copy(out, sql),
                Form::ExtendedHeld => own::converted(out, sql),
                Form::ExtendedCounted => own::converted_counted(out, sql),
                Form::Extended | Form::AsIs => own::converted(out, sql).map(|()| own::sync(out)),
            };
            built.map_err(|e| violation(e.to_string()))?;
            self.client.skip(have);
        }
        self.resend_left = self.resend_left.saturating_sub(have);
        self.client.passing = len - have;
        if step.sync_after {
            own::flush_and_sync(&mut server.link.output);
        }
        if let Some(ask) = step.ask_after {
            own::ask(&mut server.link.output, ask);
        }
        self.charge();
        Ok(())
    }

    /// Passes on bytes of a large message.
    fn pass_client(&mut self) {
        let n = self.client.passing.min(self.client.input.len());
        match self.server.as_mut() {
            Some(server) if !self.dropping_rest => {
                self.tracker.client_more(&self.client.input[..n]);
                self.client.forward(n, &mut server.link.output);
            }
            // The exchange was answered with an error; its rest is of no use.
            _ => self.client.skip(n),
        }
        self.client.passing -= n;
        self.resend_left = self.resend_left.saturating_sub(n);
        self.dropping_rest &= self.client.passing > 0;
        self.charge();
    }

    /// Charges the journal; one without room is given up as a whole.
    pub(super) fn charge(&mut self) {
        if self.room.is_right(self.tracker.journal()) {
            return;
        }
        let journal = self.tracker.journal_mut();
        if let Err((reason, why)) = self.room.hold(journal) {
            journal.lose(reason, why);
            self.room.shrink(journal);
            self.shared.metrics.journal_overflows.inc();
            self.show_protection();
        }
        self.entry()
            .journal_bytes
            .store(self.room.used() as u64, Ordering::Relaxed);
    }

    pub(super) fn pump_server(&mut self) -> Result<(), Event> {
        let mut run = 0;
        loop {
            let Some(server) = self.server.as_mut() else {
                return Ok(());
            };
            if self.client.output.len() >= HIGH_WATER {
                break;
            }
            let input = &server.link.input[run..];
            if server.link.passing > 0 && !input.is_empty() {
                let n = server.link.passing.min(input.len());
                server.link.passing -= n;
                self.tracker
                    .server_more(&input[..n], server.link.passing == 0);
                run += n;
                continue;
            }
            let header = match peek_header(input) {
                Ok(Some(header)) => header,
                Ok(None) => break,
                Err(e) => return Err(violation(format!("from the server: {e}"))),
            };
            if input.len() < header.len {
                let row = matches!(header.tag, backend::DATA_ROW | backend::COPY_DATA);
                if header.len <= WHOLE || (!row && header.len <= MAX_WHOLE) {
                    break;
                }
                if self.skip.is_some() || input.len() < WHOLE / 16 {
                    break;
                }
                self.tracker
                    .server_large(header.tag, input)
                    .map_err(|e| violation(e.to_string()))?;
                server.link.passing = header.len - input.len();
                run += input.len();
                continue;
            }
            match self.server_frame(header.tag, run, header.len)? {
                Verdict::Pass => run += header.len,
                other => {
                    let Some(server) = self.server.as_mut() else {
                        return Ok(());
                    };
                    server.link.forward(run, &mut self.client.output);
                    server.link.skip(header.len);
                    run = 0;
                    match other {
                        Verdict::Replace(fields) => fields.write_error(&mut self.client.output),
                        Verdict::Instead(frame) => self.client.output.extend_from_slice(&frame),
                        Verdict::Leave => self.server = None,
                        Verdict::Pass | Verdict::Drop => {}
                    }
                    self.after_drop();
                }
            }
        }
        if let Some(server) = self.server.as_mut() {
            server.link.forward(run, &mut self.client.output);
        }
        Ok(())
    }

    /// Looks at one whole frame of the server's, at `at` of its input.
    fn server_frame(&mut self, tag: u8, at: usize, len: usize) -> Result<Verdict, Event> {
        let Some(server) = self.server.as_ref() else {
            return Ok(Verdict::Drop);
        };
        let frame = &server.link.input[at..at + len];
        if is_fatal(tag, frame) {
            self.last_words = Some(LastWords::new(frame, &self.shared));
            return Ok(Verdict::Drop);
        }
        if is_unconfirmed_commit(tag, frame) {
            // Not success: the outcome is looked for like that of a lost connection.
            return Ok(Verdict::Leave);
        }
        if self.cut && self.cancelled_by_us(tag, frame) {
            // Proof that nothing of the statement lasts: it runs again on the new primary.
            if let Some(front) = self.tracker.journal_mut().in_flight_mut().front_mut() {
                front.undone = true;
            }
            return Ok(Verdict::Leave);
        }
        if tag == backend::READY_FOR_QUERY && self.skip.is_some() && self.tracker.ready_ends_front()
        {
            return Ok(self.differs());
        }
        let step = self
            .tracker
            .server_frame(tag, frame)
            .map_err(|e| violation(e.to_string()))?;
        match step {
            ServerStep::Forward => Ok(self.forwarded(tag, at, len)),
            ServerStep::ForwardThenSync => Ok(self.forwarded_then_sync(tag, at, len)),
            ServerStep::Own(to) => {
                if tag == backend::DATA_ROW && to == Expect::Execute {
                    self.state_row(at, len);
                } else if tag == backend::ERROR_RESPONSE {
                    self.state_refused();
                }
                Ok(Verdict::Drop)
            }
            ServerStep::OwnReady => Ok(Verdict::Drop),
            ServerStep::MarkRefused => {
                self.tell_refused_mark(at, len);
                Ok(Verdict::Leave)
            }
            ServerStep::Unsolicited => {
                let server = self.server.as_ref();
                let frame = server.map(|s| &s.link.input[at..at + len]);
                self.last_words = frame.map(|f| LastWords::new(f, &self.shared));
                Ok(Verdict::Drop)
            }
            ServerStep::Completed {
                status,
                touched,
                alone,
            } => Ok(self.completed(status, touched, alone)),
        }
    }

    pub(super) fn forwarded(&mut self, tag: u8, at: usize, len: usize) -> Verdict {
        let Some(server) = self.server.as_ref() else {
            return Verdict::Drop;
        };
        let frame = &server.link.input[at..at + len];
        let before = self.client.output.len() + at;
        if let Some(front) = self.tracker.journal_mut().in_flight_mut().front_mut()
            && front.reply.messages == 1
            && self.skip.is_none()
        {
            front.reply_at.get_or_insert(before);
        }
        if tag == backend::PARAMETER_STATUS
            && let Ok((name, value)) = read::parameter_status(&frame[5..])
        {
            let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
            self.known.insert(text(name), text(value));
            return Verdict::Pass;
        }
        if matches!(
            tag,
            backend::NOTICE_RESPONSE | backend::NOTIFICATION_RESPONSE
        ) {
            return Verdict::Pass;
        }
        if self.rerun.told {
            return Verdict::Drop;
        }
        if self.skip.is_some() {
            return self.skipped();
        }
        if self.instead.is_some() {
            return self.replaced(tag, at, len);
        }
        if tag == backend::PARAMETER_DESCRIPTION
            && let Some(described) = self.described(frame)
        {
            return Verdict::Instead(described);
        }
        Verdict::Pass
    }

    fn cancelled_by_us(&self, tag: u8, frame: &[u8]) -> bool {
        tag == backend::ERROR_RESPONSE
            && !self.cancelled_by_client
            && &helios_session::reply::sqlstate(frame) == b"57014"
            && self.tracker.status() == TxnStatus::Idle
    }

    fn tell_refused_mark(&self, at: usize, len: usize) {
        let frame = self
            .server
            .as_ref()
            .and_then(|s| s.link.input.get(at + 5..at + len));
        let error = frame.map(super::replay::describe_error);
        tracing::debug!(session = %self.entry().id, ?error, "mark refused");
    }

    /// An exchange of the client's is answered.
    fn completed(&mut self, status: TxnStatus, touched: bool, alone: Alone) -> Verdict {
        self.charge();
        self.shared.metrics.exchanges.inc();
        self.cancelled_by_client = false;
        self.cut = false;
        self.rerun = Rerun::default();
        self.idle = false;
        if self.shared.options.idle_timeout.is_some() {
            self.last_activity = tokio::time::Instant::now();
        }
        self.note_age(status);
        self.temporary_used();
        self.count_ended(status, alone);
        if status == TxnStatus::Idle {
            self.instead = None;
        }
        if self.tracker.is_between() {
            self.entry().mark_floor.store(u64::MAX, Ordering::Relaxed);
            self.entry().uncut.store(false, Ordering::Relaxed);
            self.entry().running.end();
            self.entry()
                .set_state(if status == TxnStatus::Idle { 1 } else { 3 });
        }
        self.state_due |= touched;
        if self.state_due && status == TxnStatus::Idle && self.tracker.is_between() {
            self.ask_for_state();
            return Verdict::Drop;
        }
        Verdict::Pass
    }
}
