//! Who may become primary, and who does.
//!
//! With synchronous replication only a standby that must hold every acknowledged commit may be
//! chosen. A commit made under the setting `ANY 1 (S)` is on at least one member of `S`, and WAL
//! is linear: so the most advanced instance of a group that contains all of `S` holds it.

use std::collections::{BTreeMap, BTreeSet};

use helios_api::InstanceName;
use helios_api::agent::InstanceState;
use helios_api::control::LostCommits;

use crate::observe::Observation;
use crate::state::{ClusterState, Position, Settings};

/// What must be known before a candidate may be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Electorate {
    /// Asynchronous replication: the most advanced one there is.
    Anyone,
    /// Positions of all of these.
    All(BTreeSet<InstanceName>),
    /// Commits may have been acknowledged that only the primary holds.
    Nobody,
}

/// What must be known now.
#[must_use]
pub fn electorate(settings: &Settings, state: &ClusterState) -> Electorate {
    let possible = &state.sync.possible;
    // A set left over from synchronous times does no harm: everything it held may be chosen.
    if !settings.synchronous && possible.iter().all(BTreeSet::is_empty) {
        return Electorate::Anyone;
    }
    if possible.iter().any(BTreeSet::is_empty) {
        return Electorate::Nobody;
    }
    Electorate::All(possible.iter().flatten().cloned().collect())
}

/// Standbys that run, follow the current timeline and are not fenced.
#[must_use]
pub fn ready(state: &ClusterState, obs: &Observation) -> BTreeSet<InstanceName> {
    state
        .members
        .keys()
        .filter(|name| lacks(state, obs, name).is_none())
        .cloned()
        .collect()
}

/// What an instance lacks to be a candidate; `None`: nothing.
#[must_use]
pub fn lacks(state: &ClusterState, obs: &Observation, name: &InstanceName) -> Option<String> {
    let Some(member) = state.members.get(name) else {
        return Some("it is not a member".to_owned());
    };
    let primary = state.primary.as_ref()?;
    if primary.name == *name {
        return Some("it is the primary".to_owned());
    }
    if member.fenced {
        return Some("it is fenced".to_owned());
    }
    if member.followed != Some(primary.timeline) {
        return Some("it does not follow the primary yet".to_owned());
    }
    match obs
        .agent(name)
        .map(|agent| (&agent.instance, agent.leaving))
    {
        Some((InstanceState::Standby { .. }, false)) => None,
        Some((_, true)) => Some("its agent is ending".to_owned()),
        Some(_) => Some("it is not running as a standby".to_owned()),
        None => Some("its agent does not answer".to_owned()),
    }
}

/// Whether a failover could succeed now.
#[must_use]
pub fn possible(settings: &Settings, state: &ClusterState, obs: &Observation) -> bool {
    let ready = ready(state, obs);
    match electorate(settings, state) {
        Electorate::Anyone => !ready.is_empty(),
        Electorate::All(set) => set.is_subset(&ready),
        Electorate::Nobody => false,
    }
}

/// Who would most likely be promoted if the primary failed now; `None`: nobody could be, or the
/// primary moves. A guess that only costs time where it is wrong: one of those that confirm commits,
/// `before` as long as it is one.
#[must_use]
pub fn heir(
    settings: &Settings,
    state: &ClusterState,
    obs: &Observation,
    before: Option<&InstanceName>,
) -> Option<InstanceName> {
    if state.moving().is_some() || !possible(settings, state, obs) {
        return None;
    }
    let mut may = ready(state, obs);
    if let Electorate::All(set) = electorate(settings, state) {
        may.retain(|name| set.contains(name));
    }
    let same = before.filter(|before| may.contains(before));
    same.cloned().or_else(|| may.into_iter().next())
}

