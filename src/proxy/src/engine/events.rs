//! What a session tells of itself: its protection, and the beginning and end of its migrations.
//!
//! The invariant: a migration that has begun ends once, as completed or failed, in events, metrics,
//! the log and the history alike; a drain that is undone has moved nobody.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use helios_api::control::{MigrationEvent, MoveReason};
use helios_api::protection::Unprotected;
use helios_session::tracker::Alone;
use helios_session::{ReplayMode, TxnStatus};
use helios_wire::{ErrorFields, SqlState};
use tokio::time::Instant;

use super::history::{Ended, Migration, Outcome};
use super::protection::{Meter, Unit};
use super::registry::lock;
use super::session::{End, Session};

/// What a session has noted of its protection.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Noted {
    /// Why a failover now would cost it an error.
    pub now: Option<Unprotected>,
    /// A transaction block is open.
    pub inside: bool,
    /// The first reason since the last transaction ended.
    pub first: Option<Unprotected>,
}

/// Where a session stands in its migration.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Moving {
    /// In none.
    #[default]
    No,
    /// In the one of this number.
    Began(u64),
    /// Its client has been told that it failed; the session goes on all the same.
    Failed,
}

fn name(reason: MoveReason) -> &'static str {
    match reason {
        MoveReason::Switchover => "switchover",
        MoveReason::Failover => "failover",
        MoveReason::ConnectionLoss => "connection_loss",
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Session {
    /// Why a failover now would cost this session an error; cheap.
    pub(super) fn flaw(&self) -> Option<Unprotected> {
        let options = &self.shared.options;
        let mode = self.tracker.mode();
        if mode == ReplayMode::None {
            return Some(Unprotected::ReplayOff);
        }
        if let Some(lost) = self.tracker.journal().lost_reason() {
            return Some(lost);
        }
        if self.tracker.status() != TxnStatus::Idle && !mode.replays() {
            return Some(Unprotected::TransactionsNotReplayed);
        }
        if !options.capture_settings && !self.state.settings.is_empty() {
            return Some(Unprotected::SettingsNotCaptured);
        }
        let statements = !self.tracker.prepared().is_empty() || !self.state.prepared.is_empty();
        if !options.capture_prepared && statements {
            return Some(Unprotected::StatementsNotCaptured);
        }
        let immovable = self.state.immovable.first().map(|(reason, _)| *reason);
        immovable.or_else(|| self.own_unkept())
    }

    /// Begins to count the session's time.
    pub(super) fn begin_meter(&mut self) {
        self.noted.now = self.flaw();
        let counts = self.shared.ledger.counts(&self.entry().who);
        let meter = Meter::begin(counts, self.shared.started, self.noted.now);
        let _ = self.entry().meter.set(meter);
    }

    /// Notes the protection, shows it in the list of sessions, and counts the time by it.
    pub(super) fn show_protection(&mut self) {
        self.note_protection(self.noted.inside);
        let mut shown = lock(&self.entry().shown);
        shown.unprotected = self.unprotected();
        shown.listens = !self.state.channels.is_empty();
    }

    fn note_protection(&mut self, inside: bool) {
        let now = self.flaw();
        self.noted.first = self.noted.first.or(now);
        if (now, inside) != (self.noted.now, self.noted.inside) {
            (self.noted.now, self.noted.inside) = (now, inside);
            if let Some(meter) = self.entry().meter.get() {
                meter.set(now, inside);
            }
        }
    }

    /// An exchange is answered: counts what has ended with it.
    pub(super) fn count_ended(&mut self, status: TxnStatus, alone: Alone) {
        let was = self.noted;
        self.note_protection(status != TxnStatus::Idle);
        if status == TxnStatus::Idle {
            let first = self.noted.first.take();
            let counts = self.entry().meter.get().map(|m| &m.counts);
            match (counts, alone) {
                (Some(counts), _) if was.inside => counts.ended(Unit::Transaction, first),
                (None, _) | (Some(_), Alone::Nothing) => {}
                (Some(counts), Alone::Provable) => counts.ended(Unit::Statement, first),
                (Some(counts), Alone::InDoubt) => {
                    let doubt = first.or(Some(Unprotected::OutcomeUnknowable));
                    counts.ended(Unit::Statement, doubt);
                }
            }
        }
        // Its words change with the journal's, seldom; the modes have no words of their own.
        if was.now != self.noted.now && !self.mode_alone(was.now) {
            lock(&self.entry().shown).unprotected = self.unprotected();
        }
    }

    fn mode_alone(&self, before: Option<Unprotected>) -> bool {
        let mode = |r: Option<Unprotected>| {
            matches!(
                r,
                None | Some(Unprotected::TransactionsNotReplayed | Unprotected::ReplayOff)
            )
        };
        mode(before) && mode(self.noted.now)
    }

    fn state_bytes(&self) -> u64 {
        let settings = self.state.settings.iter().map(|(n, v)| n.len() + v.len());
        let prepared = self.state.prepared.iter().map(|(n, t)| n.len() + t.len());
        let state = settings.sum::<usize>() + prepared.sum::<usize>();
        let kept = self.temporary.as_ref().and_then(|t| t.kept());
        let rows = kept.map_or(0, super::kept::Kept::size);
        (self.room.used() + self.tracker.prepared().bytes() + state + rows) as u64
    }

    /// Why the session moves, as far as is known.
    fn reason(&self) -> MoveReason {
        if self.moved_by_gate() {
            self.gate.reason
        } else {
            MoveReason::ConnectionLoss
        }
    }

    pub(super) fn moved_by_gate(&self) -> bool {
        self.gate.topology.epoch != self.shown_epoch
    }

    /// There is another primary than the one that the session was on: it begins to move.
    pub(super) fn begin_if_moved(&mut self) {
        if self.moved_by_gate() {
            self.begin_migration();
        }
    }

    /// The session begins to move.
    pub(super) fn begin_migration(&mut self) {
        if self.moving != Moving::No {
            return;
        }
        let (session, reason) = (self.entry().id, self.reason());
        let state_bytes = self.state_bytes();
        let held = self.held_since.map_or(Duration::ZERO, |at| at.elapsed());
        self.replayed = 0;
        self.moving = Moving::Began(self.shared.history.begin(Migration {
            session,
            who: Arc::clone(&self.entry().who),
            at: SystemTime::now() - held,
            reason,
            epoch: self.gate.topology.epoch,
            outcome: Outcome::Started,
            took: None,
            state_bytes,
            replayed: 0,
            error: None,
        }));
        self.shared
            .metrics
            .migration_started(name(reason), state_bytes);
        self.shared.event(MigrationEvent::Started {
            session,
            reason,
            state_bytes,
        });
        tracing::debug!(%session, reason = name(reason), state_bytes, "session begins to move");
    }

    /// The session goes on: events and figures, if it has moved.
    pub(super) fn released(&mut self) {
        let moved = self.moved_by_gate() || self.moving != Moving::No;
        if !moved && self.server.is_none() && self.lost.is_some() {
            // A drain was undone; the backend that it lost meanwhile has still to be replaced.
            return;
        }
        self.forget_lost();
        self.show_state();
        let held = self.held_since.take();
        if !moved {
            return;
        }
        self.begin_migration();
        let (session, reason) = (self.entry().id, self.reason());
        let took = held.map_or(Duration::ZERO, |at| at.elapsed());
        self.shown_epoch = self.gate.topology.epoch;
        lock(&self.entry().shown).migrations += 1;
        self.shared.metrics.pause(name(reason), took);
        let Moving::Began(number) = std::mem::take(&mut self.moving) else {
            return;
        };
        self.shared.metrics.migration(true, name(reason));
        let state_bytes = self.state_bytes();
        self.shared.history.end(
            number,
            Ended {
                reason,
                took,
                replayed: self.replayed,
                error: None,
            },
        );
        self.shared.event(MigrationEvent::Completed {
            session,
            reason,
            micros: micros(took),
            state_bytes,
        });
        if self.shared.options.log_migrations {
            let (reason, instance) = (name(reason), &self.primary().name);
            tracing::info!(%session, reason, ?took, %instance, state_bytes, "session moved");
        }
    }

    /// The client is told of an error that the move cost it; once a migration.
    pub(super) fn failed(&mut self, fields: &ErrorFields, reason: &str) {
        self.begin_migration();
        let text = fields.detail.as_deref().unwrap_or(&fields.message);
        if self.end_failed(fields.sqlstate.as_str(), text) {
            self.shared.count_failed(reason);
            self.shared.metrics.migration(false, name(self.reason()));
        }
        let took = self.held_since.map_or(Duration::ZERO, |at| at.elapsed());
        tracing::info!(
            session = %self.entry().id,
            reason = name(self.reason()),
            ?took,
            state_bytes = self.state_bytes(),
            sqlstate = fields.sqlstate.as_str(),
            detail = fields.detail.as_deref().unwrap_or(""),
            "session could not be moved without an error"
        );
    }

    /// The session ends; so does its migration, if it is in one.
    pub(super) fn end_migration(&mut self, end: &End) {
        let failed = match end {
            End::ClientLeft => self.end_failed("", "the client left"),
            End::HandedOver => false,
            End::Fatal(fields) => self.end_failed(fields.sqlstate.as_str(), &fields.message),
            End::Forward(frame) => {
                let code = SqlState(helios_session::reply::sqlstate(frame));
                self.end_failed(code.as_str(), "the server ended the connection")
            }
        };
        if failed && !matches!(end, End::ClientLeft) {
            self.shared.metrics.migration(false, name(self.reason()));
        }
        if let Some(meter) = self.entry().meter.get() {
            meter.end();
        }
    }

    /// Whether there was a migration to end.
    fn end_failed(&mut self, sqlstate: &str, error: &str) -> bool {
        let Moving::Began(number) = self.moving else {
            return false;
        };
        self.moving = Moving::Failed;
        let reason = self.reason();
        let took = self.held_since.map_or(Duration::ZERO, |at| at.elapsed());
        self.shared.history.end(
            number,
            Ended {
                reason,
                took,
                replayed: self.replayed,
                error: Some((sqlstate.to_owned(), error.to_owned())),
            },
        );
        self.shared.event(MigrationEvent::Failed {
            session: self.entry().id,
            reason,
            micros: micros(took),
            state_bytes: self.state_bytes(),
            sqlstate: sqlstate.to_owned(),
            error: error.to_owned(),
        });
        true
    }

    /// The session stands still, from now on if it did not before.
    pub(super) fn held(&mut self) {
        self.held_since.get_or_insert_with(Instant::now);
    }

    /// No longer held: what the session is doing.
    fn show_state(&self) {
        let state = match (self.tracker.is_between(), self.tracker.status()) {
            (false, _) => 2,
            (true, TxnStatus::Idle) => 1,
            (true, TxnStatus::Open | TxnStatus::Failed) => 3,
        };
        self.entry().set_state(state);
    }

    /// Notes the beginning and the end of the open transaction for the list of sessions.
    pub(super) fn note_age(&self, status: TxnStatus) {
        let began = &self.entry().began;
        match status {
            TxnStatus::Idle => began.store(0, Ordering::Relaxed),
            // Nobody else writes it.
            TxnStatus::Open | TxnStatus::Failed => {
                if began.load(Ordering::Relaxed) == 0 {
                    let first = self.tracker.journal().records().first();
                    let at = first.map_or_else(|| self.shared.now_micros(), |r| r.at_micros);
                    began.store(at.max(1), Ordering::Relaxed);
                }
            }
        }
    }
}
