//! A change of primary, step by step (design section 6).
//!
//! Every step is a list of commands that is durable with it; a new executor gives those that are
//! left again. What a step learns is in the step. Before *fence* a move can be undone, from there
//! on it goes forward: to a standby, or back to the old primary in a new epoch.

mod steps;

use helios_api::InstanceName;
use helios_api::agent::{AgentCommand, AgentReply, StopMode};
use helios_api::control::{Fence, LostCommits};

use crate::decide::{Ctx, backoff_ms};
use crate::elect::{self, Electorate};
use crate::observe::{Action, Failure, Finished, ProxyCommand, Refusal, Reply};
use crate::operation::{OperationKind, OperationRecord, Outcome, PhaseDuration, Time};
use crate::state::{ClusterState, MAX_FENCES, MAX_OPERATIONS, Mode, Move, Position, Primary, Step};
use crate::sync;
use crate::transition::{Violation, enter};

/// Attempts at one command of a step before the step looks for another way.
const MAX_FAILURES: u32 = 5;
/// Replay may take so long before standbys are looked after beside it.
const UPKEEP_BESIDE_REPLAY_MS: u64 = 500;

type Positions = std::collections::BTreeMap<InstanceName, Position>;

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
        doubted: None,
        forced: false,
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
    cause: String,
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
                wait_ms: steps::patience(ctx).0,
            },
        ));
    }
    let step = Step::Prepare { candidate };
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
            fencing(ctx, state, &from, None, StopMode::Immediate)
        }
    };
    begin(ctx, state, kind, from, why, step);
    if let Mode::Moving(m) = &mut state.mode {
        m.todo = todo;
    }
}

/// A person's word that acknowledged commits may be lost: the old primary is fenced as ever, and
/// the most advanced standby takes over.
pub(crate) fn force(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    from: InstanceName,
    why: &str,
) -> Result<u64, Refusal> {
    if state.mode == Mode::Steady {
        let cause = format!("forced; {why}");
        begin_repair(ctx, state, OperationKind::Failover, from.clone(), cause);
    } else if state.moving().is_some_and(|m| m.step == Step::Restart) {
        let (step, todo) = fencing(ctx, state, &from, None, StopMode::Immediate);
        if let Mode::Moving(m) = &mut state.mode {
            enter(m, step, ctx.now).map_err(|_| Refusal::UnderWay)?;
            m.kind = OperationKind::Failover;
            m.cause = format!("forced; {}", m.cause);
            m.todo = todo;
        }
    }
    let Mode::Moving(m) = &mut state.mode else {
        return Err(Refusal::UnderWay);
    };
    if !matches!(m.step, Step::Fence { .. } | Step::Choose { .. }) {
        return Err(Refusal::UnderWay);
    }
    m.forced = true;
    Ok(m.id)
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
    mode: StopMode,
) -> (Step, Vec<Action>) {
    let mut todo = vec![Action::agent(
        from,
        state.epoch,
        AgentCommand::Fence { mode },
    )];
    let all = matches!(elect::electorate(ctx.settings, state), Electorate::All(_));
    if mode != StopMode::Fast && all && elect::possible(ctx.settings, state, ctx.obs) {
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
            nothing_left_behind(state);
        }
        Err(failure) => fail(ctx, m, at, failure),
    }
}

/// Records what a reply tells; a promotion is returned.
fn note(m: &mut Move, action: &Action, reply: &Reply) -> Option<Fence> {
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
        Reply::Agent(AgentReply::WalBeyond { beyond: false }) => {
            if let (Step::Promote { ends, .. }, Action::Agent { request, .. }) =
                (&mut m.step, action)
                && let AgentCommand::WalBeyond { at, .. } = request.command
            {
                *ends = Some(at);
            }
        }
        Reply::Agent(
            AgentReply::Done
            | AgentReply::Following { .. }
            | AgentReply::WalBeyond { .. }
            | AgentReply::Held { .. },
        ) => {}
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
        (
            Step::Fence { end, .. },
            AgentCommand::Fence {
                mode: StopMode::Fast,
            },
        ) => *end = Some(position),
        _ => {}
    }
}

