//! Upkeep while there is a primary: notices its end, brings everybody else back behind it.
//!
//! Nothing here is durable but its results: what is needed is read off the observation each time.

use helios_api::agent::{AgentCommand, InstanceState, StopMode};
use helios_api::{Epoch, InstanceName};

use crate::decide::Ctx;
use crate::health::{self, Health};
use crate::observe::{Action, ProxyCommand};
use crate::operation::OperationKind;
use crate::state::{ClusterState, Primary};
use crate::{elect, moves, slow, sync};

/// A standby that the primary has not seen for so long is told to follow again.
const REFOLLOW_MS: u64 = 10_000;

/// One round; `true`: a move began.
pub(crate) fn round(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> bool {
    let Some(primary) = state.primary.clone() else {
        return false;
    };
    match health::judge(ctx, state, &primary.name) {
        Health::Up(up) if up.timeline == primary.timeline => {
            sync::upkeep(ctx, state, &up);
            standbys(ctx, state, &primary);
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

/// A primary that is down is replaced if somebody may, else it is started again.
pub(crate) fn replace(
    ctx: &mut Ctx<'_>,
    state: &mut ClusterState,
    primary: InstanceName,
    why: String,
) {
    let kind = if elect::possible(ctx.settings, state, ctx.obs) {
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
    if member.fenced {
        let still = matches!(
            agent.instance,
            InstanceState::Stopped { .. } | InstanceState::Empty
        );
        return (!still).then_some(AgentCommand::Fence {
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
