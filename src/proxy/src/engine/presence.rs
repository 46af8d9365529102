//! What others feel of a session while its client is silent: the locks that it holds, the channels
//! that it listens to.
//!
//! Such a session is rebuilt within the barrier (design rule 7), not when its client speaks. The
//! invariant: nobody who comes through the proxy gets a lock, or notifies a channel, before the
//! session that had it has it again, or is about to be told that it has not.

use helios_wire::message::back;
use helios_wire::{ErrorFields, Severity, SqlState};

use super::own;
use super::replay::ReplayError;
use super::session::Session;

impl Session {
    /// Whether the session cannot wait for its client with a new backend.
    pub(super) fn must_rebuild(&self) -> bool {
        self.owes() || (self.server.is_none() && self.state.is_felt_by_others())
    }

    /// Whether there is something that must be had again before the session can go on.
    pub(super) fn owes(&self) -> bool {
        self.tracker.status() != helios_session::TxnStatus::Idle
            || !self.tracker.is_between()
            || self.asking.is_some()
    }

    /// Phase *still*: nobody notifies through the proxy any more. A backend passes on what it has
    /// been notified of before its next ReadyForQuery, outside transactions.
    pub(super) fn hear_out(&mut self) {
        let stands = !self.owes() && self.tracker.is_quiet();
        if self.state.channels.is_empty() || !stands {
            return;
        }
        if let Some(server) = &mut self.server {
            self.tracker.push_own_exchange(0);
            own::statements(&mut server.link.output, &[]);
            self.heard = true;
        }
    }

    /// Tells a client that listens when notifications may not have reached it.
    pub(super) fn tell_listener(&mut self, pid: i32) {
        let heard = std::mem::take(&mut self.heard);
        if heard || self.state.channels.is_empty() {
            return;
        }
        let out = &mut self.client.output;
        let message = "notifications may have been lost, because the primary failed";
        ErrorFields::new(Severity::Warning, SqlState::WARNING, message)
            .detail(format!("Channels: {}.", self.state.channels.join(", ")))
            .hint("Look in the database at what they would have told.")
            .write_notice(out);
        if let Some(payload) = &self.shared.options.lost_notification {
            for channel in &self.state.channels {
                back::notification(out, pid, channel, payload);
            }
        }
    }

    /// When a lock cannot be had again: the session goes on without any, once its client has been
    /// told.
    pub(super) fn give_up_locks(&mut self, error: &ReplayError) -> bool {
        let lost = matches!(error, ReplayError::Lock { .. });
        if lost {
            self.state.locks.clear();
        }
        lost
    }
}
