//! Changing a session's backend: what to do is decided by `helios_session::decide`, done here.
//!
//! The invariant: nothing is sent again before its outcome is known, and a client is told the truth
//! or nothing.

use std::sync::atomic::Ordering;
use std::time::Duration;

use helios_api::control::Topology;
use helios_session::TxnStatus;
use helios_session::decide::{Plan, Situation, decide};
use helios_session::grammar::Kind;
use helios_telemetry::metrics::ReplayResult;
use helios_wire::{ErrorFields, SqlState};
use tokio::sync::watch;
use tokio::time::Instant;

use super::ahead::Warm;
use super::gate::{GateState, Phase};
use super::opening::{is_away, is_primary, no_primary};
use super::rebuild::Attempt;
use super::registry::lock;
use super::replay;
use super::session::{End, Server, Session};
use crate::backend::{self, BackendError};

/// How long a planned move waits for a statement that a COMMIT in flight stands behind.
const CUT_PIPELINE: Duration = Duration::from_millis(60);

impl Session {
    /// The gate has changed.
    pub(super) async fn gate_changed(
        &mut self,
        gate: &mut watch::Receiver<GateState>,
    ) -> Result<(), End> {
        let current = self.gate.topology.epoch;
        match self.gate.phase {
            Phase::Open => self.opened(gate).await,
            Phase::Hold => {
                self.held();
                Ok(())
            }
            Phase::Freeze => {
                self.held();
                self.show_uncut();
                Ok(())
            }
            Phase::Cut => {
                self.held();
                self.show_uncut();
                self.cut_in_flight();
                Ok(())
            }
            Phase::Still => {
                self.held();
                self.hear_out();
                Ok(())
            }
            Phase::Gather | Phase::Turn | Phase::Replay | Phase::Send => {
                self.held();
                self.begin_if_moved();
                if self.server.as_ref().is_some_and(|s| s.epoch < current) {
                    self.leave_old_server()?;
                }
                self.stays |= self.gate.phase < Phase::Send && self.server.is_some();
                self.stays &= self.server.is_some() && !self.rebuilt;
                if self.server.is_none() && self.must_rebuild() && self.is_its_time() {
                    self.entry().set_state(5);
                    self.rebuild(gate).await?;
                }
                if self.gate.phase == Phase::Send {
                    self.send_in_flight();
                }
                Ok(())
            }
        }
    }

    async fn opened(&mut self, gate: &mut watch::Receiver<GateState>) -> Result<(), End> {
        let current = self.gate.topology.epoch;
        self.stays = false;
        if self.server.as_ref().is_some_and(|s| s.epoch < current) {
            self.leave_old_server()?;
        }
        // A move that was given up may have sent a cancel request that is not answered yet.
        self.cut &= self.server.is_some() && !self.tracker.is_between();
        self.send_in_flight();
        if self.server.is_some() {
            self.heard = false;
            self.released();
        } else if self.must_rebuild() {
            self.retry_at = None;
            return self.find_server(gate).await;
        } else if self.moved_by_gate() {
            // Idle: it needs a backend when its client says something.
            self.last_words = None;
            self.forget_lost();
            self.released();
            self.comes_back();
        } else if self.held_since.is_some() {
            self.released();
        }
        Ok(())
    }

    /// Takes what the old server has sent already, then leaves it: a COMMIT's answer may be there.
    fn leave_old_server(&mut self) -> Result<(), End> {
        let waker = std::task::Waker::noop();
        let mut cx = std::task::Context::from_waker(waker);
        let mut whole = false;
        while let Some(server) = &mut self.server {
            let ready = server.link.poll_read(&mut cx);
            // One whose process was killed has ended or is reset, and shows it here.
            whole = ready.is_pending();
            let ended = server.link.ended || !matches!(ready, std::task::Poll::Ready(Ok(())));
            if let Err(super::session::Event::End(end)) = self.pump() {
                return Err(end);
            }
            if ended {
                break;
            }
        }
        self.end_what_failed();
        if let Some(server) = self.server.take() {
            if whole {
                let since = lock(&self.entry().identity).since;
                self.shared.outlived(server.epoch, since);
            }
            if !self.tracker.is_between() {
                self.spawn_cancel(&server, false);
            }
        }
        self.last_words = None;
        Ok(())
    }

