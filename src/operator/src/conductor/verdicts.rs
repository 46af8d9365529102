//! What is said of the life of a cluster in its conditions. Pure.

use helios_api::InstanceName;
use helios_api::agent::{AgentState, InstanceState, ServerSettings};
use helios_api::v1alpha1::ConditionType;
use helios_cluster::{ClusterState, Observation};

use super::Verdict;
use super::plan::{Fenced, Given, Plan, Progress};

/// What it is said of.
pub(super) struct Said<'a> {
    pub(super) given: &'a Given,
    pub(super) plan: &'a Plan,
    pub(super) state: &'a ClusterState,
    pub(super) obs: &'a Observation,
    pub(super) server: &'a ServerSettings,
    /// Whether there is an annotation that fences.
    pub(super) asked: bool,
}

/// Everything that is to be said. `refused`: why the last request of the plan was.
pub(super) fn all(said: &Said<'_>, refused: Option<&str>) -> Vec<Verdict> {
    let mut all = vec![up_to_date(said, refused), parameters(said)];
    all.extend(fenced(said, refused));
    all
}

fn up_to_date(said: &Said<'_>, refused: Option<&str>) -> Verdict {
    let kind = ConditionType::UpToDate;
    match (&said.plan.progress, refused) {
        (Progress::Done, _) => {
            Verdict::good(kind, "UpToDate", "every instance runs as the spec has it")
        }
        (Progress::Rolling(what), Some(why)) if said.plan.request.is_some() => {
            Verdict::bad(kind, "Waiting", &format!("{what}: {why}"))
        }
        (Progress::Rolling(what), _) => Verdict::bad(kind, "Rolling", what),
        (Progress::Waiting(why), _) => Verdict::bad(kind, "Waiting", why),
    }
}

fn agents<'a>(said: &'a Said<'_>) -> impl Iterator<Item = (&'a InstanceName, &'a AgentState)> {
    let wanted = said.given.wanted.iter();
    wanted.filter_map(|name| Some((name, said.obs.agent(name)?)))
}

fn parameters(said: &Said<'_>) -> Verdict {
    let kind = ConditionType::ParametersApplied;
    let told = said.server.fingerprint();
    let refused = agents(said).find_map(|(name, agent)| {
        let why = agent.settings.refused.as_ref()?;
        Some(format!("instance \"{name}\": {why}"))
    });
    if let Some(why) = refused {
        return Verdict::bad(kind, "Refused", &why);
    }
    let old = |agent: &AgentState| agent.settings.told.is_empty();
    if agents(said).any(|(_, agent)| !old(agent) && agent.settings.told != told) {
        return Verdict::bad(kind, "Applying", "not every instance has been told yet");
    }
    let pending = agents(said).find(|(_, agent)| !agent.settings.restart.is_empty());
    if let Some((name, agent)) = pending {
        let list = agent.settings.restart.join(", ");
        let text = format!("instance \"{name}\" has to be started again for: {list}");
        return Verdict::bad(kind, "RestartPending", &text);
    }
    let before = agents(said).find(|(_, agent)| old(agent));
    if let Some((name, _)) = before {
        let text = format!(
            "the agent of instance \"{name}\" is of an earlier version, and reads changes when its Pod is replaced"
        );
        return Verdict::good(kind, "EarlierAgent", &text);
    }
    let kept = agents(said).find(|(_, agent)| !agent.settings.kept.is_empty());
    match kept {
        Some((_, agent)) => {
            let list = agent.settings.kept.join(", ");
            let text = format!(
                "in force; higher than asked for until the primary is started in place: {list}"
            );
            Verdict::good(kind, "KeptHigher", &text)
        }
        None => Verdict::good(kind, "Applied", "every parameter is in force"),
    }
}

/// Nothing is said where nobody has ever asked.
fn fenced(said: &Said<'_>, refused: Option<&str>) -> Option<Verdict> {
    let kind = ConditionType::Fenced;
    let members = &said.state.members;
    let fenced: Vec<&InstanceName> = members
        .iter()
        .filter(|(_, m)| m.fenced)
        .map(|(name, _)| name)
        .collect();
    if !said.asked {
        let back = !fenced.is_empty();
        return back.then(|| Verdict::bad(kind, "Unfencing", "instances are let back"));
    }
    if let Fenced::These(names) = &said.given.fenced
        && let Some(name) = names.iter().find(|name| !members.contains_key(*name))
    {
        let text = format!("there is no instance \"{name}\"");
        return Some(Verdict::bad(kind, "UnknownInstance", &text));
    }
    if let Some(why) = refused {
        return Some(Verdict::bad(kind, "Refused", why));
    }
    let stopped = |name: &&InstanceName| {
        said.obs.agent(name).is_none_or(|agent| {
            matches!(
                agent.instance,
                InstanceState::Stopped { .. } | InstanceState::Empty
            )
        })
    };
    if said.plan.request.is_some() || !fenced.iter().all(stopped) {
        return Some(Verdict::bad(kind, "Fencing", "instances are being stopped"));
    }
    let list: Vec<&str> = fenced.iter().map(|name| name.as_str()).collect();
    let text = format!(
        "stopped until the annotation is removed: {}",
        list.join(", ")
    );
    Some(Verdict::good(kind, "Fenced", &text))
}
