//! Bringing a session to life on another backend, as `helios_session::decide` says.
//!
//! The invariant: a COMMIT in flight is resolved from evidence before anything is run again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use helios_api::control::{MoveReason, Topology};
use helios_session::TxnStatus;
use helios_session::decide::{Plan, Situation, replay_or_abort};
use helios_session::evidence::{Ended, Fate};
use helios_session::script::Speaks;
use helios_session::state::Prepared;
use helios_telemetry::metrics::{CommitOutcome, ReplayResult};
use helios_wire::message::back;
use helios_wire::{ErrorFields, SqlState};
use tokio::sync::watch;

use super::answers::STATE_UNKNOWN;
use super::evidence;
use super::reads;
use super::registry::{Identity, lock};
use super::replay::{self, How, ReplayError, ended};
use super::resolve::Outcome;
use super::restarts::Life;
use super::session::{End, OldBackend, Server, Session, Skip};
use super::turn::Turn;

/// What a difference comes from when an attempt before has missed its turn.
const LATE: &str = "the replay did not end in the time in which sequences may be set back to the \
    values that were seen";

/// Why an attempt to rebuild the session did not succeed.
pub(super) enum Attempt {
    /// It may be tried again.
    Retry(String),
    /// There is no primary to try it on at the moment.
    Away(String),
    /// The gate moved on; what was tried is void.
    Superseded,
    /// The session ends.
    End(End),
}

impl From<End> for Attempt {
    fn from(end: End) -> Self {
        Self::End(end)
    }
}

impl Session {
    pub(super) async fn rebuild_on(
        &mut self,
        mut server: Server,
        topology: &Topology,
    ) -> Result<(), Attempt> {
        if self.asking.take().is_some() {
            self.state_lost();
        }
        loop {
            let plan = match self.plan() {
                _ if !self.may_move(topology) => Plan::Disconnect,
                // Only where nothing can have committed: a COMMIT in flight is resolved first.
                Plan::Replay if self.forced.is_some() || self.state_due => Plan::Abort {
                    reason: self.forced.take().unwrap_or_else(|| STATE_UNKNOWN.into()),
                },
                plan => plan,
            };
            tracing::debug!(session = %self.entry().id, ?plan, "session is rebuilt");
            match plan {
                Plan::Disconnect => return Err(Attempt::End(self.disconnect())),
                Plan::ProveRead { at } => self.prove_read(at, topology).await?,
                Plan::FindMarks => self.find_marks(topology).await?,
                Plan::FindPrepared { at } => self.find_prepared(at, &mut server, topology).await?,
                Plan::Finish if self.forced.is_none() && self.skip.is_none() => {
                    self.finish_front();
                }
                Plan::Finish => self.results_lost()?,
                Plan::ResultsLost => self.deliver_counted(topology).await?,
                Plan::ProveInside { at } => self.prove_inside(at, topology).await?,
                Plan::FirstCommitted => self.first_committed()?,
                Plan::Complete => self.deliver_commit()?,
                Plan::Unknown { .. } => self.outcome_unknown("the evidence is missing")?,
                Plan::Resolve { at, xid } => {
                    let ran = ((self.epoch, self.timeline), self.life());
                    let exchange = self.tracker.journal().in_flight().get(at);
                    let gid = exchange.and_then(|e| self.tracker.prepares_transaction(e));
                    let (shared, on) = (&self.shared, (topology, &mut server.link));
                    let outcome = evidence::outcome(shared, on, ran, xid, gid.as_deref()).await;
                    match outcome.map_err(retry)? {
                        Outcome::Committed if at == 0 || self.deliver_closes(at) => {
                            self.deliver_commit()?;
                        }
                        Outcome::Committed => {
                            self.outcome_unknown(
                                "the transaction has committed, results are lost",
                            )?;
                        }
                        Outcome::Aborted => {
                            self.shared
                                .metrics
                                .commit_resolution(CommitOutcome::NotCommitted);
                            return self.again(server).await;
                        }
                        Outcome::InProgress => {
                            return Err(Attempt::Retry("the transaction still runs".into()));
                        }
                        Outcome::Unknown => self.outcome_unknown("the evidence is gone")?,
                    }
                }
                Plan::Abort { reason } => return self.abort(server, &reason).await,
                Plan::Replay => return self.again(server).await,
            }
        }
    }

