//! What is next in the life of a cluster that is up: fencing that an annotation asks for, instances
//! that are to go, Pods that are to be replaced. Pure.
//!
//! One thing at a time, and only while nothing moves. Invariants: the Pod of a primary is not
//! replaced while there is a standby to move it to; a standby is stopped only after commits have
//! stopped waiting for it, and only when every other instance serves; an instance is removed only
//! when its slot has been dropped and no commit can rest on it.

use std::collections::{BTreeMap, BTreeSet};

use helios_api::InstanceName;
use helios_api::agent::{AgentState, InstanceState};
use helios_cluster::{ClusterState, Mode, Observation, Request};

/// What the plan is made from, besides the durable state and what agents say.
#[derive(Debug, Default)]
pub(super) struct Given {
    /// Instances that the spec wants.
    pub(super) wanted: BTreeSet<InstanceName>,
    /// Their Pods.
    pub(super) pods: BTreeMap<InstanceName, PodView>,
    /// What the annotation says.
    pub(super) fenced: Fenced,
    /// Instances whose objects have been deleted.
    pub(super) deleted: BTreeSet<InstanceName>,
    /// Whether commits wait for standbys, and go on waiting when there is none.
    pub(super) synchronous: bool,
    pub(super) required: bool,
}

/// A Pod of an instance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PodView {
    pub(super) name: String,
    pub(super) uid: String,
    /// Whether the spec asks for another one.
    pub(super) outdated: bool,
    /// Whether it is being deleted.
    pub(super) going: bool,
    /// Whether Kubernetes calls it ready.
    pub(super) ready: bool,
    /// Why it does not run, as the kubelet or the scheduler says.
    pub(super) trouble: Option<String>,
}

/// Which instances are to be stopped and to stay so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Fenced {
    All,
    These(BTreeSet<InstanceName>),
}

impl Default for Fenced {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl Fenced {
    /// Reads the annotation: `*`, or names between commas; a JSON list is understood too.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        if text.trim() == "*" {
            return Ok(Self::All);
        }
        let apart = |c: char| c == ',' || c.is_whitespace() || matches!(c, '[' | ']' | '"');
        let names = text.split(apart).filter(|word| !word.is_empty());
        names
            .map(|word| match word {
                "*" => Err("\"*\" stands alone".to_owned()),
                name => name.parse().map_err(|e| format!("\"{name}\": {e}")),
            })
            .collect::<Result<_, _>>()
            .map(Self::These)
    }

    fn has(&self, name: &InstanceName) -> bool {
        match self {
            Self::All => true,
            Self::These(names) => names.contains(name),
        }
    }
}

/// An act upon objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    /// Delete this Pod; its StatefulSet makes another one.
    Replace {
        instance: InstanceName,
        pod: PodView,
    },
    /// Delete the instance's StatefulSet, and its volumes if that is the policy.
    Remove(InstanceName),
}

/// What is said about the Pods in the condition `UpToDate`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Progress {
    /// Every instance is as the spec has it.
    Done,
    /// What is being done.
    Rolling(String),
    /// What is waited for.
    Waiting(String),
}

/// What is next.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) aside: BTreeSet<InstanceName>,
    pub(super) removed: BTreeSet<InstanceName>,
    pub(super) request: Option<(Request, &'static str)>,
    pub(super) act: Option<Act>,
    pub(super) progress: Progress,
}

/// Makes the plan.
pub(super) fn plan(given: &Given, state: &ClusterState, obs: &Observation) -> Plan {
    let removed = state.members.keys().filter(|n| !given.wanted.contains(*n));
    // Whose Pod is being stopped counts no more, although it may stream for a moment yet.
    let going = given
        .pods
        .iter()
        .filter(|(name, pod)| pod.going && state.primary_name() != Some(*name));
    let mut plan = Plan {
        aside: going.map(|(name, _)| name.clone()).collect(),
        removed: removed.cloned().collect(),
        request: None,
        act: None,
        progress: Progress::Done,
    };
    let planner = Planner { given, state, obs };
    if state.mode != Mode::Steady {
        plan.progress = match planner.outdated().is_empty() {
            true => Progress::Done,
            false => Progress::Waiting("another operation is under way".to_owned()),
        };
        return plan;
    }
    if planner.fence(&mut plan) || planner.remove(&mut plan) {
        return plan;
    }
    planner.roll(&mut plan);
    plan
}

struct Planner<'a> {
    given: &'a Given,
    state: &'a ClusterState,
    obs: &'a Observation,
}

