//! The one place where states change, with the check that they may.
//!
//! [`enter`] is the only way from one step to the next; [`check`] compares the whole state before
//! and after a decision. Both refuse rather than repair.

use helios_api::Epoch;

use crate::operation::{PhaseDuration, Time};
use crate::state::{ClusterState, MAX_FENCES, MAX_OPERATIONS, Mode, Move, Step};

/// A decision that would break a rule: a bug in this crate, never carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cluster state may not change so: {0}")]
pub struct Violation(pub String);

/// Steps of one operation: it ends badly rather than go round for ever.
pub(crate) const MAX_STEPS: usize = 64;

/// Whether a move may go from one step to another (design section 6).
fn allowed(from: &Step, to: &Step) -> bool {
    use Step::{Abort, Choose, Discard, Drain, Fence, Prepare, Promote, Replay, Restart};
    matches!(
        (from, to),
        (
            Prepare { .. },
            Drain { .. } | Abort { .. } | Fence { .. } | Restart
        ) | (Drain { .. }, Fence { .. } | Abort { .. } | Restart)
            | (Abort { .. }, Fence { .. } | Restart)
            | (Fence { .. }, Choose { .. })
            | (Choose { .. }, Promote { .. } | Restart)
            | (Promote { .. }, Replay | Discard { .. })
            | (Discard { .. }, Restart)
            | (Restart, Replay | Fence { .. })
    )
}

/// Moves on to `step`, and counts the time of the one before.
pub(crate) fn enter(m: &mut Move, step: Step, now: Time) -> Result<(), Violation> {
    if !allowed(&m.step, &step) {
        let (from, to) = (m.step.phase().as_str(), step.phase().as_str());
        return Err(Violation(format!("step {from} is not followed by {to}")));
    }
    if m.phases.len() < MAX_STEPS {
        m.phases.push(PhaseDuration {
            phase: m.step.phase(),
            micros: now.micros_since(m.step_started),
        });
    }
    m.step = step;
    m.step_started = now;
    m.todo.clear();
    m.failures = 0;
    m.retry_at = Time(0);
    Ok(())
}

/// Compares the state before and after a decision.
pub(crate) fn check(before: &ClusterState, after: &ClusterState) -> Result<(), Violation> {
    let broken = |text: &str| Err(Violation(text.to_owned()));
    // At first it is behind those that agents of an earlier cluster remember.
    let jumped = after.epoch.0 > before.epoch.0 + 2 && before.mode != Mode::Bootstrap;
    if after.epoch < before.epoch || jumped {
        return broken("the epoch went back or jumped");
    }
    if after.sync.possible.is_empty() {
        return broken("no synchronous setting is recorded");
    }
    if after.fences.len() > MAX_FENCES || after.operations.len() > MAX_OPERATIONS {
        return broken("a list is over its limit");
    }
    let grown = |fences: &[helios_api::control::Fence]| {
        fences
            .windows(2)
            .all(|pair| pair[0].epoch < pair[1].epoch && pair[0].timeline < pair[1].timeline)
    };
    if !grown(&after.fences) {
        return broken("promotions are out of order");
    }
    if let (Some(old), Some(new)) = (&before.primary, &after.primary) {
        if new.name != old.name && !after.fences.iter().any(|f| f.timeline == new.timeline) {
            return broken("the primary changed without a promotion");
        }
        if new.timeline < old.timeline {
            return broken("the timeline went back");
        }
    }
    if before.primary.is_some() && after.primary.is_none() {
        return broken("the primary was forgotten");
    }
    check_mode(before, after)
}

fn check_mode(before: &ClusterState, after: &ClusterState) -> Result<(), Violation> {
    let broken = |text: &str| Err(Violation(text.to_owned()));
    match (&before.mode, &after.mode) {
        (Mode::Bootstrap | Mode::Steady | Mode::Moving(_), Mode::Bootstrap)
            if !matches!(before.mode, Mode::Bootstrap) =>
        {
            broken("a cluster is bootstrapped once")
        }
        (_, Mode::Steady) if after.primary.is_none() => broken("steady without a primary"),
        (_, Mode::Moving(m)) => {
            if after.primary.is_none() {
                return broken("a move without a primary");
            }
            let promoting = matches!(m.step, Step::Promote { .. });
            let was = before.moving().filter(|b| b.id == m.id).map(|b| &b.step);
            let begins = promoting && !matches!(was, Some(Step::Promote { .. }));
            if begins && after.epoch <= before.epoch {
                return broken("a promotion without a new epoch");
            }
            Ok(())
        }
        _ if after.epoch == Epoch(0) && after.primary.is_some() => broken("a primary in epoch 0"),
        _ => Ok(()),
    }
}
