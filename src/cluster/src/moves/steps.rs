//! The steps of a move: when each is over, and what comes next.
//!
//! Invariant: a step is left only through [`enter`], and its commands are in the move's list before
//! any of them is given.

use helios_api::InstanceName;
use helios_api::agent::{AgentCommand, InstanceState, StopMode};
use helios_api::control::{DrainRequest, LostCommits};

use super::{
    MAX_FAILURES, More, Positions, UPKEEP_BESIDE_REPLAY_MS, emit, fencing, finish, start_again,
    to_proxies,
};
use crate::decide::{Ctx, backoff_ms};
use crate::elect::{self, Electorate};
use crate::health::{self, Health};
use crate::observe::{Action, Contact, ProxyCommand};
use crate::operation::OperationKind;
use crate::requests::{Unfit, unfit};
use crate::state::{ClusterState, Mode, Move, Position, Step};
use crate::transition::enter;
use crate::{lease, steady, sync};

/// How long several proxies hold their clients for one session that cannot be moved.
const HELD_MS: u64 = 1_000;

/// How long proxies may wait for sessions that cannot be moved: while the move is prepared, and
/// when they are drained. Several wait beforehand, or one that waits would have the others hold
/// their clients for as long.
pub(super) fn patience(ctx: &Ctx<'_>) -> (u64, u64) {
    let limit = ctx.settings.drain_timeout_ms;
    match ctx.obs.proxies.len() {
        0 | 1 => (0, limit),
        _ => (limit, limit.min(HELD_MS)),
    }
}

/// *Prepare* and *drain*: may still be undone.
pub(super) fn planned(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    m: &mut Move,
    candidate: InstanceName,
    preparing: bool,
) -> More {
    let trouble = match health::judge(ctx, state, &m.from) {
        Health::Down(why) => return crashed(ctx, state, m, Some(candidate), &why),
        Health::Up(up) => unfit(ctx, state, &up, &candidate)
            .map(|why| why.map(|w| format!("instance \"{candidate}\" cannot take over: {w}"))),
        Health::Unknown(why) => Some(Unfit::Now(format!("the primary is not up: {why}"))),
    };
    if let Some(reason) = m
        .diverted
        .clone()
        .or_else(|| past_patience(ctx, m, trouble))
    {
        m.diverted = Some(reason.clone());
        enter(m, Step::Abort { reason }, ctx.now)?;
        m.todo = to_proxies(ctx, &ProxyCommand::Abort { epoch: state.epoch });
        return Ok(true);
    }
    if !m.todo.is_empty() || m.doubted.is_some() {
        return Ok(false);
    }
    if preparing {
        enter(m, Step::Drain { candidate }, ctx.now)?;
        m.todo = to_proxies(
            ctx,
            &ProxyCommand::Drain(DrainRequest {
                epoch: state.epoch,
                timeout_ms: patience(ctx).1,
            }),
        );
    } else {
        let mode = match holds_all(ctx, state, &candidate) {
            true => StopMode::Halt,
            false => StopMode::Fast,
        };
        let (step, todo) = fencing(ctx, state, &m.from, Some(candidate), mode);
        enter(m, step, ctx.now)?;
        m.todo = todo;
    }
    Ok(true)
}

/// Why a switchover is given up: what is wrong will not pass by itself, or has not for long. A disk
/// that stands still for longer than `wal_receiver_timeout` costs a standby its connection, which
/// it opens again within milliseconds once it can.
fn past_patience(ctx: &Ctx<'_>, m: &mut Move, trouble: Option<Unfit>) -> Option<String> {
    match trouble {
        None => {
            m.doubted = None;
            None
        }
        Some(Unfit::Lasting(why)) => Some(why),
        Some(Unfit::Now(why)) => {
            let since = *m.doubted.get_or_insert(ctx.now);
            (ctx.now.millis_since(since) >= ctx.settings.standby_grace_ms).then_some(why)
        }
    }
}

/// Whether the candidate holds every acknowledged commit already, so that the old primary can be
/// stopped at once: sessions stand still, and what nobody was told of may go. The checkpoint of a
/// clean stop would be the longest part of the pause.
fn holds_all(ctx: &Ctx<'_>, state: &ClusterState, candidate: &InstanceName) -> bool {
    match elect::electorate(ctx.settings, state) {
        Electorate::All(set) => {
            set.contains(candidate) && elect::possible(ctx.settings, state, ctx.obs)
        }
        Electorate::Anyone | Electorate::Nobody => false,
    }
}

