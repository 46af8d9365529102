//! Changing a session's backend: what to do is decided by `helios_session::decide`, done here.
//!
//! The invariant: nothing is sent again before its outcome is known, and a client is told the truth
//! or nothing.

use std::time::Duration;

use helios_api::control::{MigrationEvent, MoveReason, Topology};
use helios_session::TxnStatus;
use helios_session::decide::{Plan, Situation, decide, replay_or_abort};
use helios_session::grammar::Kind;
use helios_session::state::Prepared;
use helios_telemetry::metrics::{CommitOutcome, ReplayResult};
use helios_wire::message::back;
use helios_wire::{ErrorFields, SqlState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::gate::{GateState, Phase};
use super::registry::lock;
use super::replay::{self, ReplayError};
use super::resolve::{Outcome, resolve};
use super::session::{End, Server, Session, Skip, is_away, is_primary, no_primary};
use crate::backend::{self, BackendConn, BackendError};

/// Why an attempt to rebuild the session did not succeed.
enum Attempt {
    /// It may be tried again.
    Retry(String),
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
    /// The backend's connection ended.
    pub(super) fn server_lost(&mut self) {
        self.server = None;
        self.held();
        self.lost_since.get_or_insert_with(Instant::now);
        self.retry_at = None;
        self.attempts = 0;
        tracing::debug!(session = %self.entry().id, phase = ?self.gate.phase, "backend lost");
    }

    fn held(&mut self) {
        self.held_since.get_or_insert_with(Instant::now);
    }

    /// The gate has changed.
    pub(super) async fn gate_changed(
        &mut self,
        gate: &mut watch::Receiver<GateState>,
    ) -> Result<(), End> {
        let current = self.gate.topology.epoch;
        match self.gate.phase {
            Phase::Open => self.opened(gate).await,
            Phase::Hold | Phase::Freeze => {
                self.held();
                Ok(())
            }
            Phase::Cut => {
                self.held();
                self.cut_in_flight();
                Ok(())
            }
            Phase::Replay => {
                self.held();
                if self.server.as_ref().is_some_and(|s| s.epoch < current) {
                    self.leave_old_server()?;
                }
                if self.server.is_none() && self.must_rebuild() {
                    self.entry().set_state(5);
                    return self.rebuild(gate).await;
                }
                Ok(())
            }
            Phase::Send => self.send_in_flight(),
        }
    }

    async fn opened(&mut self, gate: &mut watch::Receiver<GateState>) -> Result<(), End> {
        let current = self.gate.topology.epoch;
        self.cut = false;
        if self.server.as_ref().is_some_and(|s| s.epoch < current) {
            self.leave_old_server()?;
        }
        self.send_in_flight()?;
        if self.server.is_some() {
            self.released();
        } else if self.must_rebuild() {
            self.retry_at = None;
            return self.find_server(gate).await;
        } else if self.last_words.is_some() || self.lost_since.is_some() {
            // Idle: it needs a backend when its client says something.
            self.last_words = None;
            self.lost_since = None;
            self.released();
        }
        Ok(())
    }

    /// Takes what the old server has sent already, then leaves it: a COMMIT's answer may be there.
    fn leave_old_server(&mut self) -> Result<(), End> {
        let waker = std::task::Waker::noop();
        let mut cx = std::task::Context::from_waker(waker);
        while let Some(server) = &mut self.server {
            let ready = server.link.poll_read(&mut cx);
            let ended = server.link.ended || !matches!(ready, std::task::Poll::Ready(Ok(())));
            if let Err(super::session::Event::End(end)) = self.pump() {
                return Err(end);
            }
            if ended {
                break;
            }
        }
        if let Some(server) = self.server.take()
            && !self.tracker.is_between()
        {
            self.spawn_cancel(&server);
        }
        self.last_words = None;
        Ok(())
    }

    /// Planned move, time is up for statements in flight: those that can run again are cut off.
    fn cut_in_flight(&mut self) {
        if self.tracker.is_between() || self.server.is_none() {
            return;
        }
        match self.plan() {
            Plan::Replay => {
                if let Some(server) = self.server.take() {
                    self.spawn_cancel(&server);
                }
            }
            // Alone and all or nothing: once the server says that it is cancelled, nothing of it
            // lasts.
            _ if self.is_cancellable() => {
                self.cut = true;
                if let Some(server) = &self.server {
                    self.spawn_cancel(server);
                }
            }
            _ => {}
        }
    }

    fn is_cancellable(&self) -> bool {
        let in_flight = self.tracker.journal().in_flight();
        let [one] = in_flight.as_slices().0 else {
            return false;
        };
        let alone = self.tracker.status() == TxnStatus::Idle && in_flight.len() == 1;
        let all_or_nothing = |k: &Kind| {
            matches!(
                k,
                Kind::Read | Kind::LockingRead | Kind::Write | Kind::Harmless
            )
        };
        alone
            && one.closed
            && self
                .tracker
                .kinds(one)
                .is_some_and(|k| k.len() == 1 && k.iter().all(all_or_nothing))
    }

    fn plan(&self) -> Plan {
        let in_flight = self.tracker.in_flight();
        let unprotected = self.unprotected();
        decide(&Situation {
            mode: self.tracker.mode(),
            status: self.tracker.status(),
            unprotected: unprotected.as_deref(),
            in_flight: &in_flight,
        })
    }

    /// Replay phase: tries until the session is rebuilt, the gate moves on, or time is up.
    async fn rebuild(&mut self, gate: &mut watch::Receiver<GateState>) -> Result<(), End> {
        let mut backoff = self.shared.options.replay_backoff;
        loop {
            match self.attempt(gate).await {
                Ok(()) => {
                    self.rebuilt = true;
                    return Ok(());
                }
                Err(Attempt::End(end)) => return Err(end),
                Err(Attempt::Superseded) => return Ok(()),
                Err(Attempt::Retry(why)) => {
                    self.attempts += 1;
                    tracing::debug!(session = %self.entry().id, why, "replay is tried again");
                    if self.attempts >= self.shared.options.max_replay_attempts {
                        self.forced.get_or_insert(why);
                    }
                    if self.too_long() {
                        // Goes on looking from the open gate, where the outage limit ends it.
                        return Ok(());
                    }
                }
            }
            let _ = tokio::time::timeout(backoff, gate.changed()).await;
            let now = gate.borrow().clone();
            if now.topology.epoch != self.gate.topology.epoch || now.phase < Phase::Replay {
                gate.mark_changed();
                return Ok(());
            }
            backoff = (backoff * 2).min(Duration::from_secs(1));
        }
    }

    fn too_long(&self) -> bool {
        let limit = self.shared.options.outage_limit;
        self.held_since.is_some_and(|at| at.elapsed() > limit)
    }

    /// Open gate, no backend: looks for the primary once.
    pub(super) async fn find_server(
        &mut self,
        gate: &mut watch::Receiver<GateState>,
    ) -> Result<(), End> {
        if self.tracker.mode() == helios_session::ReplayMode::None && self.lost_since.is_some() {
            return Err(self.disconnect());
        }
        match self.attempt(gate).await {
            Ok(()) => {
                self.send_in_flight()?;
                self.released();
                Ok(())
            }
            Err(Attempt::End(end)) => Err(end),
            Err(Attempt::Superseded) => Ok(()),
            Err(Attempt::Retry(why)) => {
                self.lost_since.get_or_insert_with(Instant::now);
                self.held();
                let pause = Duration::from_millis(20) * 2_u32.pow(self.attempts.min(5));
                self.attempts += 1;
                self.retry_at = Some(Instant::now() + pause);
                if self.too_long() {
                    return Err(End::Fatal(no_primary(&why)));
                }
                Ok(())
            }
        }
    }

    fn disconnect(&mut self) -> End {
        match self.last_words.take() {
            Some(frame) => End::Forward(frame),
            None => End::Fatal(ErrorFields::fatal(
                SqlState::ADMIN_SHUTDOWN,
                "terminating connection because the primary moved",
            )),
        }
    }

    /// One attempt to get a backend and to bring it to the session's state; void as soon as the
    /// gate's epoch changes.
    async fn attempt(&mut self, gate: &watch::Receiver<GateState>) -> Result<(), Attempt> {
        let mut watch = gate.clone();
        let epoch = self.gate.topology.epoch;
        let from = self.gate.phase;
        let superseded = watch.wait_for(move |g| {
            g.topology.epoch != epoch
                || (g.phase != Phase::Open && g.phase < from)
                || (from == Phase::Open && g.phase != Phase::Open)
        });
        let limit = self.shared.options.max_replay_time;
        let topology = std::sync::Arc::clone(&self.gate.topology);
        tokio::select! {
            biased;
            result = tokio::time::timeout(limit, self.attempt_on(&topology)) => {
                result.unwrap_or_else(|_| Err(Attempt::Retry("replay took too long".into())))
            }
            _ = superseded => Err(Attempt::Superseded),
        }
    }

    async fn attempt_on(&mut self, topology: &Topology) -> Result<(), Attempt> {
        let conn = self.connect(topology).await?;
        let mut server = Server::new(conn, topology.epoch);
        self.check_last_words(&mut server, topology).await?;
        if self.epoch == topology.epoch && self.must_rebuild() {
            if !self.shared.options.replay_on_connection_loss {
                self.forced = Some("replay after a lost connection is switched off".into());
            }
            self.end_old_backend(topology).await?;
        }
        let began = Instant::now();
        let had_work = self.must_rebuild();
        self.rebuild_on(server, topology).await?;
        if had_work {
            self.shared
                .metrics
                .replay(ReplayResult::Success, began.elapsed());
            lock(&self.shared.report).replayed += 1;
        }
        Ok(())
    }

    /// A backend on the primary: one opened ahead of time, or a new one.
    async fn connect(&mut self, topology: &Topology) -> Result<BackendConn, Attempt> {
        let at = &topology.primary.endpoint;
        let warm = lock(&self.entry().warm)
            .take()
            .filter(|c| c.endpoint == *at);
        if let Some(conn) = warm {
            return Ok(conn);
        }
        let shared = std::sync::Arc::clone(&self.shared);
        let permit = shared.logins.acquire().await;
        let login = self.entry().login.clone();
        let limit = shared.options.connect_timeout;
        let result = backend::connect(at, &shared.tls, &login, limit).await;
        drop(permit);
        match result {
            Ok(conn) if is_primary(&conn) => Ok(conn),
            Ok(_) => Err(Attempt::Retry("the server is in recovery".into())),
            Err(BackendError::Refused { fields, frame, .. })
                if !is_away(&fields.sqlstate) && fields.sqlstate.class() != *b"53" =>
            {
                Err(Attempt::End(End::Forward(frame.as_ref().into())))
            }
            Err(e) => Err(Attempt::Retry(e.to_string())),
        }
    }

    /// What the server said before it closed the connection: an administrator's kill stays a kill,
    /// a time-out stays a time-out; a shutdown or crash is a failover.
    async fn check_last_words(
        &mut self,
        server: &mut Server,
        topology: &Topology,
    ) -> Result<(), Attempt> {
        let Some(frame) = self.last_words.take() else {
            return Ok(());
        };
        if self.epoch != topology.epoch || self.gate.phase != Phase::Open {
            return Ok(());
        }
        let code = SqlState(helios_session::reply::sqlstate(&frame));
        if !is_away(&code) {
            return Err(Attempt::End(End::Forward(frame)));
        }
        let known = lock(&self.shared.postmaster_start).clone();
        let sql = "SELECT pg_catalog.pg_postmaster_start_time()::pg_catalog.text";
        let now = match replay::simple(&mut server.link, sql).await {
            Ok(rows) => rows.first().and_then(|r| r.first()).cloned().flatten(),
            Err(e) => {
                self.last_words = Some(frame);
                return Err(Attempt::Retry(e.to_string()));
            }
        };
        if code == SqlState::ADMIN_SHUTDOWN && known.is_some() && known == now {
            return Err(Attempt::End(End::Forward(frame)));
        }
        Ok(())
    }

    /// Only the connection broke, the primary lives: the old backend is terminated and waited for,
    /// before anything of it is resolved or run again (design rule 4).
    async fn end_old_backend(&mut self, topology: &Topology) -> Result<(), Attempt> {
        let Some(pid) = self.old_pid else {
            return Ok(());
        };
        let shared = std::sync::Arc::clone(&self.shared);
        let limit = shared.options.connect_timeout;
        let at = &topology.primary.endpoint;
        let conn = backend::connect(at, &shared.tls, &shared.service, limit)
            .await
            .map_err(|e| Attempt::Retry(e.to_string()))?;
        let mut service = Server::new(conn, topology.epoch);
        let user = helios_session::state::literal(&self.entry().login.user);
        let sql = format!(
            "SELECT pg_catalog.pg_terminate_backend(pid) FROM pg_catalog.pg_stat_activity \
             WHERE pid = {pid} AND usename = {user}"
        );
        for _ in 0..500 {
            let rows = replay::simple(&mut service.link, &sql)
                .await
                .map_err(|e| Attempt::Retry(e.to_string()))?;
            if rows.is_empty() {
                self.old_pid = None;
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Err(Attempt::Retry("the old backend does not end".into()))
    }

    async fn rebuild_on(&mut self, mut server: Server, topology: &Topology) -> Result<(), Attempt> {
        if self.asking.take().is_some() {
            self.state_lost();
        }
        loop {
            let plan = match self.forced.take() {
                _ if !self.may_move(topology) => Plan::Disconnect,
                Some(reason) => Plan::Abort { reason },
                None => self.plan(),
            };
            tracing::debug!(session = %self.entry().id, ?plan, "session is rebuilt");
            match plan {
                Plan::Disconnect => return Err(Attempt::End(self.disconnect())),
                Plan::Complete => self.deliver_commit()?,
                Plan::Unknown { .. } => self.outcome_unknown("the evidence is missing")?,
                Plan::Resolve { at, xid } => {
                    let link = &mut server.link;
                    let outcome = resolve(link, topology, self.epoch, xid).await;
                    match outcome.map_err(retry)? {
                        Outcome::Committed if at == 0 => self.deliver_commit()?,
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

    fn may_move(&self, topology: &Topology) -> bool {
        let options = &self.shared.options;
        match self.gate.reason {
            _ if self.epoch == topology.epoch => true,
            MoveReason::Switchover => options.move_on_maintenance,
            MoveReason::Failover | MoveReason::ConnectionLoss => options.move_on_failure,
        }
    }

    /// Nothing has committed: runs everything again, or gives up where that cannot be.
    async fn again(&mut self, server: Server) -> Result<(), Attempt> {
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
            _ => self.replay_on(server).await,
        }
    }

    async fn replay_on(&mut self, mut server: Server) -> Result<(), Attempt> {
        let prepared = self.prepared_at_begin();
        let mut next = self.tracker.successor(&prepared);
        let result = self.run_again(&mut server, &prepared, &mut next).await;
        match result {
            Ok(()) => {
                self.remember_in_flight()?;
                self.install(server, next);
                Ok(())
            }
            Err(e) if e.is_transient() => Err(retry(e)),
            Err(e) => {
                // The backend is in an unknown state; the abort needs a fresh one.
                self.forced = Some(e.to_string());
                self.shared
                    .metrics
                    .replay(ReplayResult::Mismatch, Duration::ZERO);
                Err(retry(e))
            }
        }
    }

    async fn run_again(
        &mut self,
        server: &mut Server,
        prepared: &[(Vec<u8>, Prepared)],
        next: &mut helios_session::tracker::Tracker,
    ) -> Result<(), ReplayError> {
        replay::restore(&mut server.link, &self.state, prepared).await?;
        if self.tracker.status() == TxnStatus::Idle {
            return Ok(());
        }
        replay::replay(&mut server.link, &self.tracker, next).await
    }

    fn prepared_at_begin(&self) -> Vec<(Vec<u8>, Prepared)> {
        self.tracker
            .prepared()
            .at_begin()
            .map(|(n, p)| (n.to_vec(), p.clone()))
            .collect()
    }

    /// Keeps what was in flight, to be sent in the phase *send*.
    fn remember_in_flight(&mut self) -> Result<(), Attempt> {
        let journal = self.tracker.journal();
        let exchanges = journal.in_flight().iter();
        self.resend = exchanges
            .map(|e| (journal.exchange_bytes(e).to_vec(), e.at_micros))
            .collect();
        let Some(front) = journal.in_flight().front() else {
            return Ok(());
        };
        if front.reply.inside_message() {
            return Err(Attempt::End(End::Fatal(
                ErrorFields::fatal(
                    SqlState::CONNECTION_FAILURE,
                    "the primary failed in the middle of a row",
                )
                .detail("Rows over 1 MiB are passed on as they come and cannot be taken back."),
            )));
        }
        self.skip = (front.reply.messages > 0).then(|| Skip {
            messages: front.reply.messages,
            digest: front.reply.digest(),
        });
        Ok(())
    }

    fn install(&mut self, server: Server, next: helios_session::tracker::Tracker) {
        self.tracker = next;
        self.epoch = server.epoch;
        self.old_pid = Some(server.pid);
        for (name, value) in &server.link.parameters {
            if self.known.get(name) != Some(value) {
                back::parameter_status(&mut self.client.output, name, value);
                self.known.insert(name.clone(), value.clone());
            }
        }
        self.server = Some(server);
        self.attempts = 0;
        self.retry_at = None;
        self.show_instance();
        self.charge();
    }

    /// Sends what was in flight to the rebuilt backend.
    pub(super) fn send_in_flight(&mut self) -> Result<(), End> {
        if !self.rebuilt && self.resend.is_empty() {
            return Ok(());
        }
        let Some(server) = self.server.as_mut() else {
            return Ok(());
        };
        self.rebuilt = false;
        for (bytes, at_micros) in std::mem::take(&mut self.resend) {
            replay::feed(&mut server.link, &mut self.tracker, &bytes, at_micros).map_err(|e| {
                End::Fatal(ErrorFields::fatal(SqlState::INTERNAL_ERROR, e.to_string()))
            })?;
        }
        Ok(())
    }

    /// The session goes on: events and figures.
    fn released(&mut self) {
        self.lost_since = None;
        let Some(since) = self.held_since.take() else {
            return;
        };
        let took = since.elapsed();
        let reason = if self.moved_by_gate() {
            self.gate.reason
        } else {
            MoveReason::ConnectionLoss
        };
        let kind = match reason {
            MoveReason::Switchover => "switchover",
            MoveReason::Failover => "failover",
            MoveReason::ConnectionLoss => "connection_loss",
        };
        self.shared.metrics.pause(kind, took);
        self.shared.metrics.migration(true, kind);
        lock(&self.entry().shown).migrations += 1;
        let session = self.entry().id;
        self.shared.event(MigrationEvent::Completed {
            session,
            reason,
            micros: u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
            state_bytes: self.account.used() as u64,
        });
        if self.shared.options.log_migrations {
            let (instance, state_bytes) = (&self.primary().name, self.account.used());
            tracing::info!(%session, reason = kind, ?took, %instance, state_bytes, "session moved");
        }
        self.shown_epoch = self.gate.topology.epoch;
    }

    fn moved_by_gate(&self) -> bool {
        self.gate.topology.epoch != self.shown_epoch
    }

    /// A COMMIT is known to have committed: the client gets what is still missing of its answer.
    fn deliver_commit(&mut self) -> Result<(), Attempt> {
        let journal = self.tracker.journal();
        let Some(front) = journal.in_flight().front() else {
            return Ok(());
        };
        if !front.closed {
            return self.outcome_unknown("the transaction has committed, its answer is lost");
        }
        let reply = replay::committed_reply(journal.exchange_bytes(front), front.reply.messages);
        self.client.output.extend_from_slice(&reply);
        self.tracker.committed_front();
        self.shared
            .metrics
            .commit_resolution(CommitOutcome::Committed);
        self.shared.metrics.losses_prevented.inc();
        lock(&self.shared.report).resolved += 1;
        Ok(())
    }

    fn outcome_unknown(&mut self, why: &str) -> Result<(), Attempt> {
        self.shared
            .metrics
            .commit_resolution(CommitOutcome::Unknown);
        let fields = ErrorFields::error(
            SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
            "the outcome of the transaction is unknown, because the primary failed while it ran",
        )
        .detail(why.to_owned())
        .hint("Look in the database whether it took effect before trying it again.");
        self.failed(&fields, "outcome unknown");
        self.answer_in_flight(&fields)
    }

    /// Answers everything in flight with an error; afterwards the session is idle.
    fn answer_in_flight(&mut self, fields: &ErrorFields) -> Result<(), Attempt> {
        let mut unfinished = false;
        for exchange in self.tracker.journal().in_flight() {
            if exchange.reply.inside_message() {
                return Err(Attempt::End(End::Fatal(fields.clone())));
            }
            if !exchange.reply.failed() {
                fields.write_error(&mut self.client.output);
            }
            for _ in 0..exchange.ready_owed {
                back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
            }
            unfinished |= !exchange.closed;
        }
        self.discarding = unfinished;
        self.dropping_rest = self.client.passing > 0;
        self.tracker.abandon(TxnStatus::Idle);
        self.charge();
        Ok(())
    }

    fn failed(&self, fields: &ErrorFields, reason: &str) {
        self.shared.count_failed(reason);
        self.shared.metrics.migration(false, reason);
        let micros = self.held_since.map_or(0, |at| at.elapsed().as_micros());
        self.shared.event(MigrationEvent::Failed {
            session: self.entry().id,
            reason: self.gate.reason,
            micros: u64::try_from(micros).unwrap_or(u64::MAX),
            sqlstate: fields.sqlstate.as_str().to_owned(),
            error: fields
                .detail
                .clone()
                .unwrap_or_else(|| fields.message.clone()),
        });
        tracing::info!(
            session = %self.entry().id,
            sqlstate = fields.sqlstate.as_str(),
            detail = fields.detail.as_deref().unwrap_or(""),
            "session could not be moved without an error"
        );
    }

    fn state_lost(&mut self) {
        // The exchange itself was answered; only ReadyForQuery had been held back.
        back::ready_for_query(&mut self.client.output, TxnStatus::Idle.byte());
        self.tracker.abandon(TxnStatus::Idle);
        let fields = retryable("the session's new state was not known yet");
        self.failed(&fields, "state unknown");
        self.refuse = Some(fields);
    }

    /// The transaction (or state) is lost; the client is told as soon as it can be.
    async fn abort(&mut self, mut server: Server, reason: &str) -> Result<(), Attempt> {
        let fields = retryable(reason);
        let prepared = self.prepared_at_begin();
        let restored = replay::restore(&mut server.link, &self.state, &prepared).await;
        if let Err(e) = restored {
            if e.is_transient() {
                self.forced = Some(reason.to_owned());
                return Err(retry(e));
            }
            return Err(Attempt::End(End::Fatal(fields)));
        }
        self.failed(&fields, "not protected");
        let mut next = self.tracker.successor(&prepared);
        if self.tracker.status() == TxnStatus::Idle {
            if self.tracker.is_between() {
                self.refuse = Some(fields);
            } else {
                self.answer_in_flight(&fields)?;
            }
        } else {
            replay::fail_transaction(&mut server.link)
                .await
                .map_err(retry)?;
            next.abandon(TxnStatus::Failed);
            self.remember_in_flight()?;
            self.skip = None;
            self.instead = Some(fields);
        }
        self.state.immovable.clear();
        self.install(server, next);
        self.show_protection();
        Ok(())
    }
}

fn retry(e: ReplayError) -> Attempt {
    Attempt::Retry(e.to_string())
}

fn retryable(reason: &str) -> ErrorFields {
    ErrorFields::error(
        SqlState::SERIALIZATION_FAILURE,
        "the transaction was aborted, because it could not be moved to the new primary",
    )
    .detail(reason.to_owned())
    .hint("Try the transaction again.")
}
