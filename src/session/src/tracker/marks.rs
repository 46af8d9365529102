//! Marks in front of what commits by itself, and the extended form of simple queries.
//!
//! The invariant: a mark goes in front of the first statement of an implicit transaction that may
//! write, and of nothing that PostgreSQL refuses to run behind another statement.

use helios_api::Lsn;
use helios_wire::{backend, frontend};

use super::texts::until_zero;
use super::{Before, Form, Lead, ServerStep, Tracker};
use crate::evidence::Mark;
use crate::expect::{Expect, Owner};
use crate::keyword::{Unit, names_parameter, unit};

impl Tracker {
    /// What goes in front of a frame outside a transaction block.
    pub(super) fn lead(&mut self, tag: u8, frame: &[u8], floor: Lsn) -> Before {
        if self.marks_refused || self.expect.awaits_sync() {
            return Before::Go;
        }
        if tag == frontend::SYNC {
            return self.flush_before_commit();
        }
        if self.has_mark(tag) {
            return Before::Go;
        }
        let form = match (tag, self.unit_of(tag, frame)) {
            (frontend::QUERY, Unit::Writes) => Form::Extended,
            (frontend::QUERY, Unit::Copies) => Form::ExtendedCopy,
            (_, Unit::Writes | Unit::Copies) => Form::AsIs,
            _ => return Before::Go,
        };
        let lead = Lead {
            mark: Mark {
                gtid: self.gtids.next_id(),
                floor,
            },
            form,
        };
        self.lead = Some(lead);
        for e in [Expect::Parse, Expect::Bind, Expect::Execute, Expect::Close] {
            self.expect.push(e, Owner::Mark);
        }
        Before::Lead(lead)
    }

    fn flush_before_commit(&self) -> Before {
        let open = self.journal.in_flight().back();
        if open.is_some_and(|e| !e.closed && e.mark.is_some()) {
            Before::Flush
        } else {
            Before::Go
        }
    }

    fn has_mark(&self, tag: u8) -> bool {
        let open = self.journal.in_flight().back();
        !self.opens_exchange(tag) && open.is_some_and(|e| e.mark.is_some())
    }

    /// What a frame runs; [`Unit::Other`] for one that runs nothing, or where a mark would not
    /// speak for it.
    fn unit_of(&self, tag: u8, frame: &[u8]) -> Unit {
        let body = frame.get(5..).unwrap_or_default();
        match tag {
            frontend::QUERY if self.opens_exchange(tag) => {
                let header = helios_wire::peek_header(frame);
                let whole = header.is_ok_and(|h| h.is_some_and(|h| h.len == frame.len()));
                let sql = until_zero(body);
                if whole && !names_parameter(sql) {
                    unit(sql)
                } else {
                    Unit::Other
                }
            }
            frontend::BIND => {
                let portal = until_zero(body);
                let name = until_zero(body.get(portal.len() + 1..).unwrap_or_default());
                self.statement(name).map_or(Unit::Other, |s| s.unit)
            }
            _ => Unit::Other,
        }
    }

    /// Expects the replies to a simple query in its extended form: Parse, Bind, Describe, Execute,
    /// Close, Flush, Sync; for a COPY Parse, Bind, Execute.
    pub(super) fn push_converted(&mut self, form: Form) {
        let copy = form == Form::ExtendedCopy;
        for (e, always) in [
            (Expect::Parse, true),
            (Expect::Bind, true),
            (Expect::DescribePortal, false),
            (Expect::Execute, true),
            (Expect::Close, false),
        ] {
            if always || !copy {
                self.expect.push(e, Owner::Converted);
            }
        }
        if !copy {
            self.expect.push(Expect::Sync, Owner::Client);
        }
    }

    /// Behind a reply to a COPY in its extended form: when it is over without the client's end of
    /// data, the server waits for a Sync.
    pub(super) fn sync_when_over(&mut self, tag: u8) -> ServerStep {
        let over = matches!(tag, backend::ERROR_RESPONSE | backend::COMMAND_COMPLETE);
        let front = self.journal.in_flight_mut().front_mut();
        let Some(front) = front.filter(|e| over && e.sync_owed) else {
            return ServerStep::Forward;
        };
        front.sync_owed = false;
        self.expect.push(Expect::Sync, Owner::Client);
        ServerStep::ForwardThenSync
    }

    /// The server refused the mark: the exchange in front was not done.
    pub(super) fn mark_refused(&mut self) {
        self.marks_refused = true;
        if let Some(front) = self.journal.in_flight_mut().front_mut() {
            front.undone = true;
        }
    }
}