fn fail(ctx: &Ctx<'_>, m: &mut Move, at: usize, failure: &Failure) {
    let Some(action) = m.todo.get_mut(at) else {
        return;
    };
    // Not proven then, and no failure of the step.
    if is_question(action) {
        m.todo.remove(at);
        return;
    }
    // One that has gone keeps nobody from what is only prepared.
    if matches!(m.step, Step::Prepare { .. }) && is_gone(ctx, action) {
        m.todo.remove(at);
        return;
    }
    m.failures = m.failures.saturating_add(1);
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
                && matches!(
                    request.command,
                    AgentCommand::Fence {
                        mode: StopMode::Fast | StopMode::Halt
                    }
                )
            {
                request.command = AgentCommand::Fence {
                    mode: StopMode::Immediate,
                };
                return;
            }
        }
        // The others may have gone on.
        Step::Replay if m.failures < MAX_FAILURES => {
            if let Action::Proxy { command, .. } = action
                && let ProxyCommand::Together { topology, .. } = command
            {
                *command = ProxyCommand::Join(topology.clone());
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

fn is_gone(ctx: &Ctx<'_>, action: &Action) -> bool {
    matches!(action, Action::Proxy { proxy, .. }
        if !matches!(ctx.obs.proxies.get(proxy), Some(Some(_))))
}

fn is_question(action: &Action) -> bool {
    matches!(action, Action::Agent { request, .. }
        if matches!(request.command, AgentCommand::WalBeyond { .. }))
}

fn receiver(action: &Action) -> String {
    match action {
        Action::Agent { instance, .. } => format!("instance \"{instance}\""),
        Action::Proxy { proxy, .. } => format!("proxy \"{proxy}\""),
    }
}

/// The new timeline begins where the old primary's WAL was found to end: nothing is missing.
fn nothing_left_behind(state: &mut ClusterState) {
    let Some(Step::Promote { ends, .. }) = state.moving().map(|m| &m.step) else {
        return;
    };
    let (ends, epoch) = (*ends, state.epoch);
    if let Some(fence) = state.fences.last_mut()
        && fence.epoch == epoch
        && Some(fence.fork) == ends
    {
        fence.lost = LostCommits::None;
    }
}

/// Records a promotion: from here on the candidate is the primary.
fn take_over(ctx: &Ctx<'_>, state: &mut ClusterState, fence: &Fence) {
    let Some(Step::Promote {
        candidate, lost, ..
    }) = state.moving().map(|m| m.step.clone())
    else {
        return;
    };
    // The agent that promotes knows nothing of what others held.
    let fence = Fence {
        lost,
        ..fence.clone()
    };
    if fence.epoch != state.epoch {
        return;
    }
    state.primary = Some(Primary {
        name: candidate.clone(),
        timeline: fence.timeline,
    });
    state.fences.push(fence);
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
    state.lease.change_hands();
}

/// One round of the step; emits what is left to do when the step stays.
pub(crate) fn round(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> More {
    let Mode::Moving(m) = std::mem::replace(&mut state.mode, Mode::Steady) else {
        return Ok(false);
    };
    let mut m = *m;
    let more = match m.step.clone() {
        Step::Prepare { candidate } => steps::planned(ctx, state, &mut m, candidate, true)?,
        Step::Drain { candidate } => steps::planned(ctx, state, &mut m, candidate, false)?,
        Step::Fence {
            preferred,
            end,
            positions,
        } => steps::fence(ctx, state, &mut m, preferred, end, positions)?,
        Step::Choose {
            preferred,
            end,
            positions,
        } => {
            steps::trim(ctx, state, &mut m, &positions);
            steps::choose(ctx, state, &mut m, preferred, end, positions)?
        }
        Step::Promote { candidate, .. } => steps::promote(ctx, state, &mut m, candidate)?,
        Step::Discard { candidate } => steps::discard(ctx, state, &mut m, &candidate)?,
        Step::Restart => steps::restart(ctx, state, &mut m)?,
        Step::Replay => return Ok(steps::replay(ctx, state, m)),
        Step::Abort { reason } => return steps::abort(ctx, state, m, reason),
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

/// How long the old primary waits for its next start where nobody waits for it: its recovery reads
/// and syncs its whole data directory, in the moment in which the clients' held statements run.
const SETTLE_MS: u64 = 100;

/// Lets the clients go first, unless commits wait for the old primary.
fn settle_first(ctx: &Ctx<'_>, state: &mut ClusterState, from: &InstanceName) {
    let waited_for = state.sync.target().contains(from);
    if state.primary_name() != Some(from)
        && !waited_for
        && let Some(member) = state.members.get_mut(from)
    {
        member.retry_at = member.retry_at.max(ctx.now.plus_millis(SETTLE_MS));
    }
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
    let promoted = state.fences.last().filter(|f| f.epoch == state.epoch);
    let lost = match promoted {
        Some(fence) if to != m.from => fence.lost,
        _ => LostCommits::None,
    };
    settle_first(ctx, state, &m.from);
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
        lost,
    });
    let over = state.operations.len().saturating_sub(MAX_OPERATIONS);
    state.operations.drain(..over);
    state.settled = Some(ctx.now);
    state.mode = Mode::Steady;
}
