//! Moves away from a primary that is up but slow: a planned switchover, because proxies say so.
//!
//! Proxies are witnesses only. Whether the primary is up, and whether a standby can take over in a
//! planned way, is judged by what the agents say, as for a switchover that a person asks for: a
//! primary that nobody hears is no matter of latency, and a failover is never begun here. The
//! invariant: no such move within `slow_interval_ms` of the end of the last operation, whatever that
//! was, so a cluster whose servers are all slow does not go round.

use helios_api::control::Slowness;

use crate::decide::Ctx;
use crate::health::Up;
use crate::observe::Observation;
use crate::state::ClusterState;
use crate::{moves, requests};

/// Begins a switchover when the primary has been found slow; `true`: it did.
pub(crate) fn leave(ctx: &mut Ctx<'_>, state: &mut ClusterState, up: &Up<'_>) -> bool {
    let Some(slow) = agreed(state, ctx.obs) else {
        return false;
    };
    let since = state.settled.map(|at| ctx.now.millis_since(at));
    if since.is_some_and(|ms| ms < ctx.settings.slow_interval_ms) {
        return false;
    }
    let Some(primary) = state.primary_name().cloned() else {
        return false;
    };
    // Nobody to move to now: the next round looks again.
    let Ok(candidate) = requests::best(ctx, state, up) else {
        return false;
    };
    let cause = format!(
        "primary is slow: heartbeats take {} ms (median), over {} ms for {} ms",
        slow.median_ms, slow.threshold_ms, slow.for_ms
    );
    moves::begin_switchover(ctx, state, primary, None, candidate, cause);
    true
}

/// What most of the proxies that answer, and know this primary, say. Where there are several, one
/// alone may have a slow way to it.
fn agreed(state: &ClusterState, obs: &Observation) -> Option<Slowness> {
    let answering = obs.proxies.values().flatten();
    let current: Vec<_> = answering.filter(|p| p.epoch == state.epoch).collect();
    let slow: Vec<_> = current.iter().filter_map(|p| p.slow).collect();
    let most = slow.len() * 2 > current.len();
    slow.into_iter().min_by_key(|s| s.for_ms).filter(|_| most)
}
