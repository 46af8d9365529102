//! A change of primary, step by step (design section 6).
//!
//! Every step is a list of commands that is durable with it; a new executor gives those that are
//! left again. What a step learns is in the step. Before *fence* a move can be undone, from there
//! on it goes forward: to a standby, or back to the old primary in a new epoch.

use helios_api::InstanceName;
use helios_api::agent::{AgentCommand, AgentReply, InstanceState};
use helios_api::control::DrainRequest;

use crate::decide::{Ctx, backoff_ms};
use crate::elect::{self, Electorate};
use crate::health::{self, Health};
use crate::observe::{Action, Contact, Failure, Finished, ProxyCommand, Reply};
use crate::operation::{OperationKind, OperationRecord, Outcome, PhaseDuration, Time};
use crate::state::{ClusterState, MAX_FENCES, MAX_OPERATIONS, Mode, Move, Position, Primary, Step};
use crate::transition::{Violation, enter};
use crate::{steady, sync};

/// Attempts at one command of a step before the step looks for another way.
const MAX_FAILURES: u32 = 5;
/// Replay may take so long before standbys are looked after beside it.
const UPKEEP_BESIDE_REPLAY_MS: u64 = 500;

/// Whether the round changed the step (`true`: another round).
type More = Result<bool, Violation>;

fn begin(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    kind: OperationKind,
    from: InstanceName,
    cause: String,
    step: Step,
) -> u64 {
    let id = state.next_operation;
    state.next_operation += 1;
    state.mode = Mode::Moving(Box::new(Move {
        id,
        kind,
        from,
        wanted: None,
        cause,
        started: ctx.now,
        step,
        step_started: ctx.now,
        todo: Vec::new(),
        failures: 0,
        retry_at: Time(0),
        phases: Vec::new(),
        drained: helios_api::control::DrainReport::default(),
        resumed: helios_api::control::ResumeReport::default(),
        diverted: None,
    }));
    id
}

/// Begins a planned move to `candidate`.
pub(crate) fn begin_switchover(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    from: InstanceName,
    wanted: Option<InstanceName>,
    candidate: InstanceName,
) -> u64 {
    let mut todo = vec![
        Action::agent(&from, state.epoch, AgentCommand::Checkpoint),
        Action::agent(&candidate, state.epoch, AgentCommand::Checkpoint),
    ];
    if let Some(backend) = ctx.obs.backend(&candidate) {
        todo.extend(to_proxies(
            ctx,
            &ProxyCommand::Prepare {
                epoch: state.epoch,
                candidate: backend,
            },
        ));
    }
    let step = Step::Prepare { candidate };
    let cause = "requested".to_owned();
    let id = begin(ctx, state, OperationKind::Switchover, from, cause, step);
    if let Mode::Moving(m) = &mut state.mode {
        m.wanted = wanted;
        m.todo = todo;
    }
    id
}

/// Begins what a primary that is down needs.
pub(crate) fn begin_repair(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    kind: OperationKind,
    from: InstanceName,
    why: String,
) {
    let (step, todo) = match kind {
        OperationKind::Restart => (Step::Restart, vec![start_again(state, &from)]),
        OperationKind::Failover | OperationKind::Switchover => {
            fencing(ctx, state, &from, None, false)
        }
    };
    begin(ctx, state, kind, from, why, step);
    if let Mode::Moving(m) = &mut state.mode {
        m.todo = todo;
    }
}

fn start_again(state: &ClusterState, name: &InstanceName) -> Action {
    Action::agent(name, state.epoch, AgentCommand::StartPrimary)
}

/// The step *fence* with its commands. Where all instances that a commit can be acknowledged by
/// are known, they stop receiving at the same time: from then on nothing is acknowledged any more,
/// so the positions they report are final although the fence is not answered yet.
fn fencing(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    from: &InstanceName,
    preferred: Option<InstanceName>,
    clean: bool,
) -> (Step, Vec<Action>) {
    let mut todo = vec![Action::agent(
        from,
        state.epoch,
        AgentCommand::Fence { clean },
    )];
    let all = matches!(elect::electorate(ctx.settings, state), Electorate::All(_));
    if !clean && all && elect::possible(ctx.settings, state, ctx.obs) {
        let ready = elect::ready(state, ctx.obs);
        let stop = |name| Action::agent(name, state.epoch, AgentCommand::StopReceiver);
        todo.extend(ready.iter().map(stop));
    }
    let step = Step::Fence {
        preferred,
        end: None,
        positions: Positions::new(),
    };
    (step, todo)
}