    /// Planned move, time is up for statements in flight: those that can run again are cut off.
    pub(super) fn cut_in_flight(&mut self) {
        if self.tracker.is_between() || self.server.is_none() {
            return;
        }
        match self.plan() {
            Plan::Replay => {
                self.end_what_failed();
                if let Some(server) = self.server.take() {
                    self.spawn_cancel(&server, false);
                }
            }
            // A COMMIT behind a statement that goes on: that one waits for a lock, probably of a
            // frozen session, which would wait for it. The connection is left first, so nobody is
            // told what the cancel request does to a COMMIT; the evidence is asked afterwards.
            Plan::Resolve { at: 1.., .. } if self.held_for(CUT_PIPELINE) => {
                if let Some(server) = self.server.take() {
                    self.spawn_cancel(&server, false);
                }
            }
            // Alone and all or nothing: once the server says that it is cancelled, nothing of it
            // lasts.
            _ if self.is_cancellable() => {
                self.cut = true;
                if let Some(server) = &self.server {
                    self.spawn_cancel(server, true);
                }
            }
            _ => {}
        }
    }

    /// Shows whether what is in flight cannot be cut off, and has to be waited for.
    fn show_uncut(&self) {
        let runs = !self.tracker.is_between() && self.server.is_some();
        let cut = || {
            matches!(self.plan(), Plan::Replay | Plan::Resolve { at: 1.., .. })
                || self.is_cancellable()
        };
        let uncut = runs && !cut();
        self.entry().uncut.store(uncut, Ordering::Relaxed);
    }

    /// A server ignores a cancel request that it gets before it has begun the statement; one that
    /// then waits for a lock of a frozen session would wait for as long as the drain may take.
    pub(super) fn cut_waits(&self) -> bool {
        self.gate.phase == Phase::Cut && self.server.is_some() && !self.tracker.is_between()
    }

