//! What people ask for, and why they do not always get it.

use std::cmp::Reverse;

use helios_api::InstanceName;
use helios_api::agent::InstanceState;

use crate::decide::Ctx;
use crate::elect;
use crate::health::{self, Health, Up};
use crate::moves;
use crate::observe::{Refusal, Request};
use crate::state::{ClusterState, Mode};

/// Takes a request or refuses it; `Some(id)` when it began an operation.
pub(crate) fn take(
    ctx: &mut Ctx<'_>,
    state: &mut ClusterState,
    request: &Request,
) -> Result<Option<u64>, Refusal> {
    match request {
        Request::Switchover { to } => switchover(ctx, state, to.as_ref()).map(Some),
        Request::Failover => failover(ctx, state).map(Some),
        Request::Fence { instance } => set_fenced(state, instance, true),
        Request::FencePrimary { instance } => fence_primary(state, instance),
        Request::Unfence { instance } => set_fenced(state, instance, false),
        Request::Forget { instance } => forget(ctx, state, instance),
    }
}

/// Only while nothing moves. What it takes to come back: an epoch of its own.
fn fence_primary(state: &mut ClusterState, name: &InstanceName) -> Result<Option<u64>, Refusal> {
    let instance = name.clone();
    match (&state.mode, state.primary_name() == Some(name)) {
        (Mode::Moving(_), _) => return Err(Refusal::UnderWay),
        (Mode::Bootstrap, _) => return Err(Refusal::NotReady),
        (Mode::Steady, false) => return set_fenced(state, name, true),
        (Mode::Steady, true) => {}
    }
    match state.members.get_mut(name) {
        Some(member) => member.fenced = true,
        None => return Err(Refusal::Unknown { instance }),
    }
    Ok(None)
}

fn forget(
    ctx: &Ctx<'_>,
    state: &mut ClusterState,
    name: &InstanceName,
) -> Result<Option<u64>, Refusal> {
    let instance = name.clone();
    if matches!(state.mode, Mode::Moving(_)) {
        return Err(Refusal::UnderWay);
    }
    if state.primary_name() == Some(name) {
        return Err(Refusal::IsPrimary { instance });
    }
    let counts = state.sync.possible.iter().any(|set| set.contains(name));
    if counts || !ctx.obs.removed.contains(name) {
        return Err(Refusal::StillCounts { instance });
    }
    match state.members.remove(name) {
        Some(_) => Ok(None),
        None => Err(Refusal::Unknown { instance }),
    }
}

fn set_fenced(
    state: &mut ClusterState,
    name: &InstanceName,
    fenced: bool,
) -> Result<Option<u64>, Refusal> {
    let instance = name.clone();
    if !state.members.contains_key(name) {
        return Err(Refusal::Unknown { instance });
    }
    if fenced && matches!(state.mode, Mode::Moving(_)) {
        return Err(Refusal::UnderWay);
    }
    if fenced && state.primary_name() == Some(name) {
        return Err(Refusal::IsPrimary { instance });
    }
    let was_primary = state.primary_name() == Some(name);
    if let Some(member) = state.members.get_mut(name) {
        // Its agent was fenced in this epoch, and takes writes in a later one only.
        if was_primary && member.fenced {
            state.epoch = state.epoch.next();
        }
        member.fenced = fenced;
        member.failures = 0;
        member.retry_at = crate::Time(0);
    }
    Ok(None)
}

fn switchover(
    ctx: &mut Ctx<'_>,
    state: &mut ClusterState,
    to: Option<&InstanceName>,
) -> Result<u64, Refusal> {
    match &state.mode {
        Mode::Bootstrap => return Err(Refusal::NotReady),
        Mode::Moving(_) => return Err(Refusal::UnderWay),
        Mode::Steady => {}
    }
    let Some(primary) = state.primary_name().cloned() else {
        return Err(Refusal::NotReady);
    };
    if let Some(name) = to {
        let instance = name.clone();
        if !state.members.contains_key(name) {
            return Err(Refusal::Unknown { instance });
        }
        if *name == primary {
            return Err(Refusal::AlreadyPrimary { instance });
        }
    }
    let up = match health::judge(ctx, state, &primary) {
        Health::Up(up) => up,
        Health::Unknown(why) | Health::Down(why) => return Err(Refusal::PrimaryDown { why }),
    };
    let candidate = match to {
        Some(name) => match unfit(ctx, state, &up, name) {
            None => name.clone(),
            Some(why) => {
                let (instance, why) = (name.clone(), why.why());
                return Err(Refusal::NotReadyToTakeOver { instance, why });
            }
        },
        None => best(ctx, state, &up)?,
    };
    Ok(moves::begin_switchover(
        ctx,
        state,
        primary,
        to.cloned(),
        candidate,
        "requested".to_owned(),
    ))
}

