//! Behind a change of primary: the barrier of design rule 5.7, for this proxy alone or together
//! with others.
//!
//! Together, an executor takes the proxies from one stage to the next. The invariants: sequences
//! are set back only by a proxy that is alone, or in its turn; and who hears nothing any more goes
//! on by himself, without a turn, when others may have done so too.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use helios_api::Epoch;
use helios_api::control::{Gathered, MoveReason, ResumeReport, Stage, Topology};

use super::{CommandError, ProxyHandle};
use crate::engine::gate::Phase;
use crate::engine::raise::raise;
use crate::engine::registry::{Entry, lock};

/// How long sessions may take to leave the old primary.
const LEAVE: Duration = Duration::from_secs(1);

/// How long what was in flight may take to be sent again.
const SEND: Duration = Duration::from_secs(1);

/// Sessions that wait for those of other proxies.
#[derive(Debug)]
pub(super) struct Waiting {
    epoch: Epoch,
    /// How far they are.
    at: Stage,
    /// When the command came.
    began: Instant,
    /// When they stood.
    gathered: Instant,
    /// When there was a word last.
    heard: Instant,
}

impl ProxyHandle {
    /// There is a new primary (or the same one again, after a restart), and no other proxy that
    /// could let anybody work on it: sessions are rebuilt behind the barrier, then new work is let
    /// in.
    ///
    /// # Errors
    /// [`CommandError::Stale`].
    pub async fn resume(&self, topology: Topology) -> Result<ResumeReport, CommandError> {
        let _one = self.next_step(topology.epoch).await?;
        let began = Instant::now();
        let shared = &self.0.shared;
        let limit = shared.options.barrier_limit;
        let reason = self.arrive(&topology);
        if reason == MoveReason::Failover {
            shared
                .gate
                .publish(Phase::Gather, Some(topology), Some(reason));
            shared.gate.all_acknowledged(LEAVE).await;
            if self.wants_turn() {
                self.raise().await;
                self.take_turn(began + limit / 2, None).await;
            }
            shared.gate.publish(Phase::Replay, None, None);
            let left = limit.saturating_sub(began.elapsed());
            shared.gate.all_acknowledged(left).await;
            shared.new_work(shared.gate.now().topology.epoch);
        } else {
            shared.raise_barrier(None);
            let mut topology = Some(topology);
            // Who lost a connection alone has to know that others leave whole ones.
            if self.any(|s| &s.lost) {
                let arrived = topology.take();
                shared.gate.publish(Phase::Gather, arrived, Some(reason));
                shared.gate.all_acknowledged(LEAVE).await;
            }
            shared.gate.publish(Phase::Replay, topology, Some(reason));
            shared.gate.all_acknowledged(limit).await;
            shared.lower_barrier(limit).await;
        }
        self.send_and_open(began).await
    }

    /// The same where others may work on the new primary already: no sequence is set back.
    ///
    /// # Errors
    /// [`CommandError::Stale`].
    pub async fn join(&self, topology: Topology) -> Result<ResumeReport, CommandError> {
        let epoch = topology.epoch;
        self.gather(topology, Duration::MAX).await?;
        self.advance(epoch, Stage::Open, Duration::ZERO).await
    }

    /// There is a new primary: sessions leave the old one and stand, until they are told to go on;
    /// without a word for `patience`, they go on by themselves.
    ///
    /// # Errors
    /// [`CommandError::Stale`].
    pub async fn gather(
        &self,
        topology: Topology,
        patience: Duration,
    ) -> Result<Gathered, CommandError> {
        let _one = self.next_step(topology.epoch).await?;
        let began = Instant::now();
        let shared = &self.0.shared;
        let (epoch, now) = (topology.epoch, shared.gate.now());
        let has_worked = now.topology.epoch == epoch
            && (shared.worked().0 == epoch
                || now.phase < Phase::Gather
                || now.phase == Phase::Send);
        let reason = self.arrive(&topology);
        shared
            .gate
            .publish(Phase::Gather, Some(topology), Some(reason));
        shared.gate.all_acknowledged(LEAVE).await;
        if reason == MoveReason::Failover && self.wants_turn() {
            self.raise().await;
        }
        let gathered = Instant::now();
        *lock(&self.0.waiting) = Some(Waiting {
            epoch,
            at: Stage::Gathered,
            began,
            gathered,
            heard: gathered,
        });
        if patience != Duration::MAX {
            self.spawn_patience(epoch, patience);
        }
        Ok(Gathered {
            wants_turn: self.wants_turn(),
            has_worked,
        })
    }