fn to_proxies(ctx: &Ctx<'_>, command: &ProxyCommand) -> Vec<Action> {
    let there = ctx
        .obs
        .proxies
        .iter()
        .filter(|(_, status)| status.is_some());
    there
        .map(|(name, _)| Action::proxy(name, command.clone()))
        .collect()
}

/// Takes note of an action of the step that ended.
pub(crate) fn absorb(ctx: &Ctx<'_>, state: &mut ClusterState, finished: &Finished) {
    let Mode::Moving(m) = &mut state.mode else {
        return;
    };
    let Some(at) = m.todo.iter().position(|action| *action == finished.action) else {
        return;
    };
    match &finished.result {
        Ok(reply) => {
            m.todo.remove(at);
            m.failures = 0;
            let promoted = note(m, &finished.action, reply);
            if let Some(fence) = promoted {
                take_over(ctx, state, &fence);
            }
        }
        Err(failure) => fail(ctx, m, at, failure),
    }
}

/// Records what a reply tells; a promotion is returned.
fn note(m: &mut Move, action: &Action, reply: &Reply) -> Option<helios_api::control::Fence> {
    match reply {
        Reply::Done => {}
        Reply::Drained(report) => {
            m.drained.idle += report.idle;
            m.drained.frozen += report.frozen;
            m.drained.unprotected += report.unprotected;
            m.drained.micros = m.drained.micros.max(report.micros);
        }
        Reply::Resumed(report) => {
            m.resumed.replayed += report.replayed;
            m.resumed.resolved += report.resolved;
            m.resumed.micros = m.resumed.micros.max(report.micros);
            for (reason, count) in &report.failed {
                *m.resumed.failed.entry(reason.clone()).or_default() += count;
            }
        }
        Reply::Agent(AgentReply::Promoted { fence, .. }) => return Some(fence.clone()),
        Reply::Agent(AgentReply::Positions { end, timeline }) => {
            note_position(
                m,
                action,
                Position {
                    timeline: *timeline,
                    end: *end,
                },
            );
        }
        Reply::Agent(AgentReply::Done | AgentReply::Following { .. }) => {}
    }
    None
}

fn note_position(m: &mut Move, action: &Action, position: Position) {
    let Action::Agent { instance, request } = action else {
        return;
    };
    match (&mut m.step, &request.command) {
        (
            Step::Choose { positions, .. } | Step::Fence { positions, .. },
            AgentCommand::StopReceiver,
        ) => {
            positions.insert(instance.clone(), position);
        }
        // Only after a clean stop is the end of the WAL the end of what was acknowledged.
        (Step::Fence { end, .. }, AgentCommand::Fence { clean: true }) => *end = Some(position),
        _ => {}
    }
}

fn fail(ctx: &Ctx<'_>, m: &mut Move, at: usize, failure: &Failure) {
    m.failures = m.failures.saturating_add(1);
    let Some(action) = m.todo.get_mut(at) else {
        return;
    };
    match &m.step {
        // Nothing has happened yet that would have to go on.
        Step::Prepare { .. } | Step::Drain { .. } => {
            let who = receiver(action);
            m.diverted = Some(format!("{who}: {failure}"));
            m.todo.remove(at);
            return;
        }
        Step::Fence { .. } => {
            if let Action::Agent { request, .. } = action
                && request.command == (AgentCommand::Fence { clean: true })
            {
                request.command = AgentCommand::Fence { clean: false };
                return;
            }
        }
        Step::Replay | Step::Abort { .. } if m.failures >= MAX_FAILURES => {
            m.todo.remove(at);
            m.failures = 0;
        }
        _ => {}
    }
    m.retry_at = ctx.now.plus_millis(backoff_ms(m.failures));
}

fn receiver(action: &Action) -> String {
    match action {
        Action::Agent { instance, .. } => format!("instance \"{instance}\""),
        Action::Proxy { proxy, .. } => format!("proxy \"{proxy}\""),
    }
}

