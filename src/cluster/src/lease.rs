//! The primary's lease: how an agent holds it, and when its end is proven to whoever decides.
//!
//! Two halves that never compare clocks. The agent's half ([`Tenancy`]) counts from the moments at
//! which the agent itself asked; the other half (`lapsed`) counts from later moments by the clock
//! of whoever decides, and longer ([`wait_ms`]). Invariant: when `lapsed` says so, every
//! [`Tenancy`] that was granted under the recorded terms has expired, and its guard has had the
//! margin to kill the server.
//!
//! A grant is the operator's. While it is away a standby takes its place: the primary writes a
//! record, and a standby that has flushed it shows that it was receiving after that moment. A
//! standby is promoted only after it has stopped receiving, and then for the lease's time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use helios_api::InstanceName;
use helios_api::agent::{AgentCommand, InstanceState, StopMode};
use helios_api::lease::{Rule, Terms};
use helios_api::{Epoch, Lsn};
use serde::{Deserialize, Serialize};

use crate::decide::Ctx;
use crate::elect::{self, Electorate};
use crate::observe::{Action, Contact, Observation};
use crate::state::{ClusterState, Mode, Position, Settings, Step};

/// Asks that are remembered; a grant is for the last or the one before.
const MAX_ASKS: usize = 8;
/// Records on their way to the standbys that are remembered.
const MAX_PROOFS: usize = 16;
/// Terms that may be in force at once, as far as is known; more are not offered.
const MAX_TERMS: usize = 8;

/// Milliseconds that whoever decides waits beyond a lease of `hold_ms`: an eighth of it, and never
/// less than a fifth of a second. It covers what the agent needs behind the end of its lease (its
/// guard looks every 20 ms; finding and killing some hundred processes takes 10 to 50 ms, on a
/// machine that is busy otherwise some times that) and the difference of two clocks' rates, which
/// is below a thousandth.
#[must_use]
pub const fn wait_ms(hold_ms: u64) -> u64 {
    let eighth = hold_ms / 8;
    hold_ms.saturating_add(if eighth > 200 { eighth } else { 200 })
}

/// A moment by the agent's own clock that no suspension stops, in milliseconds.
pub type Moment = u64;

/// The agent's half.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tenancy {
    terms: Option<Terms>,
    /// Numbers given out, and when.
    asks: VecDeque<(u64, Moment)>,
    granted: Option<Moment>,
    /// Positions of records that were written behind these moments.
    proofs: VecDeque<(Lsn, Moment)>,
    /// When the last record was written that each standby has flushed.
    confirmed: BTreeMap<InstanceName, Moment>,
}

impl Tenancy {
    /// Makes an ask; `number` is never used twice by one agent, and not by the agent before it.
    pub fn ask(&mut self, number: u64, now: Moment) {
        self.asks.push_back((number, now));
        while self.asks.len() > MAX_ASKS {
            self.asks.pop_front();
        }
    }

    /// Takes a grant with its terms, unless the ask that it answers was never made or was made
    /// longer ago than it holds. Terms earlier than those in force are not gone back to.
    pub fn grant(&mut self, terms: &Terms, ask: u64, now: Moment) -> bool {
        let asked = self.asks.iter().find(|(number, _)| *number == ask);
        let Some((_, at)) = asked.filter(|(_, at)| now.saturating_sub(*at) < terms.hold_ms) else {
            return false;
        };
        self.granted = self.granted.max(Some(*at));
        if self
            .terms
            .as_ref()
            .is_none_or(|t| t.version < terms.version)
        {
            self.terms = Some(terms.clone());
        }
        true
    }

    /// Notes that a record at `at` was written behind the moment `since`.
    pub fn written(&mut self, at: Lsn, since: Moment) {
        self.proofs.push_back((at, since));
        while self.proofs.len() > MAX_PROOFS {
            self.proofs.pop_front();
        }
    }

    /// Notes what a standby has flushed.
    pub fn flushed(&mut self, standby: &InstanceName, flushed: Lsn) {
        let reached = self.proofs.iter().filter(|(at, _)| *at <= flushed);
        if let Some(since) = reached.map(|(_, since)| *since).max() {
            let known = self.confirmed.entry(standby.clone()).or_insert(since);
            *known = since.max(*known);
        }
    }

    /// The version of the terms in force.
    #[must_use]
    pub fn version(&self) -> Option<u64> {
        self.terms.as_ref().map(|terms| terms.version)
    }

