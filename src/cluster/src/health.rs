//! How the primary is: the one judgement that starts a failover.
//!
//! Witnesses: the agent, who sees the postmaster; the standbys, through their WAL receivers; the
//! proxies, whose word alone never counts.

use helios_api::agent::{InstanceState, StandbyPosition};
use helios_api::{InstanceName, Lsn, Timeline};

use crate::decide::Ctx;
use crate::lease;
use crate::observe::Contact;
use crate::state::ClusterState;

/// What a primary that is up reports.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Up<'a> {
    pub(crate) timeline: Timeline,
    pub(crate) position: Lsn,
    pub(crate) standbys: &'a [StandbyPosition],
}

/// How the primary is.
#[derive(Debug, Clone)]
pub(crate) enum Health<'a> {
    /// It takes writes.
    Up(Up<'a>),
    /// Not up, and it is too early to say that it is down.
    Unknown(String),
    /// Proven unable to serve.
    Down(String),
}

/// Judges an instance that ought to be primary.
pub(crate) fn judge<'a>(ctx: &Ctx<'a>, state: &ClusterState, name: &InstanceName) -> Health<'a> {
    let Some(view) = ctx.obs.instances.get(name) else {
        return Health::Unknown("it is not known".to_owned());
    };
    let agent = match &view.contact {
        Contact::Answers(agent) => agent,
        Contact::Silent {
            proven_dead: true, ..
        } => return Health::Down("no process of it is left".to_owned()),
        Contact::Silent { for_ms, .. } => return silent(ctx, state, name, *for_ms),
    };
    match &agent.instance {
        InstanceState::Primary {
            timeline,
            position,
            standbys,
        } => Health::Up(Up {
            timeline: *timeline,
            position: *position,
            standbys,
        }),
        InstanceState::Stopped { crashed: true, .. } => {
            Health::Down("its postmaster has died".to_owned())
        }
        InstanceState::Stopped { .. } => Health::Down("its postmaster was stopped".to_owned()),
        InstanceState::Empty => Health::Down("its data directory is empty".to_owned()),
        InstanceState::Starting { step } => Health::Unknown(format!("it is starting ({step})")),
        InstanceState::Standby { .. } => Health::Unknown("it is in recovery".to_owned()),
        InstanceState::Unresponsive { for_ms } => {
            let text = format!("its postmaster has not answered for {for_ms} ms");
            if *for_ms >= ctx.settings.unresponsive_ms && second_witness(ctx, state, name) {
                Health::Down(text)
            } else {
                Health::Unknown(text)
            }
        }
    }
}

/// An agent that does not answer: its node or network may be lost, or only the way to it. Nobody is
/// promoted beside it before its lease has ended; here it is only decided that this is waited for.
fn silent<'a>(ctx: &Ctx<'a>, state: &ClusterState, name: &InstanceName, for_ms: u64) -> Health<'a> {
    let patience = ctx
        .settings
        .unresponsive_ms
        .saturating_add(ctx.settings.failover_delay_ms);
    if for_ms < patience || !lease::may_lapse(ctx, state, name) {
        return Health::Unknown("its agent does not answer".to_owned());
    }
    Health::Down(format!(
        "its agent has not answered for {for_ms} ms, and no standby hears from it"
    ))
}

/// Whether somebody else cannot reach the primary either.
fn second_witness(ctx: &Ctx<'_>, state: &ClusterState, primary: &InstanceName) -> bool {
    let silent = |name: &InstanceName| match ctx.obs.agent(name).map(|a| &a.instance) {
        Some(InstanceState::Standby { heard_ms, .. }) => {
            heard_ms.is_none_or(|ms| ms >= ctx.settings.unresponsive_ms / 2)
        }
        _ => false,
    };
    let standbys = state.members.keys().filter(|name| *name != primary);
    let mut proxies = ctx.obs.proxies.values().flatten();
    standbys.into_iter().any(silent) || proxies.any(|proxy| !proxy.primary_reachable)
}
