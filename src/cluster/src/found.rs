//! The first primary of a cluster: a new data directory, or, where volumes were kept from an earlier
//! cluster of the same name, the instance whose data are furthest.
//!
//! Everybody who may hold data says so first; the furthest of all holds every commit that was
//! acknowledged. Invariants: nothing is initialised while anybody may hold data; once chosen, the
//! first primary stays the one that is tried.

use std::collections::BTreeSet;

use helios_api::agent::{AgentCommand, AgentReply, AgentState, InstanceState};
use helios_api::{Epoch, InstanceName};

use crate::decide::Ctx;
use crate::observe::{Action, Failure, Finished, Reply};
use crate::state::{ClusterState, Held, Mode, Position, Primary, SyncState};
use crate::steady;

/// One round; `true`: there is a primary.
pub(crate) fn round(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> bool {
    let known = ctx.obs.instances.keys().filter_map(|n| ctx.obs.agent(n));
    let seen = known.map(|agent| agent.epoch).max().unwrap_or(Epoch(0));
    // Agents of an earlier cluster remember its epochs.
    if state.epoch == Epoch(0) || seen > state.epoch {
        state.epoch = seen.next();
    }
    if state.first.is_none() {
        state.first = choose(ctx, state);
    }
    let Some(first) = state.first.clone() else {
        return false;
    };
    let Some(agent) = ctx.obs.agent(&first) else {
        return false;
    };
    let member = state.members.get(&first).cloned().unwrap_or_default();
    let command = match &agent.instance {
        InstanceState::Primary { timeline, .. } if agent.epoch == state.epoch => {
            let timeline = *timeline;
            adopt(ctx, state, &first, timeline);
            return true;
        }
        // Of an earlier cluster: it is told of this one.
        InstanceState::Primary { .. } => AgentCommand::StartPrimary,
        InstanceState::Standby { .. } => AgentCommand::Promote,
        InstanceState::Empty => AgentCommand::Bootstrap,
        InstanceState::Stopped { .. } => match member.held {
            None if may_hold(ctx, &first) => AgentCommand::Survey,
            Some(held) if held.standby => AgentCommand::StartStandby,
            None | Some(_) => AgentCommand::StartPrimary,
        },
        InstanceState::Starting { .. } | InstanceState::Unresponsive { .. } => return false,
    };
    steady::settings(ctx, state);
    tell(ctx, state, &first, command);
    false
}

fn tell(ctx: &mut Ctx<'_>, state: &ClusterState, name: &InstanceName, command: AgentCommand) {
    let due = state
        .members
        .get(name)
        .is_some_and(|m| ctx.now >= m.retry_at);
    if due && !ctx.busy(name) {
        ctx.act(Action::agent(name, state.epoch, command));
    }
}

fn may_hold(ctx: &Ctx<'_>, name: &InstanceName) -> bool {
    ctx.obs.kept.contains(name)
}

fn adopt(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    first: &InstanceName,
    timeline: helios_api::Timeline,
) {
    state.primary = Some(Primary {
        name: first.clone(),
        timeline,
    });
    state.sync = SyncState::default();
    let fresh = !may_hold(ctx, first);
    if let Some(member) = state.members.get_mut(first) {
        // What an earlier cluster has left in its configuration is not known.
        member.setting = fresh.then(BTreeSet::new);
    }
    for member in state.members.values_mut() {
        member.held = None;
    }
    state.settled = Some(ctx.now);
    state.mode = Mode::Steady;
}

/// The first primary, once it is known; asks whoever has to be asked.
fn choose(ctx: &mut Ctx<'_>, state: &ClusterState) -> Option<InstanceName> {
    let first = state.members.keys().next()?.clone();
    // Of a new cluster the first one alone can have been begun.
    let alone = BTreeSet::from([first.clone()]);
    let asked = match ctx.obs.kept.is_empty() {
        true => &alone,
        false => &ctx.obs.kept,
    };
    if asked.iter().any(|name| ctx.obs.agent(name).is_none()) {
        return None;
    }
    let answers = |name: &InstanceName| Some((name.clone(), ctx.obs.agent(name)?.clone()));
    let holders: Vec<(InstanceName, AgentState)> = state
        .members
        .keys()
        .filter_map(answers)
        .filter(|(_, agent)| agent.instance != InstanceState::Empty)
        .collect();
    match &holders[..] {
        [] => return Some(first),
        // A new cluster that was begun.
        [(name, _)] if !may_hold(ctx, name) => return Some(name.clone()),
        _ => {}
    }
    let mut best: Option<(InstanceName, (Position, bool))> = None;
    let mut complete = true;
    for (name, agent) in &holders {
        let held = match &agent.instance {
            InstanceState::Primary {
                timeline, position, ..
            } => Some(held(false, *timeline, *position)),
            InstanceState::Standby {
                timeline,
                received,
                replayed,
                ..
            } => Some(held(true, *timeline, (*received).max(*replayed))),
            InstanceState::Stopped { .. } => {
                let known = state.members.get(name).and_then(|m| m.held.clone());
                if known.is_none() {
                    tell(ctx, state, name, AgentCommand::Survey);
                }
                known
            }
            _ => None,
        };
        let Some(held) = held else {
            complete = false;
            continue;
        };
        // Among equals the one that was primary, then the first by name.
        let rank = (held.position, !held.standby);
        if !held.torn && best.as_ref().is_none_or(|(_, most)| rank > *most) {
            best = Some((name.clone(), rank));
        }
    }
    best.filter(|_| complete).map(|(name, _)| name)
}

fn held(standby: bool, timeline: helios_api::Timeline, end: helios_api::Lsn) -> Held {
    Held {
        standby,
        torn: false,
        position: Position { timeline, end },
    }
}

/// Takes note of what an instance holds; after a failure it is asked again.
pub(crate) fn absorb(state: &mut ClusterState, finished: &Finished) {
    let Action::Agent { instance, request } = &finished.action else {
        return;
    };
    if state.mode != Mode::Bootstrap {
        return;
    }
    let Some(member) = state.members.get_mut(instance) else {
        return;
    };
    match (&request.command, &finished.result) {
        (
            AgentCommand::Survey,
            Ok(Reply::Agent(AgentReply::Held {
                standby,
                torn,
                timeline,
                end,
            })),
        ) => {
            member.held = Some(Held {
                torn: *torn,
                ..held(*standby, *timeline, *end)
            });
        }
        // It is not, or no longer, what it was.
        (_, Err(Failure::Refused(_))) => member.held = None,
        _ => {}
    }
}
