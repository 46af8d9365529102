//! What goes in front of a client's message on our behalf, and what runs again after a move.
//!
//! The invariant: what runs again commits only when it gave what the client already has.

use std::sync::atomic::Ordering;

use helios_session::script::Speaks;
use helios_session::tracker::{Form, Lead, Learns};
use helios_wire::backend;

use super::own;
use super::pump::Verdict;
use super::session::{Event, Session};

impl Session {
    /// Sends a mark; how the frame behind it, of which so many bytes are there, is sent.
    pub(super) fn set_mark(&mut self, lead: Lead, have: usize) -> Form {
        self.entry()
            .mark_floor
            .fetch_min(lead.mark.floor.0, Ordering::Relaxed);
        let alone = self.tracker.is_between();
        let learns = match self.skip {
            Some(_) => Learns::Compared,
            None if lead.form == Form::Extended && self.is_countable_query(lead.plain, have) => {
                Learns::Counted
            }
            None => Learns::ByFlush,
        };
        let lead = self.tracker.leads(lead, learns);
        if let Some(server) = self.server.as_mut() {
            if alone && lead.speaks == Speaks::All {
                let running = &self.registered.entry.running;
                running.begin(lead.mark.gtid, server.pid);
            }
            let set = if lead.bound {
                own::bound_mark
            } else {
                own::mark
            };
            set(&mut server.link.output, lead.mark.gtid, lead.prepare);
        }
        lead.form
    }

    /// Asks for the prepared transaction that the client's next message ends.
    pub(super) fn ask_gid(&mut self) {
        if let (Some(gid), Some(server)) = (self.tracker.take_gid(), self.server.as_mut()) {
            own::prepared(&mut server.link.output, &gid);
        }
    }

    /// A reply of a re-run exchange that the client already has: checked once all of it is here.
    pub(super) fn skipped(&mut self) -> Verdict {
        let (Some(skip), Some(reply)) = (self.skip, self.tracker.delivered()) else {
            return Verdict::Pass;
        };
        if reply.messages < skip.messages {
            return Verdict::Drop;
        }
        if reply.digest() != skip.digest {
            return self.differs();
        }
        self.skip = None;
        Verdict::Drop
    }

    /// A statement that runs again gave something else than the client was given: its server is
    /// left before it can commit.
    pub(super) fn differs(&mut self) -> Verdict {
        self.rerun.told |= self.skip.take().is_some_and(|skip| skip.failed);
        self.rerun.differed = true;
        self.forced = Some("the statement in flight gave another result than before".into());
        Verdict::Leave
    }

    /// A reply behind which the held back Sync of its statement may go on.
    pub(super) fn forwarded_then_sync(&mut self, tag: u8, at: usize, len: usize) -> Verdict {
        let verdict = self.forwarded(tag, at, len);
        if matches!(verdict, Verdict::Leave) {
            return verdict;
        }
        if self.skip.is_some() {
            return self.differs();
        }
        if let Some(server) = self.server.as_mut() {
            own::flush_and_sync(&mut server.link.output);
        }
        verdict
    }

    /// The client's Sync, which would commit, waits: the exchange runs again, and what the client
    /// has of its reply is still to be compared. The server is made to tell it.
    pub(super) fn hold_sync(&mut self) -> Result<(), Event> {
        if self.tracker.is_quiet() {
            // Everything is answered, and it is less than before.
            self.differs();
            return Err(Event::ServerLost);
        }
        if let Some(server) = self.server.as_mut() {
            own::flush(&mut server.link.output);
        }
        Ok(())
    }

    /// In a transaction that was aborted by us, its first error is ours.
    pub(super) fn replaced(&mut self, tag: u8, at: usize, len: usize) -> Verdict {
        let Some(server) = self.server.as_ref() else {
            return Verdict::Drop;
        };
        let frame = &server.link.input[at..at + len];
        let rolled_back = tag == backend::COMMAND_COMPLETE && frame.get(5..13) == Some(b"ROLLBACK");
        if tag == backend::ERROR_RESPONSE || (rolled_back && self.commit_in_flight()) {
            return self.instead.take().map_or(Verdict::Drop, Verdict::Replace);
        }
        if rolled_back {
            self.instead = None;
        }
        Verdict::Pass
    }
}