/// The primary died while it was to be moved: what was a plan becomes a repair.
fn crashed(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    m: &mut Move,
    preferred: Option<InstanceName>,
    why: &str,
) -> More {
    m.diverted = Some(format!("the primary failed meanwhile: {why}"));
    let (step, todo) = if elect::possible(ctx.settings, state, ctx.obs) {
        fencing(ctx, state, &m.from, preferred, StopMode::Immediate)
    } else {
        (Step::Restart, vec![start_again(state, &m.from)])
    };
    enter(m, step, ctx.now)?;
    m.todo = todo;
    Ok(true)
}

fn proven_dead(ctx: &Ctx<'_>, name: &InstanceName) -> bool {
    matches!(
        ctx.obs.instances.get(name).map(|view| &view.contact),
        Some(Contact::Silent {
            proven_dead: true,
            ..
        })
    )
}

pub(super) fn fence(
    ctx: &mut Ctx<'_>,
    state: &ClusterState,
    m: &mut Move,
    preferred: Option<InstanceName>,
    end: Option<Position>,
    positions: Positions,
) -> More {
    let fencing = m.todo.iter().any(|action| match action {
        Action::Agent { request, .. } => {
            matches!(request.command, AgentCommand::Fence { .. })
        }
        Action::Proxy { .. } => false,
    });
    if fencing && !proven_dead(ctx, &m.from) {
        if !lease::lapsed(ctx.obs, state, &m.from, &positions) {
            if ctx.settings.lease_ms.is_some() && is_silent(ctx, &m.from) {
                stop_confirming(ctx, state, m, &positions);
                wake_standbys(ctx, state);
            }
            return Ok(false);
        }
        m.cause = format!("{}; its lease has ended", m.cause);
    }
    let step = Step::Choose {
        preferred,
        end,
        positions,
    };
    // Whose position is not known yet is asked by the step itself.
    enter(m, step, ctx.now)?;
    Ok(true)
}

/// Whether an agent has not answered for as long as a failure takes. A moment's silence is not
/// enough: a clean stop sends the standbys everything.
fn is_silent(ctx: &Ctx<'_>, name: &InstanceName) -> bool {
    let contact = ctx.obs.instances.get(name).map(|view| &view.contact);
    matches!(contact, Some(Contact::Silent { for_ms, .. })
        if *for_ms >= ctx.settings.unresponsive_ms)
}

/// A primary whose agent is silent cannot be told to stop: its lease ends, once nobody confirms it
/// any more.
fn stop_confirming(ctx: &Ctx<'_>, state: &ClusterState, m: &mut Move, positions: &Positions) {
    for name in elect::ready(state, ctx.obs) {
        let action = Action::agent(&name, state.epoch, AgentCommand::StopReceiver);
        if !positions.contains_key(&name) && !m.todo.contains(&action) {
            m.todo.push(action);
        }
    }
}

/// Asks nobody who has gone, and everybody who has come.
pub(super) fn trim(ctx: &Ctx<'_>, state: &ClusterState, m: &mut Move, positions: &Positions) {
    let ready = elect::ready(state, ctx.obs);
    m.todo.retain(|action| match action {
        Action::Agent { instance, .. } => ready.contains(instance),
        Action::Proxy { .. } => false,
    });
    for name in ready.iter().filter(|name| !positions.contains_key(*name)) {
        let action = Action::agent(name, state.epoch, AgentCommand::StopReceiver);
        if !m.todo.contains(&action) {
            m.todo.push(action);
        }
    }
}

/// A standby that does not tell its position holds up the others no longer than this.
const STRAGGLER_MS: u64 = 500;

