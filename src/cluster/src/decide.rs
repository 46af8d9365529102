//! The decision itself: absorbs what ended, answers a request, moves the state on as far as it
//! goes, checks it.

use std::collections::BTreeSet;

use helios_api::InstanceName;
use helios_api::agent::{AgentCommand, AgentReply};

use crate::observe::{Action, Failure, Finished, Observation, Refusal, Reply};
use crate::operation::{OperationKind, Phase, PhaseDuration, Time};
use crate::state::{ClusterState, Member, Mode, Settings, Step};
use crate::transition::{self, Violation};
use crate::{found, lease, moves, requests, steady};

/// Longest pause between attempts at a background command.
const MAX_BACKOFF_MS: u64 = 5_000;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// To be saved durably, before any action, when it differs from the state before.
    pub next: ClusterState,
    /// To be carried out side by side; none of them is running yet.
    pub actions: Vec<Action>,
    /// The answer to the request, when there was one: the number of the operation that it began,
    /// if it began one.
    pub answer: Option<Result<Option<u64>, Refusal>>,
}

/// What all parts of a decision look at, and where they put their actions.
pub(crate) struct Ctx<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) obs: &'a Observation,
    pub(crate) now: Time,
    actions: Vec<Action>,
}

impl Ctx<'_> {
    /// Has an action carried out, unless it is being carried out already.
    pub(crate) fn act(&mut self, action: Action) {
        if !self.obs.running.contains(&action) && !self.actions.contains(&action) {
            self.actions.push(action);
        }
    }

    /// Whether an instance has a command to carry out.
    pub(crate) fn busy(&self, name: &InstanceName) -> bool {
        let on =
            |action: &Action| matches!(action, Action::Agent { instance, .. } if instance == name);
        self.obs.running.iter().any(on) || self.actions.iter().any(on)
    }

    /// Whether a proxy has a command to carry out.
    pub(crate) fn proxy_busy(&self, name: &str) -> bool {
        let on = |action: &Action| matches!(action, Action::Proxy { proxy, .. } if proxy == name);
        self.obs.running.iter().any(on) || self.actions.iter().any(on)
    }
}

/// Decides. Calling it again with the same observation and the state it returned is harmless.
///
/// # Errors
/// [`Violation`] when the decision would break a rule: nothing may be saved or carried out then.
pub fn decide(
    settings: &Settings,
    state: &ClusterState,
    obs: &Observation,
    now: Time,
) -> Result<Decision, Violation> {
    let mut next = state.clone();
    let mut ctx = Ctx {
        settings,
        obs,
        now,
        actions: Vec::new(),
    };
    for name in obs.instances.keys() {
        next.members.entry(name.clone()).or_default();
    }
    for finished in &obs.finished {
        absorb(&ctx, &mut next, finished);
    }
    let request = obs.request.as_ref();
    let answer = request.map(|request| requests::take(&mut ctx, &mut next, request));
    // Each round either changes the mode or is the last; a move has few steps.
    for _ in 0..transition::MAX_STEPS {
        let more = match &next.mode {
            Mode::Bootstrap => found::round(&mut ctx, &mut next),
            Mode::Steady => steady::round(&mut ctx, &mut next),
            Mode::Moving(_) => moves::round(&mut ctx, &mut next)?,
        };
        if !more {
            break;
        }
    }
    lease::upkeep(&ctx, &mut next);
    transition::check(state, &next)?;
    Ok(Decision {
        next,
        actions: ctx.actions,
        answer,
    })
}

/// Takes note of an action that ended.
fn absorb(ctx: &Ctx<'_>, state: &mut ClusterState, finished: &Finished) {
    if let Action::Agent { instance, request } = &finished.action {
        match &finished.result {
            Ok(reply) => {
                if let Some(member) = state.members.get_mut(instance) {
                    member.failures = 0;
                    member.retry_at = Time(0);
                }
                absorb_agent(ctx, state, instance, &request.command, reply);
            }
            Err(failure) => back_off(ctx, state, instance, failure),
        }
    }
    found::absorb(state, finished);
    moves::absorb(ctx, state, finished);
}

fn back_off(ctx: &Ctx<'_>, state: &mut ClusterState, name: &InstanceName, failure: &Failure) {
    // A later epoch means that another executor is at work: it is left alone for a while.
    let stale = matches!(failure, Failure::Stale { .. });
    if let Some(member) = state.members.get_mut(name) {
        member.failures = member.failures.saturating_add(1);
        let wait = if stale {
            MAX_BACKOFF_MS
        } else {
            backoff_ms(member.failures)
        };
        member.retry_at = ctx.now.plus_millis(wait);
    }
}

/// 100 ms, doubled with every failure, within a limit.
pub(crate) fn backoff_ms(failures: u32) -> u64 {
    (50_u64 << failures.clamp(1, 10)).min(MAX_BACKOFF_MS)
}

fn absorb_agent(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    name: &InstanceName,
    command: &AgentCommand,
    reply: &Reply,
) {
    let is_primary = state.primary_name() == Some(name);
    let timeline = state.primary.as_ref().map(|p| p.timeline);
    let Some(member) = state.members.get_mut(name) else {
        return;
    };
    match (command, reply) {
        (AgentCommand::SetSynchronous { standbys, .. }, _) => {
            member.setting = Some(standbys.iter().cloned().collect());
        }
        (AgentCommand::DropSlot { standby }, _) if is_primary => {
            if let Some(gone) = state.members.get_mut(standby) {
                gone.slot_dropped = true;
            }
        }
        (AgentCommand::Checkpoint, _) if is_primary => {
            let applied = member.setting.as_ref() == Some(&state.sync.target());
            // A checkpoint of *prepare* may have begun before the setting was applied.
            let ours = state.moving().is_none_or(|m| m.step == Step::Replay);
            if applied && ours && !state.sync.is_settled() {
                let revision = ctx.obs.agent(name).map_or(0, |agent| agent.revision);
                state.sync.checkpointed = Some((ctx.now, revision));
            }
        }
        (
            AgentCommand::Follow {
                primary,
                timeline: of,
                ..
            },
            Reply::Agent(AgentReply::Following { how }),
        ) => {
            if Some(*of) != timeline || state.primary_name() != Some(&primary.name) {
                return;
            }
            let member: &mut Member = member_mut(state, name);
            member.followed = Some(*of);
            member.slot_dropped = false;
            // An agent begins to follow with nobody in its setting.
            member.setting = Some(BTreeSet::new());
            rejoined(ctx, state, name, *how);
        }
        _ => {}
    }
}

fn member_mut<'s>(state: &'s mut ClusterState, name: &InstanceName) -> &'s mut Member {
    state.members.entry(name.clone()).or_default()
}

/// Completes the record of the operation that this instance was the old primary of.
fn rejoined(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    name: &InstanceName,
    how: helios_api::agent::Rejoin,
) {
    let open = state.operations.iter_mut().rev().find(|op| {
        op.from == *name
            && op.to != *name
            && op.rejoin.is_none()
            && op.kind != OperationKind::Restart
    });
    if let Some(op) = open {
        let before: u64 = op.phases.iter().map(|p| p.micros).sum();
        op.rejoin = Some(how);
        op.phases.push(PhaseDuration {
            phase: Phase::Rejoin,
            micros: ctx.now.micros_since(op.started).saturating_sub(before),
        });
    }
}