    /// Whether records should be written: the operator has not renewed for a third of the lease.
    #[must_use]
    pub fn wants_proof(&self, now: Moment) -> bool {
        let Some(terms) = self.terms.as_ref().filter(|t| t.rule != Rule::Free) else {
            return false;
        };
        self.granted
            .is_none_or(|at| now.saturating_sub(at) > terms.hold_ms / 3)
    }

    /// Whether the instance may not be writable now. One that never had a lease is not held to any.
    #[must_use]
    pub fn expired(&self, now: Moment) -> bool {
        let Some(terms) = &self.terms else {
            return false;
        };
        let by_others = match &terms.rule {
            Rule::Free => return false,
            Rule::Any(set) => set.iter().filter_map(|s| self.confirmed.get(s)).max(),
            Rule::All(set) => {
                let each: Option<Vec<_>> = set.iter().map(|s| self.confirmed.get(s)).collect();
                each.and_then(|all| all.into_iter().min())
            }
        };
        let last = self.granted.max(by_others.copied());
        last.is_none_or(|at| now.saturating_sub(at) >= terms.hold_ms)
    }
}

/// What is durable of it: the terms that the holder may be holding itself to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseState {
    /// Earliest first, never empty; the last ones are offered.
    pub possible: Vec<Terms>,
}

impl Default for LeaseState {
    fn default() -> Self {
        Self {
            possible: vec![Terms {
                version: 0,
                rule: Rule::Free,
                hold_ms: 0,
            }],
        }
    }
}

impl LeaseState {
    /// The terms that the holder is offered.
    #[must_use]
    pub fn offered(&self) -> Option<&Terms> {
        self.possible.last()
    }

    /// Another instance holds it from now on, and knows of no terms.
    pub(crate) fn change_hands(&mut self) {
        let version = self.possible.last().map_or(0, |t| t.version);
        self.possible = vec![Terms {
            version,
            rule: Rule::Free,
            hold_ms: 0,
        }];
    }

    /// How long the end of all of them takes; `None`: they do not end by themselves.
    fn wait_ms(&self) -> Option<u64> {
        let free = self.possible.iter().any(|t| t.rule == Rule::Free);
        let longest = self.possible.iter().map(|t| t.hold_ms).max()?;
        (!free).then(|| wait_ms(longest))
    }
}

/// What the executor knows of an instance's lease. All times are its own, since it began at most.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Leased {
    /// The terms that the agent last said to hold itself to.
    pub version: Option<u64>,
    /// For how long no grant was sent.
    pub ungranted_ms: u64,
    /// For how long a standby has been known to have received nothing.
    pub quiet_ms: u64,
}

impl ClusterState {
    /// The instance that may be writable, and is granted the lease.
    #[must_use]
    pub fn holder(&self) -> Option<&InstanceName> {
        let Mode::Moving(m) = &self.mode else {
            return match self.mode {
                Mode::Bootstrap => self.first.as_ref().or_else(|| self.members.keys().next()),
                _ => self.primary_name(),
            };
        };
        match &m.step {
            Step::Prepare { .. } | Step::Drain { .. } | Step::Abort { .. } | Step::Restart => {
                Some(&m.from)
            }
            // A clean stop may take longer than the lease.
            Step::Fence { .. } => m.todo.iter().any(is_clean_stop).then_some(&m.from),
            Step::Choose { .. } | Step::Discard { .. } => None,
            Step::Promote { candidate, .. } => self.primary_name().filter(|p| *p == candidate),
            Step::Replay => self.primary_name(),
        }
    }
}

fn is_clean_stop(action: &Action) -> bool {
    let mode = StopMode::Fast;
    matches!(action, Action::Agent { request, .. }
        if request.command == AgentCommand::Fence { mode })
}

/// Keeps the terms in step with who could take over.
pub(crate) fn upkeep(ctx: &Ctx<'_>, state: &mut ClusterState) {
    let Some(hold_ms) = ctx.settings.lease_ms else {
        return;
    };
    let Some(holder) = state.holder().cloned() else {
        return;
    };
    let known = ctx.obs.instances.get(&holder);
    if let Some(version) = known.and_then(|view| view.lease.version)
        && state.lease.possible.iter().any(|t| t.version == version)
    {
        state.lease.possible.retain(|t| t.version >= version);
    }
    let rule = rule(ctx.settings, state, &holder);
    let same = |t: &Terms| t.rule == rule && t.hold_ms == hold_ms;
    if !state.lease.offered().is_some_and(same) && state.lease.possible.len() < MAX_TERMS {
        let version = state.lease.offered().map_or(0, |t| t.version) + 1;
        state.lease.possible.push(Terms {
            version,
            rule,
            hold_ms,
        });
    }
}