pub(super) fn choose(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    m: &mut Move,
    preferred: Option<InstanceName>,
    end: Option<Position>,
    mut positions: Positions,
) -> More {
    let waited = ctx.now.millis_since(m.step_started);
    if !m.todo.is_empty() && waited < STRAGGLER_MS {
        return Ok(false);
    }
    let ready = elect::ready(state, ctx.obs);
    positions.retain(|name, _| ready.contains(name));
    let electorate = match m.forced {
        true => Electorate::Anyone,
        false => elect::electorate(ctx.settings, state),
    };
    if let Some(candidate) = elect::choose(&electorate, &positions, end, preferred.as_ref()) {
        let held = positions.get(&candidate).copied();
        let lost = elect::lost(&electorate, held.as_ref(), end);
        let step = Step::Promote {
            candidate: candidate.clone(),
            lost,
            ends: None,
        };
        enter(m, step, ctx.now)?;
        state.epoch = state.epoch.next();
        m.todo = vec![promotion(state, &candidate)];
        // Beside the promotion, the old primary's files are asked for what was left behind.
        if let Some(held) = held
            && lost == LostCommits::Possible
            && ctx.obs.agent(&m.from).is_some()
        {
            let command = AgentCommand::WalBeyond {
                timeline: held.timeline,
                at: held.end,
            };
            m.todo.push(Action::agent(&m.from, state.epoch, command));
        }
        return Ok(true);
    }
    if waited < ctx.settings.choose_patience_ms {
        return Ok(false);
    }
    go_back(ctx, state, m, "no standby holds every acknowledged commit")
}

/// Starts the old primary again: it holds everything. A new epoch, because it was fenced in this
/// one; no new timeline.
fn go_back(ctx: &Ctx<'_>, state: &mut ClusterState, m: &mut Move, why: &str) -> More {
    enter(m, Step::Restart, ctx.now)?;
    m.diverted.get_or_insert_with(|| why.to_owned());
    state.epoch = state.epoch.next();
    // Their receivers were stopped.
    for member in state.members.values_mut() {
        member.followed = None;
    }
    m.todo = vec![start_again(state, &m.from)];
    Ok(true)
}

pub(super) fn promote(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    m: &mut Move,
    candidate: InstanceName,
) -> More {
    let died = match ctx.obs.instances.get(&candidate).map(|view| &view.contact) {
        Some(Contact::Answers(agent)) => matches!(
            agent.instance,
            InstanceState::Stopped { .. } | InstanceState::Empty
        ),
        Some(Contact::Silent {
            for_ms,
            proven_dead,
        }) => *proven_dead || *for_ms >= ctx.settings.restart_patience_ms,
        None => true,
    };
    if state.primary_name() == Some(&candidate) {
        return promoted(ctx, state, m, &candidate, died);
    }
    if died || m.failures >= MAX_FAILURES {
        m.diverted = Some(format!(
            "instance \"{candidate}\" failed while it was promoted"
        ));
        let command = AgentCommand::Fence {
            mode: StopMode::Immediate,
        };
        let action = Action::agent(&candidate, state.epoch, command);
        enter(m, Step::Discard { candidate }, ctx.now)?;
        m.todo = vec![action];
        return Ok(true);
    }
    if m.todo.is_empty() {
        m.todo = vec![promotion(state, &candidate)];
    }
    Ok(false)
}

fn promotion(state: &ClusterState, candidate: &InstanceName) -> Action {
    Action::agent(candidate, state.epoch, AgentCommand::Promote)
}

/// The candidate is primary; it gets its synchronous setting before sessions do. If it has died
/// since, *replay* is where the death of a primary is dealt with.
fn promoted(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    m: &mut Move,
    candidate: &InstanceName,
    died: bool,
) -> More {
    if !died && !m.todo.is_empty() {
        return Ok(false);
    }
    let setting = sync::heir_setting(ctx, state, candidate);
    let member = state.members.get(candidate);
    if !died && member.and_then(|m| m.setting.as_ref()) != Some(&setting) {
        let command = sync::command(&setting);
        m.todo = vec![Action::agent(candidate, state.epoch, command)];
        return Ok(false);
    }
    enter(m, Step::Replay, ctx.now)?;
    m.todo = resumes(ctx, state);
    Ok(true)
}

pub(super) fn discard(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    m: &mut Move,
    candidate: &InstanceName,
) -> More {
    if !m.todo.is_empty() && !proven_dead(ctx, candidate) {
        return Ok(false);
    }
    go_back(ctx, state, m, "the candidate failed")
}