/// The standby to promote, once positions are final; `None`: not (yet) allowed.
///
/// `end` is where the old primary's WAL ends when that is known: who holds all of it holds every
/// commit, acknowledged or not.
#[must_use]
pub fn choose(
    electorate: &Electorate,
    positions: &BTreeMap<InstanceName, Position>,
    end: Option<Position>,
    preferred: Option<&InstanceName>,
) -> Option<InstanceName> {
    if let Some(name) = best(positions, preferred)
        && positions.get(&name).is_some_and(|p| reaches(p, end))
    {
        return Some(name);
    }
    let allowed = match electorate {
        Electorate::Anyone => true,
        Electorate::All(set) => set.iter().all(|name| positions.contains_key(name)),
        Electorate::Nobody => false,
    };
    if allowed {
        best(positions, preferred)
    } else {
        None
    }
}

/// Whether somebody's WAL ends where the old primary's does, or behind it.
fn reaches(position: &Position, end: Option<Position>) -> bool {
    end.is_some_and(|end| position.timeline == end.timeline && *position >= end)
}

/// What is known of acknowledged commits that a chosen candidate lacks: nothing is missing when it
/// was chosen by proof, be it the end of the old primary's WAL or the positions of everybody who
/// confirmed commits.
#[must_use]
pub fn lost(
    electorate: &Electorate,
    chosen: Option<&Position>,
    end: Option<Position>,
) -> LostCommits {
    let proven = chosen.is_some_and(|p| reaches(p, end));
    if proven || matches!(electorate, Electorate::All(_)) {
        LostCommits::None
    } else {
        LostCommits::Possible
    }
}

/// The most advanced one; among equals the preferred one, then the first by name.
fn best(
    positions: &BTreeMap<InstanceName, Position>,
    preferred: Option<&InstanceName>,
) -> Option<InstanceName> {
    let most = positions.values().max()?;
    let mut equals = positions.iter().filter(|(_, p)| *p == most);
    let first = equals.clone().next();
    equals
        .find(|(name, _)| Some(*name) == preferred)
        .or(first)
        .map(|(name, _)| name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use helios_api::{Lsn, Timeline};

    fn name(n: &str) -> InstanceName {
        n.parse().unwrap()
    }

    fn at(timeline: u32, end: u64) -> Position {
        Position {
            timeline: Timeline(timeline),
            end: Lsn(end),
        }
    }

    fn set(names: &[&str]) -> BTreeSet<InstanceName> {
        names.iter().map(|n| name(n)).collect()
    }

    #[test]
    fn table() {
        use Electorate::{All, Anyone, Nobody};
        let cases = [
            // (electorate, positions, end of the old primary, preferred, chosen)
            (Anyone, vec![("b", 5), ("c", 7)], None, Some("b"), Some("c")),
            (Anyone, vec![("b", 7), ("c", 7)], None, Some("c"), Some("c")),
            (Anyone, vec![], None, None, None),
            (All(set(&["b"])), vec![("b", 5)], None, None, Some("b")),
            (All(set(&["b"])), vec![("c", 9)], None, None, None),
            (
                All(set(&["b"])),
                vec![("b", 5), ("c", 9)],
                None,
                None,
                Some("c"),
            ),
            (All(set(&["b", "c"])), vec![("b", 5)], None, None, None),
            (
                All(set(&["b", "c"])),
                vec![("b", 5), ("c", 4)],
                None,
                None,
                Some("b"),
            ),
            (Nobody, vec![("b", 5)], None, None, None),
            (Nobody, vec![("b", 5)], Some(5), None, Some("b")),
            (Nobody, vec![("b", 5)], Some(6), None, None),
            (
                All(set(&["b", "c"])),
                vec![("b", 5)],
                Some(5),
                None,
                Some("b"),
            ),
        ];
        for (electorate, positions, end, preferred, chosen) in cases {
            let positions = positions
                .iter()
                .map(|(n, p)| (name(n), at(1, *p)))
                .collect();
            assert_eq!(
                choose(
                    &electorate,
                    &positions,
                    end.map(|e| at(1, e)),
                    preferred.map(name).as_ref()
                ),
                chosen.map(name),
                "{electorate:?} {positions:?} {end:?}"
            );
        }
    }

    #[test]
    fn an_end_on_another_timeline_proves_nothing() {
        let positions = [(name("b"), at(2, 9))].into();
        assert_eq!(
            choose(&Electorate::Nobody, &positions, Some(at(1, 5)), None),
            None
        );
    }
}
