//! Upkeep of `synchronous_standby_names` on the primary.
//!
//! Order: the new setting is durable as a possibility, then the primary is given it, then a
//! checkpoint proves that every process there knows it, then its members flush past a position
//! read after that. Only then are older settings forgotten.

use std::collections::BTreeSet;

use helios_api::agent::{AgentCommand, InstanceState};
use helios_api::{InstanceName, Lsn, Timeline};

use crate::decide::Ctx;
use crate::health::Up;
use crate::observe::{Action, Contact};
use crate::operation::{Durability, Time};
use crate::state::{ClusterState, SyncState};

/// The command that gives an instance a setting.
pub(crate) fn command(setting: &BTreeSet<InstanceName>) -> AgentCommand {
    AgentCommand::SetSynchronous {
        standbys: setting.iter().cloned().collect(),
        number: u32::from(!setting.is_empty()),
    }
}

/// What a new primary is given before sessions are let in: nobody (commits go on), or with
/// [`Durability::Required`] everybody else (commits wait). Standbys themselves have nobody in
/// their configuration, so a promotion itself waits for no one.
pub(crate) fn heir_setting(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    heir: &InstanceName,
) -> BTreeSet<InstanceName> {
    if !ctx.settings.synchronous || ctx.settings.durability == Durability::Preferred {
        return BTreeSet::new();
    }
    let others = state
        .members
        .iter()
        .filter(|(name, m)| *name != heir && !m.fenced);
    others.map(|(name, _)| name.clone()).collect()
}

/// The state of affairs the moment after `heir` was promoted with its setting.
pub(crate) fn after_promotion(setting: BTreeSet<InstanceName>) -> SyncState {
    let mut sync = SyncState::default();
    if !setting.is_empty() {
        sync.aim(setting);
    }
    sync
}

/// One round of upkeep; `up` is the primary's own report.
pub(crate) fn upkeep(ctx: &mut Ctx<'_>, state: &mut ClusterState, up: &Up<'_>) {
    let Some(primary) = state.primary.clone() else {
        return;
    };
    note_missing(ctx, state, up, &primary.name);
    let wanted = desired(ctx, state, up, &primary.name, primary.timeline);
    if wanted != state.sync.target() {
        state.sync.aim(wanted);
    }
    let target = state.sync.target();
    let Some(member) = state.members.get_mut(&primary.name) else {
        return;
    };
    let retry_at = member.retry_at;
    if member.setting.as_ref() != Some(&target) {
        // One at a time, so that they take effect in order; unknown until its result is there,
        // because this executor may die in between.
        if ctx.now >= retry_at && !setting_runs(ctx, &primary.name) {
            member.setting = None;
            ctx.act(Action::agent(&primary.name, state.epoch, command(&target)));
        }
        return;
    }
    if state.sync.is_settled() {
        return;
    }
    if target.is_empty() {
        state.sync = SyncState::settled(target);
        return;
    }
    let Some(checkpointed) = state.sync.checkpointed else {
        if ctx.now >= retry_at {
            ctx.act(Action::agent(
                &primary.name,
                state.epoch,
                AgentCommand::Checkpoint,
            ));
        }
        return;
    };
    if is_later(ctx, &primary.name, checkpointed) {
        settle(state, up, target);
    }
}

/// An unchanged report is not given a new revision; after so long it is one of now all the same.
const REPORT_MS: u64 = 2_000;

/// Whether the primary's report is of a question that was asked after the checkpoint. Questions
/// are asked one after the other, and one may have been under way.
fn is_later(ctx: &Ctx<'_>, primary: &InstanceName, (at, revision): (Time, u64)) -> bool {
    let now = ctx.obs.agent(primary).map_or(0, |agent| agent.revision);
    now >= revision.saturating_add(2) || ctx.now.millis_since(at) >= REPORT_MS
}

fn setting_runs(ctx: &Ctx<'_>, primary: &InstanceName) -> bool {
    ctx.obs.running.iter().any(|action| match action {
        Action::Agent { instance, request } => {
            instance == primary && matches!(request.command, AgentCommand::SetSynchronous { .. })
        }
        Action::Proxy { .. } => false,
    })
}

/// Forgets older settings once the members of the last one hold everything written under them.
fn settle(state: &mut ClusterState, up: &Up<'_>, target: BTreeSet<InstanceName>) {
    let flushed = |name: &InstanceName| up.standbys.iter().find(|s| s.name == name.as_str());
    let seen: Vec<_> = target.iter().filter_map(flushed).collect();
    if seen.len() < target.len() || !seen.iter().any(|s| s.synchronous) {
        return;
    }
    let barrier = *state.sync.barrier.get_or_insert(up.position);
    if seen.iter().all(|s| s.flushed >= barrier) {
        state.sync = SyncState::settled(target);
    }
}

/// Remembers since when the primary has not seen each standby.
fn note_missing(ctx: &Ctx<'_>, state: &mut ClusterState, up: &Up<'_>, primary: &InstanceName) {
    for (name, member) in &mut state.members {
        let there = name == primary || up.standbys.iter().any(|s| s.name == name.as_str());
        match (there, member.missing_since) {
            (true, _) => member.missing_since = None,
            (false, None) => member.missing_since = Some(ctx.now),
            (false, Some(_)) => {}
        }
    }
}

/// Who should count now.
fn desired(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    up: &Up<'_>,
    primary: &InstanceName,
    timeline: Timeline,
) -> BTreeSet<InstanceName> {
    let target = state.sync.target();
    if !ctx.settings.synchronous {
        return BTreeSet::new();
    }
    let near = |flushed: Lsn| up.position.0.saturating_sub(flushed.0) <= ctx.settings.max_lag_bytes;
    let mut set = BTreeSet::new();
    for (name, member) in &state.members {
        let leaves = ctx.obs.aside.contains(name) || ctx.obs.removed.contains(name);
        if name == primary || member.fenced || leaves || member.followed != Some(timeline) {
            continue;
        }
        let counts = match up.standbys.iter().find(|s| s.name == name.as_str()) {
            Some(seen) => target.contains(name) || near(seen.flushed),
            None => target.contains(name) && !gone(ctx, state, name),
        };
        if counts {
            set.insert(name.clone());
        }
    }
    // Somebody must stay for commits to wait for.
    if set.is_empty() && ctx.settings.durability == Durability::Required {
        return target;
    }
    set
}

/// Whether a standby that the primary does not see is to be waited for no longer.
fn gone(ctx: &Ctx<'_>, state: &ClusterState, name: &InstanceName) -> bool {
    let proven = match ctx.obs.instances.get(name).map(|view| &view.contact) {
        Some(Contact::Answers(agent)) => matches!(
            agent.instance,
            InstanceState::Stopped { .. } | InstanceState::Empty
        ),
        Some(Contact::Silent { proven_dead, .. }) => *proven_dead,
        None => true,
    };
    let since = state.members.get(name).and_then(|m| m.missing_since);
    let overdue = since.is_some_and(|t| ctx.now.millis_since(t) >= ctx.settings.standby_grace_ms);
    proven || overdue
}