    /// What is known of the life of the server that the open transaction ran on.
    fn life(&self) -> Life {
        let identity = lock(&self.entry().identity).clone();
        let journal = self.tracker.journal();
        // Without a record the transaction began with what is in flight, or its journal is lost.
        let began = self.entry().began.load(Ordering::Relaxed);
        let first = journal.in_flight().front().map(|e| e.at_micros);
        let record = journal.records().last().map(|r| r.at_micros);
        let answered = record.or((began > 0).then_some(began)).or(first);
        Life {
            epoch: self.epoch,
            since: identity.since,
            floor: identity.floor,
            answered: answered.unwrap_or(0).min(first.unwrap_or(u64::MAX)),
        }
    }

    /// Looks in the log for the marks of what commits by itself.
    async fn find_marks(&mut self, topology: &Topology) -> Result<(), Attempt> {
        let ran_on = (self.epoch, self.timeline);
        let shared = std::sync::Arc::clone(&self.shared);
        let in_flight = self.tracker.journal_mut().in_flight_mut();
        for exchange in in_flight.iter_mut().filter(|e| e.fate.is_none()) {
            let Some(mark) = exchange.mark else { continue };
            // What runs later in it may have another one.
            let known = match exchange.speaks {
                Speaks::All => self.registered.entry.running.id_of(mark.gtid),
                Speaks::First | Speaks::Calls(_) => None,
            };
            let fate = evidence::fate(&shared, topology, ran_on, mark, known).await;
            let fate = fate.map_err(retry)?;
            tracing::debug!(gtid = %mark.gtid, ?fate, "outcome of a statement");
            exchange.fate = Some(fate);
            if fate == Fate::NotCommitted {
                shared
                    .metrics
                    .commit_resolution(CommitOutcome::NotCommitted);
            }
        }
        Ok(())
    }

    /// Finds out whether an exchange has ended its prepared transaction.
    async fn find_prepared(
        &mut self,
        at: usize,
        server: &mut Server,
        topology: &Topology,
    ) -> Result<(), Attempt> {
        let ran_on = (self.epoch, self.timeline);
        let Some(exchange) = self.tracker.journal().in_flight().get(at) else {
            return Ok(());
        };
        let ended = match self.tracker.ends_prepared(exchange) {
            Some((gid, commits)) => {
                let (link, told) = (&mut server.link, exchange.ends);
                let ended = evidence::ended(link, topology, ran_on, &gid, told, commits);
                ended.await.map_err(retry)?
            }
            None => Ended::Unknown,
        };
        if let Some(exchange) = self.tracker.journal_mut().in_flight_mut().get_mut(at) {
            exchange.ended = Some(ended);
        }
        Ok(())
    }

    /// Finds out whether an exchange outside a transaction block can have written.
    async fn prove_read(&mut self, at: usize, topology: &Topology) -> Result<(), Attempt> {
        let journal = self.tracker.journal();
        let Some(exchange) = journal.in_flight().get(at) else {
            return Ok(());
        };
        let texts = self.tracker.texts_of(journal.exchange_bytes(exchange));
        let database = self.entry().login.database.clone();
        let proven = reads::only_read(&self.shared, topology, &database, texts).await;
        let proven = proven.map_err(retry)?;
        if let Some(exchange) = self.tracker.journal_mut().in_flight_mut().get_mut(at) {
            exchange.only_reads = Some(proven);
        }
        Ok(())
    }

    /// Finds out what an exchange does to transactions while it runs.
    async fn prove_inside(&mut self, at: usize, topology: &Topology) -> Result<(), Attempt> {
        let Some(exchange) = self.tracker.journal().in_flight().get(at) else {
            return Ok(());
        };
        let texts = match exchange.cut {
            true => Vec::new(),
            false => self.tracker.calls_of(exchange),
        };
        let database = self.entry().login.database.clone();
        let inside = reads::inside(&self.shared, topology, &database, &texts).await;
        let inside = inside.map_err(retry)?;
        tracing::debug!(?inside, "what a call does to transactions");
        if let Some(exchange) = self.tracker.journal_mut().in_flight_mut().get_mut(at) {
            exchange.speaks = Speaks::Calls(Some(inside));
        }
        Ok(())
    }

    pub(super) fn may_move(&self, topology: &Topology) -> bool {
        let options = &self.shared.options;
        match self.gate.reason {
            _ if self.epoch == topology.epoch => true,
            MoveReason::Switchover => options.move_on_maintenance,
            MoveReason::Failover | MoveReason::ConnectionLoss => options.move_on_failure,
        }
    }

    /// Nothing has committed: runs everything again, or gives up where that cannot be.
    pub(super) async fn again(&mut self, server: Server) -> Result<(), Attempt> {
        if self.state_due {
            self.forced.get_or_insert_with(|| STATE_UNKNOWN.into());
        }
        if let Some(reason) = self.forced.take() {
            return self.abort(server, &reason).await;
        }
        let in_flight = self.tracker.in_flight();
        let unprotected = self.unprotected();
        let plan = replay_or_abort(&Situation {
            mode: self.tracker.mode(),
            status: self.tracker.status(),
            unprotected: unprotected.as_deref(),
            in_flight: &in_flight,
        });
        match plan {
            Plan::Abort { reason } => self.abort(server, &reason).await,
            _ if self.has_failed_for_good() => self.fail_again(server).await,
            _ => self.replay_on(server).await,
        }
    }

