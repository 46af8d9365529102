//! What the proxy asks of a session's state, and what it answers in a server's place.
//!
//! The invariant: a client gets its ReadyForQuery only when the state behind it is known.

use helios_api::protection::Unprotected;
use helios_session::TxnStatus;
use helios_session::locks::{carry_counts, count_sql};
use helios_session::state::Snapshot;
use helios_wire::frontend;
use helios_wire::message::back;

use super::gate::Phase;
use super::kept::Has;
use super::own;
use super::session::{Event, Session};

impl Session {
    pub(super) fn state_row(&mut self, at: usize, len: usize) {
        let (Some(state), Some(server)) = (self.asking.as_mut(), self.server.as_ref()) else {
            return;
        };
        let row = super::replay::text_row(&server.link.input[at + 5..at + len]);
        if let [Some(kind), Some(name), Some(value)] = row.as_slice() {
            state.add_row(kind, name, value, &self.registered.entry.login.user);
        }
    }

    /// Asks the backend for the session's state; the client's ReadyForQuery waits for the answer,
    /// so that a failover never finds a state that nobody knows.
    pub(super) fn ask_for_state(&mut self) {
        self.state_due = false;
        let Some(server) = self.server.as_mut() else {
            return;
        };
        self.tracker.push_own_exchange(1);
        own::snapshot(&mut server.link.output, self.tracker.custom_settings());
        self.asking = Some(Snapshot::default());
    }

    /// Behind a dropped frame: the answer to the question for the state may be complete.
    pub(super) fn after_drop(&mut self) {
        if self.asking.is_some()
            && self.tracker.is_quiet()
            && let Some(state) = self.asking.take()
            && let Some(state) = self.with_counts(state)
        {
            self.learn_state(state);
            back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
        }
    }

    /// The server refused a question for the state.
    pub(super) fn state_refused(&mut self) {
        if let Some(state) = &mut self.asking {
            let reason = Unprotected::StateUnknown;
            state.immovable.push((reason, reason.text().into()));
        }
    }

    /// The state with how often each advisory lock was taken; `None` when the server is being asked.
    fn with_counts(&mut self, mut state: Snapshot) -> Option<Snapshot> {
        if state.counted {
            if state.locks.values().any(Option::is_none) {
                // Some may have been given up before it failed.
                let reason = "session advisory locks, which could not be counted";
                state
                    .immovable
                    .push((Unprotected::AdvisoryLock, reason.into()));
                self.refuse = Some(super::answers::retryable(reason));
            }
            return Some(state);
        }
        let calls = self.tracker.take_calls();
        let known = carry_counts(&self.state.locks, &mut state.locks, calls);
        let server = self.server.as_mut().filter(|_| !known);
        let Some(server) = server else {
            return Some(state);
        };
        let sql = count_sql(&state.locks);
        self.tracker.push_own_exchange(sql.len());
        let sql: Vec<&str> = sql.iter().map(String::as_str).collect();
        own::statements(&mut server.link.output, &sql);
        state.counted = true;
        self.asking = Some(state);
        None
    }

    pub(super) fn learn_state(&mut self, mut state: Snapshot) {
        state.counted = false;
        let names: std::collections::BTreeSet<&str> =
            state.protocol_prepared.iter().map(String::as_str).collect();
        self.tracker
            .prepared_mut()
            .reconcile(|name| std::str::from_utf8(name).is_ok_and(|n| names.contains(n)));
        self.tracker.set_holds(!state.immovable.is_empty());
        let (temporary, cursors) = (
            self.shared.options.capture_temporary,
            self.shared.options.capture_cursors,
        );
        let mut has = Has::default();
        state.immovable.retain(|(reason, _)| match reason {
            Unprotected::TemporaryObject => {
                has.objects |= temporary;
                !temporary
            }
            Unprotected::CursorWithHold => {
                has.cursors |= cursors;
                !cursors
            }
            _ => true,
        });
        self.has_own(has);
        self.state = state;
        self.show_protection();
    }

    /// Why a failover now would cost this session an error.
    pub(super) fn unprotected(&self) -> Option<String> {
        let options = &self.shared.options;
        if let Some(lost) = self.tracker.journal().lost() {
            return Some(lost.to_owned());
        }
        if !options.capture_settings && !self.state.settings.is_empty() {
            return Some(Unprotected::SettingsNotCaptured.text().into());
        }
        let statements = !self.tracker.prepared().is_empty() || !self.state.prepared.is_empty();
        if !options.capture_prepared && statements {
            return Some(Unprotected::StatementsNotCaptured.text().into());
        }
        let immovable = self.state.immovable.first().map(|(_, which)| which.clone());
        immovable.or_else(|| self.temporary_unkept())
    }

    /// Answers the client's message without a server, where the session owes it an error.
    pub(super) fn answer_ourselves(
        &mut self,
        tag: u8,
        len: usize,
        whole: bool,
    ) -> Result<bool, Event> {
        if self.discarding {
            self.drop_client_message(len, whole);
            if tag == frontend::SYNC {
                self.discarding = false;
                back::ready_for_query(&mut self.client.output, self.tracker.status().byte());
            }
            return Ok(true);
        }
        if !self.tracker.at_boundary() || !self.tracker.is_between() || self.corked_by_move() {
            return Ok(false);
        }
        let Some(fields) = self.refuse.take() else {
            return Ok(false);
        };
        fields.write_error(&mut self.client.output);
        self.drop_client_message(len, whole);
        match tag {
            frontend::QUERY | frontend::FUNCTION_CALL | frontend::SYNC => {
                back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
            }
            _ => self.discarding = true,
        }
        Ok(true)
    }

    pub(super) fn drop_client_message(&mut self, len: usize, whole: bool) {
        self.rows_taken();
        if whole {
            self.client.skip(len);
        } else {
            self.client.passing = len - self.client.input.len();
            self.client.input.clear();
            self.dropping_rest = true;
        }
    }

    pub(super) fn corked_by_move(&self) -> bool {
        self.gate.phase != Phase::Open
    }
}