/// Who has to be stopped before anybody else is promoted.
fn rule(settings: &Settings, state: &ClusterState, holder: &InstanceName) -> Rule {
    let others = |set: BTreeSet<InstanceName>| -> BTreeSet<_> {
        set.into_iter().filter(|name| name != holder).collect()
    };
    let (set, any) = match elect::electorate(settings, state) {
        Electorate::All(set) => (others(set), true),
        Electorate::Nobody => return Rule::Free,
        Electorate::Anyone => (others(streaming(state)), false),
    };
    match (set.is_empty(), any) {
        (true, _) => Rule::Free,
        (false, true) => Rule::Any(set),
        (false, false) => Rule::All(set),
    }
}

/// Standbys that the primary sees. Who is not among them is promoted only once one of them has
/// stopped as well.
fn streaming(state: &ClusterState) -> BTreeSet<InstanceName> {
    let timeline = state.primary.as_ref().map(|p| p.timeline);
    let here = state.members.iter().filter(|(_, m)| {
        timeline.is_some() && m.followed == timeline && !m.fenced && m.missing_since.is_none()
    });
    here.map(|(name, _)| name.clone()).collect()
}

/// Whether the silence of the holder's agent can be the end of its lease: everybody who could keep
/// it alive is here, and hears nothing from it either.
pub(crate) fn may_lapse(ctx: &Ctx<'_>, state: &ClusterState, holder: &InstanceName) -> bool {
    if ctx.settings.lease_ms.is_none() || !elect::possible(ctx.settings, state, ctx.obs) {
        return false;
    }
    let ready = elect::ready(state, ctx.obs);
    let limit = ctx.settings.unresponsive_ms / 2;
    let deaf = |name: &InstanceName| {
        ready.contains(name)
            && name != holder
            && match ctx.obs.agent(name).map(|agent| &agent.instance) {
                Some(InstanceState::Standby { heard_ms, .. }) => {
                    heard_ms.is_none_or(|ms| ms >= limit)
                }
                _ => false,
            }
    };
    broken(&state.lease, deaf)
}

/// Whether, whatever the terms, nobody confirms any more.
fn broken(lease: &LeaseState, stopped: impl Fn(&InstanceName) -> bool) -> bool {
    lease.possible.iter().all(|terms| match &terms.rule {
        Rule::Free => false,
        Rule::Any(set) => set.iter().all(&stopped),
        Rule::All(set) => set.iter().any(&stopped),
    })
}

/// Whether the holder's lease has ended for certain. `positions` are those of standbys that have
/// stopped receiving in this move.
pub(crate) fn lapsed(
    obs: &Observation,
    state: &ClusterState,
    holder: &InstanceName,
    positions: &BTreeMap<InstanceName, Position>,
) -> bool {
    let Some(wait) = state.lease.wait_ms() else {
        return false;
    };
    let Some(view) = obs.instances.get(holder) else {
        return false;
    };
    let silent = matches!(view.contact, Contact::Silent { .. });
    // The view may be older than the end of the receiver: then the position is behind it.
    let stopped = |name: &InstanceName| {
        let Some(position) = positions.get(name) else {
            return false;
        };
        let still = match obs.agent(name).map(|agent| &agent.instance) {
            Some(InstanceState::Standby { received, .. }) => *received >= position.end,
            _ => false,
        };
        let quiet = obs.instances.get(name).map_or(0, |v| v.lease.quiet_ms);
        still && quiet >= wait
    };
    silent && view.lease.ungranted_ms >= wait && broken(&state.lease, stopped)
}

/// The grant that an executor may send, from its durable state.
#[must_use]
pub fn duty(state: &ClusterState) -> Option<(InstanceName, Epoch, Terms)> {
    let terms = state.lease.offered().filter(|t| t.version > 0)?;
    Some((state.holder()?.clone(), state.epoch, terms.clone()))
}

#[cfg(test)]
mod tests;
