//! Upkeep while there is a primary: notices its end, brings everybody else back behind it.
//!
//! Nothing here is durable but its results: what is needed is read off the observation each time.

use helios_api::agent::{AgentCommand, InstanceState, StopMode};
use helios_api::{Epoch, InstanceName};

use crate::decide::Ctx;
use crate::health::{self, Health};
use crate::observe::{Action, ProxyCommand};
use crate::operation::OperationKind;
use crate::state::{ClusterState, Member, Primary};
use crate::{elect, moves, slow, sync};

/// A standby that the primary has not seen for so long is told to follow again.
const REFOLLOW_MS: u64 = 10_000;

/// One round; `true`: a move began.
pub(crate) fn round(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> bool {
    let Some(primary) = state.primary.clone() else {
        return false;
    };
    settings(ctx, state);
    if state.members.get(&primary.name).is_some_and(|m| m.fenced) {
        keep_stopped(ctx, state, &primary.name);
        standbys(ctx, state, &primary);
        return false;
    }
    match health::judge(ctx, state, &primary.name) {
        Health::Up(up) if up.timeline == primary.timeline => {
            sync::upkeep(ctx, state, &up);
            standbys(ctx, state, &primary);
            slots(ctx, state, &primary);
            proxies(ctx, state);
            slow::leave(ctx, state, &up)
        }
        // Somebody promoted or restored by hand: nothing is known of such a server's history.
        Health::Up(_) | Health::Unknown(_) => false,
        Health::Down(why) => {
            replace(ctx, state, primary.name, why);
            true
        }
    }
}

/// Tells agents the settings that they have not been told. One that knows nothing of this is of an
/// earlier version, and reads its file when its Pod is replaced.
pub(crate) fn settings(ctx: &mut Ctx<'_>, state: &ClusterState) {
    let Some(settings) = &ctx.settings.server else {
        return;
    };
    let fingerprint = settings.fingerprint();
    for (name, member) in &state.members {
        let news = ctx.obs.agent(name).is_some_and(|agent| {
            let told = &agent.settings.told;
            !agent.leaving && !told.is_empty() && *told != fingerprint
        });
        if news && ctx.now >= member.retry_at && !ctx.busy(name) {
            let settings = settings.clone();
            let command = AgentCommand::Configure { settings };
            ctx.act(Action::agent(name, state.epoch, command));
        }
    }
}

/// A primary that a person has fenced: nobody takes its place, and nobody starts it.
fn keep_stopped(ctx: &mut Ctx<'_>, state: &ClusterState, name: &InstanceName) {
    let runs = ctx
        .obs
        .agent(name)
        .is_some_and(|agent| !is_stopped(&agent.instance));
    let due = state
        .members
        .get(name)
        .is_some_and(|m| ctx.now >= m.retry_at);
    if runs && due && !ctx.busy(name) {
        let mode = StopMode::Fast;
        let command = AgentCommand::Fence { mode };
        ctx.act(Action::agent(name, state.epoch, command));
    }
}

fn is_stopped(instance: &InstanceState) -> bool {
    matches!(
        instance,
        InstanceState::Stopped { .. } | InstanceState::Empty
    )
}

/// Forgets the slots of removed instances, once these have stopped and no commit rests on them.
fn slots(ctx: &mut Ctx<'_>, state: &ClusterState, primary: &Primary) {
    let due = |m: &Member| ctx.now >= m.retry_at;
    if ctx.busy(&primary.name) || !state.members.get(&primary.name).is_some_and(due) {
        return;
    }
    let gone = state.members.iter().find(|(name, member)| {
        let stopped = match ctx.obs.agent(name) {
            Some(agent) => is_stopped(&agent.instance),
            None => true,
        };
        let counts = state.sync.possible.iter().any(|set| set.contains(*name));
        ctx.obs.removed.contains(*name)
            && **name != primary.name
            && stopped
            && !counts
            && !member.slot_dropped
    });
    if let Some((name, _)) = gone {
        let standby = name.clone();
        let command = AgentCommand::DropSlot { standby };
        ctx.act(Action::agent(&primary.name, state.epoch, command));
    }
}

/// A primary that is down is replaced if somebody may, else it is started again.
pub(crate) fn replace(
    ctx: &mut Ctx<'_>,
    state: &mut ClusterState,
    primary: InstanceName,
    why: String,
) {
    let silent = ctx.obs.agent(&primary).is_none();
    let at_once = ctx.settings.failover_delay_ms == 0 || silent;
    let kind = if at_once && elect::possible(ctx.settings, state, ctx.obs) {
        OperationKind::Failover
    } else {
        OperationKind::Restart
    };
    moves::begin_repair(ctx, state, kind, primary, why);
}

/// Brings every other instance into the place it is to have.
pub(crate) fn standbys(ctx: &mut Ctx<'_>, state: &mut ClusterState, primary: &Primary) {
    let names: Vec<_> = state.members.keys().cloned().collect();
    for name in names.into_iter().filter(|name| *name != primary.name) {
        let due = state
            .members
            .get(&name)
            .is_some_and(|m| ctx.now >= m.retry_at);
        if !due || ctx.busy(&name) {
            continue;
        }
        if let Some(command) = wanted(ctx, state, primary, &name) {
            ctx.act(Action::agent(&name, state.epoch, command));
        }
    }
}

/// What one instance is to be told next.
fn wanted(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    primary: &Primary,
    name: &InstanceName,
) -> Option<AgentCommand> {
    // One that is ending begins nothing any more.
    let agent = ctx.obs.agent(name).filter(|agent| !agent.leaving)?;
    let fork = state.fork();
    let member = state.members.get_mut(name)?;
    if member.fenced || ctx.obs.removed.contains(name) {
        return (!is_stopped(&agent.instance)).then_some(AgentCommand::Fence {
            mode: StopMode::Fast,
        });
    }
    let follow = || {
        let backend = ctx.obs.backend(&primary.name)?;
        Some(AgentCommand::Follow {
            primary: backend,
            timeline: primary.timeline,
            fork,
        })
    };
    match &agent.instance {
        InstanceState::Empty | InstanceState::Stopped { .. } => follow(),
        InstanceState::Primary { .. } => Some(AgentCommand::Fence {
            mode: StopMode::Immediate,
        }),
        InstanceState::Starting { .. } | InstanceState::Unresponsive { .. } => None,
        InstanceState::Standby { .. } if member.followed != Some(primary.timeline) => follow(),
        InstanceState::Standby { .. } => {
            let since = member.missing_since;
            if since.is_some_and(|t| ctx.now.millis_since(t) >= REFOLLOW_MS) {
                member.missing_since = Some(ctx.now);
                return follow();
            }
            None
        }
    }
}

/// Brings proxies up to date that missed a move, or that an executor left holding.
fn proxies(ctx: &mut Ctx<'_>, state: &ClusterState) {
    let Some(topology) = state.topology(ctx.obs) else {
        return;
    };
    let alone = ctx.obs.proxies.len() == 1;
    let command = match alone {
        true => ProxyCommand::Resume(topology),
        false => ProxyCommand::Join(topology),
    };
    let behind =
        |epoch: Epoch, phase: &str| epoch < state.epoch || matches!(phase, "draining" | "held");
    for (name, status) in &ctx.obs.proxies {
        let Some(status) = status else { continue };
        if behind(status.epoch, &status.phase) && !ctx.proxy_busy(name) {
            ctx.act(Action::proxy(name, command.clone()));
        }
    }
}
