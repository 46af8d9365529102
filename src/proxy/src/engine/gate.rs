//! The gate: which phase of a move all sessions of this proxy are in.
//!
//! A coordinator publishes a [`GateState`] with a growing step number; every session acknowledges
//! the step when it stands as the phase asks. The invariant: phases follow the order of
//! [`Phase`], and a coordinator goes on only when all sessions have acknowledged or time is up.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use helios_api::control::{MoveReason, Topology};
use tokio::sync::{Notify, watch};

use super::bell::Bell;
use super::registry::lock;

/// A phase of a move (design sections 5.7 and 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Normal work.
    Open,
    /// New transactions are held; acknowledged by sessions that stand outside a transaction.
    Hold,
    /// Open transactions stop between exchanges; acknowledged by sessions that stand.
    Freeze,
    /// Statements in flight are cut off or cancelled, where that is safe.
    Cut,
    /// All stand: those who listen take what their backends have not passed on yet.
    Still,
    /// There is a new primary: sessions leave the old one, and stand.
    Gather,
    /// Sessions that set sequences back rebuild themselves and replay, while nobody else does, at
    /// this proxy or at another.
    Turn,
    /// Sessions rebuild themselves and replay completed exchanges.
    Replay,
    /// Exchanges that were in flight are sent again.
    Send,
}

impl Phase {
    /// As `ProxyStatus` names it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "running",
            Self::Hold | Self::Freeze => "draining",
            Self::Cut | Self::Still => "held",
            Self::Gather | Self::Turn | Self::Replay | Self::Send => "resuming",
        }
    }

    /// Whether replays go on behind the barrier: no new work is let in.
    #[must_use]
    pub fn replays(self) -> bool {
        matches!(self, Self::Turn | Self::Replay)
    }
}

/// Whether sessions are to end because the proxy does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// They are not.
    No,
    /// As soon as no transaction is open and nothing is in flight.
    AtBoundary,
    /// Wherever they are.
    Now,
    /// They do not end: another process takes them over, each where it stands outside a
    /// transaction.
    HandOver,
}

/// What sessions see of a move.
#[derive(Debug, Clone)]
pub struct GateState {
    /// Grows with every change.
    pub step: u64,
    /// The phase.
    pub phase: Phase,
    /// The primary, its epoch, and the evidence of past promotions.
    pub topology: Arc<Topology>,
    /// Why sessions move now, or moved last.
    pub reason: MoveReason,
}

/// Publishes phases and counts acknowledgements.
#[derive(Debug)]
pub struct Gate {
    state: watch::Sender<GateState>,
    sessions: AtomicUsize,
    /// Bells of the sessions, by the number that they joined with.
    bells: Mutex<HashMap<u64, Arc<Bell>>>,
    joined: AtomicU64,
    acknowledged: AtomicUsize,
    step: AtomicU64,
    progress: Notify,
    ending: AtomicU8,
}

impl Gate {
    /// An open gate.
    #[must_use]
    pub fn new(topology: Topology) -> Self {
        Self::at(topology, Phase::Open)
    }

    /// A gate that is in `phase`.
    #[must_use]
    pub fn at(topology: Topology, phase: Phase) -> Self {
        let state = GateState {
            step: 1,
            phase,
            topology: Arc::new(topology),
            reason: MoveReason::Failover,
        };
        Self {
            state: watch::Sender::new(state),
            sessions: AtomicUsize::new(0),
            bells: Mutex::default(),
            joined: AtomicU64::new(0),
            acknowledged: AtomicUsize::new(0),
            step: AtomicU64::new(1),
            progress: Notify::new(),
            ending: AtomicU8::new(0),
        }
    }

    /// The state now.
    #[must_use]
    pub fn now(&self) -> GateState {
        self.state.borrow().clone()
    }