    /// Takes gathered sessions on to `to`; a turn ends `turn` after they had gathered. Those that
    /// are there already have nothing to do.
    ///
    /// # Errors
    /// [`CommandError::Stale`], [`CommandError::NotGathered`].
    pub async fn advance(
        &self,
        epoch: Epoch,
        to: Stage,
        turn: Duration,
    ) -> Result<ResumeReport, CommandError> {
        let _one = self.next_step(epoch).await?;
        let shared = &self.0.shared;
        let waiting = lock(&self.0.waiting).take().filter(|w| w.epoch == epoch);
        let Some(mut waiting) = waiting else {
            let now = shared.gate.now();
            let open = now.topology.epoch == epoch && now.phase == Phase::Open;
            let report = || Ok(ResumeReport::default());
            return if open {
                report()
            } else {
                Err(CommandError::NotGathered(epoch))
            };
        };
        if to == Stage::Turn && waiting.at == Stage::Gathered {
            let until = waiting.gathered + turn;
            self.take_turn(until, Some(until)).await;
            waiting.at = Stage::Turn;
        }
        if to >= Stage::Replayed && waiting.at < Stage::Replayed {
            shared.gate.publish(Phase::Replay, None, None);
            shared
                .gate
                .all_acknowledged(shared.options.barrier_limit)
                .await;
            waiting.at = Stage::Replayed;
        }
        if to == Stage::Sent && waiting.at < Stage::Sent {
            self.send(waiting.began).await;
            waiting.at = Stage::Sent;
        }
        if to == Stage::Open {
            return self.send_and_open(waiting.began).await;
        }
        waiting.heard = Instant::now();
        *lock(&self.0.waiting) = Some(waiting);
        Ok(ResumeReport::default())
    }

    /// What a change of primary does before the sessions know of it; returns why they move.
    fn arrive(&self, topology: &Topology) -> MoveReason {
        let shared = &self.0.shared;
        *lock(&self.0.waiting) = None;
        let now = shared.gate.now();
        if topology.may_have_lost(now.topology.epoch) {
            shared.metrics.lossy_promotions.inc();
            let (epoch, primary) = (topology.epoch, &topology.primary.name);
            tracing::warn!(%epoch, %primary,
                "commits that clients were told of may be missing on the new primary");
        }
        shared.take_report();
        *lock(&shared.postmaster_start) = None;
        self.0
            .verifiers
            .set_endpoint(Some(topology.primary.endpoint.clone()));
        match now.phase {
            Phase::Open => MoveReason::Failover,
            _ => now.reason,
        }
    }

    /// The new primary's sequences may stand behind what clients have seen.
    async fn raise(&self) {
        let shared = &self.0.shared;
        let at = shared.gate.now().topology.primary.endpoint.clone();
        raise(shared, &at).await;
    }

    fn wants_turn(&self) -> bool {
        self.any(|s| &s.wants_turn)
    }

    /// Whether any session says so.
    fn any(&self, says: impl Fn(&Entry) -> &AtomicBool) -> bool {
        let sessions = self.0.shared.registry.all();
        sessions.iter().any(|s| says(s).load(Ordering::Relaxed))
    }

    /// Sessions that set sequences back replay; nobody else does, here or, where they were asked
    /// to wait, at other proxies.
    async fn take_turn(&self, until: Instant, others_wait: Option<Instant>) {
        let shared = &self.0.shared;
        let left = || until.saturating_duration_since(Instant::now());
        if left().is_zero() {
            return;
        }
        shared.raise_barrier(others_wait);
        shared.gate.publish(Phase::Turn, None, None);
        shared.gate.all_acknowledged(left()).await;
        shared.lower_barrier(shared.options.barrier_limit).await;
    }

    async fn send(&self, began: Instant) {
        let shared = &self.0.shared;
        shared.metrics.phase("replay", began.elapsed());
        shared.gate.publish(Phase::Send, None, None);
        shared.gate.all_acknowledged(SEND).await;
    }

    async fn send_and_open(&self, began: Instant) -> Result<ResumeReport, CommandError> {
        let shared = &self.0.shared;
        if shared.gate.now().phase != Phase::Send {
            self.send(began).await;
        }
        shared.new_work(shared.gate.now().topology.epoch);
        shared.gate.publish(Phase::Open, None, None);
        let mut report = shared.take_report();
        report.micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.drop_warm();
        Ok(report)
    }

    /// Sessions go on by themselves when nobody has said anything for too long.
    fn spawn_patience(&self, epoch: Epoch, patience: Duration) {
        let this = self.clone();
        let gathered = lock(&this.0.waiting).as_ref().map(|w| w.gathered);
        tokio::spawn(async move {
            loop {
                let heard = match &*lock(&this.0.waiting) {
                    Some(w) if Some(w.gathered) == gathered => w.heard,
                    // A command is being carried out, or the wait is over.
                    _ => Instant::now(),
                };
                let left = patience.saturating_sub(heard.elapsed());
                if left.is_zero() {
                    break;
                }
                tokio::select! {
                    () = tokio::time::sleep(left) => {}
                    () = this.0.stop.cancelled() => return,
                }
                if this.is_past(epoch) {
                    return;
                }
            }
            tracing::warn!(%epoch, "no word of other proxies any more; sessions go on");
            // Whoever came in between has the say.
            let _ = this.advance(epoch, Stage::Open, Duration::ZERO).await;
        });
    }

    /// Whether sessions do not wait in this epoch any more.
    fn is_past(&self, epoch: Epoch) -> bool {
        let now = self.0.shared.gate.now();
        now.topology.epoch != epoch || now.phase < Phase::Gather
    }
}