impl Planner<'_> {
    fn agent(&self, name: &InstanceName) -> Option<&AgentState> {
        self.obs.agent(name)
    }

    fn is_primary(&self, name: &InstanceName) -> bool {
        self.state.primary_name() == Some(name)
    }

    fn is_fenced(&self, name: &InstanceName) -> bool {
        self.state.members.get(name).is_some_and(|m| m.fenced)
    }

    /// One step towards what the annotation says; `true`: there is one to take.
    fn fence(&self, plan: &mut Plan) -> bool {
        let fenced = &self.given.fenced;
        let differs = |name: &&InstanceName| self.is_fenced(name) != fenced.has(name);
        let mut wrong: Vec<&InstanceName> = self.state.members.keys().filter(differs).collect();
        // Back first, the primary last.
        wrong.sort_by_key(|name| (!self.is_fenced(name), self.is_primary(name)));
        let Some(name) = wrong.first() else {
            return false;
        };
        let instance = (*name).clone();
        plan.request = Some(if self.is_fenced(name) {
            let why = "the annotation no longer fences the instance";
            (Request::Unfence { instance }, why)
        } else if !self.is_primary(name) {
            (Request::Fence { instance }, "the annotation fences it")
        } else if self.state.members.keys().all(|name| fenced.has(name)) {
            let why = "the annotation fences every instance";
            (Request::FencePrimary { instance }, why)
        } else {
            let why = "the annotation fences the primary";
            (Request::Switchover { to: None }, why)
        });
        true
    }

    /// One step towards the end of the instance with the highest number of those that are to go.
    fn remove(&self, plan: &mut Plan) -> bool {
        let Some(name) = plan.removed.iter().max_by_key(|name| number(name)) else {
            return false;
        };
        plan.progress = Progress::Rolling(format!("instance \"{name}\" is being removed"));
        if self.is_primary(name) {
            let why = "the primary is to be removed";
            plan.request = Some((Request::Switchover { to: None }, why));
            return true;
        }
        let member = self.state.members.get(name);
        let rests = self.state.sync.possible.iter().any(|s| s.contains(name));
        if rests || !member.is_some_and(|m| m.slot_dropped) {
            return true;
        }
        if !self.given.deleted.contains(name) {
            plan.act = Some(Act::Remove(name.clone()));
        } else if !self.given.pods.contains_key(name) {
            let instance = name.clone();
            plan.request = Some((Request::Forget { instance }, "the instance is gone"));
        }
        true
    }

    /// Instances whose Pod is not what the spec asks for, or whose server has to be started again.
    fn outdated(&self) -> Vec<&InstanceName> {
        let agents = || self.given.wanted.iter().filter_map(|n| self.agent(n));
        // What one server did not start with is not tried on the next one.
        let refused = agents().any(|agent| agent.settings.refused.is_some());
        let restart = |name: &InstanceName| {
            self.agent(name)
                .is_some_and(|agent| !agent.settings.restart.is_empty())
        };
        let pod = |name: &InstanceName| self.given.pods.get(name).is_some_and(|p| p.outdated);
        let wrong = |name: &&InstanceName| pod(name) || (!refused && restart(name));
        let mut all: Vec<_> = self.given.wanted.iter().filter(wrong).collect();
        all.sort_by_key(|name| std::cmp::Reverse(number(name)));
        all
    }

    /// What an instance lacks to serve in its place; `None`: nothing.
    fn lacks(&self, name: &InstanceName) -> Option<String> {
        let Some(pod) = self.given.pods.get(name) else {
            return Some("it has no Pod".to_owned());
        };
        if pod.going {
            return Some("its Pod is being stopped".to_owned());
        }
        if let Some(trouble) = &pod.trouble {
            return Some(trouble.clone());
        }
        if !pod.ready {
            return Some("its Pod is not ready".to_owned());
        }
        match self.agent(name).map(|agent| &agent.instance) {
            None => Some("its agent does not answer".to_owned()),
            Some(InstanceState::Primary { .. }) if self.is_primary(name) => None,
            Some(InstanceState::Standby {
                heard_ms: Some(_), ..
            }) if !self.is_primary(name) => {
                let confirms = self
                    .state
                    .sync
                    .possible
                    .iter()
                    .all(|set| set.contains(name));
                (self.given.synchronous && !confirms)
                    .then(|| "it does not confirm commits yet".to_owned())
            }
            Some(_) => Some("it does not serve".to_owned()),
        }
    }

    /// One step of a rolling change.
    fn roll(&self, plan: &mut Plan) {
        let outdated = self.outdated();
        // A fenced instance serves nobody: it is neither waited for nor a reason to wait.
        let lacking = |name: &&InstanceName| !self.is_fenced(name) && self.lacks(name).is_some();
        let standbys: Vec<_> = outdated
            .iter()
            .copied()
            .filter(|name| !self.is_primary(name))
            .collect();
        // One that does not serve loses nothing by being replaced.
        let broken = standbys.iter().copied().find(|name| {
            let going = self.given.pods.get(*name).is_none_or(|pod| pod.going);
            !going && self.lacks(name).is_some()
        });
        let mut missing = self.given.wanted.iter().filter(lacking);
        let next = match (broken, missing.next()) {
            (Some(name), _) => name,
            (None, Some(name)) => {
                if !outdated.is_empty() || self.given.pods.get(name).is_none_or(|p| p.going) {
                    let why = self.lacks(name).unwrap_or_default();
                    plan.progress = Progress::Waiting(format!("instance \"{name}\": {why}"));
                }
                return;
            }
            (None, None) => match (standbys.first(), outdated.first()) {
                (Some(name), _) => *name,
                (None, Some(primary)) if self.alone() => *primary,
                (None, Some(_)) => {
                    let why = "the primary's Pod is to be replaced";
                    plan.request = Some((Request::Switchover { to: None }, why));
                    plan.progress = Progress::Rolling(why.to_owned());
                    return;
                }
                (None, None) => return,
            },
        };
        plan.progress = Progress::Rolling(format!("instance \"{next}\" is being replaced"));
        if !self.is_primary(next) {
            plan.aside.insert(next.clone());
        }
        if self.may_stop(next)
            && let Some(pod) = self.given.pods.get(next)
        {
            let (instance, pod) = (next.clone(), pod.clone());
            plan.act = Some(Act::Replace { instance, pod });
        }
    }

    fn alone(&self) -> bool {
        self.given.wanted.len() == 1
    }

    /// Whether no commit waits for it any more. Where commits have to wait for somebody and there
    /// is nobody else, they wait for it.
    fn may_stop(&self, name: &InstanceName) -> bool {
        let sync = &self.state.sync;
        let last = self.given.required && sync.target() == BTreeSet::from([name.clone()]);
        last || (sync.is_settled() && !sync.target().contains(name))
    }
}

/// The number at the end of an instance's name.
fn number(name: &InstanceName) -> u32 {
    let digits = name.as_str().rsplit('-').next();
    digits.and_then(|d| d.parse().ok()).unwrap_or_default()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