    /// Number of the current step.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step.load(Ordering::Relaxed)
    }

    /// For a session to watch.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<GateState> {
        self.state.subscribe()
    }

    /// Publishes the next step.
    pub fn publish(&self, phase: Phase, topology: Option<Topology>, reason: Option<MoveReason>) {
        self.state.send_modify(|state| {
            state.step += 1;
            state.phase = phase;
            if let Some(topology) = topology {
                state.topology = Arc::new(topology);
            }
            if let Some(reason) = reason {
                state.reason = reason;
            }
            self.acknowledged.store(0, Ordering::SeqCst);
            self.step.store(state.step, Ordering::SeqCst);
        });
        // Behind the change. One that joins now either is in the list or sees the change already.
        for bell in lock(&self.bells).values() {
            bell.ring();
        }
    }

    /// Ends all sessions, because the proxy shuts down; or has them go elsewhere, or stay.
    pub fn end(&self, how: Ending) {
        self.ending.store(how as u8, Ordering::SeqCst);
        self.publish(self.now().phase, None, None);
    }

    /// Whether sessions are to end.
    #[must_use]
    pub fn ending(&self) -> Ending {
        match self.ending.load(Ordering::Relaxed) {
            0 => Ending::No,
            1 => Ending::AtBoundary,
            3 => Ending::HandOver,
            _ => Ending::Now,
        }
    }

    /// A session joins; it has not acknowledged the current step. From now on its bell rings with
    /// every change.
    #[must_use]
    pub fn join(self: &Arc<Self>, bell: Arc<Bell>) -> Member {
        let number = self.joined.fetch_add(1, Ordering::SeqCst);
        lock(&self.bells).insert(number, bell);
        self.sessions.fetch_add(1, Ordering::SeqCst);
        Member {
            gate: Arc::clone(self),
            number,
            acknowledged: 0,
        }
    }

    /// Waits until all sessions have acknowledged the current step; `false` when time is up.
    pub async fn all_acknowledged(&self, limit: Duration) -> bool {
        let wait = async {
            loop {
                let progress = self.progress.notified();
                tokio::pin!(progress);
                progress.as_mut().enable();
                let sessions = self.sessions.load(Ordering::SeqCst);
                if self.acknowledged.load(Ordering::SeqCst) >= sessions {
                    return;
                }
                progress.await;
            }
        };
        tokio::time::timeout(limit, wait).await.is_ok()
    }
}

/// A session's part in the gate; leaves when dropped.
#[derive(Debug)]
pub struct Member {
    gate: Arc<Gate>,
    number: u64,
    acknowledged: u64,
}

impl Member {
    /// Acknowledges `step`, once; an older step than the current one does not count.
    pub fn acknowledge(&mut self, step: u64) {
        if self.acknowledged >= step || self.gate.step.load(Ordering::SeqCst) != step {
            return;
        }
        self.acknowledged = step;
        let count = self.gate.acknowledged.fetch_add(1, Ordering::SeqCst) + 1;
        if count >= self.gate.sessions.load(Ordering::SeqCst) {
            self.gate.progress.notify_waiters();
        }
    }

    /// Whether this session has acknowledged `step`.
    #[must_use]
    pub fn has_acknowledged(&self, step: u64) -> bool {
        self.acknowledged >= step
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        lock(&self.gate.bells).remove(&self.number);
        self.gate.sessions.fetch_sub(1, Ordering::SeqCst);
        if self.acknowledged == self.gate.step.load(Ordering::SeqCst) {
            self.gate.acknowledged.fetch_sub(1, Ordering::SeqCst);
        }
        self.gate.progress.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::control::Backend;
    use helios_api::{Endpoint, Epoch, Host, Timeline};

    fn gate() -> Arc<Gate> {
        let endpoint = Endpoint {
            host: Host::Tcp("localhost".into()),
            port: 1,
        };
        Arc::new(Gate::new(Topology {
            epoch: Epoch(1),
            timeline: Timeline(1),
            primary: Backend {
                name: "a".parse().unwrap(),
                endpoint,
            },
            fences: Vec::new(),
        }))
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_is_over_when_all_have_acknowledged_or_left() {
        let gate = gate();
        let bell = Arc::<Bell>::default;
        let (mut a, b) = (gate.join(bell()), gate.join(bell()));
        gate.publish(Phase::Hold, None, None);
        let step = gate.now().step;
        a.acknowledge(step - 1);
        a.acknowledge(step);
        a.acknowledge(step);
        assert!(!gate.all_acknowledged(Duration::from_secs(1)).await);
        drop(b);
        assert!(gate.all_acknowledged(Duration::from_secs(1)).await);
        drop(a);
        assert!(gate.all_acknowledged(Duration::from_secs(1)).await);
    }

    #[test]
    fn every_member_is_rung() {
        let gate = gate();
        let bells: Vec<_> = (0..3).map(|_| Arc::<Bell>::default()).collect();
        let mut members: Vec<_> = bells.iter().map(|b| gate.join(Arc::clone(b))).collect();
        members.pop();
        gate.publish(Phase::Hold, None, None);
        let rung: Vec<_> = bells.iter().map(|b| b.rung()).collect();
        assert_eq!(rung, [true, true, false]);
    }
}