    pub(super) async fn replay_on(&mut self, mut server: Server) -> Result<(), Attempt> {
        let prepared = self.prepared_at_begin();
        let mut next = self.tracker.successor(&prepared);
        let result = self.run_again(&mut server, &prepared, &mut next).await;
        match result {
            Ok(()) => {
                self.replayed = self.tracker.journal().records().len() as u64;
                self.remember_in_flight()?;
                self.install(server, next);
                Ok(())
            }
            Err(e) if e.is_transient() => {
                self.one_by_one |= matches!(e, ReplayError::Unseen);
                Err(retry(e))
            }
            Err(e) => {
                // The backend is in an unknown state; the abort needs a fresh one.
                self.give_up_locks(&e);
                self.forced = Some(match self.late {
                    true => format!("{e}; {LATE}"),
                    false => e.to_string(),
                });
                self.shared
                    .metrics
                    .replay(ReplayResult::Mismatch, Duration::ZERO);
                Err(retry(e))
            }
        }
    }

    pub(super) async fn run_again(
        &mut self,
        server: &mut Server,
        prepared: &[(Vec<u8>, Prepared)],
        next: &mut helios_session::tracker::Tracker,
    ) -> Result<(), ReplayError> {
        let later = self.can_wait(prepared);
        let makers = &self.shared.makers;
        let temporary = self.kept().map(|kept| (kept, &later, makers));
        let usable = self.name_no_objects(prepared);
        let (link, restored) = (&mut server.link, (server.restored.as_deref(), usable));
        replay::restore(link, restored, &self.state, temporary, prepared).await?;
        if self.tracker.status() == TxnStatus::Idle {
            self.make_rest_later(later);
            return Ok(());
        }
        // Before anything of the client's: its first statement may decide over its snapshot.
        if server.floor.is_none() {
            server.floor = Some(evidence::flush_position(&mut server.link).await?);
        }
        // Beside new work a sequence that is set back would give its values to others too.
        let mut barrier = self.shared.barrier.subscribe();
        let mut up = self.gate.phase.replays() && *barrier.borrow_and_update();
        let mut turn = match self.values_since() {
            Some(since) if up => {
                let turn = self.turn(&mut barrier, since).await;
                self.late |= turn.is_err() && !*barrier.borrow();
                turn?
            }
            _ => Turn::beside(&self.shared, None).await,
        };
        if let Some(taken) = self
            .take_ahead(server, &mut turn, next, &mut barrier)
            .await?
        {
            replay::prepare_unnamed(&mut server.link, prepared).await?;
            self.wait_for_turns().await;
            turn = Turn::beside(&self.shared, Some(taken)).await;
            up = *barrier.borrow_and_update();
        }
        self.run_journal(server, next, turn, (barrier, up)).await
    }

    /// Runs the journal, until it is through or may not go on: because the barrier, which was `up` or
    /// not, has changed.
    async fn run_journal(
        &mut self,
        server: &mut Server,
        next: &mut helios_session::tracker::Tracker,
        mut turn: Turn,
        (mut barrier, mut up): (watch::Receiver<bool>, bool),
    ) -> Result<(), ReplayError> {
        let sets_back = turn.sets_back();
        let mut gate = self.shared.gate.watch();
        let held = AtomicBool::new(self.gate.phase.replays());
        let how = How {
            lossy: self.gate.topology.may_have_lost(self.epoch),
            held: &held,
            options: &self.shared.options,
        };
        let entry = self.entry();
        let under_way = entry.replay.begin(self.tracker.journal().records().len());
        let (old, link) = (&self.tracker, &mut server.link);
        let replay = replay::replay(link, old, next, &mut turn, &under_way, how);
        let opened = async {
            let _ = gate.wait_for(|now| !now.phase.replays()).await;
            held.store(false, Ordering::Relaxed);
            std::future::pending::<()>().await;
        };
        let result = tokio::select! {
            // First: a turn that came too late must set nothing back.
            biased;
            _ = barrier.wait_for(|now| {
                if up && !now && self.overstays(&sets_back) {
                    up = false;
                }
                *now != up
            }) => Err(ReplayError::Connection(std::io::ErrorKind::TimedOut.into())),
            () = opened => Err(ended()),
            result = replay => result,
        };
        drop(under_way);
        self.late |=
            up && result.is_err() && sets_back.load(Ordering::Relaxed) && !*barrier.borrow();
        result
    }