/// A forced failover: only for a primary that is not up, and only when somebody can take over.
fn failover(ctx: &mut Ctx<'_>, state: &mut ClusterState) -> Result<u64, Refusal> {
    let Some(primary) = state.primary_name().cloned() else {
        return Err(Refusal::NotReady);
    };
    let why = match health::judge(ctx, state, &primary) {
        Health::Up(_) => return Err(Refusal::PrimaryUp { instance: primary }),
        Health::Unknown(why) | Health::Down(why) => why,
    };
    if elect::ready(state, ctx.obs).is_empty() {
        let lacks = |name: &InstanceName| elect::lacks(state, ctx.obs, name);
        let others = state.members.keys().filter(|name| **name != primary);
        let why: Vec<_> = others
            .filter_map(|name| Some(format!("\"{name}\": {}", lacks(name)?)))
            .collect();
        return Err(Refusal::NoStandby {
            why: why.join("; "),
        });
    }
    moves::force(ctx, state, primary, &why)
}

/// The standby that would lose least time: synchronous ones first, then the least behind.
pub(crate) fn best(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    up: &Up<'_>,
) -> Result<InstanceName, Refusal> {
    let primary = state.primary_name();
    let mut why = Vec::new();
    let mut fit = Vec::new();
    for name in state.members.keys().filter(|name| Some(*name) != primary) {
        match unfit(ctx, state, up, name) {
            Some(reason) => why.push(format!("\"{name}\": {}", reason.why())),
            None => {
                let seen = up.standbys.iter().find(|s| s.name == name.as_str());
                let key = seen.map(|s| (s.synchronous, s.flushed));
                fit.push((Reverse(key), name));
            }
        }
    }
    fit.sort();
    match fit.first() {
        Some((_, name)) => Ok((*name).clone()),
        None if why.is_empty() => Err(Refusal::NoStandby {
            why: "the cluster has only one instance".to_owned(),
        }),
        None => Err(Refusal::NoStandby {
            why: why.join("; "),
        }),
    }
}

/// Why a planned move is not possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// At the moment: it may pass by itself.
    Now(String),
    /// Until something is done about it, or for longer than anybody should wait.
    Lasting(String),
}

impl Unfit {
    /// The same with other words.
    pub(crate) fn map(self, words: impl FnOnce(String) -> String) -> Self {
        match self {
            Self::Now(why) => Self::Now(words(why)),
            Self::Lasting(why) => Self::Lasting(words(why)),
        }
    }

    /// What is told to people.
    pub(crate) fn why(self) -> String {
        match self {
            Self::Now(why) | Self::Lasting(why) => why,
        }
    }
}

/// What a standby lacks to take over in a planned way.
pub(crate) fn unfit(
    ctx: &Ctx<'_>,
    state: &ClusterState,
    up: &Up<'_>,
    name: &InstanceName,
) -> Option<Unfit> {
    if let Some(why) = elect::lacks(state, ctx.obs, name) {
        return Some(Unfit::Lasting(why));
    }
    if ctx.obs.aside.contains(name) || ctx.obs.removed.contains(name) {
        return Some(Unfit::Lasting("it is about to be stopped".to_owned()));
    }
    let Some(seen) = up.standbys.iter().find(|s| s.name == name.as_str()) else {
        return Some(Unfit::Now("it does not stream from the primary".to_owned()));
    };
    let behind = up.position.0.saturating_sub(seen.flushed.0);
    if behind > ctx.settings.max_lag_bytes {
        return Some(Unfit::Now(format!("it is {behind} bytes behind")));
    }
    match ctx.obs.agent(name).map(|agent| &agent.instance) {
        Some(InstanceState::Standby { replayed, .. }) => {
            let behind = up.position.0.saturating_sub(replayed.0);
            (behind > ctx.settings.max_lag_bytes)
                .then(|| Unfit::Now(format!("it has {behind} bytes left to replay")))
        }
        _ => {
            let why = "it is not running as a standby".to_owned();
            Some(Unfit::Lasting(why))
        }
    }
}