/// Records a promotion: from here on the candidate is the primary.
fn take_over(ctx: &Ctx<'_>, state: &mut ClusterState, fence: &helios_api::control::Fence) {
    let Some(Step::Promote { candidate }) = state.moving().map(|m| m.step.clone()) else {
        return;
    };
    if fence.epoch != state.epoch {
        return;
    }
    state.primary = Some(Primary {
        name: candidate.clone(),
        timeline: fence.timeline,
    });
    state.fences.push(fence.clone());
    let over = state.fences.len().saturating_sub(MAX_FENCES);
    state.fences.drain(..over);
    for (name, member) in &mut state.members {
        member.missing_since = None;
        if *name == candidate {
            member.followed = None;
        }
    }
    let setting = sync::heir_setting(ctx, state, &candidate);
    state.sync = sync::after_promotion(setting);
}

/// One round of the step; emits what is left to do when the step stays.
pub(crate) fn round(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> More {
    let Mode::Moving(m) = std::mem::replace(&mut state.mode, Mode::Steady) else {
        return Ok(false);
    };
    let mut m = *m;
    let more = match m.step.clone() {
        Step::Prepare { candidate } => planned(ctx, state, &mut m, candidate, true)?,
        Step::Drain { candidate } => planned(ctx, state, &mut m, candidate, false)?,
        Step::Fence {
            preferred,
            end,
            positions,
        } => fence(ctx, &mut m, preferred, end, positions)?,
        Step::Choose {
            preferred,
            end,
            positions,
        } => {
            trim(ctx, state, &mut m, &positions);
            choose(ctx, state, &mut m, preferred, end, positions)?
        }
        Step::Promote { candidate } => promote(ctx, state, &mut m, candidate)?,
        Step::Discard { candidate } => discard(ctx, state, &mut m, &candidate)?,
        Step::Restart => restart(ctx, state, &mut m)?,
        Step::Replay => return Ok(replay(ctx, state, m)),
        Step::Abort { reason } => return abort(ctx, state, m, reason),
    };
    if !more {
        emit(ctx, &m);
    }
    state.mode = Mode::Moving(Box::new(m));
    Ok(more)
}

fn emit(ctx: &mut Ctx<'_>, m: &Move) {
    if ctx.now >= m.retry_at {
        for action in &m.todo {
            ctx.act(action.clone());
        }
    }
}

/// *Prepare* and *drain*: may still be undone.
fn planned(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    m: &mut Move,
    candidate: InstanceName,
    preparing: bool,
) -> More {
    let trouble = match health::judge(ctx, state, &m.from) {
        Health::Down(why) => return crashed(ctx, state, m, Some(candidate), &why),
        Health::Up(up) => crate::requests::unfit(ctx, state, &up, &candidate)
            .map(|why| format!("instance \"{candidate}\" cannot take over: {why}")),
        Health::Unknown(why) => Some(format!("the primary is not up: {why}")),
    };
    if let Some(reason) = m.diverted.clone().or(trouble) {
        m.diverted = Some(reason.clone());
        enter(m, Step::Abort { reason }, ctx.now)?;
        m.todo = to_proxies(ctx, &ProxyCommand::Abort { epoch: state.epoch });
        return Ok(true);
    }
    if !m.todo.is_empty() {
        return Ok(false);
    }
    if preparing {
        enter(m, Step::Drain { candidate }, ctx.now)?;
        m.todo = to_proxies(
            ctx,
            &ProxyCommand::Drain(DrainRequest {
                epoch: state.epoch,
                timeout_ms: ctx.settings.drain_timeout_ms,
            }),
        );
    } else {
        let clean = !holds_all(ctx, state, &candidate);
        let (step, todo) = fencing(ctx, state, &m.from, Some(candidate), clean);
        enter(m, step, ctx.now)?;
        m.todo = todo;
    }
    Ok(true)
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
        fencing(ctx, state, &m.from, preferred, false)
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

fn fence(
    ctx: &Ctx<'_>,
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
        return Ok(false);
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

type Positions = std::collections::BTreeMap<InstanceName, Position>;

/// Asks nobody who has gone, and everybody who has come.
fn trim(ctx: &Ctx<'_>, state: &ClusterState, m: &mut Move, positions: &Positions) {
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

fn choose(
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
    let electorate = elect::electorate(ctx.settings, state);
    if let Some(candidate) = elect::choose(&electorate, &positions, end, preferred.as_ref()) {
        enter(m, Step::Promote { candidate }, ctx.now)?;
        state.epoch = state.epoch.next();
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

fn promote(ctx: &Ctx<'_>, state: &mut ClusterState, m: &mut Move, candidate: InstanceName) -> More {
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
        let command = AgentCommand::Fence { clean: false };
        let action = Action::agent(&candidate, state.epoch, command);
        enter(m, Step::Discard { candidate }, ctx.now)?;
        m.todo = vec![action];
        return Ok(true);
    }
    if m.todo.is_empty() {
        let command = AgentCommand::Promote;
        m.todo = vec![Action::agent(&candidate, state.epoch, command)];
    }
    Ok(false)
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

fn discard(
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

fn restart(ctx: &Ctx<'_>, state: &ClusterState, m: &mut Move) -> More {
    let health = health::judge(ctx, state, &m.from);
    if m.todo.is_empty() && matches!(health, Health::Up(_)) {
        enter(m, Step::Replay, ctx.now)?;
        m.todo = resumes(ctx, state);
        return Ok(true);
    }
    let overdue = ctx.now.millis_since(m.step_started) >= ctx.settings.restart_patience_ms;
    let given_up = overdue || m.failures >= MAX_FAILURES;
    if given_up && elect::possible(ctx.settings, state, ctx.obs) {
        let (step, todo) = fencing(ctx, state, &m.from, None, false);
        enter(m, step, ctx.now)?;
        m.kind = OperationKind::Failover;
        m.cause = format!("{}; it does not start", m.cause);
        m.todo = todo;
        return Ok(true);
    }
    if m.todo.is_empty() && matches!(health, Health::Down(_)) {
        m.failures = m.failures.saturating_add(1);
        m.retry_at = ctx.now.plus_millis(backoff_ms(m.failures));
        m.todo = vec![start_again(state, &m.from)];
    }
    Ok(false)
}

fn resumes(ctx: &Ctx<'_>, state: &ClusterState) -> Vec<Action> {
    match state.topology(ctx.obs) {
        Some(topology) => to_proxies(ctx, &ProxyCommand::Resume(topology)),
        None => Vec::new(),
    }
}

/// Forgets commands to proxies that do not answer any more: they are left behind.
fn leave_behind(ctx: &Ctx<'_>, m: &mut Move) {
    m.todo.retain(|action| match action {
        Action::Proxy { proxy, .. } => matches!(ctx.obs.proxies.get(proxy), Some(Some(_))),
        Action::Agent { .. } => true,
    });
}

fn replay(ctx: &mut Ctx<'_>, state: &mut ClusterState, mut m: Move) -> bool {
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

fn abort(ctx: &mut Ctx<'_>, state: &mut ClusterState, mut m: Move, reason: String) -> More {
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

/// Writes the record and goes back to upkeep.
fn finish(ctx: &Ctx<'_>, state: &mut ClusterState, mut m: Move) {
    m.phases.push(PhaseDuration {
        phase: m.step.phase(),
        micros: ctx.now.micros_since(m.step_started),
    });
    let to = state.primary_name().unwrap_or(&m.from).clone();
    let reached = m.wanted.as_ref().is_none_or(|wanted| *wanted == to);
    let outcome = match (m.kind, m.diverted) {
        (OperationKind::Switchover, Some(reason)) if to == m.from => Outcome::Aborted { reason },
        (OperationKind::Switchover, None) if reached => Outcome::Succeeded,
        (OperationKind::Switchover, reason) => Outcome::Diverted {
            reason: reason.unwrap_or_else(|| "another standby was further ahead".to_owned()),
        },
        (_, Some(reason)) => Outcome::Diverted { reason },
        (_, None) => Outcome::Succeeded,
    };
    state.operations.push(OperationRecord {
        id: m.id,
        kind: m.kind,
        from: m.from,
        to,
        epoch: state.epoch,
        started: m.started,
        cause: m.cause,
        outcome,
        phases: m.phases,
        drained: m.drained,
        resumed: m.resumed,
        rejoin: None,
    });
    let over = state.operations.len().saturating_sub(MAX_OPERATIONS);
    state.operations.drain(..over);
    state.mode = Mode::Steady;
}