pub(super) fn restart(ctx: &mut Ctx<'_>, state: &ClusterState, m: &mut Move) -> More {
    let health = health::judge(ctx, state, &m.from);
    if m.todo.is_empty() && matches!(health, Health::Up(_)) {
        enter(m, Step::Replay, ctx.now)?;
        m.todo = resumes(ctx, state);
        return Ok(true);
    }
    let patience = match ctx.settings.failover_delay_ms {
        0 => ctx.settings.restart_patience_ms,
        delay => delay.min(ctx.settings.restart_patience_ms),
    };
    let overdue = ctx.now.millis_since(m.step_started) >= patience;
    let given_up = overdue || m.failures >= MAX_FAILURES;
    if given_up && elect::possible(ctx.settings, state, ctx.obs) {
        let (step, todo) = fencing(ctx, state, &m.from, None, StopMode::Immediate);
        enter(m, step, ctx.now)?;
        m.kind = OperationKind::Failover;
        m.cause = format!("{}; it does not start", m.cause);
        m.todo = todo;
        return Ok(true);
    }
    if given_up {
        wake_standbys(ctx, state);
    }
    if m.todo.is_empty() && matches!(health, Health::Down(_)) {
        m.failures = m.failures.saturating_add(1);
        m.retry_at = ctx.now.plus_millis(backoff_ms(m.failures));
        m.todo = vec![start_again(state, &m.from)];
    }
    Ok(false)
}

/// Has stopped standbys started as they are: the primary that they are to follow does not come
/// back, and one of them may have to take its place.
fn wake_standbys(ctx: &mut Ctx<'_>, state: &ClusterState) {
    let Some(primary) = &state.primary else {
        return;
    };
    for (name, member) in &state.members {
        let stopped = matches!(
            ctx.obs.agent(name).map(|agent| &agent.instance),
            Some(InstanceState::Stopped { .. })
        );
        let may = *name != primary.name
            && !member.fenced
            && member.followed == Some(primary.timeline)
            && ctx.now >= member.retry_at;
        if stopped && may && !ctx.busy(name) {
            let command = AgentCommand::StartStandby;
            ctx.act(Action::agent(name, state.epoch, command));
        }
    }
}

fn resumes(ctx: &Ctx<'_>, state: &ClusterState) -> Vec<Action> {
    let Some(topology) = state.topology(ctx.obs) else {
        return Vec::new();
    };
    // Who does not answer has not been told, and lets nobody in.
    let of = ctx.obs.proxies.values().flatten().count();
    let command = match ctx.obs.proxies.len() {
        0 | 1 => ProxyCommand::Resume(topology),
        _ => ProxyCommand::Together { topology, of },
    };
    to_proxies(ctx, &command)
}

/// Forgets commands to proxies that do not answer any more: they are left behind.
fn leave_behind(ctx: &Ctx<'_>, m: &mut Move) {
    m.todo.retain(|action| match action {
        Action::Proxy { proxy, .. } => matches!(ctx.obs.proxies.get(proxy), Some(Some(_))),
        Action::Agent { .. } => true,
    });
}

pub(super) fn replay(ctx: &mut Ctx<'_>, state: &mut ClusterState, mut m: Move) -> bool {
    leave_behind(ctx, &mut m);
    let Some(primary) = state.primary.clone() else {
        return false;
    };
    let health = health::judge(ctx, state, &primary.name);
    if let Health::Down(why) = health {
        m.diverted = Some(format!("instance \"{}\" failed: {why}", primary.name));
        finish(ctx, state, m);
        steady::replace(ctx, state, primary.name, why);
        return true;
    }
    if m.todo.is_empty() {
        finish(ctx, state, m);
        return true;
    }
    emit(ctx, &m);
    let waited = ctx.now.millis_since(m.step_started);
    let blocked = !state.sync.target().is_empty() && !state.sync.is_settled();
    state.mode = Mode::Moving(Box::new(m));
    if let Health::Up(up) = health
        && up.timeline == primary.timeline
        && (blocked || waited >= UPKEEP_BESIDE_REPLAY_MS)
    {
        sync::upkeep(ctx, state, &up);
        steady::standbys(ctx, state, &primary);
    }
    false
}

pub(super) fn abort(
    ctx: &mut Ctx<'_>,
    state: &mut ClusterState,
    mut m: Move,
    reason: String,
) -> More {
    leave_behind(ctx, &mut m);
    if let Health::Down(why) = health::judge(ctx, state, &m.from) {
        crashed(ctx, state, &mut m, None, &why)?;
        state.mode = Mode::Moving(Box::new(m));
        return Ok(true);
    }
    if m.todo.is_empty() {
        m.diverted = Some(reason);
        finish(ctx, state, m);
        return Ok(true);
    }
    emit(ctx, &m);
    state.mode = Mode::Moving(Box::new(m));
    Ok(false)
}
