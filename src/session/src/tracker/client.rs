//! What a client's message means: requests it makes, statements it carries, when to ask the server
//! something of our own.

use std::sync::Arc;

use helios_wire::frontend;

use super::texts::until_zero;
use super::{Ask, ClientStep, Named, Tracker, XidKnowledge};
use crate::ReplayMode;
use crate::expect::{Expect, Owner};
use crate::journal::SyncOwed;
use crate::keyword::{Hint, Unit, hint, touches_session, unit};
use crate::last_values;
use crate::plain;
use crate::script::Speaks;
use crate::state::Prepared;

impl Tracker {
    /// Whether a client's message of this type begins a new exchange.
    #[must_use]
    pub fn opens_exchange(&self, tag: u8) -> bool {
        match self.journal.in_flight().back() {
            None => true,
            Some(last) => last.closed && !(last.copy_tail && tag == frontend::SYNC),
        }
    }

    pub(super) fn back_closed(&self) -> bool {
        self.journal.in_flight().back().is_some_and(|e| e.closed)
    }

    pub(super) fn copy_frame(
        &mut self,
        tag: u8,
        expect: Option<Expect>,
        frame: &[u8],
    ) -> ClientStep {
        let mut step = ClientStep::default();
        if let Some(expect) = expect {
            self.expect.push(expect, Owner::Client);
        }
        if let Some(last) = self.journal.in_flight_mut().back_mut() {
            last.copy_tail = last.closed;
            if tag != frontend::COPY_DATA {
                last.copies_ended += 1;
                step.sync_after = std::mem::take(&mut last.sync_owed) != SyncOwed::No;
            }
        }
        if step.sync_after {
            self.expect.push(Expect::Sync, Owner::Client);
        }
        self.client_more(frame);
        step
    }

    pub(super) fn push_request(&mut self, expect: Option<Expect>, named: Option<Named>) {
        let Some(expect) = expect else { return };
        if self.expect.push(expect, Owner::Client)
            && let Some(named) = named
        {
            self.named.push_back(named);
        }
    }

    /// Notes what a frame means for the exchange that it belongs to.
    pub(super) fn note(&mut self, tag: u8, frame: &[u8], looked: &Looked) {
        let &Looked {
            hint,
            unit,
            touches,
            ..
        } = looked;
        let statement = matches!(hint, Some(Hint::Read | Hint::Write | Hint::Copy))
            || tag == frontend::FUNCTION_CALL;
        if statement && let Some(last) = self.xids.back_mut() {
            last.dirty = true;
        }
        if self.mode != ReplayMode::None {
            self.journal.append(frame);
        }
        if !self.asks_last_values && matches!(tag, frontend::QUERY | frontend::PARSE) {
            self.asks_last_values = last_values::asks(frame);
        }
        match hint {
            Some(Hint::Begin) => self.project(true),
            Some(Hint::Commit | Hint::Rollback) => self.project(false),
            _ => {}
        }
        // Its first word does not speak for the others.
        let several = tag == frontend::QUERY && several(frame);
        if several && let Some(last) = self.xids.back_mut() {
            last.dirty = true;
        }
        self.note_end_of_statements(hint, frame, several);
        let Some(exchange) = self.journal.in_flight_mut().back_mut() else {
            return;
        };
        exchange.writes |= hint == Some(Hint::Write) || tag == frontend::FUNCTION_CALL;
        let runs = tag == frontend::FUNCTION_CALL;
        exchange.runs |= runs || hint.is_some_and(|h| h != Hint::Empty);
        exchange.doubtful |= runs || several || matches!(hint, Some(Hint::Write | Hint::Copy));
        exchange.touches |= touches || hint == Some(Hint::Session);
        exchange.mixed |= unit == Some(Unit::Other) || tag == frontend::FUNCTION_CALL;
        if unit == Some(Unit::Calls) {
            exchange.mixed |= exchange.mark.is_none();
            exchange.speaks = Speaks::Calls(None);
        }
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

    pub(super) fn project(&mut self, open: bool) {
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
    pub(super) fn look(&self, tag: u8, frame: &[u8]) -> Looked {
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            frontend::QUERY => {
                let sql = until_zero(body);
                Looked {
                    hint: Some(hint(sql)),
                    // One that the mark speaks for goes another way.
                    unit: Some(Unit::Other),
                    touches: touches_session(sql),
                    named: None,
                }
            }
            frontend::PARSE => look_at_parse(frame, body),
            frontend::BIND => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                let statement = self.statement(name);
                Looked {
                    hint: Some(statement.map_or(Hint::Write, |s| s.hint)),
                    unit: Some(statement.map_or(Unit::Other, |s| s.unit)),
                    touches: statement.is_none_or(|s| s.touches),
                    named: None,
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
                    named,
                    ..Looked::default()
                }
            }
            _ => Looked::default(),
        }
    }