    /// The right to replay where sequences may be set back, waited for while the barrier is up: who
    /// still waits for it then would have others wait behind him.
    async fn turn(
        &self,
        barrier: &mut watch::Receiver<bool>,
        since: u64,
    ) -> Result<Turn, ReplayError> {
        let at = &self.gate.topology.primary.endpoint;
        let database = &self.entry().login.database;
        let how = (since, self.one_by_one);
        tokio::select! {
            biased;
            _ = barrier.wait_for(|up| !up) => {
                Err(ReplayError::Connection(std::io::ErrorKind::TimedOut.into()))
            }
            turn = Turn::take(&self.shared, at, database, &self.tracker, how) => turn,
        }
    }

    /// The barrier has fallen: whether the replay goes on beside the new work. It has to be over where
    /// sequences are set back, and where other proxies may do so next: what is left may draw from
    /// them.
    fn overstays(&self, sets_back: &AtomicBool) -> bool {
        !sets_back.load(Ordering::Relaxed) && lock(&self.shared.turn_until).is_none()
    }

    pub(super) fn prepared_at_begin(&self) -> Vec<(Vec<u8>, Prepared)> {
        self.tracker
            .prepared()
            .at_begin()
            .map(|(n, p)| (n.to_vec(), p.clone()))
            .collect()
    }

    /// Keeps what was in flight, to be sent in the phase *send*.
    pub(super) fn remember_in_flight(&mut self) -> Result<(), Attempt> {
        let journal = self.tracker.journal();
        let mut again = BytesMut::new();
        for exchange in journal.in_flight() {
            again.extend_from_slice(journal.exchange_bytes(exchange));
        }
        // When nothing is in flight, what an earlier rebuild left to send has not been sent yet.
        if !again.is_empty() {
            self.resend = Some(again);
        }
        let Some(front) = journal.in_flight().front() else {
            return Ok(());
        };
        if let Some(from) = front.unseen_from() {
            // The client has seen nothing of it: it gets what the statement gives now.
            self.client.output.truncate(from);
            return Ok(());
        }
        if front.reply.inside_message() {
            return Err(Attempt::End(End::Fatal(
                ErrorFields::fatal(
                    SqlState::CONNECTION_FAILURE,
                    "the primary failed in the middle of a row",
                )
                .detail("Rows over 1 MiB are passed on as they come and cannot be taken back."),
            )));
        }
        // One that is not through is of an earlier move: the client has more than this backend gave.
        let had = (front.reply.messages > 0).then(|| Skip {
            messages: front.reply.messages,
            failed: front.has_told_error(),
            rolled_back: front.reply.completed(b"ROLLBACK"),
            digest: front.reply.digest(),
        });
        self.skip = self.skip.or(had);
        Ok(())
    }

    pub(super) fn install(&mut self, server: Server, next: helios_session::tracker::Tracker) {
        let restored = self.kept().is_some();
        self.tracker = next.on(&server.link.parameters);
        self.epoch = server.epoch;
        self.timeline = self.gate.topology.timeline;
        self.old = OldBackend::at(server.pid, &server.endpoint);
        *lock(&self.entry().identity) = Identity {
            floor: server.floor,
            ..Identity::new(server.pid, server.epoch, self.shared.now_micros())
        };
        for (name, value) in &server.link.parameters {
            if self.known.get(name) != Some(value) {
                back::parameter_status(&mut self.client.output, name, value);
                self.known.insert(name.clone(), value.clone());
            }
        }
        self.tell_listener(server.pid);
        self.temporary_installed(restored);
        self.server = Some(server);
        if !self.gate.phase.replays() {
            self.shared.new_work(self.epoch);
        }
        (self.attempts, self.retry_at) = (0, None);
        (self.state_due, self.one_by_one, self.late) = (false, false, false);
        // One that is still under way is for a backend of the past.
        self.entry().cancel_under_way.store(false, Ordering::SeqCst);
        self.show_instance();
        self.charge();
    }

    /// What was in flight goes to the rebuilt backend as if the client had just sent it: in front
    /// of what it has sent since.
    pub(super) fn send_in_flight(&mut self) {
        if self.server.is_none() {
            return;
        }
        self.rebuilt = false;
        let Some(again) = self.resend.take() else {
            return;
        };
        self.resend_left = again.len();
        let since = std::mem::replace(&mut self.client.input, again);
        self.client.input.extend_from_slice(&since);
        self.client.passing = 0;
    }
}

pub(super) fn retry(e: ReplayError) -> Attempt {
    Attempt::Retry(e.to_string())
}