    fn held_for(&self, time: Duration) -> bool {
        self.held_since.is_some_and(|at| at.elapsed() >= time)
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
                Kind::Read | Kind::LockingRead | Kind::Write | Kind::CopyIn | Kind::Harmless
            )
        };
        alone
            && one.closed
            && self
                .tracker
                .kinds(one)
                .is_some_and(|k| k.len() == 1 && k.iter().all(all_or_nothing))
    }

    pub(super) fn plan(&self) -> Plan {
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
        // Looks for a server from the open gate have counted, for their pauses only.
        self.attempts = 0;
        let mut backoff = self.shared.options.replay_backoff;
        loop {
            match self.attempt(gate).await {
                Ok(()) => {
                    self.rebuilt = true;
                    return Ok(());
                }
                Err(Attempt::End(end)) => return Err(end),
                Err(Attempt::Superseded) => return Ok(()),
                Err(Attempt::Away(why)) => {
                    // Nothing was tried: a primary that is away costs no attempt.
                    tracing::debug!(session = %self.entry().id, why, "no primary yet");
                }
                Err(Attempt::Retry(why)) => {
                    self.attempts += 1;
                    tracing::debug!(session = %self.entry().id, why, "replay is tried again");
                    if self.attempts >= self.shared.options.max_replay_attempts {
                        self.forced.get_or_insert(why);
                    }
                }
            }
            if self.too_long() {
                // Goes on looking from the open gate, where the outage limit ends it.
                return Ok(());
            }
            if tokio::time::timeout(backoff, gate.changed()).await.is_ok() {
                // Whatever it is, it is handled where all changes are.
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
        if self.tracker.mode() == helios_session::ReplayMode::None && self.lost.is_some() {
            self.begin_migration();
            return Err(self.disconnect());
        }
        match self.attempt(gate).await {
            Ok(()) => {
                self.send_in_flight();
                self.released();
                Ok(())
            }
            Err(Attempt::End(end)) => Err(end),
            Err(Attempt::Superseded) => Ok(()),
            Err(Attempt::Away(why) | Attempt::Retry(why)) => {
                self.note_lost();
                self.held();
                let pause = Duration::from_millis(20) * 2_u32.pow(self.attempts.min(5));
                self.attempts += 1;
                self.retry_at = Some(Instant::now() + pause);
                if self.too_long() {
                    self.begin_migration();
                    return Err(End::Fatal(no_primary(&why)));
                }
                Ok(())
            }
        }
    }

    pub(super) fn disconnect(&mut self) -> End {
        match self.last_words.take() {
            Some(words) => End::Forward(words.frame),
            None => End::Fatal(ErrorFields::fatal(
                SqlState::ADMIN_SHUTDOWN,
                "terminating connection because the primary moved",
            )),
        }
    }

    /// One attempt to get a backend and to bring it to the session's state; void as soon as the
    /// gate's epoch changes.
    pub(super) async fn attempt(
        &mut self,
        gate: &watch::Receiver<GateState>,
    ) -> Result<(), Attempt> {
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
        let warm = self.connect(topology).await?;
        let mut server = Server::adopted(warm, topology);
        self.check_last_words(&mut server, topology).await?;
        if self.held_since.is_some() {
            self.begin_migration();
        }
        let at = &topology.primary.endpoint;
        let in_epoch = self.epoch == topology.epoch;
        let here = self.old.as_ref().is_some_and(|old| old.at == *at);
        if (in_epoch || here) && !self.shared.options.move_on_restart {
            self.check_restart(&mut server).await?;
        }
        if in_epoch && self.must_rebuild() {
            self.await_the_others(&mut server).await?;
        }
        if (in_epoch || here) && self.must_rebuild() {
            if in_epoch && self.owes() && !self.shared.options.replay_on_connection_loss {
                self.forced = Some("replay after a lost connection is switched off".into());
            }
            self.end_old_backend(topology).await?;
        }
        let began = Instant::now();
        let had_work = self.owes();
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
    async fn connect(&mut self, topology: &Topology) -> Result<Warm, Attempt> {
        let at = &topology.primary.endpoint;
        // One for another primary may still be needed there.
        let warm = lock(&self.entry().warm).take_if(|warm| warm.conn.endpoint == *at);
        if let Some(warm) = warm {
            return Ok(warm);
        }
        let shared = std::sync::Arc::clone(&self.shared);
        let permit = shared.logins.acquire().await;
        let login = self.entry().login.clone();
        let limit = shared.options.connect_timeout;
        let result = backend::connect(at, &shared.tls, &login, limit).await;
        drop(permit);
        match result {
            Ok(conn) if is_primary(&conn) => Ok(Warm {
                conn,
                restored: None,
                of: None,
            }),
            Ok(_) => Err(Attempt::Away("the server is in recovery".into())),
            Err(BackendError::Refused { fields, frame, .. })
                if !is_away(&fields.sqlstate) && fields.sqlstate.class() != *b"53" =>
            {
                Err(Attempt::End(End::Forward(frame.as_ref().into())))
            }
            Err(e) => Err(Attempt::Away(e.to_string())),
        }
    }

    /// What the server said before it closed the connection: an administrator's kill stays a kill,
    /// a time-out stays a time-out; a shutdown or crash is a failover.
    async fn check_last_words(
        &mut self,
        server: &mut Server,
        topology: &Topology,
    ) -> Result<(), Attempt> {
        let Some(words) = self.last_words.take() else {
            return Ok(());
        };
        if self.epoch != topology.epoch || self.gate.phase != Phase::Open {
            return Ok(());
        }
        let code = SqlState(helios_session::reply::sqlstate(&words.frame));
        if !is_away(&code) {
            return Err(Attempt::End(End::Forward(words.frame)));
        }
        let sql = "SELECT pg_catalog.pg_postmaster_start_time()::pg_catalog.text";
        let now = match replay::simple(&mut server.link, sql).await {
            Ok(rows) => rows.first().and_then(|r| r.first()).cloned().flatten(),
            Err(e) => {
                self.last_words = Some(words);
                return Err(Attempt::Retry(e.to_string()));
            }
        };
        let same = words.postmaster.is_some() && words.postmaster == now;
        if code != SqlState::ADMIN_SHUTDOWN || !same {
            return Ok(());
        }
        // They may have come late, from a server that has died since: a backend whose postmaster is
        // gone says the same (`WaitEventSetWait` in `src/backend/storage/ipc/latch.c`).
        match self.has_restarted(server).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Attempt::End(End::Forward(words.frame))),
            Err(e) => {
                self.last_words = Some(words);
                Err(e)
            }
        }
    }
}