    /// The text of the protocol's prepared statement of this name, when everything sent has been
    /// run.
    #[must_use]
    pub fn prepared_text(&self, name: &[u8]) -> Option<&[u8]> {
        let parse = &self.statement(name)?.parse;
        let body = parse.get(5..)?;
        Some(until_zero(body.get(until_zero(body).len() + 1..)?))
    }

    /// The prepared statement that the server is describing.
    #[must_use]
    pub fn describing(&self) -> Option<&[u8]> {
        match self.named.front() {
            Some(Named::Describe(name)) => Some(name),
            _ => None,
        }
    }

    /// The statement of this name when everything sent has been run.
    pub(super) fn statement(&self, name: &[u8]) -> Option<&Prepared> {
        let sent = self.named.iter().rev().find_map(|n| match n {
            Named::Parse(parsed, statement) if parsed == name => Some(statement),
            _ => None,
        });
        sent.or_else(|| self.prepared.get(name))
    }

    /// Whether to ask behind the exchange that was just sent: it wrote, probably.
    pub(super) fn wants_ask_after(&self) -> bool {
        self.mode.replays()
            && self.projected_open
            && self.journal.in_flight().back().is_some_and(|e| e.writes)
            && self
                .xids
                .back()
                .is_some_and(|x| x.known.is_none() && x.pending == 0)
    }

    pub(super) fn push_ask(&mut self, ask: Ask) {
        let Some(last) = self.xids.back_mut() else {
            return;
        };
        last.pending += 1;
        last.asked = true;
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

    /// Expects an exchange of the proxy's own, between exchanges of the client: so many times Parse,
    /// Bind, Execute, Close, then Sync.
    pub fn push_own_exchange(&mut self, statements: usize) {
        for _ in 0..statements {
            for e in [Expect::Parse, Expect::Bind, Expect::Execute, Expect::Close] {
                self.expect.push(e, Owner::Proxy);
            }
        }
        self.expect.push(Expect::Sync, Owner::Proxy);
    }
}

pub(super) fn look_at_parse(frame: &[u8], body: &[u8]) -> Looked {
    let name = until_zero(body);
    let sql = until_zero(body.get(name.len() + 1..).unwrap_or_default());
    let touches = touches_session(sql);
    let statement = Prepared {
        parse: Arc::from(frame),
        hint: hint(sql),
        unit: unit(sql),
        plain: plain::key(sql),
        touches,
        made_inside: false,
        columns: None,
        description: None,
    };
    Looked {
        touches,
        named: Some(Named::Parse(name.to_vec(), statement)),
        ..Looked::default()
    }
}

/// Whether a Query may hold more than one statement.
fn several(frame: &[u8]) -> bool {
    let sql = until_zero(frame.get(5..).unwrap_or_default()).trim_ascii_end();
    sql.strip_suffix(b";").unwrap_or(sql).contains(&b';')
}

#[derive(Default)]
pub(super) struct Looked {
    pub(super) hint: Option<Hint>,
    pub(super) unit: Option<Unit>,
    pub(super) touches: bool,
    pub(super) named: Option<Named>,
}
